"""What the timestep alone decides becomes a table: the same numbers, fewer weights; what is left alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import run
from dcompile.compiler.network import NetworkSpec
from dcompile.compiler.program import Decision, PassResult, Program
from dcompile.compiler.step_graph import Step, export_step
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.fold_timestep import FoldTimestep
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.quantize import Quantize


def fold(program: Program) -> PassResult:
    step = FoldTimestep()
    return step.apply(program, step.decide(program, None))  # type: ignore[arg-type]


def wider(program: Program, network: torch.nn.Module) -> Program:
    """A program of this network with the sampler of `tokens`."""
    spec = NetworkSpec(sample="x", timestep="sigma", sample_shape=(6, 4), predicts="flow")
    return replace(program, graph=export_step(Step(models.randomise(network), spec, program.sampler, 1.0)))


class TimedTokens(models.Tokens):
    """Its timestep goes through two layers, large enough to be worth a table."""

    def __init__(self) -> None:
        super().__init__(blocks=1)
        self.time = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.SiLU(), torch.nn.Linear(64, 32))  # type: ignore[assignment]


class UnevenTokens(TimedTokens):
    """What it makes of the timestep differs from sample to sample."""

    def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
        return super().forward(x, sigma * (1 + torch.arange(x.shape[0])), extra)


# ---- structure ----------------------------------------------------------------------------------------------------


def test_graph_before_and_after(tokens: Program, golden: Callable[[str, str], None]) -> None:
    program = wider(tokens, TimedTokens())
    golden("fold_timestep/before", models.graph_text(program.graph))
    golden("fold_timestep/expected", models.graph_text(fold(program).program.graph))


def test_time_embedding_leaves_with_its_weights_and_its_input(dit: Program) -> None:
    result = fold(dit)
    left = set(rewrite.weights(dit.graph)) - set(rewrite.weights(result.program.graph))
    assert left == {name for name in rewrite.weights(dit.graph) if ".timestep_embedder." in name}
    assert len(left) == 4 * 3  # two layers in each of three blocks
    assert "timestep" not in result.program.tables
    assert "timestep" not in rewrite.placeholders(result.program.graph)
    folded = {name: table for name, table in result.program.tables.items() if name != "row"}
    assert len(folded) == result.record.changed == result.record.details["tables"]
    for name, table in folded.items():
        assert name.startswith("folded_")
        assert table.shape[:2] == (6, 1)
        assert rewrite.placeholders(result.program.graph)[name].users


def test_record_counts_bytes(dit: Program) -> None:
    details = fold(dit).record.details
    left = sum(value.numel() * 4 for name, value in rewrite.weights(dit.graph).items() if ".timestep_embedder." in name)
    assert details["weight_bytes_removed"] >= left
    assert 0 < details["table_bytes"] < details["weight_bytes_removed"]


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("batch", [1, 3])
def test_samples_are_the_same(name: str, batch: int, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(name)
    conditions = example_conditions(program.contract, batch)
    seeds = list(range(batch))
    result = fold(program)
    assert result.record.changed > 0
    found, expected = run(result.program, conditions, seeds), run(program, conditions, seeds)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tables_are_the_values_that_the_layers_gave(tokens: Program) -> None:
    network: Any = models.randomise(TimedTokens())
    program = fold(wider(tokens, TimedTokens())).program
    ((_, table),) = [(name, table) for name, table in program.tables.items() if name.startswith("folded_")]
    with torch.no_grad():
        expected = network.time(tokens.tables["timestep"] / 1000)
    torch.testing.assert_close(table.reshape(6, 32), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "order", ["prune, cache, fold", "quantize, fold", "fold, quantize", "fold, cache", "fold, prune"]
)
def test_among_other_passes(dit: Program, calibration_of: Any, order: str) -> None:
    steps: dict[str, Any] = {
        "prune": PruneLayers(count=1, method="influence"),
        "cache": CacheSteps(interval=2),
        "quantize": Quantize(),
        "fold": FoldTimestep(),
    }
    calibration = calibration_of(dit)
    with_fold = without = dit
    for name in order.split(", "):
        decision = steps[name].decide(with_fold, calibration)
        with_fold = steps[name].apply(with_fold, decision).program
        if name != "fold":
            without = steps[name].apply(without, steps[name].decide(without, calibration)).program
    assert not [name for name in rewrite.weights(with_fold.graph) if ".timestep_embedder." in name]
    found, expected = (run(program, calibration.conditions, calibration.seeds) for program in (with_fold, without))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- left alone ---------------------------------------------------------------------------------------------------


def test_tables_larger_than_the_weights_that_leave(tokens: Program) -> None:
    """Of one layer 1 -> 32 with its bias: 256 bytes, and six rows of 32 are 768."""
    result = fold(tokens)
    assert result.program is tokens
    assert result.record.changed == 0
    assert result.record.refused == (("all", "its tables would take 768 bytes, the weights that leave 256"),)


def test_rows_that_differ_within_a_batch(tokens: Program) -> None:
    program = wider(tokens, UnevenTokens())
    result = fold(program)
    assert result.record.changed == 0
    assert result.program is program
    assert [why for _, why in result.record.refused] == ["its rows differ within a batch"]


def test_network_that_ignores_its_timestep(tokens: Program) -> None:
    class Timeless(models.Tokens):
        def forward(self, x: Any, sigma: Any, extra: Any = None) -> Any:
            return self.leave(self.enter(x))

    program = wider(tokens, Timeless())
    result = fold(program)
    assert result.program is program
    assert (result.record.changed, result.record.refused) == (0, ())


def test_second_run_changes_nothing(dit: Program) -> None:
    once = fold(dit).program
    again = FoldTimestep().apply(once, Decision())
    assert again.program is once
    assert again.record.changed == 0
