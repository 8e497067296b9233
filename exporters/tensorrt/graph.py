"""The ONNX that TensorRT is given: our operators in its forms, weights converted while they are written, and what of it
must be compiled in low precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

from ...compiler.variants import Variant
from ...kernels import ADD_TOKENS, TAKE_TOKENS
from ...quant import formats
from ..onnx.experts import add_by_product, take_tokens
from ..onnx.forms import DEQUANTIZE, QUANTIZE, Translations, constant, dequantize
from ..onnx.graph import to_onnx
from ..precision import to_precision
from .forms import DTYPES, FACTOR, INT4, NVFP4, ROUND, to_tensorrt_forms
from .layers import Promise

TRT_DOMAIN = "trt"
_INTEGERS = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}
_REALS = {
    "fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16
}  # fmt: skip


def to_tensorrt_onnx(variant: Variant, precision: str) -> ir.Model:
    """What TensorRT is given: the network in `precision`, quantised layers in forms that it compiles as such."""
    graph = variant.graph
    if precision != "fp32":
        tables = [port for port, (kind, _) in variant.inputs.items() if kind == "table"]
        graph = to_precision(graph, precision, tables=tables, convert_weights=False)
    graph = to_tensorrt_forms(graph, precision)
    outputs = [f"next_{slot}" for slot in variant.outputs]
    model = to_onnx(graph, list(variant.inputs), outputs, TRANSLATIONS, transpose_weights=False)
    convert_constants(model)
    return model


# --- our operators as ONNX ---

_FP4_DYNAMIC = Op(
    Opset(TRT_DOMAIN, 1),
    "TRT_FP4DynamicQuantize",
    OpSchema(
        "TRT_FP4DynamicQuantize",
        TRT_DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", "T"), OpSchema.FormalParameter("global_scale", "T")],
        outputs=[OpSchema.FormalParameter("values", "T4"), OpSchema.FormalParameter("scales", "T8")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "of the network"),
            ("T4", ["tensor(float4e2m1)"], "values"),
            ("T8", ["tensor(float8e4m3fn)"], "one scale for 16 of them"),
        ],
        attributes=[
            OpSchema.Attribute(name, OpSchema.AttrType.INT, name, required=True)
            for name in ("axis", "block_size", "scale_type")
        ],
    ),
)


def _onnx_round(x: Any, scale: Any, factor: float, format: str, precision: str) -> Any:
    zero = constant(_INTEGERS[format], 0)
    real: Any = x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=onnx.TensorProto.FLOAT)
    integers: Any = op.QuantizeLinear(real, scale, zero)
    return op.DequantizeLinear(integers, _number(factor, precision), zero)


def _onnx_factor(q: Any, precision: str) -> Any:
    return op.DequantizeLinear(q, _number(1.0, precision))


def _onnx_int4(q: Any, scale: Any) -> Any:
    return dequantize(q, scale, None, "int4", 1)


def _onnx_nvfp4(x: Any, global_scale: Any) -> Any:
    blocks: dict[str, Any] = {"axis": -1, "block_size": formats.NVFP4_BLOCK}
    values, scales = _FP4_DYNAMIC(x, global_scale, **blocks, scale_type=onnx.TensorProto.FLOAT8E4M3FN)
    real_scales: Any = op.DequantizeLinear(scales, global_scale)
    return op.DequantizeLinear(values, real_scales, **blocks)


def _onnx_quantize_dequantize(x: Any, scale: Any, zero_point: Any, format: str) -> Any:
    """Of a value that no quantised layer reads: exact scales, and back in the type that it came in."""
    zero = constant(_INTEGERS[format], 0)
    is_float = x.dtype == ir.DataType.FLOAT
    real: Any = x if is_float else op.Cast(x, to=onnx.TensorProto.FLOAT)
    integers: Any = op.QuantizeLinear(real, scale, zero)
    rounded: Any = op.DequantizeLinear(integers, scale, zero)
    return rounded if is_float else op.Cast(rounded, to=int(x.dtype))


def _number(value: float, precision: str) -> Any:
    """A scalar constant in `precision`."""
    raw = torch.tensor([value], dtype=DTYPES[precision]).view(torch.uint8).numpy().tobytes()
    return op.Constant(value=onnx.helper.make_tensor("scale", _REALS[precision], [], raw, raw=True))


TRANSLATIONS: Translations = {
    ROUND: _onnx_round,
    FACTOR: _onnx_factor,
    NVFP4: _onnx_nvfp4,
    INT4: _onnx_int4,
    QUANTIZE: _onnx_quantize_dequantize,
    DEQUANTIZE: dequantize,
    TAKE_TOKENS: take_tokens,
    ADD_TOKENS: add_by_product,  # TensorRT can scatter, but not add while it does
}


# --- what the ONNX promises ---

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_CARRIERS = ("Cast", "Transpose", "Reshape", "Identity")
_TYPES = {
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
    ir.DataType.FLOAT4E2M1: "fp4",
}


def promises(model: ir.Model) -> tuple[Promise, ...]:
    """Every product whose second factor is dequantised, with the types that it should be computed in."""
    found = []
    for node in model.graph:
        if node.op_type not in _PRODUCTS:
            continue
        left, right = (_dequantised(value) for value in node.inputs[:2])
        if right is not None:
            activations = left.type if left is not None else None
            found.append(Promise(str(node.name), activations, right.type, (right.node,), right.stored))
    return tuple(found)


class _Dequantised(NamedTuple):
    """type: that is stored. node: name of the DequantizeLinear. stored: it is an initialiser."""

    type: str
    node: str
    stored: bool


def _dequantised(value: ir.Value | None) -> _Dequantised | None:
    """Where a factor of a product comes from, through what only moves or casts it."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _CARRIERS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source = node.inputs[0]
    assert source is not None
    maker = source.producer()
    if maker is not None and maker.domain == TRT_DOMAIN:
        return _Dequantised("fp4", str(node.name), stored=False)
    typed = maker.inputs[2] if maker is not None and maker.op_type == "QuantizeLinear" else source
    assert typed is not None
    kind = typed.dtype or (typed.const_value.dtype if typed.const_value is not None else None)
    return _Dequantised(_TYPES[kind], str(node.name), stored=maker is None) if kind in _TYPES else None


# --- weights in half precision, converted while they are written ---


def convert_constants(model: ir.Model) -> None:
    """Initialisers behind a Cast (and then a Transpose) take its type (and layout), in place; computed when written.

    So the model's float32 weights are shared with the program until the file takes them, one at a time.
    """
    for node in list(model.graph):
        if node.op_type == "Cast" and (source := node.inputs[0]) is not None and source.is_initializer():
            _fold(model.graph, node, source)


def _fold(graph: ir.Graph, cast: ir.Node, source: ir.Value) -> None:
    tensor, result = source.const_value, cast.outputs[0]
    assert tensor is not None
    dtype = ir.DataType(cast.attributes["to"].as_int())
    readers = [reader for reader, _ in result.uses()]
    turn = readers[0] if len(readers) == 1 and readers[0].op_type == "Transpose" else None
    if turn is not None:
        result = turn.outputs[0]
    permutation = list(turn.attributes["perm"].as_ints()) if turn is not None else None
    shape = [int(size) for size in tensor.shape.numpy()]
    if permutation is not None:
        shape = [shape[axis] for axis in permutation]
    name = f"{source.name}.{dtype.name.lower()}" + (".transposed" if turn is not None else "")
    converted = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    converted.const_value = ir.LazyTensor(_converter(tensor, dtype, permutation), dtype, ir.Shape(shape), name=name)
    graph.register_initializer(converted)
    result.replace_all_uses_with(converted)
    graph.remove([cast] if turn is None else [turn, cast], safe=True)
    if not source.uses():
        graph.initializers.pop(str(source.name))


def _converter(
    tensor: ir.TensorProtocol, dtype: ir.DataType, permutation: list[int] | None
) -> Callable[[], ir.TensorProtocol]:
    def convert() -> ir.TensorProtocol:
        values = tensor.numpy().astype(dtype.numpy())
        return ir.Tensor(np.ascontiguousarray(values if permutation is None else values.transpose(permutation)), dtype)

    return convert
