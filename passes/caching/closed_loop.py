"""Refit the tables of rolling sites as the cached program runs: each step corrects what those before it have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler.calibrate import Calibration
from ...compiler.execute import initial_slots, run
from ...compiler.plan import Mask, Plan, Site
from ...compiler.program import Program
from ...compiler.variants import Variant, build_variant, state_slots

ROUNDS = 3  # of Gauss-Newton: what follows a range of blocks is nearly linear in it
CHANGE = 1e-2  # of a coefficient, for its derivative
RIDGE = 1e-2  # of the states' mean energy, on a change of coefficients: states are nearly parallel
STIFFNESS = 1.0  # 0.1 is better at an interval of 3 of the glyph DiT, and worse at 5


def close_loop(program: Program, calibration: Calibration) -> dict[str, NDArray[np.float32]]:
    """Name -> float32 [T, states], the tables of the rolling sites drawn to where the uncached program goes.

    One run on the calibration's requests, in which each step that reuses first chooses its coefficients: those that
    bring the sample nearest to the uncached program's after this step. A step so undoes what its predecessors did
    wrong, which least squares on values cannot: its predictions lag behind, all to the same side. Costs three times as
    many reuse steps as a step has coefficients. What the coefficients
    change in the value, relative to it, counts as much as the sample's error relative to the step's way: a head that
    ignores the value's scale would leave that open.
    """
    path = uncached_path(program, calibration)
    ways = way_sizes(path)
    tables = {site.name: site.reuse.copy() for site in program.plan.sites if site.rolling}
    variants = {mask: build_variant(program, mask) for mask in program.plan.masks}

    def refit(step: int, mask: Mask, values: list[Tensor]) -> None:
        calibration.progress((step + 1) / program.steps, "closing the loop")
        pairs = zip(program.plan.sites, mask, strict=True)
        if reused := [site for site, computes in pairs if site.rolling and not computes]:
            found = _Fit(variants[mask], values, reused, path[step + 1], ways[step]).solve()
            for site, row in zip(reused, found.split([site.states for site in reused]), strict=True):
                tables[site.name][step] = row.numpy()

    run(program, calibration.conditions, calibration.seeds, on_inputs=refit)
    return tables


def uncached_path(program: Program, calibration: Calibration) -> list[Tensor]:
    """The samples of the program without cache sites, from the noise on."""
    path = [initial_slots(program, calibration.conditions, calibration.seeds)["sample"]]
    uncached = replace(program, plan=Plan(program.steps))
    run(uncached, calibration.conditions, calibration.seeds, on_step=lambda step, sample: path.append(sample))
    return path


def way_sizes(path: Sequence[Tensor]) -> list[float]:
    """Mean squared change of each step of a path, and a tenth of all steps' mean: a last step may go nearly nowhere."""
    ways = [float((after - before).square().mean()) for before, after in pairwise(path)]
    return [way + 0.1 * sum(ways) / len(ways) + 1e-12 for way in ways]


class _Fit:
    """Coefficients of one step, against the sample that the step should give; `values` are set to what is found."""

    def __init__(
        self, variant: Variant, values: list[Tensor], sites: Sequence[Site], target: Tensor, way: float
    ) -> None:
        self.variant, self.values, self.target = variant, values, target
        sources = [source for _, source in variant.inputs.values()]
        self.rows = [sources.index(f"{site.name}.reuse") for site in sites]
        self.counts = [site.states for site in sites]
        self.first = torch.cat([values[index] for index in self.rows])
        blocks = []
        for site, row in zip(sites, self.first.split(self.counts), strict=True):
            (slot,) = state_slots(site)
            states = values[sources.index(slot)].movedim(1, 0).flatten(1).double()
            gram = (states @ states.T) / max(float((row.double() @ states).square().sum()), 1e-30)
            blocks.append(
                STIFFNESS * way * target.numel() * (gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram)))
            )
        self.stiffness = torch.block_diag(*blocks)

    def solve(self) -> Tensor:
        row, error = self.first, self._error(self.first)
        for _ in range(ROUNDS):
            shifted = row + CHANGE * torch.eye(len(row))
            slopes = torch.stack([self._error(each) - error for each in shifted]) / CHANGE
            pull = slopes @ error + self.stiffness @ (row - self.first).double()
            move = -torch.linalg.solve(slopes @ slopes.T + self.stiffness, pull).float()
            halvings = (row + move / 4**power for power in range(4))
            better = next((each for each in halvings if self._cost(each) < self._cost(row)), None)
            if better is None:
                break
            row, error = better, self._error(better)
        self._error(row)  # leaves it in the values
        return row

    def _error(self, row: Tensor) -> Tensor:
        for index, part in zip(self.rows, row.split(self.counts), strict=True):
            self.values[index] = part
        sample: Tensor = self.variant.graph(*self.values)[0]
        return (sample - self.target).flatten().double()

    def _cost(self, row: Tensor) -> float:
        error, change = self._error(row), (row - self.first).double()
        return float(error @ error + change @ self.stiffness @ change)
