"""What a cache pass measures is recorded once, and decides the same when it was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.program import Program
from dcompile.compiler.store import NOWHERE, Store
from dcompile.exporters.profile import profile_program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.quantize import Quantize

CalibrationOf = Callable[[Program], Calibration]


@dataclass
class Told:
    """Counts the trajectories of six steps that were recorded."""

    texts: list[str] = field(default_factory=list)

    def __call__(self, fraction: float, text: str) -> None:
        self.texts.append(text)

    @property
    def trajectories(self) -> int:
        return sum(text.startswith("recording") for text in self.texts) // 6


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": "segments", "budget": 2}, {"method": "segments", "budget": 4}),
        ({"method": "segments", "budget": 2}, {"method": "segments", "budget": 2, "distance": "cosine"}),
        ({"method": "ertacache", "threshold": 0.5}, {"method": "ertacache", "threshold": 0.2, "correct": False}),
        ({"method": "bac", "budget": 2}, {"method": "segments", "site": "branch", "budget": 3, "each": True}),
        ({"method": "profilingdit", "warmup": 2}, {"method": "profilingdit", "warmup": 1, "interval": 2}),
        ({"method": "teacache", "threshold": 0.9}, {"method": "teacache", "threshold": 0.5}),
    ],
    ids=lambda options: options["method"],
)
def test_other_options_record_nothing_again(
    dit: Program, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    store, once, again = Store(tmp_path), Told(), Told()
    run_passes(dit, (CacheSteps(**first),), 2, store, once)
    assert once.trajectories == 1
    kept, _ = run_passes(dit, (CacheSteps(**second),), 2, store, again)
    assert again.trajectories == 0
    fresh, _ = run_passes(dit, (CacheSteps(**second),), 2, NOWHERE)
    assert repr(kept.plan) == repr(fresh.plan)


def test_noise_is_measured_once_for_all_intervals(dit: Program, tmp_path: Path) -> None:
    """With what the quantised program has beside the trajectory."""
    store, quantize = Store(tmp_path), Quantize()
    counts = []
    for interval in (3, 2):
        told = Told()
        step = CacheSteps(method="taylorseer", interval=interval)
        program, _ = run_passes(dit, (step, quantize), 2, store, told)
        counts.append(told.trajectories)
    assert counts == [2, 0]
    fresh, _ = run_passes(dit, (step, quantize), 2, NOWHERE)
    assert program.history[0].details == fresh.history[0].details


def test_a_pass_on_another_program_records_its_own(dit: Program, tmp_path: Path) -> None:
    from dcompile.passes.prune_layers import PruneLayers

    store, told = Store(tmp_path), Told()
    step = CacheSteps(method="segments", budget=3, front=0)
    run_passes(dit, (step,), 2, store)
    run_passes(dit, (PruneLayers(blocks=("transformer_blocks.1",)), step), 2, store, told)
    assert told.trajectories == 1


def test_a_profile_shows_what_a_pass_recorded(dit: Program, tmp_path: Path) -> None:
    store, told = Store(tmp_path), Told()
    run_passes(dit, (CacheSteps(method="bac", budget=3),), 2, store)
    profile = profile_program(dit, "branch", 2, told, store)
    assert told.texts == []
    fresh = profile_program(dit, "branch", 2)
    assert (profile.names, profile.changes.tolist(), profile.norms.tolist()) == (
        fresh.names, fresh.changes.tolist(), fresh.norms.tolist()
    )  # fmt: skip
    run_passes(dit, (CacheSteps(method="bac", budget=2),), 2, store, told)
    assert told.trajectories == 0
