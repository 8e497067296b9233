"""DDT's shared condition: against a network of its form in PyTorch that is given the condition of an earlier step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.segmentation import leader_first
from dcompile.runtime.random import normal

SEEDS = [5, 6]


@pytest.fixture(scope="module")
def ddt(tmp_path_factory: pytest.TempPathFactory) -> Program:
    contract = tmp_path_factory.mktemp("ddt") / "contract.yaml"
    contract.write_text(models.TOKENS_CONTRACT)
    return ingest(Source("models:shared_condition", contract=Path(contract), sampler="flow_euler", steps=8))


def by_hand(program: Program, leaders: tuple[int, ...]) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Samples where the condition is worked out at these steps alone, and the condition that each step had."""
    network = models.shared_condition()
    assert isinstance(network, models.SharedCondition)
    sampler = program.sampler
    had: list[torch.Tensor] = []
    sample = torch.from_numpy(normal(SEEDS, 0, (6, 4)) * np.float32(program.contract.initial_scale))
    for step in range(program.steps):
        scaled = sample * float(sampler.s[step])
        with torch.no_grad():
            time = torch.full((len(SEEDS),), float(sampler.timesteps[step]))
            had.append(network.condition(scaled, time) if step in leaders else had[-1])
            output = network.velocity(scaled, had[-1])
        converted = float(sampler.p[step]) * sample + float(sampler.q[step]) * output
        sample = float(sampler.a[step]) * sample + float(sampler.b[step, 0]) * converted
    return sample.numpy(), had


def test_the_condition_is_copied_whole_with_the_time_in_it(ddt: Program) -> None:
    cached = CacheSteps(method="ddt", schedule="keys", keys=(0, 2, 5), back=2).apply(ddt, Decision()).program
    found = run(cached, {}, SEEDS).numpy()
    np.testing.assert_allclose(found, by_hand(ddt, (0, 2, 5))[0], rtol=1e-4, atol=1e-4)
    assert np.abs(found - by_hand(ddt, tuple(range(8)))[0]).max() > 1e-2


def test_its_steps_are_those_of_the_dynamic_program_on_cosines(
    ddt: Program, calibration_of: Callable[[Program], Calibration]
) -> None:
    step = CacheSteps(method="ddt", interval=3, back=2)
    decided = step.decide(ddt, Calibration({}, SEEDS, ddt, calibration_of(ddt).teacher)).choices["computed"]
    had = torch.stack(by_hand(ddt, tuple(range(8)))[1]).flatten(2)
    cosines = torch.nn.functional.cosine_similarity(had[:, None], had[None], dim=-1).mean(-1)
    assert decided == {"encoder": list(leader_first(1 - cosines.double().numpy(), 3)[0])}


def test_on_a_plain_network_it_is_what_enters_the_last_blocks(dit: Program, tokens: Program) -> None:
    for program in (dit, tokens):
        site = CacheSteps(method="ddt", schedule="interval").apply(program, Decision()).program.plan.sites[0]
        assert site.value == program.regions[-2].streams[0].exit  # one of three blocks is the decoder
        assert site.base is None


def test_two_streams_leave_the_encoder(program_of: Callable[[str], Program]) -> None:
    program = program_of("flux")
    step = CacheSteps(method="ddt", schedule="interval")
    sites = step.apply(program, Decision()).program.plan.sites
    assert {site.value for site in sites} == set(program.regions[-2].outputs)


def test_a_decoder_of_every_block_is_refused(dit: Program) -> None:
    step = CacheSteps(method="ddt", schedule="interval", back=3)
    with pytest.raises(Exception, match="found no site of kind 'encoder'"):
        step.apply(dit, Decision())
