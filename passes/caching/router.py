"""Learn which sites each step computes: a gate for each step and unit, by the gradient of the final image's error."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...compiler.calibrate import Calibration
from ...compiler.execute import initial_slots, refill, step_values
from ...compiler.program import Program
from .mixing import Batches, mixed
from .rollout import Judge, Masks, Rollout
from .schedules import intervals_within
from .sites import Candidate

MEMORY, TRIES, PATIENCE = 0.7, 12, 2  # of slopes from run to run; exchanges a run; runs without one until gates part


def learn_masks(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, *, share: float, runs: int, pairs: bool
) -> dict[str, list[int]]:
    """Unit of sites -> steps that compute it, `share` of all evaluations.

    pairs: the first of every two steps computes everything and only the second learns, as in Learning-to-Cache
    (2406.01733); else every step but the first learns, as in HarmoniCa (2410.01723); a value lives until it is computed
    again. Each of `runs` trajectories from noise of its own tells how the error of its image changes with each gate.
    Gates change places as that promises, one open and one shut, if the calibration's images then are nearer to the
    teacher's. It starts from the best interval; at first the gates of a step move together, later each alone.
    """
    units = list(dict.fromkeys(site.unit for site in sites))
    fixed = np.array([step % 2 == 0 if pairs else step == 0 for step in range(program.steps)])
    judge, slopes = Judge(Rollout(program, sites), calibration), Slopes(program, sites)
    budget = max(round(share * program.steps * len(units)), int(fixed.sum()) * len(units))
    best = min((Tried.by(judge, masks) for masks in intervals(fixed, len(units), budget)), key=Tried.error)
    total, tried, together, idle = torch.zeros(best.masks.shape), {best.masks.tobytes()}, True, 0
    for run in range(runs if budget < best.masks.size else 0):
        total = MEMORY * total + slopes.of(best.masks, run)
        better = improved(judge, best, total, fixed, together, tried)
        idle = 0 if better else idle + 1
        best = better or best
        if together and (idle == PATIENCE or run >= runs // 2):
            together, idle = False, 0
            best = Tried.by(judge, filled(best.masks, total, budget))
        calibration.progress((run + 1) / runs, f"learning gates, error {best.error():.4f}")
    masks = filled(best.masks, total, budget)
    return {unit: masks[:, index].nonzero()[0].tolist() for index, unit in enumerate(units)}


@dataclass(frozen=True)
class Tried:
    """Masks, and the logarithm of the error of each sample: none outweighs the others."""

    masks: Masks
    errors: NDArray[np.float64]

    @staticmethod
    def by(judge: Judge, masks: Masks) -> Tried:
        return Tried(masks, np.log(np.maximum(judge.errors(masks), 1e-12)))

    def error(self) -> float:
        return float(np.exp(self.errors.mean()))

    def beats(self, other: Tried) -> bool:
        """By more than the standard error of the samples' differences."""
        gain = other.errors - self.errors
        return bool(gain.mean() > gain.std() / max(len(gain) - 1, 1) ** 0.5)


def intervals(fixed: NDArray[np.bool_], units: int, budget: int) -> list[Masks]:
    """The best known by hand that the budget allows, all units alike."""
    rows = intervals_within(tuple(fixed.tolist()), budget // units)
    return [np.repeat(np.array(row)[:, None], units, axis=1) for row in rows]


def improved(
    judge: Judge, best: Tried, slopes: Tensor, fixed: NDArray[np.bool_], together: bool, tried: set[bytes]
) -> Tried | None:
    """The first of the exchanges that promise most, and have not been tried, that is better."""
    for masks in itertools.islice(exchanges(best.masks, slopes.numpy(), fixed, together, tried), TRIES):
        tried.add(masks.tobytes())
        if (found := Tried.by(judge, masks)).beats(best):
            return found
    return None


def exchanges(
    masks: Masks, slopes: NDArray[np.float32], fixed: NDArray[np.bool_], together: bool, tried: Collection[bytes]
) -> Iterator[Masks]:
    """The masks with one gate shut and one opened, by what the slopes promise; together: of all units of a step.

    slopes: [T, units], of the error by each gate. fixed: steps that always compute.
    """
    gates, slope = (masks[:, :1], slopes.sum(axis=1, keepdims=True)) if together else (masks, slopes)
    shuts = np.flatnonzero(gates & ~fixed[:, None])
    opens = np.flatnonzero(~gates)
    promise = slope.flat[opens] - slope.flat[shuts][:, None]
    for pair in promise.argsort(axis=None, kind="stable"):
        new = gates.copy()
        new.flat[[shuts[pair // len(opens)], opens[pair % len(opens)]]] = False, True
        new = np.repeat(new, masks.shape[1] // new.shape[1], axis=1)
        if new.tobytes() not in tried:
            yield new


def filled(masks: Masks, slopes: Tensor, budget: int) -> Masks:
    """With the gates opened that promise most, as many as the budget leaves."""
    new = masks.copy()
    order = slopes.masked_fill(torch.from_numpy(masks), torch.inf).flatten().argsort(stable=True)
    new.flat[order[: budget - int(masks.sum())].numpy()] = True
    return new


class Slopes:
    """How the error of a trajectory's image changes with each gate; the program's weights stay as they are."""

    def __init__(self, program: Program, sites: Sequence[Candidate]) -> None:
        self.program, self.sites = program, sites
        units = list(dict.fromkeys(site.unit for site in sites))
        self.unit_of = [units.index(site.unit) for site in sites]
        self.module = mixed(program.graph, sites)
        self.batches = Batches(program.contract, 2_000_000)

    def of(self, masks: Masks, run: int) -> Tensor:
        """[T, units] d log(squared error) / d gate at these masks, on a batch of the run's own; mean over samples."""
        conditions, seeds = self.batches.of(run)
        gates = torch.from_numpy(masks).float().requires_grad_()
        with torch.no_grad():
            teacher = self.image(torch.ones_like(gates), conditions, seeds)
        distance = (self.image(gates, conditions, seeds) - teacher).square().flatten(1).sum(dim=1)
        (slopes,) = torch.autograd.grad(distance.clamp_min(1e-12).log().mean(), gates)
        return slopes

    def image(self, gates: Tensor, conditions: Mapping[str, NDArray[Any]], seeds: Sequence[int]) -> Tensor:
        """The sample at the end. What a step keeps of a site is what it used: gate * value + (1 - gate) * kept.

        One step at a time is held for the way back; of the others, what they hand on.
        """
        slots = initial_slots(self.program, conditions, seeds)
        states: Sequence[Tensor] = [torch.zeros(()) for _ in self.sites]
        for step in range(self.program.steps):
            refill(self.program, slots, seeds, step)
            of_sites = gates[step] if step else torch.ones_like(gates[step])
            results = checkpoint(
                self.module,
                *step_values(self.program, step, slots),
                *of_sites[self.unit_of].unbind(),
                *states,
                use_reentrant=False,
            )
            states = results[len(results) - len(self.sites) :]
            slots.update(zip(("sample", "history"), results[: len(results) - len(self.sites)], strict=False))
        return slots["sample"]
