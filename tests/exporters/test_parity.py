"""Engine against program: what is close enough, and what is a bug."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import InternalError
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.lower import Lowered, lower
from dcompile.exporters.onnx.target import WEIGHTS_FILE, export_engines
from dcompile.exporters.parity import FP32_TOLERANCE, Parity, check_parity
from dcompile.exporters.twins import twin_of
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.quantize import Quantize
from dcompile.runtime.onnx_engine import OnnxEngine


def compare(
    program: Program, lowered: Lowered, folder: Path, told: list[float] | None = None, **options: float
) -> tuple[Parity, ...]:
    tell = told.append if told is not None else lambda fraction: None
    open = {name: partial(OnnxEngine, folder / f"engines/{name}.onnx", threads=1) for name in lowered.engines}
    return check_parity(program, lowered, open, tell, **options)


def test_every_engine_is_compared_at_each_of_its_calls(cached: Program, lowered: Lowered, exported: Path) -> None:
    told: list[float] = []
    results = compare(cached, lowered, exported, told)
    assert [parity.engine for parity in results] == ["full", "reuse"]
    assert told == [0.25, 0.5, 0.75, 1.0]
    for parity in results:
        assert parity.tolerance == FP32_TOLERANCE
        assert 0 < parity.max_abs_error < 1e-4  # not the very same sums, so it did run both
        assert parity.relative_error < 1e-5


def test_the_tolerance_is_what_is_given_where_nothing_is_rounded(
    cached: Program, lowered: Lowered, exported: Path
) -> None:
    assert {parity.tolerance for parity in compare(cached, lowered, exported, tolerance=1e-2)} == {1e-2}
    with pytest.raises(InternalError, match=r"1\.0e-12 is allowed"):
        compare(cached, lowered, exported, tolerance=1e-12)


def test_rounding_widens_the_tolerance_of_the_pieces_that_round(
    dit: Program, calibration_of: Callable[[Program], Calibration], tmp_path: Path
) -> None:
    step = Quantize(min_share=0.0, max_error=1.0, format="int8", activations="dynamic", symmetric=False)
    program = CacheSteps(interval=3).apply(dit, Decision()).program
    program = step.apply(program, step.decide(program, calibration_of(dit))).program
    lowered = lower(program, "segments")
    export_engines(lowered, tmp_path)
    found = {parity.engine: parity for parity in compare(program, lowered, tmp_path)}
    rounding = {name for name, engine in lowered.engines.items() if twin_of(engine.graph, 0.0)}
    assert found.keys() - rounding == {"transformer_blocks_1_2_reuse"}
    for name, parity in found.items():
        assert (parity.tolerance > 5 * FP32_TOLERANCE) == (name in rounding)
        assert parity.relative_error < parity.tolerance


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
