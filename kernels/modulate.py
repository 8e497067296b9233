"""LayerNorm and modulation of adaptive layer norm (adaLN) in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference still runs; only GPUs need the kernel
    triton = None


def reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x [B, L, D], shift and scale [B, D] -> LayerNorm(x) (1 + scale) + shift; arithmetic in float32, result as x."""
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def modulate_kernel(x, shift, scale, out, length, width, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """One program a token; x, out [B * length, width], shift, scale [B, width], all contiguous."""
        token = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(value, 0) / width
        centred = tl.where(inside, value - mean, 0.0)
        normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        sample = token // length
        factor = 1.0 + tl.load(scale + sample * width + column, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(shift + sample * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * width + column, normed * factor + added, mask=inside)


def launch(kernel: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The result of the Triton kernel; `kernel` is it, or torch.library's wrapper of it."""
    x, shift, scale = x.contiguous(), shift.contiguous(), scale.contiguous()
    out = torch.empty_like(x)
    batch, length, width = x.shape
    block = triton.next_power_of_2(width)
    kernel[(batch * length,)](x, shift, scale, out, length, width, eps, BLOCK=block)
    return out


if triton is not None:

    @torch.library.triton_op("dcompile::modulate", mutates_args=())
    def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """x [B, L, D], shift and scale [B, D] -> LayerNorm(x) (1 + scale) + shift, of x's dtype."""
        if not x.is_cuda:  # compilers trace through this function: a CPU gets the reference's operators
            return reference(x, shift, scale, eps)
        return launch(torch.library.wrap_triton(modulate_kernel), x, shift, scale, eps)

else:

    @torch.library.custom_op("dcompile::modulate", mutates_args=())
    def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        """x [B, L, D], shift and scale [B, D] -> LayerNorm(x) (1 + scale) + shift, of x's dtype."""
        return reference(x, shift, scale, eps)


modulate.register_fake(lambda x, shift, scale, eps: torch.empty_like(x))
