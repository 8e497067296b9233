"""Programs as engines, script, states and tables."""

from __future__ import annotations

import pytest
import torch
from models import Tokens, randomise
from torch import Tensor, nn

from dcompile.compiler import rewrite
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.rewrite import aten
from dcompile.exporters.lower import dynamic_shapes, engine_names, lower, transpose_linear_weights
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.manifest import Call, StateSpec


def test_engines_are_named_by_what_they_compute() -> None:
    masks = ((True, True), (False, True), (False, False), (True, False))
    assert list(engine_names(masks).values()) == ["full", "mixed1", "reuse", "mixed3"]


def test_a_program_without_sites_is_one_engine_without_states(tokens: Program) -> None:
    lowered = lower(tokens)
    assert list(lowered.engines) == ["full"]
    assert lowered.script == tuple(Call("full", step) for step in range(4))
    assert lowered.states == {}
    assert set(lowered.tables) == {"timestep", "row"}


def test_the_plan_becomes_the_script_and_what_engines_hand_on_the_states(cached: Program) -> None:
    lowered = lower(cached)
    assert [row.call for row in lowered.script if isinstance(row, Call)] == ["full", "reuse", "reuse", "full"]
    assert [row.row for row in lowered.script if isinstance(row, Call)] == [0, 1, 2, 3]
    state = StateSpec((("batch", 1), 6, 32), "float32")
    assert lowered.states == {f"blocks_1_2.state{order}": state for order in (0, 1)}
    full, reuse = lowered.engines["full"], lowered.engines["reuse"]
    assert full.outputs == ("sample", "blocks_1_2.state0", "blocks_1_2.state1")
    assert reuse.outputs == ("sample",)
    # Engines take only what they read: the full one the old state that a difference needs, the reusing one both.
    assert "blocks_1_2_state1" not in full.inputs
    assert reuse.inputs["blocks_1_2_state1"] == ("slot", "blocks_1_2.state1")
    assert reuse.inputs["row"] == ("table", "row")


def test_tables_that_no_engine_reads_are_left_out(tokens: Program) -> None:
    copied = CacheSteps(interval=2, predictor="copy").apply(tokens, Decision()).program
    assert set(lower(copied).tables) == {"timestep", "row"}  # a copy has no coefficients
    extrapolated = CacheSteps(interval=2, predictor="taylor2").apply(tokens, Decision()).program
    assert set(lower(extrapolated).tables) == {"timestep", "row", "blocks_1_2.reuse", "blocks_1_2.refresh"}


def test_states_follow_the_doubled_batch_of_guidance(dit: Program) -> None:
    lowered = lower(CacheSteps(interval=2).apply(dit, Decision()).program)
    assert {spec.shape[0] for spec in lowered.states.values()} == {("batch", 2)}
    shapes = dynamic_shapes(lowered.engines["reuse"].graph, 64)
    named = dict(zip(lowered.engines["reuse"].inputs, shapes, strict=True))
    assert str((named["sample"] or {})[0]) != str((named["transformer_blocks_1_2_state0"] or {})[0])
    assert named["row"] is None


@pytest.mark.parametrize(("sampler", "stored"), [("flow_euler", None), ("flow_dpm++2m", 1), ("flow_dpm++3m", 2)])
def test_the_history_of_a_multistep_sampler_is_a_state(
    sampler: str, stored: int | None, tokens_contract: object
) -> None:
    program = ingest(Source("models:tokens", contract=tokens_contract, sampler=sampler, steps=5))  # type: ignore[arg-type]
    lowered = lower(program)
    history = {"history": StateSpec((("batch", 1), stored, 6, 4), "float32")} if stored else {}
    assert lowered.states == history
    assert lowered.engines["full"].outputs == ("sample", *history)


class TwiceTheSame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own(self.shared(self.shared(x)))
        return result


def test_linear_weights_are_stored_as_the_engine_multiplies_by_them() -> None:
    network = randomise(Tokens())
    x, sigma = torch.randn(2, 6, 4), torch.tensor([3.0, 400.0])
    module = torch.export.export(network, (x, sigma)).module()
    before = {name: value.clone() for name, value in rewrite.weights(module).items()}
    moved = transpose_linear_weights(module)
    assert not any(rewrite.is_call(node, aten.linear.default) for node in moved.graph.nodes)
    after = rewrite.weights(moved)
    assert torch.equal(after["blocks.0.up.weight"], before["blocks.0.up.weight"].t())
    assert after["blocks.0.up.weight"].is_contiguous()
    torch.testing.assert_close(moved(x, sigma), network(x, sigma))
    assert all(
        torch.equal(value, before[name]) for name, value in rewrite.weights(module).items()
    )  # the input is whole


def test_a_weight_that_two_layers_read_stays_as_it_is() -> None:
    network, x = randomise(TwiceTheSame()), torch.randn(2, 4)
    moved = transpose_linear_weights(torch.export.export(network, (x,)).module())
    left = [node for node in moved.graph.nodes if rewrite.is_call(node, aten.linear.default)]
    assert len(left) == 2
    torch.testing.assert_close(moved(x), network(x))
