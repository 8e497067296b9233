"""Low-precision weights and activations for the linear layers and convolutions that carry the work and bear it."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError, RecipeError
from ..compiler.flops import node_flops
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.rewrite import decided_by_step
from .quantized_layer import CONV, GROUPS, LINEAR, Scheme, Span, Writer

Format = Literal["int8", "fp8", "nvfp4", "int4"]
Activations = Literal["static", "dynamic", "none"]

# Of each weight format, what activations may be: the first is taken where nothing is said.
_ACTIVATIONS: Mapping[str, tuple[Activations, ...]] = {
    "int8": ("static", "dynamic", "none"),
    "fp8": ("static", "none"),
    "nvfp4": ("dynamic", "none"),
    "int4": ("none",),
}
# About twice the largest error of a layer of the example models, at which all of them still bear the format.
_MAX_ERROR = {"int8": 0.05, "fp8": 0.1, "nvfp4": 0.25, "int4": 0.25}
_MAX_ERROR_ONE_SIDED = 0.1  # int8 around zero: an activation function's output leaves half of the grid unused


@dataclass(frozen=True)
class Quantize:
    """Fewer bits for weights, and for the activations that they are multiplied with.

    format: "int8" and "fp8" (E4M3) have one scale an output channel, "int4" one for `group` inputs of a channel,
    "nvfp4" (E2M1) one in E4M3 for 16 inputs and one for the tensor. All are symmetric.
    activations: "static" takes ranges from the whole trajectory, every step, as the plan runs it; "dynamic" takes them
    from each tensor as it comes (int8: linear layers only; nvfp4: block scales, under a static global scale); "none"
    leaves activations alone. None is what suits the format: static, for nvfp4 dynamic, for int4 none.
    symmetric: of int8 activations. Static: int8 around zero, or uint8 with a zero point. Dynamic: one int8 grid a
    token, or one uint8 grid for the tensor (then a sample depends a little on the others in its batch). None is False.
    max_error: a layer whose own relative output error, measured on the trajectory, is larger stays as it is. None is
    0.05 for int8 (0.1 for static symmetric), 0.1 for fp8, 0.25 for nvfp4 and int4.
    min_share: a layer with a smaller part of both the FLOPs and the weights stays: it would cost accuracy and save
    nothing.

    Looks for aten.linear and aten.conv2d with constant weights. Left alone: (1) layers whose weight is computed, or
    read by something else too, or quantised already, (2) layers above max_error, (3) layers below min_share, (4) layers
    that the timestep alone decides, which fold_timestep removes, (5) convolutions, unless it is int8 with static
    activations, (6) layers whose inputs are no whole number of blocks, (7) layers no step computes.
    Runs last: ranges are those of the program as it stands, with its blocks removed and its reuse steps.
    """

    name: ClassVar[str] = "quantize"

    format: Format = "int8"
    activations: Activations | None = None
    symmetric: bool | None = None
    group: int = 64
    max_error: float | None = None
    min_share: float = 0.002

    def __post_init__(self) -> None:
        for option in ("max_error", "min_share"):
            value = getattr(self, option)
            if value is not None and not 0.0 <= value <= 1.0:
                raise RecipeError(f"quantize: {option} is {value}, needed 0 to 1")
        legal = _ACTIVATIONS[self.format]
        if self.activations is not None and self.activations not in legal:
            nearest = ", or ".join([f"activations={each}" for each in legal] + _elsewhere(self.activations))
            raise RecipeError(f"quantize: format {self.format} has no {self.activations} activations; take {nearest}")
        if self.symmetric is False and (self.format != "int8" or self.activations == "none"):
            what = f"format {self.format}" if self.format != "int8" else "activations=none"
            raise RecipeError(
                f"quantize: symmetric=false means nothing with {what}: only int8 activations have a zero point; leave "
                "it out, or take format=int8 with static activations"
            )
        if self.format == "int4" and self.group not in GROUPS:
            nearest_group = min(GROUPS, key=lambda size: abs(size - self.group))
            raise RecipeError(
                f"quantize: group is {self.group}, needed one of {', '.join(map(str, GROUPS))}; take {nearest_group}"
            )
        if self.format != "int4" and self.group != 64:
            raise RecipeError(f"quantize: group is of format int4, {self.format} has none; leave group out")

    def resolved(self, preferred: Mapping[str, Any]) -> Quantize:
        """Nothing left open: what means something here, as `preferred` has it or by the format."""
        activations = self.activations or _ACTIVATIONS[self.format][0]
        symmetric = self.symmetric
        if symmetric is None and self.format == "int8" and activations != "none":
            symmetric = bool(preferred.get("symmetric", False))
        limit = self.max_error
        if limit is None:
            limit = _MAX_ERROR_ONE_SIDED if symmetric and activations == "static" else _MAX_ERROR[self.format]
        return dataclasses.replace(self, activations=activations, symmetric=symmetric, max_error=limit)

    @property
    def scheme(self) -> Scheme:
        whole = self.resolved({})
        assert whole.activations is not None
        return Scheme(self.format, _rounding(self.format, whole.activations, bool(whole.symmetric)), self.group)

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        layers, refused = self._candidates(program)
        limit, scheme = self.resolved({}).max_error, self.scheme
        assert limit is not None
        ranges = _Ranges()
        if scheme.reads_ranges:
            watched = {_input(node).name for node in layers} | {node.name for node in layers if node.target is CONV}
            calibration.observe(program, sorted(watched), ranges.tap, "quantize: ranges")
        errors = _Errors(program.graph, layers, ranges, scheme)
        calibration.observe(program, sorted(errors.watched), errors.tap, "quantize: error of each layer")
        spans: dict[str, Span] = {}
        kept: dict[str, float] = {}
        for node in layers:
            error = errors.relative(node.name)
            if error is None:
                refused[node.name] = "no step of the trajectory computes it"
            elif error > limit:
                refused[node.name] = f"its relative error is {error:.3f}, above max_error {limit}"
            else:
                kept[node.name] = error
                spans |= ranges.around(node) if scheme.reads_ranges else {}
        return Decision({"errors": kept, "ranges": spans, "refused": refused})

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        errors, ranges = decision.choices["errors"], decision.choices["ranges"]
        graph = rewrite.clone(program.graph)
        writer = Writer.of(graph, self.scheme)
        for node in list(graph.graph.nodes):
            if node.name in errors:
                writer.write(node, ranges.get(node.name), ranges.get(f"{node.name}.out"))
        details = {"layers": len(errors), "largest_layer_error": max(errors.values(), default=0.0)}
        record = Record(
            self.name, changed=len(errors), refused=tuple(decision.choices["refused"].items()), details=details
        )
        return PassResult(program.with_graph(rewrite.finish(graph)) if errors else program, record)

    def _candidates(self, program: Program) -> tuple[list[fx.Node], dict[str, str]]:
        graph, scheme = program.graph, self.scheme
        calls = [node for node in graph.graph.nodes if rewrite.is_call(node, LINEAR, CONV)]
        all_flops, all_weights = sum(map(node_flops, graph.graph.nodes)) or 1.0, program.parameters
        folded = decided_by_step(graph, program.tables)
        layers, refused = [], {}
        for node in calls:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if rewrite.is_call(weight, torch.ops.dcompile.dequantize.default):
                refused[node.name] = "it is quantised already"
                continue
            if weight.op != "get_attr" or len(weight.users) > 1:
                refused[node.name] = "its weight is computed, or shared with another layer"
                continue
            shape = rewrite.attribute(graph, str(weight.target)).shape
            work = node_flops(node) / all_flops
            size = shape.numel() / all_weights
            if node in folded:
                refused[node.name] = "it depends on the timestep alone: fold_timestep computes it at build time"
            elif max(work, size) < self.min_share:
                found = f"{100 * work:.2f} % of the FLOPs and {100 * size:.2f} % of the weights"
                refused[node.name] = f"it has {found}, both below min_share {100 * self.min_share:.2f} %"
            elif node.target is CONV and not scheme.takes_convolutions:
                refused[node.name] = "a convolution takes int8 with static activations, and nothing else"
            elif node.target is LINEAR and (unfit := scheme.why_unfit(shape[1])):
                refused[node.name] = unfit
            else:
                layers.append(node)
        return layers, refused


def _elsewhere(activations: str) -> list[str]:
    """The formats that have activations of this kind, as options to take instead."""
    return [f"format={name}" for name, legal in _ACTIVATIONS.items() if activations in legal][:1]


def _rounding(format: Format, activations: Activations, symmetric: bool) -> str | None:
    """How activations are rounded, in the words of `Scheme`."""
    if activations == "none":
        return None
    if format == "int8":
        return ("dynamic " if activations == "dynamic" else "") + ("int8" if symmetric else "uint8")
    return format


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


class _Ranges:
    """Smallest and largest value of each tensor over all steps and samples."""

    def __init__(self) -> None:
        self.low: dict[str, float] = defaultdict(lambda: float("inf"))
        self.high: dict[str, float] = defaultdict(lambda: float("-inf"))

    def tap(self, step: int, name: str, value: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(value))
        if not np.isfinite([low, high]).all():
            raise PassError(
                f"quantize: tensor {name!r} is not finite at step {step + 1}; "
                "the calibration data or a pass before it is at fault"
            )
        self.low[name] = min(self.low[name], low)
        self.high[name] = max(self.high[name], high)

    def of(self, name: str) -> Span:
        return self.low[name], self.high[name]

    def around(self, node: fx.Node) -> dict[str, Span]:
        """Of what the layer reads, under its name, and of what a convolution gives, under its name and ".out"."""
        spans = {node.name: self.of(_input(node).name)}
        return spans | ({f"{node.name}.out": self.of(node.name)} if node.target is CONV else {})


class _Errors:
    """Squared error and energy of each layer's output, quantised against not, on the trajectory's own inputs."""

    def __init__(self, graph: fx.GraphModule, layers: list[fx.Node], ranges: _Ranges, scheme: Scheme) -> None:
        self.by_input: dict[str, list[tuple[str, fx.GraphModule, fx.GraphModule]]] = defaultdict(list)
        for node in layers:
            spans = ranges.around(node) if scheme.reads_ranges else {}
            exact = _alone(graph, node)
            rounded = rewrite.clone(exact)
            layer = next(n for n in rounded.graph.nodes if rewrite.is_call(n, LINEAR, CONV))
            Writer(rounded, scheme).write(layer, spans.get(node.name), spans.get(f"{node.name}.out"))
            self.by_input[_input(node).name].append((node.name, exact, rewrite.finish(rounded)))
        self.watched = set(self.by_input)
        self.error: dict[str, float] = defaultdict(float)
        self.energy: dict[str, float] = defaultdict(float)

    def tap(self, step: int, name: str, value: Tensor) -> None:
        for layer, exact, rounded in self.by_input[name]:
            expected, found = exact(value), rounded(value)
            self.error[layer] += float((found - expected).square().sum())
            self.energy[layer] += float(expected.square().sum())

    def relative(self, layer: str) -> float | None:
        if layer not in self.energy:
            return None
        return math.sqrt(self.error[layer] / max(self.energy[layer], 1e-30))


def _alone(graph: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """A module that is this one layer: input -> output."""
    new = fx.Graph()
    x = new.placeholder("x")
    x.meta["val"] = _input(node).meta["val"]
    copies: dict[fx.Node, fx.Node] = {_input(node): x}
    for source in node.all_input_nodes:
        if source not in copies:
            assert source.op == "get_attr"
            copies[source] = new.get_attr(str(source.target))
            copies[source].meta["val"] = source.meta.get("val")
    layer = new.node_copy(node, lambda source: copies[source])
    new.output(layer)
    return fx.GraphModule(graph, new)
