"""From what routers say on calibration runs to a plan: which blocks each range of steps computes, and how wide."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Opened = NDArray[np.bool_]  # [T, blocks]


def ranges_of(steps: int, count: int) -> list[range]:
    """At most `count` ranges of about as many steps."""
    ends = [round(steps * number / count) for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(ends) if end > start]


def by_range(said: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """[T, ...] as the mean of each range of steps, at each of its steps."""
    meant = said.copy()
    for own in ranges_of(len(said), count):
        meant[own] = said[own].mean(axis=0)
    return meant


def opened_by_share(chances: NDArray[np.float64], share: float, count: int) -> Opened:
    """The likeliest blocks of all ranges of steps, `share` of all evaluations at most, and one of each range at least.

    chances: [T, blocks], of being computed.
    """
    meant = by_range(chances, count)
    opened = np.zeros(chances.shape, bool)
    ranges = ranges_of(len(chances), count)
    for own in ranges:
        opened[own, int(meant[own[0]].argmax())] = True
    budget = share * chances.size
    places = [(meant[own[0], block], own, block) for own in ranges for block in range(chances.shape[1])]
    for _, own, block in sorted(places, key=lambda place: -place[0]):
        if not opened[own[0], block] and opened.sum() + len(own) <= budget + 1e-9:
            opened[own, block] = True
    return opened


def opened_by_group(chances: NDArray[np.float64], group: int, keep: int, count: int) -> Opened:
    """Of each `group` blocks in a row the `keep` neighbours that are likeliest together (Mixture of Blocks).

    Blocks that are left over after the last whole group are computed.
    """
    meant = by_range(chances, count)
    opened = np.ones(chances.shape, bool)
    for first in range(0, chances.shape[1] - group + 1, group):
        own = meant[:, first : first + group]
        sums = np.stack([own[:, at : at + keep].sum(axis=1) for at in range(group - keep + 1)], axis=1)
        start = sums.argmax(axis=1)[:, None]
        place = np.arange(group)[None]
        opened[:, first : first + group] = (place >= start) & (place < start + keep)
    return opened


def widths_of(chances: NDArray[np.float64], opened: Opened, count: int) -> NDArray[np.int64]:
    """[T, blocks]: the likeliest width of each range of steps, 1 to W; 0 where the block is not computed.

    chances: [T, blocks, W].
    """
    return np.where(opened, by_range(chances, count).argmax(axis=-1) + 1, 0)
