import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest

from dcompile.runtime import BundleError, DcompileError, EngineError, RequestError, load
from dcompile.runtime.manifest import Call, Condition
from dcompile.runtime.random import normal

Build = Callable[..., Any]

ZERO = np.zeros((1, 1, 4, 4), dtype=np.float32)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_generate_is_the_script_in_numpy(tiny: Build) -> None:
    bundle = tiny()
    x = np.float32(0.5) * normal([7, 8], 0, (1, 4, 4))
    label = np.array([1, 4])
    x, state = bundle.full(x, label, 0, ZERO, ZERO)
    x = bundle.reuse(x, 1, state)
    x, _ = bundle.full(x, label, 2, state, ZERO)
    with load(bundle.path, threads=1) as session:
        samples = session.generate(labels=["B", 4], seed=7)
        assert samples.dtype == np.float32
        close(samples, x)
        close(session.generate(conditions={"class_labels": label}, seed=[7, 8]), x)  # and no state is left over


@pytest.mark.parametrize(("below", "engine"), [(1e6, "reuse"), (0.0, "full")])
def test_a_jump_chooses_the_engine(tiny: Build, below: float, engine: str) -> None:
    bundle = tiny(below=below)
    label = np.array([2])
    x, state = bundle.full(np.float32(0.5) * normal([0], 0, (1, 4, 4)), label, 0, ZERO, ZERO)
    if engine == "reuse":
        x = bundle.reuse(x, 1, state)
    else:
        x, state = bundle.full(x, label, 1, state, ZERO)
    x, _ = bundle.full(x, label, 2, state, ZERO)
    with load(bundle.path) as session:
        close(session.generate(labels="C"), x)


def test_noise_is_fresh_for_every_call(tiny: Build) -> None:
    bundle = tiny(stochastic=True)
    initial, first, _, third = (normal([3], draw, (1, 4, 4)) for draw in range(4))
    label = np.array([0])
    x, state = bundle.full(np.float32(0.5) * initial, label, 0, ZERO, first)
    x = bundle.reuse(x, 1, state)
    x, _ = bundle.full(x, label, 2, state, third)
    with load(bundle.path) as session:
        close(session.generate(labels="A", seed=3), x)


def test_a_sample_does_not_depend_on_its_batch(tiny: Build) -> None:
    with load(tiny(stochastic=True).path, threads=1) as session:
        together = session.generate(labels=["A", "B", "C"], seed=[11, 5, 2**64 - 1])
        for i, (label, seed) in enumerate([("A", 11), ("B", 5), ("C", 2**64 - 1)]):
            np.testing.assert_array_equal(together[i], session.generate(labels=label, seed=seed)[0])


def test_callback_sees_every_step_and_timing_adds_up(tiny: Build) -> None:
    seen: list[tuple[int, int]] = []
    last: list[Any] = []
    with load(tiny().path) as session:
        assert session.last_timing is None

        def watch(step: int, steps: int, sample: Any) -> None:
            seen.append((step, steps))
            last.append(sample)

        samples = session.generate(labels=[0, 1], callback=watch)
        np.testing.assert_array_equal(last[-1], samples)
        timing = session.last_timing
        assert timing is not None
        assert 0 < timing.engines_s < timing.total_s
        assert 0 < timing.overhead_frac < 1
        assert (timing.calls, timing.steps) == (3, 3)
        session.reset()
        assert session.last_timing is None
    assert seen == [(1, 3), (2, 3), (3, 3)]


REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"labels": ["Z"]}, "no label of 'class_labels' is called 'Z'; known: A, B, C, D, E"),
    ({"labels": ["a"]}, "is called 'a'"),
    ({"labels": [0.5]}, "label 0.5 of 'class_labels': needed a name or a whole number"),
    ({"labels": [0, 99]}, "label 99 of 'class_labels': this bundle knows 5, 0..4"),
    ({"labels": [-1]}, "label -1 of 'class_labels'"),
    ({"labels": [0] * 5}, "batch 5: this bundle takes 1..4; split the request, or compile for a larger batch"),
    ({"labels": []}, "batch 0: this bundle takes 1..4"),
    ({}, "condition 'class_labels' is missing: give conditions={'class_labels': ...} or labels=[...]"),
    ({"conditions": {"class_label": [0]}}, "no condition is called 'class_label'; did you mean 'class_labels'?"),
    ({"conditions": {"class_labels": [0.5]}}, "condition 'class_labels': dtype float64, needed int64"),
    ({"conditions": {"class_labels": ["A"]}}, "condition 'class_labels': dtype <U1, needed int64"),
    ({"conditions": {"class_labels": [[0]]}}, "condition 'class_labels': shape [1, 1], needed [batch]"),
    ({"conditions": {"class_labels": 0}}, "condition 'class_labels': shape [], needed [batch]"),
    ({"conditions": {"class_labels": [[0], [1, 2]]}}, "condition 'class_labels': rows of unequal length"),
    ({"labels": [0], "conditions": {"class_labels": [0]}}, "labels: 0 conditions that are not given otherwise"),
    ({"labels": [0, 1], "seed": [1, 2, 3]}, "3 seeds for a batch of 2"),
    ({"labels": [0], "seed": -1}, "seed -1 is outside 0..2**64 - 1"),
    ({"labels": [0, 1], "seed": 2**64 - 1}, "seed 18446744073709551616 is outside"),
]


@pytest.mark.parametrize(("request_", "message"), REQUESTS)
def test_bad_requests_say_what_to_change(tiny: Build, request_: dict[str, Any], message: str) -> None:
    with load(tiny().path) as session, pytest.raises(RequestError) as caught:
        session.generate(**request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_need_names_in_the_bundle(tiny: Build) -> None:
    with load(tiny(labels=False).path) as session, pytest.raises(RequestError, match=r"no label names .* below 5"):
        session.generate(labels="A")


def test_the_seed_list_sets_an_unconditional_batch(tiny: Build) -> None:
    bundle = tiny()
    contract = bundle.manifest.contract
    bundle.edit(
        contract=replace(contract, conditions=()),
        engines={"reuse": bundle.manifest.engines["reuse"]},
        script=(Call("reuse", 0),),
    )
    with load(bundle.path) as session:
        assert session.generate().shape == (1, 1, 4, 4)
        assert session.generate(seed=range(3)).shape == (3, 1, 4, 4)
        seeds: Any = np.arange(3)
        np.testing.assert_array_equal(session.generate(seed=seeds)[2], session.generate(seed=seeds[2])[0])
        with pytest.raises(RequestError, match="labels: 0 conditions"):
            session.generate(labels=[0])


def test_conditions_share_a_batch(tiny: Build) -> None:
    bundle = tiny()
    contract = bundle.manifest.contract
    text = Condition("text", "float32", (2,))
    bundle.edit(contract=replace(contract, conditions=(*contract.conditions, text)))
    with load(bundle.path) as session:
        assert session.generate(labels=["A"], conditions={"text": [[0, 1]]}).shape == (1, 1, 4, 4)
        with pytest.raises(RequestError, match="class_labels has 2"):
            session.generate(labels=["A", "B"], conditions={"text": [[0, 1]]})


def test_damaged_bundles_are_refused_by_file(tiny: Build) -> None:
    bundle = tiny()
    engine = bundle.path / "engines/reuse.onnx"
    good = engine.read_bytes()
    engine.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    with pytest.raises(BundleError, match=r"engines/reuse.onnx: its sha256"):
        load(bundle.path)
    engine.write_bytes(good[:40])
    with pytest.raises(EngineError, match=r"engines/reuse.onnx: .*does not load"):
        load(bundle.path, verify=False)
    engine.unlink()
    with pytest.raises(BundleError, match=r"engines/reuse.onnx: missing"):
        load(bundle.path)
    engine.write_bytes(good)
    (bundle.path / "tables.safetensors").write_bytes(b"no table")
    with pytest.raises(BundleError, match=r"tables.safetensors: cannot be read"):
        load(bundle.path, verify=False)
    manifest = bundle.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(BundleError, match="schema 2, this runtime reads up to 1; upgrade dcompile") as caught:
        load(bundle.path)
    assert isinstance(caught.value, DcompileError)
    assert caught.value.exit_code == 2


def test_rows_must_be_in_their_tables(tiny: Build) -> None:
    bundle = tiny()
    bundle.edit(script=(Call("full", 0), Call("full", 3)))
    with pytest.raises(BundleError, match=r"table 'row' has 3 rows, script\[1\] asks for row 3"):
        load(bundle.path)
    reuse = bundle.manifest.engines["reuse"]
    inputs = {**reuse.inputs, "row": replace(reuse.inputs["row"], table="rows")}
    bundle.edit(engines={**bundle.manifest.engines, "reuse": replace(reuse, inputs=inputs)})
    with pytest.raises(BundleError, match="engine 'reuse' reads rows of 'rows'; did you mean 'row'"):
        load(bundle.path)


def test_images(tiny: Build) -> None:
    bundle = tiny()
    with load(bundle.path) as session:
        samples = np.array([-2.0, -1.0, 0.0, 1.0, 3.0], dtype=np.float32).reshape(1, 1, 1, 5)
        pixels = session.images(samples)
        assert pixels.dtype == np.uint8
        assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
        assert session.images(np.zeros((2, 3, 4, 5), np.float32)).shape == (2, 4, 5, 3)
        with pytest.raises(RequestError, match=r"shape \[2, 3\]"):
            session.images(np.zeros((2, 3), np.float32))
    bundle.edit(contract=replace(bundle.manifest.contract, value_range=None))
    with load(bundle.path) as session:
        latents = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 2, 3)
        pixels = session.images(latents)
        assert pixels.shape == (2, 2, 3, 3)
        assert [(each.min(), each.max()) for each in pixels] == [(0, 255), (0, 255)]
        assert session.images(latents[:, :2]).shape == (2, 2, 3, 1)
        assert not session.images(np.ones((1, 1, 2, 2), np.float32)).any()


def test_closed_sessions_say_so(tiny: Build) -> None:
    session = load(tiny().path)
    session.close()
    with pytest.raises(RequestError, match="closed"):
        session.generate(labels="A")


LIGHT = """
import sys, time
started = time.perf_counter()
import dcompile.runtime
print(time.perf_counter() - started)
assert "onnxruntime" not in sys.modules
with dcompile.runtime.load(sys.argv[1]) as session:
    session.generate(labels="A")
assert "torch" not in sys.modules
"""


def test_import_is_quick_and_needs_no_torch(tiny: Build) -> None:
    def import_s() -> float:
        command = [sys.executable, "-c", LIGHT, str(bundle.path)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    bundle = tiny()
    assert median(import_s() for _ in range(3)) < 0.5
