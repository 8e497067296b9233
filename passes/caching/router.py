"""Learn which sites each step computes: a gate for each step and site, trained against the uncached program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.calibrate import Calibration, example_conditions
from ...compiler.execute import initial_slots, zero_state
from ...compiler.program import Program
from ...compiler.rewrite import aten
from ...runtime.random import normal
from .sites import Candidate

RATE, PENALTY, THRESHOLD = 0.05, 0.02, 0.1  # of the optimiser, on each open gate, below which a gate counts as shut


def learn_masks(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, *, share: float, runs: int, pairs: bool
) -> dict[str, list[int]]:
    """Unit of sites -> steps that compute it, `share` of all evaluations, those whose gates ended up most open.

    pairs: the first of every two steps computes everything and only the second learns, as in Learning-to-Cache
    (2406.01733); else every step but the first learns and a value lives until it is computed again, as in HarmoniCa
    (2410.01723), whose training from noise alone, with a step of the optimiser at each step of `runs` trajectories,
    serves both.
    """
    units = list(dict.fromkeys(site.unit for site in sites))
    learner = _Learner(program, sites, units, pairs)
    for run in range(runs):
        learner.train(run, len(calibration.seeds))
        calibration.progress((run + 1) / runs, f"learning gates, loss {learner.loss:.4f}")
    return _open_most(learner.logits.detach(), units, share, pairs)


def _open_most(logits: Tensor, units: Sequence[str], share: float, pairs: bool) -> dict[str, list[int]]:
    steps, count = logits.shape
    always = torch.arange(steps) % 2 == 0 if pairs else torch.arange(steps) == 0
    ranked = logits.masked_fill(always[:, None], torch.inf).flatten().argsort(descending=True)
    kept = max(round(share * steps * count), int(always.sum()) * count)
    computed = torch.zeros(steps * count, dtype=torch.bool)
    computed[ranked[:kept]] = True
    table = computed.reshape(steps, count)
    return {unit: table[:, index].nonzero().flatten().tolist() for index, unit in enumerate(units)}


class _Learner:
    def __init__(self, program: Program, sites: Sequence[Candidate], units: Sequence[str], pairs: bool) -> None:
        self.program, self.units, self.pairs = program, units, pairs
        self.sites = sites
        self.module = _mixed(program.graph, sites)
        self.inputs = list(rewrite.placeholders(program.graph))
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(program.steps, len(units), generator=generator).mul(0.1).add(1.0).requires_grad_()
        self.optimiser = torch.optim.Adam([self.logits], lr=RATE)
        self.loss = float("nan")

    def train(self, run: int, batch: int) -> None:
        """One trajectory from noise of its own; the program's weights stay as they are."""
        seeds = [2_000_000 + run * batch + i for i in range(batch)]
        slots = initial_slots(self.program, example_conditions(self.program.contract, batch, run), seeds)
        states = [torch.zeros(()) for _ in self.sites]
        losses: list[float] = []
        for step in range(self.program.steps):
            if self.program.contract.stochastic:
                shape = tuple(self.program.contract.sample.shape)
                slots["noise"] = torch.from_numpy(normal(seeds, step + 1, shape))
            values = self._values(step, slots, batch)
            learns = step > 0 and (step % 2 == 1 or not self.pairs)
            results, states = self._learn(step, values, states, losses) if learns else self._compute(values)
            slots.update(zip(("sample", "history"), results, strict=False))
        self.loss = float(np.mean(losses))

    def _compute(self, values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            shut = [torch.zeros(()) for _ in self.sites]
            results = self.module(*values, *[torch.ones(()) for _ in self.sites], *shut)
        return self._split(results)

    def _learn(
        self, step: int, values: Sequence[Tensor], states: Sequence[Tensor], losses: list[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A step of the optimiser; the sample goes on as the gates have it, and what an open gate computed is kept."""
        teacher, _ = self._compute(values)
        opened = torch.sigmoid(self.logits[step])
        index = [self.units.index(site.unit) for site in self.sites]
        results, fresh = self._split(self.module(*values, *[opened[i] for i in index], *states))
        moved = (teacher[0] - values[0]).square().mean().clamp_min(1e-12)
        error = (results[0] - teacher[0]).square().mean() / moved
        self.optimiser.zero_grad()
        (error + PENALTY * opened.mean()).backward()
        self.optimiser.step()
        with torch.no_grad():
            self.logits.clamp_(-5, 5)
        losses.append(float(error.detach()))
        kept = [new if opened[i] > THRESHOLD else old for new, old, i in zip(fresh, states, index, strict=True)]
        return [result.detach() for result in results], [value.detach() for value in kept]

    def _split(self, results: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        count = len(results) - len(self.sites)
        return list(results[:count]), list(results[count:])

    def _values(self, step: int, slots: Mapping[str, Tensor], batch: int) -> list[Tensor]:
        nodes = rewrite.placeholders(self.program.graph)
        tables = self.program.tables
        return [
            tables[name][step] if name in tables else slots[name] if name in slots else zero_state(nodes[name], batch)
            for name in self.inputs
        ]


def _mixed(graph: fx.GraphModule, sites: Sequence[Candidate]) -> fx.GraphModule:
    """The graph with each site's value as gate * value + (1 - gate) * state, and the values behind its results.

    Inputs after the graph's own: a gate for each site, then a state for each.
    """
    module = rewrite.clone(graph)
    values = [rewrite.node_named(module, site.value) for site in sites]
    gates = [rewrite.add_input(module, f"gate{i}", torch.zeros(())) for i in range(len(sites))]
    examples = [rewrite.tensor_of(value) for value in values]
    states = [
        rewrite.add_input(module, f"state{i}", example) for i, example in enumerate(examples) if example is not None
    ]
    for value, gate, state in zip(values, gates, states, strict=True):
        with module.graph.inserting_after(value):
            mixed = module.graph.call_function(aten.lerp.Tensor, (state, state, gate))
        mixed.meta = dict(value.meta)
        value.replace_all_uses_with(mixed)
        mixed.args = (state, value, gate)
    rewrite.output_node(module).args = ((*rewrite.output_values(module), *values),)
    module.graph.lint()
    return fx.GraphModule(module, module.graph)
