"""Two real bundles of one engine each: y = x @ weight, once with a far larger weight."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from dcompile.exporters.bench import bench, machine, measure_fresh
from dcompile.runtime import BundleError, EngineError, RequestError
from dcompile.runtime.manifest import (
    Batch,
    Call,
    Condition,
    Contract,
    EngineSpec,
    FileSpec,
    Manifest,
    SampleSpec,
    Slot,
    Table,
    write,
)

GRAPH = """step (float[batch,1,1,SIZE] sample, int64[batch] class_labels, float[1] row)
    => (float[batch,1,1,SIZE] next_sample) {
    number = Cast <to = 1> (class_labels)
    axes = Constant <value_ints = [1, 2, 3]> ()
    offset = Unsqueeze (number, axes)
    product = MatMul (sample, weight)
    moved = Mul (product, row)
    next_sample = Add (moved, offset)
}"""
Build = Callable[[str, int], Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def bundle(name: str, size: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        graph = GRAPH.replace("SIZE", str(size))
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{graph}')
        weight = np.zeros((size, size), dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
        (path / "step.onnx").write_bytes(model.SerializeToString())
        save_file({"row": np.ones((3, 1), dtype=np.float32)}, path / "tables.safetensors")
        contract = Contract(
            sample=SampleSpec((1, 1, size), "float32"),
            value_range=None,
            predicts="flow",
            steps=3,
            guidance=1.0,
            initial_scale=1.0,
            stochastic=False,
            batch=Batch(1, 4),
            conditions=(Condition("class_labels", "int64", (), 2, ("A", "B")),),
        )
        sample = Slot("sample")
        inputs: dict[str, Slot | Table] = {"sample": sample, "class_labels": Slot("class_labels"), "row": Table("row")}
        manifest = Manifest(
            dcompile="0.1.0",
            name=name,
            target="onnx",
            tools={},
            contract=contract,
            states={},
            engines={"full": EngineSpec("step.onnx", inputs, {"next_sample": sample})},
            script=tuple(Call("full", row) for row in range(3)),
            tables="tables.safetensors",
            files={file.name: FileSpec.of(file) for file in sorted(path.iterdir())},
        )
        write(manifest, path / "manifest.json")
        return path

    return bundle


def test_bench_compares(build: Build) -> None:
    told: list[tuple[int, int, str]] = []
    bundles = {"large": build("large", 1024), "small": build("small", 8)}
    figures = bench(bundles, batch=2, threads=1, repeats=3, progress=lambda *what: told.append(what))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert list(figures["bundles"]) == ["large", "small"]
    large, small = figures["bundles"].values()
    assert large["speedup"] == 1
    assert small["speedup"] == large["latency_s"] / small["latency_s"] > 1
    for each in (large, small):
        assert 0 < each["latency_min_s"] <= each["latency_s"] <= each["latency_max_s"]
        assert each["step_s"] * 3 == pytest.approx(each["latency_s"])
        assert each["samples_per_s"] * each["latency_s"] == pytest.approx(2)
        assert len(each["latencies_s"]) == 3
        assert each["load_s"] > 0
    assert large["bundle_bytes"] > 4 * 1024**2 > small["bundle_bytes"]
    assert [done for done, _, _ in told] == list(range(10))
    assert {total for _, total, _ in told} == {10}
    requests = [what for _, _, what in told[2:]]
    assert requests[:4] == ["large, warming up", "small, warming up", "large, request 1 of 3", "small, request 1 of 3"]


def test_bench_takes_labels(build: Build) -> None:
    path = build("tiny", 4)
    assert bench({"tiny": path}, batch=2, repeats=1, labels=["A", "B"])["bundles"]["tiny"]["steps"] == 3
    with pytest.raises(RequestError, match="no label of 'class_labels' is called 'C'"):
        bench({"tiny": path}, batch=2, repeats=1, labels=["A", "C"])


def test_mistakes_are_told(build: Build, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="0 bundles and 5 repeats"):
        bench({})
    with pytest.raises(RequestError, match="1 labels for a batch of 2"):
        bench({"a": tmp_path}, batch=2, labels=[0])
    with pytest.raises(EngineError, match=r"exit code 2: batch 5: this bundle takes 1\.\.4"):
        bench({"a": build("tiny", 4)}, batch=5)
    with pytest.raises(EngineError, match="no engine is called 'ful'; did you mean 'full'"):
        measure_fresh(tmp_path / "tiny", only="ful")
    with pytest.raises((EngineError, BundleError), match="not found; a bundle is the directory"):
        bench({"a": tmp_path})


def test_the_machine_is_named() -> None:
    assert machine()["cores"] >= 1
    assert machine()["cpu"]
