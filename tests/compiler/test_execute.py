"""Running a program: samples that depend on their own seed alone, noise, history, taps, and what stops a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import models
import numpy as np
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, calibrate, compare_samples, example_conditions, snapshots
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import batch_factor, batch_size, initial_slots, run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime.random import normal


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "contract.yaml"
    path.write_text(models.TOKENS_CONTRACT.replace("flow", "epsilon"))
    return path


def tokens(contract: Path, sampler: str, steps: int) -> Program:
    return ingest(Source("models:tokens", contract=contract, sampler=sampler, steps=steps))


def test_sample_depends_on_its_own_seed_and_condition_alone(dit: Program) -> None:
    program = CacheSteps(interval=2).apply(dit, Decision()).program  # states too are one sample's own
    labels = np.array([5, 2, 9])
    together = run(program, {"class_labels": labels}, [11, 12, 13])
    for i, seed in enumerate([11, 12, 13]):
        alone = run(program, {"class_labels": labels[i : i + 1]}, [seed])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    swapped = run(program, {"class_labels": labels[::-1].copy()}, [13, 12, 11])
    torch.testing.assert_close(swapped.flip(0), together, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_first_sample_is_the_scaled_noise_of_the_seeds(contract: Path) -> None:
    program = tokens(contract, "euler", 3)
    assert program.contract.initial_scale > 10  # sigma of the first step
    expected = normal([3, 4], 0, (6, 4)) * np.float32(program.contract.initial_scale)
    np.testing.assert_array_equal(initial_slots(program, {}, [3, 4])["sample"].numpy(), expected)


@pytest.mark.parametrize(("sampler", "ring"), [("dpm++2m", 2), ("dpm++3m", 3), ("lms", 4)])
def test_history_is_that_of_diffusers(contract: Path, sampler: str, ring: int) -> None:
    program = tokens(contract, sampler, 7)
    assert program.sampler.ring == ring
    assert list(rewrite.placeholders(program.graph))[:2] == ["sample", "history"]
    scheduler = {
        "dpm++2m": diffusers.DPMSolverMultistepScheduler(),
        "dpm++3m": diffusers.DPMSolverMultistepScheduler(solver_order=3),
        "lms": diffusers.LMSDiscreteScheduler(),
    }[sampler]
    scheduler.set_timesteps(7)
    sample = torch.from_numpy(normal([0, 1], 0, (6, 4))) * scheduler.init_noise_sigma
    network = models.tokens()
    found: list[Any] = []
    run(program, {}, [0, 1], on_step=lambda step, x: found.append(x))
    with torch.no_grad():
        for t, ours in zip(scheduler.timesteps, found, strict=True):
            output = network(scheduler.scale_model_input(sample, t), t.expand(2))
            sample = scheduler.step(output, t, sample).prev_sample
            torch.testing.assert_close(ours, sample, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_seed_and_the_step(contract: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tokens(contract, "euler_a", 4)
    assert program.contract.stochastic
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(4)
    draw = iter(range(1, 5))
    module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(normal([8, 9], next(draw), (6, 4))))
    sample = torch.from_numpy(normal([8, 9], 0, (6, 4))) * scheduler.init_noise_sigma
    network = models.tokens()
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(sample, t), t.expand(2))
            sample = scheduler.step(output, t, sample).prev_sample
    found = run(program, {}, [8, 9])
    torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(program, {}, [9])[0], found[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(run(program, {}, [8, 9]), found)


def test_taps_show_values_of_computed_nodes_only(dit: Program) -> None:
    program = CacheSteps(interval=3, warmup=1, site="branch", predictor="copy").apply(dit, Decision()).program
    inside = program.regions[1].streams[0].branches[1]  # feed-forward of block 1
    source = rewrite.node_named(program.graph, inside.value).args[0]
    assert isinstance(source, torch.fx.Node)
    seen: list[tuple[int, str, tuple[int, ...]]] = []
    taps = [source.name, inside.update, "class_labels"]
    conditions = example_conditions(dit.contract, 1)
    tapped = run(program, conditions, [0], tap=lambda s, n, v: seen.append((s, n, tuple(v.shape))), taps=taps)
    assert [step for step, name, _ in seen if name == source.name] == [0, 3]
    assert [step for step, name, _ in seen if name == inside.update] == list(range(6))  # gate * cached value
    assert [step for step, name, _ in seen if name == "class_labels"] == list(range(6))
    assert {shape for _, name, shape in seen if name == source.name} == {(2, 16, 128)}  # both halves of guidance
    assert torch.equal(tapped, run(program, conditions, [0]))


def test_sizes_are_multiples_of_the_batch_whichever_symbols_stand_for_it() -> None:
    """U-Nets that ask for their batch export with a symbol for each input: two of them added are twice the batch."""
    program = ingest(Source("models:unet_condition", sampler="ddim", steps=2, guidance=2.0))
    sizes = [node.meta["val"] for node in program.graph.graph.nodes if rewrite.is_size(node)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    assert len(symbols) > 1
    assert {batch_factor(size) for size in sizes if len(size.node.expr.free_symbols) > 1} == {2}
    assert {batch_size(size, 3) for size in sizes} == {3, 6}
    assert batch_size(5, 3) == 5


def test_overflow_names_the_step(dit: Program) -> None:
    rows = dit.tables["row"].clone()
    rows[2] = 1e38
    broken = replace(dit, tables={**dit.tables, "row": rows})
    with pytest.raises(PassError, match="the sample is not finite after step 3 of 6"):
        run(broken, example_conditions(dit.contract, 1), [0])


# ---- calibration --------------------------------------------------------------------------------------------------


def test_teacher_is_the_program_and_its_error_is_none(dit: Program, calibration_of: Any) -> None:
    calibration: Calibration = calibration_of(dit)
    assert calibration.teacher.shape == (2, 4, 8, 8)
    assert calibration.error(dit) == {"relative_error": 0.0, "psnr": 100.0}
    cached = CacheSteps(interval=2).apply(dit, Decision()).program
    error = calibration.error(cached)
    assert 0 < error["relative_error"] < 0.5
    found = run(cached, calibration.conditions, calibration.seeds)
    assert error["relative_error"] == pytest.approx(
        float((found - calibration.teacher).norm() / calibration.teacher.norm()), rel=0.2
    )


def test_calibration_seeds_are_not_those_of_users(dit: Program) -> None:
    calibration = calibrate(dit, 2)
    assert min(calibration.seeds) >= 1_000_000
    assert torch.equal(calibration.teacher, run(dit, calibration.conditions, calibration.seeds))


def test_labels_are_spread_over_the_classes(dit: Program) -> None:
    for count in (1, 3, 10, 25):
        labels = example_conditions(dit.contract, count)["class_labels"]
        assert labels.dtype == np.int64
        assert labels.shape == (count,)
        assert labels.min() >= 0
        assert labels.max() < 10
        assert len(set(labels.tolist())) == min(count, 10)


def test_error_of_a_latent_is_relative_to_its_own_range(dit: Program) -> None:
    expected = np.linspace(-3, 5, 4 * 64, dtype=np.float32).reshape(1, 4, 8, 8)
    found = expected + np.float32(0.08)
    error = compare_samples(found, expected, dit.contract)
    assert error["psnr"] == pytest.approx(20 * np.log10(8 / 0.08), abs=0.01)


def test_snapshots_are_inputs_of_the_graph_spread_over_the_steps(dit: Program, calibration_of: Any) -> None:
    kept = snapshots(dit, calibration_of(dit), 3)
    assert [step for step, _ in kept] == [0, 2, 5]
    samples: list[Any] = []
    run(dit, calibration_of(dit).conditions, calibration_of(dit).seeds, on_step=lambda step, x: samples.append(x))
    for step, inputs in kept:
        assert torch.equal(dit.graph(*inputs)[0], samples[step])


def test_snapshots_fit_a_graph_with_an_input_that_nothing_reads(contract: Path) -> None:
    """A network may ignore its timestep, or a pass may leave a condition without a reader."""
    program = tokens(contract, "ddim", 3)
    graph = rewrite.clone(program.graph)
    rewrite.add_input(graph, "unread", torch.zeros(1))
    program = replace(program, graph=rewrite.finish(graph), tables={**program.tables, "unread": torch.zeros(3, 1)})
    for _, values in snapshots(program, calibrate(program, 1), 2):
        assert torch.isfinite(program.graph(*values)[0]).all()
