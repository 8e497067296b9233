"""The pipeline holds a pass to its promises, and records what it did and what it cost."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.errors import PassError, UnsupportedError
from dcompile.compiler.execute import run
from dcompile.compiler.flops import sample_flops
from dcompile.compiler.pipeline import apply_checked, run_passes, stage_json
from dcompile.compiler.program import Decision, PassResult, Program, Record
from dcompile.compiler.store import Store
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.prune_layers import PruneLayers

NOWHERE = Store(None)


@dataclass(frozen=True)
class Broken:
    """A pass with one fault."""

    name: ClassVar[str] = "broken"

    fault: str = "none"

    def decide(self, program: Program, calibration: Any, /) -> Decision:
        return Decision()

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        graph = rewrite.clone(program.graph)
        if self.fault == "edits the graph":
            node = rewrite.node_named(program.graph, "mul")
            node.args = (node.args[0], 2.0)
        elif self.fault == "edits a weight":
            weight = rewrite.weights(program.graph)["net.proj_out_1.weight"]
            with torch.no_grad():
                weight.mul_(1.0)
        elif self.fault == "replaces a weight":
            rewrite.assign(program.graph, "net.proj_out_1.weight", torch.zeros(32, 32))
        elif self.fault == "edits a table":
            program.tables["timestep"].add_(0)
        elif self.fault == "says nothing changed":
            return PassResult(replace(program, graph=graph), Record(self.name))
        elif self.fault == "says something changed":
            return PassResult(program, Record(self.name, changed=3))
        elif self.fault == "raises":
            raise KeyError("no such node")
        elif self.fault == "refuses":
            raise UnsupportedError("broken: this network has no middle")
        elif self.fault == "makes no graph":
            node = rewrite.node_named(graph, "add")
            node.args = (rewrite.node_named(graph, "add_1"), 1)  # made only later
        elif self.fault == "makes it overflow":
            last = rewrite.output_values(graph)[0]
            grown = rewrite.call(graph, rewrite.output_node(graph), rewrite.aten.mul.Tensor, last, 1e30)
            rewrite.output_node(graph).args = ((grown,),)
            graph = rewrite.finish(graph)
        return PassResult(replace(program, graph=graph), Record(self.name, changed=1))


@pytest.fixture
def copy(dit: Program) -> Program:
    """A program that a test may spoil: own graph, own weights."""
    graph = rewrite.clone(dit.graph)
    for name, value in rewrite.weights(graph).items():
        rewrite.assign(graph, name, value.detach().clone())
    return replace(dit, graph=graph, tables={name: table.clone() for name, table in dit.tables.items()})


@pytest.mark.parametrize("fault", ["edits the graph", "edits a weight", "replaces a weight", "edits a table"])
def test_pass_that_edits_its_input_is_caught_by_name(copy: Program, fault: str) -> None:
    words = r"step 1 \('broken'\): the pass edited the program it was given; a pass works on a copy"
    with pytest.raises(PassError, match=words):
        run_passes(copy, (Broken(fault),), 1, NOWHERE)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("says nothing changed", "the pass reports 0 changes, but its program is another"),
        ("says something changed", "the pass reports 3 changes, but its program is the same"),
        ("raises", "KeyError: 'no such node'; please report this with the recipe"),
        ("makes no graph", "please report this with the recipe"),
        ("makes it overflow", "the sample is not finite after step"),
    ],
)
def test_pass_that_breaks_a_promise_is_caught_by_name(dit: Program, fault: str, words: str) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(dit, (CacheSteps(interval=1), Broken(fault)), 1, NOWHERE)
    assert str(caught.value).startswith("step 2 ('broken', after cache_steps): ")
    assert words in str(caught.value)


def test_refusal_of_a_pass_is_passed_on(dit: Program) -> None:
    with pytest.raises(UnsupportedError, match="broken: this network has no middle"):
        apply_checked(Broken("refuses"), dit, Decision())


def test_honest_pass_is_let_through(dit: Program) -> None:
    result = apply_checked(Broken(), dit, Decision())
    assert result.record.changed == 1
    assert str(result.program.graph.graph) == str(dit.graph.graph)


def test_stages_record_what_each_pass_did_and_cost(dit: Program) -> None:
    seen: list[tuple[int, str]] = []
    told: list[tuple[float, str]] = []
    passes = (PruneLayers(blocks=("transformer_blocks.1",)), CacheSteps(interval=2))
    program, stages = run_passes(
        dit,
        passes,
        1,
        NOWHERE,
        progress=lambda fraction, text: told.append((fraction, text)),
        on_pass=lambda index, name: seen.append((index, name)),
    )
    assert seen == [(0, "prune_layers"), (1, "cache_steps")]
    assert {text for _, text in told} >= {"running the teacher", "measuring the error"}
    assert all(0 < fraction <= 1 for fraction, _ in told)
    prune, cache = stages
    assert (prune.name, prune.changed, prune.details["removed"]) == ("prune_layers", 1, ["net.transformer_blocks.1"])
    assert prune.options["blocks"] == ["transformer_blocks.1"]
    assert prune.parameters < dit.parameters
    assert prune.parameters == cache.parameters == program.parameters
    assert sample_flops(dit) > prune.flops > cache.flops == sample_flops(program)
    assert prune.seconds > 0
    for stage in stages:
        assert json.loads(json.dumps(stage_json(stage)))["name"] == stage.name
    assert [record.name for record in program.history] == ["prune_layers", "cache_steps"]
    assert program.history[1].options["interval"] == 2


def test_recorded_error_is_that_of_the_samples(dit: Program) -> None:
    program, (stage,) = run_passes(dit, (PruneLayers(blocks=("transformer_blocks.1",)),), 2, NOWHERE)
    conditions, seeds = {"class_labels": torch.tensor([0, 5]).numpy()}, [1_000_000, 1_000_001]
    teacher, found = run(dit, conditions, seeds), run(program, conditions, seeds)
    assert stage.error["relative_error"] > 0.01
    assert stage.error["relative_error"] == pytest.approx(float((found - teacher).norm() / teacher.norm()), rel=0.3)
    _, (nothing,) = run_passes(dit, (CacheSteps(interval=1),), 2, NOWHERE)
    assert nothing.error == {"relative_error": 0.0, "psnr": 100.0}


def test_no_passes_cost_nothing(dit: Program, tmp_path: Path) -> None:
    assert run_passes(dit, (), 8, Store(tmp_path)) == (dit, ())
    assert not list(tmp_path.iterdir())
