"""Forms that ONNX Runtime runs quicker than what torch.onnx writes and its own fusions find.

They compute the same, only sums may be taken in another order. Measured with ONNX Runtime 1.31 on one core, before and
after, at [32, 64, 160]: an INT8 linear layer with its bias 0.40 and 0.33 ms, attention with its transpositions 2.1 and
1.4 ms, a sum and its layer norm 1.6 and 0.35 ms; a group norm at [4, 64, 32, 32] 0.55 and 0.26 ms.
Query, key and value as one product and a Split were slower than three products: 1.95 against 1.67 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset23 as op

from ...compiler.rewrite import aten
from ...kernels import ADD_TOKENS, TAKE_TOKENS
from .experts import add_by_product, add_one_by_one, take_tokens
from .forms import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_DYNAMIC,
    Translations,
    constant,
    dequantize,
    own_initializer,
    own_producer,
    pack_nibbles,
    quantize_dequantize,
)

_CONTRIB = "com.microsoft"
_SWAP_HEADS = (0, 2, 1, 3)
_BLOCKS = (256, 128, 64, 32, 16)  # of MatMulNBits; its INT8 weights have one scale a row, so the largest that fits
_SHORT = 512  # tokens; on two cores both ways take equally long at 400 (width 160) to 1024 (width 768)
_FLOAT32 = 1  # its accuracy_level: 0 unset, 1 float32, 4 INT8


def group_norm(
    x: Any, groups: int, scale: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """InstanceNormalization of [B, groups, the rest]; GroupNormalization has no kernel and becomes 29 operators."""
    by_group: Any = op.Constant(value_ints=[0, groups, -1])
    by_channel: Any = op.Constant(value_ints=[-1, *[1] * (len(x.shape) - 2)])
    flat = op.Reshape(x, by_group)
    one, zero = op.Constant(value_floats=[1.0] * groups), op.Constant(value_floats=[0.0] * groups)
    normal: Any = op.Reshape(op.InstanceNormalization(flat, one, zero, epsilon=eps), op.Shape(x))
    if scale is not None:
        normal = op.Mul(normal, op.Reshape(scale, by_channel))
    return normal if bias is None else op.Add(normal, op.Reshape(bias, by_channel))


def _quantize(x: Any, scale: Any, zero_point: Any, format: str) -> Any:
    # ONNX Runtime 1.31 turns INT8 activations into UINT8 itself, and then refuses what it made where a reshape follows.
    if format == "int8":
        zero_point = constant(onnx.TensorProto.UINT8, 128)
    return quantize_dequantize(x, scale, zero_point, "uint8")


def _quantize_dynamic(x: Any, format: str) -> Any:
    integers, scale, zero_point = op.DynamicQuantizeLinear(x)
    return op.DequantizeLinear(integers, scale, zero_point)


def _add_tokens(x: Any, places: Any, rows: Any) -> Any:
    # ScatterND adds whole rows and would be faster than both, but not right: ONNX Runtime 1.31 adds on several threads
    # without a lock, and loses sums where two experts have the same token.
    return (add_by_product if int(x.shape[1]) <= _SHORT else add_one_by_one)(x, places, rows)


TRANSLATIONS: Translations = {
    QUANTIZE: _quantize,
    QUANTIZE_DYNAMIC: _quantize_dynamic,
    DEQUANTIZE: dequantize,
    TAKE_TOKENS: take_tokens,
    ADD_TOKENS: _add_tokens,
    aten.group_norm.default: group_norm,
}


def rewrite_for_onnx_runtime(model: ir.Model) -> None:
    """Rewrite the model in place."""
    for node in list(model.graph):
        if node.op_type == "MatMul":
            _multiply_integers(model.graph, node)
            _multiply_stored(model.graph, node)
        elif node.op_type == "Attention" and not node.domain:
            _keep_heads_in_place(model.graph, node)
        elif node.op_type == "LayerNormalization":
            _normalise_a_sum(node)
    RemoveUnusedNodesPass()(model)
    if any(node.domain == _CONTRIB for node in model.graph):
        model.opset_imports[_CONTRIB] = 1


def _multiply_integers(graph: ir.Graph, product: ir.Node) -> None:
    """MatMul of dequantised values, and the Add of a bias -> MatMulIntegerToFloat.

    From Q/DQ ONNX Runtime makes the same operator without the bias, and none at all where it takes a two-dimensional
    MatMul and Add for a Gemm first.
    """
    x, weight = (_producer(value, "DequantizeLinear") for value in product.inputs)
    if x is None or weight is None or _dtype(weight.inputs[0]) != ir.DataType.INT8:
        return
    last, bias = _with_bias(product)
    (q, x_scale, x_zero), (w, w_scale) = x.inputs, weight.inputs[:2]
    inputs = [q, w, x_scale, w_scale, x_zero, None, bias]
    _replace(graph, last, "MatMulIntegerToFloat", inputs, domain=_CONTRIB)


def _multiply_stored(graph: ir.Graph, product: ir.Node) -> None:
    """MatMul with a stored weight, and the Add of a bias -> MatMulNBits that computes in float32.

    ONNX Runtime makes MatMulNBits of it too, but by default one that rounds the activations to INT8, which is slower.
    """
    weight = _producer(product.inputs[1], "DequantizeLinear") if product.graph is graph else None
    if weight is None or any(value is None or value.const_value is None for value in weight.inputs[:2]):
        return
    bits = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}.get(_dtype(weight.inputs[0]))
    if bits is None:
        return
    weight = own_producer(graph, product, 1)
    stored, scale = own_initializer(graph, weight, 0), own_initializer(graph, weight, 1)
    assert stored.const_value is not None
    assert scale.const_value is not None
    integers, scales = stored.const_value.numpy().astype(np.int8), scale.const_value.numpy()
    columns, rows = integers.shape
    block = columns // scales.shape[0] if bits == 4 else _block(columns)
    blocks = -(-columns // block)
    _store(stored, pack_blocks(integers.T, bits, block))
    _store(scale, np.ascontiguousarray(np.broadcast_to(scales.T.reshape(rows, -1), (rows, blocks))).reshape(-1))
    last, bias = _with_bias(product)
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": _FLOAT32}
    attributes: list[ir.Attr] = [ir.AttrInt64(name, value) for name, value in sizes.items()]
    inputs = [product.inputs[0], stored, scale, None, None, bias]
    _replace(graph, last, "MatMulNBits", inputs, domain=_CONTRIB, attributes=attributes)


def _block(columns: int) -> int:
    return next((size for size in _BLOCKS if columns % size == 0), _BLOCKS[-1])


def pack_blocks(integers: NDArray[np.int8], bits: int, block: int) -> NDArray[np.uint8]:
    """Integers [N, K] around zero -> bytes [N, K / block, block * bits / 8] around 2 ** (bits - 1); K is filled up."""
    middle = 1 << bits - 1
    rows, columns = integers.shape
    filled = np.full((rows, -(-columns // block) * block), middle, np.uint8)
    filled[:, :columns] = integers.astype(np.int16) + middle
    packed = filled if bits == 8 else pack_nibbles(filled)
    return packed.reshape(rows, -1, block * bits // 8)


def _store(value: ir.Value, array: NDArray[Any]) -> None:
    value.const_value = ir.tensor(array, name=value.name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)


def _with_bias(product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The product and None; or the only node that reads it, where that adds a constant vector, and the vector."""
    users = [user for user, _ in product.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        others = [value for value in users[0].inputs if value is not product.outputs[0]]
        if others and others[0] is not None and others[0].const_value is not None and _rank(others[0]) == 1:
            return users[0], others[0]
    return product, None


def _keep_heads_in_place(graph: ir.Graph, attention: ir.Node) -> None:
    """Attention of [B, L, H * D] with H as an attribute, in place of Reshape and Transpose around it."""
    flat = [_before_heads(value) for value in attention.inputs[:3]]
    users = [user for user, _ in attention.outputs[0].uses()]
    merged = _after_heads(users[0]) if len(users) == 1 else None
    heads = [_heads(value) for value in attention.inputs[:3]]
    if merged is None or any(value is None for value in flat) or heads[0] is None or heads[1] != heads[2]:
        return
    attributes = [*attention.attributes.values(), ir.AttrInt64("q_num_heads", heads[0])]
    attributes.append(ir.AttrInt64("kv_num_heads", heads[1] or heads[0]))
    _replace(graph, merged, "Attention", [*flat, *attention.inputs[3:]], attributes=attributes)


def _normalise_a_sum(norm: ir.Node) -> None:
    """Add -> Sum where only the norm reads it; from an Add ONNX Runtime makes SkipLayerNormalization, which is slow."""
    addition = _producer(norm.inputs[0], "Add")
    if addition is not None and len(addition.outputs[0].uses()) == 1:
        addition.op_type = "Sum"


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """x [B, L, H * D] where the value [B, H, L, D] is its Reshape and Transpose."""
    swapped = _producer(value, "Transpose")
    split = _producer(swapped.inputs[0], "Reshape") if swapped is not None and _swaps_heads(swapped) else None
    source = split.inputs[0] if split is not None else None
    return source if source is not None and _rank(source) == 3 else None


def _after_heads(node: ir.Node) -> ir.Node | None:
    """The Reshape to [B, L, H * D] after a Transpose back."""
    users = [user for user, _ in node.outputs[0].uses()]
    if node.op_type != "Transpose" or not _swaps_heads(node) or len(users) != 1 or users[0].op_type != "Reshape":
        return None
    before, after = node.outputs[0].shape, users[0].outputs[0].shape
    if before is None or after is None or len(after) != 3 or after[1] != before[1]:
        return None
    return users[0]


def _swaps_heads(node: ir.Node) -> bool:
    return tuple(node.attributes["perm"].as_ints()) == _SWAP_HEADS


def _heads(value: ir.Value | None) -> int | None:
    size = value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 4 else None
    return size if isinstance(size, int) else None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _dtype(value: ir.Value | None) -> ir.DataType:
    return value.dtype if value is not None and value.dtype is not None else ir.DataType.UNDEFINED


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1


def _replace(
    graph: ir.Graph, old: ir.Node, op_type: str, inputs: list[ir.Value | None], *, domain: str = "",
    attributes: list[ir.Attr] | None = None,
) -> None:  # fmt: skip
    """A new node in the place of `old` and under its name; its output takes over name, type and readers."""
    new = ir.Node(domain, op_type, inputs, attributes or [], name=old.name)
    was, now = old.outputs[0], new.outputs[0]
    now.name, now.type, now.shape = was.name, was.type, was.shape
    graph.insert_before(old, new)
    was.replace_all_uses_with(now, replace_graph_outputs=True)
    graph.remove(old, safe=True)
