"""The C++ runtime against the Python one: the same numbers from the same bundles, the same words when it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from cache_cases import CASES, OPTIONS

from dcompile.runtime import DcompileError, Session, load
from dcompile.runtime.manifest import Call, Condition, FileSpec, Jump, SampleSpec, Slot, StateSpec, Table
from dcompile.runtime.random import normal

Build = Callable[..., Any]
Driver = Callable[..., list[dict[str, Any]]]

TOLERANCE = 1e-6  # of a sample; the same library computes both, so they are usually equal bit for bit
ONE = {"labels": [3], "seed": 7}
EIGHT = {"labels": [0, 1, 2, 3, 4, 5, 6, 7], "seed": 11}


def expect_equal(session: Session, request: dict[str, Any], found: dict[str, Any]) -> None:
    """`found` is what Python generates: samples, pixels, calls, and a callback for every step."""
    assert "error" not in found, found
    given = {name: value for name, value in request.items() if name in ("labels", "seed")}
    if "conditions" in request:
        given["conditions"] = {
            name: np.array(each["values"], each["dtype"]).reshape(each["shape"])
            for name, each in request["conditions"].items()
        }
    expected = session.generate(**given, **({"seed": request["seeds"]} if "seeds" in request else {}))
    timing, contract = session.last_timing, session.manifest.contract
    assert timing is not None
    samples = np.array(found["values"], np.float32).reshape(found["shape"])
    np.testing.assert_allclose(samples, expected, rtol=0, atol=TOLERANCE)
    if (samples == expected).all():
        assert found["pixels"] == session.images(expected).flatten().tolist()
    assert (found["calls"], found["steps_run"]) == (timing.calls, timing.steps)
    assert found["copied_bytes"] == 0  # these engines take and give memory as it is
    assert found["steps"] == [[step + 1, contract.steps] for step in range(timing.steps)]
    assert found["callback_saw_the_samples"]
    assert 0 < found["engines_s"] < found["total_s"]


def expect_same(driver: Driver, bundle: Path, *requests: dict[str, Any]) -> None:
    """Python and C++ load the bundle and run the requests, in this order."""
    opened, *answers = driver({"open": bundle}, *requests)
    assert "error" not in opened, opened
    assert len(answers) == len(requests)
    with load(bundle, threads=1) as session:
        for request, answer in zip(requests, answers, strict=True):
            expect_equal(session, request, answer)


def test_units(sanitized: Path, tiny: Build) -> None:
    """Known answers, jumps, damaged bytes: see test_units.cpp."""
    environment = os.environ | {"DCOMPILE_TEST_BUNDLE": str(tiny(below=0.1).path)}
    done = subprocess.run([sanitized / "tests/dcompile-units"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the same numbers ---


@pytest.mark.parametrize(("seed", "draw"), [(0, 0), (7, 3), (2**64 - 1, 100)])
def test_noise_is_pythons_bit_for_bit(driver: Driver, tiny: Build, seed: int, draw: int) -> None:
    """Through a bundle whose one engine returns the noise of its last step, in a shape that fills no block of four."""
    bundle = tiny(stochastic=True)
    noise_of_step = echo(bundle, (1, 33, 61), steps=max(draw, 1))
    _, found = driver({"open": noise_of_step}, {"seeds": [seed]})
    expected = normal([seed], max(draw, 1), (1, 33, 61))
    assert np.array_equal(np.array(found["values"], np.float32), expected.flatten())


def echo(bundle: Any, shape: tuple[int, ...], steps: int) -> Path:
    """The bundle's folder, with one engine that makes the sample of the noise that it is given."""
    import onnx

    dims = ", ".join(map(str, ("batch", *shape)))
    graph = f"echo (float[{dims}] noise) => (float[{dims}] next_sample) {{ next_sample = Identity (noise) }}"
    path = bundle.path / "engines/echo.onnx"
    path.write_bytes(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{graph}').SerializeToString())
    engine = replace(bundle.manifest.engines["full"], file="engines/echo.onnx", inputs={"noise": Slot("noise")})
    bundle.edit(
        contract=replace(bundle.manifest.contract, sample=SampleSpec(shape, "float32"), conditions=(), steps=steps),
        engines={"echo": replace(engine, outputs={"next_sample": Slot("sample")})},
        states={},
        script=(Call("echo", 0),) * steps,
        files=bundle.manifest.files | {"engines/echo.onnx": FileSpec.of(path)},
    )
    folder: Path = bundle.path
    return folder


TINY_REQUESTS: list[dict[str, Any]] = [
    {"labels": ["B", 4], "seed": 7},
    {"labels": [0, 1, 2], "seeds": [11, 5, 2**64 - 1]},
    {"labels": ["E"]},
]


@pytest.mark.parametrize("below", [None, 0.0, 1.5, 1e6])
@pytest.mark.parametrize("stochastic", [False, True])
def test_scripts_with_jumps(driver: Driver, tiny: Build, below: float | None, stochastic: bool) -> None:
    """1.5 lies between the metrics of these requests, so that some jump and some do not."""
    expect_same(driver, tiny(below=below, stochastic=stochastic).path, *TINY_REQUESTS)


@pytest.mark.parametrize("below", [None, 0.0, 1e6])
def test_openvino_engines(driver: Driver, tiny: Build, below: float | None) -> None:
    """Requests of one shape, then of another: OpenVINO compiles two models for them, in both runtimes."""
    expect_same(driver, with_openvino(tiny(below=below, stochastic=True)), *TINY_REQUESTS, TINY_REQUESTS[0])


def with_openvino(bundle: Any) -> Path:
    """The bundle's folder, its engines converted."""
    path: Path = bundle.path
    engines = {}
    for name, spec in bundle.manifest.engines.items():
        folder = path / "engines" / name  # of its own: each engine's weights are in weights.bin beside it
        folder.mkdir()
        model = openvino.convert_model(path / spec.file)
        for port in (*model.inputs, *model.outputs):
            port.get_node().set_friendly_name(port.any_name)
        model.set_rt_info("fp32", ["dcompile", "precision"])
        openvino.serialize(model, folder / "engine.xml", folder / "weights.bin")
        engines[name] = replace(spec, file=f"engines/{name}/engine.xml")
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    del files["manifest.json"]
    bundle.edit(target="openvino", engines=engines, files={name: FileSpec.of(file) for name, file in files.items()})
    return path


def test_a_bundle_of_everything(driver: Driver, built: Path) -> None:
    """DiT: pruned, cached, quantised to INT8, folded; engines "full" and "reuse"."""
    expect_same(driver, built, ONE, EIGHT, {"labels": ["class 3", "class 9"], "seed": 1})


def test_segments(driver: Driver, compiled: Callable[..., Path], dit_folder: Path) -> None:
    """Engines hand values on in slots that no state declares, several calls a step."""
    bundle = compiled(dit_folder, passes=("cache:interval=2,warmup=1",), layout="segments")
    assert len(load(bundle, verify=False).manifest.script) > 4
    expect_same(driver, bundle, ONE, EIGHT)


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_steps_that_decide_what_they_compute(
    driver: Driver, compiled: Callable[..., Path], dit_folder: Path, layout: str
) -> None:
    """Alone, seeds 0 and 4 compute steps 1 and 3, seed 3 reuses at both: C++ decides as Python does."""
    bundle = compiled(dit_folder, passes=("cache:method=fbcache,threshold=0.8",), layout=layout)
    expect_same(driver, bundle, ONE, EIGHT, *({"labels": [seed], "seed": seed} for seed in (0, 3, 4)))
    assert any(isinstance(row, Jump) for row in load(bundle, verify=False).manifest.script)


@pytest.mark.parametrize(("network", "method"), {method: (network, method) for network, method in CASES}.values())
def test_every_cache_method(
    driver: Driver, compiled: Callable[..., Path], network: str, method: str, request: pytest.FixtureRequest
) -> None:
    """Each on one kind of network, in the layout that it gets by itself."""
    folder = request.getfixturevalue(f"{network}_folder")
    options = {"method": method, **OPTIONS.get(method, {})}
    bundle = compiled(folder, steps=6, passes=({"cache": options},))
    expect_same(driver, bundle, ONE, {"labels": [1, 2, 3], "seed": 2})


def test_unet_with_fresh_noise_every_step(driver: Driver, compiled: Callable[..., Path], unet_folder: Path) -> None:
    expect_same(driver, compiled(unet_folder, sampler="flow_lcm"), ONE, EIGHT)


def test_conditions_that_are_no_labels(driver: Driver, tiny: Build) -> None:
    bundle = tiny()
    contract = bundle.manifest.contract
    bundle.edit(contract=replace(contract, conditions=(*contract.conditions, Condition("text", "float32", (2,)))))
    text = {"dtype": "float32", "shape": [2, 2], "values": [0, 1, 2, 3]}
    expect_same(driver, bundle.path, {"labels": ["A", "B"], "conditions": {"text": text}})


def test_pixels_of_latents(driver: Driver, tiny: Build) -> None:
    bundle = tiny()
    bundle.edit(contract=replace(bundle.manifest.contract, value_range=None))
    expect_same(driver, bundle.path, *TINY_REQUESTS)


# --- the same words ---


def expect_same_refusal(driver: Driver, bundle: Path, verify: bool = True) -> str:
    """The message, which is Python's and has its kind, whoever loads the bundle."""
    (answer,) = driver({"open": bundle, "verify": verify})
    with pytest.raises(DcompileError) as caught:
        load(bundle, verify=verify, threads=1)
    assert answer["error"] == str(caught.value)
    assert answer["kind"] == type(caught.value).__name__.removesuffix("Error").lower()
    return str(caught.value)


MISSING = object()
MISTAKES: list[tuple[str, Any]] = [
    ("schema", 2), ("schema", "1"), ("schema", 0), ("schema", MISSING), ("schema", True),
    ("contract", []), ("contract/steps", "thirty"), ("contract/steps", True), ("contract/steps", 0),
    ("contract/steps", 1.5), ("contract/sample/shape", MISSING), ("contract/sample/shape", [1, None]),
    ("contract/batch/max", 0), ("contract/value_range", [0]), ("contract/value_range", [0, "1"]),
    ("contract/guidence", 3.0), ("contract/stochastic", "no"), ("contract/conditions", {}),
    ("contract/conditions/0/labels", ["A"]), ("contract/conditions/0/labels", 3),
    ("contract/conditions/0/classes", "5"), ("contract/sample/dtype", "float33"), ("states/cached/dtype", "f32"),
    ("states/cached/shape", [["batches", 1]]), ("states/cached/shape", [["batch", 1, 2]]), ("states/cached/shape", "x"),
    ("engines/full/inputs/row", {"tabel": "row"}), ("engines/full/inputs/row", {"slot": "raw"}),
    ("engines/full/inputs/row", {"slot": 3}), ("engines/full/outputs/metric", {"table": "row"}),
    ("engines/full/file", "full.onnx"), ("engines", MISSING), ("tables", "table.safetensors"), ("tools/torch", 2),
    ("script", []), ("script/2/call", "fulll"), ("script/0/row", -1), ("script/1/jump", 7), ("script/1/slot", "metrik"),
    ("script/1/below", "a \"quoted\" it's\n"), ("script/0", {"goto": [1, 2.5, None, {"long": "value " * 20}]}),
    ("files/weights.bin", {"bytes": 1}), ("files/..~shadow", {"bytes": 1, "sha256": ""}),
]  # fmt: skip


def test_mistakes_in_manifests(driver: Driver, tiny: Build, tmp_path: Path) -> None:
    original = (tiny(below=0.1).path / "manifest.json").read_text()
    bundles = []
    for number, (path, to) in enumerate(MISTAKES):
        value = json.loads(original)
        change(value, path, to)
        bundles.append(tmp_path / str(number))
        bundles[-1].mkdir()
        (bundles[-1] / "manifest.json").write_text(json.dumps(value))
    answers = driver(*({"open": bundle} for bundle in bundles))
    for (path, to), bundle, answer in zip(MISTAKES, bundles, answers, strict=True):
        with pytest.raises(DcompileError) as caught:
            load(bundle)
        assert answer == {"error": str(caught.value), "kind": "bundle"}, (path, to)


def change(value: Any, path: str, to: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part.replace("~", "/") for part in path.split("/")]
    for part in parents:
        value = value[part]
    if to is MISSING:
        del value[last]
    else:
        value[last] = to


def test_damaged_bundles(driver: Driver, tiny: Build) -> None:
    bundle = tiny()
    engine, tables = bundle.path / "engines/reuse.onnx", bundle.path / "tables.safetensors"
    good = engine.read_bytes()
    engine.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    assert "its sha256 is not the manifest's" in expect_same_refusal(driver, bundle.path)
    engine.write_bytes(good[:40])
    assert "40 bytes, expected" in expect_same_refusal(driver, bundle.path)
    (answer,) = driver({"open": bundle.path, "verify": False})
    assert answer["kind"] == "engine"
    assert f"{engine}: ONNX Runtime " in answer["error"]
    assert " does not load it: " in answer["error"]
    engine.unlink()
    assert "missing; the bundle is incomplete" in expect_same_refusal(driver, bundle.path)
    tables.write_bytes(b"no table")
    assert "tables.safetensors: cannot be read (a header of " in expect_same_refusal(driver, bundle.path, verify=False)
    (bundle.path / "manifest.json").write_text('{"schema": 1,')
    (answer,) = driver({"open": bundle.path})
    assert "manifest.json: not JSON (" in answer["error"]
    assert answer["error"].endswith("copy the bundle again")
    assert "is this a dcompile bundle?" in expect_same_refusal_of_text(driver, bundle.path, "[]")
    shutil.rmtree(bundle.path)
    assert "not found; a bundle is the directory" in expect_same_refusal(driver, bundle.path)


def expect_same_refusal_of_text(driver: Driver, bundle: Path, manifest: str) -> str:
    (bundle / "manifest.json").write_text(manifest)
    return expect_same_refusal(driver, bundle)


def test_engines_and_tables_that_are_not_the_manifests(driver: Driver, tiny: Build) -> None:
    bundle = tiny()
    contract, engines, script = bundle.manifest.contract, bundle.manifest.engines, bundle.manifest.script
    full, reuse = engines["full"], engines["reuse"]
    no_row = replace(full, inputs={name: source for name, source in full.inputs.items() if name != "row"})
    two_metrics = replace(full, outputs={**full.outputs, "metrics": Slot("metric")})
    other_table = replace(reuse, inputs={**reuse.inputs, "row": Table("rows")})
    edits: list[tuple[dict[str, Any], str]] = [
        ({"target": "onyx"}, "no engine for target 'onyx'; did you mean 'onnx'"),
        ({"contract": replace(contract, sample=SampleSpec((1, 8, 8), "float32"))}, "the manifest says float32"),
        ({"states": {"cached": StateSpec((("batch", 1), 1, 4, 4), "float16")}}, "says float16 [1, 1, 4, 4]"),
        ({"engines": {**engines, "full": no_row}}, "'row' is in the file only"),
        (
            {"engines": {**engines, "full": two_metrics}},
            "'metrics' is in the manifest only",
        ),
        (
            {"engines": {**engines, "reuse": other_table}},
            "reads rows of 'rows'; did you mean 'row'",
        ),
        ({"script": (*script, Call("full", 3))}, "table 'row' has 3 rows, script[3] asks for row 3"),
    ]
    for edit, message in edits:
        bundle.edit(**edit)
        assert message in expect_same_refusal(driver, bundle.path)


REFUSED: list[dict[str, Any]] = [
    {"labels": ["Z"]}, {"labels": ["a"]}, {"labels": [0, 99]}, {"labels": [-1]}, {"labels": [0] * 5}, {},
    {"conditions": {"class_label": {"dtype": "int64", "shape": [1], "values": [0]}}},
    {"conditions": {"class_labels": {"dtype": "float64", "shape": [1], "values": [0.5]}}},
    {"conditions": {"class_labels": {"dtype": "int64", "shape": [1, 1], "values": [0]}}},
    {"conditions": {"class_labels": {"dtype": "int64", "shape": [], "values": [0]}}},
    {"labels": [0], "conditions": {"class_labels": {"dtype": "int64", "shape": [1], "values": [0]}}},
    {"labels": [0, 1], "seeds": [1, 2, 3]}, {"labels": [0, 1], "seed": 2**64 - 1},
]  # fmt: skip


def test_bad_requests_and_the_program_lives_on(driver: Driver, tiny: Build) -> None:
    """Every refusal is Python's, and a good request after each of them is served."""
    bundle, good = tiny().path, {"labels": ["A"], "seed": 3}
    answers = driver({"open": bundle}, *(line for each in REFUSED for line in (each, good)))[1:]
    with load(bundle, threads=1) as session:
        for request, refused, served in zip(REFUSED, answers[::2], answers[1::2], strict=True):
            given = {name: value for name, value in request.items() if name != "seeds"}
            if "seeds" in request:
                given["seed"] = request["seeds"]
            if "conditions" in request:
                given["conditions"] = {
                    name: np.array(each["values"], each["dtype"]).reshape(each["shape"])
                    for name, each in request["conditions"].items()
                }
            with pytest.raises(DcompileError) as caught:
                session.generate(**given)
            assert refused == {"error": str(caught.value), "kind": "request"}
            expect_equal(session, good, served)


def test_labels_need_names_in_the_bundle(driver: Driver, tiny: Build) -> None:
    _, answer = driver({"open": tiny(labels=False).path}, {"labels": ["A"]})
    assert answer["error"] == "label 'A': 'class_labels' has no label names in this bundle; give a number below 5"


def test_engine_options_reach_the_engine(driver: Driver, tiny: Build) -> None:
    path = tiny().path
    served, refused = driver(
        {"open": path, "options": {"session.disable_prepacking": "1"}},
        {"open": path, "options": {"": "no option has no name"}},
    )
    assert served == {"steps": 3}
    assert refused["kind"] == "engine"
    assert "does not load it" in refused["error"]


def test_a_callback_that_throws_ends_the_request(driver: Driver, tiny: Build) -> None:
    _, thrown, served = driver({"open": tiny().path}, {"labels": [0], "throw_at": 2}, {"labels": [0]})
    assert thrown == {"error": "the callback threw at step 2: enough", "kind": "callback"}
    assert len(served["steps"]) == 3


# --- the command ---


def test_command(sanitized: Path, tiny: Build, tmp_path: Path) -> None:
    bundle, output = tiny().path, tmp_path / "samples"

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(each) for each in (sanitized / "dcompile-run", *words)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(bundle, "--labels", "B,4", "--seed", "7", "-o", output).returncode == 0
    with load(bundle) as session:
        expected = session.generate(labels=["B", 4], seed=7)
        np.testing.assert_allclose(np.fromfile(output, np.float32), expected.flatten(), rtol=0, atol=TOLERANCE)
        assert run(bundle, "--labels", "B,4", "--seeds", "7,8", "--pixels", "-o", output).returncode == 0
        assert output.read_bytes() == session.images(expected).tobytes()
    np.array([1, 4], np.int64).tofile(tmp_path / "labels")
    assert run(bundle, "--condition", f"class_labels={tmp_path}/labels", "--seed", 7, "-o", output).returncode == 0
    np.testing.assert_allclose(np.fromfile(output, np.float32), expected.flatten(), rtol=0, atol=TOLERANCE)
    figures = json.loads(run(bundle, "--labels", "A", "--measure", "--repeats", "2").stdout)
    assert 0 < figures["step_s"] < figures["generate_s"]
    assert 0 < figures["overhead_frac"] < 1
    assert figures["copied_bytes"] == 0
    assert figures["peak_rss_bytes"] > 1e6
    for words, message in [
        ((), "BUNDLE is missing"),
        ((bundle, "--lables", "A"), "--lables is unknown"),
        ((bundle, "--seed", "x"), "--seed: 'x' is no whole number"),
        ((bundle, "--labels"), "--labels needs a value"),
        ((bundle, "--labels", "Z"), "no label of 'class_labels' is called 'Z'"),
        ((tmp_path,), "manifest.json: not found"),
        ((bundle, "--labels", "A", "-o", tmp_path), "cannot be written"),
    ]:
        refused = run(*words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert message in refused.stderr
