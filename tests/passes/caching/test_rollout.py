"""Trajectories under masks: those of the oracle for the same plan, at the operations of its variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import run
from dcompile.compiler.flops import sample_flops
from dcompile.compiler.plan import Plan, Site, taylor
from dcompile.compiler.program import Program
from dcompile.passes.caching.rollout import Rollout
from dcompile.passes.caching.sites import find_sites

CalibrationOf = Callable[[Program], Calibration]


@pytest.mark.parametrize("network", ["dit", "unet"])
@pytest.mark.parametrize(("kind", "delta"), [("branch", False), ("block", True), ("output", True)])
def test_any_mask_is_that_of_its_plan(
    network: str, kind: str, delta: bool, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration = calibration_of(program)
    sites = find_sites(program.graph, kind, refused=[])
    sites = tuple(site for site in sites if site.base is not None or not delta)
    rollout = Rollout(program, sites, delta=delta)
    random = np.random.default_rng(0)
    for _ in range(3):
        masks = random.random((program.steps, len(sites))) < 0.5
        masks[0] = True
        plan = Plan(
            program.steps,
            tuple(
                Site(site.name, site.value, site.base if delta else None, tuple(row), *taylor(row, 0))
                for site, row in zip(sites, masks.T.tolist(), strict=True)
            ),
        )
        planned = replace(program, plan=plan)
        found = rollout.samples(masks, calibration.conditions, calibration.seeds)
        torch.testing.assert_close(found, run(planned, calibration.conditions, calibration.seeds), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, calibration.teacher, atol=1e-4)
        assert rollout.flops(masks) == pytest.approx(sample_flops(planned))
    every_step = np.ones((program.steps, len(sites)), bool)
    torch.testing.assert_close(
        rollout.samples(every_step, calibration.conditions, calibration.seeds), calibration.teacher
    )
