"""From a model to a bundle: what is told, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcompile.compiler.errors import GateError, RecipeError
from dcompile.compiler.program import Program
from dcompile.compiler.recipe import Recipe, options_of
from dcompile.exporters import build as builder
from dcompile.exporters.build import check_recipe, compile_model
from dcompile.exporters.bundle import is_whole, written_aside
from dcompile.exporters.export import baseline_bundle
from dcompile.exporters.lower import Lowered
from dcompile.exporters.onnx.target import export_engines
from dcompile.exporters.settings import Settings
from dcompile.exporters.target import TargetOptions
from dcompile.exporters.targets import find_target
from dcompile.passes.prune_layers import PruneLayers
from dcompile.runtime import BundleError
from dcompile.runtime.manifest import read

Command = Callable[..., subprocess.CompletedProcess[str]]
SHARED = Path(__file__).parents[1] / "shared"  # where models.py is


def report_of(bundle: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((bundle / "report.json").read_text())
    return report


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_report_tells_what_each_pass_did(built: Path) -> None:
    report = report_of(built)
    stages = {stage["name"]: stage for stage in report["passes"]}
    assert list(stages) == ["prune_layers", "cache_steps", "quantize", "fold_timestep"]
    assert all(stage["seconds"] > 0 and stage["changed"] > 0 for stage in stages.values())
    sizes = [report["table"][0]["before"], *(stage["parameters"] for stage in stages.values())]
    assert sizes[1] < sizes[0]  # without the pruned block
    assert sizes[-1] < sizes[-2]  # without the timestep's layers
    assert report["plan"]["computed"] == [[True, False, True, False]]
    assert {parity["engine"] for parity in report["parity"]} == {"full", "reuse"}
    assert {row["metric"] for row in report["table"]} >= {"parameters", "flops", "bytes", "latency_s", "psnr"}
    assert report["quality"]["samples"] == 4
    assert report["commands"]["sample from it"] == f"dcompile run {built} --seed 0 -o sample.png"
    assert report["tools"]["torch"] in (built / "report.html").read_text()
    assert report["labels"] == ["class 0", "class 1", "class 2", "class 3"]


def test_layers_that_are_promised_in_int8_run_in_int8(built: Path) -> None:
    report = report_of(built)
    full, reuse = report["operators"]["full"], report["operators"]["reuse"]
    quantised = next(stage for stage in report["passes"] if stage["name"] == "quantize")["changed"]
    assert full["MatMulIntegerToFloat"] >= 6  # attention and feed-forward of a block, at the least
    assert reuse.get("MatMulIntegerToFloat", 0) < full["MatMulIntegerToFloat"] <= quantised


def test_the_bundle_holds_the_whole_recipe(built: Path) -> None:
    recipe = yaml.safe_load((built / "recipe.yaml").read_text())
    prune, cache, quant, _ = recipe["passes"]
    assert prune == {"prune_layers": options_of(PruneLayers(count=1))}  # defaults too
    assert prune["prune_layers"]["method"] == "greedy"
    assert cache["cache_steps"]["predictor"] == "taylor1"  # a default
    assert quant["quantize"]["max_error"] == 1
    assert (recipe["steps"], recipe["guidance"], recipe["shape"]) == (4, 2.0, [4, 8, 8])
    Recipe.model_validate(recipe)


def test_nothing_is_left_beside_a_bundle(built: Path) -> None:
    assert names_in(built.parent) == {"model", "cache", "bundle"}
    assert names_in(built) == {
        "engines", "manifest.json", "recipe.yaml", "report.html", "report.json", "tables.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "onxn"], "--target 'onxn': no such target; did you mean 'onnx'?"),
        (["--passes", "prun"], "step 1: no pass is called 'prun'; did you mean 'prune'?"),
        (["--passes", "cache,prune:ratoi=1"], "step 2 ('prune'): unknown option 'ratoi'; did you mean 'ratio'?"),
        (["--passes", "prune:ratio=2"], "step 1: prune_layers: ratio is 2.0, needed 0 to 1"),
        (["--passes", "prune:ratio=["], "--passes 'prune:ratio=[': 'ratio=[' has a value that is no YAML"),
        (["--passes", "prune:blocks=a"], "step 1 ('prune'): blocks is 'a': Input should be a valid list, as in [a,b]"),
        (["--gate", "psnr>=1", "--no-eval"], "a gate needs the evaluation; leave --no-eval out"),
        (["--gate", "psnr>=1", "--eval-samples", "0"], "gate on 'psnr' needs samples: give --eval-samples 1 or more"),
        (["--gate", "accuracy>=0.5"], "gate on 'accuracy' needs a judge: give --judge DIRECTORY, or drop the gate"),
        (["--gate", "psrn>=1"], "no metric is called 'psrn'; did you mean 'psnr'?"),
        (["--judge", "nowhere"], "nowhere: no judge.onnx found"),
        (["--shape", "3x"], "--shape '3x': needs positive sizes joined by x, without the batch, for example 4x32x32"),
    ],
)
def test_what_is_unknown_is_refused_before_any_work(
    arguments: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "ingest", lambda source: pytest.fail("the model was read"))
    done = command("model", "-o", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert names_in(tmp_path) == set()


def test_a_folder_that_is_no_bundle_is_refused_before_any_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "ingest", lambda source: pytest.fail("the model was read"))
    (tmp_path / "notes").write_text("a")
    done = command("model", "-o", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: exists and is no bundle; choose another -o, or --force to replace it\n"


def test_speed_gates_need_neither_samples_nor_judge() -> None:
    checked = check_recipe(Recipe(gate="speedup>=1,size_ratio<=0.5", eval_samples=0), Settings())
    assert [gate.metric for gate in checked.gates] == ["speedup", "size_ratio"]
    assert checked.judge is None
    with pytest.raises(RecipeError, match="no such target"):
        check_recipe(Recipe(target="none"), Settings())


@dataclass
class Told:
    """A listener that remembers."""

    stages: list[str] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def progress(self, fraction: float, text: str) -> None:
        self.fractions.append(fraction)


def tokens_recipe(contract: Path, **more: Any) -> Recipe:
    return Recipe(contract=contract, sampler="flow_euler", steps=4, calibration_samples=1, eval_samples=2, **more)


def test_a_gate_that_is_not_met_keeps_the_report_and_writes_no_bundle(tokens_contract: Path, tmp_path: Path) -> None:
    told = Told()
    recipe = tokens_recipe(tokens_contract, passes=("cache:interval=4",), gate="psnr>=99.5,size_ratio<=2")
    settings = Settings(threads=1, listener=told)
    (tmp_path / "out.report").mkdir()
    (tmp_path / "out.report/old").write_text("a")
    with pytest.raises(
        GateError, match=r"gate not met: psnr is [\d.]+, needed >= 99\.5; no bundle was written, the"
    ) as e:
        compile_model("models:tokens", tmp_path / "out", recipe, settings)
    assert e.value.exit_code == 3
    assert names_in(tmp_path) == {"out.report"}  # the baseline, too, is gone: no cache was given
    assert names_in(tmp_path / "out.report") == {"report.json", "report.html"}
    report = report_of(tmp_path / "out.report")
    assert report["passed"] is False
    assert [(gate["metric"], gate["passed"]) for gate in report["gates"]] == [("psnr", False), ("size_ratio", True)]
    assert told.stages == [
        "reading models:tokens",
        "pass 1 of 1: cache_steps",
        "exporting for onnx, layout variants",
        "comparing engines with the program",
        "exporting the uncompressed model, to compare with",
        "sampling, to compare quality",
        "timing, interleaved with the uncompressed model",
    ]
    assert 0 <= min(told.fractions) < max(told.fractions) <= 1


def test_the_baseline_is_kept_until_it_is_damaged(tokens: Program, tmp_path: Path) -> None:
    told = Told()
    settings = Settings(cache=tmp_path / "cache", listener=told)
    kept: list[Path] = []
    for damage in (False, False, True):
        if damage:
            (kept[0] / "engines/weights.bin").write_bytes(b"")
        with baseline_bundle(tokens, find_target("onnx"), TargetOptions(), tmp_path / "out", settings) as folder:
            assert is_whole(folder)
            kept.append(folder)
    assert len(set(kept)) == 1
    assert len(told.stages) == 2  # exported at first, and again when it was damaged


def tokens_build(contract: Path, output: Path, *more: object) -> list[str]:
    passes = "prune:count=1,cache:interval=2,quant:max_error=1"
    given = ["models:tokens", "--contract", contract, "--sampler", "flow_euler", "--steps", 4, "--passes", passes]
    return [str(each) for each in (*given, "--calibration-samples", 1, "-o", output, *more)]


def test_a_killed_build_leaves_no_bundle_and_the_next_goes_on(
    tokens_contract: Path, tmp_path: Path, command: Command
) -> None:
    output = tmp_path / "out"
    arguments = tokens_build(tokens_contract, output, "--no-eval", "--cache-dir", tmp_path / "cache")
    process = subprocess.Popen([sys.executable, "-m", "dcompile.cli", *arguments], cwd=SHARED, stderr=subprocess.PIPE)
    try:
        for _ in wait_until(lambda: any(tmp_path.glob(".out.partial-*/engines/full.onnx")), 300):
            assert process.poll() is None, process.communicate()[1].decode()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == {"cache", f".out.partial-{process.pid}"}

    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert [stage["seconds"] for stage in report_of(output)["passes"]] == [0.0, 0.0, 0.0]
    assert names_in(tmp_path) == {"cache", "out"}
    assert is_whole(output)


def wait_until(true: Callable[[], bool], seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
        yield


def test_a_full_disk_is_one_line_and_leaves_nothing(tokens_contract: Path, tmp_path: Path, command: Command) -> None:
    """A limit on the size of a file fails where a full disk would: in the weights file, half written."""
    arguments = tokens_build(tokens_contract, tmp_path / "out", "--no-eval", "--no-cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))
    try:
        done = command(*arguments, "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2
    message = "File too large; nothing was written: make room, or choose another -o"
    assert done.stderr == f"error: {tmp_path}/out: {message}\n"
    assert names_in(tmp_path) == set()


def test_a_really_full_disk_leaves_nothing(lowered: Lowered, tmp_path: Path) -> None:
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(BundleError, match="No space left on device; nothing was written"):
            export_aside(lowered, tmp_path / "out")
        assert names_in(tmp_path) == set()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def export_aside(lowered: Lowered, output: Path) -> None:
    with written_aside(output) as folder:
        export_engines(lowered, folder)


def damage_byte(bundle: Path) -> None:
    engine = bundle / "engines/full.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


def damage_schema(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, "/engines/full.onnx: its sha256 is not the manifest's; damaged or edited: copy the bundle again"),
        (lambda bundle: (bundle / "engines/reuse.onnx").unlink(), "/engines/reuse.onnx: missing; the bundle is incomp"),
        (damage_schema, "/manifest.json: written by a newer dcompile: schema 99, this runtime reads up to 1; upgrade"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "/manifest.json: not JSON"),
    ],
    ids=["flipped", "missing", "newer", "cut"],
)
def test_a_damaged_bundle_is_refused_in_one_line_that_names_the_file(
    damage: Callable[[Path], object], message: str, built: Path, tmp_path: Path, command: Command
) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    assert read(bundle).schema == 1
    damage(bundle)
    done = command("run", bundle, "-q", "-o", tmp_path / "sample.png")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {bundle}{message}")
    assert done.stderr.count("\n") == 1
    assert names_in(tmp_path) == {"bundle"}
