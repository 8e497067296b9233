"""The command as a user types it: what it prints, writes, and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dcompile
from dcompile import cli
from dcompile.exporters import build as builder
from dcompile.runtime.manifest import read

Command = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ("build", "run", "inspect", "bench", "report", "passes")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_help_shows_the_commands_and_how_to_begin(command: Command) -> None:
    for arguments in (["--help"], ["-h"]):
        done = command(*arguments)
        assert done.returncode == 0
        assert "dcompile MODEL --passes prune,cache,quant,fold -o build/NAME" in done.stdout
        for name in COMMANDS:
            assert f"│ {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, command: Command) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert f"Usage: dcompile {name}" in done.stdout


def test_help_tells_the_defaults(command: Command) -> None:
    shown = " ".join(command("build", "--help").stdout.replace("│", " ").split())  # the lines of a box, joined
    for default in ("build/NAME", "onnx", "the model's, or 30", "72", "~/.cache/dcompile"):
        assert f"(default: {default})" in shown


def test_version(command: Command) -> None:
    assert command("--version").stdout == f"dcompile {dcompile.__version__}\n"


def test_without_arguments_there_is_help(command: Command) -> None:
    assert "Usage: dcompile" in command().stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle"], "modle: no such file or folder; give a diffusers folder, model.pt2, model.pt, or package.module:"),
        (["insepct", "bundle"], "insepct: no such command or model; did you mean 'inspect'?"),
        (["build"], "no model: give a folder, a file or package.module:factory, or `model:` in the recipe"),
        (["run", "nothing"], "nothing/manifest.json: not found; a bundle is the directory that `dcompile MODEL -o"),
        (["bench", "nothing"], "nothing/manifest.json: not found; a bundle is the directory that"),
        (
            ["report", "nothing"],
            "nothing/report.json: not found; only `dcompile build` writes a report, into the bundle",
        ),
        (["inspect", "nothing"], "nothing: no such file or folder"),
        (["inspect", "nowhere:none"], "nowhere:none: cannot import 'nowhere'"),
        (["model", "--recipe", "none.yaml"], "recipe none.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {message}")
    assert all(line == last or line.startswith("[") for line in done.stderr.splitlines())  # progress comes before it
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pases: [prune]", "unknown key 'pases'; did you mean 'passes'?"),
        ("passes: [prune", "cannot be read (line 1, column 15: expected ',' or ']', but got '<stream end>')"),
        ("passes: 3", "passes: Input should be a valid list"),
        ("passes: prune,cach", "step 2: no pass is called 'cach'; did you mean 'cache'?"),
        ("- prune", "needs a mapping such as `passes: [prune, cache, quant]`; found list"),
        ("steps: 0", "steps: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_says_where(text: str, message: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    done = command("model", "--recipe", tmp_path / "recipe.yaml")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_that_do_not_exist_are_refused(command: Command) -> None:
    done = command("model", "--frobnicate")
    assert done.returncode == 2
    assert "No such option: --frobnicate" in done.stderr


def test_errors_of_the_system_are_one_line_too(command: Command, built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    done = command("run", built, "-q", "-o", tmp_path / "file/sample.npy")
    assert done.returncode == 2
    assert done.stderr == f"error: Not a directory ({tmp_path}/file)\n" or "File exists" in done.stderr


def test_bugs_are_not_dressed_up(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(builder, "compile_model", fail)
    with pytest.raises(ZeroDivisionError):
        command("model", "-o", tmp_path / "out")


def test_an_interrupted_build_says_how_to_go_on(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "compile_model", interrupt)
    done = command("model", "-o", tmp_path / "out")
    assert done.returncode == 130
    assert (
        done.stderr == "interrupted: nothing was written, and the same command goes on after the last finished pass\n"
    )
    done = command("model", "-o", tmp_path / "out", "--no-cache")
    assert done.stderr == "interrupted: nothing was written\n"


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    command: Command, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(built.parent / "model", "--passes", "prune,cache:interval=2", "--steps", 4, "--dry-run")
    assert done.returncode == 0
    assert "-> build/built0  (dry run: nothing is measured or written)" in done.stdout
    assert "cache_steps  method=interval, interval=2, warmup=2" in done.stdout
    assert names_in(tmp_path) == set()
    refused = command(built.parent / "model", "--passes", "prune:ratoi=2", "--dry-run")
    assert (refused.returncode, refused.stdout) == (2, "")


def test_the_recipe_of_a_bundle_builds_the_same_again(command: Command, built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = command("--recipe", built / "recipe.yaml", "-o", again, "--no-eval", "--cache-dir", built.parent / "cache")
    assert done.returncode == 0, done.stderr
    assert read(again).files == read(built).files  # every engine, weight, table and the recipe, byte for byte
    assert all(stage["seconds"] == 0 for stage in json.loads((again / "report.json").read_text())["passes"])


def test_what_a_build_prints_is_what_to_do_next(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import models

    (tmp_path / "contract.yaml").write_text(models.TOKENS_CONTRACT)
    monkeypatch.chdir(tmp_path)
    given = ["--contract", "contract.yaml", "--sampler", "flow_euler", "--no-cache", "--no-eval"]
    done = command("models:tokens", *given, "--steps", 3, "--passes", "cache", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "│ Operations a sample │" in done.stdout
    assert "bundle  out\nreport  out/report.html\nnext    dcompile run out --seed 0 -o sample.npy\n" in done.stdout
    stages = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert stages == [
        "reading models:tokens",
        "pass 1 of 1: cache_steps",
        "exporting for onnx, layout variants",
        "comparing engines with the program",
    ]
    done = command("build", "models:tokens", *given, "--steps", 2, "-o", "out", "-q")  # replaces it
    assert (done.returncode, done.stderr) == (0, "")
    assert read(Path("out")).contract.steps == 2
    assert command("run", "out", "-q", "-o", "sample.npy").returncode == 0
    assert names_in(tmp_path) == {"contract.yaml", "out", "sample.npy"}


def test_run_writes_a_picture_and_numbers(command: Command, built: Path, tmp_path: Path) -> None:
    done = command("run", built, "--label", "class 3", "--label", "4", "--seed", 7, "-o", tmp_path / "sample.png")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path}/sample.png  (4 steps in ")
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (8 + 2 + 8, 8)
    for labels in (["class 3", "class 4"], ["3", "4"]):
        words = [word for label in labels for word in ("-l", label)]
        assert command("run", built, *words, "--seed", 7, "-o", tmp_path / f"{labels[0]}.npy", "-q").stderr == ""
    by_name, by_number = np.load(tmp_path / "class 3.npy"), np.load(tmp_path / "3.npy")
    assert by_name.shape == (2, 4, 8, 8)
    np.testing.assert_array_equal(by_name, by_number)
    assert np.isfinite(by_name).all()


def test_run_needs_no_torch(built: Path, tmp_path: Path) -> None:
    code = (
        f"import atexit, sys; sys.argv = ['dcompile', 'run', {str(built)!r}, '-o', {str(tmp_path / 'sample.png')!r}];"
        "atexit.register(lambda: print({'torch', 'diffusers', 'onnx'} & set(sys.modules)));"
        "from dcompile.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_inspect_shows_a_bundle_or_a_model(command: Command, built: Path) -> None:
    bundle = command("inspect", built, "--verify")
    assert "engines (4 calls a sample)" in bundle.stdout
    assert "files (all match their checksums)" in bundle.stdout
    model = command("inspect", built.parent / "model", "--sampler", "flow_dpm++2m")
    assert "transformer_blocks.2  BasicTransformerBlock  block" in model.stdout
    assert "sampler DPMSolverMultistepScheduler" in model.stdout


def test_report_prints_the_table_again(command: Command, built: Path) -> None:
    done = command("report", built)
    assert done.returncode == 0
    for row in ("Parameters", "Size on disk", "Latency, batch 16", "PSNR, same seeds"):
        assert f"│ {row} " in done.stdout
    assert f"pictures  {built}/report.html" in done.stdout


def test_bench_compares_bundles_and_writes_the_figures(command: Command, built: Path, tmp_path: Path) -> None:
    json_path = tmp_path / "figures.json"
    done = command("bench", built, "--batch", 2, "--repeats", 1, "--threads", 1, "--json", json_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(json_path.read_text())
    assert figures["bundles"][str(built)]["speedup"] == 1.0
    assert "1.00" in done.stdout
    assert "timing" in done.stderr


def test_passes_are_listed(command: Command) -> None:
    done = command("passes")
    assert done.returncode == 0
    for name in ("prune_layers", "cache_steps", "quantize", "fold_timestep"):
        assert name in done.stdout


def test_progress_bars_count_the_time_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(force_terminal=True, width=120, color_system=None)
    with Progress(*cli._COLUMNS, console=console) as progress:
        bars = cli._Bars(progress)
        bars.stage("reading [model]")
        bars.stage("pass 1 of 2: prune")
        bars.progress(0.25, "trying")
        progress.refresh()
        bars.done()
    shown = capsys.readouterr().out
    assert "✓ reading [model]" in shown
    assert "trying" in shown
    assert " 0 s" in shown
