"""Restructure feed-forwards into a shared part and experts, of which each token has a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..compiler import rewrite
from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError, RecipeError
from ..compiler.program import Decision, PassResult, Program, Record
from .experts.feed_forward import FeedForward, find_feed_forwards
from .experts.grouping import Router, Split, deal, fit_routers, importances
from .experts.layer import replace_feed_forward
from .order import refuse_late


@dataclass(frozen=True)
class MixtureOfExperts:
    """Split each feed-forward (linear, activation, linear; gated forms too) into a shared part and `experts`, of which
    a token has `active` on average (Dense2MoE, 2510.09094).

    shared: part of the hidden units that every token has, 0 to 1: those that the prediction would miss most. The others
    are dealt to the experts. With the defaults 0.375 of the hidden units are active.
    Every expert takes the tokens of a sample that score highest for it, so that all are full and shapes are static.
    Routers begin as least squares has it on calibration runs; a `recover` pass after this one trains them with all
    else. Reconstructed: experts choose tokens, in training as in the engine, so no loss balances them; one training for
    three.

    Left alone: feed-forwards whose hidden units cannot be dealt evenly. Must run before cache_steps, quantize and
    fold_timestep.
    """

    name: ClassVar[str] = "mixture_of_experts"

    experts: int = 12
    active: int = 2
    shared: float = 0.25

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise RecipeError(f"mixture_of_experts: experts is {self.experts}, needed 1 or more")
        if not 1 <= self.active <= self.experts:
            raise RecipeError(f"mixture_of_experts: active is {self.active}, needed 1 to {self.experts} (experts)")
        if not 0.0 < self.shared < 1.0:
            raise RecipeError(f"mixture_of_experts: shared is {self.shared}, needed more than 0 and less than 1")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        """The order of each feed-forward's hidden units, and its router."""
        feeds = [feed for feed in self._found(program) if self._size(feed)]
        if not feeds:
            return Decision()
        scores = importances(program, feeds, calibration)
        splits = [deal(score, self._shared(feed), self.experts) for score, feed in zip(scores, feeds, strict=True)]
        routers = fit_routers(program, feeds, splits, self.active, calibration)
        tensors: dict[str, Any] = {}
        for feed, split, router in zip(feeds, splits, routers, strict=True):
            parts = {"units": split.units, "router": router.weight, "bias": router.bias}
            tensors |= {f"{feed.path}.{name}": part for name, part in parts.items()}
        kept = [
            float(score[split.units[: split.shared]].sum() / score.sum())
            for score, split in zip(scores, splits, strict=True)
        ]
        taken = {
            feed.path: [round(part, 4) for part in router.taken] for feed, router in zip(feeds, routers, strict=True)
        }
        choices = {"importance_shared": [round(each, 4) for each in kept], "tokens_by_experts_taken": taken}
        return Decision(choices, tensors)

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        graph = rewrite.clone(program.graph)
        feeds = self._found(program)
        refused = []
        done = []
        for feed in feeds:
            if not self._size(feed):
                rest = feed.hidden - self._shared(feed)
                why = f"{rest} of {feed.hidden} hidden units cannot be dealt to {self.experts} experts"
                refused.append((feed.path, why))
                continue
            shared = self._shared(feed)
            units = decision.tensors.get(f"{feed.path}.units", np.arange(feed.hidden))  # a dry run has measured nothing
            width = int(rewrite.shape_of(rewrite.node_named(graph, feed.entry))[-1])
            router = Router(
                decision.tensors.get(f"{feed.path}.router", np.zeros((self.experts, width), np.float32)),
                decision.tensors.get(f"{feed.path}.bias", np.zeros(self.experts, np.float32)),
            )
            replace_feed_forward(graph, feed, Split(units, shared, self.experts), router, self.active)
            done.append(feed.path)
        details = {"feed_forwards": done, **decision.choices}
        record = Record(self.name, changed=len(done), refused=tuple(refused), details=details)
        return PassResult(program.with_graph(rewrite.finish(graph)) if done else program, record)

    def _found(self, program: Program) -> tuple[FeedForward, ...]:
        refuse_late(program, self.name, "put moe before it")
        feeds = find_feed_forwards(program.graph)
        if not feeds:
            raise PassError(
                "mixture_of_experts: found no feed-forward (linear, activation, linear) on tokens; `dcompile inspect` "
                "shows the regions"
            )
        return feeds

    def _shared(self, feed: FeedForward) -> int:
        return round(self.shared * feed.hidden)

    def _size(self, feed: FeedForward) -> int:
        """Hidden units of an expert; 0 where they cannot be dealt evenly."""
        size, left = divmod(feed.hidden - self._shared(feed), self.experts)
        return 0 if left else size
