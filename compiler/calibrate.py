"""Calibration data: trajectories of the program itself, from seeds, so that no data set is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..runtime.manifest import Contract
from ..runtime.random import normal
from . import quality
from .execute import Tap, run, zero_state
from .program import Pass, Program
from .rewrite import placeholders
from .store import NOWHERE, Store
from .variants import build_variant

# (fraction done 0..1, what is being done)
Progress = Callable[[float, str], None]


def no_progress(fraction: float, text: str) -> None:
    """For callers that show nothing."""


@dataclass(frozen=True)
class Requests:
    """Requests to run and watch.

    conditions: name -> [B, ...]. seeds: B of them. store: where what is recorded of their trajectories is kept.
    """

    conditions: Mapping[str, NDArray[Any]]
    seeds: Sequence[int]
    progress: Progress = field(default=no_progress, compare=False, kw_only=True)
    store: Store = field(default=NOWHERE, compare=False, kw_only=True)

    def observe(self, program: Program, taps: Sequence[str], tap: Tap, doing: str) -> Tensor:
        """Run the program's trajectory, showing the tapped nodes; -> its samples."""
        return run(
            program, self.conditions, self.seeds, tap=tap, taps=taps,
            on_step=lambda step, _: self.progress((step + 1) / program.steps, doing),
        )  # fmt: skip


@dataclass(frozen=True)
class Calibration(Requests):
    """Requests, and what the uncompressed program answers to them.

    original: the program before any pass. teacher: its samples [B, *shape]. following: the passes after the one that is
    told this; one that `looks_ahead` may decide by them.
    """

    original: Program
    teacher: Tensor
    following: tuple[Pass, ...] = ()

    def error(self, program: Program) -> dict[str, float]:
        """Relative error and PSNR (dB) of the program's samples against the teacher's, same seeds."""
        found = run(
            program, self.conditions, self.seeds,
            on_step=lambda step, _: self.progress((step + 1) / program.steps, "measuring the error"),
        ).numpy()  # fmt: skip
        return compare_samples(found, self.teacher.numpy(), program.contract)


def compare_samples(found: NDArray[Any], expected: NDArray[Any], contract: Contract) -> dict[str, float]:
    low, high = contract.value_range or (float(expected.min()), float(expected.max()))
    decibels = quality.psnr(found, expected, data_range=max(high - low, 1e-12))
    return {"relative_error": quality.relative_error(found, expected), "psnr": float(np.mean(decibels))}


def example_conditions(contract: Contract, count: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Conditions for `count` samples: labels in turn, and normal noise for everything else."""
    conditions: dict[str, NDArray[Any]] = {}
    for index, condition in enumerate(contract.conditions):
        if condition.classes is not None:
            values = np.arange(count) * max(1, condition.classes // max(count, 1)) % condition.classes
            conditions[condition.name] = values.astype(condition.dtype)
        elif condition.dtype == "float32":
            conditions[condition.name] = normal([seed + i for i in range(count)], 1_000_000 + index, condition.shape)
        else:
            conditions[condition.name] = np.ones((count, *condition.shape), condition.dtype)
    return conditions


def calibration_requests(contract: Contract, count: int) -> tuple[dict[str, NDArray[Any]], list[int]]:
    """Conditions and seeds to calibrate on; the seeds are far from those that users and evaluations start with."""
    return example_conditions(contract, count), list(range(1_000_000, 1_000_000 + count))


def calibrate(program: Program, count: int, progress: Progress = no_progress, store: Store = NOWHERE) -> Calibration:
    """Run `count` samples of the uncompressed program; they are the teacher of every pass."""
    conditions, seeds = calibration_requests(program.contract, count)
    teacher = run(
        program, conditions, seeds, on_step=lambda step, _: progress((step + 1) / program.steps, "running the teacher")
    )
    return Calibration(conditions, seeds, program, teacher, progress=progress, store=store)


def inputs_for(program: Program, graph: fx.GraphModule, batch: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """Of what a step of a program without cache sites reads, the inputs of a graph that has them by the same names.

    Zeros for those that the step does not read.
    """
    read = build_variant(program, ()).inputs
    nodes = placeholders(graph)

    def arranged(inputs: list[Tensor]) -> list[Tensor]:
        given = dict(zip(read, inputs, strict=True))
        return [given[name] if name in given else zero_state(node, batch) for name, node in nodes.items()]

    return arranged


def spread(steps: int, count: int) -> list[int]:
    """At most `count` of the steps, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, steps - 1, count)})


def snapshots(program: Program, calibration: Calibration, count: int) -> list[tuple[int, list[Tensor]]]:
    """(step, inputs of the step graph) at `count` steps spread over the trajectory of a program without cache sites."""
    steps = spread(program.steps, count)
    kept: list[tuple[int, list[Tensor]]] = []
    given = inputs_for(program, program.graph, len(calibration.seeds))

    def keep(step: int, mask: object, inputs: list[Tensor]) -> None:
        if step in steps:
            kept.append((step, given(inputs)))

    run(program, calibration.conditions, calibration.seeds, on_inputs=keep)
    return kept


@torch.no_grad()
def output_error(program: Program, at: Sequence[tuple[int, list[Tensor]]], expected: Sequence[Tensor]) -> float:
    """Mean over the snapshots of ||x' - expected|| / ||expected - x||: a step's error relative to what it does."""
    total = 0.0
    for (_, inputs), target in zip(at, expected, strict=True):
        found = program.graph(*inputs)[0]
        total += float((found - target).norm() / (target - inputs[0]).norm().clamp_min(1e-12))
    return total / len(at)
