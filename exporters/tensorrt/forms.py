"""Quantised layers in the forms that TensorRT compiles to low-precision kernels: a rewrite of the graph.

All were found by building them and reading the layers; tests/exporters/test_tensorrt_recipes.py builds each.

- int8 and fp8: a product of plain integers (or E4M3 values), scaled down by a power of two so that it cannot leave the
  range of fp16 whatever the weights are, then one multiplication in float32 by the real scales. TensorRT makes it
  "quantise" (fused into what comes before), the product, and "scale, bias, activation, next quantise" in one kernel;
  scales are exact in every precision.
- a scale for each token, or one that comes by step as an input: x is divided by it before and multiplied after, because
  a scale that is no constant makes TensorRT multiply in half precision.
- nvfp4: block scales from TRT_FP4DynamicQuantize, on a matrix [tokens, channels]; in more dimensions two kernels that
  only move scales are added.
- weights alone: dequantised in the kernel of the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.errors import UnsupportedError
from ...compiler.regions import module_path
from ...compiler.rewrite import aten
from ...quant import formats
from ..onnx.forms import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_NVFP4

_LARGEST = {"int8": 128.0 * 127.0, "fp8": formats.FP8_MAX**2}  # product of two factors
_FP16_MAX = 65504.0
_FP16_NORMAL = 2.0**-14  # the smallest number that fp16 holds with all its bits
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MERGED_UP_TO = 1024  # elements: initialisers of this size and equal content become one


# --- operators of these forms, with their meaning in PyTorch ---


@torch.library.custom_op("dcompile::trt_round", mutates_args=())
def trt_round(x: Tensor, scale: Tensor, factor: float, format: str, precision: str) -> Tensor:
    """x / scale rounded to "int8" or "fp8" and multiplied by `factor`, in `precision`. scale [] float32."""
    one = torch.ones((), dtype=torch.float32)
    rounds = formats.round_int8 if format == "int8" else formats.round_fp8
    return (rounds(x.to(torch.float32) / scale, one) * factor).to(DTYPES[precision])


@torch.library.custom_op("dcompile::trt_factor", mutates_args=())
def trt_factor(q: Tensor, precision: str) -> Tensor:
    """Stored int8 or fp8 values as numbers, without their scale."""
    return q.to(DTYPES[precision])


@torch.library.custom_op("dcompile::trt_nvfp4", mutates_args=())
def trt_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """x [M, K] rounded to NVFP4, block scales from x itself. global_scale [] of x's own dtype, as TensorRT wants it."""
    return formats.round_nvfp4(x.to(torch.float32), global_scale.to(torch.float32)).to(x.dtype)


@torch.library.custom_op("dcompile::trt_int4", mutates_args=())
def trt_int4(q: Tensor, scale: Tensor) -> Tensor:
    """A stored int4 weight, packed [N, K/2], in the type of its block scales [N, K/group]."""
    return formats.dequantize(q, scale.to(torch.float32), None, "int4", 1).to(scale.dtype)


@trt_round.register_fake
def _(x: Tensor, scale: Tensor, factor: float, format: str, precision: str) -> Tensor:
    return torch.empty_like(x, dtype=DTYPES[precision])


@trt_factor.register_fake
def _(q: Tensor, precision: str) -> Tensor:
    return torch.empty_like(q, dtype=DTYPES[precision])


@trt_nvfp4.register_fake
def _(x: Tensor, global_scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@trt_int4.register_fake
def _(q: Tensor, scale: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], 2 * q.shape[1]), dtype=scale.dtype)


ROUND, FACTOR = torch.ops.dcompile.trt_round.default, torch.ops.dcompile.trt_factor.default
NVFP4, INT4 = torch.ops.dcompile.trt_nvfp4.default, torch.ops.dcompile.trt_int4.default


# --- the graph ---


def to_tensorrt_forms(graph: fx.GraphModule, precision: str) -> fx.GraphModule:
    """A copy of the graph with every quantised layer in its form; it still runs in PyTorch.

    precision: of the network around the quantised products. Raises UnsupportedError for a pair of formats that
    TensorRT would multiply in half precision.
    """
    writer = _Writer(rewrite.clone(graph), precision)
    for node in list(writer.graph.graph.nodes):
        if rewrite.is_call(node, aten.scaled_dot_product_attention.default):
            writer.write_attention(node)
        elif rewrite.is_call(node, aten.linear.default, aten.conv2d.default):
            weight = _stored_weight(node)
            if weight is not None:
                writer.write_layer(node, weight)
    return rewrite.finish(writer.graph)


def count_quantised(graph: fx.GraphModule) -> int:
    """How many layers of the graph have stored weights in a low-precision format, equal small ones counted once."""
    calls = (node for node in graph.graph.nodes if rewrite.is_call(node, aten.linear.default, aten.conv2d.default))
    weights = ((node.args[0], weight) for node in calls if (weight := _stored_weight(node)) is not None)
    return len({(x, _identity(graph, weight)) for x, weight in weights})


def _identity(graph: fx.GraphModule, weight: fx.Node) -> Any:
    """Equal for weights that torch.onnx writes once, and with them the layers that read one tensor."""
    parts = [rewrite.attribute(graph, str(part.target)) for part in weight.args[:3] if isinstance(part, fx.Node)]
    if any(part.numel() > _MERGED_UP_TO for part in parts):
        return weight.name
    return tuple(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)


def _stored_weight(node: fx.Node) -> fx.Node | None:
    """The `dequantize` call that makes the layer's weight."""
    weight = _before_casts(node.args[1])
    return weight if rewrite.is_call(weight, DEQUANTIZE) else None


def _before_casts(value: Any) -> fx.Node:
    node: fx.Node = value
    while rewrite.is_call(node, aten.to.dtype):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


@dataclass
class _Writer:
    graph: fx.GraphModule
    precision: str
    prepared: dict[tuple[fx.Node, int], tuple[fx.Node, fx.Node | None, float | None]] = field(default_factory=dict)
    matrices: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write_layer(self, node: fx.Node, weight: fx.Node) -> None:
        rounded = node.args[0]
        assert isinstance(rounded, fx.Node)
        stored = str(weight.args[3])
        given = _activations(rounded)
        if given is None:
            if stored == "int4":
                self._write_int4(node, weight)
        elif given == stored == "nvfp4":
            self._write_nvfp4(node, rounded)
        elif given == stored and stored in _LARGEST:
            self._write_product(node, rounded, weight)
        else:
            raise UnsupportedError(
                f"{_where(node)}: TensorRT would multiply {stored} weights and {given} activations in "
                f"{self.precision}; give both the same format, or --target onnx"
            )

    # int8 and fp8

    def _write_product(self, node: fx.Node, rounded: fx.Node, weight: fx.Node) -> None:
        stored, weight_scale = weight.args[:2]
        assert isinstance(stored, fx.Node)
        assert isinstance(weight_scale, fx.Node)
        exponent = self._exponent(stored, str(weight.args[3]))
        x, scale, known = self._prepare(node, rounded, exponent)
        factor = self._call(node, FACTOR, stored, self.precision)
        real = rewrite.attribute(self.graph, str(weight_scale.target)) * (2.0**exponent * (known or 1.0))
        dtype = rewrite.tensor_of(node).dtype  # type: ignore[union-attr]
        bias = self._bias(node)
        geometry = tuple(node.args[3:])
        node.args = (x, factor) if node.target is aten.linear.default else (x, factor, None, *geometry)
        shape = (-1,) if node.target is aten.linear.default else (-1, 1, 1)
        after = node.next
        first = self._call(after, aten.to.dtype, node, torch.float32, like=node)
        y = self._call(
            after, aten.mul.Tensor, first, self._row(after, f"{stored.target}_real_scale", real, shape), like=node
        )
        if scale is not None:
            y = self._call(after, aten.mul.Tensor, y, scale, like=node)
        if bias is not None:
            y = self._call(after, aten.add.Tensor, y, self._row(after, *bias, shape), like=node)
        y = self._call(after, aten.to.dtype, y, dtype, like=node)
        node.replace_all_uses_with(y, delete_user_cb=lambda user: user is not first)

    def _exponent(self, stored: fx.Node, format: str) -> int:
        """So many halvings keep every sum of products inside fp16."""
        q = rewrite.attribute(self.graph, str(stored.target))
        return max(0, math.ceil(math.log2(_LARGEST[format] * q[0].numel() / _FP16_MAX)))

    def _prepare(self, node: fx.Node, rounded: fx.Node, exponent: int) -> tuple[fx.Node, fx.Node | None, float | None]:
        """(values to multiply, a scale still to multiply by, or the number that it is); once for all that read them."""
        key = (rounded, exponent)
        if key not in self.prepared:
            self.prepared[key] = self._prepared(rounded, exponent)
        return self.prepared[key]

    def _prepared(self, rounded: fx.Node, exponent: int) -> tuple[fx.Node, fx.Node | None, float | None]:
        x, factor = rounded.args[0], 2.0**-exponent
        if rewrite.is_call(rounded, QUANTIZE_DYNAMIC):
            real = self._call(rounded, aten.to.dtype, x, torch.float32)
            token = self._call(rounded, aten.amax.default, self._call(rounded, aten.abs.default, real), [-1], True)
            token = self._call(rounded, aten.clamp_min.default, token, formats.SMALLEST_SCALE)
            unit = 1 / formats.INT8_MAX
            divided = self._call(rounded, aten.div.Tensor, real, token)
            return self._round(rounded, divided, unit, factor, "int8"), token, unit
        scale, format = rounded.args[1], str(rounded.args[3])
        assert isinstance(scale, fx.Node)
        if scale.op == "get_attr":
            number = float(rewrite.attribute(self.graph, str(scale.target)))
            return self._call(rounded, ROUND, x, scale, factor, format, self.precision), None, number
        real = self._call(rounded, aten.to.dtype, x, torch.float32)
        divided = self._call(rounded, aten.div.Tensor, real, scale)
        return self._round(rounded, divided, 1.0, factor, format), scale, None

    def _round(self, at: fx.Node, x: fx.Node, scale: float, factor: float, format: str) -> fx.Node:
        constant = self._row(at, f"units.{at.name}", torch.tensor(scale), ())
        return self._call(at, ROUND, x, constant, factor, format, self.precision)

    def _bias(self, node: fx.Node) -> tuple[str, Tensor] | None:
        if len(node.args) < 3 or node.args[2] is None:
            return None
        source = _before_casts(node.args[2])
        path = str(source.target)
        return f"{path}_real", rewrite.attribute(self.graph, path)

    # nvfp4 and int4

    def _write_nvfp4(self, node: fx.Node, rounded: fx.Node) -> None:
        if rounded not in self.matrices:
            self.matrices[rounded] = self._matrix(rounded)
        shape = rewrite.shape_of(node)
        node.args = (self.matrices[rounded], *node.args[1:])
        node.meta["val"] = rewrite.fake_result(node.target, node.args)
        if len(shape) > 2:
            back = [-1, *(rewrite.hint(size) for size in shape[1:])]
            first = self._call(node.next, aten.reshape.default, node, back, like=node)
            node.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)

    def _matrix(self, rounded: fx.Node) -> fx.Node:
        x, scale = rounded.args[:2]
        assert isinstance(scale, fx.Node)
        value = rewrite.attribute(self.graph, str(scale.target))
        if self.precision == "fp16":
            # Below this fp16 keeps fewer bits; a larger global scale only makes the block scales smaller.
            value = value.clamp_min(_FP16_NORMAL)
        short = self._row(rounded, f"{scale.target}_{self.precision}", value.to(DTYPES[self.precision]), ())
        columns = rewrite.hint(rewrite.shape_of(rounded)[-1])
        if len(rewrite.shape_of(rounded)) != 2:
            x = self._call(rounded, aten.reshape.default, x, [-1, columns])
        return self._call(rounded, NVFP4, x, short)

    def _write_int4(self, node: fx.Node, weight: fx.Node) -> None:
        """Block scales in the network's own precision: TensorRT dequantises inside the product only then."""
        stored, scale = weight.args[:2]
        assert isinstance(scale, fx.Node)
        value = rewrite.attribute(self.graph, str(scale.target)).to(DTYPES[self.precision])
        short = self._row(node, f"{scale.target}_{self.precision}", value, tuple(value.shape))
        node.args = (node.args[0], self._call(node, INT4, stored, short), *node.args[2:])

    # attention in fp8

    def write_attention(self, node: fx.Node) -> None:
        """MatMul, Softmax, MatMul between fp8 values, which becomes one kernel; other attention stays as it is."""
        q, k, v = (_before_casts(value) for value in node.args[:3])
        if not all(rewrite.is_call(each, QUANTIZE) and each.args[3] == "fp8" for each in (q, k, v)):
            return
        if any(node.args[3:]) or node.kwargs.get("attn_mask") is not None or node.kwargs.get("is_causal"):
            raise UnsupportedError(
                f"{_where(node)}: attention in fp8 with a mask is not built for TensorRT; leave it out"
            )
        scale = node.kwargs.get("scale") or rewrite.hint(rewrite.shape_of(q)[-1]) ** -0.5
        keys = self._call(node, aten.transpose.int, k.args[0], -2, -1, like=node)
        scores = self._call(node, aten.matmul.default, self._real(node, q), self._real(node, k, keys), like=node)
        weights = self._call(
            node, aten.softmax.int, self._call(node, aten.mul.Tensor, scores, scale, like=node), -1, like=node
        )
        share = self._row(node, f"units.{node.name}", torch.tensor(1 / formats.FP8_MAX), ())
        weights = self._call(node, ROUND, weights, share, 1 / formats.FP8_MAX, "fp8", self.precision, like=node)
        result = self._call(node, aten.matmul.default, weights, self._real(node, v), like=node)
        node.replace_all_uses_with(result)

    def _real(self, node: fx.Node, rounded: fx.Node, x: Any = None) -> fx.Node:
        """Rounded to fp8 and scaled back, by a scale in the network's own precision."""
        scale = rounded.args[1]
        assert isinstance(scale, fx.Node)
        number = float(rewrite.attribute(self.graph, str(scale.target)))
        x = rounded.args[0] if x is None else x
        return self._call(node, ROUND, x, scale, number, "fp8", self.precision, like=node)

    # small things

    def _call(self, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        return rewrite.call(self.graph, before, target, *args, like=like or before)

    def _row(self, before: fx.Node, path: str, value: Tensor, shape: tuple[int, ...]) -> fx.Node:
        rewrite.assign(self.graph, path, value.detach().reshape(shape))
        return rewrite.read_weight(self.graph, path, before)


def _activations(rounded: fx.Node) -> str | None:
    """Format of what the layer reads; None where it is not rounded."""
    if rewrite.is_call(rounded, QUANTIZE):
        return str(rounded.args[3])
    if rewrite.is_call(rounded, QUANTIZE_DYNAMIC):
        return "int8" if rounded.args[1] == "int8" else f"dynamic {rounded.args[1]}"
    return "nvfp4" if rewrite.is_call(rounded, QUANTIZE_NVFP4) else None


def _where(node: fx.Node) -> str:
    paths = [path for path, _ in module_path(node) if path]
    return paths[-1] if paths else node.name
