"""Stripping a bundle. That it runs is tested in tests/deploy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcompile.exporters.deploy.folder import deploy_dir
from dcompile.runtime import BundleError, load
from dcompile.runtime.manifest import read

Command = Callable[..., subprocess.CompletedProcess[str]]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_recipe_and_report_stay_behind(built: Path, tmp_path: Path) -> None:
    done = deploy_dir(built, tmp_path / "out")
    left = {"recipe.yaml", "report.json", "report.html"}
    assert names(built) - names(tmp_path / "out") == left
    assert read(tmp_path / "out").files.keys() == read(built).files.keys() - left
    bytes_left = sum((built / name).stat().st_size for name in left)
    # the manifest, too, is shorter by an entry
    assert 0 < done.before_bytes - done.after_bytes - bytes_left < 300
    assert done.runtime_bytes == 0


def test_samples_are_the_same(built: Path, tmp_path: Path) -> None:
    deploy_dir(built, tmp_path / "out")
    with load(built, threads=1) as whole, load(tmp_path / "out", threads=1) as stripped:
        expected = whole.generate(labels=["class 3"], seed=7)
        np.testing.assert_array_equal(stripped.generate(labels=["class 3"], seed=7), expected)


def test_it_may_be_done_again_and_of_what_is_stripped(built: Path, tmp_path: Path) -> None:
    deploy_dir(built, tmp_path / "out", with_runtime=True)
    deploy_dir(tmp_path / "out", tmp_path / "again")
    deploy_dir(built, tmp_path / "out")
    assert names(tmp_path / "out") == names(tmp_path / "again")


def test_the_original_may_be_built_anew(built: Path, tmp_path: Path) -> None:
    """Files may be hard links; a build replaces a bundle and never writes into one."""
    shutil.copytree(built, tmp_path / "bundle")
    deploy_dir(tmp_path / "bundle", tmp_path / "out")
    shutil.rmtree(tmp_path / "bundle")
    load(tmp_path / "out").close()


@pytest.mark.parametrize(
    ("output", "message"),
    [("bundle", "holds the bundle"), (".", "holds the bundle"), ("other", "is no bundle"), ("file", "is no bundle")],
)
def test_nothing_else_is_overwritten(built: Path, tmp_path: Path, output: str, message: str) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(BundleError, match=message):
        deploy_dir(tmp_path / "bundle", tmp_path / output)
    assert names(tmp_path / "bundle") == names(built)
    assert (tmp_path / "other/letter.txt").read_text() == "dear"


def test_a_damaged_bundle_is_not_deployed(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "bundle")
    weights = tmp_path / "bundle/engines/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"weights.bin: its sha256"):
        deploy_dir(tmp_path / "bundle", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_tells_the_sizes(built: Path, tmp_path: Path, command: Command) -> None:
    done = command("deploy", "dir", built, tmp_path / "out", "--python")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["folder", "bundle", "deployed", "runtime"]
    assert (tmp_path / "out/dcompile/runtime/session.py").exists()
    assert command("deploy", "dir", built, built).returncode == 2
