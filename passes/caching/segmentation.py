"""Dynamic programs over steps: cut them into segments whose first step is computed; spend a budget by levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...compiler.errors import PassError


def leader_first(
    distance: NDArray[np.floating], segments: int, least: int = 1, most: int | None = None
) -> tuple[tuple[int, ...], float]:
    """(the first step of each segment, summed distance of all steps to theirs), the smallest that there is.

    distance: [T, T], entry (i, m) of reusing in step m what step i computed. least, most: steps of a segment.
    Of DDT (2504.05741), CacheQuant (2503.01323) and BAC (2506.13456). Raises PassError where no cut fits.
    """
    steps = len(distance)
    most = steps if most is None else most
    reach = np.concatenate([np.zeros((steps, 1)), np.cumsum(np.triu(distance), axis=1)], axis=1)  # [i, j]: of i..j-1
    best = np.full((segments + 1, steps + 1), np.inf)
    best[0, 0] = 0.0
    came_from = np.zeros((segments + 1, steps + 1), int)
    for count in range(1, segments + 1):
        for end in range(1, steps + 1):
            for start in range(max(0, end - most), end - least + 1):
                cost = best[count - 1, start] + reach[start, end]
                if cost < best[count, end]:
                    best[count, end], came_from[count, end] = cost, start
    if not np.isfinite(best[segments, steps]):
        raise PassError(f"{steps} steps cannot be cut into {segments} segments of {least} to {most}; change the budget")
    leaders, end = [], steps
    for count in range(segments, 0, -1):
        end = int(came_from[count, end])
        leaders.append(end)
    return tuple(reversed(leaders)), float(best[segments, steps])


def knapsack(costs: NDArray[np.floating], budget: int) -> tuple[tuple[int, ...], float]:
    """(the level of each item, summed cost), the smallest with levels that sum to at most `budget`.

    costs: [items, levels]; level s spends s. Of DiffSparse (2604.03674), which allocates tokens to layers with it.
    """
    items, levels = costs.shape
    best = np.full((items + 1, budget + 1), np.inf)
    best[0] = 0.0
    chosen = np.zeros((items + 1, budget + 1), int)
    for item in range(items):
        for left in range(budget + 1):
            for level in range(min(levels - 1, left) + 1):
                cost = best[item, left - level] + costs[item, level]
                if cost < best[item + 1, left]:
                    best[item + 1, left], chosen[item + 1, left] = cost, level
    found, left = [], budget
    for item in range(items, 0, -1):
        found.append(int(chosen[item, left]))
        left -= found[-1]
    return tuple(reversed(found)), float(best[items, budget])


def bubbling_union(
    computed: Sequence[tuple[int, ...]],
    layers: Sequence[int],
    feeds: Sequence[bool],
    errors: Sequence[float],
    count: int,
) -> list[tuple[int, ...]]:
    """Steps of each site, with those of the `count` worst sites added to the feed-forwards of their layer and deeper.

    computed: per site, its steps. layers: the layer that each is in. feeds: whether it is a feed-forward. errors: of
    caching it. BAC's union (2506.13456): an error of a feed-forward grows on its way through the layers after it.
    """
    found = [set(steps) for steps in computed]
    worst = sorted(range(len(computed)), key=lambda site: -errors[site])[:count]
    for source in worst:
        for site, layer in enumerate(layers):
            if feeds[site] and layer >= layers[source]:
                found[site] |= set(computed[source])
    return [tuple(sorted(steps)) for steps in found]
