"""Target "onnx": engines as ONNX files over one shared, memory-mapped weights file, in ONNX Runtime's fastest forms."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir
from torch import fx

from ...compiler import rewrite
from ...runtime.errors import EngineError
from ...runtime.onnx_engine import OnnxEngine
from ..lower import Lowered
from ..target import Progress, Target, TargetOptions, Written
from .forms import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4
from .fusion import check_fusion, fused_operators
from .graph import check, to_onnx
from .runtime_forms import TRANSLATIONS, rewrite_for_onnx_runtime
from .weights import SharedWeights

WEIGHTS_FILE = "engines/weights.bin"  # beside the engines: ONNX Runtime refuses a path that leaves their folder


def export_engines(lowered: Lowered, directory: Path, progress: Progress = lambda name: None) -> dict[str, str]:
    """Write engines/<name>.onnx for every engine and engines/weights.bin. -> engine name -> file in the bundle.

    progress(name) is called as each engine is begun. Weights that are equal byte for byte are written once.
    Raises EngineError, before anything is written, for a format that ONNX Runtime does not multiply in; InternalError
    when ONNX's own checker refuses what was written.
    """
    for name, variant in lowered.engines.items():
        _check_formats(name, variant.graph)
    (directory / "engines").mkdir(parents=True, exist_ok=True)
    files = {}
    with (directory / WEIGHTS_FILE).open("wb") as stream:
        shared = SharedWeights(stream, Path(WEIGHTS_FILE).name)
        for name, variant in lowered.engines.items():
            progress(name)
            outputs = [f"next_{slot}" for slot in variant.outputs]
            model = to_onnx(variant.graph, list(variant.inputs), outputs, TRANSLATIONS)
            rewrite_for_onnx_runtime(model)
            shared.move(model)
            files[name] = f"engines/{name}.onnx"
            ir.save(model, directory / files[name])
            check(directory / files[name])
    return files


def _check_formats(name: str, graph: fx.GraphModule) -> None:
    """Raises EngineError for a quantised layer that ONNX Runtime has no kernel for on the CPU."""
    for node in graph.graph.nodes:
        if rewrite.is_call(node, QUANTIZE, DEQUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4):
            kind = "nvfp4" if node.target is QUANTIZE_NVFP4 else next(arg for arg in node.args if isinstance(arg, str))
            if kind in ("fp8", "nvfp4") or (node.target is QUANTIZE_DYNAMIC and kind == "int8"):
                grain = ", by token" if kind == "int8" else ""
                raise EngineError(
                    f"engine {name!r}: node {node.name!r} is {kind}{grain}, which ONNX Runtime does not multiply in on "
                    "the CPU; take format=int8 with symmetric=false, or format=int4"
                )


def write(lowered: Lowered, folder: Path, options: TargetOptions, progress: Progress) -> Written:
    """engines/<name>.onnx over engines/weights.bin. Raises EngineError for a layer that would run in fp32 unasked."""
    files = export_engines(lowered, folder, progress)
    operators = {name: fused_operators(folder / file) for name, file in files.items()}
    for name, engine in lowered.engines.items():
        check_fusion(name, engine.graph, operators[name])
    opened = {name: partial(OnnxEngine, folder / file, threads=options.threads) for name, file in files.items()}
    return Written(files, operators, opened)


TARGET = Target(
    name="onnx",
    packages=("onnxruntime",),
    extra="",
    shares_weights=True,
    precisions=lambda: ("fp32",),
    quantize={"symmetric": False},
    write=write,
    cannot_run=lambda: None,
)
