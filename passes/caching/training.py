"""Train the networks that predict reused values: on the program's own trajectories, to give the uncached samples."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler import rewrite
from ...compiler.calibrate import Calibration, example_conditions
from ...compiler.execute import initial_slots, refill, run, variant_inputs
from ...compiler.plan import Mask, Plan
from ...compiler.program import Program
from ...compiler.variants import build_variant, cache_tables, state_slots
from .nets import PATH, Form, to_tokens
from .sites import Candidate

RATE = 1e-3  # of Adam, falling to 0 by a cosine
ROUNDS = 20  # steps of the optimiser for each recorded run
KEPT_BYTES = 1 << 29  # of recorded states
MEASURED = ("mean", "inverse_std", "scale")  # of a network's weights: what is measured, not learned


def train_networks(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, runs: int
) -> dict[str, NDArray[np.float32]]:
    """Path -> weight, of every network in the program's graph. The program's other weights stay as they are.

    Each of `runs` rounds records a trajectory from noise of its own and takes steps of Adam, each on all stretches of
    one that is recorded: from a step that computes to the next, with all that reuse between. The first half of the
    rounds start each stretch on the uncached trajectory (teacher forcing), the others where the cached program is by
    then; both hold its samples against those of the uncached program from the same start. What counts is how these
    errors add up along the trajectory, as if a step that computes handed them on as they are. Squared one by one they
    would leave a network that predicts too little change, each time to the same side: on the glyph DiT a copy errs less
    by step than extrapolation to the first order, and ends 9 dB further off. Deterministic. Without DisCa's adversarial
    stage.
    """
    trainer = _Trainer(program, calibration)
    trainer.measure(sites)
    for index in range(runs):
        trainer.record(index, own=index >= runs - runs // 2)
        for each in range(ROUNDS):
            trainer.learn((index + each / ROUNDS) / runs)
        calibration.progress((index + 1) / runs, f"training predictors, loss {trainer.loss:.4f}")
    return {name: weight.detach().numpy().copy() for name, weight in trainer.weights.items()}


@dataclass(frozen=True)
class _Stretch:
    """Steps in a row that reuse: what they start with, and the sample that the uncached program ends with."""

    steps: range
    slots: Mapping[str, Tensor]
    target: Tensor


@dataclass(frozen=True)
class _Trajectory:
    """way: mean squared change of the sample in a step."""

    seeds: Sequence[int]
    stretches: Sequence[_Stretch]
    way: float


class _Trainer:
    def __init__(self, program: Program, calibration: Calibration) -> None:
        graph = rewrite.clone(program.graph)
        names = [name for name in rewrite.weight_names(graph) if name.startswith(f"{PATH}.")]
        self.weights = {name: rewrite.attribute(graph, name).detach().clone() for name in names}
        for name, weight in self.weights.items():
            rewrite.assign(graph, name, weight)
        self.program, self.calibration = program.with_graph(rewrite.finish(graph)), calibration
        self.reusing = _stretches(program.plan)
        self.variants = {mask: build_variant(self.program, mask) for mask in program.plan.masks}
        self.tables = {**program.tables, **cache_tables(program)}
        learned = [weight for name, weight in self.weights.items() if name.rpartition(".")[2] not in MEASURED]
        self.learned = [weight.requires_grad_() for weight in learned]
        self.optimiser = torch.optim.Adam(self.learned, lr=RATE)
        self.random = np.random.default_rng(0)
        self.recorded: deque[_Trajectory] = deque()
        self.loss = float("nan")

    def measure(self, sites: Sequence[Candidate]) -> None:
        """Set what each network takes for its inputs' mean and deviation, and for the size of its result.

        From one run as the plan has it. The size is that of what a computed value differs by from the one before.
        """
        seen: dict[str, _Moments] = defaultdict(_Moments)
        forms = {site.name: self._form(site) for site in sites}
        before: dict[str, Tensor] = {}

        def tap(step: int, name: str, value: Tensor) -> None:
            for site in sites:
                if site.base == name:
                    seen[f"{site.name} current"].add(to_tokens(value, forms[site.name]))

        def on_inputs(step: int, mask: Mask, values: list[Tensor]) -> None:
            given = dict(zip((slot for _, slot in self.variants[mask].inputs.values()), values, strict=True))
            for site in self.program.plan.sites:
                form, slots = forms[site.name], state_slots(site)
                for slot in slots if all(slot in given for slot in slots) else ():
                    seen[slot].add(to_tokens(given[slot], form))
                if (newest := given.get(slots[0])) is not None:
                    if site.name in before and newest is not before[site.name]:
                        seen[f"{site.name} change"].add(to_tokens(newest - before[site.name], form))
                    before[site.name] = newest

        run(
            self.program, self.calibration.conditions, self.calibration.seeds, tap=tap,
            taps=[site.base for site in sites if site.base], on_inputs=on_inputs,
        )  # fmt: skip
        for site in self.program.plan.sites:
            inputs = [seen[name] for name in (f"{site.name} current", *state_slots(site))]
            change = seen.get(f"{site.name} change")
            spread = torch.cat([moments.deviation for moments in inputs])
            scale = change.size if change else 0.1 * seen[state_slots(site)[0]].deviation
            found = {"mean": torch.cat([moments.mean for moments in inputs]), "inverse_std": 1 / spread, "scale": scale}
            for name, value in found.items():
                self.weights[f"{PATH}.{site.name}.{name}"].copy_(value)

    def _form(self, site: Candidate) -> Form:
        shape = rewrite.shape_of(rewrite.node_named(self.program.graph, site.value))
        return Form(tuple(int(size) for size in shape[1:]), 1, 1)

    @torch.no_grad()
    def record(self, number: int, own: bool) -> None:
        """Keep one trajectory of the uncached program, or of the cached one as it is by now."""
        batch, plan = len(self.calibration.seeds), self.program.plan
        seeds = [2_000_000 + number * batch + i for i in range(batch)]
        slots = initial_slots(self.program, example_conditions(self.program.contract, batch, number), seeds)
        stretches: list[_Stretch] = []
        ways: list[float] = []
        for steps in self.reusing:
            for step in range(stretches[-1].steps.stop if stretches else 0, steps.start):
                slots |= self._step(plan.mask(step), step, slots, seeds)
            start, uncached = dict(slots), dict(slots)
            for step in steps:
                before = uncached["sample"]
                results = self._step(plan.mask(0), step, uncached, seeds)  # step 0 computes everything
                uncached |= {slot: results[slot] for slot in self.variants[plan.mask(step)].outputs}
                ways.append(float((uncached["sample"] - before).square().mean()))
            stretches.append(_Stretch(steps, start, uncached["sample"]))
            for step in steps if own else ():
                slots |= self._step(plan.mask(step), step, slots, seeds)
            slots = slots if own else uncached
        self.recorded.append(_Trajectory(seeds, stretches, sum(ways) / len(ways)))
        while len(self.recorded) > 1 and self._bytes() > KEPT_BYTES:
            self.recorded.popleft()

    def _bytes(self) -> int:
        stretches = (stretch for each in self.recorded for stretch in each.stretches)
        tensors = {id(value): value.nbytes for stretch in stretches for value in stretch.slots.values()}
        return sum(tensors.values())

    def _step(self, mask: Mask, step: int, slots: dict[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        refill(self.program, slots, seeds, step)
        variant = self.variants[mask]
        results = variant.graph(*variant_inputs(variant, slots, self.tables, step, len(seeds)))
        return dict(zip(variant.outputs, results, strict=True))

    def learn(self, done: float) -> None:
        """A step of the optimiser on one trajectory; done: part of the training that is behind it."""
        trajectory = self.recorded[int(self.random.integers(len(self.recorded)))]
        drift, loss = torch.zeros(()), torch.zeros(())
        for stretch in trajectory.stretches:
            slots = dict(stretch.slots)
            for step in stretch.steps:
                slots |= self._step(self.program.plan.mask(step), step, slots, trajectory.seeds)
            drift = drift + slots["sample"] - stretch.target
            loss = loss + drift.square().mean()
        loss = loss / (len(trajectory.stretches) * trajectory.way)
        self.optimiser.zero_grad()
        loss.backward(inputs=self.learned)  # the program's weights get no slopes
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * done))
        self.optimiser.step()
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value


def _stretches(plan: Plan) -> list[range]:
    """The steps in a row at which some site is reused."""
    found: list[range] = []
    for step in range(plan.steps):
        if not all(plan.mask(step)):
            joins = bool(found) and found[-1].stop == step
            found[-1:] = [range(found[-1].start, step + 1)] if joins else [*found[-1:], range(step, step + 1)]
    return found


class _Moments:
    """Mean and deviation by channel from sums that grow with each value."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """tokens: [B, N, channels]."""
        rows = tokens.flatten(0, 1).double()
        self.count += len(rows)
        self.total, self.squares = self.total + rows.sum(0), self.squares + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    @property
    def size(self) -> Tensor:
        """Root of the mean square; of a channel that is nearly still, a hundredth of the others'."""
        return _at_least((self.squares / self.count).sqrt())

    @property
    def deviation(self) -> Tensor:
        return _at_least((self.squares / self.count - (self.total / self.count).square()).clamp_min(0).sqrt())


def _at_least(size: Tensor) -> Tensor:
    return size.clamp_min(max(0.01 * float(size.mean()), 1e-6)).float()
