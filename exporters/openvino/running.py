"""What OpenVINO runs of an engine on this machine, and whether promised layers run in few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ...runtime.errors import EngineError
from ...runtime.openvino_engine import OpenVinoEngine

# What OpenVINO calls the type of a weight that it keeps as it is stored.
_STORED_AS = {"int8": ("i8", "u8"), "int4": ("i4", "u4"), "nvfp4": ("f4e2m1",)}
# On CPUs with AMX, OpenVINO 2026.4 unpacks weights alone of up to this size when it loads them, if the input's size is
# no multiple of 32 (or neither is above 32). That costs half a megabyte a layer at the most, and no accuracy.
_SMALL = 512


@dataclass(frozen=True)
class RunningLayer:
    """An operator of the compiled model. kind and primitive as OpenVINO calls them ("FullyConnected", "brgemm_..._I8").

    precision: of its weights, or of what it computes in. made_from: names of the model's operators that it stands for.
    """

    kind: str
    primitive: str
    precision: str
    made_from: tuple[str, ...]

    @property
    def kernel(self) -> str:
        return f"{self.kind} {self.primitive}"


def running_layers(path: Path, graph: fx.GraphModule, threads: int | None = None) -> tuple[RunningLayer, ...]:
    """The operators of the engine in `path` as this machine runs them.

    OpenVINO chooses kernels when shapes are known, so the model is compiled for the graph's example batch.
    """
    shapes = tuple(
        tuple(rewrite.hint(size) for size in rewrite.shape_of(node)) for node in rewrite.placeholders(graph).values()
    )
    compiled = OpenVinoEngine(path, threads=threads).compiled(shapes)
    return tuple(_running(node) for node in compiled.get_runtime_model().get_ordered_ops())


def _running(node: Any) -> RunningLayer:
    info = node.get_rt_info()

    def said(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    names = (node.friendly_name, *filter(None, said("originalLayersNames").split(",")))
    return RunningLayer(said("layerType"), said("primitiveType"), said("runtimePrecision"), names)


@dataclass(frozen=True)
class Promise:
    """A layer that the program keeps in few bits. in_integers: its activations too, so that it multiplies integers.

    is_small: OpenVINO may unpack its weight when it loads it.
    """

    path: str
    format: str
    in_integers: bool
    is_small: bool

    def is_kept(self, layer: RunningLayer) -> bool:
        if self.in_integers:
            return layer.primitive.lower().endswith("_i8")
        return self.is_small or layer.precision in _STORED_AS.get(self.format, ())


def promises(graph: fx.GraphModule) -> Iterator[Promise]:
    from .forms import DEQUANTIZE, QUANTIZE

    for node in graph.graph.nodes:
        if rewrite.is_call(node, aten.linear.default, aten.conv2d.default):
            x, weight = node.args[:2]
            if rewrite.is_call(weight, DEQUANTIZE):
                path, format = str(weight.args[0].target).rpartition(".")[0], weight.args[3]
                is_small = max(rewrite.shape_of(weight)[:2]) <= _SMALL
                yield Promise(path, format, rewrite.is_call(x, QUANTIZE), is_small)


def check_promises(name: str, graph: fx.GraphModule, layers: Sequence[RunningLayer]) -> None:
    """Raises EngineError when OpenVINO runs a layer in another precision than the program promises."""
    broken = {}
    for promise in promises(graph):
        found = _layers_of(promise.path, layers)
        if not any(promise.is_kept(layer) for layer in found):
            what = f"{promise.format} times integers" if promise.in_integers else f"with weights in {promise.format}"
            broken[promise.path] = f"{what}, found {', '.join(layer.kernel for layer in found) or 'nothing'}"
    if broken:
        path, why = next(iter(broken.items()))
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise EngineError(
            f"engine {name!r}: layer {path!r}{more} should run {why}: OpenVINO would run it in another precision here; "
            "leave quant out, or report this with the recipe"
        )


def _layers_of(path: str, layers: Sequence[RunningLayer]) -> list[RunningLayer]:
    return [
        layer for layer in layers if any(source == path or source.startswith(f"{path}/") for source in layer.made_from)
    ]


def regions_of(graph: fx.GraphModule, layers: Sequence[RunningLayer]) -> Iterator[tuple[str, str, str]]:
    """(layer, kernel, what its weights are) of every layer in few bits."""
    for promise in promises(graph):
        for layer in _layers_of(promise.path, layers):
            yield promise.path, layer.kernel, layer.precision
