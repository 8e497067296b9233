"""Learned gates: what one and zero mean, their gradient, the budget, and that learning beats chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import initial_slots
from dcompile.compiler.plan import Plan, Site, taylor
from dcompile.compiler.program import Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.router import _Learner, _mixed, _open_most
from dcompile.passes.caching.sites import find_sites

CalibrationOf = Callable[[Program], Calibration]


def test_open_gates_change_nothing_and_shut_ones_take_the_state(dit: Program) -> None:
    sites = find_sites(dit.graph, "branch", refused=[])
    learner = _Learner(dit, sites, [site.unit for site in sites], pairs=False)
    slots = initial_slots(dit, {"class_labels": np.array([1, 2])}, [0, 1])
    values = learner._values(0, slots, 2)
    module = _mixed(dit.graph, sites)
    ones, zeros = [torch.ones(())] * len(sites), [torch.zeros(())] * len(sites)
    with torch.no_grad():
        plain = dit.graph(*values)
        opened = module(*values, *ones, *zeros)
        shut = module(*values, *zeros, *opened[1:])  # each takes what it would have computed
        empty = module(*values, *zeros, *zeros)
    torch.testing.assert_close(opened[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(shut[0], plain[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(empty[0], plain[0], atol=1e-2)


def test_gradient_of_a_gate(dit: Program) -> None:
    sites = find_sites(dit.graph, "branch", refused=[])
    learner = _Learner(dit, sites, [site.unit for site in sites], pairs=False)
    values = learner._values(2, initial_slots(dit, {"class_labels": np.array([1])}, [0]), 1)
    states = [torch.zeros(())] * len(sites)
    gates = [torch.tensor(0.6, requires_grad=index == 1) for index in range(len(sites))]

    def loss(gate: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = learner.module(*values, gates[0], gate, *gates[2:], *states)[0].square().mean()
        return result

    (slope,) = torch.autograd.grad(loss(gates[1]), gates[1])
    with torch.no_grad():
        measured = (loss(torch.tensor(0.61)) - loss(torch.tensor(0.59))) / 0.02
    torch.testing.assert_close(slope, measured, rtol=2e-2, atol=1e-5)


def test_the_most_open_gates_are_kept() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0], [2.0, 5.0], [1.0, 0.5]])
    assert _open_most(logits, ["a", "b"], 0.5, pairs=False) == {"a": [0, 1], "b": [0, 2]}
    pairs = _open_most(logits, ["a", "b"], 0.625, pairs=True)
    assert pairs == {"a": [0, 1, 2], "b": [0, 2]}


def test_learning_beats_chance_at_the_same_cost(dit: Program, calibration_of: CalibrationOf) -> None:
    """Of 20 random masks of the same share, most are worse."""
    calibration = calibration_of(dit)
    step = CacheSteps(method="harmonica", interval=2, runs=30)
    result = step.apply(dit, step.decide(dit, calibration)).program
    sites = result.plan.sites
    computed = np.array([site.computed for site in sites])
    assert computed.sum() + dit.steps * (6 - len(sites)) == round(0.5 * dit.steps * 6)
    learned = calibration.error(result)["relative_error"]
    random = np.random.default_rng(0)
    worse = 0
    for _ in range(20):
        rows = np.zeros(computed.size, bool)
        rows[random.permutation(computed.size)[: computed.sum()]] = True
        mask = rows.reshape(computed.shape)
        mask[:, 0] = True
        drawn = []
        for site, row in zip(sites, mask.tolist(), strict=True):
            reuse, refresh = taylor(row, 0)
            drawn.append(Site(site.name, site.value, None, tuple(row), reuse, refresh))
        plan = Plan(dit.steps, tuple(drawn))
        worse += calibration.error(replace(dit, plan=plan))["relative_error"] > learned
    assert worse >= 15
    assert rewrite.placeholders(dit.graph).keys() == rewrite.placeholders(result.graph).keys()
