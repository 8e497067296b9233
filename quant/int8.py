"""INT8: weights symmetric per output channel, activations affine per tensor.

The torch operators here are what an engine must reproduce.
real = (integer - zero_point) * scale, integer in -127..127 for weights (int8) and 0..255 for activations (uint8).
Rounding is to nearest, ties to even, as ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHT_MAX = 127
QMIN, QMAX = 0, 255
_SMALLEST_SCALE = 1e-12


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, ...] float32 -> (int8 [N, ...], scale [N] float32 > 0), symmetric, one scale an output channel."""
    flat = weight.detach().reshape(weight.shape[0], -1).to(torch.float32)
    scale = (flat.abs().amax(dim=1) / WEIGHT_MAX).clamp_min(_SMALLEST_SCALE)
    integer = torch.round(flat / scale[:, None]).clamp(-WEIGHT_MAX, WEIGHT_MAX).to(torch.int8)
    return integer.reshape(weight.shape), scale


def affine_range(low: float, high: float) -> tuple[float, int]:
    """(scale, zero_point) that maps [low, high], widened to hold 0, on 0..255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (QMAX - QMIN), _SMALLEST_SCALE)
    return scale, max(QMIN, min(QMAX, round(QMIN - low / scale)))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 -> the integers as float32."""
    return torch.clamp(torch.round(x / scale) + zero_point.to(torch.float32), QMIN, QMAX)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (quantize(x, scale, zero_point) - zero_point.to(torch.float32)) * scale


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale [], zero_point []) float32 of ONNX DynamicQuantizeLinear: one range for the whole tensor, on 0..255."""
    low, high = x.amin().clamp_max(0.0), x.amax().clamp_min(0.0)
    scale = ((high - low) / QMAX).clamp_min(_SMALLEST_SCALE)
    return scale, torch.clamp(torch.round(-low / scale), QMIN, QMAX)


@torch.library.custom_op("dcompile::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """x [..., K] float32, weight [K, N] int8, weight_scale [N], bias [N] -> [..., N].

    scale [] and zero_point [] uint8 are of x.
    """
    integers = quantize(x, scale, zero_point) - zero_point.to(torch.float32)
    y = (integers @ weight.to(torch.float32)) * (scale * weight_scale)
    return y if bias is None else y + bias


@torch.library.custom_op("dcompile::linear_int8_dynamic", mutates_args=())
def linear_int8_dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As linear_int8, with the range of x taken from x itself (all samples of the batch together)."""
    y: Tensor = linear_int8(x, weight, weight_scale, bias, *dynamic_range(x))
    return y


@linear_int8.register_fake
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor, zero_point: Tensor
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@linear_int8_dynamic.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("dcompile::conv2d_int8", mutates_args=())
def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x [B, I, H, W] float32, weight [O, I/groups, h, w] int8, weight_scale [O] -> [B, O, H', W'].

    Runtimes fuse an INT8 convolution only when its output is quantised too, so the output has a scale and a zero point
    of its own, and is rounded to them.
    """
    integers = quantize(x, scale, zero_point) - zero_point.to(torch.float32)
    y = torch.nn.functional.conv2d(integers, weight.to(torch.float32), None, stride, padding, dilation, groups)
    y = y * (scale * weight_scale)[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return fake_quantize(y, out_scale, out_zero_point)


@conv2d_int8.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    out_scale: Tensor,
    out_zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.nn.functional.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)
