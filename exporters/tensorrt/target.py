"""Engines for NVIDIA GPUs, built from ONNX by TensorRT or TensorRT for RTX; the second needs no GPU to build.

The ONNX files and their weights lie in a folder of their own beside the bundle, are handed to TensorRT by path, and are
gone when nothing reads them any more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
from torch import fx

from ...compiler import rewrite
from ...compiler.errors import InternalError
from ...compiler.execute import batch_size
from ...compiler.variants import Variant
from ...runtime.cuda import compute_capability
from ...runtime.engines import Engine
from ...runtime.manifest import Dim, StateSpec
from ...runtime.tensorrt_engine import EngineFacts, Profile, TensorRtEngine, why_nothing_runs, write_facts
from ..legality import check_capabilities, default_capabilities
from ..lower import Lowered
from ..onnx.forms import DEQUANTIZE, QUANTIZE
from ..onnx.graph import check
from ..onnx.reference import open_reference
from ..onnx.weights import SharedWeights
from ..target import Progress, Target, TargetOptions, Written
from .builder import FULL, Range, build_engine, choose_package, known_capabilities
from .forms import count_quantised
from .graph import promises, to_tensorrt_onnx
from .layers import Layer, check_promises, count_kernels, rows_by_region

_WEIGHTS = "weights.bin"
# One: a second, for one sample alone, fuses a little more (77 pointwise kernels for 90 on a DiT-B/2 in fp16), but takes
# as long again to build and stores every kernel's source again, 6 to 12 MB. Give --profile where that is worth it.
PROFILES: Mapping[str, Profile] = {"batch": (1, 8, 16)}


@dataclass(frozen=True)
class _Plan:
    """What all engines of a bundle are built with."""

    package: str
    precision: str
    capabilities: tuple[str, ...]
    profiles: Mapping[str, Profile]


def write(lowered: Lowered, folder: Path, options: TargetOptions, progress: Progress) -> Written:
    """engines/<name>.engine with a .json beside each.

    Raises RecipeError for a compute capability that cannot run a format of the program, UnsupportedError for an
    operator that TensorRT does not take, EngineError for a build that fails or that breaks a promise of low precision.
    """
    plan = _plan(lowered, options)
    (folder / "engines").mkdir(parents=True, exist_ok=True)
    source = _Source(folder)
    files, kernels, regions = {}, {}, {}
    opened: dict[str, Callable[[], Engine]] = {}
    for name, variant in lowered.engines.items():
        progress(name)
        files[name] = f"engines/{name}.engine"
        onnx_file, layers = _write_engine(name, variant, folder / files[name], source, plan)
        kernels[name] = count_kernels(layers, tuple(plan.profiles))
        regions[name] = rows_by_region(layers, tuple(plan.profiles))
        opened[name] = partial(source.open, onnx_file, options.threads)
    batches = (min(low for low, _, _ in plan.profiles.values()), max(high for _, _, high in plan.profiles.values()))
    runs_here = why_nothing_runs() is None and compute_capability() in plan.capabilities
    checked = None if runs_here else _not_executed(plan)
    if runs_here:
        opened = {name: partial(TensorRtEngine, folder / file) for name, file in files.items()}
    return Written(files, kernels, opened, checked, regions, open_precision=options.precision, batch=batches)


def _not_executed(plan: _Plan) -> str:
    where = f"compute capability {', '.join(plan.capabilities)}"
    return f"built for {where}, not executed here; its ONNX source was evaluated by ONNX Runtime instead"


def _plan(lowered: Lowered, options: TargetOptions) -> _Plan:
    package = choose_package()
    formats = [options.precision, *sorted(set().union(*(_formats(each.graph) for each in lowered.engines.values())))]
    known = known_capabilities(package)
    wanted = options.compute_capabilities or (known if package == FULL else default_capabilities(formats))
    check_capabilities(wanted, formats, known)
    return _Plan(package, options.precision, tuple(wanted), options.profiles or PROFILES)


def _formats(graph: fx.GraphModule) -> set[str]:
    """Formats of stored weights and of rounded values."""
    calls = (node for node in graph.graph.nodes if rewrite.is_call(node, DEQUANTIZE, QUANTIZE))
    return {str(node.args[3]) for node in calls}


def _write_engine(
    name: str, variant: Variant, engine: Path, source: _Source, plan: _Plan
) -> tuple[Path, tuple[Layer, ...]]:
    """Write one engine. -> its ONNX file, what was compiled"""
    model = to_tensorrt_onnx(variant, plan.precision)
    promised = promises(model)
    found, count = sum(promise.stored for promise in promised), count_quantised(variant.graph)
    if found != count:
        raise InternalError(
            f"engine {name!r}: {count} layers are quantised, its ONNX has {found}; please report this with the recipe"
        )
    inputs, outputs = _ports(model.graph.inputs), _ports(model.graph.outputs)
    onnx_file = source.add(name, model)
    del model  # its weights are in the file now
    shapes = _shapes(variant.graph, plan.profiles.values())
    built = build_engine(name, onnx_file, engine, plan.capabilities, shapes, plan.package)
    check_promises(name, built.layers, promised)
    facts = EngineFacts(
        built.package, built.version, plan.capabilities, plan.precision, inputs, outputs, plan.profiles
    )  # fmt: skip
    write_facts(facts, engine)
    return onnx_file, built.layers


def _ports(values: Sequence[ir.Value]) -> dict[str, StateSpec]:
    found = {}
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        found[str(value.name)] = StateSpec(tuple(_dim(size) for size in value.shape), value.dtype.numpy().name)
    return found


def _dim(size: int | ir.SymbolicDim) -> Dim:
    """Of ONNX: a number, "s53", or "2*s53"."""
    if isinstance(size, int):
        return size
    factor = str(size.value).partition("*")[0]
    return ("batch", int(factor) if factor.isdigit() else 1)


def _shapes(graph: fx.GraphModule, profiles: Iterable[Profile]) -> list[dict[str, Range]]:
    """For each profile, the shapes of the inputs that follow the batch."""
    inputs = {name: rewrite.shape_of(node) for name, node in rewrite.placeholders(graph).items()}
    dynamic = {name: shape for name, shape in inputs.items() if not all(isinstance(size, int) for size in shape)}

    def at(shape: tuple[object, ...], batch: int) -> tuple[int, ...]:
        return tuple(batch_size(size, batch) for size in shape)

    return [
        {name: (at(shape, least), at(shape, usual), at(shape, most)) for name, shape in dynamic.items()}
        for least, usual, most in profiles
    ]


class _Source:
    """ONNX files over one weights file, beside the bundle; gone with the last function that may still open one."""

    def __init__(self, bundle: Path) -> None:
        # Its name ends like that of a bundle in the making, so that a later build removes what a killed one left.
        prefix, suffix = f".{bundle.name.lstrip('.')}.onnx-", f"-{os.getpid()}"
        self.folder = Path(tempfile.mkdtemp(suffix, prefix, bundle.parent))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.known: dict[bytes, tuple[int, int]] = {}

    def add(self, name: str, model: ir.Model) -> Path:
        with (self.folder / _WEIGHTS).open("ab") as stream:
            shared = SharedWeights(stream, _WEIGHTS)
            shared.known = self.known  # of the engines before
            shared.move(model)
        path = self.folder / f"{name}.onnx"
        ir.save(model, path)
        check(path)
        return path

    def open(self, onnx_file: Path, threads: int | None) -> Engine:
        return open_reference(onnx_file, threads=threads)


TARGET = Target(
    name="trt",
    packages=("tensorrt_rtx", "tensorrt"),
    extra="trt",
    shares_weights=False,
    precisions=lambda: ("fp16", "bf16", "fp32"),
    quantize={"symmetric": True},
    write=write,
    cannot_run=why_nothing_runs,
    takes_capabilities=True,
    takes_profiles=True,
    devices=("gpu",),
)
