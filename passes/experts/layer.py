"""The layer that takes a feed-forward's place: a shared part for every token, and experts that choose theirs.

Each expert takes the tokens of a sample that score highest for it, as many as its capacity: shapes are static, every
expert is full, and what a sample becomes does not depend on those beside it. A token that no expert takes has the
shared part alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ...kernels import ADD_TOKENS, TAKE_TOKENS
from .feed_forward import FeedForward, held, rows_of, write_inner, write_units
from .grouping import Router, Split, capacity


def replace_feed_forward(module: fx.GraphModule, feed: FeedForward, split: Split, router: Router, active: int) -> None:
    """Write the layer into the graph, in place of the feed-forward. active: experts a token has on average."""
    down = rewrite.node_named(module, feed.down)
    entry = rewrite.node_named(module, feed.entry)
    tokens = int(rewrite.shape_of(entry)[1])
    each = capacity(tokens, split.experts, active)
    write = _Writer(module, feed, down)
    shared = write_units(module, feed, "shared", torch.from_numpy(split.units[: split.shared]), with_bias=True)
    scores = write.call(aten.linear.default, entry, write.weight("router.weight", torch.from_numpy(router.weight)))
    best = write.call(aten.topk.default, scores, each, 1, True, False)  # [B, C, experts], in any order
    places = write.call(aten.transpose.int, write.call(operator.getitem, best, 1), 1, 2)
    chosen = write.call(TAKE_TOKENS, entry, places)
    made = write.experts(split, chosen, write.gates(write.call(operator.getitem, best, 0), router))
    total = write.call(ADD_TOKENS, shared, places, made)
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

    def gates(self, scores: fx.Node, router: Router) -> fx.Node:
        """[B, C, experts] -> [experts, B * C, 1]. The bias is added here: it does not change which token
        scores highest for an expert."""
        scores = self.call(aten.add.Tensor, scores, self.weight("router.bias", torch.from_numpy(router.bias)))
        gates = self.call(aten.mul.Tensor, self.call(aten.sigmoid.default, scores), 2.0)
        turned = self.call(aten.permute.default, gates, [2, 0, 1])
        return self.call(aten.reshape.default, turned, [len(router.bias), -1, 1])

    def experts(self, split: Split, x: fx.Node, gates: fx.Node) -> fx.Node:
        """[experts, B * C, D] -> the same of the layer out, times the gates."""
        hidden = self.feed.hidden
        parts = [torch.from_numpy(split.of_expert(index)) for index in range(split.experts)]
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
        inner = self.call(aten.mul.Tensor, inner, gates)  # hidden units are fewer than features
        weight, _ = held(self.module, self.before)
        stacked = torch.stack([weight[:, units].T for units in parts])
        return self.call(aten.bmm.default, inner, self.weight("experts.down.weight", stacked))
