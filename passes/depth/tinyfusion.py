"""Which blocks to keep, learned: a distribution over the ways of keeping some of each group (TinyFusion, 2412.01199).

Blocks in a row form groups, and of each group as many are kept. Logits say how likely each way of it is; every sample
of a batch draws its own, and gradients reach the logits through the draw (straight-through Gumbel-softmax). Low-rank
updates of all layers are trained at the same time, so that a way is judged as if it had been recovered; they are then
thrown away. Reconstructed: what is matched is the whole network's prediction on its own trajectories, for want of the
training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...compiler.calibrate import Calibration
from ...compiler.program import Program
from ...compiler.regions import Region
from ...compiler.store import digest, fingerprint
from ..recovery.examples import Trajectories
from ..recovery.losses import output_loss
from ..recovery.network import Network
from ..recovery.trainer import Settings, train
from .supernet import gated, masks, with_updates

SHARPNESS, BEGIN = 100.0, 0.02  # of the logits: what they are multiplied with, where they begin
WARM, COLD = 4.0, 0.1  # temperature of the draw, falling linearly
RATE, FASTER = 1e-4, 10.0  # of the updates; times as fast for the logits
TIMES = 4  # steps of the trajectory in each batch
_LOGITS = "tinyfusion_logits"


@dataclass(frozen=True)
class Search:
    """kept: places of the blocks that stay. likely: for each group, how likely the way is that was chosen."""

    kept: tuple[int, ...]
    likely: tuple[float, ...]
    curve: Sequence[tuple[int, float]]


def search_depth(
    program: Program, blocks: Sequence[Region], keep: int, of: int, calibration: Calibration, steps: int, batch: int,
    seed: int = 0,
) -> Search:  # fmt: skip
    """Keep `keep` blocks of each `of` in a row. The number of blocks must be a multiple of `of`."""
    ways, groups = masks(keep, of), len(blocks) // of
    graph, updates = with_updates(gated(program.graph, blocks), seed)
    network = Network(program.with_graph(graph))
    network.unfreeze(updates)
    logits = {f"{_LOGITS}.{group}": torch.full((len(ways),), BEGIN, requires_grad=True) for group in range(groups)}
    examples = Trajectories(calibration.original, max(1, batch // TIMES), steps * TIMES, seed)
    halves = 1 if program.contract.guidance == 1.0 else 2

    def loss(step: int, done: float) -> Tensor:
        losses = []
        for each in range(TIMES):
            example = examples.example(step * TIMES + each, TIMES)
            drawn = draw(list(logits.values()), ways, examples.batch, done, [seed, step * TIMES + each])
            gates = {f"gate{index}": gate.repeat(halves) for index, gate in enumerate(drawn.unbind(1))}
            losses.append(output_loss(network(example.step, {**example.slots, **gates})[0], example.expected))
        return torch.stack(losses).mean()

    settings = Settings(steps, RATE, faster=tuple(logits), times=FASTER)
    key = digest("tinyfusion", fingerprint(program), fingerprint(calibration.original), keep, of, steps, batch, seed)
    leaves = {**network.weights, **logits}
    trained = train(leaves, loss, settings, calibration.store, f"{key}-training", calibration.progress)
    kept: list[int] = []
    likely = []
    for group, name in enumerate(logits):
        chances = functional.softmax(SHARPNESS * torch.from_numpy(trained.weights[name]), 0)
        best = int(chances.argmax())
        kept += [group * of + place for place in range(of) if ways[best, place]]
        likely.append(float(chances[best]))
    return Search(tuple(kept), tuple(likely), trained.curve)


def draw(logits: Sequence[Tensor], ways: Tensor, count: int, done: float, seed: Sequence[int]) -> Tensor:
    """[count, blocks] of 0 and 1: for each sample and group a way of its own; its gradient is that of the soft draw."""
    temperature = WARM + (COLD - WARM) * done
    random = np.random.default_rng(seed)
    found = []
    for each in logits:
        noise = torch.from_numpy(random.gumbel(size=(count, len(ways))).astype(np.float32))
        soft = functional.softmax((SHARPNESS * each + noise) / temperature, dim=-1)
        hard = functional.one_hot(soft.argmax(-1), len(ways)).to(soft.dtype)
        found.append((hard - soft.detach() + soft) @ ways)
    return torch.cat(found, dim=1)
