"""INT8 arithmetic: ONNX's own reference evaluator as the oracle, and the worst case of rounding, derived not tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from dcompile.quant.int8 import (
    QMAX,
    QMIN,
    WEIGHT_MAX,
    affine_range,
    conv2d_int8,
    dynamic_range,
    fake_quantize,
    linear_int8,
    linear_int8_dynamic,
    quantize,
    quantize_weight,
)

Array = NDArray[Any]
EPSILON = float(np.finfo(np.float32).eps)
REALS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=REALS)


def evaluate(nodes: Sequence[onnx.NodeProto], inputs: dict[str, Array]) -> list[Array]:
    """The outputs of the last node, by ONNX's reference implementation of opset 23."""
    taken = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    given_back = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in nodes[-1].output]
    graph = helper.make_graph(list(nodes), "reference", taken, given_back)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return list(ReferenceEvaluator(model).run(None, inputs))


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def tensors(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the range, as the pass keeps them."""
    scale, zero_point = affine_range(low, high)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.uint8)


# ---- rounding -----------------------------------------------------------------------------------------------------


@given(one=REALS, other=REALS)
def test_range_holds_zero_exactly(one: float, other: float) -> None:
    scale, zero_point = tensors(min(one, other), max(one, other))
    assert scale > 0
    assert QMIN <= int(zero_point) <= QMAX
    assert fake_quantize(torch.zeros(1), scale, zero_point).item() == 0.0


@given(one=REALS, other=REALS, parts=arrays(np.float32, 16, elements=st.floats(0, 1, width=32)))
def test_error_inside_the_range_is_half_a_step(one: float, other: float, parts: Array) -> None:
    """Integers are a step apart, and rounding the zero point moves their ends by half a step at most: so no value of
    the range is further than half a step from one. The rest is float32: the quotient, the product, the scale itself.
    """
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    scale, zero_point = tensors(low, high)
    x = torch.from_numpy((low + parts * (high - low)).astype(np.float32)).clamp(low, high)
    error = (fake_quantize(x, scale, zero_point) - x).abs().max().item()
    assert error <= scale.item() / 2 + 4 * EPSILON * max(-low, high, scale.item())


@given(x=arrays(np.float32, 8, elements=st.floats(-1e6, 1e6, width=32)))
def test_values_outside_the_range_go_to_its_ends(x: Array) -> None:
    values = torch.from_numpy(x)
    found = quantize(values, *tensors(-1.0, 3.0))
    assert torch.equal(found, found.round().clamp(QMIN, QMAX))
    assert (found[values > 3.1] == QMAX).all()
    assert (found[values < -1.1] == QMIN).all()


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-128.0, 127.0, 1.0, 128),
        (3.0, 255.0, 1.0, 0),  # widened to hold zero
        (-255.0, -3.0, 1.0, 255),
        (0.0, 0.0, 1e-12, 0),
        (-0.5, 254.5, 1.0, 0),  # a tie goes to the even integer
        (-1.5, 253.5, 1.0, 2),
    ],
)
def test_ranges_by_hand(low: float, high: float, scale: float, zero_point: int) -> None:
    found_scale, found_zero_point = affine_range(low, high)
    assert found_scale == pytest.approx(scale)
    assert found_zero_point == zero_point


def test_ties_go_to_even() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(10, dtype=torch.uint8)).tolist() == [8, 10, 10, 12, 12]


@given(weight=WEIGHTS)
def test_weight_error_is_half_a_step_of_its_channel(weight: Array) -> None:
    integers, scale = quantize_weight(torch.from_numpy(weight))
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (integers.shape, scale.shape) == (weight.shape, weight.shape[:1])
    assert (scale > 0).all()
    error = (integers * scale[:, None] - torch.from_numpy(weight)).abs().amax(dim=1)
    largest = torch.from_numpy(np.abs(weight).max(axis=1))
    assert (error <= scale / 2 + 4 * EPSILON * largest.clamp_min(1e-12)).all()


@given(weight=WEIGHTS)
def test_weights_are_symmetric(weight: Array) -> None:
    integers, scale = quantize_weight(torch.from_numpy(weight))
    mirrored, same_scale = quantize_weight(torch.from_numpy(-weight))
    assert torch.equal(mirrored, -integers)
    assert torch.equal(same_scale, scale)
    assert integers.abs().max() <= WEIGHT_MAX  # -128 has no mirror
    used = torch.from_numpy(np.abs(weight).max(axis=1) > 1e-9)
    assert (integers.abs().amax(dim=1)[used] == WEIGHT_MAX).all()  # each channel uses its whole range


def test_channels_do_not_share_a_scale() -> None:
    weight = torch.tensor([[[1.0, -0.5]], [[0.0, 0.0]], [[-1000.0, 2.0]]])
    integers, scale = quantize_weight(weight)
    assert integers.tolist() == [[[127, -64]], [[0, 0]], [[-127, 0]]]
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 1e-12, 1000 / 127]))


# ---- against ONNX -------------------------------------------------------------------------------------------------


@given(x=arrays(np.float32, (3, 5), elements=REALS), one=REALS, other=REALS)
def test_rounding_is_quantize_linear(x: Array, one: float, other: float) -> None:
    scale, zero_point = tensors(min(one, other), max(one, other) + 1.0)  # the reference overflows at a range of nothing
    inputs = {"x": x, "s": scale.numpy(), "z": zero_point.numpy()}
    rounding = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    (integers,), (reals,) = evaluate(rounding[:1], inputs), evaluate(rounding, inputs)
    np.testing.assert_array_equal(quantize(torch.from_numpy(x), scale, zero_point).numpy(), integers)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), scale, zero_point).numpy(), reals)


@given(x=arrays(np.float32, (3, 5), elements=REALS))
def test_dynamic_range_is_that_of_dynamic_quantize_linear(x: Array) -> None:
    x[0, 0] = max(float(x[0, 0]), 0.25)  # the reference divides by a range of zero
    _, scale, zero_point = evaluate([node("DynamicQuantizeLinear", "x", "q s z")], {"x": x})
    found_scale, found_zero_point = dynamic_range(torch.from_numpy(x))
    np.testing.assert_allclose(found_scale.numpy(), scale, rtol=1e-6)
    assert found_zero_point.item() == int(zero_point)


def test_dynamic_range_of_nothing_is_finite() -> None:
    scale, zero_point = dynamic_range(torch.zeros(2, 3))
    assert scale > 0
    assert zero_point == 0


DEQUANTIZED_X = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "r")]


@pytest.mark.parametrize("shape", [(7, 16), (2, 5, 16), (2, 3, 4, 16)])
@pytest.mark.parametrize("bias", [torch.linspace(-1, 1, 6), None], ids=["bias", "no bias"])
def test_linear_is_q_dq_around_matmul(shape: tuple[int, ...], bias: torch.Tensor | None) -> None:
    x, weight = torch.randn(shape), torch.randn(6, 16)
    integers, weight_scale = quantize_weight(weight)
    transposed = integers.t().contiguous()
    scale, zero_point = tensors(-1.5, 2.0)  # some values are outside
    found = linear_int8(x, transposed, weight_scale, bias, scale, zero_point)
    inputs = {"x": x, "s": scale, "z": zero_point, "w": transposed, "ws": weight_scale}
    nodes = [*DEQUANTIZED_X, node("DequantizeLinear", "w ws", "rw", axis=1), node("MatMul", "r rw", "m")]
    if bias is not None:
        inputs["b"] = bias
        nodes.append(node("Add", "m b", "y"))
    (expected,) = evaluate(nodes, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (found - torch.nn.functional.linear(x, weight, bias)).abs().max() > 1e-3  # it does round


def test_dynamic_linear_is_a_product_of_integers() -> None:
    x, bias = torch.randn(2, 5, 16) + 0.5, torch.randn(6)
    integers, weight_scale = quantize_weight(torch.randn(6, 16))
    transposed = integers.t().contiguous()
    found = linear_int8_dynamic(x, transposed, weight_scale, bias)
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z"),
        node("MatMulInteger", "q w z", "i"),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Mul", "s ws", "sw"),
        node("Mul", "f sw", "m"),
        node("Add", "m b", "y"),
    ]
    inputs = {"x": x.numpy(), "w": transposed.numpy(), "ws": weight_scale.numpy(), "b": bias.numpy()}
    (expected,) = evaluate(nodes, inputs)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


GEOMETRIES = {
    "plain": ([1, 1], [0, 0], [1, 1], 1),
    "uneven": ([2, 1], [1, 2], [1, 1], 1),
    "dilated": ([1, 1], [2, 2], [2, 2], 1),
    "grouped": ([1, 1], [1, 1], [1, 1], 2),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [torch.linspace(-1, 1, 6), None], ids=["bias", "no bias"])
def test_convolution_is_q_dq_around_conv(geometry: str, bias: torch.Tensor | None) -> None:
    stride, padding, dilation, groups = GEOMETRIES[geometry]
    x = torch.randn(2, 4, 9, 8)
    integers, weight_scale = quantize_weight(torch.randn(6, 4 // groups, 3, 3))
    of_x, of_y = tensors(-2.0, 3.0), tensors(-8.0, 9.0)
    found = conv2d_int8(x, integers, weight_scale, bias, *of_x, *of_y, stride, padding, dilation, groups)
    attributes = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    nodes = [
        *DEQUANTIZED_X,
        node("DequantizeLinear", "w ws", "rw", axis=0),
        node("Conv", "r rw" if bias is None else "r rw b", "c", **attributes),
        node("QuantizeLinear", "c os oz", "o"),
        node("DequantizeLinear", "o os oz", "y"),
    ]
    inputs = {"x": x, "s": of_x[0], "z": of_x[1], "w": integers, "ws": weight_scale, "os": of_y[0], "oz": of_y[1]}
    inputs |= {} if bias is None else {"b": bias}
    (expected,) = evaluate(nodes, {name: value.numpy() for name, value in inputs.items()})
    assert found.shape == expected.shape
    steps = np.abs(found.numpy() - expected) / of_y[0].item()
    assert steps.max() < 1.001  # a sum that ends on a tie in one order of additions may not in the other
    assert (steps > 0.5).mean() < 0.01


@pytest.mark.parametrize("operator", ["linear_int8", "linear_int8_dynamic", "conv2d_int8"])
def test_operators_keep_what_they_registered(operator: str) -> None:
    """torch's own check: no argument is edited, and the fake result has the shape and type of the real one."""
    of_x, scale = tensors(-2.0, 3.0), torch.rand(5)
    arguments: tuple[Any, ...]
    if operator == "conv2d_int8":
        kernel = torch.randint(-127, 128, (5, 4, 3, 3), dtype=torch.int8)
        arguments = (
            torch.randn(2, 4, 8, 8),
            kernel,
            scale,
            None,
            *of_x,
            *tensors(-8.0, 9.0),
            [2, 2],
            [1, 1],
            [1, 1],
            1,
        )
    else:
        weight = torch.randint(-127, 128, (8, 5), dtype=torch.int8)
        arguments = (torch.randn(2, 3, 8), weight, scale, torch.randn(5), *(of_x if operator == "linear_int8" else ()))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.dcompile, operator).default, arguments, test_utils=checks)
