"""What a network that was cut is trained to match of the one it came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TYPICAL = 2.0  # deviations from the mean beyond which an activation counts as massive, and is left out


def output_loss(found: Tensor, expected: Tensor) -> Tensor:
    """Mean squared error of the prediction: [] from two of [B, ...]."""
    return (found - expected).square().mean()


def feature_loss(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the typical activations of matched blocks, mean over blocks (TinyFusion, 2412.01199, 3.3).

    found, expected: as many values [B, ...] of the same shapes. Massive activations, more than two deviations from a
    sample's own mean, count as zero on their side: those of a deep network would drown all others.
    """
    losses = [(typical(one) - typical(other)).square().mean() for one, other in zip(found, expected, strict=True)]
    return torch.stack(losses).mean()


def typical(value: Tensor) -> Tensor:
    """[B, ...] with zeros for what is `TYPICAL` deviations or more from the mean of its sample."""
    rest = tuple(range(1, value.dim()))
    mean, deviation = value.mean(rest, keepdim=True), value.std(rest, keepdim=True)
    return value * ((value - mean).abs() < TYPICAL * deviation)


def matched(kept: int, all_of_them: int) -> list[int]:
    """For each of `kept` blocks, the block of the whole network whose output it is to match: the last of its share.

    Of half of them, block i matches block 2 i + 1, as in TinyFusion.
    """
    return [-(-(index + 1) * all_of_them // kept) - 1 for index in range(kept)]
