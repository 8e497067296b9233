"""Feed-forwards as experts: which are found, how units are dealt, that the layer is what its parts say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from requests_of_programs import values_of
from torch import Tensor

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, example_conditions
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.execute import initial_slots, step_values
from dcompile.compiler.flops import node_flops, sample_flops
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.lower import lower
from dcompile.exporters.onnx.target import TARGET
from dcompile.exporters.parity import check_parity
from dcompile.exporters.target import TargetOptions
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.experts.feed_forward import FeedForward, find_feed_forwards, run_units
from dcompile.passes.experts.grouping import Router, Split, deal, fit_routers, importances, taken_by
from dcompile.passes.experts.layer import replace_feed_forward
from dcompile.passes.mixture_of_experts import MixtureOfExperts
from dcompile.passes.recover import Recover

CalibrationOf = Callable[[Program], Calibration]
ProgramOf = Callable[[str], Program]
SMALL = {"experts": 4, "active": 1}


def seen(program: Program, names: list[str]) -> list[Tensor]:
    """The values of some nodes in one step."""
    graph = rewrite.clone(program.graph)
    rewrite.output_node(graph).args = (tuple(rewrite.node_named(graph, name) for name in names),)
    with torch.no_grad():
        return list(rewrite.finish(graph)(*values_of(program)))


# ---- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "hidden"),
    [("dit", 3, 128), ("sd3", 5, 128), ("flux", 4, 128), ("pixart", 2, 128), ("wan", 2, 64), ("unet_condition", 4, 64)],
)
def test_feed_forwards_of(
    name: str, count: int, hidden: int, request: pytest.FixtureRequest, program_of: ProgramOf
) -> None:
    """Plain and gated; not the layers of flux's single blocks, whose hidden units share a layer with attention."""
    program: Program = request.getfixturevalue(name) if name == "dit" else program_of(name)
    feeds = find_feed_forwards(program.graph)
    assert [feed.hidden for feed in feeds][:1] == [hidden]
    assert len(feeds) == len({feed.path for feed in feeds}) == count
    for feed in feeds:
        entry, down = seen(program, [feed.entry, feed.down])
        found = run_units(program.graph, feed, torch.arange(feed.hidden), entry)
        bias = rewrite.attribute(
            program.graph, str(rewrite.node_named(program.graph, feed.down).all_input_nodes[2].target)
        )
        torch.testing.assert_close(found + bias, down, rtol=1e-5, atol=1e-5)


def test_none_in_a_network_of_convolutions(unet: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match="found no feed-forward"):
        MixtureOfExperts().decide(unet, calibration_of(unet))


# ---- how units are dealt --------------------------------------------------------------------------------------------


def test_the_best_are_shared_and_the_rest_dealt_in_turn() -> None:
    split = deal(np.array([5.0, 1.0, 7.0, 3.0, 2.0, 6.0, 4.0, 0.0]), shared=2, experts=3)
    assert split.units.tolist() == [2, 5, 0, 4, 6, 1, 3, 7]
    assert [split.of_expert(index).tolist() for index in range(3)] == [[0, 4], [6, 1], [3, 7]]
    assert sorted(split.units) == list(range(8))


def test_a_unit_that_nothing_reads_matters_nothing(dit: Program, calibration_of: CalibrationOf) -> None:
    feeds = find_feed_forwards(dit.graph)
    graph = rewrite.clone(dit.graph)
    name = str(rewrite.node_named(graph, feeds[1].down).all_input_nodes[1].target)
    weight = rewrite.attribute(graph, name).detach().clone()
    weight[:, 5] = 0.0
    weight[:, 9] *= 10.0
    rewrite.assign(graph, name, weight)
    changed = dit.with_graph(rewrite.finish(graph))
    before = importances(dit, feeds, calibration_of(dit))
    after = importances(changed, feeds, calibration_of(dit))
    assert after[1][5] == 0.0 < before[1][5]
    assert after[1][9] > 10 * before[1][9]
    assert all((each > 0).all() for each in before)


def test_routers_know_which_expert_adds_most(dit: Program, calibration_of: CalibrationOf) -> None:
    feeds = find_feed_forwards(dit.graph)
    splits = [deal(np.arange(feed.hidden, dtype=np.float64), feed.hidden // 4, 4) for feed in feeds]
    routers = fit_routers(dit, feeds, splits, 1, calibration_of(dit))
    for feed, split, router in zip(feeds, splits, routers, strict=True):
        (x,) = (value.flatten(0, 1) for value in seen(dit, [feed.entry]))
        scores = x @ torch.from_numpy(router.weight).T + torch.from_numpy(router.bias)
        parts = [run_units(dit.graph, feed, torch.from_numpy(split.of_expert(i)), x).norm(dim=-1) for i in range(4)]
        fits = np.corrcoef(scores[:, 0].numpy(), parts[0].numpy())[0, 1]
        assert fits > 0.2  # of a network of random weights; of a router that knows nothing, 0
        assert float(scores.std()) == pytest.approx(0.1, rel=0.8)
        assert sum(router.taken) == pytest.approx(1.0)
        assert sum(count * part for count, part in enumerate(router.taken)) == pytest.approx(1.0)  # active, on average


def test_how_many_experts_take_a_token() -> None:
    scores = torch.tensor([[[9.0, 9.0], [8.0, 1.0], [7.0, 8.0], [0.0, 0.0]]])  # four tokens, two experts, two each
    assert taken_by(scores, active=1) == (0.25, 0.5, 0.25)
    assert taken_by(scores, active=2) == (0.0, 0.0, 1.0)


# ---- the layer ------------------------------------------------------------------------------------------------------


def with_layer(program: Program, feed: FeedForward, split: Split, router: Router, active: int) -> Program:
    graph = rewrite.clone(program.graph)
    replace_feed_forward(graph, feed, split, router, active)
    return program.with_graph(rewrite.finish(graph))


@pytest.mark.parametrize("name", ["dit", "sd3", "wan", "unet_condition"])
def test_every_expert_with_gates_of_one_is_the_feed_forward(
    name: str, request: pytest.FixtureRequest, program_of: ProgramOf
) -> None:
    program: Program = request.getfixturevalue(name) if name == "dit" else program_of(name)
    feeds = find_feed_forwards(program.graph)
    for feed in (feeds[0], feeds[-1]):
        units = np.random.default_rng(0).permutation(feed.hidden)
        width = int(rewrite.shape_of(rewrite.node_named(program.graph, feed.entry))[-1])
        router = Router(np.zeros((4, width), np.float32), np.zeros(4, np.float32))
        made = with_layer(program, feed, Split(units, feed.hidden // 4, 4), router, active=4)
        assert len(rewrite.weights(made.graph)) > len(rewrite.weights(program.graph))
        for found, expected in zip(made.graph(*values_of(made)), program.graph(*values_of(program)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_routing_is_the_dense_evaluation_under_a_mask(dit: Program) -> None:
    feed = find_feed_forwards(dit.graph)[1]
    random = np.random.default_rng(1)
    split = Split(random.permutation(feed.hidden), feed.hidden // 4, 4)
    (x,) = seen(dit, [feed.entry])
    batch, tokens, width = x.shape
    router = Router(random.normal(size=(4, width)).astype(np.float32), random.normal(size=4).astype(np.float32))
    made = with_layer(dit, feed, split, router, active=1)
    (layer,) = (node.name for node in made.graph.graph.nodes if node.target is torch.ops.dcompile.add_tokens.default)
    (found,) = seen(made, [layer])

    scores = x @ torch.from_numpy(router.weight).T + torch.from_numpy(router.bias)
    capacity = tokens // 4
    bias = rewrite.attribute(dit.graph, str(rewrite.node_named(dit.graph, feed.down).all_input_nodes[2].target))
    expected = run_units(dit.graph, feed, torch.from_numpy(split.units[: split.shared]), x) + bias
    taken = torch.zeros(batch, tokens)
    for index in range(4):
        whole = run_units(dit.graph, feed, torch.from_numpy(split.of_expert(index)), x)
        for sample in range(batch):
            best = scores[sample, :, index].argsort(descending=True)[:capacity]
            mask = torch.zeros(tokens)
            mask[best] = 1.0
            taken[sample] += mask
            gate = 2 * torch.sigmoid(scores[sample, :, index]) * mask
            expected[sample] += gate[:, None] * whole[sample]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
    assert taken.sum() == batch * tokens  # one each on average
    assert len(taken.unique()) > 1  # but not each


def test_a_sample_does_not_depend_on_those_beside_it(dit: Program, calibration_of: CalibrationOf) -> None:
    step = MixtureOfExperts(**SMALL)
    made = step.apply(dit, step.decide(dit, calibration_of(dit))).program
    both = made.graph(*values_of(made))[0]
    conditions = example_conditions(dit.contract, 2)
    first = {name: value[:1] for name, value in conditions.items()}
    alone = made.graph(*step_values(made, 1, initial_slots(made, first, [0])))[0]
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-5)


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restructured(dit: Program, calibration_of: CalibrationOf) -> Program:
    step = MixtureOfExperts(**SMALL)
    return step.apply(dit, step.decide(dit, calibration_of(dit))).program


def test_fewer_operations_of_the_same_weights(dit: Program, restructured: Program) -> None:
    def inside(program: Program) -> float:
        named = [node for node in program.graph.graph.nodes if ".ff" in str(node.meta.get("nn_module_stack", ""))]
        return sum(map(node_flops, named))

    assert 0.99 * dit.parameters < restructured.parameters < 1.1 * dit.parameters  # routers are more
    assert sample_flops(restructured) < sample_flops(dit)
    assert 0.4375 <= inside(restructured) / inside(dit) < 0.55  # a quarter shared, a quarter of the rest, the router


def test_recovery_trains_experts_and_routers(
    dit: Program, restructured: Program, calibration_of: CalibrationOf
) -> None:
    step = Recover(steps=40, batch=8, rate=1e-3)
    decision = step.decide(restructured, calibration_of(dit))
    assert {name.rpartition(".ff.")[2] for name in decision.tensors if "router" in name} >= {
        "net.router.weight"
    } or any("router" in name for name in decision.tensors)
    moved = [name for name, value in decision.tensors.items() if "router.weight" in name or "experts" in name]
    before = rewrite.weights(restructured.graph)
    assert moved
    assert all(not np.array_equal(before[name].detach().numpy(), decision.tensors[name]) for name in moved)
    error = calibration_of(dit).error
    after = error(step.apply(restructured, decision).program)["relative_error"]
    assert after < 0.8 * error(restructured)["relative_error"]


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_cached_and_as_engines(layout: Any, restructured: Program, tmp_path: Path) -> None:
    cached = CacheSteps(interval=3).apply(restructured, Decision()).program
    lowered = lower(cached, layout)
    written = TARGET.write(lowered, tmp_path, TargetOptions(threads=1), lambda name: None)
    parity = check_parity(cached, lowered, written.open, lambda fraction: None)
    assert all(result.relative_error < 1e-5 for result in parity)


def test_units_that_cannot_be_dealt_are_left_alone(dit: Program, calibration_of: CalibrationOf) -> None:
    step = MixtureOfExperts(experts=7)
    result = step.apply(dit, step.decide(dit, calibration_of(dit)))
    assert result.program is dit
    assert result.record.refused[0][1] == "96 of 128 hidden units cannot be dealt to 7 experts"


def test_a_dry_run_needs_no_measurement(dit: Program) -> None:
    result = MixtureOfExperts(**SMALL).apply(dit, Decision())
    assert result.record.changed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "mixture_of_experts: experts is 0, needed 1 or more"),
        ({"experts": 4, "active": 5}, r"mixture_of_experts: active is 5, needed 1 to 4 \(experts\)"),
        ({"shared": 0.0}, "mixture_of_experts: shared is 0.0, needed more than 0 and less than 1"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MixtureOfExperts(**options)


def test_it_comes_before_the_cache(dit: Program, calibration_of: CalibrationOf) -> None:
    cached = CacheSteps(interval=3).apply(dit, Decision())
    program = replace(cached.program, history=(cached.record,))
    with pytest.raises(PassError, match="mixture_of_experts: cache_steps came before; put moe before it"):
        MixtureOfExperts().decide(program, calibration_of(dit))
