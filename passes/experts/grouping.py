"""Which hidden units go together: the ones that matter most are shared, the others dealt to experts (Dense2MoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.calibrate import Calibration, inputs_for, spread
from ...compiler.execute import run
from ...compiler.program import Program
from ...compiler.rewrite import aten
from ..recovery.network import prediction
from .feed_forward import FeedForward, run_units

STEPS, DRAWS = 10, 4  # steps of the trajectory that are looked at; directions of the prediction at each
_UNITS = "neuron_gates"


@dataclass(frozen=True)
class Split:
    """units: int64 [hidden], the shared ones first, then those of each expert in turn."""

    units: NDArray[np.int64]
    shared: int
    experts: int

    @property
    def size(self) -> int:
        """Hidden units of an expert."""
        return (len(self.units) - self.shared) // self.experts

    def of_expert(self, index: int) -> NDArray[np.int64]:
        start = self.shared + index * self.size
        return self.units[start : start + self.size]


def deal(importance: NDArray[np.float64], shared: int, experts: int) -> Split:
    """The most important `shared` units, and the rest dealt in turn, so that experts are worth about the same.

    importance: [hidden]; hidden - shared must be a multiple of experts.
    """
    order = np.argsort(-importance, kind="stable").astype(np.int64)
    rest = order[shared:].reshape(-1, experts).T.reshape(-1)
    return Split(np.concatenate([order[:shared], rest]), shared, experts)


def importances(program: Program, feeds: Sequence[FeedForward], calibration: Calibration) -> list[NDArray[np.float64]]:
    """For each feed-forward, float64 [hidden]: how far the prediction would move, to first order, without each unit.

    The mean square of d(v . prediction) / d(gate of the unit), over steps of the trajectory and random directions v:
    the squared sum of gradient times weight over the unit's weights out. Dense2MoE takes the gradient of its training
    loss, which is 0 for a teacher that is its own reference.
    """
    graph = rewrite.clone(program.graph)
    rewrite.output_node(graph).args = ((prediction(graph),),)
    gates: list[Tensor] = []
    for index, feed in enumerate(feeds):
        down = rewrite.node_named(graph, feed.down)
        path = f"{_UNITS}.{index}"
        gates.append(torch.ones(feed.hidden, requires_grad=True))
        rewrite.assign(graph, path, gates[-1])
        hidden = down.args[0]
        gate = rewrite.read_weight(graph, path, down)
        down.update_arg(0, rewrite.call(graph, down, aten.mul.Tensor, hidden, gate))
    module = rewrite.finish(graph)
    totals = [np.zeros(feed.hidden) for feed in feeds]
    wanted = spread(program.steps, STEPS)
    generator = torch.Generator().manual_seed(0)
    given = inputs_for(program, program.graph, len(calibration.seeds))

    def look(step: int, mask: object, inputs: list[Tensor]) -> None:
        if step not in wanted:
            return
        with torch.enable_grad():
            for _ in range(DRAWS):
                (found,) = module(*given(inputs))
                toward = torch.randn(found.shape, generator=generator)
                slopes = torch.autograd.grad((found * toward).sum(), gates)
                for total, slope in zip(totals, slopes, strict=True):
                    total += slope.double().square().numpy()
        calibration.progress((step + 1) / program.steps, "measuring what hidden units matter")

    run(program, calibration.conditions, calibration.seeds, on_inputs=look)
    return totals


@dataclass(frozen=True)
class Router:
    """A layer that scores experts for a token. weight: float32 [experts, D]. bias: [experts].

    taken: float [experts + 1], the part of the tokens that so many experts take, on the runs it was fitted to.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    taken: tuple[float, ...] = ()


def fit_routers(
    program: Program, feeds: Sequence[FeedForward], splits: Sequence[Split], active: int, calibration: Calibration
) -> list[Router]:
    """For each feed-forward a router that says how much each expert adds to a token: least squares on the sizes of
    their outputs, to a mean of 0 and a deviation of 0.1 over tokens."""
    entries = {feed.entry: feed for feed in feeds}
    tokens: dict[str, list[Tensor]] = {feed.path: [] for feed in feeds}
    wanted = spread(program.steps, STEPS)

    def tap(step: int, name: str, value: Tensor) -> None:
        if step in wanted:
            tokens[entries[name].path].append(value)

    calibration.observe(program, list(entries), tap, "recording what routers will see")
    found = []
    for feed, split in zip(feeds, splits, strict=True):
        x = torch.cat(tokens.pop(feed.path))  # [samples, N, D]
        weight, bias = _fit(_sizes(program.graph, feed, split, x.flatten(0, 1)), x.flatten(0, 1))
        scores = torch.nn.functional.linear(x, torch.from_numpy(weight), torch.from_numpy(bias))
        found.append(Router(weight, bias, taken_by(scores, active)))
    return found


def capacity(tokens: int, experts: int, active: int) -> int:
    """Tokens of a sample that each expert takes, so that a token has `active` of them on average."""
    return min(tokens, -(-tokens * active // experts))


def taken_by(scores: Tensor, active: int) -> tuple[float, ...]:
    """The part of the tokens that 0, 1, ... experts take. scores: [samples, N, experts]."""
    _, tokens, experts = scores.shape
    places = scores.transpose(1, 2).topk(capacity(tokens, experts, active)).indices
    taken = torch.zeros(scores.shape[0], tokens).scatter_add(1, places.flatten(1), torch.ones(places.flatten(1).shape))
    return tuple(float((taken == count).float().mean()) for count in range(experts + 1))


def _sizes(graph: fx.GraphModule, feed: FeedForward, split: Split, x: Tensor) -> Tensor:
    """[tokens, experts]: norm of what each expert adds to each token."""
    found = [run_units(graph, feed, torch.from_numpy(split.of_expert(i)), x).norm(dim=-1) for i in range(split.experts)]
    return torch.stack(found, dim=1)


def _fit(sizes: Tensor, x: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    inputs, targets = x.double(), sizes.double()
    targets = (targets - targets.mean(0)) / targets.std(0).clamp_min(1e-12)
    middle = inputs.mean(0)
    centred = inputs - middle
    square = centred.T @ centred
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    weight = torch.linalg.solve(square + ridge, centred.T @ targets)
    scale = 0.1 / (centred @ weight).std(0).clamp_min(1e-12)
    weight = weight * scale
    return weight.T.float().numpy().copy(), (-(middle @ weight)).float().numpy().copy()
