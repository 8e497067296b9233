"""Programs as engines, script, states and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.plan import Plan, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import Layout, choose_layout, dynamic_shapes, engine_names, lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.manifest import Call, Jump, StateSpec

LAYOUTS: tuple[Layout, Layout] = ("variants", "segments")


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


# ---- segments -----------------------------------------------------------------------------------------------------


def branches(program: Program) -> Program:
    return CacheSteps(interval=3, warmup=1, site="branch", predictor="taylor1").apply(program, Decision()).program


def scattered(program: Program) -> Program:
    """Branch sites, each with an interval of its own: 1 + its place modulo 4."""
    cached = branches(program)
    sites = []
    for index, site in enumerate(cached.plan.sites):
        computed = tuple(step % (1 + index % 4) == 0 for step in range(program.steps))
        reuse, refresh = taylor(computed, 1)
        sites.append(replace(site, computed=computed, reuse=reuse, refresh=refresh))
    return replace(cached, plan=Plan(program.steps, tuple(sites)))


def test_a_step_of_segments_is_several_calls_with_one_row(dit: Program) -> None:
    lowered = lower(branches(dit), "segments")
    whole = "transformer_blocks_0_attn1_to_2_ff"
    kinds = [whole if computed else f"{whole}_reuse" for computed in branches(dit).plan.sites[0].computed]
    assert lowered.layout == "segments"
    assert lowered.script == tuple(
        Call(name, step) for step, kind in enumerate(kinds) for name in ("head", kind, "finish")
    )
    assert list(lowered.engines) == ["head", whole, "finish", f"{whole}_reuse"]  # as they are first called


def test_only_states_outlive_a_step(dit: Program) -> None:
    """What pieces hand on within a step is no state of the bundle; states and tables are those of variants."""
    whole, pieces = (lower(scattered(dit), layout) for layout in LAYOUTS)
    assert pieces.states == whole.states
    assert {slot.rpartition(".")[0] for slot in pieces.states} == {site.name for site in scattered(dit).plan.sites}
    assert pieces.tables.keys() == whole.tables.keys()


def test_tables_do_not_share_memory(dit: Program) -> None:
    """Sites with one plan share its arrays; a file of tables holds each by itself."""
    tables = lower(branches(dit)).tables
    assert len({table.untyped_storage().data_ptr() for table in tables.values()}) == len(tables)


# ---- the choice between them ----------------------------------------------------------------------------------------


def test_variants_where_they_are_few_and_share_weights(dit: Program) -> None:
    choice = choose_layout(branches(dit), shares_weights=True)
    assert choice.layout == "variants"
    assert choice.reason == (
        "variants, because 2 kinds of steps share one copy of the weights: 2 engines of 0.357 MB, 1 call a step; "
        "segments would take 4 engines of 0.357 MB, 3 calls a step"
    )


def test_segments_where_engines_hold_their_own_weights(dit: Program) -> None:
    program = branches(dit)
    choice = choose_layout(program, shares_weights=False)
    assert choice.layout == "segments"
    assert choice.reason.startswith("segments, because engines of this target each store their own weights: 4 engines")
    held = [
        sum(value.nbytes for value in rewrite.weights(engine.graph).values())
        for engine in lower(program, "variants").engines.values()
    ]
    assert choice.figures["variants"] == {"engines": 2, "weight_bytes": sum(held), "calls_a_step": 1}
    assert choice.figures["segments"] == {"engines": 4, "weight_bytes": max(held), "calls_a_step": 3}


def test_segments_where_variants_would_be_many(dit: Program) -> None:
    program = scattered(dit)
    assert len(program.plan.masks) > 3
    choice = choose_layout(program, shares_weights=True)
    assert choice.layout == "segments"
    assert "5 kinds of steps are more than 3 whole graphs" in choice.reason
    assert 3 < choice.figures["segments"]["calls_a_step"] <= 2 + len(program.plan.sites)
    assert choice.figures["segments"]["calls_a_step"] == len(lower(program, "segments").script) / program.steps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shares", [True, False])
def test_the_layout_that_is_asked_for(layout: Layout, shares: bool, dit: Program) -> None:
    choice = choose_layout(branches(dit), shares, layout)
    assert choice.layout == layout
    assert choice.reason.startswith(f"{layout}, as asked: ")


def test_one_kind_of_steps_needs_one_engine(dit: Program) -> None:
    choice = choose_layout(dit, shares_weights=False)
    assert (choice.layout, choice.reason) == ("variants", "one engine, because every step computes the same")
    assert choice.figures["variants"] == choice.figures["segments"]


# ---- running them in PyTorch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [branches, scattered])
def test_lowered_engines_give_what_the_program_gives(
    layout: Layout, make: Callable[[Program], Program], dit: Program
) -> None:
    program = make(dit)
    conditions = example_conditions(dit.contract, 2)
    found = run_lowered(program, lower(program, layout), conditions, [3, 4])
    assert torch.equal(found, run(program, conditions, [3, 4]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampler", ["euler_a", "dpm++2m_sde"])
def test_noise_and_history_are_those_of_the_program(
    layout: Layout, sampler: str, tokens_contract: Path, tmp_path: Path
) -> None:
    contract = tmp_path / "contract.yaml"
    contract.write_text(tokens_contract.read_text().replace("flow", "epsilon"))
    program = ingest(Source("models:tokens", contract=contract, sampler=sampler, steps=4))
    assert program.contract.stochastic
    program = branches(program)
    assert torch.equal(run_lowered(program, lower(program, layout), {}, [8, 9]), run(program, {}, [8, 9]))


def test_calls_are_shown_with_what_they_read_and_wrote(cached: Program) -> None:
    lowered = lower(cached, "segments")
    seen: list[tuple[int, str]] = []

    def on_call(row: int, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        engine = lowered.engines[name]
        assert len(inputs) == len(engine.inputs)
        assert [tuple(each.shape) for each in outputs] == [tuple(each.shape) for each in engine.graph(*inputs)]
        assert len(outputs) == len(engine.outputs)
        seen.append((row, name))

    run_lowered(cached, lowered, {}, [0], on_call=on_call)
    assert seen == [(index, row.call) for index, row in enumerate(lowered.script) if isinstance(row, Call)]


def test_a_jump_leaves_rows_out(tokens: Program) -> None:
    """Over the last step, if the first float of the sample's history is small: here a slot that is always zero."""
    lowered = lower(tokens)
    last = len(lowered.script) - 1
    script = (*lowered.script[:last], Jump(last + 2, "flag", 0.5), lowered.script[last])
    states = {**lowered.states, "flag": StateSpec((1,), "float32")}
    jumped = run_lowered(tokens, replace(lowered, script=script, states=states), {}, [0])
    shown: list[torch.Tensor] = []
    run(tokens, {}, [0], on_step=lambda step, sample: shown.append(sample.clone()))
    assert torch.equal(jumped, shown[-2])
    stays = (*lowered.script[:last], Jump(last + 2, "flag", 0.0), lowered.script[last])
    assert torch.equal(run_lowered(tokens, replace(lowered, script=stays, states=states), {}, [0]), shown[-1])
