"""Engine against program: what is close enough, and what is a bug."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dcompile.compiler.errors import InternalError
from dcompile.compiler.program import Program
from dcompile.exporters.lower import Lowered
from dcompile.exporters.onnx import WEIGHTS_FILE
from dcompile.exporters.parity import FP32_TOLERANCE, Parity, check_parity

FILES = {"full": "engines/full.onnx", "reuse": "engines/reuse.onnx"}


def compare(program: Program, lowered: Lowered, folder: Path, told: list[float] | None = None) -> tuple[Parity, ...]:
    tell = told.append if told is not None else lambda fraction: None
    return check_parity(program, lowered, folder, FILES, "onnx", 1, tell)


def test_every_engine_is_compared_at_each_of_its_steps(cached: Program, lowered: Lowered, exported: Path) -> None:
    told: list[float] = []
    results = compare(cached, lowered, exported, told)
    assert [parity.engine for parity in results] == ["full", "reuse"]
    assert told == [0.25, 0.5, 0.75, 1.0]
    for parity in results:
        assert parity.tolerance == FP32_TOLERANCE
        assert 0 < parity.max_abs_error < 1e-4  # not the very same sums, so it did run both
        assert parity.relative_error < 1e-5


@pytest.mark.parametrize(("factor", "found"), [(1.001, r"[1-9]\.\d+e-0[34]"), (np.nan, "nan")])
def test_an_engine_that_computes_something_else_is_a_bug(
    factor: float, found: str, cached: Program, lowered: Lowered, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "changed")
    weights = np.fromfile(folder / WEIGHTS_FILE, np.float32)
    (weights * np.float32(factor)).tofile(folder / WEIGHTS_FILE)
    message = rf"engine 'full' is {found} from the program \(relative\), 1\.0e-04 is allowed; please report"
    with pytest.raises(InternalError, match=message):
        compare(cached, lowered, folder)
