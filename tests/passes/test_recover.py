"""Recovery: what is trained, towards what, and that a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.program import Pass, Program
from dcompile.compiler.store import NOWHERE, Store
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.depth.removal import remove_blocks
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.recover import Recover
from dcompile.passes.recovery import trainer
from dcompile.passes.recovery.losses import feature_loss, matched, typical
from dcompile.passes.recovery.network import Network
from dcompile.passes.recovery.trainer import Settings, train

CalibrationOf = Callable[[Program], Calibration]
SMALL: dict[str, Any] = {"steps": 40, "batch": 8, "rate": 1e-3}


@pytest.fixture(scope="module")
def pruned(dit: Program) -> Program:
    return remove_blocks(dit, ["net.transformer_blocks.1"])


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "of", "expected"),
    [
        (2, 4, [1, 3]),
        (14, 28, list(range(1, 28, 2))),
        (7, 14, list(range(1, 14, 2))),
        (12, 12, list(range(12))),
        (2, 3, [1, 2]),
        (1, 5, [4]),
    ],
)
def test_blocks_are_matched_by_their_place(kept: int, of: int, expected: list[int]) -> None:
    assert matched(kept, of) == expected


def test_feature_loss_is_that_of_a_plain_loop() -> None:
    found, expected = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    found[0, 1, 2, 3] = 1000.0  # a massive activation, left out on its side
    total = 0.0
    for one, other in zip(found, expected, strict=True):
        error = 0.0
        for mine, theirs in zip(one, other, strict=True):
            for i in range(5):
                for j in range(7):
                    a = mine[i, j] if abs(mine[i, j] - mine.mean()) < 2 * mine.std() else 0.0
                    b = theirs[i, j] if abs(theirs[i, j] - theirs.mean()) < 2 * theirs.std() else 0.0
                    error += float((a - b) ** 2)
        total += error / (3 * 5 * 7)
    assert float(feature_loss(list(found), list(expected))) == pytest.approx(total / 2, rel=1e-5)
    assert float(typical(found[0])[1, 2, 3]) == 0.0
    assert 0.9 < float((typical(expected[1]) != 0).float().mean()) < 1.0


# ---- the trainer ----------------------------------------------------------------------------------------------------


def valley(weights: dict[str, torch.Tensor]) -> Callable[[int, float], torch.Tensor]:
    """A loss whose least is at 3, with noise that follows from the step."""

    def loss(step: int, done: float) -> torch.Tensor:
        noise = torch.from_numpy(np.random.default_rng(step).normal(size=4).astype(np.float32))
        return (weights["w"] - 3 + 0.1 * noise).square().sum()

    return loss


def trained(settings: Settings, store: Store = NOWHERE, progress: Any = lambda done, text: None) -> trainer.Trained:
    weights = {"w": torch.zeros(4, requires_grad=True)}
    return train(weights, valley(weights), settings, store, "key", progress)


def test_it_finds_the_least_and_gives_the_average() -> None:
    settings = Settings(steps=300, rate=0.1, average=0.9)
    result = trained(settings)
    np.testing.assert_allclose(result.weights["w"], 3.0, atol=0.05)
    assert result.stopped is None
    assert result.curve[0][1] > 100 * result.curve[-1][1]
    assert result.curve[-1][0] == 300
    weights, seen = {"w": torch.zeros(4, requires_grad=True)}, []
    last = train(weights, valley(weights), Settings(300, 0.1, average=0.0), NOWHERE, "key", lambda *_: seen.append(1))
    assert len(seen) == 300
    np.testing.assert_array_equal(last.weights["w"], weights["w"].detach().numpy())


class Stopped(Exception):
    pass


def test_a_stop_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_S", 0.0)
    settings, calls = Settings(steps=60, rate=0.1), []

    def stop(done: float, text: str) -> None:
        calls.append(done)
        if len(calls) == 37:
            raise Stopped

    with pytest.raises(Stopped):
        trained(settings, Store(tmp_path), stop)
    calls = calls[:1]
    again = trained(settings, Store(tmp_path), lambda done, text: calls.append(done))
    assert len(calls) - 1 == 60 - 36  # the step that was stopped had no checkpoint yet
    whole = trained(settings)
    np.testing.assert_array_equal(again.weights["w"], whole.weights["w"])
    assert again.curve == whole.curve


def test_a_loss_that_diverges_keeps_the_weights_before() -> None:
    weights = {"w": torch.zeros(4, requires_grad=True)}
    honest = valley(weights)
    result = train(
        weights, lambda step, done: honest(step, done) * (float("nan") if step == 120 else 1), Settings(300, 0.1),
        NOWHERE, "key", lambda done, text: None,
    )  # fmt: skip
    assert result.stopped == 121
    np.testing.assert_array_equal(result.weights["w"], trained_until(100))
    steep = {"w": torch.zeros(4, requires_grad=True)}
    result = train(
        steep, lambda step, done: valley(steep)(step, done) * (1 + max(0, step - 60) ** 4), Settings(300, 1e-6),
        NOWHERE, "key", lambda done, text: None,
    )  # fmt: skip
    assert result.stopped is not None
    assert 60 < result.stopped < 130
    assert np.isfinite(result.weights["w"]).all()


def trained_until(step: int) -> Any:
    """The average after so many of 300 steps."""
    weights, kept = {"w": torch.zeros(4, requires_grad=True)}, []
    state = trainer._begun(["w"], [weights["w"]], Settings(300, 0.1), NOWHERE, "key")
    for each in range(step):
        state.step = each
        kept.append(trainer._learn(state, [weights["w"]], valley(weights), Settings(300, 0.1)))
    return state.average[0].numpy()


# ---- the pass -------------------------------------------------------------------------------------------------------


def test_the_prediction_is_what_the_sampler_reads(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    network = Network(dit, results=True)
    seen: list[torch.Tensor] = []
    (prediction, *_) = rewrite.output_values(network.program.graph)
    calibration.observe(dit, [prediction.name], lambda step, name, value: seen.append(value), "")
    assert len(seen) == dit.steps
    assert seen[0].shape == (2 * len(calibration.seeds), *dit.contract.sample.shape)  # both halves of guidance


def test_it_wins_back_what_pruning_cost(dit: Program, pruned: Program, calibration_of: CalibrationOf) -> None:
    calibration, step = calibration_of(dit), Recover(**SMALL)
    decision = step.decide(pruned, calibration)
    recovered = step.apply(pruned, decision)
    before, after = (calibration.error(each)["relative_error"] for each in (pruned, recovered.program))
    assert after < 0.8 * before
    losses = [loss for _, loss in decision.choices["loss"]]
    assert losses[-1] < losses[0]
    assert decision.choices["matched"] == {
        "net.transformer_blocks.0": "net.transformer_blocks.1", "net.transformer_blocks.2": "net.transformer_blocks.2",
    }  # fmt: skip
    own = rewrite.weights(dit.graph)
    assert set(decision.tensors) == {
        name for name in rewrite.weights(pruned.graph) if isinstance(own[name], torch.nn.Parameter)
    }
    assert recovered.record.changed == len(decision.tensors)
    again = step.decide(pruned, calibration)
    for name, value in decision.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], value)
    assert all(weight.grad is None for weight in own.values())


def test_features_count(dit: Program, pruned: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    with_, without = (
        Recover(**{**SMALL, "steps": 4}, features=features).decide(pruned, calibration) for features in (1.0, 0.0)
    )
    assert with_.choices["loss"][0][1] > without.choices["loss"][0][1]
    assert not without.choices["matched"]


def test_products_in_bf16(dit: Program, pruned: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(dit)
    half, full = (Recover(**SMALL, precision=precision) for precision in ("bf16", "fp32"))
    trained = half.decide(pruned, calibration)
    others = full.decide(pruned, calibration).tensors
    assert all(value.dtype == np.float32 for value in trained.tensors.values())
    assert not all(np.array_equal(value, others[name]) for name, value in trained.tensors.items())
    recovered = half.apply(pruned, trained).program
    before, after = (calibration.error(each)["relative_error"] for each in (pruned, recovered))
    assert after < 0.8 * before


def test_what_was_not_cut_stays(dit: Program, calibration_of: CalibrationOf) -> None:
    step = Recover(**SMALL)
    decision = step.decide(dit, calibration_of(dit))
    result = step.apply(dit, decision)
    assert result.program is dit
    assert result.record.refused == (
        ("every weight", "no pass before changed the network, so there is nothing to recover"),
    )


def test_it_comes_before_what_measures_weights(dit: Program, pruned: Program, calibration_of: CalibrationOf) -> None:
    with pytest.raises(PassError, match=r"step 2 \('recover', after cache_steps\): cache_steps came before; put"):
        run_passes(dit, [CacheSteps(interval=3), Recover(**SMALL)], 2, NOWHERE)


def test_in_a_pipeline(dit: Program) -> None:
    passes: list[Pass] = [
        PruneLayers(blocks=("transformer_blocks.1",)),
        Recover(**{**SMALL, "steps": 10}),
        CacheSteps(interval=2),
    ]
    program, stages = run_passes(dit, passes, 2, NOWHERE)
    assert [stage.name for stage in stages] == ["prune_layers", "recover", "cache_steps"]
    assert program.plan.sites
    assert stages[0].parameters == stages[1].parameters < dit.parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "recover: steps is 0, needed 1 or more"),
        ({"batch": 3}, "recover: batch is 3, needed 4 or more"),
        ({"rate": 0.0}, "recover: rate is 0.0, needed more than 0"),
        ({"features": -1.0}, "recover: features is -1.0, needed 0 or more"),
        ({"average": 1.0}, "recover: average is 1.0, needed 0 or more and less than 1"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recover(**options)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.store import Store
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.recover import Recover
from dcompile.passes.recovery import trainer

folder, store, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
trainer.CHECKPOINT_S = 0.0
seen = []

def progress(done, text):
    seen.append(text)
    if sum(each.startswith("recovering") for each in seen) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

program = ingest(Source(folder, steps=6, guidance=2.0))
passes = [PruneLayers(blocks=("transformer_blocks.1",)), Recover(steps=12, batch=8)]
_, stages = run_passes(program, passes, 2, Store(store), progress)
print(json.dumps([stages[1].error, sum(each.startswith("recovering") for each in seen)]))
"""


def test_killed_it_goes_on_and_ends_the_same(dit_folder: Path, tmp_path: Path) -> None:
    def run(store: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(dit_folder), str(tmp_path / store), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert run("one", 7).returncode == -signal.SIGKILL
    error, steps = json.loads(run("one", 99).stdout)
    assert steps == 12 - 6
    assert (error, 12) == tuple(json.loads(run("two", 99).stdout))
