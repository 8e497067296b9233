"""Number formats: ml_dtypes and ONNX's evaluator as oracles, and the worst case of rounding, derived not tuned."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper
from onnx_reference import Array, evaluate, node

from dcompile.quant import formats

EPSILON = float(np.finfo(np.float32).eps)
REALS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
UNIT = st.floats(-1, 1, width=32, allow_subnormal=False)
WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=REALS)
CODES = torch.arange(16, dtype=torch.uint8)
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # by code


def tensors(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the range, as the pass keeps them."""
    scale, zero_point = formats.affine_range(low, high)
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.uint8)


# ---- ranges -------------------------------------------------------------------------------------------------------


@given(one=REALS, other=REALS)
def test_range_holds_zero_exactly(one: float, other: float) -> None:
    scale, zero_point = tensors(min(one, other), max(one, other))
    assert scale > 0
    assert formats.round_uint8(torch.zeros(1), scale, zero_point).item() == 0.0


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
def test_affine_ranges_by_hand(low: float, high: float, scale: float, zero_point: int) -> None:
    found_scale, found_zero_point = formats.affine_range(low, high)
    assert found_scale == pytest.approx(scale)
    assert found_zero_point == zero_point


def test_symmetric_ranges_by_hand() -> None:
    assert formats.symmetric_range(-254.0, 127.0) == pytest.approx(2.0)
    assert formats.symmetric_range(0.0, 896.0, formats.FP8_MAX) == pytest.approx(2.0)
    assert formats.symmetric_range(0.0, 0.0) == pytest.approx(1e-12)


# ---- whole tensors ------------------------------------------------------------------------------------------------


@given(one=REALS, other=REALS, parts=arrays(np.float32, 16, elements=st.floats(0, 1, width=32)))
def test_uint8_error_inside_the_range_is_half_a_step(one: float, other: float, parts: Array) -> None:
    """Integers are a step apart, and rounding the zero point moves their ends by half a step at most: so no value of
    the range is further than half a step from one. The rest is float32: the quotient, the product, the scale itself.
    """
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    scale, zero_point = tensors(low, high)
    x = torch.from_numpy((low + parts * (high - low)).astype(np.float32)).clamp(low, high)
    error = (formats.round_uint8(x, scale, zero_point) - x).abs().max().item()
    assert error <= scale.item() / 2 + 4 * EPSILON * max(-low, high, scale.item())


@given(x=arrays(np.float32, 8, elements=st.floats(-1e6, 1e6, width=32)))
def test_values_outside_the_range_go_to_its_ends(x: Array) -> None:
    values = torch.from_numpy(x)
    scale, zero_point = tensors(-1.0, 3.0)
    found = torch.round(formats.round_uint8(values, scale, zero_point) / scale) + zero_point
    assert (found[values > 3.1] == 255).all()
    assert (found[values < -1.1] == 0).all()
    one = torch.tensor(1.0)
    assert (formats.round_int8(values, one)[values > 128] == 127).all()
    assert (formats.round_int8(values, one)[values < -129] == -128).all()
    assert (formats.round_fp8(values, one)[values > 480] == 448).all()
    assert (formats.round_fp8(values, one)[values < -480] == -448).all()


def test_ties_go_to_even() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    one = torch.tensor(1.0)
    assert formats.round_uint8(x, one, torch.tensor(10, dtype=torch.uint8)).tolist() == [-2, 0, 0, 2, 2]
    assert formats.round_int8(x, one).tolist() == [-2, 0, 0, 2, 2]


@given(x=arrays(np.float32, (3, 5), elements=REALS), one=REALS, other=REALS)
def test_uint8_is_quantize_linear_and_back(x: Array, one: float, other: float) -> None:
    scale, zero_point = tensors(min(one, other), max(one, other) + 1.0)  # the reference overflows at a range of nothing
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    (expected,) = evaluate(nodes, {"x": x, "s": scale.numpy(), "z": zero_point.numpy()})
    np.testing.assert_array_equal(formats.round_uint8(torch.from_numpy(x), scale, zero_point).numpy(), expected)


@given(x=arrays(np.float32, (3, 5), elements=REALS), scale=st.floats(0.125, 100, width=32))
def test_int8_is_quantize_linear_and_back(x: Array, scale: float) -> None:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    (expected,) = evaluate(nodes, {"x": x, "s": np.array(scale, np.float32), "z": np.zeros((), np.int8)})
    np.testing.assert_array_equal(formats.round_int8(torch.from_numpy(x), torch.tensor(scale)).numpy(), expected)


@given(x=arrays(np.float32, 64, elements=st.floats(-600, 600, width=32)), scale=st.floats(0.25, 4, width=32))
def test_fp8_is_that_of_ml_dtypes_saturated(x: Array, scale: float) -> None:
    divided = np.clip(x / np.float32(scale), -448, 448)
    expected = divided.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(formats.round_fp8(torch.from_numpy(x), torch.tensor(scale)).numpy(), expected)


# ---- weights ------------------------------------------------------------------------------------------------------


@given(weight=WEIGHTS)
def test_int8_weight_error_is_half_a_step_of_its_channel(weight: Array) -> None:
    integers, scale = formats.quantize_int8(torch.from_numpy(weight))
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (integers.shape, scale.shape) == (weight.shape, weight.shape[:1])
    assert (scale > 0).all()
    found = formats.dequantize(integers, scale, None, "int8", 0)
    error = (found - torch.from_numpy(weight)).abs().amax(dim=1)
    largest = torch.from_numpy(np.abs(weight).max(axis=1))
    assert (error <= scale / 2 + 4 * EPSILON * largest.clamp_min(1e-12)).all()


@given(weight=WEIGHTS)
def test_weights_are_symmetric(weight: Array) -> None:
    integers, scale = formats.quantize_int8(torch.from_numpy(weight))
    mirrored, same_scale = formats.quantize_int8(torch.from_numpy(-weight))
    assert torch.equal(mirrored, -integers)
    assert torch.equal(same_scale, scale)
    assert integers.abs().max() <= formats.INT8_MAX  # -128 has no mirror
    used = torch.from_numpy(np.abs(weight).max(axis=1) > 1e-9)
    assert (integers.abs().amax(dim=1)[used] == formats.INT8_MAX).all()  # each channel uses its whole range


def test_channels_do_not_share_a_scale() -> None:
    weight = torch.tensor([[[1.0, -0.5]], [[0.0, 0.0]], [[-1000.0, 2.0]]])
    integers, scale = formats.quantize_int8(weight)
    assert integers.tolist() == [[[127, -64]], [[0, 0]], [[-127, 0]]]
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 1e-12, 1000 / 127]))


@given(weight=WEIGHTS)
def test_fp8_weights_are_those_of_ml_dtypes(weight: Array) -> None:
    elements, scale = formats.quantize_fp8(torch.from_numpy(weight))
    assert (elements.dtype, elements.shape, scale.shape) == (torch.float8_e4m3fn, weight.shape, weight.shape[:1])
    largest = np.abs(weight).max(axis=1)
    np.testing.assert_allclose(scale.numpy(), np.maximum(largest / 448, 1e-12), rtol=1e-6)
    expected = np.clip(weight / scale.numpy()[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(elements.view(torch.uint8).numpy(), expected.view(np.uint8))
    found = formats.dequantize(elements, scale, None, "fp8", 0).numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float32) * scale.numpy()[:, None])


BLOCKED = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([16, 32, 64]))  # rows, groups, group


@given(shape=BLOCKED, data=st.data())
def test_int4_weights_are_blocked_dequantize_linear(shape: tuple[int, int, int], data: st.DataObject) -> None:
    rows, count, group = shape
    weight = data.draw(arrays(np.float32, (rows, count * group), elements=REALS))
    packed, scale = formats.quantize_int4(torch.from_numpy(weight), group)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, count * group // 2))
    assert (scale.dtype, scale.shape) == (torch.float32, (rows, count))
    integers = formats.unpack(packed).numpy().view(np.int8)
    integers = np.where(integers > 7, integers - 16, integers).astype(ml_dtypes.int4)
    nodes = [node("DequantizeLinear", "q s", "y", axis=1, block_size=group)]
    (expected,) = evaluate(nodes, {"q": integers, "s": scale.numpy()})
    found = formats.dequantize(packed, scale, None, "int4", 1)
    np.testing.assert_array_equal(found.numpy(), expected)
    steps = scale.numpy().repeat(group, axis=1)
    assert (np.abs(expected - weight) <= steps / 2 + 4 * EPSILON * np.abs(weight) + 1e-12).all()
    assert np.abs(integers.astype(int)).max() <= formats.INT4_MAX


@given(shape=BLOCKED, data=st.data())
def test_nvfp4_weights_are_dequantize_linear_twice(shape: tuple[int, int, int], data: st.DataObject) -> None:
    rows, count, _ = shape
    weight = data.draw(arrays(np.float32, (rows, count * 16), elements=UNIT))
    packed, scale, global_scale = formats.quantize_nvfp4(torch.from_numpy(weight))
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, count * 8))
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, count))
    assert (global_scale.dtype, global_scale.shape) == (torch.float32, ())
    nodes = [
        node("DequantizeLinear", "s8 s32", "s"),
        node("DequantizeLinear", "q s", "y", axis=1, block_size=16),
    ]
    inputs = {
        "q": formats.unpack(packed).numpy().view(ml_dtypes.float4_e2m1fn),
        "s8": scale.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
        "s32": global_scale.numpy(),
    }
    (expected,) = evaluate(nodes, inputs)
    found = formats.dequantize(packed, scale, global_scale, "nvfp4", 1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_errors_of_normal_weights_are_those_measured_elsewhere() -> None:
    """Relative errors of N(0, 1) weights: 0.094 to 0.095 for nvfp4, and int4 by the size of its groups.

    By channel, int8 has a step of amax / 127, so 3.3 / 127 / sqrt(12) here; E4M3 has three bits of a mantissa.
    """
    weight = torch.randn(256, 1024)

    def error(format: str, *stored: Any) -> float:
        q, scale, global_scale = (*stored, None)[:3]
        axis = 1 if format in ("int4", "nvfp4") else 0
        found = formats.dequantize(q, scale, global_scale, format, axis)
        return float((found - weight).norm() / weight.norm())

    assert error("nvfp4", *formats.quantize_nvfp4(weight)) == pytest.approx(0.0947, abs=0.001)
    for group, expected in {16: 0.085, 32: 0.097, 64: 0.108, 128: 0.117}.items():
        assert error("int4", *formats.quantize_int4(weight, group)) == pytest.approx(expected, abs=0.001)
    assert error("int8", *formats.quantize_int8(weight)) == pytest.approx(0.0078, abs=0.0003)
    assert error("fp8", *formats.quantize_fp8(weight)) == pytest.approx(0.0265, abs=0.001)


# ---- NVFP4 --------------------------------------------------------------------------------------------------------


def test_e2m1_ties_go_to_the_even_code() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1000.0])
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0]
    assert formats.round_e2m1(x).tolist() == expected
    assert formats.round_e2m1(-x).tolist() == [-value for value in expected]


@given(x=arrays(np.float32, 64, elements=st.floats(-8, 8, width=32)))
def test_e2m1_is_that_of_ml_dtypes(x: Array) -> None:
    expected = x.astype(ml_dtypes.float4_e2m1fn)
    found = formats.round_e2m1(torch.from_numpy(x))
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))
    codes, others = formats.e2m1_codes(found).numpy(), expected.view(np.uint8)
    np.testing.assert_array_equal(codes, others)  # zeros keep their sign


def test_every_code_has_the_value_that_ml_dtypes_gives_it() -> None:
    np.testing.assert_array_equal(formats.e2m1_codes(torch.from_numpy(E2M1)).numpy(), CODES.numpy())
    one = torch.ones(1, 1, dtype=torch.float8_e4m3fn)
    found = formats.dequantize(formats.pack(CODES[None]), one, torch.tensor(1.0), "nvfp4", 1)
    np.testing.assert_array_equal(found.numpy()[0], E2M1)
    signed = formats.dequantize(formats.pack(CODES[None]), torch.ones(1, 1), None, "int4", 1)
    np.testing.assert_array_equal(signed.numpy()[0], np.arange(16, dtype=np.uint8).view(ml_dtypes.int4).astype(float))


def two_levels(x: Array, global_scale: Array) -> Array:
    """NVFP4 of the rows of x in numpy and ml_dtypes: straight from its definition."""
    blocks = x.reshape(-1, 16)
    amax = np.abs(blocks).max(axis=1)
    wanted = np.where(amax == 0, np.float32(1), amax / (np.float32(6) * global_scale))
    scale = np.clip(wanted, 2.0**-9, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    step = (scale * global_scale)[:, None]
    elements = (blocks / step).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    result: Array = (elements * step).reshape(x.shape)
    return result


@given(x=arrays(np.float32, (2, 3, 32), elements=UNIT), amax=st.floats(0.25, 4, width=32))
def test_nvfp4_is_its_definition(x: Array, amax: float) -> None:
    """Also with values beyond the calibrated amax, whose block scale saturates at 448."""
    global_scale = formats.nvfp4_global_scale(amax)
    found = formats.round_nvfp4(torch.from_numpy(x), global_scale)
    np.testing.assert_array_equal(found.numpy(), two_levels(x, global_scale.numpy()))


def test_nvfp4_keeps_the_largest_value_and_saturates_beyond_it() -> None:
    x = torch.zeros(1, 32)
    x[0, 3], x[0, 20] = 5.0, -7.0
    kept = formats.round_nvfp4(x, formats.nvfp4_global_scale(7.0))
    assert kept[0, 20].item() == pytest.approx(-7.0, rel=1e-6)
    assert kept[0, 3].item() == pytest.approx(5.0, rel=1 / 16)  # the block's scale has three bits
    clipped = formats.round_nvfp4(x, formats.nvfp4_global_scale(3.5))
    assert clipped[0, 20].item() == pytest.approx(-3.5, rel=1e-6)


def test_nvfp4_of_nothing_is_nothing() -> None:
    packed, scale, global_scale = formats.quantize_nvfp4(torch.zeros(2, 32))
    assert global_scale == 1.0
    assert (scale.to(torch.float32) == 1.0).all()
    assert not formats.dequantize(packed, scale, global_scale, "nvfp4", 1).any()
    assert not formats.round_nvfp4(torch.zeros(2, 32), torch.tensor(0.5)).any()


# ---- packing ------------------------------------------------------------------------------------------------------


@given(codes=arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 8).map(lambda n: 2 * n)),
                    elements=st.integers(0, 15)))  # fmt: skip
def test_packed_bytes_are_those_of_onnx(codes: Array) -> None:
    packed = formats.pack(torch.from_numpy(codes))
    proto = helper.make_tensor("codes", TensorProto.UINT4, codes.shape, codes.flatten())
    assert bytes(packed.numpy().tobytes()) == bytes(int(b) & 0xFF for b in proto.int32_data)
    assert torch.equal(formats.unpack(packed), torch.from_numpy(codes))


def test_the_first_element_is_in_the_low_nibble() -> None:
    values = torch.tensor([0.5, -6.0, 1.5, 3.0])
    assert formats.pack(formats.e2m1_codes(values)).tolist() == [0xF1, 0x53]
