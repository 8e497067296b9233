"""Every method on both kinds of network: its plan holds, reuse does something, computing all steps changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cache_cases import CASES, OPTIONS

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.program import PassResult, Program
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.methods import METHODS

CalibrationOf = Callable[[Program], Calibration]


def cached(program: Program, calibration: Calibration, **options: Any) -> PassResult:
    step = CacheSteps(**options)
    return step.apply(program, step.decide(program, calibration))


def samples_of(program: Program, calibration: Calibration) -> torch.Tensor:
    return run(program, calibration.conditions, calibration.seeds)


@pytest.mark.parametrize(("network", "method"), CASES)
def test_every_method(network: str, method: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    result = cached(program, calibration, method=method, **OPTIONS.get(method, {}))
    plan = result.program.plan
    assert result.record.details["method"] == method
    assert all(site.computed[0] for site in plan.sites)
    assert any(not all(site.computed) for site in plan.sites)
    found = samples_of(result.program, calibration)
    drift = float((found - calibration.teacher).norm() / calibration.teacher.norm())
    assert 1e-5 < drift < 1.0  # reuse does something, and not just anything
    for layout in ("variants", "segments"):
        lowered = lower(result.program, layout)
        again = run_lowered(result.program, lowered, calibration.conditions, calibration.seeds)
        torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "method"),
    [case for case in CASES if case[1] != "deepcache_nonuniform"],  # its points cannot be as many as the steps
)
def test_computing_every_step_changes_nothing(
    network: str, method: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    every = {"interval": 1, "threshold": 0.0, "budget": program.steps, "keys": tuple(range(program.steps))}
    options = {name: value for name, value in every.items() if name != "keys" or method == "faster_diffusion"}
    if method in ("learning_to_cache", "harmonica", "ecad", "edit"):
        options |= {"share": 1.0, "runs": 1, "trials": 1}
    if method == "dbcache":
        options |= {"front": 1, "warmup": 1}
    result = cached(program, calibration_of(program), method=method, **options)
    stages = METHODS[method].options.get("site") == "stages"
    assert stages or result.program is program or result.program.plan.predicates
    torch.testing.assert_close(samples_of(result.program, calibration_of(program)), calibration_of(program).teacher)


def test_defaults_are_the_methods_and_options_override_them() -> None:
    fora = CacheSteps(method="fora")
    assert (fora.site, fora.schedule, fora.predictor, fora.interval, fora.warmup) == (
        "branch", "to_the_end", "copy", 3, 1
    )  # fmt: skip
    assert CacheSteps(method="fora", interval=5).interval == 5
    assert CacheSteps() == CacheSteps(method="interval", interval=3, warmup=2, predictor="taylor1", front=1)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no method is called 'forra'; did you mean 'fora'\?"):
        CacheSteps(method="forra")
    with pytest.raises(RecipeError, match=r"schedule 'hold' needs a threshold, as in threshold=0\.1"):
        CacheSteps(schedule="hold")


def test_delta_dit_computes_one_end_at_a_reused_step(dit: Program, calibration_of: CalibrationOf) -> None:
    plan = cached(dit, calibration_of(dit), method="delta_dit", turn=3).program.plan
    front, rear = plan.sites
    assert np.array(front.computed).tolist() == [True, True, True, False, True, False]
    assert np.array(rear.computed).tolist() == [True, False, True, True, True, True]


def test_profilingdit_finds_the_calmer_half(dit: Program, calibration_of: CalibrationOf) -> None:
    step = CacheSteps(method="profilingdit", warmup=2)
    blocks = step.decide(dit, calibration_of(dit)).choices["blocks"]
    assert len(blocks) == 1  # of three
    assert set(blocks) < {f"net.transformer_blocks.{i}" for i in range(3)}
