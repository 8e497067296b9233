"""Learned gates: what one and zero mean, their gradient, the budget, and that learning beats intervals and chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, example_conditions
from dcompile.compiler.plan import every
from dcompile.compiler.program import Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.rollout import Judge, Rollout
from dcompile.passes.caching.router import Slopes, Tried, exchanges, filled, intervals
from dcompile.passes.caching.sites import find_sites

CalibrationOf = Callable[[Program], Calibration]


def some_masks(program: Program, count: int, share: float = 0.5) -> np.ndarray:
    masks = np.random.default_rng(0).random((program.steps, count)) < share
    masks[0] = True
    return masks


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_gates_of_zero_and_one_are_the_mask(
    network: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    sites = find_sites(program.graph, "branch", refused=[])
    slopes, rollout = Slopes(program, sites), Rollout(program, sites)
    for masks in (some_masks(program, len(sites)), np.ones((program.steps, len(sites)), bool)):
        found = slopes.image(torch.from_numpy(masks).float(), calibration.conditions, calibration.seeds)
        expected = rollout.samples(masks, calibration.conditions, calibration.seeds)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, calibration.teacher, rtol=1e-5, atol=1e-5)


def test_slope_of_a_gate_is_its_finite_difference(dit: Program) -> None:
    """Through all later steps: of a gate at step 2, whose value steps 3 and 4 still use."""
    sites = find_sites(dit.graph, "branch", refused=[])
    slopes = Slopes(dit, sites)
    masks = some_masks(dit, len(sites))
    masks[2:5, 1] = False, False, True
    slope = slopes.of(masks, 0)
    conditions = {name: values[:4] for name, values in example_conditions(dit.contract, 64).items()}
    seeds = list(range(2_000_000, 2_000_004))
    teacher = slopes.image(torch.ones(masks.shape), conditions, seeds)
    for place in ((2, 1), (4, 3)):
        measured = []
        for change in (-0.01, 0.01):
            gates = torch.from_numpy(masks).float()
            gates[place] += change
            with torch.no_grad():
                image = slopes.image(gates, conditions, seeds)
            measured.append((image - teacher).square().flatten(1).sum(dim=1).log().mean())
        assert abs(slope[place]) > 1e-3
        torch.testing.assert_close(slope[place], (measured[1] - measured[0]) / 0.02, rtol=3e-2, atol=1e-4)


def test_exchanges_come_by_what_they_promise() -> None:
    masks = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)
    slopes = np.array([[9.0, 9.0], [3.0, -1.0], [-2.0, 0.5], [1.0, 0.5]], np.float32)
    fixed = np.array([True, False, False, False])
    alone = list(exchanges(masks, slopes, fixed, False, set()))
    assert len(alone) == 3 * 3
    np.testing.assert_array_equal(alone[0], np.array([[1, 1], [0, 0], [1, 0], [1, 1]], bool))
    np.testing.assert_array_equal(alone[1], np.array([[1, 1], [0, 1], [0, 0], [1, 1]], bool))
    again = exchanges(masks, slopes, fixed, False, {alone[0].tobytes()})
    np.testing.assert_array_equal(next(again), alone[1])
    fixed[1] = True
    np.testing.assert_array_equal(
        next(exchanges(masks, slopes, fixed, False, set())), np.array([[1, 1], [1, 0], [1, 0], [0, 1]], bool)
    )


def test_together_whole_steps_change_places() -> None:
    masks = np.repeat(np.array([[1], [1], [0], [0]], bool), 2, axis=1)
    slopes = np.array([[0.0, 0.0], [1.0, 0.5], [-3.0, 1.0], [-0.5, -2.0]], np.float32)  # sums 1.5, -2, -2.5
    found = list(exchanges(masks, slopes, np.array([True, False, False, False]), True, set()))
    assert [each[:, 0].tolist() for each in found] == [[True, False, False, True], [True, False, True, False]]
    assert all(np.array_equal(each[:, 0], each[:, 1]) for each in found)


def test_what_the_budget_leaves_is_opened() -> None:
    masks = np.array([[1, 1], [0, 0]], bool)
    np.testing.assert_array_equal(filled(masks, torch.tensor([[-9.0, -9.0], [0.5, 0.1]]), 3), [[1, 1], [0, 1]])
    np.testing.assert_array_equal(filled(masks, torch.zeros(2, 2), 2), masks)


def test_better_is_by_more_than_chance() -> None:
    masks = np.ones((1, 1), bool)
    one = Tried(masks, np.log([0.1, 0.2, 0.3]))
    assert Tried(masks, np.log([0.09, 0.18, 0.27])).beats(one)
    assert not one.beats(one)
    assert not Tried(masks, np.log([0.01, 0.3, 0.4])).beats(one)  # of one sample alone


def test_it_starts_fromintervals_within_the_budget() -> None:
    fixed = np.arange(30) % 30 == 0
    found = intervals(fixed, 2, 20)
    assert len(found) > 8
    assert all(each.sum() <= 20 and each[0].all() for each in found)
    assert any(np.array_equal(each[:, 0], every(3, 30)) for each in found)
    pairs = np.arange(30) % 2 == 0
    assert all(each[pairs].all() for each in intervals(pairs, 2, 40))


@pytest.mark.parametrize(("method", "share"), [("harmonica", 0.5), ("learning_to_cache", 0.7)])
def test_learning_beatsintervals_and_chance_at_the_same_cost(
    method: str, share: float, dit: Program, calibration_of: CalibrationOf
) -> None:
    calibration = calibration_of(dit)
    step = CacheSteps(method=method, share=share, runs=12)
    result = step.apply(dit, step.decide(dit, calibration)).program
    sites = find_sites(dit.graph, "branch", refused=[])
    planned = {site.name: site.computed for site in result.plan.sites}
    masks = np.array([planned.get(site.name, (True,) * dit.steps) for site in sites]).T
    budget = round(share * masks.size)
    assert masks.sum() == budget
    assert masks[:: 2 if method == "learning_to_cache" else dit.steps].all()
    judge = Judge(Rollout(dit, sites), calibration)
    learned = np.log(judge.errors(masks)).mean()
    fixed = np.arange(dit.steps) % (2 if method == "learning_to_cache" else dit.steps) == 0
    assert all(learned < np.log(judge.errors(each)).mean() for each in intervals(fixed, len(sites), budget))
    random, worse = np.random.default_rng(0), 0
    for _ in range(20):
        drawn = np.repeat(fixed[:, None], len(sites), axis=1)
        free = np.flatnonzero(~drawn)
        drawn.flat[random.permutation(free)[: budget - int(drawn.sum())]] = True
        worse += np.log(judge.errors(drawn)).mean() > learned
    assert worse == 20
    assert rewrite.placeholders(dit.graph).keys() == rewrite.placeholders(result.graph).keys()
