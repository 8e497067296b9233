"""Quantisation as operators in a graph: what they compute in PyTorch is what an engine must reproduce.

A quantised layer is the plain ATen operator between them, `aten.linear(quantize_dequantize(x), dequantize(w, ...), b)`,
so that every pass still finds it. Each exporter turns the pair into the form that its target runs in low precision.
Arithmetic is in float32; an activation keeps its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import formats

STATIC_FORMATS = ("uint8", "int8", "fp8")
DYNAMIC_FORMATS = ("uint8", "int8")
WEIGHT_FORMATS = ("int8", "int4", "fp8", "nvfp4")


@torch.library.custom_op("dcompile::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    """x rounded to a grid that is known at build time, one for the whole tensor.

    scale [] float32. format: "uint8" (affine, zero_point [] uint8), "int8" (symmetric), "fp8" (E4M3).
    """
    real = x.to(torch.float32)
    if format == "uint8":
        assert zero_point is not None
        rounded = formats.round_uint8(real, scale, zero_point)
    else:
        rounded = (formats.round_int8 if format == "int8" else formats.round_fp8)(real, scale)
    return rounded.to(x.dtype)


@torch.library.custom_op("dcompile::quantize_dequantize_dynamic", mutates_args=())
def quantize_dequantize_dynamic(x: Tensor, format: str) -> Tensor:
    """x rounded to a grid taken from x itself.

    format: "uint8", one affine grid for the whole tensor (ONNX DynamicQuantizeLinear; samples of a batch share it), or
    "int8", one symmetric grid for each token, that is for each row of the last axis.
    """
    real = x.to(torch.float32)
    if format == "uint8":
        low, high = real.amin().clamp_max(0.0), real.amax().clamp_min(0.0)
        scale = ((high - low) / formats.UINT8_MAX).clamp_min(formats.SMALLEST_SCALE)
        rounded = formats.round_uint8(real, scale, torch.clamp(torch.round(-low / scale), 0, formats.UINT8_MAX))
    else:
        amax = real.abs().amax(-1, keepdim=True).clamp_min(formats.SMALLEST_SCALE)
        rounded = formats.round_int8(real / amax, torch.tensor(1 / formats.INT8_MAX)) * amax
    return rounded.to(x.dtype)


@torch.library.custom_op("dcompile::quantize_dequantize_nvfp4", mutates_args=())
def quantize_dequantize_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """x [..., K] rounded to NVFP4: block scales from x itself, global_scale [] float32 from calibration."""
    return formats.round_nvfp4(x.to(torch.float32), global_scale).to(x.dtype)


@torch.library.custom_op("dcompile::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, axis: int) -> Tensor:
    """A stored weight as float32.

    "int8", "fp8": q int8 or float8_e4m3fn of the weight's shape, scale [q.shape[axis]] float32.
    "int4": q packed uint8 [N, K/2], scale [N, K/group] float32. "nvfp4": q packed uint8 [N, K/2], scale float8_e4m3fn
    [N, K/16], global_scale [] float32. For both, axis is 1, that of the blocks, and the result is [N, K].
    """
    return formats.dequantize(q, scale, global_scale, format, axis)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str) -> Tensor:
    return torch.empty_like(x)


@quantize_dequantize_dynamic.register_fake
def _(x: Tensor, format: str) -> Tensor:
    return torch.empty_like(x)


@quantize_dequantize_nvfp4.register_fake
def _(x: Tensor, global_scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, axis: int) -> Tensor:
    shape = (*q.shape[:-1], 2 * q.shape[-1]) if format in ("int4", "nvfp4") else q.shape
    return q.new_empty(shape, dtype=torch.float32)
