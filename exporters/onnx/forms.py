"""Quantised layers as ONNX: Q/DQ operators, weights that lie [K, N], and typed 4-bit initialisers.

Every target that reads ONNX starts from these; each has a table of its own from our operators to translations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset
from torch import fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ...quant import ops as quantised_ops

Translations = Mapping[Callable[..., Any], Callable[..., Any]]

QUANTIZE = torch.ops.dcompile.quantize_dequantize.default
QUANTIZE_DYNAMIC = torch.ops.dcompile.quantize_dequantize_dynamic.default
QUANTIZE_NVFP4 = torch.ops.dcompile.quantize_dequantize_nvfp4.default
DEQUANTIZE = torch.ops.dcompile.dequantize.default
PACKED = ("int4", "nvfp4")  # formats with two elements a byte
assert quantised_ops  # the operators above are registered by its import

_DOMAIN = "dcompile"
_TYPES = {"int4": ir.DataType.INT4, "nvfp4": ir.DataType.FLOAT4E2M1}
# torch has no 4-bit tensors, so the bytes pass through torch.onnx under this operator; `type_weights` takes it out.
_typed_weight = Op(
    Opset(_DOMAIN, 1),
    "TypedWeight",
    OpSchema(
        "TypedWeight",
        _DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("packed", "tensor(uint8)")],
        outputs=[OpSchema.FormalParameter("weight", "T")],
        type_constraints=[("T", ["tensor(int4)", "tensor(float4e2m1)"], "what the bytes are")],
        attributes=[OpSchema.Attribute("type", OpSchema.AttrType.INT, "of onnx.TensorProto", required=True)],
    ),
)


# --- translations of our operators, for the tables of targets ---


def quantize_dequantize(x: Any, scale: Any, zero_point: Any, format: str) -> Any:
    """QuantizeLinear and DequantizeLinear with an explicit zero point, whose type says what the integers are."""
    if format != "uint8":
        zero_point = constant({"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[format], 0)
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def dequantize(q: Any, scale: Any, global_scale: Any, format: str, axis: int) -> Any:
    """DequantizeLinear of a stored weight: by channel, in blocks (int4), or in blocks over scales in FP8 (nvfp4)."""
    if format not in PACKED:
        return op.DequantizeLinear(q, scale, axis=axis)
    block = 2 * int(q.shape[axis]) // int(scale.shape[axis])
    if format == "nvfp4":
        scale = op.DequantizeLinear(scale, global_scale)
    return op.DequantizeLinear(_typed_weight(q, type=int(_TYPES[format])), scale, axis=axis, block_size=block)


def constant(kind: int, byte: int) -> Any:
    """A scalar of a type of one byte, by its bits."""
    return op.Constant(value=onnx.helper.make_tensor("byte", kind, [], bytes([byte]), raw=True))


# --- before torch.onnx: the graph ---


def transpose_linear_weights(module: fx.GraphModule) -> fx.GraphModule:
    """linear(x, W [N, K], b) -> matmul(x, W' [K, N]) + b, W' under the weight's own name; so for stored INT8 and FP8.

    Runtimes multiply by [K, N]: a transposition left in the graph would be folded at load into a private copy. Packed
    4-bit weights keep their layout and get a transposition, which `type_weights` can take into the initialiser.
    """
    module = rewrite.clone(module)
    readers = _readers(module)
    for node in list(module.graph.nodes):
        if not rewrite.is_call(node, aten.linear.default):
            continue
        x, weight, *rest = node.args
        assert isinstance(weight, fx.Node)
        transposed = _transposed(module, weight, readers)
        if transposed is None:
            continue
        product = rewrite.call(module, node, aten.matmul.default, x, transposed, like=node)
        if rest and rest[0] is not None:
            product = rewrite.call(module, node, aten.add.Tensor, product, rest[0], like=node)
        node.replace_all_uses_with(product)
    return rewrite.finish(module)


def _readers(module: fx.GraphModule) -> Mapping[str, int]:
    readers: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    return readers


def _transposed(module: fx.GraphModule, weight: fx.Node, readers: Mapping[str, int]) -> fx.Node | None:
    """What stands for the weight [K, N]; None where the weight must stay, as it is computed or read elsewhere."""
    stored = weight
    if rewrite.is_call(weight, DEQUANTIZE):
        source, _, _, format, axis = weight.args
        if len(weight.users) > 1 or axis != (1 if format in PACKED else 0):
            return None
        if format in PACKED:
            return rewrite.call(module, next(iter(weight.users)), aten.t.default, weight, like=weight)
        assert isinstance(source, fx.Node)
        stored = source
    path = str(stored.target)
    if stored.op != "get_attr" or readers[path] > 1:
        return None
    moved = rewrite.attribute(module, path).detach().t().contiguous()
    rewrite.assign(module, path, moved)
    stored.meta["val"] = moved
    if stored is not weight:
        return rewrite.call(module, weight, DEQUANTIZE, *weight.args[:4], 1, like=weight)
    return weight


# --- after torch.onnx: the model ---


def type_weights(model: ir.Model, *, transpose: bool = False) -> None:
    """Make packed bytes typed 4-bit initialisers, in place.

    transpose: where a weight [N, K] is transposed after it is dequantised, store [K, N] (and its scales so) instead.
    """
    for node in list(model.graph):
        if node.domain == _DOMAIN and node.op_type == "TypedWeight":
            for user, index in list(node.outputs[0].uses()):
                _type_weight(model.graph, own_producer(model.graph, user, index), transpose)
    model.opset_imports.pop(_DOMAIN, None)


def _type_weight(graph: ir.Graph, node: ir.Node, transpose: bool) -> None:
    source, typed = own_initializer(graph, node, 0), node.outputs[0]
    assert source.const_value is not None
    kind = ir.DataType(node.attributes["type"].as_int())
    packed = source.const_value.numpy()
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    ((dequantized, _),) = typed.uses()
    if transpose and _take_transposition(graph, dequantized):
        packed, rows, columns = pack_nibbles(unpack_nibbles(packed).T), columns, rows
    source.const_value = ir.PackedTensor(packed.reshape(-1), kind, shape=ir.Shape([rows, columns]), name=source.name)
    source.type, source.shape = ir.TensorType(kind), ir.Shape([rows, columns])
    typed.replace_all_uses_with(source)
    graph.remove(node, safe=True)


def _take_transposition(graph: ir.Graph, dequantized: ir.Node) -> bool:
    """Drop the Transpose after a blocked DequantizeLinear whose scales are an initialiser, turning those; -> done."""
    result, given = dequantized.outputs[0], dequantized.inputs[1]
    users = [user for user, _ in result.uses()]
    if len(users) != 1 or users[0].op_type != "Transpose" or given is None or given.const_value is None:
        return False
    scale = own_initializer(graph, dequantized, 1)
    assert scale.const_value is not None
    turned = np.ascontiguousarray(scale.const_value.numpy().T)
    scale.const_value = ir.tensor(turned, name=scale.name)
    scale.shape = ir.Shape(turned.shape)
    dequantized.attributes["axis"] = ir.AttrInt64("axis", 0)
    after = users[0].outputs[0]
    result.shape = after.shape
    after.replace_all_uses_with(result)
    graph.remove(users[0], safe=True)
    return True


def own_producer(graph: ir.Graph, node: ir.Node, index: int) -> ir.Node:
    """The node that makes input `index` of `node`; a copy of it where another reads it too, for torch.onnx makes one of
    equal ones. It has one output."""
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    assert value is not None
    assert producer is not None
    if len(value.uses()) == 1:
        return producer
    own = ir.Node(producer.domain, producer.op_type, producer.inputs, producer.attributes.values())
    own.outputs[0].type, own.outputs[0].shape = value.type, value.shape
    graph.insert_before(producer, own)
    node.replace_input_with(index, own.outputs[0])
    return own


def own_initializer(graph: ir.Graph, node: ir.Node, index: int) -> ir.Value:
    """The initialiser that is input `index` of the node; as `own_producer`, a copy where another node reads it too."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    if len(value.uses()) == 1:
        return value
    name = next(
        name for n in range(len(graph.initializers) + 1) if (name := f"{value.name}.{n}") not in graph.initializers
    )
    own = ir.val(name, const_value=value.const_value)  # of its own type, which one may change
    graph.register_initializer(own)
    node.replace_input_with(index, own)
    return own


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [N, K/2] -> codes [N, K]."""
    codes: NDArray[np.uint8] = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return codes


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of any shape -> bytes, as ONNX packs them: in order, the first in the low nibble."""
    flat = codes.reshape(-1)
    padded: NDArray[np.uint8] = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return padded[0::2] | (padded[1::2] << np.uint8(4))
