"""The OpenVINO engine over models of a few operators, made here with OpenVINO's own operators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcompile.runtime.backends import open_engine
from dcompile.runtime.errors import EngineError
from dcompile.runtime.openvino_engine import PRECISION_INFO, WEIGHTS_FILE, OpenVinoEngine

ov = pytest.importorskip("openvino", reason="needs openvino: pip install 'dcompile[openvino]'")
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(precision)`: x [?, 3, 4] and row [2] -> x W row[0] + labels, and a state of twice the batch."""

    def write(precision: str | None = None) -> Path:
        op = ov.opset14
        x = op.parameter([-1, 3, 4], np.float32, name="x")
        row = op.parameter([2], np.float32, name="row")
        labels = op.parameter([-1], np.int64, name="labels")
        first = op.squeeze(op.gather(row, op.constant([0]), op.constant(0)), op.constant([0]))
        product = op.multiply(op.matmul(x, op.constant(_weight()), False, False), first)
        shift = op.unsqueeze(op.convert(labels, "f32"), op.constant([1, 2]))
        results = [op.result(op.add(product, shift), name="next_sample")]
        results.append(op.result(op.concat([product, x], 0), name="next_state"))
        model = ov.Model(results, [x, row, labels], "tiny")
        if precision:
            model.set_rt_info(precision, list(PRECISION_INFO))
        path = tmp_path / "tiny.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        path.with_suffix(".bin").rename(tmp_path / WEIGHTS_FILE)
        return path

    return write


def _weight() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


def _inputs(batch: int, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, 3, 4)).astype(np.float32)
    return {"x": x, "row": np.array([2, 0], np.float32), "labels": np.arange(batch)}


def _expected(inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    product = inputs["x"] @ _weight() * inputs["row"][0]
    shift = inputs["labels"].astype(np.float32)[:, None, None]
    return {"next_sample": product + shift, "next_state": np.concatenate([product, inputs["x"]])}


def _check(engine: OpenVinoEngine, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    found = engine.run(inputs)
    for name, expected in _expected(inputs).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)  # fp32, sums of four products
        assert found[name].dtype == np.float32
    return found


def test_ports_bear_the_models_names(make: Make) -> None:
    engine = OpenVinoEngine(make())
    assert engine.inputs == {
        "x": ("float32", (None, 3, 4)), "row": ("float32", (2,)), "labels": ("int64", (None,))
    }  # fmt: skip
    assert engine.outputs == {"next_sample": ("float32", (None, 3, 4)), "next_state": ("float32", (None, 3, 4))}


def test_any_batch_with_nothing_copied_at_the_first(make: Make) -> None:
    engine = OpenVinoEngine(make(), threads=1)
    for _ in range(3):
        _check(engine, _inputs(2))
    assert engine.copied_bytes == 0
    for batch in (5, 1, 5):
        _check(engine, _inputs(batch))
    assert engine.copied_bytes == (3 * 5 + 3 * 1 + 3 * 5) * 12 * 4  # the two outputs of each
    before = engine.copied_bytes
    _check(engine, _inputs(2))
    assert engine.copied_bytes == before


def test_outputs_live_on_when_the_engine_runs_again(make: Make) -> None:
    engine = OpenVinoEngine(make())
    for batch in (2, 3):  # of the first shape and of another
        first = _check(engine, _inputs(batch, seed=1))
        kept = {name: value.copy() for name, value in first.items()}
        second = _check(engine, _inputs(batch, seed=2))
        for name, value in first.items():
            np.testing.assert_array_equal(value, kept[name])
            assert not np.shares_memory(value, second[name])


def test_a_state_can_go_back_in(make: Make) -> None:
    engine = OpenVinoEngine(make())
    inputs = _inputs(2)
    for _ in range(3):
        inputs = {**inputs, "x": _check(engine, inputs)["next_state"][:2]}
    assert engine.copied_bytes == 0


def test_an_input_that_is_not_contiguous_is_copied_and_counted(make: Make) -> None:
    engine = OpenVinoEngine(make())
    inputs = _inputs(2)
    turned = np.ascontiguousarray(inputs["x"].transpose(2, 1, 0)).transpose(2, 1, 0)
    _check(engine, {**inputs, "x": turned})
    assert engine.copied_bytes == turned.nbytes


def test_read_only_inputs_are_copied_and_counted(make: Make) -> None:
    engine, inputs = OpenVinoEngine(make()), _inputs(2)
    inputs["row"].flags.writeable = False
    _check(engine, inputs)
    assert engine.copied_bytes == inputs["row"].nbytes


@pytest.mark.parametrize(("said", "hint"), [(None, "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_file_says_the_precision(said: str | None, hint: str, make: Make) -> None:
    path = make(said)
    if hint == "bfloat16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hint = "float32"  # what OpenVINO makes of it on such a CPU
    found = OpenVinoEngine(path).compiled(None).get_property("INFERENCE_PRECISION_HINT")
    assert found == ov.Type(np.float32) if hint == "float32" else found == ov.Type.bf16
    exact = OpenVinoEngine(path, options={"INFERENCE_PRECISION_HINT": "f32"})
    assert exact.compiled(None).get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    _check(exact, _inputs(2))


def test_settings_reach_openvino(make: Make) -> None:
    compiled = OpenVinoEngine(make(), threads=1, options={"ENABLE_CPU_PINNING": "YES"}).compiled(None)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is True
    assert OpenVinoEngine(make()).compiled(None).get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0  # weights of few bits stay exact


def test_what_is_not_given_as_the_model_wants_it_is_said(make: Make) -> None:
    engine = OpenVinoEngine(make())
    inputs = _inputs(2)
    with pytest.raises(EngineError, match=r"tiny\.xml: input 'row' is missing"):
        engine.run({"x": inputs["x"], "labels": inputs["labels"]})
    with pytest.raises(EngineError, match=r"input 'x' is float64 \[2, 3, 4\], needed float32 \[\?, 3, 4\]"):
        engine.run({**inputs, "x": inputs["x"].astype(np.float64)})
    with pytest.raises(EngineError, match=r"input 'x' is float32 \[2, 3\], needed float32 \[\?, 3, 4\]"):
        engine.run({**inputs, "x": inputs["x"][..., 0]})
    with pytest.raises(
        EngineError, match=r"tiny\.xml: OpenVINO [\d.]+ does not compile it for .*labels \[3\]: "
    ) as caught:
        engine.run({**inputs, "labels": np.arange(3)})
    assert "\n" not in str(caught.value)


def test_files_that_are_damaged_are_named(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    path = make()
    weights = path.parent / WEIGHTS_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    _refused(path, "Incorrect weights in bin file!")
    weights.unlink()
    _refused(path, rf"Can not open file .*{WEIGHTS_FILE}")
    weights.write_bytes(content)
    path.write_text(path.read_text()[:2000])
    _refused(path, "at offset 1999")
    path.write_bytes(b"no graph")
    _refused(path, "Unable to read the model")
    path.unlink()
    _refused(path, "Could not open the file")
    assert capfd.readouterr() == ("", "")


def _refused(path: Path, why: str) -> None:
    with pytest.raises(EngineError, match=rf"tiny\.xml: OpenVINO [\d.]+ does not load it: .*{why}") as caught:
        OpenVinoEngine(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_named(make: Make) -> None:
    engine = OpenVinoEngine(make(), options={"NUMBER_OF_STREAMS": "1"})
    with pytest.raises(EngineError, match=r"does not compile it for .*: .*NUMBER_OF_STREAMS"):
        engine.run(_inputs(2))


def test_a_missing_package_is_said_with_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r'^target \'openvino\' needs openvino: pip install "dcompile\[openvino\]"$'):
        open_engine("openvino", path)


def test_it_runs_without_pytorch(make: Make) -> None:
    code = (
        "import sys, numpy\n"
        "from pathlib import Path\n"
        "from dcompile.runtime.backends import open_engine\n"
        f"engine = open_engine('openvino', Path({str(make())!r}), threads=1)\n"
        "engine.run({'x': numpy.ones((1, 3, 4), 'float32'), 'row': numpy.ones(2, 'float32'),"
        " 'labels': numpy.zeros(1, 'int64')})\n"
        "print([name for name in ('torch', 'onnx', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
