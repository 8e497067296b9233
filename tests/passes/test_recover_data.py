"""Recovery on data: what a loader must give, how much noise a step meets, what the network should say of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import IngestError, PassError
from dcompile.compiler.probe_scheduler import make_scheduler, probe
from dcompile.compiler.program import Program
from dcompile.passes.depth.removal import remove_blocks
from dcompile.passes.recover import Recover
from dcompile.passes.recovery.data import Noised, target

CalibrationOf = Callable[[Program], Calibration]


def batch_of(program: Program, number: int, count: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    shape = (count, *program.contract.sample.shape)
    return {"sample": random.normal(size=shape).astype(np.float32), "class_labels": random.integers(0, 10, count)}


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "ddpm"])
def test_samplers_that_keep_the_variance(name: str) -> None:
    scheduler = make_scheduler(name, None)
    sampler = probe(scheduler, 6, prediction="epsilon")
    assert sampler.signal is not None
    assert sampler.noise_level is not None
    kept = scheduler.alphas_cumprod.double().numpy()[sampler.timesteps.astype(int)]
    np.testing.assert_allclose(sampler.signal, np.sqrt(kept), rtol=1e-5)
    np.testing.assert_allclose(sampler.noise_level, np.sqrt(1 - kept), rtol=1e-5)


def test_flow_matching_is_a_straight_line(dit: Program) -> None:
    sampler = dit.sampler
    assert sampler.signal is not None
    assert sampler.noise_level is not None
    np.testing.assert_allclose(sampler.signal + sampler.noise_level, 1.0, atol=1e-6)
    np.testing.assert_allclose(sampler.noise_level, sampler.timesteps / 1000, atol=1e-6)


def test_a_network_that_says_the_truth_lands_on_the_data() -> None:
    """By the sampler's own rows, whatever is predicted: its last conversion gives the data back."""
    data, noise = torch.randn(3, 4), torch.randn(3, 4)
    for name, prediction in (
        ("ddim", "epsilon"),
        ("euler", "epsilon"),
        ("ddim", "v_prediction"),
        ("flow_euler", "flow"),
    ):
        sampler = probe(make_scheduler(name, None, predicts=prediction), 8, prediction=prediction)
        assert sampler.signal is not None
        assert sampler.noise_level is not None

        def network(x: Any, t: float, sampler: Any = sampler, prediction: str = prediction) -> Any:
            row = int(np.argmin(np.abs(sampler.timesteps - t)))
            signal, level = (float(each[row] * sampler.s[row]) for each in (sampler.signal, sampler.noise_level))
            return target(prediction, data, noise, signal, level).double().numpy()

        start = sampler.signal[0] * data.double().numpy() + sampler.noise_level[0] * noise.double().numpy()
        np.testing.assert_allclose(sampler.apply(network, start), data, atol=0.02)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(PassError, match="a network that predicts 'logits' should say of data is not known"):
        target("logits", torch.zeros(1), torch.zeros(1), 1.0, 0.0)


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_for_the_same_number(dit: Program) -> None:
    noised = Noised(dit, lambda number, count: batch_of(dit, number, count), "loader", 3)
    one, again, other = (noised.example(number, 4) for number in (5, 5, 6))
    assert one.step == again.step
    assert torch.equal(one.slots["sample"], again.slots["sample"])
    assert not torch.equal(one.slots["sample"], other.slots["sample"])
    assert one.truth is not None
    assert one.truth.shape == one.expected.shape == (6, *dit.contract.sample.shape)  # both halves of guidance
    data = torch.from_numpy(batch_of(dit, 5, 3)["sample"])
    level = float(dit.sampler.timesteps[one.step]) / 1000
    noise = (one.slots["sample"] - (1 - level) * data) / level
    torch.testing.assert_close(one.truth[:3], noise - data, rtol=1e-3, atol=1e-3)
    assert {noised.example(number, 4).step * 4 // dit.steps for number in range(8)} == {0, 1, 2, 3}


def test_the_truth_is_of_what_the_network_is_given(dit: Program) -> None:
    """Where the sampler's samples are data plus noise, and its input is scaled to unit variance."""
    sampler = probe(make_scheduler("euler", None, predicts="v_prediction"), dit.steps, prediction="v_prediction")
    assert sampler.noise_level is not None
    program = replace(dit, sampler=sampler)
    example = Noised(program, lambda number, count: batch_of(dit, number, count), "loader", 3).example(5, 4)
    data = torch.from_numpy(batch_of(dit, 5, 3)["sample"])
    scale, level = float(sampler.s[example.step]), float(sampler.noise_level[example.step])
    assert scale < 0.999
    noise = (example.slots["sample"] - data) / level
    assert example.truth is not None
    torch.testing.assert_close(example.truth[:3], scale * noise - scale * level * data, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: None, r"loader gives NoneType, needed a mapping of \['class_labels', 'sample'\]"),
        (lambda given: {"sample": given["sample"]}, r"loader gives \['sample'\], needed a mapping of"),
        (lambda given: {**given, "sample": given["sample"][:, :1]}, r"gives 'sample' of shape .*, needed \[2, "),
        (
            lambda given: {**given, "sample": given["sample"] * np.nan},
            "gives a 'sample' that is not finite, in batch 7",
        ),
        (lambda given: 1 / 0, r"loader\(7, 2\) raised ZeroDivisionError"),
    ],
)
def test_loaders_that_are_wrong(change: Callable[[dict[str, Any]], Any], message: str, dit: Program) -> None:
    noised = Noised(dit, lambda number, count: change(batch_of(dit, number, count)), "loader", 2)
    with pytest.raises(PassError, match=message):
        noised.example(7, 4)


# ---- the pass -------------------------------------------------------------------------------------------------------

LOADER = """
import numpy as np

def load(number, count):
    random = np.random.default_rng(number)
    return {"sample": random.normal(size=(count, %s)).astype("float32"), "class_labels": random.integers(0, 10, count)}
"""


def test_as_an_option(
    dit: Program, calibration_of: CalibrationOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = ", ".join(str(size) for size in dit.contract.sample.shape)
    (tmp_path / "our_data.py").write_text(LOADER % shape)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "our_data", raising=False)
    pruned = remove_blocks(dit, ["net.transformer_blocks.1"])
    step = Recover(steps=30, batch=8, rate=1e-3, data="our_data:load")
    decision = step.decide(pruned, calibration_of(dit))
    losses = [loss for _, loss in decision.choices["loss"]]
    assert losses[-1] < losses[0]
    without = Recover(steps=30, batch=8, rate=1e-3).decide(pruned, calibration_of(dit))
    assert without.choices["loss"] != decision.choices["loss"]
    with pytest.raises(IngestError, match="our_data has no callable 'lode'; did you mean 'load'"):
        Recover(data="our_data:lode").decide(pruned, calibration_of(dit))


def test_a_sampler_that_does_not_say(dit: Program) -> None:
    silent = replace(dit, sampler=replace(dit.sampler, signal=None, noise_level=None))
    with pytest.raises(PassError, match="does not say how much noise its steps meet"):
        Noised(silent, lambda number, count: {}, "loader", 2)
