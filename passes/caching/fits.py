"""Least squares on recorded runs: what a copy is multiplied with and what is added, by step and channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler import rewrite
from ...compiler.calibrate import Calibration
from ...compiler.plan import Mask
from ...compiler.program import Program
from ...compiler.trace import Watched, watch

Floats = NDArray[np.float64]


@dataclass
class AffineFit:
    """y ≈ slope * x + offset from sums that grow with each batch, one for each channel (the last axis)."""

    count: int = 0
    sums: dict[str, Floats] = field(default_factory=dict)

    def add(self, x: Floats, y: Floats) -> None:
        """x, y: [n, channels]."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        new = {"x": x.sum(0), "y": y.sum(0), "xx": (x * x).sum(0), "xy": (x * y).sum(0)}
        self.sums = {name: self.sums[name] + value if self.count else value for name, value in new.items()}
        self.count += len(x)

    def solve(self) -> tuple[Floats, Floats]:
        """(slope, offset) [channels]; a channel whose x does not vary keeps slope 1."""
        mean_x, mean_y = self.sums["x"] / self.count, self.sums["y"] / self.count
        square = self.sums["xx"] / self.count
        variance, covariance = square - mean_x**2, self.sums["xy"] / self.count - mean_x * mean_y
        varies = variance > 1e-12 * np.maximum(square, 1e-30)
        slope = np.where(varies, covariance / np.where(varies, variance, 1.0), 1.0)
        return slope, mean_y - slope * mean_x


def fit_copies(
    program: Program, computed: Mapping[Watched, Mask], calibration: Calibration
) -> dict[str, NDArray[np.float32]]:
    """Name -> float32 [T, 2, channels], slope and offset of each step that copies; 1 and 0 where it computes.

    computed: value, or residual where it has a base, -> steps that compute it. Fitted on the trajectory of the program
    without sites, like CacheQuant (2503.01323), whose official slope is (n - 1) / n of this one.
    """
    leaders: dict[str, Floats] = {}
    found: dict[str, list[NDArray[np.float32]]] = {each.name: [] for each in computed}

    def take(step: int, each: Watched, value: Tensor) -> None:
        rows = by_channel(value)
        if computed[each][step]:
            leaders[each.name] = rows
            slope, offset = np.ones(rows.shape[1]), np.zeros(rows.shape[1])
        else:
            fit = AffineFit()
            fit.add(leaders[each.name], rows)
            slope, offset = fit.solve()
        found[each.name].append(np.stack([slope, offset]).astype(np.float32))

    watch(program, list(computed), calibration, take, "fitting the correction")
    return {name: np.stack(rows) for name, rows in found.items()}


def by_channel(value: Tensor) -> Floats:
    """[n, channels] of a value whose channels are its second dimension where it has four or more, else its last."""
    moved = value.movedim(rewrite.channel_axis(value.dim()), -1)
    result: Floats = moved.reshape(-1, moved.shape[-1]).to(torch.float64).numpy()
    return result
