"""Mixtures of the last values: the fit against numpy, Taylor's extrapolation as a table, and what the loop is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.plan import Plan, Site, every, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.trace import Watched, watch
from dcompile.compiler.variants import build_variant
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching import closed_loop
from dcompile.passes.caching.closed_loop import close_loop, uncached_path, way_sizes
from dcompile.passes.caching.history import RIDGE, fit_histories, least_squares
from dcompile.passes.caching.sites import find_sites
from dcompile.runtime.manifest import StateSpec

CalibrationOf = Callable[[Program], Calibration]


def planned(program: Program, computed: tuple[bool, ...], **fields: Any) -> Program:
    (found,) = find_sites(program.graph, "range", refused=[])
    return replace(program, plan=Plan(program.steps, (Site(found.name, found.value, None, computed, **fields),)))


def history(program: Program, computed: tuple[bool, ...], rows: list[list[float]]) -> Program:
    table = np.array(rows, np.float32)
    return planned(program, computed, reuse=table, refresh=0 * table[:, 1:], rolling=True)


def samples(program: Program, calibration: Calibration) -> Tensor:
    return run(program, calibration.conditions, calibration.seeds)


# ---- the mechanism --------------------------------------------------------------------------------------------------


def test_a_line_through_two_states_is_taylor_of_order_one(dit: Program, calibration_of: CalibrationOf) -> None:
    """Two computed steps, then predictions only: each continues the line of the two before it."""
    calibration, computed = calibration_of(dit), (True, True, False, False, False, False)
    reuse, refresh = taylor(computed, 1)
    expected = samples(planned(dit, computed, reuse=reuse, refresh=refresh), calibration)
    found = samples(history(dit, computed, [[2.0, -1.0]] * 6), calibration)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - calibration.teacher).abs().max() > 1e-2


def test_states_of_reused_steps_are_kept_beside_computed_ones(dit: Program, calibration_of: CalibrationOf) -> None:
    """Computed steps 0, 1 and 4: step 5 takes the line through 4 and 1, whose values are states 0 and 3 by then."""
    calibration, computed = calibration_of(dit), every(3, 6, warmup=2)
    assert computed == (True, True, False, False, True, False)
    rows = [[2.0, -1.0, 0, 0]] * 4 + [[0.0] * 4, [4 / 3, 0, 0, -1 / 3]]
    reuse, refresh = taylor(computed, 1)
    expected = samples(planned(dit, computed, reuse=reuse, refresh=refresh), calibration)
    torch.testing.assert_close(samples(history(dit, computed, rows), calibration), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("based", [False, True])
def test_both_layouts_equal_pytorch(states: int, based: bool, dit: Program, calibration_of: CalibrationOf) -> None:
    calibration, computed = calibration_of(dit), (True, False, False, True, False, False)
    rows = np.random.default_rng(0).normal(0, 0.2, (6, states))
    rows[:, 0] += 1 - rows.sum(1)
    program = history(dit, computed, rows.tolist())
    (site,) = program.plan.sites
    if based:
        (found,) = find_sites(dit.graph, "range", refused=[])
        program = replace(program, plan=Plan(6, (replace(site, base=found.base),)))
    expected = samples(program, calibration)
    for layout in ("variants", "segments"):
        lowered = lower(program, layout)
        assert lowered.states == {f"{site.name}.states": StateSpec((("batch", 2), states, 16, 32), "float32")}
        again = run_lowered(program, lowered, calibration.conditions, calibration.seeds)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    for mask in program.plan.masks:  # computed or not, a step leaves them
        assert build_variant(program, mask).outputs == ("sample", f"{site.name}.states")


# ---- the fit ---------------------------------------------------------------------------------------------------------


def test_coefficients_are_those_of_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 5, 4, generator=random) for _ in range(3)]
    value = sum(((k + 1) * state for k, state in enumerate(states)), start=torch.randn(3, 5, 4, generator=random))
    columns = torch.stack([state.flatten() for state in states], dim=1).double().numpy()
    ridge = np.sqrt(RIDGE * np.mean((columns**2).sum(0)))
    for prior in (np.zeros(3), np.array([1.0, -2.0, 5.0])):
        rows = np.concatenate([columns, ridge * np.eye(3)])
        expected = np.linalg.lstsq(rows, np.concatenate([value.flatten().double().numpy(), ridge * prior]))[0]
        np.testing.assert_allclose(least_squares(states, value, prior), expected, rtol=1e-9)


def test_first_step_that_predicts_fits_what_was_computed(dit: Program, calibration_of: CalibrationOf) -> None:
    """And the next one what the first predicted."""
    calibration, computed = calibration_of(dit), (True, True, False, False, True, True)
    (found,) = find_sites(dit.graph, "range", refused=[])
    watched, seen = Watched(found.name, found.value), []
    watch(dit, [watched], calibration, lambda step, each, value: seen.append(value.flatten().double().numpy()), "")
    table = fit_histories(dit, {watched: computed}, 2, calibration)[found.name]
    assert not table[[0, 1, 4, 5]].any()
    predicted = np.stack([seen[1], seen[0]], 1) @ table[2]
    for step, columns in ((2, [seen[1], seen[0]]), (3, [predicted, seen[1]])):
        best = np.linalg.lstsq(np.stack(columns, 1), seen[step])[0]
        errors = [np.linalg.norm(np.stack(columns, 1) @ row - seen[step]) for row in (table[step], best)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_closing_the_loop_brings_the_samples_nearer(dit: Program, calibration_of: CalibrationOf) -> None:
    """By as much, at the first step that predicts, as any coefficients near those of least squares can."""
    calibration = calibration_of(dit)
    step = CacheSteps(method="lesa", interval=3, states=2)
    (found,) = find_sites(dit.graph, "range", refused=[])
    computed = every(3, 6, warmup=2)
    first = fit_histories(dit, {Watched(found.name, found.value): computed}, 2, calibration)
    before = step.apply(dit, Decision({}, first)).program
    closed = close_loop(before, calibration)[found.name]
    np.testing.assert_array_equal(closed[list(computed)], first[found.name][list(computed)])
    along = uncached_path(dit, calibration)

    def error(change: NDArray[np.floating]) -> float:
        """Of the sample after step 2, and what the change of its coefficients costs, both relative to its way."""
        rows = first[found.name].copy()
        rows[2] += change
        states = np.stack([seen[1], seen[0]], 1)
        stiff = np.sum((states @ change) ** 2) + closed_loop.RIDGE * np.mean((states**2).sum(0)) * np.sum(change**2)
        stiff /= np.sum((states @ first[found.name][2]) ** 2)
        sample = path(step.apply(dit, Decision({}, {found.name: rows})).program, calibration)[2]
        return float((sample - along[3]).square().mean()) / way_sizes(along)[2] + closed_loop.STIFFNESS * float(stiff)

    seen: list[Any] = []
    watched = Watched(found.name, found.value)
    watch(dit, [watched], calibration, lambda step, each, value: seen.append(value.flatten().double().numpy()), "")
    chosen = closed[2] - first[found.name][2]
    least = error(chosen)
    assert least < error(0 * chosen)
    for around in ((0.02, 0.0), (-0.02, 0.0), (0.0, 0.02), (0.0, -0.02), (0.02, -0.02), (-0.02, 0.02)):
        assert least < error(chosen + np.array(around, np.float32))


def path(program: Program, calibration: Calibration) -> list[Tensor]:
    found: list[Tensor] = []
    run(program, calibration.conditions, calibration.seeds, on_step=lambda step, sample: found.append(sample))
    return found


def test_a_way_of_nearly_nothing_counts_a_tenth_of_the_others() -> None:
    path = [torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4)]
    np.testing.assert_allclose(way_sizes(path), [1.05, 0.05])


def test_states_are_one_or_more() -> None:
    with pytest.raises(RecipeError, match="states is 0, needed 1 or more"):
        CacheSteps(method="lesa", states=0)
