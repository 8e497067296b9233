"""Orders that quantisation noise lowers: on sequences whose answer is known, and where a quantize pass follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import run
from dcompile.compiler.pipeline import Stage, run_passes
from dcompile.compiler.plan import every
from dcompile.compiler.program import Pass, Program
from dcompile.compiler.store import Store
from dcompile.compiler.trace import Watched, record, record_beside
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.noise import compare, predict
from dcompile.passes.caching.writing import find_candidates
from dcompile.passes.quantize import Quantize

CalibrationOf = Callable[[Program], Calibration]
MASK = every(3, 24, warmup=3)
QUANT: dict[str, Any] = {"min_share": 0.0, "max_error": 1.0}


def test_a_line_is_extrapolated_until_its_noise_is_larger_than_its_slope() -> None:
    line = (10 + 0.1 * np.arange(24.0))[:, None, None] * np.ones((1, 2, 50))
    noise = np.random.default_rng(0).normal(0, 1, line.shape)
    clean, little, much = (compare(line, line + size * noise, MASK, 1) for size in (0, 0.02, 1))
    size = np.sqrt((line**2).mean())
    assert clean.noise == 0
    assert clean.exact == clean.noisy
    assert clean.exact[1] == pytest.approx(0, abs=1e-6)
    assert clean.change == pytest.approx(float(np.sqrt((np.diff(line[:, 0, 0][list(MASK)]) ** 2).mean()) / size))
    assert (clean.order, little.order, much.order) == (1, 1, 0)
    assert little.noise == pytest.approx(0.02 * np.sqrt((noise**2).mean()) / size)


def test_a_parabola_keeps_the_second_order_until_there_is_noise() -> None:
    curve = (np.arange(24.0) ** 2)[:, None, None] * np.ones((1, 2, 50))
    noise = np.random.default_rng(0).normal(0, 1, curve.shape)
    assert [compare(curve, curve + size * noise, MASK, 2).order for size in (0, 6, 300)] == [2, 1, 0]


def test_an_order_that_exact_values_do_not_bear_out_is_not_for_noise_to_lower() -> None:
    zigzag = np.random.default_rng(0).normal(0, 1, 24)[:, None, None] * np.ones((1, 2, 50))
    found = compare(zigzag, zigzag, MASK, 2)
    assert min(found.exact) == found.exact[0] < found.exact[2]
    assert found.order == 2


def test_noise_that_is_the_same_at_every_step_leaves_differences_as_they_are() -> None:
    line = (10 + np.arange(24.0))[:, None, None] * np.ones((1, 2, 50))
    shift = np.random.default_rng(0).normal(0, 5, (1, 2, 50))
    assert compare(line, line + shift, MASK, 1).order == 1


@pytest.mark.parametrize("predictor", ["copy", "taylor1", "taylor2"])
def test_what_is_predicted_is_what_the_program_puts_in_its_place(
    predictor: str, dit: Program, calibration_of: CalibrationOf
) -> None:
    """At the first reused step, whose inputs are still those of the uncached trajectory."""
    calibration = calibration_of(dit)
    step = CacheSteps(method="taylorseer", predictor=predictor, warmup=4)  # type: ignore[arg-type]
    cached = step.apply(dit, step.decide(dit, calibration)).program
    sites = cached.plan.sites
    exact = record(dit, [Watched(site.name, site.value) for site in sites], calibration).kept
    shown: dict[str, torch.Tensor] = {}
    calibration.observe(
        cached, [s.value for s in sites], lambda at, name, value: shown.update({name: value} if at == 4 else {}), ""
    )
    for site in sites:
        assert not site.computed[4]
        expected = predict(exact[site.name], site.computed, site.states - 1)[4]
        if predictor != "copy":  # a copy is shown by no step
            np.testing.assert_allclose(shown[site.value].flatten(1).numpy(), expected, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(expected, exact[site.name][3])


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_beside_itself_a_program_has_no_noise(
    network: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    step = CacheSteps(method="taylorseer", site="range" if network == "dit" else "cut")
    watched = [Watched(site.name, site.value, site.base) for site in find_candidates(step, program.graph, [])]
    exact = record(program, watched, calibration)
    beside = record_beside(program, program.graph, watched, calibration)
    for each in watched:
        np.testing.assert_array_equal(beside.kept[each.name], exact.kept[each.name])
    quantize = Quantize(**QUANT)
    graph = quantize.apply(program, quantize.decide(program, calibration)).program.graph
    noisy = record_beside(program, graph, watched, calibration)
    for each in watched:
        assert 1e-4 < np.abs(noisy.kept[each.name] - exact.kept[each.name]).mean() / exact.norms[each.name].mean() < 0.2


def test_a_network_keeps_the_states_that_it_reads(dit: Program, calibration_of: CalibrationOf) -> None:
    """A quantize pass that follows lowers Taylor's orders, not the order that a network adds to."""
    calibration = replace(calibration_of(dit), following=(Quantize(**QUANT),))
    step = CacheSteps(method="disca", states=2, runs=1, interval=2)
    assert not step.looks_ahead
    decision = step.decide(dit, calibration)
    assert "noise" not in decision.choices
    assert {site.states for site in step.apply(dit, decision).program.plan.sites} == {2}


def built(program: Program, folder: Path, quant: dict[str, Any] | None, **options: Any) -> tuple[Program, Stage]:
    steps: list[Pass] = [
        CacheSteps(method="taylorseer", interval=2, **options),
        *([Quantize(**quant)] if quant else []),
    ]
    found, stages = run_passes(program, steps, 2, Store(folder))
    return found, stages[0]


def test_the_cache_pass_measures_what_a_quantize_pass_after_it_will_do(dit: Program, tmp_path: Path) -> None:
    program, stage = built(dit, tmp_path, QUANT)
    noise = stage.details["noise"]
    assert list(noise) == [site.name for site in program.plan.sites]
    for site in program.plan.sites:
        told = noise[site.name]
        moved = int(np.argmin(told["exact_errors"])) - int(np.argmin(told["errors"]))
        assert told["order"] == site.states - 1 == 2 - max(0, moved)
        assert 0 < told["noise"] < 0.2
        assert told["change"] > 0
    conditions, seeds = {"class_labels": np.array([1, 2])}, [5, 6]
    expected = run(program, conditions, seeds)
    for layout in ("variants", "segments"):
        again = run_lowered(program, lower(program, layout), conditions, seeds)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert built(dit, tmp_path, QUANT)[1].seconds == 0.0  # kept
    assert built(dit, tmp_path, {**QUANT, "symmetric": True})[1].details["noise"] != noise  # measured anew


def test_without_one_or_if_told_not_to_it_takes_the_order_that_it_was_given(dit: Program, tmp_path: Path) -> None:
    for quant, options in ((None, {}), (QUANT, {"noise_aware": False})):
        program, stage = built(dit, tmp_path, quant, **options)
        assert "noise" not in stage.details
        assert all(site.states == 3 for site in program.plan.sites)
    assert not CacheSteps(method="fora").looks_ahead
    assert not CacheSteps(noise_aware=False).looks_ahead
    assert CacheSteps().looks_ahead
