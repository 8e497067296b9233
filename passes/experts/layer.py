"""The layer that takes a feed-forward's place: a shared part for every token, and experts that choose theirs.

Each expert takes the tokens of a sample that score highest for it, as many as its capacity: shapes are static, every
expert is full, and what a sample becomes does not depend on those beside it. A token that no expert takes has the
shared part alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from .feed_forward import FeedForward, held, rows_of, write_inner
from .grouping import Split, capacity


def replace_feed_forward(
    module: fx.GraphModule, feed: FeedForward, split: Split, router: tuple[NDArray[Any], NDArray[Any]], active: int
) -> None:
    """Write the layer into the graph, in place of the feed-forward. active: experts a token has on average."""
    down = rewrite.node_named(module, feed.down)
    entry = rewrite.node_named(module, feed.entry)
    tokens, width = (int(size) for size in rewrite.shape_of(entry)[1:])
    each = capacity(tokens, split.experts, active)
    write = _Writer(module, feed, down)
    shared = write.shared(split)
    scores = write.linear(entry, "router", torch.from_numpy(router[0]), torch.from_numpy(router[1]))
    best = write.call(aten.topk.default, write.call(aten.transpose.int, scores, 1, 2), each)
    values, places = (write.call(operator.getitem, best, index) for index in (0, 1))
    gates = write.call(aten.mul.Tensor, write.call(aten.sigmoid.default, values), 2.0)
    flat = write.call(aten.reshape.default, places, [-1, split.experts * each, 1])
    index = write.call(aten.expand.default, flat, [-1, -1, width])
    chosen = write.call(aten.gather.default, entry, 1, index)
    added = write.experts(split, chosen, each, width)
    added = write.call(aten.mul.Tensor, added, write.call(aten.reshape.default, gates, [-1, split.experts * each, 1]))
    out = int(rewrite.shape_of(down)[-1])
    into = index if out == width else write.call(aten.expand.default, flat, [-1, -1, out])
    total = write.call(aten.scatter_add.default, shared, 1, into, added)
    down.replace_all_uses_with(total)


class _Writer:
    def __init__(self, module: fx.GraphModule, feed: FeedForward, before: fx.Node) -> None:
        self.module, self.feed, self.before = module, feed, before
        self.ups = [rewrite.node_named(module, name) for name in feed.ups]

    def call(self, target: Any, *args: Any) -> fx.Node:
        return rewrite.call(self.module, self.before, target, *args, like=self.before)

    def weight(self, name: str, value: Tensor) -> fx.Node:
        path = f"{self.feed.path}.{name}"
        rewrite.assign(self.module, path, torch.nn.Parameter(value.detach().clone().contiguous()))
        return rewrite.read_weight(self.module, path, self.before)

    def linear(self, x: fx.Node, name: str, weight: Tensor, bias: Tensor | None) -> fx.Node:
        last = () if bias is None else (self.weight(f"{name}.bias", bias),)
        return self.call(aten.linear.default, x, self.weight(f"{name}.weight", weight), *last)

    def shared(self, split: Split) -> fx.Node:
        units = torch.from_numpy(split.units[: split.shared])
        made = {}
        for up in self.ups:
            weight, bias = held(self.module, up)
            sliced = None if bias is None else rows_of(bias, units, self.feed.hidden)
            rows = rows_of(weight, units, self.feed.hidden)
            made[up.name] = self.linear(_input(up), f"shared.{up.name}", rows, sliced)
        hidden = write_inner(self.module, self.before, self.feed, made)
        weight, bias = held(self.module, self.before)
        return self.linear(hidden, "shared.down", weight[:, units], bias)

    def experts(self, split: Split, chosen: fx.Node, each: int, width: int) -> fx.Node:
        """[B, experts * each, D] -> the same of the layer out. each: tokens of an expert."""
        hidden, count = self.feed.hidden, split.experts
        parts = [torch.from_numpy(split.of_expert(index)) for index in range(count)]
        x = self.call(aten.reshape.default, chosen, [-1, count, each, width])
        x = self.call(aten.reshape.default, self.call(aten.transpose.int, x, 0, 1), [count, -1, width])
        made = {}
        for up in self.ups:
            weight, bias = held(self.module, up)
            stacked = torch.stack([rows_of(weight, units, hidden).T for units in parts])
            value = self.call(aten.bmm.default, x, self.weight(f"experts.{up.name}.weight", stacked))
            if bias is not None:
                offsets = torch.stack([rows_of(bias, units, hidden)[None] for units in parts])
                value = self.call(aten.add.Tensor, value, self.weight(f"experts.{up.name}.bias", offsets))
            made[up.name] = value
        inner = write_inner(self.module, self.before, self.feed, made)
        weight, _ = held(self.module, self.before)
        stacked = torch.stack([weight[:, units].T for units in parts])
        y = self.call(aten.bmm.default, inner, self.weight("experts.down.weight", stacked))
        out = len(weight)
        y = self.call(aten.transpose.int, self.call(aten.reshape.default, y, [count, -1, each, out]), 0, 1)
        return self.call(aten.reshape.default, y, [-1, count * each, out])


def _input(linear: fx.Node) -> fx.Node:
    (value, *_) = linear.args
    assert isinstance(value, fx.Node)
    return value
