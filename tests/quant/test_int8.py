"""INT8 rounding against its bounds, and the operators against ONNX's own reference evaluator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from dcompile.quant.int8 import (
    WEIGHT_MAX,
    affine_range,
    conv2d_int8,
    dynamic_range,
    fake_quantize,
    linear_int8,
    linear_int8_dynamic,
    quantize_weight,
)

ENDS = st.floats(-1e6, 1e6, width=32)


def scale_of(low: float, high: float) -> tuple[Tensor, Tensor]:
    scale, zero_point = affine_range(low, high)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.uint8)


@given(ENDS, ENDS)
def test_a_range_holds_zero_exactly_and_rounds_by_half_a_step(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero_point = scale_of(low, high)
    assert 0 <= int(zero_point) <= 255
    assert fake_quantize(torch.zeros(1), scale, zero_point) == 0
    x = torch.linspace(min(low, 0.0), max(high, 0.0), 97)
    # One half for the value, one half for the zero point, whose own rounding moves both ends of the range.
    assert (fake_quantize(x, scale, zero_point) - x).abs().max() <= 1.01 * scale


def test_inside_the_range_half_a_step_is_the_bound() -> None:
    scale, zero_point = scale_of(-1.0, 1.0)
    x = torch.linspace(-0.99, 0.99, 1001)
    error = (fake_quantize(x, scale, zero_point) - x).abs().max()
    assert 0.4 * scale < error <= 0.5001 * scale


def test_outside_the_range_values_are_clamped() -> None:
    scale, zero_point = scale_of(-1.0, 1.0)
    found = fake_quantize(torch.tensor([-5.0, 5.0]), scale, zero_point)
    assert found.abs().max() <= 1.0 + float(scale)


def test_weights_are_symmetric_per_output_channel() -> None:
    weight = torch.randn(5, 7, 3, 3) * torch.tensor([1e-3, 1.0, 10.0, 0.0, 1e3])[:, None, None, None]
    integers, scale = quantize_weight(weight)
    assert integers.dtype == torch.int8
    assert integers.min() >= -WEIGHT_MAX
    assert scale.shape == (5,)
    assert (scale > 0).all()
    real = integers.to(torch.float32) * scale[:, None, None, None]
    assert ((real - weight).abs().amax(dim=(1, 2, 3)) <= 0.5001 * scale).all()
    assert (integers[[0, 1, 2, 4]].flatten(1).abs().amax(1) == WEIGHT_MAX).all()  # every channel uses its whole range


def reference(nodes: list[onnx.NodeProto], feeds: dict[str, np.ndarray], output: str) -> np.ndarray:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    graph = helper.make_graph(
        nodes, "reference", inputs, [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found: np.ndarray = onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]
    return found


def test_linear_is_onnx_quantize_dequantize_and_matmul() -> None:
    x, weight = torch.randn(4, 6, 16), torch.randn(8, 16)
    integers, weight_scale = quantize_weight(weight)
    transposed = integers.t().contiguous()
    scale, zero_point = scale_of(-2.0, 3.0)  # some values are outside
    bias = torch.randn(8)
    found = linear_int8(x, transposed, weight_scale, bias, scale, zero_point)
    feeds = {"x": x, "w": transposed, "ws": weight_scale, "b": bias, "s": scale, "z": zero_point}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    expected = reference(nodes, {name: value.numpy() for name, value in feeds.items()}, "y")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert (found - torch.nn.functional.linear(x, weight, bias)).abs().max() > 1e-3  # it does round


def test_dynamic_linear_takes_its_range_as_onnx_does() -> None:
    x, weight = torch.randn(3, 16) + 0.5, torch.randn(8, 16)
    integers, weight_scale = quantize_weight(weight)
    transposed = integers.t().contiguous()
    scale, zero_point = dynamic_range(x)
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    nodes += [helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)]
    assert float(zero_point) == float(reference(nodes, {"x": x.numpy()}, "y"))
    found = linear_int8_dynamic(x, transposed, weight_scale, None)
    expected = linear_int8(x, transposed, weight_scale, None, scale, zero_point.to(torch.uint8))
    torch.testing.assert_close(found, expected)
    # Three roundings of about 0.4 % each way: the result is near the real one, and is not it.
    error = (found - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2)])
def test_convolution_rounds_weights_input_and_output(stride: int, padding: int, dilation: int, groups: int) -> None:
    x, weight, bias = torch.randn(2, 4, 9, 9), torch.randn(6, 4 // groups, 3, 3), torch.randn(6)
    integers, weight_scale = quantize_weight(weight)
    spans = scale_of(-4.0, 4.0), scale_of(-12.0, 12.0)
    geometry = [stride] * 2, [padding] * 2, [dilation] * 2, groups
    found = conv2d_int8(x, integers, weight_scale, bias, *spans[0], *spans[1], *geometry)
    real = integers.to(torch.float32) * weight_scale[:, None, None, None]
    exact = torch.nn.functional.conv2d(fake_quantize(x, *spans[0]), real, bias, *geometry)
    assert found.shape == exact.shape
    assert (found - exact.clamp(-12, 12)).abs().max() <= 1.01 * spans[1][0]
    steps = found / spans[1][0]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)  # every output is a whole number of steps
