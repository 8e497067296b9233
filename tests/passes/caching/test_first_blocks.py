"""Decisions by the first blocks against diffusers and cache-dit: the same steps computed, the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import models
import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import PassResult, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.random import normal

STEPS = 12
SEED = [5]


@pytest.fixture(scope="module")
def program() -> Program:
    architecture = models.ARCHITECTURES["flux"]
    return ingest(Source(architecture.spec, architecture.shape, None, architecture.sampler, STEPS))


def conditions_of(program: Program) -> dict[str, Tensor]:
    return {
        each.name: torch.from_numpy(normal(SEED, 7 + number, each.shape))
        for number, each in enumerate(program.contract.conditions)
    }


@torch.no_grad()
def by_diffusers(program: Program, accelerate: Callable[[Any], object]) -> tuple[np.ndarray, list[tuple[bool, bool]]]:
    """(sample, per step whether the last double block and the last single block ran)."""
    network: Any = models.flux()
    seen: set[str] = set()
    for name in ("transformer_blocks", "single_transformer_blocks"):
        getattr(network, name)[-1].attn.register_forward_hook(lambda *_, name=name: seen.add(name))
    accelerate(network)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    given = conditions_of(program)
    extra = {
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(given["encoder_hidden_states"].shape[1], 3),
    }
    x = torch.from_numpy(normal(SEED, 0, program.contract.sample.shape))
    ran = []
    with network.cache_context("one"):
        for t in scheduler.timesteps:
            seen.clear()
            output = network(x, timestep=t.expand(1) / 1000, **given, **extra, return_dict=False)[0]
            ran.append(("transformer_blocks" in seen, "single_transformer_blocks" in seen))
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return x.numpy(), ran


def by_us(program: Program, **options: Any) -> tuple[PassResult, np.ndarray, list[tuple[bool, bool]]]:
    given = {name: value.numpy() for name, value in conditions_of(program).items()}
    step = CacheSteps(**options)
    calibration = Calibration(given, SEED, program, run(program, given, SEED))
    result = step.apply(program, step.decide(program, calibration))
    masks: list[dict[str, bool]] = []
    names = [site.name for site in result.program.plan.sites]
    found = run(
        result.program, given, SEED,
        on_inputs=lambda step, mask, values: masks.append(dict(zip(names, mask, strict=True))),
    ).numpy()  # fmt: skip
    single = next(name for name in names if name.startswith("single"))
    return result, found, [(mask[names[0]], mask[single]) for mask in masks]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 1.0])
def test_fbcache_against_diffusers(program: Program, threshold: float) -> None:
    result, found, computed = by_us(program, method="fbcache", threshold=threshold)
    config = FirstBlockCacheConfig(threshold)
    expected, ran = by_diffusers(program, lambda network: apply_first_block_cache(network, config))
    assert computed == ran
    assert set(ran) == {(True, True), (False, False)}
    plan = result.program.plan  # what is to be expected is what this request decided
    assert [all(plan.mask(step)) for step in range(STEPS)] == [double for double, _ in ran]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.8])
def test_dbcache_against_cache_dit(program: Program, threshold: float) -> None:
    """Each block list decides for itself, by its own first block."""
    cache_dit = pytest.importorskip("cache_dit", reason="needs the package cache-dit")
    options = {"method": "dbcache", "front": 1, "warmup": 2, "threshold": threshold}
    _, found, computed = by_us(program, **options)

    def accelerate(network: Any) -> None:
        pattern = cache_dit.ForwardPattern.Pattern_1
        adapter = cache_dit.BlockAdapter(
            transformer=network,
            blocks=[network.transformer_blocks, network.single_transformer_blocks],
            forward_pattern=[pattern, pattern],
            check_forward_pattern=False,
        )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=threshold,
            num_inference_steps=STEPS,
        )  # fmt: skip
        cache_dit.enable_cache(adapter, cache_config=config)

    expected, ran = by_diffusers(program, accelerate)
    assert computed == ran
    assert not all(double for double, _ in ran) or not all(single for _, single in ran)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_frozen_decisions_are_a_plan(program: Program) -> None:
    options = {"method": "fbcache", "threshold": 0.7}
    deciding, expected, computed = by_us(program, **options)
    frozen, found, again = by_us(program, freeze=True, **options)
    assert deciding.program.plan.predicates
    assert not frozen.program.plan.predicates
    assert again == computed
    np.testing.assert_array_equal(found, expected)
