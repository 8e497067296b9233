"""The profile of a model as a table, a CSV and a picture."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcompile.compiler.errors import PassError
from dcompile.compiler.program import Program
from dcompile.exporters.profile import profile_program, profile_table, write_csv

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_command_writes_figures_and_a_picture(dit_folder: Path, tmp_path: Path, command: Command) -> None:
    words = ("--steps", 4, "--samples", 2, "--guidance", 2, "-o", tmp_path / "profile.png", "-q")
    kept = ("--cache-dir", tmp_path / "kept")
    done = command("profile", dit_folder, *words, *kept)
    assert done.returncode == 0, done.stderr
    assert "transformer_blocks_2" in done.stdout
    with (tmp_path / "profile.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["site"], row["step"]) for row in rows[:5]] == [
        *(("transformer_blocks_0", str(step)) for step in range(4)), ("transformer_blocks_1", "0")
    ]  # fmt: skip
    assert all(float(row["norm"]) > 0 for row in rows)
    assert {float(row["change"]) for row in rows if row["step"] == "0"} == {0.0}
    assert np.asarray(Image.open(tmp_path / "profile.png").convert("L")).std() > 1
    figures = (tmp_path / "profile.csv").read_text()
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(entries) == 3 * 2
    assert command("profile", dit_folder, *words, *kept).stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == entries
    assert command("profile", dit_folder, *words, "--no-cache").stdout == done.stdout
    assert (tmp_path / "profile.csv").read_text() == figures
    refused = command("profile", dit_folder, "--site", "blocks")
    assert refused.returncode == 2
    assert "--site 'blocks': did you mean 'block'?" in refused.stderr


def test_every_kind_of_site(unet: Program, tmp_path: Path) -> None:
    for kind, count in (("cut", 1), ("encoder", 5), ("output", 1)):
        profile = profile_program(unet, kind, 1)
        assert len(profile.names) == count
        assert (profile.changes[:, 1:] > 0).all()
    assert profile_table(profile, most=0).caption == "the 0 of 1 that change least; the CSV has all"
    write_csv(profile, tmp_path / "profile.csv")
    assert not list(tmp_path.glob(".*"))


def test_a_network_without_such_sites(dit: Program) -> None:
    with pytest.raises(PassError, match=r"found no site of kind 'cut' in"):
        profile_program(dit, "cut", 1)


def test_methods_are_listed(command: Command) -> None:
    done = command("methods", "cache")
    assert done.returncode == 0
    for text in ("deepcache", "2406.01125", "its published step lists"):
        assert text in done.stdout
    assert "only cache has methods" in command("methods", "prune").stderr
