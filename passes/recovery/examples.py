"""What to train on without data: trajectories of the network that is to be matched, with its predictions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...compiler.calibrate import example_conditions
from ...compiler.execute import initial_slots, refill
from ...compiler.program import Program
from .network import Network

FIRST_SEED = 4_000_000  # of noise that neither calibration nor evaluation starts from
SEEDS_APART = 1_000_000  # between those of one training and the next
KEPT_BYTES = 1 << 29  # of trajectories
REUSED = 4  # times that a state of a trajectory is trained on, on average


@dataclass(frozen=True)
class Example:
    """A batch at one step. slots: what the step graph reads. expected: the teacher's prediction. truth: what the data
    says it should be, where there is data."""

    step: int
    slots: Mapping[str, Tensor]
    expected: Tensor
    truth: Tensor | None = None


class Examples(Protocol):
    """Batches to train on, by number. batch: samples of each."""

    batch: int

    def example(self, number: int, among: int) -> Example:
        """One of `among` of a step of training: each is from its own part of the trajectory."""
        ...


class Trajectories:
    """Trajectories of the teacher by number, each of `batch` samples of its own noise; made when asked for.

    Which one an example is from, and from which step, follows from the number of the example alone: training that goes
    on after a stop sees the same.
    """

    def __init__(self, teacher: Program, batch: int, examples: int, seed: int = 0) -> None:
        self.teacher, self.batch, self.examples = teacher, batch, examples
        self.first_seed = FIRST_SEED + seed * SEEDS_APART
        self.network = Network(teacher, results=True)
        self.count = max(1, -(-examples // (teacher.steps * REUSED)))
        self._made: OrderedDict[int, list[Example]] = OrderedDict()

    def example(self, number: int, among: int) -> Example:
        random = np.random.default_rng([self.first_seed, number])
        reached = 1 + number * self.count // max(self.examples, 1)  # the first examples need not wait for all of them
        trajectory = int(random.integers(min(reached, self.count)))
        return self._trajectory(trajectory)[pick_step(random, number % among, among, self.teacher.steps)]

    @torch.no_grad()
    def _trajectory(self, number: int) -> list[Example]:
        if number in self._made:
            self._made.move_to_end(number)
            return self._made[number]
        seeds = [self.first_seed + number * self.batch + i for i in range(self.batch)]
        conditions = example_conditions(self.teacher.contract, self.batch, number)
        slots = initial_slots(self.teacher, conditions, seeds)
        found = []
        for step in range(self.teacher.steps):
            refill(self.teacher, slots, seeds, step)
            given = dict(slots)
            expected, *results = self.network(step, given)
            slots |= dict(zip(("sample", "history"), results, strict=False))
            found.append(Example(step, given, expected))
        self._made[number] = found
        while len(self._made) > 1 and len(self._made) * _bytes(found) > KEPT_BYTES:
            self._made.popitem(last=False)
        return found


def pick_step(random: np.random.Generator, share: int, among: int, steps: int) -> int:
    """A step of the `share`-th of `among` parts of the trajectory."""
    return min(int((share + random.random()) * steps / among), steps - 1)


def _bytes(examples: list[Example]) -> int:
    tensors = {id(value): value.nbytes for each in examples for value in (*each.slots.values(), each.expected)}
    return sum(tensors.values())
