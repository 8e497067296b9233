"""Dynamic programs against brute force, and the catalogue's golden values."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from dcompile.compiler.errors import PassError
from dcompile.passes.caching.segmentation import bubbling_union, knapsack, leader_first

FEATURE = (np.arange(12) / 10) ** 2
DISTANCE = abs(FEATURE[:, None] - FEATURE[None])


@pytest.mark.parametrize(
    ("arguments", "leaders", "cost"),
    [
        ((3,), (0, 6, 9), 1.55),
        ((4,), (0, 5, 8, 10), 1.03),
        ((4, 2, 4), (0, 4, 7, 10), 1.11),
        ((3, 2, 5), (0, 5, 9), 1.63),
    ],
)
def test_golden_segments(arguments: tuple[int, ...], leaders: tuple[int, ...], cost: float) -> None:
    found, least = leader_first(DISTANCE, *arguments)
    assert found == leaders
    assert least == pytest.approx(cost)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_those_of_brute_force(seed: int) -> None:
    distance = np.random.default_rng(seed).random((9, 9))

    def cost(leaders: tuple[int, ...]) -> float:
        ends = (*leaders[1:], 9)
        return sum(float(distance[a, m]) for a, b in zip(leaders, ends, strict=True) for m in range(a, b))

    for count in (1, 3, 5):
        leaders, least = leader_first(distance, count)
        assert leaders == min(((0, *rest) for rest in combinations(range(1, 9), count - 1)), key=cost)
        assert least == pytest.approx(cost(leaders))


def test_segments_that_do_not_fit() -> None:
    with pytest.raises(PassError, match=r"12 steps cannot be cut into 2 segments of 1 to 5; change the budget"):
        leader_first(DISTANCE, 2, 1, 5)


def test_knapsack() -> None:
    costs = np.array(
        [[(1 - s / 4) * (item + 1) * (1 if item % 2 else 0.5) + 0.1 * (s < 4) for s in range(5)] for item in range(4)]
    )
    for budget, expected, least in ((8, (0, 4, 0, 4), 2.2), (6, (0, 2, 0, 4), 3.3)):
        levels, cost = knapsack(costs, budget)
        assert levels == expected
        assert cost == pytest.approx(least)
    random = np.random.default_rng(0).random((4, 3))
    choices = [levels for levels in product(range(3), repeat=4) if sum(levels) <= 4]
    best = min(sum(random[i, level] for i, level in enumerate(levels)) for levels in choices)
    levels, cost = knapsack(random, 4)
    assert cost == pytest.approx(best) == sum(random[i, level] for i, level in enumerate(levels))
    assert sum(levels) <= 4


def test_bubbling_union_adds_the_worst_sites_steps_to_feed_forwards_after_them() -> None:
    computed = [(0, 1), (0, 2), (0, 3), (0, 4)]  # attention and feed-forward of two layers
    layers, feeds = [0, 0, 1, 1], [False, True, False, True]
    assert bubbling_union(computed, layers, feeds, [0.1, 0.2, 0.9, 0.3], 1) == [(0, 1), (0, 2), (0, 3), (0, 3, 4)]
    assert bubbling_union(computed, layers, feeds, [0.9, 0.2, 0.1, 0.3], 1) == [(0, 1), (0, 1, 2), (0, 3), (0, 1, 4)]
    assert bubbling_union(computed, layers, feeds, [1, 1, 1, 1], 0) == computed
