"""Masks against the published step lists, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from dcompile.compiler.errors import PassError
from dcompile.compiler.plan import Mask, every
from dcompile.passes.caching import replay, schedules


def steps(mask: Mask) -> list[int]:
    return [step for step, computes in enumerate(mask) if computes]


def test_interval_is_that_of_taylorseer() -> None:
    """Official DiT code, 50 steps, interval 4, first_enhance 2, counted down: 49, 48, 44, 40, ..., 4, 0."""
    computed = steps(every(4, 50, warmup=2))
    assert [49 - step for step in computed] == [49, 48, *range(44, -1, -4)]
    assert steps(every(4, 10, warmup=2, last=2)) == [0, 1, 5, 8, 9]
    assert steps(every(2, 6)) == [0, 2, 4]  # DeepCache's: i % N == 0


def test_fora_counts_from_the_last_step() -> None:
    """Official code: step s, counted down from T - 1, computes if it is T - 1 or s % N == 0."""
    for total, gap in ((10, 2), (10, 3), (10, 4), (250, 3)):
        official = [s == total - 1 or s % gap == 0 for s in range(total - 1, -1, -1)]
        assert schedules.interval_to_the_end(total, gap) == tuple(official)


@pytest.mark.parametrize(
    ("center", "power", "published"),
    [(15, 1.4, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]), (10, 1.2, [0, 5, 9, 12, 16, 21, 26, 32, 38, 43])],
)
def test_quadratic_is_deepcaches_non_uniform(center: float, power: float, published: list[int]) -> None:
    assert steps(schedules.quadratic(50, 10, center, power)) == published


def test_intervals_within_a_budget() -> None:
    found = schedules.intervals_within((True, *[False] * 29), 10)
    assert found[0] == (True, *[False] * 29)  # something meets every budget
    assert every(3, 30) in found
    assert every(5, 30, warmup=6) in found
    assert all(sum(row) <= 10 and row[0] for row in found)
    assert len(found) == 11  # a row for each warm-up that fits, one alone
    pairs = tuple(step % 2 == 0 for step in range(30))
    assert all(row[step] for row in schedules.intervals_within(pairs, 20) for step in range(0, 30, 2))


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PassError, match=r"no non-uniform schedule has 6 of 6 steps around step 2"):
        schedules.quadratic(6, 6, 2, 1.4)
    with pytest.raises(PassError, match=r"keys leaves step 0 out, which has nothing to reuse; begin with 0"):
        schedules.at(6, (1, 3), "keys")
    with pytest.raises(PassError, match=r"keys has step 6, the sampler has 0 to 5; give others"):
        schedules.at(6, (0, 6), "keys")


def test_hold_compares_with_what_is_held() -> None:
    position = np.array([0, 1, 2, 3, 10, 11, 12], float)
    distance = abs(position[:, None] - position[None])
    assert steps(replay.hold(distance, 2.5)) == [0, 3, 4]
    assert steps(replay.hold(distance, 2.5, warmup=2, last=1)) == [0, 1, 4, 6]
    assert steps(replay.hold(distance, 0.0)) == list(range(7))


def test_a_history_goes_by_the_change_before_the_last_computed_step() -> None:
    position = np.array([0, 1, 2, 3, 4, 5, 6, 7], float)  # a change of 1 a step, which a step expects to go on
    distance = abs(position[:, None] - position[None])
    assert steps(replay.history(distance, 2.5)) == [0, 1, 4, 7]
    assert steps(replay.history(distance, 2.5, longest=1)) == [0, 1, 3, 5, 7]
    assert steps(replay.history(distance, 9.0, warmup=3, last=2)) == [0, 1, 2, 6, 7]
    assert steps(replay.history(distance, 0.0)) == list(range(8))
