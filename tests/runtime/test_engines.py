from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dcompile.runtime import load
from dcompile.runtime.errors import EngineError
from dcompile.runtime.manifest import SampleSpec, Slot, StateSpec
from dcompile.runtime.onnx_engine import OnnxEngine

Build = Callable[..., Any]


def test_ports_and_run(tiny: Build) -> None:
    engine = OnnxEngine(tiny().path / "engines/reuse.onnx", threads=1, options={"session.disable_prepacking": "1"})
    assert engine.inputs["sample"] == ("float32", (None, 1, 4, 4))
    assert engine.inputs["row"] == ("float32", (4,))
    assert list(engine.outputs) == ["next_sample"]
    x = np.ones((2, 1, 4, 4), dtype=np.float32)
    row = np.array([2, 0, 0, 0], dtype=np.float32)
    np.testing.assert_array_equal(engine.run({"sample": x, "row": row, "state_in": x})["next_sample"], 2 * x)


def test_failures_are_one_line_with_the_file(tiny: Build, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny().path / "engines/reuse.onnx"
    engine = OnnxEngine(path)
    x = np.ones((2, 1, 4, 4), dtype=np.float32)
    with pytest.raises(EngineError, match=r"reuse.onnx: ONNX Runtime failed: ") as caught:
        engine.run({"sample": x, "row": x, "state_in": x})
    assert "\n" not in str(caught.value)
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"reuse.onnx: ONNX Runtime [\d.]+ does not load it: ") as caught:
        OnnxEngine(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_engine_that_is_not_the_manifests_is_refused(tiny: Build) -> None:
    bundle = tiny()
    contract, engines = bundle.manifest.contract, bundle.manifest.engines
    bundle.edit(contract=replace(contract, sample=SampleSpec((1, 8, 8), "float32")))
    with pytest.raises(
        EngineError, match=r"'sample' is float32 \[\?, 1, 4, 4\], the manifest says float32 \[1, 1, 8, 8\]"
    ):
        load(bundle.path)
    bundle.edit(states={"cached": StateSpec((("batch", 1), 1, 4, 4), "float16")})
    with pytest.raises(EngineError, match=r"'state_in' is float32 .* the manifest says float16"):
        load(bundle.path)
    inputs = {name: source for name, source in engines["full"].inputs.items() if name != "row"}
    bundle.edit(engines={**engines, "full": replace(engines["full"], inputs=inputs)})
    with pytest.raises(EngineError, match=r"full.onnx: input 'row' is in the file only"):
        load(bundle.path)
    outputs = {**engines["full"].outputs, "metrics": Slot("metric")}
    bundle.edit(engines={**engines, "full": replace(engines["full"], outputs=outputs)})
    with pytest.raises(
        EngineError, match=r"full.onnx: output 'metrics' is in the manifest only; did you mean 'metric'"
    ):
        load(bundle.path)


def test_unknown_target(tiny: Build) -> None:
    bundle = tiny()
    bundle.edit(target="onyx")
    with pytest.raises(EngineError, match="no engine for target 'onyx'; did you mean 'onnx'"):
        load(bundle.path)
