"""TinyFusion's search: the gated network, its draws, what it learns; and the baseline that looks at weights alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, example_conditions
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.execute import initial_slots, step_values
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.regions import Region, all_blocks, block_lists, find_regions
from dcompile.passes.depth.removal import remove_blocks
from dcompile.passes.depth.supernet import gated, masks, with_updates
from dcompile.passes.depth.tinyfusion import draw, search_depth
from dcompile.passes.prune_layers import PruneLayers

CalibrationOf = Callable[[Program], Calibration]
ProgramOf = Callable[[str], Program]


def blocks_of(program: Program) -> list[Region]:
    return [block for found in block_lists(find_regions(program.graph)).values() for block in found]


# ---- the gated network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "of"), [(1, 1), (1, 2), (2, 4), (3, 4), (7, 14)])
def test_every_way_of_keeping_some(keep: int, of: int) -> None:
    expected = [[float(place in kept) for place in range(of)] for kept in itertools.combinations(range(of), keep)]
    assert masks(keep, of).tolist() == expected


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "tokens"])
def test_gates_of_one_and_zero_are_the_sliced_network_bit_for_bit(
    name: str, request: pytest.FixtureRequest, program_of: ProgramOf
) -> None:
    program: Program = request.getfixturevalue(name) if name in ("dit", "tokens") else program_of(name)
    blocks = blocks_of(program)
    module = gated(program.graph, blocks)
    conditions = example_conditions(program.contract, 2)
    values = step_values(program, 1, initial_slots(program, conditions, [0, 1]))
    assert len(blocks) >= 2
    for bits in itertools.product((1.0, 0.0), repeat=min(len(blocks), 3)):
        row = [*bits, *[1.0] * (len(blocks) - len(bits))]
        gone = [block.path for block, bit in zip(blocks, row, strict=True) if not bit]
        expected = remove_blocks(program, gone).graph(*values)
        found = module(*values, *(torch.tensor([bit]) for bit in row))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_updates_change_nothing_until_they_are_trained(dit: Program) -> None:
    module, paths = with_updates(dit.graph)
    linears = [node for node in dit.graph.graph.nodes if rewrite.is_call(node, torch.ops.aten.linear.default)]
    assert len(paths) == 2 * len(linears) > 0
    values = step_values(dit, 1, initial_slots(dit, {"class_labels": np.array([1, 2])}, [0, 1]))
    assert torch.equal(module(*values)[0], dit.graph(*values)[0])
    up = rewrite.attribute(module, paths[-1])
    down = rewrite.attribute(module, paths[-2])
    rewrite.assign(module, paths[-1], torch.randn(up.shape))
    moved = rewrite.finish(module)(*values)[0]
    assert not torch.allclose(moved, dit.graph(*values)[0], atol=1e-4)
    weight = str(linears[-1].all_input_nodes[1].target)
    merged = rewrite.clone(dit.graph)
    with torch.no_grad():
        total = rewrite.attribute(dit.graph, weight) + 2.0 * rewrite.attribute(module, paths[-1]) @ down
    rewrite.assign(merged, weight, total)
    torch.testing.assert_close(rewrite.finish(merged)(*values)[0], moved, rtol=1e-4, atol=1e-4)


# ---- the draw -------------------------------------------------------------------------------------------------------


def test_a_draw_keeps_as_many_of_each_group_for_each_sample() -> None:
    logits = [torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)]
    ways = masks(2, 4)
    drawn = draw(logits, ways, 64, 0.5, [3])
    assert drawn.shape == (64, 8)
    assert set(drawn.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(drawn.reshape(64, 2, 4).sum(-1).detach().round(), torch.full((64, 2), 2.0))
    assert len({tuple(row) for row in drawn[:, :4].detach().round().tolist()}) == 6  # not one for the whole batch
    (drawn * torch.arange(8.0)).sum().backward()
    assert all(float(each.grad.abs().sum()) > 0 for each in logits if each.grad is not None)
    assert torch.equal(draw(logits, ways, 64, 0.5, [3]), drawn)


def test_a_cold_draw_follows_the_logits() -> None:
    sure = torch.tensor([0.0, 1.0, 0.0])  # times 100: no noise turns it
    drawn = draw([sure], masks(1, 3), 1000, 1.0, [0])
    assert torch.equal(drawn.round(), torch.tensor([[0.0, 1.0, 0.0]]).repeat(1000, 1))
    even = draw([torch.full((2,), 0.02)], masks(1, 2), 4000, 1.0, [0])
    assert float(even[:, 0].mean()) == pytest.approx(0.5, abs=0.03)


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lopsided(dit: Program) -> Program:
    """Of its three blocks, the last two do nearly nothing."""
    weights = rewrite.weights(dit.graph)
    graph = rewrite.clone(dit.graph)
    for name, weight in weights.items():
        idle = any(f"transformer_blocks.{index}." in name for index in (1, 2))
        if idle and name.endswith(("to_out.0.weight", "to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")):
            rewrite.assign(graph, name, torch.nn.Parameter(weight.detach() * 0.01))
    return replace(dit, graph=rewrite.finish(graph))


def test_it_learns_which_block_matters(lopsided: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(lopsided)
    search = search_depth(lopsided, blocks_of(lopsided), 1, 3, calibration, steps=60, batch=16)
    assert search.kept == (0,)
    assert search.likely[0] > 1 / 3
    again = search_depth(lopsided, blocks_of(lopsided), 1, 3, calibration, steps=60, batch=16)
    assert again == search


def test_as_a_pass(lopsided: Program, calibration_of: CalibrationOf) -> None:
    step = PruneLayers(method="tinyfusion", keep=1, of=3, steps=30, batch=8)
    decision = step.decide(lopsided, calibration_of(lopsided))
    result = step.apply(lopsided, decision)
    assert len(all_blocks(result.program.graph)) == 1
    assert result.record.changed == 2
    assert len(result.record.details["likely"]) == 1
    left, original = rewrite.weights(result.program.graph), rewrite.weights(lopsided.graph)
    assert all(left[name] is original[name] for name in left)  # the updates are thrown away


def test_magnitude_is_of_the_weights_alone(lopsided: Program, calibration_of: CalibrationOf) -> None:
    decision = PruneLayers(method="magnitude", count=2).decide(lopsided, calibration_of(lopsided))
    assert set(decision.choices["removed"]) == {"net.transformer_blocks.1", "net.transformer_blocks.2"}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 3}, "prune_layers: keep is 3 of 2 blocks, needed 1 to 2"),
        ({"keep": 0}, "prune_layers: keep is 0 of 2 blocks, needed 1 to 2"),
        ({"steps": 0}, "prune_layers: steps is 0, needed 1 or more"),
        ({"batch": 2}, "prune_layers: batch is 2, needed 4 or more"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PruneLayers(method="tinyfusion", **options)


def test_groups_that_do_not_fit(dit: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match=r"the 3 blocks of net\.transformer_blocks are no groups of 2; choose another"):
        PruneLayers(method="tinyfusion").decide(dit, calibration_of(dit))


def test_a_network_without_blocks_in_a_row(unet: Program, tokens: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match=r"the 1 blocks of net\.mid_block\.attentions are no groups of 2"):
        PruneLayers(method="tinyfusion").decide(unet, calibration_of(unet))
    without = remove_blocks(tokens, [block.path for block in all_blocks(tokens.graph)])
    with pytest.raises(PassError, match="tinyfusion needs blocks in a row, and the network has none"):
        PruneLayers(method="tinyfusion").decide(without, calibration_of(tokens))


def test_all_of_them_kept_is_nothing_done(dit: Program, calibration_of: CalibrationOf) -> None:
    step = PruneLayers(method="tinyfusion", keep=3, of=3)
    result = step.apply(dit, step.decide(dit, calibration_of(dit)))
    assert result.program is dit
    assert step.decide(dit, calibration_of(dit)) == Decision({"removed": []})
