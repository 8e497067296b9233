"""Triton kernels beside their PyTorch references, as operators that a model's graph may hold.

REFERENCES: operator -> the function that computes the same in plain PyTorch, for targets without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .modulate import modulate, reference

__all__ = ["REFERENCES", "modulate"]

REFERENCES: Mapping[Any, Callable[..., torch.Tensor]] = {torch.ops.dcompile.modulate.default: reference}
