"""E-DiT's routers: their numbers in the graph, what they open and shut, their training, and the bounds of the vote."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import fx
from torch.nn import functional

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import initial_slots, step_values
from dcompile.compiler.program import Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching.edit import USES, Routed, frozen, routed
from dcompile.passes.caching.rollout import Judge, Rollout
from dcompile.passes.caching.sites import Candidate, find_sites

CalibrationOf = Callable[[Program], Calibration]
ProgramOf = Callable[[str], Program]


def blocks_of(program: Program) -> tuple[tuple[Candidate, ...], list[str]]:
    sites = find_sites(program.graph, "block", refused=[])
    return sites, list(dict.fromkeys(site.unit for site in sites))


@pytest.mark.parametrize("name", ["dit", "sd3", "unet2d"])
def test_routers_in_the_graph_are_those_of_plain_torch(name: str, program_of: ProgramOf) -> None:
    """One stream of tokens, two of them, and images."""
    program = program_of(name)
    sites, units = blocks_of(program)
    module, routers = routed(program.graph, sites, units)
    generator = torch.Generator().manual_seed(0)
    for value in routers.parameters():
        torch.nn.init.normal_(value, std=0.3, generator=generator)
    conditions = {
        each.name: np.ones((2, *each.shape), each.dtype) * (1 if each.dtype == "int64" else 0.5)
        for each in program.contract.conditions
    }
    conditions = {name: value.astype(each.dtype) for each in program.contract.conditions
                  for name, value in conditions.items() if name == each.name}  # fmt: skip
    values = step_values(program, 1, initial_slots(program, conditions, [0, 1]))
    seen: dict[str, torch.Tensor] = {}

    class Show(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Show(program.graph).run(*values)
        opened = module(*values, *[torch.ones(1)] * len(units), *[torch.zeros(())] * len(sites))[-1]
    weights = {key: value.detach() for key, value in routers.named_parameters()}
    for index, unit in enumerate(units):
        parts = []
        for site in sites:
            if site.unit == unit:
                x = seen[site.base or ""]
                x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
                parts.append((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
        hidden = torch.cat(parts, 1) @ weights[f"{index}.up.weight"].T + weights[f"{index}.up.bias"]
        logit = functional.relu(hidden).mean(1) @ weights[f"{index}.down.weight"][0] + weights[f"{index}.down.bias"]
        torch.testing.assert_close(opened[index], 1 / (1 + torch.exp(-logit)), rtol=1e-4, atol=1e-5)
    assert opened.std() > 0.01


def test_open_routers_change_nothing_and_shut_ones_are_the_mask(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    sites, units = blocks_of(dit)
    rollout = Rollout(dit, sites, delta=True)
    free = np.arange(dit.steps) >= 3
    learner = Routed(dit, sites, free)
    reached: list[torch.Tensor] = []
    for bias in ((40.0, 40.0, 40.0), (40.0, -40.0, -40.0)):
        for router, value in zip(learner.routers, bias, strict=True):
            torch.nn.init.constant_(router.down.bias, value)  # type: ignore[union-attr, arg-type]
        errors = [
            float(error.detach()) for error, _ in learner.steps(calibration.conditions, calibration.seeds, teach=True)
        ]
        masks = np.ones((dit.steps, len(units)), bool)
        masks[free] = np.array(bias) > 0
        reached.append(rollout.samples(masks, calibration.conditions, calibration.seeds))
        torch.testing.assert_close(learner.sample, reached[-1], rtol=1e-5, atol=1e-5)
        assert len(errors) == 3
        assert all(error < 1e-9 for error in errors) if bias[1] > 0 else all(error > 1e-6 for error in errors)
    torch.testing.assert_close(reached[0], calibration.teacher)
    assert not torch.allclose(reached[1], calibration.teacher, atol=1e-3)


def test_training_learns_which_blocks_matter(dit: Program, calibration_of: CalibrationOf) -> None:
    """The share is met, and few masks of that share are better: four of nine evaluations are to be left out."""
    calibration = calibration_of(dit)
    step = CacheSteps(method="edit", share=0.8, runs=30)
    decision = step.decide(dit, calibration)
    assert decision.choices == step.decide(dit, calibration).choices
    computed = decision.choices["computed"]
    assert all(steps[:3] == [0, 1, 2] for steps in computed.values())
    assert sum(map(len, computed.values())) == round(0.8 * 18)
    sites, units = blocks_of(dit)
    masks = np.array([[step in computed[unit] for unit in units] for step in range(dit.steps)])
    judge = Judge(Rollout(dit, sites, delta=True), calibration)
    others = []
    for shut in combinations(range(9), 18 - int(masks.sum())):
        other = np.ones_like(masks)
        other[3:].flat[list(shut)] = False
        others.append(judge.errors(other).mean())
    assert np.mean(judge.errors(masks).mean() < np.array(others)) > 0.7


def test_the_vote_keeps_to_its_bounds() -> None:
    free = np.arange(40) >= 20
    said = np.linspace(0, 1, 40, dtype=np.float32).reshape(20, 2)
    masks = frozen(said, free, 0.25)
    assert masks[:20].all()
    assert masks[35:].all()
    assert masks[20:35].sum() == 2 * 1  # one a block: ten uses, then the eleventh step computes
    assert masks[20 + USES].all()
    assert frozen(said, free, 1.0).all()


def test_what_has_no_input_has_no_router(dit: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match="routers read the input of what they switch; use site 'block' or 'range'"):
        CacheSteps(method="edit", site="branch", predictor="copy").decide(dit, calibration_of(dit))
