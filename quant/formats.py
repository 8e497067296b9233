"""Number formats of weights and activations: quantise and dequantise, as pure functions on tensors.

Rounding is to nearest, ties to even, as ONNX. Packed 4-bit tensors hold element 2i in the low nibble of byte i and
element 2i+1 in the high one, along the last axis, as ONNX and modelopt store them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-12
INT8_MAX = 127
INT4_MAX = 7
UINT8_MAX = 255
FP8_MAX = 448.0  # E4M3
FP4_MAX = 6.0  # E2M1
NVFP4_BLOCK = 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code
_INT4 = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
FP8_SMALLEST = 2.0**-9  # the smallest E4M3 above zero


# --- whole tensors, symmetric or affine ---


def affine_range(low: float, high: float) -> tuple[float, int]:
    """(scale, zero_point) that maps [low, high], widened to hold 0, on 0..255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / UINT8_MAX, SMALLEST_SCALE)
    return scale, max(0, min(UINT8_MAX, round(-low / scale)))


def symmetric_range(low: float, high: float, largest: float = INT8_MAX) -> float:
    """The scale that maps the larger end of [low, high] on `largest`."""
    return max(abs(low), abs(high), SMALLEST_SCALE * largest) / largest


def round_uint8(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 -> real numbers of the grid (integer - zero_point) * scale, integer in 0..255."""
    zero = zero_point.to(torch.float32)
    return (torch.clamp(torch.round(x / scale) + zero, 0, UINT8_MAX) - zero) * scale


def round_int8(x: Tensor, scale: Tensor) -> Tensor:
    """float32 -> real numbers of the grid integer * scale, integer in -128..127, as ONNX's QuantizeLinear."""
    return torch.clamp(torch.round(x / scale), -128, INT8_MAX) * scale


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """float32 -> E4M3 * scale, saturating at 448 * scale."""
    return to_fp8(x / scale).to(torch.float32) * scale


def to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


# --- weights [N, ...], the output channel first ---


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, ...] float32 -> (int8 [N, ...] in -127..127, scale [N] float32), one scale an output channel."""
    flat = _by_channel(weight)
    scale = (flat.abs().amax(1) / INT8_MAX).clamp_min(SMALLEST_SCALE)
    integers = torch.round(flat / scale[:, None]).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return integers.reshape(weight.shape), scale


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, ...] float32 -> (float8_e4m3fn [N, ...], scale [N] float32), one scale an output channel."""
    flat = _by_channel(weight)
    scale = (flat.abs().amax(1) / FP8_MAX).clamp_min(SMALLEST_SCALE)
    return to_fp8(flat / scale[:, None]).reshape(weight.shape), scale


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weight [N, K] float32 -> (packed uint8 [N, K/2] of -7..7, scale [N, K/group] float32); K a multiple of group."""
    groups = _by_channel(weight).reshape(len(weight), -1, group)
    scale = (groups.abs().amax(-1) / INT4_MAX).clamp_min(SMALLEST_SCALE)
    integers = torch.round(groups / scale[..., None]).clamp(-INT4_MAX, INT4_MAX).to(torch.int8)
    return pack(integers.flatten(1).view(torch.uint8) & 0xF), scale


def quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [N, K] float32, K a multiple of 16 -> (packed E2M1 uint8 [N, K/2], scale float8_e4m3fn [N, K/16],
    global_scale [] float32): the two-level scaling of NVFP4."""
    flat = _by_channel(weight)
    global_scale = nvfp4_global_scale(float(flat.abs().amax()))
    scale, elements = _nvfp4(flat, global_scale)
    return pack(e2m1_codes(elements.flatten(1))), scale, global_scale


def _by_channel(weight: Tensor) -> Tensor:
    """Float32 [N, everything else]."""
    return weight.detach().to(torch.float32).flatten(1)


# --- NVFP4: E2M1 elements, an E4M3 scale for 16 of them, one float32 scale for the tensor ---


def nvfp4_global_scale(amax: float) -> Tensor:
    """[] float32: with it the block that holds amax gets the largest block scale, 448."""
    return torch.tensor(amax / (FP4_MAX * FP8_MAX) if amax else 1.0, dtype=torch.float32)


def round_nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    """float32 [..., K] -> its NVFP4 value; block scales from the values themselves, the global scale is given."""
    scale, elements = _nvfp4(x, global_scale)
    return _nvfp4_values(elements, scale, global_scale)


def _nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> (scale float8_e4m3fn [..., K/16], elements float32 [..., K/16, 16]): divided by the scale as it is rounded."""
    blocks = x.reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    amax = blocks.abs().amax(-1)
    wanted = torch.where(amax == 0, 1.0, amax / (FP4_MAX * global_scale))
    scale = wanted.clamp(FP8_SMALLEST, FP8_MAX).to(torch.float8_e4m3fn)
    return scale, round_e2m1(blocks / (scale.to(torch.float32) * global_scale)[..., None])


def _nvfp4_values(elements: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    return (elements * (scale.to(torch.float32) * global_scale)[..., None]).flatten(-2)


def round_e2m1(x: Tensor) -> Tensor:
    """float32 -> the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with its sign, ties to the even code; saturating at 6."""
    size = x.abs()
    # The values are 0.5 apart up to 2, 1 up to 4, then 2; an even multiple of the step is an even code.
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-FP4_MAX, FP4_MAX)


def e2m1_codes(values: Tensor) -> Tensor:
    """Values of E2M1 -> codes uint8, sign * 8 + ordinal."""
    size = values.abs()
    ordinal = torch.where(size <= 2.0, 2.0 * size, torch.where(size <= 4.0, size + 2.0, 7.0))
    return (ordinal + 8.0 * torch.signbit(values)).to(torch.uint8)


# --- packed 4-bit tensors ---


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] in 0..15, K even -> bytes uint8 [..., K/2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def _unpack_as(packed: Tensor, by_code: tuple[float, ...]) -> Tensor:
    """Bytes uint8 [..., K/2] -> the value of each code, float32 [..., K]."""
    values = torch.tensor(by_code, dtype=torch.float32, device=packed.device)
    by_byte = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    return by_byte.index_select(0, packed.flatten().int()).reshape(*packed.shape[:-1], -1)


# --- stored weights, back ---


def dequantize(q: Tensor, scale: Tensor, global_scale: Tensor | None, format: str, axis: int) -> Tensor:
    """A stored weight as float32; see `dcompile::dequantize` in ops.py for the shapes."""
    if format == "nvfp4":
        assert global_scale is not None
        return _nvfp4_values(_unpack_as(q, _E2M1).reshape(*scale.shape, NVFP4_BLOCK), scale, global_scale)
    if format == "int4":
        groups = _unpack_as(q, _INT4).reshape(*scale.shape, -1)
        return (groups * scale[..., None]).flatten(-2)
    shape = [1] * q.dim()
    shape[axis] = -1
    return q.to(torch.float32) * scale.view(shape)
