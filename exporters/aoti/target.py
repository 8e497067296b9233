"""Engines as AOTInductor packages (.pt2) over one shared weights file: for PyTorch in Python and in C++.

A package holds code for this machine's kind of CPU and no weights; `runtime.aoti_engine` says what its metadata means.
With `--compute-capability` the code is for the GPU of this machine instead.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.step_graph import MAX_BATCH
from ...compiler.variants import Variant
from ...runtime.aoti_engine import AotiEngine
from ...runtime.errors import EngineError
from ..lower import Lowered, dynamic_shapes, state_spec
from ..precision import to_precision
from ..target import Progress, Target, TargetOptions, Written
from .forms import Formed, to_cpu_forms, to_gpu_forms
from .package import INTEGER_KERNELS, Compiled, check_compiler, compile_program, needed_cpu, write_package
from .weights import SharedWeights, Stored

WEIGHTS_FILE = "engines/weights.safetensors"


def write(lowered: Lowered, folder: Path, options: TargetOptions, progress: Progress) -> Written:
    """Write engines/<name>.pt2 for every engine and engines/weights.safetensors.

    Raises EngineError where there is no C++ compiler, an operator has no code, or a promised INT8 layer is not run so.
    """
    check_compiler()
    device = _device(options)
    march, features = needed_cpu()
    (folder / "engines").mkdir(parents=True, exist_ok=True)
    weights = SharedWeights()
    files = {name: f"engines/{name}.pt2" for name in lowered.engines}
    with tempfile.TemporaryDirectory(prefix="dcompile-") as scratch:
        made = {}
        for name, variant in lowered.engines.items():
            progress(name)
            made[name] = _make(name, variant, options.precision, device, march, Path(scratch), weights)
        stored = weights.write(folder / WEIGHTS_FILE)
        machine = {"dcompile.device": device, "dcompile.cpu": " ".join(features), "dcompile.torch": torch.__version__}
        for name, variant in lowered.engines.items():
            about = {**_ports(variant), **_constants(made[name], stored), **machine}
            write_package(made[name].compiled, about, folder / files[name])
    return Written(
        files=files,
        kernels={name: each.kernels for name, each in made.items()},
        open={n: functools.partial(AotiEngine, folder / file, threads=options.threads) for n, file in files.items()},
        open_precision=options.precision,
    )


@dataclass(frozen=True)
class _Made:
    """compiled: without its constants. constants: name -> (dtype, shape, digest of what is stored for it, packing)."""

    compiled: Compiled
    constants: Mapping[str, tuple[str, tuple[int, ...], bytes, str]]
    kernels: Mapping[str, int]


@torch.no_grad()
def _make(
    name: str, variant: Variant, precision: str, device: str, march: str | None, scratch: Path, weights: SharedWeights
) -> _Made:
    graph = variant.graph if precision == "fp32" else to_precision(variant.graph, precision)
    formed = to_cpu_forms(graph) if device == "cpu" else to_gpu_forms(graph, device)
    examples = tuple(_example(node).to(device) for node in rewrite.placeholders(variant.graph).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        shapes = dynamic_shapes(variant.graph, MAX_BATCH)
        program = torch.export.export(formed.graph, examples, dynamic_shapes=shapes)
    compiled = compile_program(name, program, scratch, march)
    _check_integer_layers(name, formed, compiled.kernels)
    constants = {}
    for constant, value in compiled.constants.items():
        packing = formed.packing.get(constant, "-")
        stored = value.t() if packing == "qlinear" else value
        digest = weights.add(constant, stored)
        constants[constant] = str(value.dtype).removeprefix("torch."), tuple(stored.shape), digest, packing
    kernels = {**compiled.kernels, **{f"{op}, as plain operators": n for op, n in formed.written_out.items()}}
    return _Made(Compiled(compiled.files, {}, {}), constants, kernels)


def _example(node: fx.Node) -> Tensor:
    value = rewrite.tensor_of(node)
    assert value is not None
    return torch.zeros([rewrite.hint(size) for size in value.shape], dtype=value.dtype)


def _check_integer_layers(name: str, formed: Formed, running: Mapping[str, int]) -> None:
    found = sum(running.get(kernel, 0) for kernel in INTEGER_KERNELS)
    if found < formed.integer_layers:
        raise EngineError(
            f"engine {name!r}: {formed.integer_layers} INT8 layers are promised, AOTInductor runs {found} as "
            f"{' or '.join(INTEGER_KERNELS)}; leave quant out, or report this with the recipe"
        )


def _ports(variant: Variant) -> dict[str, str]:
    outputs = zip(variant.outputs, rewrite.output_values(variant.graph), strict=True)
    return {
        "dcompile.inputs": "\n".join(_port(*pair) for pair in rewrite.placeholders(variant.graph).items()),
        "dcompile.outputs": "\n".join(_port(f"next_{slot}", node) for slot, node in outputs),
    }


def _port(name: str, node: fx.Node) -> str:
    spec = state_spec(node)
    dims = (str(dim) if isinstance(dim, int) else f"{dim[1]}*{dim[0]}" for dim in spec.shape)
    return " ".join((name, spec.dtype, *dims))


def _constants(made: _Made, stored: Mapping[bytes, Stored]) -> dict[str, str]:
    lines = (
        (name, dtype, stored[digest].offset, packing, *shape)
        for name, (dtype, shape, digest, packing) in made.constants.items()
    )
    return {
        "dcompile.weights": Path(WEIGHTS_FILE).name,
        "dcompile.constants": "\n".join(" ".join(map(str, line)) for line in lines),
    }


def _device(options: TargetOptions) -> str:
    """ "cpu", unless the recipe names the compute capability of a GPU. Raises EngineError unless that is here."""
    if not options.compute_capabilities:
        return "cpu"
    asked = ", ".join(options.compute_capabilities)
    if not torch.cuda.is_available():
        raise EngineError(
            f"--compute-capability {asked}: target 'aoti' compiles on the GPU that it compiles for, and PyTorch "
            f"{torch.__version__} sees none; leave it out to compile for the CPU"
        )
    here = ".".join(str(part) for part in torch.cuda.get_device_capability())
    if options.compute_capabilities != (here,):
        raise EngineError(f"--compute-capability {asked}: target 'aoti' compiles for this machine's GPU alone: {here}")
    return "cuda"


def precisions() -> tuple[str, ...]:
    """The first is the default: bfloat16 where the CPU multiplies in it, else float32."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16", "fp32"
    return ("fp32", "bf16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("fp32",)


TARGET = Target(
    name="aoti",
    packages=("torch",),
    extra="",
    shares_weights=True,
    precisions=precisions,
    quantize={"symmetric": True},
    write=write,
    cannot_run=lambda: None,
    takes_capabilities=True,
    devices=("cpu", "gpu"),
)
