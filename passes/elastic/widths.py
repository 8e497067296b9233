"""A feed-forward of which a step may compute the first hidden units only: a sum of parts, one added after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ..experts.feed_forward import FeedForward, held, rows_of, write_inner


def write_parts(module: fx.GraphModule, feed: FeedForward, units: Tensor, ends: Sequence[int]) -> list[fx.Node]:
    """Put the sum in the feed-forward's place; -> the sum after each part.

    units: int64 [hidden], the order in which hidden units count. ends: of each part, how many of them are behind it;
    units after the last end are dropped.
    """
    down = rewrite.node_named(module, feed.down)
    last, bias = held(module, down)
    totals: list[fx.Node] = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = units[start:end]
        made = {}
        for name in feed.ups:
            up = rewrite.node_named(module, name)
            weight, offset = held(module, up)
            sliced = None if offset is None else rows_of(offset, own, feed.hidden)
            made[name] = _linear(
                module, feed, f"part{number}.{name}", up.args[0], rows_of(weight, own, feed.hidden), sliced
            )
        hidden = write_inner(module, down, feed, made)
        part = _linear(module, feed, f"part{number}.down", hidden, last[:, own], bias if number == 0 else None)
        total = rewrite.call(module, down, aten.add.Tensor, totals[-1], part, like=down) if totals else part
        totals.append(total)
    down.replace_all_uses_with(totals[-1])
    return totals


def _linear(
    module: fx.GraphModule, feed: FeedForward, name: str, x: object, weight: Tensor, bias: Tensor | None
) -> fx.Node:
    down = rewrite.node_named(module, feed.down)
    read = []
    for kind, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            path = f"{feed.path}.{name}.{kind}"
            rewrite.assign(module, path, torch.nn.Parameter(value.detach().clone().contiguous()))
            read.append(rewrite.read_weight(module, path, down))
    return rewrite.call(module, down, aten.linear.default, x, *read, like=down)
