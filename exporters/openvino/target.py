"""Target "openvino": one .xml an engine over one shared weights file, checked for what really runs in few bits."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx

from ...compiler import rewrite
from ...compiler.variants import Variant
from ...runtime.errors import EngineError
from ...runtime.openvino_engine import PRECISION_INFO, WEIGHTS_FILE, OpenVinoEngine
from ..lower import Lowered
from ..target import Progress, Target, TargetOptions, Written
from .running import check_promises, regions_of, running_layers

_NO_KERNELS = ("Input", "Output", "Const", "Reshape")  # nothing is computed in them
_OF_THE_SAMPLER = ("next_sample", "next_history")  # sums over all steps: these stay in fp32


def write(lowered: Lowered, folder: Path, options: TargetOptions, progress: Progress) -> Written:
    """engines/<name>.xml for every engine, and one weights file for all.

    Raises EngineError when OpenVINO cannot take an operator, or would run a quantised layer in another precision.
    """
    from .weights import SharedConstants

    (folder / "engines").mkdir(parents=True, exist_ok=True)
    files = {name: f"engines/{name}.xml" for name in lowered.engines}
    with (folder / "engines" / WEIGHTS_FILE).open("wb") as stream:
        shared = SharedConstants(stream)
        for name, variant in lowered.engines.items():
            progress(name)
            shared.save(make_model(variant, options.precision), folder / files[name])
    kernels, regions = {}, {}
    for name, variant in lowered.engines.items():
        layers = running_layers(folder / files[name], variant.graph, options.threads)
        check_promises(name, variant.graph, layers)
        kernels[name] = Counter(layer.kernel for layer in layers if layer.kind not in _NO_KERNELS)
        regions[name] = tuple(regions_of(variant.graph, layers))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # parity is judged in fp32; bf16 adds its own rounding, not ours
    opened = {
        name: partial(OpenVinoEngine, folder / file, threads=options.threads, options=exact)
        for name, file in files.items()
    }
    return Written(files=files, kernels=kernels, open=opened, regions=regions)


def make_model(variant: Variant, precision: str) -> Any:
    """The engine as an OpenVINO model, which says in itself what precision it is for."""
    from .forms import to_openvino
    from .tune import fold_zero_points, round_states, spell_out_attention

    _check_formats(variant.graph)
    model = to_openvino(variant.graph, list(variant.inputs), [f"next_{slot}" for slot in variant.outputs])
    fold_zero_points(model)
    spell_out_attention(model)
    if precision == "bf16":
        round_states(model, exact=_OF_THE_SAMPLER)
    model.set_rt_info(precision, list(PRECISION_INFO))
    return model


def _check_formats(graph: fx.GraphModule) -> None:
    """Raises EngineError for a number format that OpenVINO would take and then multiply in fp32."""
    from .forms import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4

    for node in graph.graph.nodes:
        if rewrite.is_call(node, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4):
            found = "activations with ranges of their own"
        elif rewrite.is_call(node, QUANTIZE, DEQUANTIZE) and "fp8" in node.args:
            found = "fp8"
        else:
            continue
        where = next(iter(node.users)).name
        raise EngineError(f"OpenVINO does not multiply {found} ({where!r}): take format=int8,activations=static")


def _precisions() -> tuple[str, ...]:
    """bf16 where the CPU multiplies in it."""
    from importlib.util import find_spec

    if find_spec("openvino") is None:
        return ("bf16", "fp32")
    import openvino

    capable = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if capable else ("fp32",)


TARGET = Target(
    name="openvino",
    packages=("openvino",),
    extra="openvino",
    shares_weights=True,
    precisions=_precisions,
    quantize={"symmetric": False},
    write=write,
    cannot_run=lambda: None,
)
