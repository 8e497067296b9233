"""What is recorded of a trajectory, against the values themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.program import Program
from dcompile.compiler.regions import find_regions
from dcompile.compiler.trace import Watched, record

CalibrationOf = Callable[[Program], Calibration]


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
    assert trace.changes["value"][0] == 0
    for step in range(1, tokens.steps):
        expected = (residual[step] - residual[step - 1]).abs().mean() / residual[step - 1].abs().mean()
        assert trace.changes["residual"][step] == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(trace.norms["residual"], residual.abs().mean((1, 2, 3)), rtol=1e-5)
    assert not np.allclose(trace.changes["value"][1:], trace.changes["residual"][1:])


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
