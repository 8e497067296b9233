"""Tokens to the experts that chose them, and what experts make of them back: operators that a model's graph may hold.

A token goes whole, and goes to its expert's place at once, so that engines copy rows: gathering element by element
and turning the result round takes as long as the experts themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("dcompile::take_tokens", mutates_args=())
def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x [B, N, D], places int64 [B, E, C], below N -> [E, B * C, D]: for each expert its tokens, sample by sample."""
    return taken(x, places)


@torch.library.custom_op("dcompile::add_tokens", mutates_args=())
def add_tokens(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """x [B, N, D] plus rows [E, B * C, D], each at its token; places int64 [B, E, C]. A new tensor, of x's dtype."""
    return added(x, places, rows)


def taken(x: Tensor, places: Tensor) -> Tensor:
    """What `take_tokens` computes, as PyTorch's own operators."""
    found = x.flatten(0, 1).index_select(0, _rows(x, places))
    return found.view(places.shape[1], -1, x.shape[2])


def added(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """What `add_tokens` computes, as PyTorch's own operators."""
    index = _rows(x, places)[:, None].expand(-1, x.shape[2])  # not index_add: AOTInductor has no C++ for it
    total = x.flatten(0, 1).scatter_add(0, index, rows.flatten(0, 1).to(x.dtype))
    return total.view_as(x)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """int64 [E * B * C]: where the tokens of x lie in [B * N, D]."""
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return (places + first[:, None, None]).transpose(0, 1).reshape(-1)


@take_tokens.register_fake
def _(x: Tensor, places: Tensor) -> Tensor:
    batch, experts, each = places.shape
    return x.new_empty((experts, batch * each, x.shape[2]))


@add_tokens.register_fake
def _(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_for_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, places = inputs
    ctx.save_for_backward(places)
    ctx.shape = x.shape


def _keep_for_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, places, rows = inputs
    ctx.save_for_backward(places)
    ctx.dtype = rows.dtype


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (places,) = ctx.saved_tensors
    return add_tokens(grad.new_zeros(ctx.shape), places, grad), None


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    (places,) = ctx.saved_tensors
    return grad, None, take_tokens(grad, places).to(ctx.dtype)


TAKE_TOKENS, ADD_TOKENS = torch.ops.dcompile.take_tokens.default, torch.ops.dcompile.add_tokens.default
take_tokens.register_autograd(_take_backward, setup_context=_keep_for_take)
add_tokens.register_autograd(_add_backward, setup_context=_keep_for_add)
