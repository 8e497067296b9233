"""A graph in the forms that AOTInductor runs fastest on a CPU: oneDNN's kernels over weights that it packs itself.

INT8 layers become integer kernels (`onednn.qlinear_pointwise`, `onednn.qconv_pointwise`): their sums are exact, and
what follows them (bias, activation, the rounding of the next layer's input) is done before a value leaves the
registers. Linear layers in bfloat16 become `mkldnn._linear_pointwise`. Both read weights in a layout of oneDNN's own,
made when an engine is loaded; `Formed.packing` says how. Every other operator of ours is written out as plain ATen.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.regions import module_path
from ...compiler.rewrite import aten
from ...kernels import IN_TRITON, REFERENCES
from ...quant import ops as quantised
from ...quant.formats import INT8_MAX, SMALLEST_SCALE, UINT8_MAX
from ...runtime.errors import EngineError

_OPS = torch.ops.dcompile
_STATIC, _DYNAMIC = _OPS.quantize_dequantize.default, _OPS.quantize_dequantize_dynamic.default
_DEQUANTIZE = _OPS.dequantize.default
_LINEAR, _CONV = aten.linear.default, aten.conv2d.default
_QLINEAR, _QCONV = torch.ops.onednn.qlinear_pointwise.tensor, torch.ops.onednn.qconv_pointwise.tensor
_PACKED_LINEAR = torch.ops.mkldnn._linear_pointwise.default
_INTEGERS = ("uint8", "int8")
_INT8_ZERO = 128  # static int8 runs as uint8 around this: the same grid, and convolutions take nothing else
# The first of the arguments that say what becomes of a sum: scale, zero point, dtype, activation, numbers, kind of it.
_RESULT: Mapping[Any, int] = {_QLINEAR: 7, _QCONV: 11}
_KNOWN = ("aten", "prims", "mkldnn", "onednn", "higher_order", "sym")  # libraries that come with PyTorch

# What our operators compute, as functions that torch.export traces through: a custom operator keeps its own there.
_QUANTISED: Mapping[Any, Callable[..., Any]] = {
    _STATIC: quantised.quantize_dequantize._init_fn,
    _DYNAMIC: quantised.quantize_dequantize_dynamic._init_fn,
    _OPS.quantize_dequantize_nvfp4.default: quantised.quantize_dequantize_nvfp4._init_fn,
    _DEQUANTIZE: quantised.dequantize._init_fn,
}


@dataclass(frozen=True)
class Formed:
    """graph: what to compile. packing: weight -> how oneDNN packs it, see `runtime.aoti_engine`. integer_layers: how
    many integer kernels it promises. written_out: operator of ours, now plain ATen -> how often."""

    graph: fx.GraphModule
    packing: Mapping[str, str] = field(default_factory=dict)
    integer_layers: int = 0
    written_out: Mapping[str, int] = field(default_factory=dict)


def to_cpu_forms(graph: fx.GraphModule) -> Formed:
    """A copy of the graph in these forms. Raises EngineError for an INT8 layer that would run in another precision."""
    former = _Former(rewrite.clone(graph))
    former.form_integer_layers()
    former.pack_linears()
    rewrite.drop_dead(former.module)
    written = _write_out(former.module, {**_QUANTISED, **REFERENCES})
    _check_operators(former.module)
    return Formed(rewrite.finish(former.module), former.packing, former.integer_layers, written)


def to_gpu_forms(graph: fx.GraphModule, device: str) -> Formed:
    """A copy of the graph with its weights on the device; our kernels stay. Raises EngineError if it is quantised."""
    module = rewrite.clone(graph)
    for node in module.graph.nodes:
        if rewrite.is_call(node, *_QUANTISED):
            raise EngineError(
                f"{where(node)}: target 'aoti' runs no quantised layers on a GPU ({node.target}); leave quant out, or "
                "choose target 'trt'"
            )
    for name, value in rewrite.weights(module).items():
        rewrite.assign(module, name, value.to(device))
    written = _write_out(module, {each: plain for each, plain in REFERENCES.items() if each not in IN_TRITON})
    _check_operators(module, *IN_TRITON)
    return Formed(rewrite.finish(module), written_out=written)


def _write_out(module: fx.GraphModule, functions: Mapping[Any, Callable[..., Any]]) -> Mapping[str, int]:
    """Make calls of these operators calls of functions that torch.export traces, in place. -> operator -> how often."""
    found: Counter[str] = Counter()
    for node in module.graph.nodes:
        if rewrite.is_call(node, *functions):
            number_format = next((each for each in node.args if isinstance(each, str)), "")
            found[f"{node.target._opname} {number_format}".strip()] += 1
            node.target = functions[node.target]
    return found


def _check_operators(module: fx.GraphModule, *allowed: Any) -> None:
    """Raises EngineError for an operator that does not come with PyTorch: C++ would have no code for it."""
    for node in module.graph.nodes:
        is_operator = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if is_operator and node.target.namespace not in _KNOWN and node.target not in allowed:
            raise EngineError(
                f"{where(node)}: target 'aoti' has no code for the operator {node.target}; needed operators of "
                "PyTorch: write it with those in the model, or choose another target"
            )


def where(node: fx.Node) -> str:
    """The node for an error message: the module that called it, if there is one, and its name."""
    path = [path for path, _ in module_path(node)]
    return f"{path[-1]}, node {node.name!r}" if path and path[-1] else f"node {node.name!r}"


@dataclass(frozen=True)
class _Layer:
    """A layer whose weight and input are both rounded to integers."""

    node: fx.Node
    rounding: fx.Node
    weight: fx.Node


@dataclass(frozen=True)
class _Grid:
    """Integers of a rounded tensor, and the scale and zero point (int32) by which they are real numbers.

    by_token: one more factor for each token, or None.
    """

    integers: fx.Node
    scale: fx.Node
    zero: fx.Node
    by_token: fx.Node | None = None


class _Former:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.packing: dict[str, str] = {}
        self.integer_layers = 0
        self.grids: dict[fx.Node, _Grid] = {}  # rounding -> its integers

    def form_integer_layers(self) -> None:
        layers = [layer for node in self.module.graph.nodes if (layer := _integer_layer(node))]
        for layer in layers:
            kernel = self._qlinear(layer) if layer.node.target is _LINEAR else self._qconv(layer)
            self.integer_layers += 1
            _take_activation(kernel)
            self._take_rounding(kernel)

    def pack_linears(self) -> None:
        for node in list(self.module.graph.nodes):
            if not rewrite.is_call(node, _LINEAR) or node.args[1].op != "get_attr":
                continue
            x, weight, bias = (*node.args, None)[:3]
            value = rewrite.attribute(self.module, str(weight.target))
            if value.dtype == torch.bfloat16 and value.dim() == 2:
                packed = self._packed(node, str(weight.target), value, "linear")
                kernel = self._put(node, _PACKED_LINEAR, x, packed, bias, "none", [], "")
                _take_activation(kernel)

    # --- layers ---

    def _qlinear(self, layer: _Layer) -> fx.Node:
        node, grid = layer.node, self._grid(layer.rounding)
        bias = (*node.args, None)[2]
        path = str(layer.weight.args[0].target)  # type: ignore[union-attr]
        # The kernel reads [K, N]; it is the very [N, K] of the file that is packed.
        weight = self._packed(node, path, rewrite.attribute(self.module, path).t(), "qlinear")
        result = [1.0, 0, _dtype(node), "none", [], ""]
        scales = (layer.weight.args[1], self._zero(node))
        if grid.by_token is None:
            return self._put(node, _QLINEAR, grid.integers, grid.scale, grid.zero, weight, *scales, bias, *result)
        arguments = (grid.integers, grid.scale, grid.zero, weight, *scales, None, *result)
        kernel = rewrite.call(self.module, node, _QLINEAR, *arguments, like=node)
        self._put(node, _scaled_by_token, kernel, grid.by_token, bias)
        return kernel

    def _qconv(self, layer: _Layer) -> fx.Node:
        node, grid = layer.node, self._grid(layer.rounding)
        bias, *geometry = (*node.args, *(None, [1, 1], [0, 0], [1, 1], 1)[len(node.args) - 2 :])[2:]
        stride, padding, dilation = (_pair(each) for each in geometry[:3])
        path = str(layer.weight.args[0].target)  # type: ignore[union-attr]
        pairs = ":".join(f"{a},{b}" for a, b in (stride, padding, dilation))
        packed = self._packed(node, path, rewrite.attribute(self.module, path), f"qconv:{pairs}:{geometry[3]}")
        return self._put(
            node, _QCONV, grid.integers, grid.scale, grid.zero, packed, layer.weight.args[1], self._zero(node), bias,
            stride, padding, dilation, geometry[3], 1.0, 0, _dtype(node), "none", [], "",
        )  # fmt: skip

    def _put(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call in the place of `node`."""
        new = rewrite.call(self.module, node, target, *args, like=node)
        node.replace_all_uses_with(new)
        self.module.graph.erase_node(node)
        return new

    def _packed(self, before: fx.Node, path: str, value: Tensor, how: str) -> fx.Node:
        name = f"{path}_packed"
        self.packing[name] = how
        return self._constant(before, name, value)

    # --- rounded values ---

    def _grid(self, rounding: fx.Node) -> _Grid:
        if rounding not in self.grids:
            make = self._static if rounding.target is _STATIC else self._dynamic
            self.grids[rounding] = make(rounding)
        return self.grids[rounding]

    def _static(self, rounding: fx.Node) -> _Grid:
        x, scale, *_ = rounding.args
        factor = self._constant(rounding, f"{scale.target}_inverse", 1 / self._value(scale))  # type: ignore[union-attr]
        zero = self._zero_point(rounding)
        integers = rewrite.call(self.module, rounding, _round, x, factor, zero, like=rounding)
        return _Grid(integers, scale, zero)  # type: ignore[arg-type]

    def _dynamic(self, rounding: fx.Node) -> _Grid:
        x, number_format = rounding.args
        function = _round_by_tensor if number_format == "uint8" else _round_by_token
        parts = rewrite.call(self.module, rounding, function, x, like=rounding)
        integers, scale, *more = (
            rewrite.call(self.module, rounding, operator.getitem, parts, index, like=rounding)
            for index in range(len(parts.meta["val"]))
        )
        if number_format == "uint8":
            return _Grid(integers, scale, more[0])
        step = self._constant(rounding, "ranges.by_token_scale", torch.tensor(1 / INT8_MAX))
        return _Grid(integers, step, self._zero(rounding), by_token=scale)

    def _take_rounding(self, kernel: fx.Node) -> None:
        """Let the kernel give integers where all that reads its result is a rounding that the calibration has set."""
        rounding = _only_reader(kernel)
        first = _RESULT[kernel.target]
        if rounding is None or not _rounds_to_integers(rounding, _STATIC):
            return
        scale, zero = rounding.args[1], self._zero_point(rounding)
        result = (float(self._value(scale)), int(self._value(zero)), torch.uint8)
        kernel.args = (*kernel.args[:first], *result, *kernel.args[first + 3 :])
        kernel.meta["val"] = rewrite.fake_result(kernel.target, kernel.args)
        self.grids[rounding] = _Grid(kernel, scale, zero)  # type: ignore[arg-type]
        real = rewrite.call(self.module, rounding, _real, kernel, scale, zero, _dtype(rounding), like=rounding)
        rounding.replace_all_uses_with(real)

    # --- constants ---

    def _zero_point(self, rounding: fx.Node) -> fx.Node:
        """Of a static rounding, as the kernels read it."""
        _, scale, zero, _ = rounding.args
        value = torch.tensor(_INT8_ZERO) if zero is None else self._value(zero)
        return self._constant(rounding, f"{scale.target}_zero_point", value.to(torch.int32))  # type: ignore[union-attr]

    def _zero(self, before: fx.Node) -> fx.Node:
        return self._constant(before, "ranges.no_zero_point", torch.tensor(0, dtype=torch.int32))

    def _constant(self, before: fx.Node, path: str, value: Tensor) -> fx.Node:
        rewrite.assign(self.module, path, value)
        return rewrite.read_weight(self.module, path, before)

    def _value(self, node: Any) -> Tensor:
        return rewrite.attribute(self.module, str(node.target))


# --- what the new nodes compute; torch.export traces through these ---


def _round(x: Tensor, inverse_scale: Tensor, zero: Tensor) -> Tensor:
    """x as uint8 on a grid that is known; times the inverse, as a division takes four times as long."""
    integers = torch.round(x.to(torch.float32) * inverse_scale) + zero.to(torch.float32)
    return torch.clamp(integers, 0, UINT8_MAX).to(torch.uint8)


def _round_by_tensor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x -> (uint8, scale [], zero point [] int32) of one affine grid for the whole tensor."""
    real = x.to(torch.float32)
    low, high = real.amin().clamp_max(0.0), real.amax().clamp_min(0.0)
    scale = ((high - low) / UINT8_MAX).clamp_min(SMALLEST_SCALE)
    zero = torch.clamp(torch.round(-low / scale), 0, UINT8_MAX)
    integers = torch.clamp(torch.round(real / scale) + zero, 0, UINT8_MAX).to(torch.uint8)
    return integers, scale, zero.to(torch.int32)


def _round_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> (int8, largest magnitude [..., 1]): 127 stands for that."""
    real = x.to(torch.float32)
    amax = real.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE)
    return torch.clamp(torch.round(real * (INT8_MAX / amax)), -128, INT8_MAX).to(torch.int8), amax


def _scaled_by_token(product: Tensor, by_token: Tensor, bias: Tensor | None) -> Tensor:
    scaled = product.to(torch.float32) * by_token
    return (scaled if bias is None else scaled + bias).to(product.dtype)


def _real(integers: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    return ((integers.to(torch.float32) - zero.to(torch.float32)) * scale).to(dtype)


# --- what is in a graph ---


def _integer_layer(node: fx.Node) -> _Layer | None:
    """The layer, if a kernel on integers can run it. Raises EngineError if it is meant to be one and none can."""
    if not rewrite.is_call(node, _LINEAR, _CONV):
        return None
    x, weight = _uncast(node.args[0]), _uncast(node.args[1])
    if not _rounds_to_integers(x, _STATIC, _DYNAMIC) or not rewrite.is_call(weight, _DEQUANTIZE):
        return None
    stored, _, _, number_format, axis = weight.args
    fits = number_format == "int8" and axis == 0 and stored.op == "get_attr"  # type: ignore[union-attr]
    if fits and (node.target is _LINEAR or x.target is _STATIC):
        return _Layer(node, x, weight)
    raise EngineError(
        f"{where(node)}: target 'aoti' has no kernel for integer activations ({x.target}) with {number_format} weights "
        "in this layer, and would run it in floating point: use format=int8 with static activations, or leave it out"
    )


def _rounds_to_integers(node: fx.Node, *targets: Any) -> bool:
    return rewrite.is_call(node, *targets) and node.args[3 if node.target is _STATIC else 1] in _INTEGERS


def _uncast(node: Any) -> fx.Node:
    """Where a value comes from, through changes of its floating-point dtype."""
    while rewrite.is_call(node, aten.to.dtype):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this value, through changes of dtype; None if there are more."""
    while len(node.users) == 1:
        (node,) = node.users
        if not rewrite.is_call(node, aten.to.dtype):
            return node
    return None


def _take_activation(kernel: fx.Node) -> None:
    """Let the kernel do the activation that alone reads its result."""
    users = list(kernel.users)
    first = 3 if kernel.target is _PACKED_LINEAR else _RESULT[kernel.target] + 3
    if len(users) != 1 or kernel.args[first] != "none":
        return
    activations: dict[Any, tuple[str, Any]] = {aten.relu.default: ("relu", ""), aten.silu.default: ("swish", "")}
    if kernel.target is not _QCONV:  # has no GELU
        activations[aten.gelu.default] = "gelu", users[0].kwargs.get("approximate", "none")
    if users[0].target not in activations:
        return
    name, kind = activations[users[0].target]
    kernel.args = (*kernel.args[:first], name, [], kind)
    users[0].replace_all_uses_with(kernel)
    kernel.graph.erase_node(users[0])


def _dtype(node: fx.Node) -> torch.dtype:
    value = rewrite.tensor_of(node)
    assert value is not None
    return value.dtype


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value, *value][:2]
