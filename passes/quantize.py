"""INT8 weights and activations for the linear layers and convolutions that carry the work and bear it."""

from __future__ import annotations

import math
from collections import defaultdict
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
from ..compiler.rewrite import aten, decided_by_step
from ..quant.int8 import affine_range, conv2d_int8, linear_int8, linear_int8_dynamic, quantize_weight

_LINEAR, _CONV = aten.linear.default, aten.conv2d.default


@dataclass(frozen=True)
class Quantize:
    """INT8 in place of fp32: weights symmetric per output channel, activations affine per tensor.

    activations: "static" takes the ranges from the whole trajectory, every step, as the plan runs it; "dynamic" takes
    them from each tensor as it comes (linear layers only; then a sample depends a little on the others in its batch).
    max_error: a layer whose own relative output error, measured on the trajectory, is larger stays in fp32.
    min_share: a layer with a smaller part of both the FLOPs and the weights stays in fp32: it would cost accuracy and
    save nothing.

    Looks for aten.linear and aten.conv2d with constant weights. Left alone: (1) layers whose weight is computed, or
    read by something else too, (2) layers above max_error, (3) layers below min_share, (4) layers that the timestep
    alone decides, which fold_timestep removes, (5) with dynamic activations, convolutions, (6) layers no step computes.
    Runs last: ranges are those of the program as it stands, with its blocks removed and its reuse steps.
    """

    name: ClassVar[str] = "quantize"

    activations: Literal["static", "dynamic"] = "static"
    max_error: float = 0.05
    min_share: float = 0.002

    def __post_init__(self) -> None:
        for option in ("max_error", "min_share"):
            if not 0.0 <= getattr(self, option) <= 1.0:
                raise RecipeError(f"quantize: {option} is {getattr(self, option)}, needed 0 to 1")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        graph = program.graph
        layers, refused = self._candidates(program)
        ranges = _Ranges()
        watched = {_input(node).name for node in layers} | {node.name for node in layers if node.target is _CONV}
        calibration.observe(program, sorted(watched), ranges.tap, "quantize: ranges")
        errors = _Errors(graph, layers, ranges, self.activations)
        calibration.observe(program, sorted(errors.watched), errors.tap, "quantize: error of each layer")
        scales, kept = {}, {}
        for node in layers:
            error = errors.relative(node.name)
            if error is None:
                refused[node.name] = "no step of the trajectory computes it"
            elif error > self.max_error:
                refused[node.name] = f"its relative error is {error:.3f}, above max_error {self.max_error}"
            else:
                kept[node.name] = error
                scales[node.name] = ranges.of(_input(node).name)
                if node.target is _CONV:
                    scales[f"{node.name}.out"] = ranges.of(node.name)
        return Decision({"errors": kept, "ranges": scales, "refused": refused})

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        errors, ranges = decision.choices["errors"], decision.choices["ranges"]
        graph = rewrite.clone(program.graph)
        for name in errors:
            node = rewrite.node_named(graph, name)
            out = ranges.get(f"{name}.out")
            _quantize_layer(graph, node, ranges[name], out, self.activations)
        details = {"layers": len(errors), "largest_layer_error": max(errors.values(), default=0.0)}
        record = Record(
            self.name, changed=len(errors), refused=tuple(decision.choices["refused"].items()), details=details
        )
        return PassResult(program.with_graph(rewrite.finish(graph)) if errors else program, record)

    def _candidates(self, program: Program) -> tuple[list[fx.Node], dict[str, str]]:
        graph = program.graph
        calls = [node for node in graph.graph.nodes if rewrite.is_call(node, _LINEAR, _CONV)]
        all_flops = sum(node_flops(node) for node in graph.graph.nodes) or 1.0
        folded = decided_by_step(graph, program.tables)
        layers, refused = [], {}
        for node in calls:
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
                refused[node.name] = "its weight is computed, or shared with another layer"
                continue
            work = node_flops(node) / all_flops
            size = rewrite.attribute(graph, str(weight.target)).numel() / program.parameters
            if node in folded:
                refused[node.name] = "it depends on the timestep alone: fold_timestep computes it at build time"
            elif max(work, size) < self.min_share:
                found = f"{100 * work:.2f} % of the FLOPs and {100 * size:.2f} % of the weights"
                refused[node.name] = f"it has {found}, both below min_share {100 * self.min_share:.2f} %"
            elif self.activations == "dynamic" and node.target is _CONV:
                refused[node.name] = "a convolution needs static activations"
            else:
                layers.append(node)
        return layers, refused


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

    def of(self, name: str) -> tuple[float, float]:
        return self.low[name], self.high[name]


class _Errors:
    """Squared error and energy of each layer's output, quantised against not, on the trajectory's own inputs."""

    def __init__(self, graph: fx.GraphModule, layers: list[fx.Node], ranges: _Ranges, activations: str) -> None:
        self.by_input: dict[str, list[tuple[str, fx.GraphModule, fx.GraphModule]]] = defaultdict(list)
        for node in layers:
            out = ranges.of(node.name) if node.target is _CONV else None
            exact = _alone(graph, node)
            rounded = rewrite.clone(exact)
            layer = next(n for n in rounded.graph.nodes if rewrite.is_call(n, _LINEAR, _CONV))
            _quantize_layer(rounded, layer, ranges.of(_input(node).name), out, activations)
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


def _quantize_layer(
    graph: fx.GraphModule, node: fx.Node, span: tuple[float, float], out: tuple[float, float] | None, activations: str
) -> None:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    path = str(weight.target)
    integers, scale = quantize_weight(rewrite.attribute(graph, path))
    if node.target is _LINEAR:
        integers = integers.t().contiguous()
    rewrite.assign(graph, path, integers)
    weight.meta["val"] = integers
    bias = node.args[2] if len(node.args) > 2 else None
    arguments: list[Any] = [node.args[0], weight, _constant(graph, node, f"{path}_scale", scale), bias]
    if node.target is _LINEAR and activations == "dynamic":
        rewrite.change_call(node, torch.ops.dcompile.linear_int8_dynamic.default, *arguments)
        return
    arguments += _range_constants(graph, node, _input(node).name, span)
    if node.target is _LINEAR:
        rewrite.change_call(node, torch.ops.dcompile.linear_int8.default, *arguments)
        return
    assert out is not None
    arguments += [*_range_constants(graph, node, node.name, out), *_geometry(node)]
    rewrite.change_call(node, torch.ops.dcompile.conv2d_int8.default, *arguments)


def _constant(graph: fx.GraphModule, before: fx.Node, path: str, value: Tensor) -> fx.Node:
    rewrite.assign(graph, path, value)
    return rewrite.read_weight(graph, path, before)


def _range_constants(graph: fx.GraphModule, before: fx.Node, tensor: str, span: tuple[float, float]) -> list[fx.Node]:
    """Scale and zero point of a tensor; layers that read the same tensor read the same constants."""
    scale, zero_point = affine_range(*span)
    return [
        _constant(graph, before, f"ranges.{tensor}_scale", torch.tensor(scale, dtype=torch.float32)),
        _constant(graph, before, f"ranges.{tensor}_zero_point", torch.tensor(zero_point, dtype=torch.uint8)),
    ]


def _geometry(node: fx.Node) -> list[Any]:
    """stride, padding, dilation, groups of an aten.conv2d call, with its defaults."""
    given = list(node.args[3:])
    defaults: list[Any] = [[1, 1], [0, 0], [1, 1], 1]
    values = given + defaults[len(given) :]
    return [[v, v] if isinstance(v, int) and i < 3 else v for i, v in enumerate(values)]


_KERNELS = (linear_int8, linear_int8_dynamic, conv2d_int8)  # their import registers the operators
