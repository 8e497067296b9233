"""Blocks and widths by step: the parts of a feed-forward, the routers' numbers, what they open, and engines of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from requests_of_programs import samples_of, values_of
from torch.nn import functional

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.regions import all_blocks
from dcompile.compiler.validate import validate
from dcompile.exporters.lower import lower
from dcompile.exporters.onnx.target import TARGET
from dcompile.exporters.parity import check_parity
from dcompile.exporters.target import TargetOptions
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.choose_steps import ChooseSteps
from dcompile.passes.elastic.deciding import by_range, opened_by_group, opened_by_share, ranges_of, widths_of
from dcompile.passes.elastic.routers import (
    OPENED,
    ROUTERS,
    WIDTHS,
    ElasticBlock,
    budget_loss,
    part_ends,
    route,
    with_routers,
)  # fmt: skip
from dcompile.passes.elastic.widths import write_parts
from dcompile.passes.elastic_blocks import ElasticBlocks
from dcompile.passes.experts.feed_forward import find_feed_forwards, run_units

CalibrationOf = Callable[[Program], Calibration]
ProgramOf = Callable[[str], Program]
HALF = ElasticBlocks(share=0.6, width=0.5, ranges=2, steps=120, batch=8, rate=2e-3)


def elastic_blocks(program: Program) -> list[ElasticBlock]:
    feeds = find_feed_forwards(program.graph)
    random = torch.Generator().manual_seed(0)
    return [
        ElasticBlock(
            region,
            [(feed, torch.randperm(feed.hidden, generator=random)) for feed in feeds if feed.down in region.nodes],
        )
        for region in all_blocks(program.graph)
    ]


# ---- widths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "sd3", "wan"])
def test_parts_add_up(name: str, request: pytest.FixtureRequest, program_of: ProgramOf) -> None:
    program: Program = request.getfixturevalue(name) if name == "dit" else program_of(name)
    feed = find_feed_forwards(program.graph)[0]
    units = torch.randperm(feed.hidden, generator=torch.Generator().manual_seed(0))
    graph = rewrite.clone(program.graph)
    totals = write_parts(graph, feed, units, part_ends(feed.hidden, 4))
    made = program.with_graph(rewrite.finish(graph))
    for found, expected in zip(made.graph(*values_of(made)), program.graph(*values_of(program)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    graph = rewrite.clone(made.graph)
    shown = rewrite.node_named(graph, feed.entry), rewrite.node_named(graph, totals[1].name)
    rewrite.output_node(graph).args = (shown,)
    with torch.no_grad():
        entry, half = rewrite.finish(graph)(*values_of(made))
    bias = rewrite.attribute(program.graph, str(rewrite.node_named(program.graph, feed.down).all_input_nodes[2].target))
    expected = run_units(program.graph, feed, units[: feed.hidden // 2], entry) + bias
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-5)


# ---- routers --------------------------------------------------------------------------------------------------------


def test_a_router_is_what_elastic_dit_says() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    up, down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)
    tokens = functional.layer_norm(torch.cat([x, y], dim=1), (6,))
    expected = torch.stack([torch.stack([down(torch.relu(up(token))) for token in row]).mean(0) for row in tokens])
    torch.testing.assert_close(route(4, up.weight, up.bias, down.weight, down.bias, x, y), expected)


def opened_as(program: Program, opened: dict[int, float], width: int) -> Program:
    """The network with routers whose biases alone speak. opened: block -> logit, 5 for those that are not in it."""
    blocks = elastic_blocks(program)
    graph = with_routers(program.graph, blocks, 4)
    for index in range(len(blocks)):
        biases = torch.full((5,), -5.0)
        biases[0], biases[width] = opened.get(index, 5.0), 5.0
        rewrite.assign(graph, f"{ROUTERS}.{index}.down_bias", biases)
        weight = rewrite.attribute(graph, f"{ROUTERS}.{index}.down")
        rewrite.assign(graph, f"{ROUTERS}.{index}.down", torch.zeros_like(weight))
    return program.with_graph(graph)


@pytest.mark.parametrize("name", ["dit", "sd3", "unet2d"])
def test_all_open_and_whole_is_the_network(name: str, request: pytest.FixtureRequest, program_of: ProgramOf) -> None:
    program: Program = request.getfixturevalue(name) if name == "dit" else program_of(name)
    made = opened_as(program, {}, 4)
    for found, expected in zip(made.graph(*values_of(program)), program.graph(*values_of(program)), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=0 if name != "unet2d" else 1e-5
        )  # kernels of another layout


def test_shut_and_narrow_is_what_the_plan_computes(dit: Program) -> None:
    blocks = elastic_blocks(dit)
    step = ElasticBlocks()
    widths = {block.region.path: [2] * dit.steps for block in blocks}
    widths[blocks[1].region.path] = [0] * dit.steps
    tensors = {f"{feed.path}.units": units.numpy() for block in blocks for feed, units in block.feeds}
    planned = step.apply(dit, Decision({"widths": widths}, tensors)).program
    validate(planned)
    routed = opened_as(dit, {1: -5.0}, 2)
    torch.testing.assert_close(samples_of(planned), samples_of(routed), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(samples_of(planned), samples_of(dit), atol=1e-3)


def test_gradients_reach_the_routers_through_hard_decisions(dit: Program) -> None:
    graph = with_routers(dit.graph, elastic_blocks(dit), 4)
    opened, wide = (rewrite.node_named(graph, name) for name in (OPENED, WIDTHS))
    rewrite.output_node(graph).args = ((*rewrite.output_values(graph), opened, wide),)
    graph.recompile()
    bias = rewrite.attribute(graph, f"{ROUTERS}.1.down_bias").requires_grad_()
    found, _, wide_chances = (
        graph(*values_of(dit)) if len(rewrite.output_values(dit.graph)) == 1 else graph(*values_of(dit))[-3:]
    )
    assert wide_chances.shape[::2] == (3, 4)
    (slope,) = torch.autograd.grad(found.square().sum(), bias)
    assert (slope != 0).all()


def test_the_budget() -> None:
    opened = torch.tensor([[0.9, 0.9], [0.2, 0.2]])
    wide = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])  # of the first block: 1 and 0.5
    assert float(budget_loss(opened, wide, 0.55, 0.75)) == pytest.approx(0.0, abs=1e-12)
    assert float(budget_loss(opened, wide, 0.35, 0.75)) == pytest.approx(0.04)
    assert float(budget_loss(opened, wide, 0.55, 0.5)) == pytest.approx(0.0625)


# ---- decisions ------------------------------------------------------------------------------------------------------


def test_ranges_cover_all_steps() -> None:
    for steps in range(1, 12):
        for count in range(1, 6):
            found = [step for own in ranges_of(steps, count) for step in own]
            assert found == list(range(steps))
            assert len(ranges_of(steps, count)) == min(count, steps)


def test_the_likeliest_blocks_are_computed() -> None:
    chances = np.array([[0.9, 0.2, 0.6], [0.9, 0.2, 0.6], [0.1, 0.3, 0.7], [0.1, 0.5, 0.7]])
    opened = opened_by_share(chances, 0.5, 2)
    assert opened.tolist() == [[True, False, True]] * 2 + [[False, False, True]] * 2
    assert opened_by_share(chances, 1.0, 2).all()
    assert opened_by_share(chances, 0.01, 2).sum(axis=1).tolist() == [1, 1, 1, 1]
    assert by_range(chances, 1).std(axis=0).max() == 0.0


def test_neighbours_of_a_group() -> None:
    chances = np.array([[0.1, 0.8, 0.7, 0.9, 0.2, 0.3, 0.5]])
    assert opened_by_group(chances, 3, 2, 1)[0, :3].tolist() == [False, True, True]
    assert opened_by_group(chances, 3, 2, 1)[0, 3:6].tolist() == [True, True, False]
    assert opened_by_group(chances, 3, 2, 1)[0, 6]  # left over


def test_widths_where_blocks_are_computed() -> None:
    chances = np.array([[[0.1, 0.9], [0.8, 0.2]]])
    assert widths_of(chances, np.array([[True, True]]), 1).tolist() == [[2, 1]]
    assert widths_of(chances, np.array([[True, False]]), 1).tolist() == [[2, 0]]


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decided(dit: Program, calibration_of: CalibrationOf) -> Decision:
    return HALF.decide(dit, calibration_of(dit))


@pytest.fixture(scope="module")
def elastic(dit: Program, decided: Decision) -> Program:
    result = HALF.apply(dit, decided)
    assert 0.4 < result.record.details["computed_share"] <= 0.6
    validate(result.program)
    assert result.program.plan.sites
    assert len(result.program.plan.masks) == 2
    return result.program


def test_training_makes_up_for_what_is_left_out(
    dit: Program, decided: Decision, elastic: Program, calibration_of: CalibrationOf
) -> None:
    assert decided.choices["loss"][-1][1] < decided.choices["loss"][0][1]
    orders = {name: value for name, value in decided.tensors.items() if name.endswith(".units")}
    untrained = HALF.apply(dit, Decision(decided.choices, orders)).program
    error = calibration_of(dit).error
    assert error(elastic)["relative_error"] < 0.9 * error(untrained)["relative_error"]


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_as_engines(layout: Any, elastic: Program, tmp_path: Path) -> None:
    lowered = lower(elastic, layout)
    assert len(lowered.engines) > 1
    assert not lowered.states
    written = TARGET.write(lowered, tmp_path, TargetOptions(threads=1), lambda name: None)
    parity = check_parity(elastic, lowered, written.open, lambda fraction: None)
    assert all(result.relative_error < 1e-5 for result in parity)


def test_groups_keep_neighbours(dit: Program, calibration_of: CalibrationOf) -> None:
    step = ElasticBlocks(group=3, keep=2, width=1.0, widths=1, steps=4, batch=4)
    decision = step.decide(dit, calibration_of(dit))
    rows = np.array(list(decision.choices["widths"].values())).T
    assert {tuple(row) for row in rows.tolist()} <= {(1, 1, 0), (0, 1, 1)}
    with pytest.raises(PassError, match="group is 4, and the network has 3 blocks"):
        replace(step, group=4).decide(dit, calibration_of(dit))


def test_a_dry_run_needs_no_training(dit: Program) -> None:
    assert ElasticBlocks().apply(dit, Decision()).program is dit


def test_what_it_refuses(dit: Program, elastic: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match="already has cache sites"):
        CacheSteps(interval=2).apply(elastic, Decision())
    late = replace(dit, history=(ChooseSteps(count=4).apply(dit, Decision()).record,))
    with pytest.raises(PassError, match="elastic_blocks: choose_steps came before; put elastic before it"):
        ElasticBlocks().decide(late, calibration_of(dit))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "elastic_blocks: share is 0.0, needed more than 0, at most 1"),
        ({"width": 1.5}, "elastic_blocks: width is 1.5, needed more than 0, at most 1"),
        ({"ranges": 0}, "elastic_blocks: ranges is 0, needed 1 or more"),
        ({"group": 2, "keep": 3}, "elastic_blocks: keep is 3 of 2 blocks, needed 1 to 2"),
        ({"rate": 0.0}, "elastic_blocks: rate is 0.0, needed more than 0"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ElasticBlocks(**options)
