"""The affine correction against numpy's least squares, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.program import Program
from dcompile.compiler.trace import Watched, watch
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.fits import AffineFit, by_channel

CalibrationOf = Callable[[Program], Calibration]


def test_fit_in_batches_is_least_squares() -> None:
    random = np.random.default_rng(0)
    x = random.normal(5, 2, (90, 3))
    y = x * [2, -1, 0.5] + [1, 0, 3] + random.normal(0, 0.1, x.shape)
    fit = AffineFit()
    for part in range(0, 90, 30):
        fit.add(x[part : part + 30], y[part : part + 30])
    slope, offset = fit.solve()
    for channel in range(3):
        columns = np.stack([x[:, channel], np.ones(90)], axis=1)
        np.testing.assert_allclose((slope[channel], offset[channel]), np.linalg.lstsq(columns, y[:, channel])[0])


def test_a_channel_that_does_not_vary_is_moved_only() -> None:
    fit = AffineFit()
    fit.add(np.full((5, 1), 2.0), np.full((5, 1), 3.5))
    slope, offset = fit.solve()
    assert (slope.item(), offset.item()) == (1.0, 1.5)


@pytest.mark.parametrize(
    ("network", "site", "predictor"), [("unet", "cut", "copy"), ("dit", "branch", "copy"), ("dit", "range", "delta")]
)
def test_correction_of_every_step_is_that_of_least_squares(
    network: str, site: str, predictor: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    step = CacheSteps(site=site, predictor=predictor, interval=3, warmup=1, front=0, correct=True)  # type: ignore[arg-type]
    result = step.apply(program, step.decide(program, calibration)).program
    chosen = result.plan.sites[0]
    assert chosen.correction is not None
    seen: dict[int, Tensor] = {}
    watch(
        program,
        [Watched("", chosen.value, chosen.base)],
        calibration,
        lambda at, _, value: seen.update({at: value}),
        "",
    )
    copied, real = by_channel(seen[3]), by_channel(seen[4])
    for channel in range(copied.shape[1]):
        columns = np.stack([copied[:, channel], np.ones(len(copied))], axis=1)
        expected = np.linalg.lstsq(columns, real[:, channel])[0]
        np.testing.assert_allclose(chosen.correction[4, :, channel], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(chosen.correction[3], np.stack([np.ones(copied.shape[1]), np.zeros(copied.shape[1])]))
    plain = CacheSteps(site=site, predictor=predictor, interval=3, warmup=1, front=0)  # type: ignore[arg-type]
    errors = [
        calibration.error(each)["relative_error"]
        for each in (result, plain.apply(program, plain.decide(program, calibration)).program)
    ]
    assert errors[0] < errors[1]
    expected_samples = run(result, calibration.conditions, calibration.seeds)
    for layout in ("variants", "segments"):
        found = run_lowered(result, lower(result, layout), calibration.conditions, calibration.seeds)
        torch.testing.assert_close(found, expected_samples, rtol=1e-5, atol=1e-5)


def test_correction_is_of_copies() -> None:
    with pytest.raises(RecipeError, match=r"correct needs predictor 'copy' or 'delta', found 'taylor1'"):
        CacheSteps(correct=True)
