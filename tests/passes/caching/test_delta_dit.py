"""Δ-DiT's two ranges where they overlap: a replay of its residuals in PyTorch, both layouts, and what a step runs."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.execute import run
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.rewrite import aten
from dcompile.compiler.variants import build_variant
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.random import normal

SEEDS = [5, 6]
TURN = 3


def cached(program: Program, **options: Any) -> Program:
    step = CacheSteps(method="delta_dit", turn=TURN, **options)
    return step.apply(program, Decision()).program


def by_hand(program: Program, ranges: dict[str, tuple[int, int]], every: int, copies: bool) -> np.ndarray:
    """Samples where a reused range adds the residual of the last full step, or is a copy of what left it then."""
    network = models.tokens()
    assert isinstance(network, models.Tokens)
    sampler = program.sampler
    sample = torch.from_numpy(normal(SEEDS, 0, (6, 4)) * np.float32(program.contract.initial_scale))
    kept: dict[str, torch.Tensor] = {}
    for step in range(program.steps):
        scaled = sample * float(sampler.s[step])
        time = torch.full((len(SEEDS), 1), float(sampler.timesteps[step]) / 1000)
        with torch.no_grad():
            hidden = [network.enter(scaled) + network.time(time)[:, None]]
            name = None if step % every == 0 else "rear" if step < TURN else "front"
            for number, block in enumerate(network.blocks):
                if name is None or not ranges[name][0] <= number < ranges[name][1]:
                    hidden.append(block(hidden[-1]))
                elif number == ranges[name][1] - 1:
                    hidden.append(kept[name] if copies else hidden[ranges[name][0]] + kept[name])
                else:
                    hidden.append(hidden[-1])  # read by nothing
            if name is None:
                kept = {
                    name: hidden[end] if copies else hidden[end] - hidden[start]
                    for name, (start, end) in ranges.items()
                }
            output = network.leave(hidden[-1])
        converted = float(sampler.p[step]) * sample + float(sampler.q[step]) * output
        sample = float(sampler.a[step]) * sample + float(sampler.b[step, 0]) * converted
    return sample.numpy()


@pytest.mark.parametrize("predictor", ["delta", "copy"])
@pytest.mark.parametrize("interval", [2, 3])
def test_overlapping_ranges_are_those_of_pytorch(tokens: Program, interval: int, predictor: str) -> None:
    program = cached(tokens, interval=interval, predictor=predictor)
    front, rear = program.plan.sites
    assert (front.name, rear.name) == ("blocks_0_1", "blocks_1_2")  # both hold the middle one of three
    assert (front.overlaps, rear.overlaps) == ((rear.name,), (front.name,))
    found = run(program, {}, SEEDS)
    expected = by_hand(tokens, {"front": (0, 2), "rear": (1, 3)}, interval, predictor == "copy")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - run(tokens, {}, SEEDS).numpy()).max() > 1e-3
    for layout in ("variants", "segments"):
        torch.testing.assert_close(run_lowered(program, lower(program, layout), {}, SEEDS), found, rtol=1e-5, atol=1e-5)


def test_a_step_runs_neither_the_range_that_it_reuses_nor_what_only_the_other_would_need(tokens: Program) -> None:
    program = cached(tokens)
    assert program.plan.masks == ((True, True), (True, False), (False, True))
    assert [program.plan.emits(mask) for mask in program.plan.masks] == [(True, True), (False, False), (False, False)]
    layers = [
        sum(rewrite.is_call(node, aten.linear.default) for node in build_variant(program, mask).graph.graph.nodes)
        for mask in program.plan.masks
    ]
    outside = 3  # into the network, of the time, and out of it
    assert layers == [3 * 2 + outside, 1 * 2 + outside, 1 * 2 + outside]


def test_ranges_that_do_not_overlap_leave_both_states_behind(tokens: Program) -> None:
    program = cached(tokens, front=2, back=2)
    assert all(site.overlaps == () for site in program.plan.sites)
    assert [program.plan.emits(mask) for mask in program.plan.masks] == list(program.plan.masks)


def test_two_ranges_that_are_one_are_refused(tokens: Program) -> None:
    with pytest.raises(Exception, match="found no site of kind 'stages'"):
        cached(tokens, front=0, back=0)
