"""TensorRT engines: what needs a GPU is tested where one is, and the rest (profiles, requests, refusals) anywhere."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from dcompile.runtime import tensorrt_engine
from dcompile.runtime.backends import open_engine
from dcompile.runtime.cuda import compute_capability, why_no_gpu
from dcompile.runtime.errors import BundleError, EngineError, RequestError
from dcompile.runtime.manifest import StateSpec
from dcompile.runtime.tensorrt_engine import (
    EngineFacts,
    TensorRtEngine,
    batch_of,
    facts_file,
    pick_profile,
    read_facts,
    write_facts,
)

PROFILES = {"single": (1, 1, 1), "batch": (1, 8, 16), "large": (17, 32, 64)}
INPUTS = {
    "row": StateSpec((6,), "float32"),
    "sample": StateSpec((("batch", 1), 4, 8), "float32"),
    "state": StateSpec((("batch", 2), 16), "float32"),
}
FACTS = EngineFacts(
    package="tensorrt_rtx", version="1.7.1", compute_capabilities=("8.9", "12.0"), precision="fp16", inputs=INPUTS,
    outputs={"next_sample": INPUTS["sample"]}, profiles=PROFILES,
)  # fmt: skip


def arrays(batch: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(spec.at(batch), spec.dtype) for name, spec in INPUTS.items()}


@pytest.mark.parametrize(("batch", "name"), [(1, "single"), (2, "batch"), (16, "batch"), (17, "large"), (64, "large")])
def test_the_narrowest_profile_that_takes_a_batch(batch: int, name: str) -> None:
    assert list(PROFILES)[pick_profile(PROFILES, batch)] == name


def test_a_batch_outside_every_profile_is_told_which_there_are() -> None:
    message = r"batch of 5 is outside the profiles of this bundle: single \(1 to 1\), large \(17 to 64\); split the"
    with pytest.raises(RequestError, match=message):
        pick_profile({"single": (1, 1, 1), "large": (17, 32, 64)}, 5)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_batch_is_read_from_the_inputs(batch: int) -> None:
    assert batch_of(INPUTS, arrays(batch)) == batch


def test_inputs_without_a_batch_are_a_batch_of_one() -> None:
    row = {"row": INPUTS["row"]}
    assert batch_of(row, {"row": np.zeros(6, np.float32)}) == 1


def test_wrong_inputs_are_told_what_was_needed() -> None:
    with pytest.raises(RequestError, match=r"input 'state' is missing; give row, sample, state"):
        batch_of(INPUTS, {name: value for name, value in arrays(2).items() if name != "state"})
    with pytest.raises(RequestError, match=r"input 'state' is float32 \[5, 16\], needed float32 \[4, 16\] at a batch"):
        batch_of(INPUTS, arrays(2) | {"state": np.zeros((5, 16), np.float32)})
    with pytest.raises(RequestError, match=r"input 'row' is float64 \[6\], needed float32 \[6\]"):
        batch_of(INPUTS, arrays(2) | {"row": np.zeros(6)})


def test_what_is_said_beside_an_engine_comes_back(tmp_path: Path) -> None:
    write_facts(FACTS, tmp_path / "full.engine")
    assert facts_file(tmp_path / "full.engine").name == "full.json"
    assert read_facts(tmp_path / "full.engine") == FACTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"full\.json: cannot be read"),
        ("{", r"full\.json: cannot be read"),
        (json.dumps({"package": 1}), r"full\.json: version: missing|full\.json: package: expected str"),
    ],
)
def test_a_damaged_file_beside_an_engine_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "full.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        read_facts(tmp_path / "full.engine")


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    write_facts(FACTS, tmp_path / "full.engine")
    (tmp_path / "full.engine").write_bytes(b"no engine")
    return tmp_path / "full.engine"


@pytest.mark.skipif(why_no_gpu() is None, reason="a GPU is here")
def test_without_a_gpu_it_says_where_to_go(engine_file: Path) -> None:
    message = r"full\.engine: .*, and a TensorRT engine runs on an NVIDIA GPU; run it where one is, or compile"
    with pytest.raises(EngineError, match=message):
        open_engine("trt", engine_file)


def test_an_engine_for_other_gpus_is_refused_by_name(engine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "why_nothing_runs", lambda: None)
    monkeypatch.setattr(tensorrt_engine, "compute_capability", lambda: "9.0")
    with pytest.raises(
        EngineError, match=r"built for compute capability 8\.9, 12\.0, the GPU here is 9\.0; compile again"
    ):
        TensorRtEngine(engine_file)


@pytest.mark.skipif(find_spec("cuda") is not None, reason="cuda-bindings is here")
def test_a_package_that_is_missing_is_named(engine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "why_no_gpu", lambda: None)
    with pytest.raises(EngineError, match=r"the package cuda-bindings is not installed \(pip install cuda-bindings\)"):
        TensorRtEngine(engine_file)


# --- on a GPU ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2 x of [batch, 64], in two profiles, built for the GPU of this machine."""
    import onnx
    from onnx_graphs import FLOAT, Graph

    from dcompile.exporters.tensorrt.builder import build_engine, choose_package

    own = compute_capability()
    assert own is not None
    folder = tmp_path_factory.mktemp("engine")
    graph = Graph()
    graph.output(graph("Add", graph.input("x", FLOAT, "b", 64), "x", name="net/add"), FLOAT)
    onnx.save(graph.model(), folder / "graph.onnx")
    spec = {"x": StateSpec((("batch", 1), 64), "float32")}
    profiles = {"single": (1, 1, 1), "batch": (1, 4, 8)}
    shapes = [{"x": tuple((batch, 64) for batch in sizes)} for sizes in profiles.values()]
    engine, package = folder / "full.engine", choose_package()
    made = build_engine("full", folder / "graph.onnx", engine, (own,), shapes, package)  # type: ignore[arg-type]
    outputs = {"y0": spec["x"]}
    write_facts(EngineFacts(package, made.version, (own,), "fp32", spec, outputs, profiles), engine)
    return engine


@pytest.mark.trt
def test_it_computes_at_every_batch_of_its_profiles(built: Path) -> None:
    engine = TensorRtEngine(built)
    for batch in (1, 3, 8, 1):
        x = np.random.default_rng(batch).standard_normal((batch, 64)).astype(np.float32)
        np.testing.assert_array_equal(engine.run({"x": x})["y0"], 2 * x)
    assert engine.copied_bytes == 2 * 4 * 64 * (1 + 3 + 8 + 1)


@pytest.mark.trt
def test_results_stay_what_they_were_when_it_runs_again(built: Path) -> None:
    engine = TensorRtEngine(built)
    ones = np.ones((2, 64), np.float32)
    first = engine.run({"x": ones})["y0"]
    engine.run({"x": 5 * ones})
    np.testing.assert_array_equal(first, 2 * ones)


@pytest.mark.trt
def test_a_batch_outside_the_profiles(built: Path) -> None:
    with pytest.raises(RequestError, match=r"batch of 9 is outside the profiles"):
        TensorRtEngine(built).run({"x": np.ones((9, 64), np.float32)})


@pytest.mark.trt
def test_a_damaged_engine_is_refused_by_name(built: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "full.engine"
    damaged.write_bytes(built.read_bytes()[:100])
    facts_file(damaged).write_text(facts_file(built).read_text())
    with pytest.raises(EngineError, match=r"full\.engine: .* does not load it"):
        TensorRtEngine(damaged)
