"""The search against trying every mask, what it promises of the point it takes, and the samples of what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.flops import sample_flops
from dcompile.compiler.program import Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.rollout import Judge, Rollout
from dcompile.passes.caching.search import front_of, search, search_masks, try_out
from dcompile.passes.caching.sites import Candidate, find_sites

CalibrationOf = Callable[[Program], Calibration]


def two_units(program: Program) -> tuple[Candidate, ...]:
    """Attention and feed-forward, each of all blocks: ten bits at six steps."""
    sites = find_sites(program.graph, "branch", refused=[])
    return tuple(replace(site, unit="feed" if site.feeds else "attention") for site in sites)


def test_the_front_is_that_of_brute_force(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    sites = two_units(dit)
    found = search(dit, sites, calibration, share=0.99, trials=700, margin=0.1)
    judge = Judge(Rollout(dit, sites), calibration)
    rows = [np.array([1, 1, *bits], bool).reshape(6, 2) for bits in product((0, 1), repeat=10)]
    best = front_of([try_out(judge, masks) for masks in rows])
    assert len(best) > 10
    reached = {(each.cost, each.error) for each in found}
    assert sum((each.cost, each.error) in reached for each in best) >= 0.9 * len(best)
    for share in (0.3, 0.5, 0.7):  # and the points that a budget takes are the very ones
        nearest = min((each for each in best if each.cost <= share), key=lambda each: each.error)
        again = min((each for each in found if each.cost <= share), key=lambda each: each.error)
        np.testing.assert_array_equal(again.masks, nearest.masks)


def test_cost_and_error_are_those_of_the_plan(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    step = CacheSteps(method="ecad", share=0.4, trials=30)
    result = step.apply(dit, step.decide(dit, calibration)).program
    sites = find_sites(dit.graph, "branch", refused=[])
    masks = np.ones((dit.steps, len(sites)), bool)
    planned = {site.name: site.computed for site in result.plan.sites}
    for index, site in enumerate(sites):
        masks[:, index] = planned.get(site.name, True)
    tried = try_out(Judge(Rollout(dit, sites), calibration), masks)
    samples = run(result, calibration.conditions, calibration.seeds).flatten(1)
    teacher = calibration.teacher.flatten(1)
    assert tried.error == pytest.approx(float(((samples - teacher).norm(dim=1) / teacher.norm(dim=1)).mean()), rel=1e-4)
    shut = np.zeros_like(masks)
    least, most = (Rollout(dit, sites).flops(each) for each in (shut, ~shut))
    assert tried.cost == pytest.approx((sample_flops(result) - least) / (most - least))
    assert 0.2 < tried.cost <= 0.4


def test_more_trials_are_no_worse_and_a_seed_is_a_seed(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    sites = find_sites(dit.graph, "branch", refused=[])
    fronts = [search(dit, sites, calibration, share=0.4, trials=trials) for trials in (8, 120, 120)]
    best = [min(each.error for each in front if each.cost <= 0.4) for front in fronts]
    assert best[1] < 0.9 * best[0]  # than the hand-made schedules
    assert best[1] == best[2]
    for one, other in zip(*fronts[1:], strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


def test_what_cannot_be_searched_is_refused(dit: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match=r"no mask costs as little as share 0\.05; step 0 alone is 0\.167"):
        search_masks(dit, two_units(dit), calibration_of(dit), share=0.05, trials=3)
    with pytest.raises(RecipeError, match=r"'searched' needs predictor 'copy' or 'delta', found 'taylor1'"):
        CacheSteps(method="ecad", predictor="taylor1")


def test_residuals_of_blocks_can_be_searched_too(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    step = CacheSteps(method="ecad", site="block", predictor="delta", share=0.5, trials=20)
    result = step.apply(dit, step.decide(dit, calibration)).program
    assert all(site.base is not None for site in result.plan.sites)
    assert not torch.equal(run(result, calibration.conditions, calibration.seeds), calibration.teacher)
