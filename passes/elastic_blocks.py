"""Compute only some blocks in some steps, and some feed-forwards narrower, as trained routers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.calibrate import Calibration, snapshots
from ..compiler.errors import PassError, RecipeError
from ..compiler.plan import Plan, Site, left_out
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.recipe import options_of
from ..compiler.regions import all_blocks
from ..compiler.store import digest, fingerprint
from .elastic.deciding import opened_by_group, opened_by_share, widths_of
from .elastic.routers import OPENED, WIDTHS, ElasticBlock, budget_loss, part_ends, router_weights, with_routers
from .elastic.widths import write_parts
from .experts.feed_forward import FeedForward, find_feed_forwards
from .experts.grouping import importances
from .order import refuse_late
from .recovery.examples import Trajectories
from .recovery.losses import output_loss
from .recovery.network import Network
from .recovery.trainer import Settings, Trained, train

_TIMES = 4  # steps of the trajectory in each batch of training
_FASTER = 10.0  # times as fast for routers as for the network


@dataclass(frozen=True)
class ElasticBlocks:
    """Leave blocks out in some steps and compute feed-forwards narrower, as a router before each block says (Elastic
    DiT, 2602.13993), trained with the network on its own trajectories; then fixed in the plan.

    share: of the evaluations of blocks that are computed. width: of the hidden units in those, on average; one of
    `widths` prefixes, in the order of what the prediction would miss most. ranges: of steps that compute alike, each
    about as long: each needs engines of its own. group, keep: of each `group` blocks in a row `keep` neighbours are
    computed, in place of share (Mixture of Blocks, 2510.09094). tune: train the network too, or the routers alone.
    steps, batch, rate, seed: of the training, as for `recover`.

    Reconstructed: one target for all timesteps, where the release of Elastic DiT has left out its own; votes of the
    calibration's samples in place of a decision for each sample. Must run before cache_steps, quantize and
    fold_timestep, and after what changes weights.
    """

    name: ClassVar[str] = "elastic_blocks"

    share: float = 0.75
    width: float = 0.75
    widths: int = 4
    ranges: int = 3
    group: int = 0
    keep: int = 1
    tune: bool = True
    steps: int = 400
    batch: int = 16
    rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("share", "width"):
            if not 0.0 < getattr(self, option) <= 1.0:
                raise RecipeError(f"elastic_blocks: {option} is {getattr(self, option)}, needed more than 0, at most 1")
        for option, least in (("widths", 1), ("ranges", 1), ("group", 0), ("steps", 1), ("batch", 4), ("seed", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"elastic_blocks: {option} is {getattr(self, option)}, needed {least} or more")
        if self.group and not 1 <= self.keep <= self.group:
            raise RecipeError(f"elastic_blocks: keep is {self.keep} of {self.group} blocks, needed 1 to {self.group}")
        if self.rate <= 0:
            raise RecipeError(f"elastic_blocks: rate is {self.rate}, needed more than 0")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """For each block the steps that compute it and how wide, the order of hidden units, and trained weights."""
        refuse_late(program, self.name, "put elastic before it")
        blocks = self._blocks(program, calibration)
        network, trained = self._train(program, blocks, calibration)
        opened, wide = _votes(program, network, calibration)
        computed = (
            opened_by_group(opened, self.group, self.keep, self.ranges)
            if self.group
            else opened_by_share(opened, self.share, self.ranges)
        )
        widths = widths_of(wide, computed, self.ranges)
        choices = {
            "widths": {block.region.path: widths[:, index].tolist() for index, block in enumerate(blocks)},
            "loss": [list(point) for point in trained.curve],
            **({"stopped": trained.stopped} if trained.stopped is not None else {}),
        }
        routers = router_weights(trained.weights)
        tensors = {name: value for name, value in trained.weights.items() if name not in routers}
        tensors |= {f"{feed.path}.units": units.numpy() for block in blocks for feed, units in block.feeds}
        return Decision(choices, tensors)

    def _train(
        self, program: Program, blocks: Sequence[ElasticBlock], calibration: Calibration
    ) -> tuple[Network, Trained]:
        """The network with its routers, as they are after training."""
        graph = with_routers(program.graph, blocks, self.widths, self.seed)
        network = Network(program.with_graph(graph), (OPENED, WIDTHS))
        routers = router_weights(rewrite.weights(network.program.graph))
        network.unfreeze([*routers, *(Network(program).parameters() if self.tune else ())])
        examples = Trajectories(calibration.original, max(1, self.batch // _TIMES), self.steps * _TIMES, self.seed)
        share = self.keep / self.group if self.group else self.share

        def loss(step: int, done: float) -> Tensor:
            losses = []
            for each in range(_TIMES):
                example = examples.example(step * _TIMES + each, _TIMES)
                found, opened, wide = network(example.step, example.slots)
                losses.append(output_loss(found, example.expected) + budget_loss(opened, wide, share, self.width))
            return torch.stack(losses).mean()

        key = digest("elastic", fingerprint(program), fingerprint(calibration.original), options_of(self)) + "-training"
        settings = Settings(self.steps, self.rate, faster=tuple(routers), times=_FASTER)
        trained = train(network.weights, loss, settings, calibration.store, key, calibration.progress)
        with torch.no_grad():
            for name, value in trained.weights.items():
                network.weights[name].copy_(torch.from_numpy(value))
        return network, trained

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        refuse_late(program, self.name, "put elastic before it")
        blocks = self._blocks(program, None)
        everything = [self.widths] * program.steps
        widths: Mapping[str, Sequence[int]] = decision.choices.get("widths", {})  # a dry run has trained nothing
        graph = rewrite.clone(program.graph)
        tuned = [name for name in decision.tensors if not name.endswith(".units")]
        for name in tuned:
            rewrite.assign(graph, name, torch.nn.Parameter(torch.from_numpy(decision.tensors[name])))
        sites: list[Site] = []
        for block in blocks:
            own = widths.get(block.region.path, everything)
            for feed, units in block.feeds:
                order = decision.tensors.get(f"{feed.path}.units")
                sites += self._parts(graph, feed, units if order is None else torch.from_numpy(order), own)
            sites += _past(block, own)
        narrowed = any(0 < each < self.widths for own in widths.values() for each in own)
        if not (sites or tuned or narrowed):
            why = "every step computes every block whole"
            return PassResult(program, Record(self.name, refused=(("every block", why),)))
        made = rewrite.finish(graph)
        places = {node.name: place for place, node in enumerate(made.graph.nodes)}
        plan = Plan(program.steps, tuple(sorted(sites, key=lambda site: places[site.value])))
        count = program.steps * len(blocks)
        details = {
            "computed_share": round(sum(bool(each) for own in widths.values() for each in own) / max(count, 1), 4),
            **decision.choices,
        }
        refused: tuple[tuple[str, str], ...] = ()
        if "stopped" in decision.choices:
            why = f"the loss diverged at step {decision.choices['stopped']}; the weights before are kept: lower rate"
            refused = (("the rest of the training", why),)
        record = Record(self.name, changed=max(len(sites), 1), refused=refused, details=details)
        return PassResult(replace(program.with_graph(made), plan=plan), record)

    def _parts(self, graph: fx.GraphModule, feed: FeedForward, units: Tensor, widths: Sequence[int]) -> list[Site]:
        """The feed-forward in as many parts as its steps differ in, as sites."""
        used = sorted({each for each in widths if each})
        if not used or used == [self.widths]:
            return []
        ends = part_ends(feed.hidden, self.widths)
        totals = write_parts(graph, feed, units, [ends[each - 1] for each in used])
        label = feed.path.replace(".", "_")
        return [
            left_out(f"{label}_{each}", total.name, before.name, tuple(width >= each for width in widths))
            for each, before, total in zip(used[1:], totals, totals[1:], strict=False)
        ]

    def _blocks(self, program: Program, calibration: Calibration | None) -> list[ElasticBlock]:
        """Those that are not inside another; the order of hidden units is measured where there is a calibration."""
        regions = all_blocks(program.graph)
        inside = {name for region in regions for child in region.children for name in child.nodes}
        regions = tuple(region for region in regions if not set(region.nodes) <= inside)
        if not regions:
            raise PassError(
                "elastic_blocks: the network has no blocks that carry a residual stream; `dcompile inspect` shows its "
                "regions"
            )
        if self.group > len(regions):
            raise PassError(f"elastic_blocks: group is {self.group}, and the network has {len(regions)} blocks")
        feeds = find_feed_forwards(program.graph) if self.widths > 1 else ()
        scores: Sequence[NDArray[Any]] = [np.zeros(feed.hidden) for feed in feeds]
        if calibration is not None and feeds:
            scores = importances(program, feeds, calibration)
        ordered = [
            (feed, torch.from_numpy(np.argsort(-score, kind="stable")))
            for feed, score in zip(feeds, scores, strict=True)
        ]
        return [ElasticBlock(region, [pair for pair in ordered if pair[0].down in region.nodes]) for region in regions]


def _past(block: ElasticBlock, widths: Sequence[int]) -> list[Site]:
    """The block's streams as sites that go past it, where some step does not compute it."""
    mask = tuple(bool(each) for each in widths)
    if all(mask):
        return []
    label = block.region.path.replace(".", "_")
    names = (
        [label] if len(block.region.streams) == 1 else [f"{label}_stream{i}" for i in range(len(block.region.streams))]
    )
    return [
        left_out(name, stream.exit, stream.entry, mask)
        for name, stream in zip(names, block.region.streams, strict=True)
    ]


@torch.no_grad()
def _votes(
    program: Program, network: Network, calibration: Calibration
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the calibration's samples of what the routers say: [T, blocks], and of widths [T, blocks, W]."""
    inputs = list(rewrite.placeholders(program.graph))
    opened, wide = [], []
    for step, values in snapshots(program, calibration, program.steps):
        _, open_, width = network(step, dict(zip(inputs, values, strict=True)))
        opened.append(open_.mean(dim=1))
        wide.append(width.mean(dim=1))
    return torch.stack(opened).double().numpy(), torch.stack(wide).double().numpy()
