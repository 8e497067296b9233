"""A real bundle in a few kilobytes: two ONNX engines over one weights file, and the same sums in numpy.

`from tiny_bundle import tiny` in a conftest gives its tests the fixture.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.numpy import save_file

from dcompile.runtime.manifest import (
    Batch,
    Call,
    Condition,
    Contract,
    EngineSpec,
    FileSpec,
    Jump,
    Manifest,
    SampleSpec,
    Slot,
    StateSpec,
    Table,
    write,
)

Floats = NDArray[np.float32]
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
ROWS = np.array([[0.9, 0.2, 0.1, 0.5], [0.8, -0.3, 0.4, 0.3], [1.1, 0.1, -0.2, 0.0]], dtype=np.float32)  # a, b, c, n
LABELS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class TinyBundle:
    path: Path
    manifest: Manifest

    @staticmethod
    def full(x: Floats, label: NDArray[np.int64], row: int, state: Floats, noise: Floats) -> tuple[Floats, Floats]:
        """What the engine "full" computes: the next sample and the next state."""
        a, b, c, n = ROWS[row]
        value = np.tanh(x @ WEIGHT) + label.astype(np.float32)[:, None, None, None]
        return a * x + b * value + c * state + n * noise, value

    @staticmethod
    def reuse(x: Floats, row: int, state: Floats) -> Floats:
        """What the engine "reuse" computes."""
        a, b, _, _ = ROWS[row]
        following: Floats = a * x + (b * state) @ WEIGHT
        return following

    def edit(self, **changes: object) -> None:
        """Writes the manifest with some fields replaced, checks and all."""
        write(replace(self.manifest, **changes), self.path / "manifest.json")  # type: ignore[arg-type]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TinyBundle]:
    """Builds a bundle, as write_tiny does."""
    return partial(write_tiny, tmp_path / "bundle")


def write_tiny(path: Path, *, below: float | None = None, stochastic: bool = False, labels: bool = True) -> TinyBundle:
    """Calls full, reuse, full; with `below`, the middle step reuses only if the first state is so small."""
    (path / "engines").mkdir(parents=True)
    (path / "engines/weights.bin").write_bytes(WEIGHT.tobytes())
    save_file({"row": ROWS}, path / "tables.safetensors")
    save_engine(path / "engines/full.onnx", FULL_NOISE if stochastic else FULL)
    save_engine(path / "engines/reuse.onnx", REUSE)
    noise: dict[str, Slot | Table] = {"noise": Slot("noise")} if stochastic else {}
    sample, state, row = Slot("sample"), Slot("cached"), Table("row")
    full = EngineSpec(
        "engines/full.onnx",
        {"sample": sample, "class_labels": Slot("class_labels"), "row": row, "state_in": state, **noise},
        {"next_sample": sample, "state_out": state, "metric": Slot("metric")},
    )
    reuse = EngineSpec("engines/reuse.onnx", {"sample": sample, "row": row, "state_in": state}, {"next_sample": sample})
    always = 1e9
    script: tuple[Call | Jump, ...] = (Call("full", 0), Call("reuse", 1), Call("full", 2))
    if below is not None:
        middle = (Jump(4, "metric", below), Call("full", 1), Jump(5, "metric", always), Call("reuse", 1))
        script = (Call("full", 0), *middle, Call("full", 2))
    manifest = Manifest(
        dcompile="0.1.0",
        name="tiny",
        target="onnx",
        tools={"onnxruntime": "any"},
        contract=Contract(
            sample=SampleSpec((1, 4, 4), "float32"),
            value_range=(-1.0, 1.0),
            predicts="flow",
            steps=3,
            guidance=1.0,
            initial_scale=0.5,
            stochastic=stochastic,
            batch=Batch(1, 4),
            conditions=(Condition("class_labels", "int64", (), 5, LABELS if labels else None),),
        ),
        states={"cached": StateSpec((("batch", 1), 1, 4, 4), "float32")},
        engines={"full": full, "reuse": reuse},
        script=script,
        tables="tables.safetensors",
        files={str(file.relative_to(path)): FileSpec.of(file) for file in sorted(path.rglob("*")) if file.is_file()},
    )
    write(manifest, path / "manifest.json")
    return TinyBundle(path, manifest)


FULL = """full (float[batch,1,4,4] sample, int64[batch] class_labels, float[4] row, float[batch,1,4,4] state_in)
    => (float[batch,1,4,4] next_sample, float[batch,1,4,4] state_out, float metric) {
    a, b, c, n = Split <num_outputs = 4, axis = 0> (row)
    product = MatMul (sample, weight)
    bent = Tanh (product)
    number = Cast <to = 1> (class_labels)
    axes = Constant <value_ints = [1, 2, 3]> ()
    offset = Unsqueeze (number, axes)
    state_out = Add (bent, offset)
    kept = Mul (a, sample)
    moved = Mul (b, state_out)
    remembered = Mul (c, state_in)
    next_sample = Sum (kept, moved, remembered)
    size = Abs (state_out)
    metric = ReduceMean <keepdims = 0> (size)
}"""
FULL_NOISE = FULL.replace("state_in)", "state_in, float[batch,1,4,4] noise)", 1).replace(
    "next_sample = Sum (kept, moved, remembered)",
    "shaken = Mul (n, noise)\n next_sample = Sum (kept, moved, remembered, shaken)",
)
REUSE = """reuse (float[batch,1,4,4] sample, float[4] row, float[batch,1,4,4] state_in)
    => (float[batch,1,4,4] next_sample) {
    a, b, c, n = Split <num_outputs = 4, axis = 0> (row)
    kept = Mul (a, sample)
    scaled = Mul (b, state_in)
    moved = MatMul (scaled, weight)
    next_sample = Add (kept, moved)
}"""


def save_engine(path: Path, graph: str) -> None:
    """ONNX text -> a file whose one weight lies in weights.bin beside it."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{graph}')
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    model.graph.initializer.append(weight)
    path.write_bytes(model.SerializeToString())
