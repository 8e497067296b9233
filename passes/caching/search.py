"""Search for which sites each step computes, by NSGA-II: the operations of a mask against the error of its samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...compiler.calibrate import Calibration
from ...compiler.errors import PassError, UnsupportedError
from ...compiler.program import Program
from .rollout import Judge, Masks, Rollout
from .schedules import intervals_within
from .sites import Candidate

POPULATION, POINTS = 24, 4  # of a generation; places where two parents are cut
CROSSED, FLIPPED = 0.3, 0.2  # of the children: have two parents; of their changes: make a step more, or less
MOVES, REACH = 2, 1.5  # most changes in a child; steps that a computed one goes, about
TRIES = 20  # at a child that has not been before
MARGIN = 0.85  # of the share: what a mask costs at least


@dataclass(frozen=True)
class Tried:
    """cost: share of the operations of all sites at all steps. error: of the samples, relative to the teacher's."""

    masks: Masks
    cost: float
    error: float


def search_masks(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, *, share: float, trials: int,
    delta: bool = False,
) -> dict[str, list[int]]:  # fmt: skip
    """Unit of sites -> steps that compute it: of `trials` masks the nearest to the teacher with at most this cost."""
    units = list(dict.fromkeys(site.unit for site in sites))
    if share >= 1:
        return {unit: list(range(program.steps)) for unit in units}
    front = search(program, sites, calibration, share=share, trials=trials, delta=delta)
    within = [each for each in front if each.cost <= share + 1e-9]
    if not within:
        least = min(each.cost for each in front)
        raise PassError(f"cache_steps: no mask costs as little as share {share:g}; step 0 alone is {least:.3f}")
    masks = min(within, key=lambda each: each.error).masks
    return {unit: masks[:, index].nonzero()[0].tolist() for index, unit in enumerate(units)}


def search(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, *, share: float, trials: int,
    delta: bool = False, margin: float = MARGIN,
) -> list[Tried]:  # fmt: skip
    """The masks that no other tried one beats in both, by rising cost. ECAD (2506.15682): a bit for each step and unit,
    copies of last values, a population that starts from hand-made schedules. Masks whose cost is between `margin` of
    the share and the share come before others, so that few trials do.
    """
    try:
        import optuna
    except ImportError as error:
        raise UnsupportedError("schedule 'searched' needs optuna: pip install 'dcompile[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    units = list(dict.fromkeys(site.unit for site in sites))
    judge = Judge(Rollout(program, sites, delta=delta), calibration)
    shape = program.steps - 1, len(units)
    names = [f"{step}_{unit}" for step in range(shape[0]) for unit in range(shape[1])]
    space: dict[str, Any] = dict.fromkeys(names, optuna.distributions.IntDistribution(0, 1))
    child = _Child(names, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of a strategy of one's own
        sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=0, child_generation_strategy=child)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for bits in child.first(program.steps, share):
        study.enqueue_trial(child.named(bits))
    least = margin * int(share * program.steps) / program.steps  # of what whole steps can cost
    tried: dict[bytes, Tried] = {}
    for number in range(trials):
        trial = study.ask(space)
        assert trial.relative_params is not None  # optuna 5.0: unread, a trial given whole is of no generation
        bits = np.array([trial.params[name] for name in names], bool).reshape(shape)
        masks = np.concatenate([np.ones((1, shape[1]), bool), bits])
        found = tried.get(masks.tobytes()) or try_out(judge, masks)
        tried[masks.tobytes()] = found
        over = max(found.cost - share, least - found.cost)
        trial.set_constraint("near", over - 1e-9)  # a mask exactly at its share is not to fail by rounding
        study.tell(trial, [found.cost, found.error])
        best = min((each.error for each in tried.values() if each.cost <= share + 1e-9), default=float("nan"))
        calibration.progress((number + 1) / trials, f"searching masks, error {best:.4f} at share {share:.2f}")
    return front_of(list(tried.values()))


def try_out(judge: Judge, masks: Masks) -> Tried:
    return Tried(masks, judge.cost(masks), float(judge.errors(masks).mean()))


def front_of(tried: Sequence[Tried]) -> list[Tried]:
    """Those that none beats, by rising cost and so by falling error."""
    front: list[Tried] = []
    for each in sorted(tried, key=lambda one: (one.cost, one.error)):
        if not front or each.error < front[-1].error:
            front.append(each)
    return front


class _Child:
    """Of two parents, each the better of two drawn: bits of one and of the other in turn, then steps change places.

    ECAD flips bits. Most flips are for the worse, so four times in five a computed step goes elsewhere instead: of all
    units, of every second one (attention, or feed-forward), of neighbours, or of one.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, int]) -> None:
        self.names, self.shape = names, shape
        self.random = np.random.default_rng(0)
        self.seen: set[bytes] = set()

    def __call__(self, study: Any, space: Any, parents: Sequence[Any]) -> dict[str, int]:
        self.seen |= {self._bits(each).tobytes() for each in parents}
        for _ in range(TRIES):
            bits = self._born(parents)
            if bits.tobytes() not in self.seen:
                break
        self.seen.add(bits.tobytes())
        return self.named(bits)

    def first(self, steps: int, share: float) -> list[Masks]:
        """A population of intervals that cost at most the share, all units alike, and of what is next to them."""
        rows = intervals_within((True, *[False] * (steps - 1)), int(share * steps + 1e-9))
        masks = [np.repeat(np.array(row[1:])[:, None], self.shape[1], axis=1) for row in rows]
        return masks + [self._moved(masks[number % len(masks)]) for number in range(POPULATION - len(masks))]

    def named(self, bits: Masks) -> dict[str, int]:
        return dict(zip(self.names, bits.flatten().astype(int).tolist(), strict=True))

    def _born(self, parents: Sequence[Any]) -> Masks:
        bits, other = (self._parent(parents) for _ in range(2))
        if self.random.random() < CROSSED:
            cuts = self.random.choice(bits.size, min(POINTS, bits.size - 1), replace=False)
            turns = np.isin(np.arange(bits.size), cuts).cumsum() % 2
            bits = np.where(turns.reshape(self.shape), other, bits)
        for _ in range(self.random.integers(1, MOVES + 1)):
            bits = self._moved(bits)
        return bits

    def _parent(self, parents: Sequence[Any]) -> Masks:
        one, other = (parents[int(self.random.integers(len(parents)))] for _ in range(2))
        beaten = all(a >= b for a, b in zip(one.values, other.values, strict=True))
        return self._bits(other if beaten else one)

    def _bits(self, trial: Any) -> Masks:
        return np.array([trial.params[name] for name in self.names], bool).reshape(self.shape)

    def _moved(self, bits: Masks) -> Masks:
        steps, count = self.shape
        low, high = sorted(self.random.choice(count + 1, 2, replace=False))
        one = int(self.random.integers(count))
        ranges = slice(None), slice(None), slice(one % 2, None, 2), slice(low, high), slice(one, one + 1)
        units = ranges[self.random.integers(len(ranges))]
        computes = bits[:, units].mean(axis=1) >= 0.5
        bits = bits.copy()
        if computes.all() or not computes.any() or self.random.random() < FLIPPED:
            step = self.random.integers(steps)
            bits[step, units] = ~computes[step]
            return bits
        leaves, free = self.random.choice(np.flatnonzero(computes)), np.flatnonzero(~computes)
        near = np.exp(-abs(free - leaves) / REACH) + 1 / steps
        enters = self.random.choice(free, p=near / near.sum())
        bits[[leaves, enters], units] = bits[[enters, leaves], units]
        return bits
