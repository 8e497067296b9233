"""Correctors of the update: identities, closed forms, and what they are good for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.store import Store
from dcompile.compiler.trace import Watched, watch
from dcompile.compiler.validate import validate
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.updates import (
    GAIN,
    PRIOR,
    compensation,
    measure_gains,
    measure_trust,
    resized,
    step_lengths,
    why_not_resized,
    with_gains,
    with_lengths,
    with_prior,
)
from dcompile.passes.caching.writing import find_candidates
from dcompile.passes.quantize import Quantize

CalibrationOf = Callable[[Program], Calibration]


def cached(program: Program, calibration: Calibration, **options: Any) -> Program:
    step = CacheSteps(**options)
    return step.apply(program, step.decide(program, calibration)).program


def samples(program: Program, calibration: Calibration) -> torch.Tensor:
    return run(program, calibration.conditions, calibration.seeds)


def in_both_layouts(program: Program, calibration: Calibration) -> None:
    for layout in ("variants", "segments"):
        found = run_lowered(program, lower(program, layout), calibration.conditions, calibration.seeds)
        torch.testing.assert_close(found, samples(program, calibration), rtol=1e-5, atol=1e-5)


# ---- step lengths ---------------------------------------------------------------------------------------------------


def test_the_sum_of_lengths_is_what_it_was() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths, trust = -random.uniform(0.01, 1, 12), random.uniform(0, 1, 12)
        factors = resized(lengths, trust)
        assert (factors * lengths).sum() == pytest.approx(lengths.sum())
        assert (factors >= 0).all()
        # by the definition: what is left to go over what the steps that are left would go
        gone = 0.0
        for step in range(11):
            multiplier = (lengths.sum() - gone) / lengths[step:].sum()
            assert factors[step] == pytest.approx(multiplier * trust[step])
            gone += factors[step] * lengths[step]


def test_full_trust_changes_nothing_bit_for_bit(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    base = cached(dit, calibration, method="ertacache", threshold=0.5)
    factors = resized(step_lengths(dit.sampler), np.ones(dit.steps))
    assert (factors == 1).all()
    same = with_lengths(base, factors.tolist())
    assert torch.equal(same.tables["row"], base.tables["row"])
    assert torch.equal(samples(same, calibration), samples(base, calibration))


def test_lengths_of_flow_matching_are_those_of_its_sigmas(dit: Program) -> None:
    sigmas = np.append(dit.sampler.timesteps / 1000, 0)
    np.testing.assert_allclose(step_lengths(dit.sampler), np.diff(sigmas), atol=1e-6)


def test_lengths_of_ddim_are_those_of_its_noise_over_signal(tmp_path: Path) -> None:
    contract = tmp_path / "contract.yaml"
    contract.write_text("sample: x\ntimestep: sigma\nsample_shape: [6, 4]\npredicts: epsilon\n")
    sampler = ingest(Source("models:tokens", contract=contract, sampler="ddim", steps=7)).sampler
    assert why_not_resized(sampler) is None
    # y = x / alpha goes by d(sigma / alpha) along epsilon; with the same epsilon at each step it goes by their sum
    x, noise = np.full(3, 2.0), np.full(3, 0.5)
    once = sampler.apply(lambda scaled, time: noise, x)
    kept = np.prod(sampler.a + sampler.b[:, 0] * sampler.p)
    np.testing.assert_allclose(once / kept, x + step_lengths(sampler).sum() * noise)


@pytest.mark.parametrize(
    ("name", "why"), [("dpm++2m", "several outputs at once"), ("ddpm", "draws noise at each step"), ("ddim", None)]
)
def test_samplers_without_lengths_are_left_alone_and_it_says_so(
    name: str, why: str | None, calibration_of: CalibrationOf, tmp_path: Path
) -> None:
    contract = tmp_path / "contract.yaml"
    contract.write_text("sample: x\ntimestep: sigma\nsample_shape: [6, 4]\npredicts: epsilon\n")
    program = ingest(Source("models:tokens", contract=contract, sampler=name, steps=6))
    step = CacheSteps(method="ertacache", threshold=10.0, resize=True)
    decision = step.decide(program, calibration_of(program))
    result = step.apply(program, decision)
    if why is None:
        assert result.record.details["lengths"] == decision.choices["lengths"]
        return
    ((what, reason),) = result.record.refused
    assert what == "lengths of steps"
    assert why in reason
    assert result.program.tables["row"] is program.tables["row"]


def test_trust_is_its_definition_at_each_reused_step(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    site = find_candidates(CacheSteps(method="ertacache", threshold=0.5), dit.graph, [])[0]
    assert site.base is not None
    outputs: list[np.ndarray] = []
    inputs: list[np.ndarray] = []

    def take(step: int, each: Watched, value: torch.Tensor) -> None:
        (outputs if each.name == "output" else inputs).append(value.numpy())

    watch(dit, [Watched("input", site.base), Watched("output", site.value)], calibration, take, "")
    mask = (True, False, False, True, False, False)
    found = measure_trust(dit, Watched("site", site.value, site.base), mask, None, calibration)
    for step, leader in ((1, 0), (2, 0), (4, 3)):
        stand_in = inputs[step] + outputs[leader] - inputs[leader]
        change = np.abs(outputs[step] - outputs[step + 1]).mean()
        expected = np.clip(1 - np.abs(stand_in - outputs[step]).mean() / change, 0, 1)
        assert found[step] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (found[0], found[3]) == (1, 1)


def test_resized_steps_run_in_both_layouts(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    options = {"method": "ertacache", "threshold": 0.5, "warmup": 1, "correct": False}
    plain, other = cached(dit, calibration, **options), cached(dit, calibration, **options, resize=True)
    assert (samples(plain, calibration) - samples(other, calibration)).abs().max() > 1e-4
    assert step_lengths(other.sampler).sum() == pytest.approx(step_lengths(dit.sampler).sum())
    in_both_layouts(other, calibration)


def test_only_the_output_has_an_error_to_go_by() -> None:
    with pytest.raises(RecipeError, match="resize needs site 'output', whose error it goes by; found 'range'"):
        CacheSteps(resize=True, site="range")


# ---- variance -------------------------------------------------------------------------------------------------------


def test_gaussian_samples_get_the_target_variance_and_keep_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    target = 3 + 2 * torch.randn(4, 1000, generator=generator)
    found = 1 + 0.7 * torch.randn(4, 1000, generator=generator)
    slope, offset = compensation(found, target)
    assert slope == pytest.approx(2 / 0.7, rel=0.05)
    after = found * slope + offset
    assert float(after.std()) == pytest.approx(float(target.std()), rel=1e-5)
    assert float(after.mean()) == pytest.approx(float(found.mean()), abs=1e-4)
    assert compensation(found, found) == (1.0, 0.0)


def test_a_gain_of_one_changes_nothing_bit_for_bit(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    base = cached(dit, calibration, method="fora")
    gains = np.tile(np.array([1, 0], np.float32), (dit.steps, 1))
    assert torch.equal(samples(with_gains(base, gains), calibration), samples(base, calibration))
    np.testing.assert_array_equal(measure_gains(dit, dit, calibration), gains)


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_every_step_has_the_variance_of_the_uncached_one(
    network: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    base = cached(program, calibration, method="fora")
    made = cached(program, calibration, method="qandc", schedule="to_the_end")
    assert [site.computed for site in made.plan.sites] == [site.computed for site in base.plan.sites]
    spreads: dict[str, list[float]] = {}
    for name, each in (("without", program), ("fora", base), ("qandc", made)):
        spreads[name] = []
        run(
            each, calibration.conditions, calibration.seeds,
            on_step=lambda _, sample, name=name: spreads[name].append(float(sample.std())),  # type: ignore[misc]
        )  # fmt: skip
    np.testing.assert_allclose(spreads["qandc"], spreads["without"], rtol=1e-4)
    assert np.abs(np.array(spreads["fora"]) / spreads["without"] - 1).max() > 1e-3
    in_both_layouts(made, calibration)


def test_the_variance_that_quantisation_takes_is_given_back_too(dit: Program, tmp_path: Path) -> None:
    quant = Quantize(min_share=0.0, max_error=1.0, format="int4")
    alone, _ = run_passes(dit, [CacheSteps(method="qandc")], 2, Store(tmp_path))
    before, _ = run_passes(dit, [CacheSteps(method="qandc"), quant], 2, Store(tmp_path))
    assert not torch.equal(alone.tables[GAIN], before.tables[GAIN])


def test_a_program_without_reuse_gets_no_gain(dit: Program, calibration_of: CalibrationOf) -> None:
    assert cached(dit, calibration_of(dit), method="qandc", interval=1) is dit
    assert CacheSteps(method="qandc").apply(dit, Decision()).record.changed == 6


# ---- the first noise -------------------------------------------------------------------------------------------------


def test_prior_noise_is_that_of_a_loop(unet: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(unet)
    options: dict[str, Any] = {"method": "faster_diffusion", "keys": (0, 2, 4)}
    base = cached(unet, calibration, **options)
    made = cached(unet, calibration, **options, prior=0.3)
    start: list[torch.Tensor] = []
    times = unet.sampler.timesteps

    def before(step: int, mask: object, inputs: list[torch.Tensor]) -> None:
        sample = inputs[0]
        start.append(sample.clone())
        if step and times[step] < 500:
            sample += 0.3 * start[0]

    expected = run(base, calibration.conditions, calibration.seeds, on_inputs=before)
    torch.testing.assert_close(samples(made, calibration), expected, rtol=1e-5, atol=1e-5)
    assert (samples(base, calibration) - expected).abs().max() > 1e-2
    assert made.tables[PRIOR].numpy().tolist() == pytest.approx([0.3 * (time < 500) for time in times])
    in_both_layouts(made, calibration)


def test_without_prior_noise_nothing_is_added(unet: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(unet)
    base = cached(unet, calibration, method="faster_diffusion")
    assert cached(unet, calibration, method="faster_diffusion", prior=0.0).graph is base.graph is unet.graph
    still = with_prior(base, 0.0)
    validate(still)
    assert torch.equal(samples(still, calibration), samples(base, calibration))
    assert still.plan.sites[1:] == base.plan.sites


def test_steps_that_compute_are_told_without_the_noise(unet: Program, calibration_of: CalibrationOf) -> None:
    step = CacheSteps(method="faster_diffusion", keys=(0, 2, 4), prior=0.003)
    result = step.apply(unet, step.decide(unet, calibration_of(unet)))
    assert result.record.details["computed_steps"] == [0, 2, 4]
    assert PRIOR not in result.record.details["sites"]
