"""Correctors of the update: how far a reused step goes, the variance of what it arrives at, the noise it began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compiler import rewrite
from ...compiler.calibrate import Calibration
from ...compiler.execute import run
from ...compiler.plan import Mask, Site, taylor
from ...compiler.program import Program
from ...compiler.rewrite import aten
from ...compiler.sampler import Sampler
from ...compiler.trace import Watched, watch

Floats = NDArray[np.float64]
GAIN, PRIOR = "gain", "prior"  # tables of the corrected step, and the site that holds its first noise


# --- step sizes ---


def why_not_resized(sampler: Sampler) -> str | None:
    """Why the sampler's steps have no lengths to change: each must go from one sample to the next along one output."""
    instead = "steps have lengths with flow_euler, euler and ddim"
    if sampler.prediction not in ("flow", "epsilon"):
        return f"the network predicts {sampler.prediction}, along which no step goes; {instead} on flow or epsilon"
    if np.any(sampler.b[:, 1:]):
        return f"its sampler goes along several outputs at once; {instead}"
    if sampler.stochastic:
        return f"its sampler draws noise at each step; {instead}"
    if not np.all(sampler.a + sampler.b[:, 0] * sampler.p):
        return f"a step of its sampler forgets the sample; {instead}"
    return None


def step_lengths(sampler: Sampler) -> Floats:
    """[T]: how far each row goes along its output, in the scale in which no row changes what it starts from."""
    kept = np.cumprod(sampler.a + sampler.b[:, 0] * sampler.p)
    lengths: Floats = sampler.b[:, 0] * sampler.q / kept
    return lengths


def resized(lengths: Floats, trust: Floats) -> Floats:
    """[T]: what each step's length is multiplied by: its trust, and what makes up for the lengths lost before.

    The lost length is spread over all the steps that are left, in proportion; the last one has no trust of its own, so
    that the sum is what it was. ERTACache (2508.21091); trust 1 everywhere is 1 everywhere.
    """
    factors = np.ones(len(lengths))
    lost = 0.0
    for step, length in enumerate(lengths):
        factors[step] = 1 + lost / lengths[step:].sum()
        if step < len(lengths) - 1:
            factors[step] *= trust[step]
        lost += (1 - factors[step]) * length
    return factors


def measure_trust(
    program: Program, site: Watched, computed: Mask, correction: NDArray[np.float32] | None, calibration: Calibration
) -> Floats:
    """[T]: 1 - |error of what stands in for the output| / |the output's change to the next step|, within 0 and 1.

    site: the network's output, and what its residual is taken from. 1 where it is computed, and at the last step.
    """
    errors, changes = np.zeros(program.steps), np.zeros(program.steps)
    last: dict[str, Tensor] = {}

    def take(step: int, each: Watched, value: Tensor) -> None:
        if each is output:
            if step:
                changes[step - 1] = float((value - last["output"]).abs().mean())
            last["output"] = value
        elif computed[step]:
            last["held"] = value
        else:
            held = last["held"] if correction is None else _corrected(last["held"], correction[step])
            errors[step] = float((held - value).abs().mean())

    output = Watched(f"{site.name}.output", site.value)
    watch(program, [output, site], calibration, take, "measuring the lengths of steps")
    trust: Floats = np.clip(1 - errors / np.maximum(changes, 1e-12), 0, 1)
    return np.where(computed, 1.0, trust)


def _corrected(value: Tensor, rows: NDArray[np.float32]) -> Tensor:
    slope, offset = (torch.from_numpy(row).reshape(rewrite.by_channel(value.dim())) for row in rows)
    return value * slope + offset


def with_lengths(program: Program, factors: Sequence[float]) -> Program:
    """The program with each step's output counting that many times; what it takes of the sample stays."""
    sampler = replace(program.sampler, q=program.sampler.q * np.asarray(factors))
    return replace(program, sampler=sampler, tables={**program.tables, "row": torch.from_numpy(sampler.row_table())})


# --- variance ---


def compensation(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(slope, offset) that give samples their own mean and the variance that is expected: Q&C (2503.02508)."""
    mean, spread = float(found.mean()), float(found.std())
    slope = float(expected.std()) / spread if spread > 0 else 1.0
    return slope, (1 - slope) * mean


def measure_gains(program: Program, reference: Program, calibration: Calibration) -> NDArray[np.float32]:
    """float32 [T, 2]: slope and offset of each step's sample that restore the variance of the reference's.

    One step after the other, each from samples that are compensated up to there.
    """
    wanted: list[Tensor] = []
    given = (calibration.conditions, calibration.seeds)
    run(reference, *given, on_step=lambda step, sample: wanted.append(sample.clone()))
    gains: list[tuple[float, float]] = []

    def compensate(step: int, sample: Tensor) -> None:
        slope, offset = compensation(sample, wanted[step])
        sample.mul_(slope).add_(offset)
        gains.append((slope, offset))
        calibration.progress((step + 1) / program.steps, "measuring the variance")

    run(program, *given, on_step=compensate)
    return np.array(gains, np.float32)


def with_gains(program: Program, gains: NDArray[np.float32]) -> Program:
    """The program with each step's sample multiplied and added to, by a table of one row a step."""
    graph = rewrite.clone(program.graph)
    rows = rewrite.add_input(graph, GAIN, torch.from_numpy(gains[0]))
    end = rewrite.output_node(graph)
    sample, *others = rewrite.output_values(graph)
    slope, offset = (rewrite.call(graph, end, aten.select.int, rows, 0, column) for column in range(2))
    scaled = rewrite.call(graph, end, aten.mul.Tensor, sample, slope)
    end.args = ((rewrite.call(graph, end, aten.add.Tensor, scaled, offset), *others),)
    tables = {**program.tables, GAIN: torch.from_numpy(gains)}
    return replace(program.with_graph(rewrite.finish(graph)), tables=tables)


# --- the noise that it began as ---


def with_prior(program: Program, strength: float) -> Program:
    """The program with so much of the first noise added to the sample before each step of the second half of time.

    As Faster Diffusion (2312.09608) does, by 0.003. The noise is a site of the plan, copied from step 0 on.
    """
    graph = rewrite.clone(program.graph)
    sample = rewrite.node_named(graph, "sample")
    row = rewrite.add_input(graph, PRIOR, torch.zeros(()))
    readers = list(sample.users)
    first = next(node for node in graph.graph.nodes if node in readers)
    noise = rewrite.call(graph, first, aten.mul.Tensor, sample, 1.0)  # its own tensor: a state is no other slot's
    added = rewrite.call(graph, first, aten.mul.Tensor, noise, row)
    fed = rewrite.call(graph, first, aten.add.Tensor, sample, added)
    for reader in readers:
        reader.replace_input_with(sample, fed)
    late = (program.sampler.timesteps < 500) & (np.arange(program.steps) > 0)
    computed = tuple(step == 0 for step in range(program.steps))
    site = Site(PRIOR, noise.name, None, computed, *taylor(computed, 0))
    plan = replace(program.plan, sites=(site, *program.plan.sites))
    tables = {**program.tables, PRIOR: torch.tensor(np.where(late, strength, 0), dtype=torch.float32)}
    return replace(program.with_graph(rewrite.finish(graph)), tables=tables, plan=plan)
