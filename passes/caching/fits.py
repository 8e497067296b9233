"""Least squares from sums that grow with each batch: y ≈ slope * x + offset, by step and channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class AffineFit:
    """Sums over what was added so far, one for each channel (the last axis of what is added)."""

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
        variance = self.sums["xx"] / self.count - mean_x**2
        covariance = self.sums["xy"] / self.count - mean_x * mean_y
        varies = variance > 1e-12 * np.maximum(self.sums["xx"] / self.count, 1e-30)
        slope = np.where(varies, covariance / np.where(varies, variance, 1.0), 1.0)
        return slope, mean_y - slope * mean_x
