"""What an ONNX file written for TensorRT computes, evaluated on the CPU: the closest to its engine where no GPU is.

ONNX Runtime runs the very nodes that TensorRT was given. Where it has no kernel, the same arithmetic takes their place:
- bfloat16 becomes float32 with every result rounded to bfloat16;
- 4-bit floating-point weights are unpacked into real numbers by onnx's own types;
- TRT_FP4DynamicQuantize and the dequantisation of its results become one function of standard operators.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
from numpy.typing import NDArray

from ...runtime.engines import Engine
from ...runtime.onnx_engine import OnnxEngine

_DOMAIN = "dcompile.reference"
_TRT_DOMAIN = "trt"
# ONNX Runtime turns Q/DQ of FP8 around a product into an INT8 operator, and then finds no kernel for it.
_OPTIONS = {"session.disable_quant_qdq": "1"}


def open_reference(path: Path, *, threads: int | None = None) -> Engine:
    """An engine that computes what the ONNX file says. One with types that ONNX Runtime lacks gets a file beside it."""
    model = ir.load(path)
    has_fp4 = any(node.domain == _TRT_DOMAIN for node in model.graph) or _initialisers(model, ir.DataType.FLOAT4E2M1)
    has_bf16 = any(_is_bf16_cast(node) for node in model.graph) or _initialisers(model, ir.DataType.BFLOAT16)
    if has_fp4:
        unpack_fp4_weights(model)
        inline_fp4_rounding(model)
    if has_bf16:
        replace_bf16(model)
    if has_fp4 or has_bf16:
        path = path.with_suffix(".reference.onnx")
        ir.save(model, path, external_data=f"{path.name}.weights")
    return OnnxEngine(path, threads=threads, options=_OPTIONS)


def _initialisers(model: ir.Model, dtype: ir.DataType) -> list[ir.Value]:
    values = model.graph.initializers.values()
    return [value for value in values if value.const_value is not None and value.const_value.dtype == dtype]


# --- FP4 ---


def unpack_fp4_weights(model: ir.Model) -> None:
    """DequantizeLinear of an FP4 initialiser -> the real numbers, in the type of its scales, when they are read."""
    for weight in _initialisers(model, ir.DataType.FLOAT4E2M1):
        for node, _ in list(weight.uses()):
            scale = node.inputs[1]
            assert scale is not None
            inner = scale.producer()
            assert inner is not None
            fp8, global_scale = (value.const_value for value in inner.inputs[:2] if value is not None)
            assert weight.const_value is not None
            assert fp8 is not None
            assert global_scale is not None
            _replace_by_constant(
                model.graph, node, _unpacker(weight.const_value, fp8, global_scale), weight, global_scale
            )
            model.graph.remove(node, safe=True)
            if not inner.outputs[0].uses():
                model.graph.remove(inner, safe=True)
        model.graph.initializers.pop(str(weight.name))


def _replace_by_constant(
    graph: ir.Graph, node: ir.Node, make: Callable[[], ir.TensorProtocol], weight: ir.Value, like: ir.TensorProtocol
) -> None:
    name, shape = f"{weight.name}.real", ir.Shape(weight.const_value.shape.numpy())  # type: ignore[union-attr]
    constant = ir.Value(name=name, shape=shape, type=ir.TensorType(like.dtype))
    constant.const_value = ir.LazyTensor(make, like.dtype, shape, name=name)
    graph.register_initializer(constant)
    node.outputs[0].replace_all_uses_with(constant)


def _unpacker(
    weight: ir.TensorProtocol, scales: ir.TensorProtocol, global_scale: ir.TensorProtocol
) -> Callable[[], ir.TensorProtocol]:
    def unpack() -> ir.TensorProtocol:
        values, fp8 = weight.numpy().astype(np.float32), scales.numpy().astype(np.float32)
        steps = fp8 * global_scale.numpy().astype(np.float32)
        blocks = values.reshape(*fp8.shape, -1) * steps[..., None]
        return ir.Tensor(np.ascontiguousarray(blocks.reshape(values.shape).astype(global_scale.dtype.numpy())))

    return unpack


# x [M, K] in blocks of 16 along K, with an E4M3 scale for each. E2M1 is spaced by 0.5 below 2, by 1 below 4 and by 2
# above, and an even code is an even multiple of the spacing: so Round, which takes ties to even, rounds as the format.
_ROUND_NVFP4 = """
<domain: "dcompile.reference", opset_import: ["" : 23]>
round_nvfp4 (x, global_scale) => (y) {
    in_blocks = Constant <value_ints: ints = [0, -1, 16]> ()
    last = Constant <value_ints: ints = [2]> ()
    half = Constant <value_float: float = 0.5> ()
    zero = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    six = Constant <value_float: float = 6.0> ()
    smallest = Constant <value_float: float = 0.001953125> ()
    largest = Constant <value_float: float = 448.0> ()
    blocks = Reshape (x, in_blocks)
    sizes = Abs (blocks)
    amax = ReduceMax <keepdims: int = 1> (sizes, last)
    reach = Mul (six, global_scale)
    needed = Div (amax, reach)
    is_zero = Equal (amax, zero)
    wanted = Where (is_zero, one, needed)
    within = Clip (wanted, smallest, largest)
    scale = Cast <to: int = 17> (within)
    real_scale = Cast <to: int = 1> (scale)
    step = Mul (real_scale, global_scale)
    scaled = Div (blocks, step)
    sign = Sign (scaled)
    magnitude = Abs (scaled)
    size = Min (magnitude, six)
    below_four = Less (size, four)
    wide = Where (below_four, one, two)
    below_two = Less (size, two)
    unit = Where (below_two, half, wide)
    units = Div (size, unit)
    whole = Round (units)
    rounded = Mul (whole, unit)
    signed = Mul (sign, rounded)
    values = Mul (signed, step)
    shape = Shape (x)
    y = Reshape (values, shape)
}
"""


def inline_fp4_rounding(model: ir.Model) -> None:
    """TRT_FP4DynamicQuantize and its two DequantizeLinear -> a call of `round_nvfp4` in float32, in place."""
    nodes = [node for node in model.graph if node.domain == _TRT_DOMAIN]
    if not nodes:
        return
    for node in nodes:
        x, global_scale = node.inputs
        ((real, _),) = node.outputs[0].uses()
        ((scales, _),) = node.outputs[1].uses()
        wide = [ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}) for value in (x, global_scale)]
        rounded = ir.node("round_nvfp4", [each.outputs[0] for each in wide], domain=_DOMAIN)
        assert global_scale is not None
        kind = global_scale.dtype or (global_scale.const_value.dtype if global_scale.const_value else None)
        assert kind is not None
        back = ir.node("Cast", [rounded.outputs[0]], {"to": int(kind)})
        back.outputs[0].type = ir.TensorType(kind)
        model.graph.insert_before(node, [*wide, rounded, back])
        real.outputs[0].replace_all_uses_with(back.outputs[0])
        model.graph.remove([real, scales, node], safe=True)
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_ROUND_NVFP4))
    model.functions[function.identifier()] = function
    model.opset_imports[_DOMAIN] = 1
    model.opset_imports.pop(_TRT_DOMAIN, None)


# --- bfloat16 ---


def _is_bf16_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16


def replace_bf16(model: ir.Model) -> None:
    """bfloat16 as float32, rounded to bfloat16 after every operator that computes; in place."""
    short: set[ir.Value] = {each for each in model.graph.inputs if each.dtype == ir.DataType.BFLOAT16}
    short.update(_initialisers(model, ir.DataType.BFLOAT16))
    for node in list(model.graph):
        if not _gives_bf16(node, short):
            continue
        for output in node.outputs:
            short.add(output)
            if node.op_type not in _MOVES:
                short.add(_rounded(model.graph, node, output))
            output.dtype = ir.DataType.FLOAT
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for value in _initialisers(model, ir.DataType.BFLOAT16):
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.LazyTensor(
            _widener(tensor), ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=value.name
        )
        value.dtype = ir.DataType.FLOAT


# Their results are values that were rounded already.
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather", "Split", "Concat", "Expand", "Identity")


def _gives_bf16(node: ir.Node, short: set[ir.Value]) -> bool:
    if node.op_type == "Cast":
        return _is_bf16_cast(node)
    if node.op_type in ("QuantizeLinear", "Shape", "Equal", "Less", "Greater"):
        return False
    given = node.inputs[1:2] if node.op_type == "DequantizeLinear" else node.inputs
    return any(value in short for value in given if value is not None)


def _rounded(graph: ir.Graph, node: ir.Node, output: ir.Value) -> ir.Value:
    to_bf16 = ir.node("Cast", [output], {"to": int(ir.DataType.BFLOAT16)})
    back = ir.node("Cast", [to_bf16.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    output.replace_all_uses_with(back.outputs[0])
    to_bf16.replace_input_with(0, output)
    graph.insert_after(node, [to_bf16, back])
    return back.outputs[0]


def _widener(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    def widen() -> ir.TensorProtocol:
        values: NDArray[Any] = tensor.numpy().astype(np.float32)
        return ir.Tensor(values)

    return widen
