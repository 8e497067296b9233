"""The nodes that decide at run time whether a step computes a predicate's sites, and what they remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from . import rewrite
from .plan import Predicate
from .rewrite import aten

# (name, slot, example) -> the graph input of this name, made unless it is there
NewInput = Callable[[str, str, fx.Node], fx.Node]


@dataclass(frozen=True)
class Change:
    """A site of the predicate as it is refreshed: its new state, and the graph input that has its old one."""

    new: fx.Node
    old: fx.Node


@dataclass(frozen=True)
class Deciding:
    """decision: float32 [1], to be compared with `below`; never more than `limit_of` the predicate.

    computing, reusing: slot -> node of what a step that computes the sites leaves behind, and one that reuses them.
    """

    decision: fx.Node
    computing: Mapping[str, fx.Node]
    reusing: Mapping[str, fx.Node]


def decision_slot(predicate: Predicate) -> str:
    return f"{predicate.name}.decision"


def limit_of(predicate: Predicate) -> float:
    """What stands for every larger score, and for one that is not a number."""
    return 2 * predicate.below + 1


def decide(
    module: fx.GraphModule, predicate: Predicate, find: Callable[[str], fx.Node], changes: tuple[Change, ...],
    before: fx.Node, new_input: NewInput,
) -> Deciding:  # fmt: skip
    """Add the nodes of a decision before `before`.

    find: node by name, as this graph means it. changes: of the predicate's sites, for a history.
    """
    build = _Builder(module, predicate, before, new_input)
    count = build.state("count", build.call(aten.full.default, [1], 0.0))
    since = build.call(aten.add.Scalar, count, 1.0)
    if predicate.rule == "history":
        score, computing, reusing = build.history(changes, since)
    else:
        assert predicate.indicator is not None
        indicator = find(predicate.indicator)
        if predicate.base is not None:
            indicator = build.call(aten.sub.Tensor, indicator, find(predicate.base))
        rule = build.compare if predicate.rule == "compare" else build.accumulate
        score, computing, reusing = rule(indicator)
    decision = build.call(aten.amax.default, score, [0], True)
    limit = limit_of(predicate)
    if predicate.longest or predicate.rule == "history":
        computing[build.slot("count")], reusing[build.slot("count")] = build.zeros(count), since
    if predicate.longest:
        over = build.call(aten.ge.Scalar, count, float(predicate.longest))
        decision = build.call(aten.where.self, over, build.full(decision, limit), decision)
    # Not a clamp: what is not a number must end up large, so that it is computed.
    within = build.call(aten.lt.Scalar, decision, limit)
    return Deciding(build.call(aten.where.self, within, decision, build.full(decision, limit)), computing, reusing)


_Scored = tuple[fx.Node, dict[str, fx.Node], dict[str, fx.Node]]


@dataclass(frozen=True)
class _Builder:
    module: fx.GraphModule
    predicate: Predicate
    before: fx.Node
    new_input: NewInput

    def call(self, target: object, *args: object) -> fx.Node:
        return rewrite.call(self.module, self.before, target, *args)

    def slot(self, kind: str) -> str:
        return f"{self.predicate.name}.state_{kind}"

    def state(self, kind: str, example: fx.Node) -> fx.Node:
        return self.new_input(f"{self.predicate.name}_{kind}", self.slot(kind), example)

    def full(self, like: fx.Node, value: float) -> fx.Node:
        return self.call(aten.full_like.default, like, value)

    def zeros(self, like: fx.Node) -> fx.Node:
        return self.full(like, 0.0)

    def compare(self, indicator: fx.Node) -> _Scored:
        score = self.relative(indicator, self.state("reference", indicator))
        return score, {self.slot("reference"): indicator}, {}

    def accumulate(self, indicator: fx.Node) -> _Scored:
        change = self.relative(indicator, self.state("reference", indicator))
        counted = self.full(change, self.predicate.polynomial[0])
        for coefficient in self.predicate.polynomial[1:]:
            counted = self.call(aten.add.Scalar, self.call(aten.mul.Tensor, counted, change), coefficient)
        if math.isfinite(self.predicate.fitted_to):
            known = self.call(aten.le.Scalar, change, self.predicate.fitted_to)
            counted = self.call(aten.where.self, known, counted, self.full(change, limit_of(self.predicate)))
        total = self.call(aten.add.Tensor, self.state("sum", counted), counted)
        kept = {self.slot("reference"): indicator}
        return total, {**kept, self.slot("sum"): self.zeros(total)}, {**kept, self.slot("sum"): total}

    def history(self, changes: tuple[Change, ...], since: fx.Node) -> _Scored:
        rates = [self.relative(change.new, change.old) for change in changes]
        rate = rates[0]
        for other in rates[1:]:
            rate = self.call(aten.maximum.default, rate, other)
        score = self.call(aten.mul.Tensor, self.state("rate", rate), since)
        return score, {self.slot("rate"): self.call(aten.div.Tensor, rate, since)}, {}

    def relative(self, value: fx.Node, reference: fx.Node) -> fx.Node:
        """[rows]: mean |value - reference| / mean |reference| of each row, the latter at least 1e-12."""
        moved = self.mean_size(self.call(aten.sub.Tensor, value, reference))
        size = self.call(aten.clamp_min.default, self.mean_size(reference), 1e-12)
        return self.call(aten.div.Tensor, moved, size)

    def mean_size(self, value: fx.Node) -> fx.Node:
        axes = list(range(1, len(rewrite.shape_of(value))))
        return self.call(aten.mean.dim, self.call(aten.abs.default, value), axes)
