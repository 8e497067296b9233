"""What the values of a graph do over the steps of a trajectory: the one measurement that cache methods decide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from . import rewrite
from .calibrate import Calibration, inputs_for
from .execute import run
from .program import Program
from .rewrite import aten

KEPT = 4096  # elements of a value that are kept of each sample
Distance = Literal["l1", "mse", "cosine"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Watched:
    """A value to record: node names. With a base, what is recorded is the value minus the base, a residual."""

    name: str
    value: str
    base: str | None = None


@dataclass(frozen=True)
class Trace:
    """A sample of each watched value at every step.

    kept: name -> float32 [T, B, K], the same K elements at every step; B counts both halves of guidance.
    norms: name -> float32 [T], mean absolute value over all elements.
    changes: name -> float32 [T], mean |x_i - x_{i-1}| / mean |x_{i-1}| over all elements; 0 at step 0.
    """

    kept: Mapping[str, Floats]
    norms: Mapping[str, Floats]
    changes: Mapping[str, Floats]

    def distances(self, name: str, kind: Distance) -> NDArray[np.float64]:
        """[T, T]: entry (i, m) says how far the value at step m is from that at step i, mean over samples.

        "l1" and "mse" are relative to the trajectory's own mean size, "cosine" is 1 - cos.
        """
        values = self.kept[name].astype(np.float64)
        if kind == "cosine":
            unit = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
            result: NDArray[np.float64] = 1 - np.einsum("ibk,mbk->im", unit, unit) / values.shape[1]
            return result
        power = 1 if kind == "l1" else 2
        size = max(float((np.abs(values) ** power).mean()), 1e-12)
        rows = [(np.abs(values - values[step]) ** power).mean(axis=(1, 2)) / size for step in range(len(values))]
        return np.stack(rows)


def record(program: Program, watched: Sequence[Watched], calibration: Calibration) -> Trace:
    """Run the calibration's requests once and watch. The program must have no cache sites yet."""
    recorder = _Recorder(watched)
    watch(program, watched, calibration, recorder.take, "recording the trajectory")
    return recorder.trace()


def record_beside(
    program: Program, other: fx.GraphModule, watched: Sequence[Watched], calibration: Calibration
) -> Trace:
    """What another graph with nodes of the same names has for the same inputs, along the program's own trajectory."""
    recorder, module = _Recorder(watched), _shown(other, watched)
    given = inputs_for(program, module, len(calibration.seeds))

    def look(step: int, mask: object, inputs: list[Tensor]) -> None:
        for each, value in zip(watched, module(*given(inputs)), strict=True):
            recorder.take(step, each, value)

    run(
        program, calibration.conditions, calibration.seeds, on_inputs=look,
        on_step=lambda step, _: calibration.progress((step + 1) / program.steps, "recording beside the trajectory"),
    )  # fmt: skip
    return recorder.trace()


def _shown(graph: fx.GraphModule, watched: Sequence[Watched]) -> fx.GraphModule:
    """The graph with the watched values, or residuals, for its results."""
    module = rewrite.clone(graph)
    end, results = rewrite.output_node(module), []
    for each in watched:
        value = rewrite.node_named(module, each.value)
        if each.base is not None:
            base = rewrite.node_named(module, each.base)
            value = rewrite.call(module, end, aten.sub.Tensor, value, base)
        results.append(value)
    end.args = (tuple(results),)
    return rewrite.finish(module)


def watch(
    program: Program, watched: Sequence[Watched], calibration: Calibration,
    take: Callable[[int, Watched, Tensor], None], doing: str,
) -> None:  # fmt: skip
    """Run the calibration's requests once; take(step, watched, value) is told each value, or residual."""
    bases: dict[str, Tensor] = {}
    needed = {each.base for each in watched if each.base is not None}

    def tap(step: int, node: str, value: Tensor) -> None:
        for each in watched:  # before the base is replaced: a node may be one site's value and the next one's base
            if each.value == node:
                take(step, each, value if each.base is None else value - bases[each.base])
        if node in needed:
            bases[node] = value

    taps = dict.fromkeys(node for each in watched for node in (each.value, each.base) if node is not None)
    calibration.observe(program, list(taps), tap, doing)


class _Recorder:
    """Streams: of each value it holds the last one whole, and K elements of the others."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self.before: dict[str, Tensor] = {}
        self.kept: dict[str, list[Floats]] = {each.name: [] for each in watched}
        self.norms: dict[str, list[float]] = {each.name: [] for each in watched}
        self.changes: dict[str, list[float]] = {each.name: [] for each in watched}

    def take(self, step: int, each: Watched, value: Tensor) -> None:
        before = self.before.get(each.name)
        change = 0.0 if before is None else float((value - before).abs().mean() / before.abs().mean().clamp_min(1e-12))
        flat = value.reshape(len(value), -1)
        chosen = torch.linspace(0, flat.shape[1] - 1, min(KEPT, flat.shape[1])).round().long()
        self.kept[each.name].append(flat[:, chosen].float().numpy())
        self.norms[each.name].append(float(value.abs().mean()))
        self.changes[each.name].append(change)
        self.before[each.name] = value

    def trace(self) -> Trace:
        return Trace(
            {name: np.stack(values) for name, values in self.kept.items()},
            {name: np.array(values, np.float32) for name, values in self.norms.items()},
            {name: np.array(values, np.float32) for name, values in self.changes.items()},
        )
