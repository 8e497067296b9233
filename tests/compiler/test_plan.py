"""Which steps are computed, and what the Taylor coefficients predict on sequences whose answer is known."""

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from dcompile.compiler.errors import PassError
from dcompile.compiler.plan import Plan, Site, every, taylor


def computed_steps(mask: tuple[bool, ...]) -> list[int]:
    return [step for step, computed in enumerate(mask) if computed]


def site(computed: tuple[bool, ...], name: str = "middle", order: int = 0) -> Site:
    reuse, refresh = taylor(computed, order)
    return Site(name, "value", None, computed, reuse, refresh)


def predicted(values: np.ndarray, computed: tuple[bool, ...], order: int) -> np.ndarray:
    """What a plan makes of a sequence of scalars: the rule of the module, written out."""
    reuse, refresh = taylor(computed, order)
    states, made = np.zeros(order + 1), []
    for step, full in enumerate(computed):
        if full:
            new = [values[step]]
            for k in range(order):
                new.append((new[k] - states[k]) * refresh[step, k])
            states = np.array(new)
            made.append(values[step])
        else:
            made.append(float(reuse[step] @ states))
    return np.array(made)


@pytest.mark.parametrize(
    ("interval", "steps", "warmup", "last", "expected"),
    [
        (1, 4, 0, 0, [0, 1, 2, 3]),
        (3, 8, 1, 0, [0, 3, 6]),
        (2, 6, 2, 0, [0, 1, 3, 5]),
        (3, 7, 0, 0, [0, 3, 6]),  # step 0 has nothing to reuse
        (4, 50, 2, 0, [0, *range(1, 50, 4)]),  # TaylorSeer, DiT: 49, 48, 44, 40, .., 4, 0 counted down
        (6, 50, 3, 0, [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),  # TaylorSeer, FLUX
        (3, 8, 1, 2, [0, 3, 6, 7]),
        (100, 5, 2, 0, [0, 1]),
        (2, 3, 9, 0, [0, 1, 2]),  # a warm-up longer than the run
        (2, 3, 1, 9, [0, 1, 2]),
    ],
)
def test_every(interval: int, steps: int, warmup: int, last: int, expected: list[int]) -> None:
    mask = every(interval, steps, warmup, last)
    assert len(mask) == steps
    assert computed_steps(mask) == expected


def test_taylor_on_a_quadratic_has_the_published_errors() -> None:
    s = np.arange(49, -1, -1)
    values = 3 + 0.5 * s + 0.02 * s**2
    error = dict(zip(s, predicted(values, every(4, 50, 2), 2) - values, strict=True))
    assert [round(float(error[at]), 4) for at in (47, 46, 45, 43)] == [-0.04, -0.12, -0.24, -0.0875]
    assert [error[at] for at in (49, 48, 44, 40)] == [0, 0, 0, 0]


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_exact_on_lines_once_it_has_a_slope(order: int) -> None:
    values = 5 - 0.75 * np.arange(12.0)
    np.testing.assert_allclose(predicted(values, every(3, 12, 2), order), values, atol=1e-6)


def test_order_zero_holds_the_last_value() -> None:
    values = np.arange(7.0) ** 2
    np.testing.assert_array_equal(predicted(values, every(3, 7), 0), [0, 0, 0, 9, 9, 9, 36])


def test_orders_wait_for_the_steps_they_need() -> None:
    reuse, refresh = taylor((True, False, True, False, True, False), 2)
    assert reuse.dtype == refresh.dtype == np.float32
    np.testing.assert_array_equal(reuse, [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0.5]])
    np.testing.assert_array_equal(refresh, [[0, 0], [0, 0], [0.5, 0], [0, 0], [0.5, 0.5], [0, 0]])


def test_reuse_coefficients_are_those_of_the_series() -> None:
    reuse, _ = taylor(every(5, 14, 4), 3)
    for since, step in enumerate((9, 10, 11, 12), start=1):
        np.testing.assert_allclose(reuse[step], [since**k / math.factorial(k) for k in range(4)], rtol=1e-6)


def test_one_state_needs_no_refresh_table() -> None:
    reuse, refresh = taylor((True, False), 0)
    assert (reuse.shape, refresh.shape) == ((2, 1), (2, 0))
    assert site((True, False)).states == 1
    assert site((True, False), order=2).states == 3


@pytest.mark.parametrize("computed", [(False, True), ()])
def test_step_zero_must_compute(computed: tuple[bool, ...]) -> None:
    with pytest.raises(PassError, match="cache site 'middle': step 0 reuses a value that no step has computed"):
        Site("middle", "value", None, computed, np.zeros((len(computed), 1), np.float32), np.zeros((0, 0), np.float32))


def test_plan_must_fit_the_sampler() -> None:
    with pytest.raises(PassError, match="'middle' plans 2 steps, the sampler has 3; plan it again"):
        Plan(3, (site((True, False)),))


def test_masks_are_the_distinct_rows_in_order_of_use() -> None:
    plan = Plan(5, (site((True, True, False, True, False), "a"), site((True, False, False, True, True), "b")))
    assert [plan.mask(step) for step in range(5)] == [
        (True, True),
        (True, False),
        (False, False),
        (True, True),
        (False, True),
    ]
    assert plan.masks == ((True, True), (True, False), (False, False), (False, True))
    assert Plan(5).masks == ((),)
