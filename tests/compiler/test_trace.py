"""What is recorded of a trajectory, against the values themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.program import Program
from dcompile.compiler.regions import find_regions
from dcompile.compiler.rewrite import assign, clone, weights
from dcompile.compiler.store import NOWHERE, Store
from dcompile.compiler.trace import Trace, Watched, record, record_beside

CalibrationOf = Callable[[Program], Calibration]
RECORDING, BESIDE = "recording the trajectory", "recording beside the trajectory"


@pytest.fixture
def values(tokens: Program, calibration_of: CalibrationOf) -> tuple[str, str, dict[tuple[int, str], Tensor]]:
    """(entry, exit, value by step and node) of the second block."""
    stream = find_regions(tokens.graph)[1].streams[0]
    seen: dict[tuple[int, str], Tensor] = {}
    nodes = [stream.entry, stream.exit]
    calibration_of(tokens).observe(tokens, nodes, lambda step, node, value: seen.update({(step, node): value}), "")
    return stream.entry, stream.exit, seen


def test_changes_and_sizes(
    tokens: Program, calibration_of: CalibrationOf, values: tuple[str, str, dict[tuple[int, str], Tensor]]
) -> None:
    entry, leaving, seen = values
    watched = [Watched("value", leaving), Watched("residual", leaving, entry), Watched("before", entry)]
    trace = record(tokens, watched, calibration_of(tokens))
    residual = torch.stack([seen[step, leaving] - seen[step, entry] for step in range(tokens.steps)])
    changes = {each.name: trace.changes(each.name) for each in watched}
    assert changes["value"][0] == 0
    for step in range(1, tokens.steps):
        expected = (residual[step] - residual[step - 1]).abs().mean() / residual[step - 1].abs().mean()
        assert changes["residual"][step] == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(trace.norms["residual"], residual.abs().mean((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(trace.moves["residual"][1:], residual.diff(dim=0).abs().mean((2, 3)), rtol=1e-5)
    assert not np.allclose(changes["value"][1:], changes["residual"][1:])


def test_distances(
    tokens: Program, calibration_of: CalibrationOf, values: tuple[str, str, dict[tuple[int, str], Tensor]]
) -> None:
    """Small values are kept whole, so that distances are exact."""
    _, leaving, seen = values
    trace = record(tokens, [Watched("value", leaving)], calibration_of(tokens))
    flat = torch.stack([seen[step, leaving].flatten(1) for step in range(tokens.steps)]).double().numpy()
    l1, mse, cosine = (trace.distances("value", kind) for kind in ("l1", "mse", "cosine"))
    assert l1[1, 4] == pytest.approx(np.abs(flat[1] - flat[4]).mean() / np.abs(flat).mean())
    assert mse[1, 4] == pytest.approx(((flat[1] - flat[4]) ** 2).mean() / (flat**2).mean())
    norms = np.linalg.norm(flat, axis=-1)
    assert cosine[1, 4] == pytest.approx(1 - ((flat[1] * flat[4]).sum(-1) / norms[1] / norms[4]).mean())
    for matrix in (l1, mse, cosine):
        np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-12)
        np.testing.assert_allclose(matrix, matrix.T)
        assert matrix[0, 5] > matrix[4, 5] > 0


# ---- kept ---------------------------------------------------------------------------------------------------------


class Recorded:
    """Records with a store, and counts the trajectories that this takes."""

    def __init__(self, calibration: Calibration, store: Store) -> None:
        self.told: list[str] = []
        self.calibration = replace(calibration, progress=lambda _, text: self.told.append(text), store=store)

    def trajectories(self, text: str = RECORDING) -> int:
        """Since it was last asked."""
        found = self.told.count(text) // 6
        self.told.clear()
        return found


def watched_in(program: Program) -> list[Watched]:
    streams = [region.streams[0] for region in find_regions(program.graph)]
    return [Watched(f"block{index}", each.exit, each.entry) for index, each in enumerate(streams)]


def assert_same(found: Trace, expected: Trace) -> None:
    for kind in ("kept", "norms", "moves"):
        found_of, expected_of = getattr(found, kind), getattr(expected, kind)
        assert list(found_of) == list(expected_of)
        for name, values in expected_of.items():
            assert found_of[name].dtype == values.dtype == np.float32
            np.testing.assert_array_equal(found_of[name], values)


def test_a_kept_trace_is_the_fresh_one(tokens: Program, calibration_of: CalibrationOf, tmp_path: Path) -> None:
    watched = watched_in(tokens)
    fresh = record(tokens, watched, calibration_of(tokens))
    runs = Recorded(calibration_of(tokens), Store(tmp_path))
    assert_same(record(tokens, watched, runs.calibration), fresh)
    assert runs.trajectories() == 1
    assert_same(record(tokens, watched, runs.calibration), fresh)
    assert runs.trajectories() == 0


def test_each_value_is_kept_by_itself(tokens: Program, calibration_of: CalibrationOf, tmp_path: Path) -> None:
    """Whatever is watched beside it, and whatever it is called."""
    first, second, third = watched_in(tokens)
    runs = Recorded(calibration_of(tokens), Store(tmp_path))
    record(tokens, [first, second], runs.calibration)
    assert runs.trajectories() == 1
    renamed = replace(second, name="other")
    found = record(tokens, [renamed], runs.calibration)
    assert runs.trajectories() == 0
    assert_same(found, record(tokens, [renamed], calibration_of(tokens)))
    mixed = [third, first]
    assert_same(record(tokens, mixed, runs.calibration), record(tokens, mixed, calibration_of(tokens)))
    assert runs.trajectories() == 1  # for the third alone
    record(tokens, [replace(first, base=None)], runs.calibration)
    assert runs.trajectories() == 1  # the value is not the residual


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_torn_file_is_recorded_again(
    tokens: Program, calibration_of: CalibrationOf, tmp_path: Path, suffix: str
) -> None:
    watched = watched_in(tokens)
    runs = Recorded(calibration_of(tokens), Store(tmp_path))
    fresh = record(tokens, watched, runs.calibration)
    torn = sorted(tmp_path.glob(f"*{suffix}"))[0]
    torn.write_bytes(torn.read_bytes()[:-3])
    runs.trajectories()
    assert_same(record(tokens, watched, runs.calibration), fresh)
    assert runs.trajectories() == 1
    assert_same(record(tokens, watched, runs.calibration), fresh)
    assert runs.trajectories() == 0


def test_what_decides_a_trajectory_records_another(
    tokens: Program, calibration_of: CalibrationOf, tmp_path: Path
) -> None:
    watched = watched_in(tokens)[:1]
    runs = Recorded(calibration_of(tokens), Store(tmp_path))
    record(tokens, watched, runs.calibration)
    graph = clone(tokens.graph)
    name, weight = next(iter(weights(graph).items()))
    assign(graph, name, weight.detach() * 1.5)
    other = tokens.with_graph(graph)
    runs.trajectories()
    changed = record(other, watched, runs.calibration)
    assert runs.trajectories() == 1
    assert_same(changed, record(other, watched, calibration_of(tokens)))
    record(tokens, watched, replace(runs.calibration, seeds=[7, 8]))
    assert runs.trajectories() == 1
    record(tokens, watched, runs.calibration)
    assert runs.trajectories() == 0
    beside = record_beside(tokens, graph, watched, runs.calibration)
    assert runs.trajectories(BESIDE) == 1
    assert_same(record_beside(tokens, graph, watched, runs.calibration), beside)
    assert runs.trajectories(BESIDE) == 0


def test_conditions_decide_a_trajectory(dit: Program, calibration_of: CalibrationOf, tmp_path: Path) -> None:
    watched = watched_in(dit)[:1]
    runs = Recorded(calibration_of(dit), Store(tmp_path))
    record(dit, watched, runs.calibration)
    ((name, labels),) = runs.calibration.conditions.items()
    runs.trajectories()
    record(dit, watched, replace(runs.calibration, conditions={name: labels[::-1].copy()}))
    assert runs.trajectories() == 1


def test_without_a_store_nothing_is_kept(tokens: Program, calibration_of: CalibrationOf) -> None:
    runs = Recorded(calibration_of(tokens), NOWHERE)
    traces = [record(tokens, watched_in(tokens), runs.calibration) for _ in range(2)]
    assert runs.trajectories() == 2
    assert_same(*traces)
