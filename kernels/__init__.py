"""Operators that a model's graph may hold, with what they compute in PyTorch; some are kernels in Triton.

REFERENCES: operator -> the function that computes the same with PyTorch's own operators, for targets without ours.
IN_TRITON: those of them that are kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .experts import ADD_TOKENS, TAKE_TOKENS, added, taken
from .modulate import modulate, reference

__all__ = ["ADD_TOKENS", "IN_TRITON", "REFERENCES", "TAKE_TOKENS", "modulate"]

IN_TRITON = (torch.ops.dcompile.modulate.default,)
REFERENCES: Mapping[Any, Callable[..., torch.Tensor]] = {
    torch.ops.dcompile.modulate.default: reference,
    TAKE_TOKENS: taken,
    ADD_TOKENS: added,
}
