"""The U-Net cut against the package DeepCache, at every branch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch

from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run
from dcompile.compiler.program import Decision, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.random import normal

SEEDS = [0, 1]


@pytest.fixture(scope="module")
def program() -> Program:
    from dcompile.compiler.ingest import Source, ingest

    return ingest(Source("models:unet_condition", sampler="ddim", steps=6))


def by_deepcache(branch: int, interval: int, states: torch.Tensor, steps: int) -> np.ndarray:
    """Samples of the same network under DeepCacheSDHelper and diffusers' own scheduler."""
    import diffusers
    from DeepCache import DeepCacheSDHelper

    network: Any = models.unet_condition()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=network, scheduler=scheduler))
    # The package counts three layers a block; this network has two, so its own numbers are given.
    helper.set_params(cache_interval=interval, cache_branch_id=3 * (branch // 2) + branch % 2)
    helper.enable()
    sample = torch.from_numpy(normal(SEEDS, 0, (4, 8, 8)) * np.float32(scheduler.init_noise_sigma))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = network(sample, timestep, encoder_hidden_states=states).sample
            sample = scheduler.step(output, timestep, sample).prev_sample
    return sample.numpy()


@pytest.mark.parametrize("branch", range(4))
@pytest.mark.parametrize("interval", [2, 3])
def test_every_branch(program: Program, branch: int, interval: int) -> None:
    pytest.importorskip("DeepCache", reason="needs the package DeepCache")
    (condition,) = program.contract.conditions
    states = torch.from_numpy(normal(SEEDS, 9, tuple(condition.shape)))
    cached = CacheSteps(method="deepcache", branch=branch, interval=interval).apply(program, Decision()).program
    found = run(cached, {condition.name: states.numpy()}, SEEDS).numpy()
    expected = by_deepcache(branch, interval, states, program.steps)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    plain = run(program, {condition.name: states.numpy()}, SEEDS).numpy()
    assert np.abs(found - plain).max() > 1e-3


def test_a_branch_that_is_not_there(program: Program) -> None:
    with pytest.raises(PassError, match=r"cut 4: the network has 4 up layers; give branch 0 to 3"):
        CacheSteps(method="deepcache", branch=4).apply(program, Decision())
