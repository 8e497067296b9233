"""A feed-forward of which a step may compute the first hidden units only: a sum of parts, one added after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.rewrite import aten
from ..experts.feed_forward import FeedForward, write_units


def write_parts(module: fx.GraphModule, feed: FeedForward, units: Tensor, ends: Sequence[int]) -> list[fx.Node]:
    """Put the sum in the feed-forward's place; -> the sum after each part.

    units: int64 [hidden], the order in which hidden units count. ends: of each part, how many of them are behind it;
    units after the last end are dropped.
    """
    down = rewrite.node_named(module, feed.down)
    totals: list[fx.Node] = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = write_units(module, feed, f"part{number}", units[start:end], with_bias=number == 0)
        total = rewrite.call(module, down, aten.add.Tensor, totals[-1], part, like=down) if totals else part
        totals.append(total)
    down.replace_all_uses_with(totals[-1])
    return totals
