"""From a network of diffusers to an ONNX bundle that gives what diffusers itself gives, and to one that is smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES
from numpy.typing import NDArray
from torch import Tensor, nn

from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.probe_scheduler import make_scheduler
from dcompile.compiler.program import Program
from dcompile.compiler.store import Store
from dcompile.exporters.export import export
from dcompile.exporters.settings import Settings
from dcompile.exporters.target import TargetOptions
from dcompile.exporters.targets import find_target
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.quantize import Quantize
from dcompile.runtime import load
from dcompile.runtime.random import normal

STEPS = 4
Conditions = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]


def by_label(network: nn.Module, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    output: Tensor = network(x, t.expand(len(x)), class_labels=given["class_labels"], return_dict=False)[0]
    return output


def by_text(network: nn.Module, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    output: Tensor = network(x, timestep=t.expand(len(x)), **given, return_dict=False)[0]
    return output


def pixart(network: nn.Module, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    size = {"resolution": None, "aspect_ratio": None}
    output = network(x, timestep=t.expand(len(x)), **given, added_cond_kwargs=size, return_dict=False)[0]
    mean: Tensor = output.chunk(2, dim=1)[0]  # the other half is the variance
    return mean


def flux(network: nn.Module, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
    """Sixteen tokens are a square of side four; time and strength of guidance as diffusers' pipeline gives them."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)
    words = torch.zeros(given["encoder_hidden_states"].shape[1], 3)
    strength = torch.full((len(x),), 3.5)
    extra = {"guidance": strength, "img_ids": positions, "txt_ids": words}
    output: Tensor = network(x, timestep=t.expand(len(x)) / 1000, **given, **extra, return_dict=False)[0]
    return output


@dataclass(frozen=True)
class Case:
    """How diffusers calls the network, and the guidance scale; `none`: the label for the half without a condition."""

    call: Call
    guidance: float = 1.0
    none: int | None = None


CASES = {
    "dit": Case(by_label, 2.0, none=10),
    "pixart": Case(pixart, 2.0),
    "sd3": Case(by_text, 2.0),
    "flux": Case(flux),  # distilled: the strength of guidance is an input
    "wan": Case(by_text, 1.5),
    "unet2d": Case(by_label),
    "unet_condition": Case(by_text, 2.0),
}


@torch.no_grad()
def sampled_by_diffusers(name: str, program: Program, conditions: Mapping[str, Tensor], seeds: list[int]) -> Tensor:
    """The loop of diffusers' pipelines: scale, predict twice, guide, step."""
    architecture, case = ARCHITECTURES[name], CASES[name]
    network = architecture.make()
    scheduler: Any = make_scheduler(architecture.sampler, None, predicts=program.contract.predicts)
    scheduler.set_timesteps(STEPS)
    positive = {key: value for key, value in conditions.items() if not key.startswith("negative_")}
    negative = {
        key: conditions.get(f"negative_{key}", torch.full_like(value, case.none or 0))
        for key, value in positive.items()
    }
    x = torch.from_numpy(normal(seeds, 0, program.contract.sample.shape)) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = case.call(network, scaled, t, positive)
        if case.guidance != 1:
            without = case.call(network, scaled, t, negative)
            output = without + case.guidance * (output - without)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def random_conditions(program: Program, batch: int) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(0)
    values: dict[str, NDArray[Any]] = {}
    for condition in program.contract.conditions:
        if condition.classes is not None:
            values[condition.name] = generator.integers(condition.classes, size=batch)
        else:
            values[condition.name] = generator.normal(size=(batch, *condition.shape)).astype(condition.dtype)
    return values


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_gives_what_diffusers_gives(name: str, tmp_path: Path) -> None:
    architecture, case = ARCHITECTURES[name], CASES[name]
    source = Source(architecture.spec, architecture.shape, None, architecture.sampler, STEPS, case.guidance)
    program = ingest(source)
    parity = export(
        program, find_target("onnx"), TargetOptions(threads=1), "auto", {"passes": []}, tmp_path, Settings()
    ).parity
    conditions, seeds = random_conditions(program, 3), [11, 12, 13]
    expected = sampled_by_diffusers(
        name, program, {k: torch.from_numpy(v) for k, v in conditions.items()}, seeds
    ).numpy()
    limit = 1e-4 * max(1.0, float(np.abs(expected).max()))
    assert len({float(sample.std()) for sample in expected}) == 3  # the seeds differ, and no sample is constant
    assert [each.engine for each in parity] == ["full"]
    assert parity[0].relative_error < 1e-5
    assert parity[0].max_abs_error < limit
    with load(tmp_path, threads=1) as session:
        together = session.generate(conditions=conditions, seed=seeds)
        alone = session.generate(conditions={key: value[:1] for key, value in conditions.items()}, seed=seeds[:1])
    np.testing.assert_allclose(together, expected, rtol=0, atol=limit)
    np.testing.assert_allclose(alone, expected[:1], rtol=0, atol=limit)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_everything_at_once_on_dit_stays_near_the_original(built: Path) -> None:
    original = ingest(Source(str(built.parent / "model"), steps=4, guidance=2.0))
    conditions, seeds = {"class_labels": np.array([2, 9, 4])}, [1, 2, 3]
    expected = run(original, conditions, seeds).numpy()
    with load(built, threads=1) as session:
        found = session.generate(conditions=conditions, seed=seeds)
    assert np.isfinite(found).all()
    assert 0.001 < relative(found, expected) < 0.5


def test_caching_and_int8_on_a_unet_stay_near_the_original(unet: Program, tmp_path: Path) -> None:
    passes = (CacheSteps(interval=2, warmup=1), Quantize(max_error=0.1, min_share=0.01))
    program, stages = run_passes(unet, passes, 2, Store(None))
    assert all(stage.changed for stage in stages)
    exported = export(program, find_target("onnx"), TargetOptions(), "auto", {"passes": []}, tmp_path, Settings())
    operators = exported.written.kernels
    assert operators["full"]["QLinearConv"] > operators["reuse"]["QLinearConv"] > 0
    conditions, seeds = {"class_labels": np.array([2, 9, 4])}, [1, 2, 3]
    expected = run(unet, conditions, seeds).numpy()
    with load(tmp_path, threads=1) as session:
        found = session.generate(conditions=conditions, seed=seeds)
        np.testing.assert_allclose(found, run(program, conditions, seeds).numpy(), rtol=0, atol=0.1 * expected.std())
    assert np.isfinite(found).all()
    assert 0.001 < relative(found, expected) < 0.3
