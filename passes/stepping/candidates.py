"""Timesteps and skipped blocks as genes: how candidates are born of others (AutoDiffusion, 2309.10438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compiler.calibrate import spread

REPLACED, NEAR = 0.25, 0.5  # of a child's timesteps; of those, by one at most REACH rows away
REACH = 4
CROSSED, NEW = 0.3, 0.1  # of the children: have two parents; have none


@dataclass(frozen=True, eq=False)
class Candidate:
    """rows: int64 [K], places in the long schedule, rising, the first one 0. computes: bool [K, units], False where a
    step leaves the blocks of a unit out."""

    rows: NDArray[np.int64]
    computes: NDArray[np.bool_]

    @property
    def key(self) -> bytes:
        return self.rows.tobytes() + self.computes.tobytes()

    @property
    def skipped(self) -> int:
        return int((~self.computes).sum())


class Breeder:
    """Makes candidates of `count` rows of `of`, with `skipped` evaluations of `units` left out."""

    def __init__(self, count: int, of: int, units: int, skipped: int, random: np.random.Generator) -> None:
        self.count, self.of, self.units, self.skipped, self.random = count, of, units, skipped, random

    def uniform(self) -> Candidate:
        return self._skipping(np.array(spread(self.of, self.count)), np.ones((self.count, self.units), bool))

    def new(self) -> Candidate:
        rows = np.sort(self.random.choice(np.arange(1, self.of), self.count - 1, replace=False))
        return self._skipping(np.concatenate([[0], rows]), np.ones((self.count, self.units), bool))

    def child(self, parents: Sequence[Candidate]) -> Candidate:
        kind = self.random.random()
        if kind < NEW:
            return self.new()
        one, other = (parents[int(self.random.integers(len(parents)))] for _ in range(2))
        if kind < NEW + CROSSED:
            return self._crossed(one, other)
        return self.mutant(one)

    def mutant(self, parent: Candidate) -> Candidate:
        """Some timesteps replaced by unused ones, or where blocks are skipped, as likely, some blocks by others."""
        rows, computes = parent.rows.copy(), parent.computes.copy()
        if self.skipped and self.random.random() < 0.5:
            gone = np.argwhere(~computes)
            back = gone[self.random.random(len(gone)) < REPLACED]
            for step, unit in back if len(back) else gone[:1]:
                computes[step, unit] = True
            return self._skipping(rows, computes)
        places = 1 + np.flatnonzero(self.random.random(self.count - 1) < REPLACED)
        for place in places if len(places) else self.random.integers(1, self.count, 1):
            unused = np.setdiff1d(np.arange(1, self.of), rows)
            near = unused[abs(unused - rows[place]) <= REACH]
            among = near if len(near) and self.random.random() < NEAR else unused
            if len(among):
                rows[place] = self.random.choice(among)
        return self._skipping(np.sort(rows), computes)

    def _crossed(self, one: Candidate, other: Candidate) -> Candidate:
        """Each place from either parent; a timestep that both give is filled up from what they have."""
        turns = self.random.random(self.count) < 0.5
        rows = np.unique(np.where(turns, one.rows, other.rows))
        rest = np.setdiff1d(np.union1d(one.rows, other.rows), rows)
        more = self.random.choice(rest, self.count - len(rows), replace=False)
        return self._skipping(np.sort([*rows, *more]), np.where(turns[:, None], one.computes, other.computes))

    def _skipping(self, rows: NDArray[Any], computes: NDArray[np.bool_]) -> Candidate:
        """With as many evaluations left out as there are to be."""
        computes = computes.copy()
        missing = self.skipped - int((~computes).sum())
        places = np.argwhere(computes if missing > 0 else ~computes)
        for step, unit in self.random.permutation(places)[: abs(missing)]:
            computes[step, unit] = missing < 0
        return Candidate(rows.astype(np.int64), computes)
