"""E-DiT's routers: a small network a block says, from the block's input, whether the block is worth computing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from ...compiler import rewrite
from ...compiler.calibrate import Calibration
from ...compiler.errors import PassError
from ...compiler.execute import initial_slots, refill, step_values
from ...compiler.program import Program
from .mixing import Batches, mixed
from .rollout import Masks
from .sites import Candidate

HIDDEN, OPEN, USES = 128, 0.7, 10  # width of a router; what it says untrained; uses of what a step left, at most
RATE = 3e-3  # of AdamW


class Router(nn.Module):
    """Tokens [B, N, C], of several streams one after the other -> how much the block is worth computing, [B] in 0..1.

    Of 2602.13993: Linear to HIDDEN, ReLU, mean over tokens, one logit. Channels are the second dimension where there
    are four or more. Normalised as the blocks do, without their modulation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, HIDDEN), nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.constant_(self.down.bias, math.log(OPEN / (1 - OPEN)))

    def forward(self, *streams: Tensor) -> Tensor:
        tokens = [x.movedim(1, -1).flatten(1, -2) if x.dim() >= 4 else x for x in streams]
        normal_tokens = torch.cat([functional.layer_norm(x, x.shape[-1:]) for x in tokens], dim=1)
        hidden = functional.relu(self.up(normal_tokens)).mean(dim=1)
        return torch.sigmoid(self.down(hidden)).squeeze(-1)


def route_masks(
    program: Program, sites: Sequence[Candidate], calibration: Calibration, *, share: float, runs: int
) -> dict[str, list[int]]:
    """Unit of sites -> steps that compute it, `share` of all evaluations: by vote of the calibration's requests.

    The first half of the steps computes everything; after it a block's residual is used USES times in a row at most.
    `runs` trajectories from noise of their own train the routers on the teacher's steps and on the share.
    """
    if any(site.base is None for site in sites):
        raise PassError("cache_steps: routers read the input of what they switch; use site 'block' or 'range'")
    units = list(dict.fromkeys(site.unit for site in sites))
    free = np.arange(program.steps) >= max(program.steps // 2, 1)
    target = min(max((share * program.steps - (~free).sum()) / free.sum(), 0.0), 1.0)
    if target == 1.0:
        return {unit: list(range(program.steps)) for unit in units}
    learner = Routed(program, sites, free)
    optimiser = torch.optim.AdamW(learner.routers.parameters(), lr=RATE)
    batches = Batches(program.contract, 3_000_000)
    for run in range(runs):
        loss = 0.0
        for error, opened in learner.steps(*batches.of(run), teach=True):
            optimiser.zero_grad()
            loss_of_step = error + (opened.mean() - target).square()
            loss_of_step.backward(inputs=list(learner.routers.parameters()))  # the program's weights get no slopes
            optimiser.step()
            loss += float(error.detach()) / free.sum()
        calibration.progress((run + 1) / (runs + 1), f"training routers, loss {loss:.4f}")
    with torch.no_grad():
        said = [opened.mean(dim=1) for _, opened in learner.steps(calibration.conditions, calibration.seeds)]
    masks = frozen(torch.stack(said).numpy(), free, target)
    return {unit: masks[:, index].nonzero()[0].tolist() for index, unit in enumerate(units)}


def frozen(said: NDArray[np.float32], free: NDArray[np.bool_], share: float) -> Masks:
    """The masks [T, units]: of the free steps a share computes, those that the routers value most; and the bounds.

    said: [free steps, units], mean over the requests.
    """
    masks = np.ones((len(free), said.shape[1]), bool)
    votes = np.zeros(said.size, bool)
    votes[np.argsort(-said, axis=None, kind="stable")[: round(share * said.size)]] = True
    masks[free] = votes.reshape(said.shape)
    for step in range(USES + 1, len(masks)):
        masks[step] |= ~masks[step - USES : step].any(axis=0)
    return masks


class Routed:
    """Trajectories whose blocks are computed as far as the routers say, of each sample and half of guidance by itself.

    In part, not all or nothing: a router that never sees a shut gate half open does not learn which matters more.
    """

    def __init__(self, program: Program, sites: Sequence[Candidate], free: NDArray[np.bool_]) -> None:
        self.program, self.sites, self.free = program, sites, free
        self.units = list(dict.fromkeys(site.unit for site in sites))
        self.module, self.routers = routed(program.graph, sites, self.units)

    def steps(
        self, conditions: Mapping[str, NDArray[Any]], seeds: Sequence[int], *, teach: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At each free step (error of the step relative to how far the teacher goes, what the routers say [units, B]).

        Without `teach`, the error is 0. After the last one, `sample` is what the trajectory came to.
        """
        slots = initial_slots(self.program, conditions, seeds)
        states: list[Tensor] = [torch.zeros(()) for _ in self.sites]
        for step in range(self.program.steps):
            refill(self.program, slots, seeds, step)
            values = step_values(self.program, step, slots)
            forced = torch.full((len(self.units), 1), 0.0 if self.free[step] else 1.0)
            with torch.set_grad_enabled(teach and bool(self.free[step])):
                *results, opened = self.module(*values, *forced.unbind(), *states)
                error = torch.zeros(())
                if teach and self.free[step]:
                    with torch.no_grad():
                        teacher = self.program.graph(*values)[0]
                    moved = (teacher - values[0]).square().mean().clamp_min(1e-12)
                    error = (results[0] - teacher).square().mean() / moved
            if self.free[step]:
                yield error, opened
            results = [each.detach() for each in results]
            states = results[len(results) - len(self.sites) :]
            slots.update(zip(("sample", "history"), results[: len(results) - len(self.sites)], strict=False))
        self.sample = slots["sample"]


def routed(
    graph: fx.GraphModule, sites: Sequence[Candidate], units: Sequence[str]
) -> tuple[fx.GraphModule, nn.ModuleList]:
    """(the mixed graph whose gates are the routers', the routers of the units in turn).

    Inputs after the graph's own: for each unit where its gate is held open, [B] or [1], then the states. Results: the
    graph's, the states, and what the routers say [units, B], which is how far a gate is open unless it is held.
    """
    order = {node.name: place for place, node in enumerate(graph.graph.nodes)}
    bases = {unit: [site.base or "" for site in sites if site.unit == unit] for unit in units}
    shapes = [rewrite.shape_of(rewrite.node_named(graph, bases[unit][0])) for unit in units]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        routers = nn.ModuleList(Router(int(shape[rewrite.channel_axis(len(shape))])) for shape in shapes)
    said: dict[str, fx.Node] = {}
    gates: dict[str, fx.Node] = {}

    def gate_of(module: fx.GraphModule, index: int, value: fx.Node, base: fx.Node | None) -> fx.Node:
        unit = sites[index].unit
        module.add_module("routers", routers)
        if unit not in gates:
            forced = rewrite.add_input(module, f"forced{len(gates)}", torch.zeros(1))
            last = max(bases[unit], key=order.__getitem__)
            with module.graph.inserting_after(rewrite.node_named(module, last)):
                inputs = tuple(rewrite.node_named(module, name) for name in bases[unit])
                said[unit] = module.graph.call_module(f"routers.{units.index(unit)}", inputs)
            with module.graph.inserting_after(said[unit]):
                gates[unit] = module.graph.call_function(torch.maximum, (said[unit], forced))
        with module.graph.inserting_after(gates[unit]):
            return module.graph.call_function(as_wide_as, (gates[unit], len(rewrite.shape_of(value))))

    module = mixed(graph, sites, delta=True, gate_of=gate_of)
    end = rewrite.output_node(module)
    with module.graph.inserting_before(end):
        stacked = module.graph.call_function(torch.stack, ([rewrite.node_named(module, said[u].name) for u in units],))
    end.args = ((*rewrite.output_values(module), stacked),)
    return fx.GraphModule(module, module.graph), routers


def as_wide_as(gate: Tensor, rank: int) -> Tensor:
    return gate.reshape(-1, *[1] * (rank - 1))
