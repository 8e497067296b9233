"""The operators that stand in a graph: ONNX's standard ones as the oracle, and what torch asks of a custom operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx_reference import Array, evaluate, node

from dcompile.quant import formats, ops

REALS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
SCALE, ZERO = torch.tensor(0.05), torch.tensor(100, dtype=torch.uint8)


@pytest.mark.parametrize("format", ops.STATIC_FORMATS)
def test_static_rounding_is_that_of_the_format(format: str) -> None:
    x = torch.randn(2, 3, 32)
    expected = {
        "uint8": formats.round_uint8(x, SCALE, ZERO),
        "int8": formats.round_int8(x, SCALE),
        "fp8": formats.round_fp8(x, SCALE),
    }
    found = ops.quantize_dequantize(x, SCALE, ZERO if format == "uint8" else None, format)
    assert torch.equal(found, expected[format])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_activation_keeps_its_dtype_and_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32).to(dtype)
    for found, expected in (
        (ops.quantize_dequantize(x, SCALE, ZERO, "uint8"), formats.round_uint8(x.float(), SCALE, ZERO)),
        (ops.quantize_dequantize_nvfp4(x, SCALE), formats.round_nvfp4(x.float(), SCALE)),
        (ops.quantize_dequantize_dynamic(x, "int8"), ops.quantize_dequantize_dynamic(x.float(), "int8")),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype))


@given(x=arrays(np.float32, (3, 5), elements=REALS))
def test_dynamic_uint8_is_dynamic_quantize_linear(x: Array) -> None:
    x[0, 0] = max(float(x[0, 0]), 0.25)  # the reference divides by a range of zero
    integers, scale, zero_point = evaluate([node("DynamicQuantizeLinear", "x", "q s z")], {"x": x})
    expected = (integers.astype(np.float32) - zero_point) * scale
    found = ops.quantize_dequantize_dynamic(torch.from_numpy(x), "uint8").numpy()
    # A tie of one float32 quotient may not be one of the other: then an integer differs by one, here and there.
    steps = np.abs(found - expected) / scale
    assert steps.max() < 1.01
    assert (steps > 0.01).sum() <= 1


@given(x=arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=6), elements=REALS))
def test_dynamic_int8_gives_each_token_a_grid_of_its_own(x: Array) -> None:
    values = torch.from_numpy(x)
    found = ops.quantize_dequantize_dynamic(values, "int8")
    amax = values.abs().amax(-1, keepdim=True)
    assert ((found - values).abs() <= amax / 127 / 2 + 1e-6 * amax + 1e-12).all()
    rows = values.reshape(-1, values.shape[-1])
    alone = torch.cat([ops.quantize_dequantize_dynamic(row[None], "int8") for row in rows])
    assert torch.equal(found.reshape(rows.shape), alone)


@pytest.mark.parametrize("format", ops.DYNAMIC_FORMATS)
def test_rounding_of_nothing_is_nothing(format: str) -> None:
    assert not ops.quantize_dequantize_dynamic(torch.zeros(2, 3), format).any()


STORED = {
    "int8": (*formats.quantize_int8(torch.randn(6, 32)), None, "int8", 0),
    "fp8": (*formats.quantize_fp8(torch.randn(6, 32)), None, "fp8", 0),
    "int4": (*formats.quantize_int4(torch.randn(6, 32), 16), None, "int4", 1),
    "nvfp4": (*formats.quantize_nvfp4(torch.randn(6, 32)), "nvfp4", 1),
}


def test_every_weight_format_is_here() -> None:
    assert set(STORED) == set(ops.WEIGHT_FORMATS)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 5)])
def test_weights_come_back_by_channel_along_either_axis(shape: tuple[int, ...]) -> None:
    q, scale = formats.quantize_int8(torch.randn(shape))
    found = ops.dequantize(q, scale, None, "int8", 0)
    assert torch.equal(found, q * scale.reshape(-1, *[1] * (len(shape) - 1)))
    turned = ops.dequantize(q.transpose(0, 1).contiguous(), scale, None, "int8", 1)
    assert torch.equal(turned, found.transpose(0, 1))


CALLS: dict[str, tuple[Any, ...]] = {
    **{f"dequantize {format}": ("dequantize", *stored) for format, stored in STORED.items()},
    "static uint8": ("quantize_dequantize", torch.randn(2, 3, 32), SCALE, ZERO, "uint8"),
    "static fp8": ("quantize_dequantize", torch.randn(2, 32), SCALE, None, "fp8"),
    "dynamic uint8": ("quantize_dequantize_dynamic", torch.randn(2, 3, 32), "uint8"),
    "dynamic int8": ("quantize_dequantize_dynamic", torch.randn(2, 3, 32), "int8"),
    "nvfp4": ("quantize_dequantize_nvfp4", torch.randn(2, 3, 32), SCALE),
}


@pytest.mark.parametrize("call", CALLS)
def test_operators_keep_what_they_registered(call: str) -> None:
    """torch's own check: no argument is edited, and the fake result has the shape and type of the real one."""
    name, *arguments = CALLS[call]
    checks = ["test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(each, torch.Tensor) and each.dtype == torch.float8_e4m3fn for each in arguments):
        checks.append("test_schema")  # it compares arguments before and after, which torch 2.13 cannot in FP8
    torch.library.opcheck(getattr(torch.ops.dcompile, name).default, tuple(arguments), test_utils=tuple(checks))
