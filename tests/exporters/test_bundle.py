"""A bundle appears whole or not at all, and says what it is."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dcompile
from dcompile.exporters.bundle import (
    RECIPE_FILE,
    TABLES_FILE,
    check_output,
    is_whole,
    tool_versions,
    written_aside,
)
from dcompile.runtime import BundleError, load
from dcompile.runtime.manifest import FILE, FileSpec, Manifest, Slot, StateSpec, Table, read


@pytest.fixture
def manifest(tokens_bundle: Path) -> Manifest:
    return read(tokens_bundle)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_then_raise(output: Path, error: BaseException) -> None:
    with written_aside(output) as folder:
        (folder / "new").write_text("b")
        raise error


def test_the_manifest_wires_engines_to_states_and_tables(manifest: Manifest) -> None:
    assert manifest.name == "tokens"
    assert manifest.dcompile == dcompile.__version__
    assert manifest.states == {f"blocks_1_2.state{k}": StateSpec((("batch", 1), 6, 32), "float32") for k in (0, 1)}
    full, reuse = manifest.engines["full"], manifest.engines["reuse"]
    assert full.inputs["blocks_1_2_state0"] == Slot("blocks_1_2.state0")
    assert full.outputs["next_blocks_1_2.state1"] == Slot("blocks_1_2.state1")
    assert reuse.inputs["blocks_1_2_reuse"] == Table("blocks_1_2.reuse")
    assert reuse.outputs == {"next_sample": Slot("sample")}


def test_the_manifest_lists_every_file_there_is(tokens_bundle: Path, manifest: Manifest) -> None:
    there = {str(path.relative_to(tokens_bundle)) for path in tokens_bundle.rglob("*") if path.is_file()}
    assert manifest.files.keys() == there - {FILE}
    engines = {f"engines/{name}" for name in ("full.onnx", "reuse.onnx", "weights.bin")}
    assert manifest.files.keys() == {*engines, TABLES_FILE, RECIPE_FILE}
    assert all(spec == FileSpec.of(tokens_bundle / name) for name, spec in manifest.files.items())
    assert yaml.safe_load((tokens_bundle / RECIPE_FILE).read_text()) == {"passes": ["cache"], "name": "grün"}


def test_tools_are_named_with_their_versions(manifest: Manifest) -> None:
    import torch

    assert manifest.tools == tool_versions()
    assert manifest.tools["torch"] == torch.__version__
    assert all(manifest.tools.values())


def test_what_was_written_runs(tokens_bundle: Path) -> None:
    with load(tokens_bundle, threads=1) as session:
        assert session.generate(seed=[3, 4]).shape == (2, 6, 4)


def test_a_bundle_is_whole_until_a_byte_of_it_changes(tokens_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokens_bundle, tmp_path / "copy")
    assert is_whole(copy)
    weights = bytearray((copy / "engines/weights.bin").read_bytes())
    weights[0] ^= 1
    (copy / "engines/weights.bin").write_bytes(weights)
    assert not is_whole(copy)
    assert not is_whole(tmp_path / "nothing")


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_then_raise(tmp_path / "deep/out", KeyboardInterrupt())
    assert names_in(tmp_path / "deep") == set()


def test_a_bundle_that_is_there_is_replaced_whole_or_kept_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("a")
    with pytest.raises(ValueError, match="too bad"):
        write_then_raise(output, ValueError("too bad"))
    assert names_in(output) == {"old"}
    with written_aside(output) as folder:
        (folder / "new").write_text("b")
        assert names_in(output) == {"old"}  # until the end, readers see what was there
    assert names_in(output) == {"new"}
    assert names_in(tmp_path) == {"out"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_force_replaces_a_file_or_a_link_and_follows_neither(kind: str, tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("a")
    if kind == "file":
        output.write_text("a")
    else:
        output.symlink_to(elsewhere)
    with written_aside(output) as folder:
        (folder / "new").write_text("b")
    assert names_in(tmp_path) == {"out", "elsewhere"}
    assert not output.is_symlink()
    assert names_in(output) == {"new"}
    assert names_in(elsewhere) == {"kept"}


def test_what_killed_builds_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, running = ended.stdout.decode().strip(), os.getppid()
    for name in (f".out.partial-{dead}", f".out.baseline-{dead}", f".out.old-{dead}", f".out.partial-{os.getpid()}"):
        (tmp_path / name / "engines").mkdir(parents=True)
    keep = {f".out.partial-{running}", f".other.partial-{dead}", ".out.notes", "out.partial-1"}
    for name in keep:
        (tmp_path / name).mkdir()
    with written_aside(tmp_path / "out") as folder:
        assert names_in(tmp_path) == keep | {folder.name}
        assert names_in(folder) == set()
    assert names_in(tmp_path) == keep | {"out"}


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(BundleError, match=r"out: No space left on device; nothing was written: make room, or choose"):
        write_then_raise(tmp_path / "out", full)
    with pytest.raises(PermissionError):  # of something else: not ours to explain
        write_then_raise(tmp_path / "out", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    assert names_in(tmp_path) == set()


def test_outputs_that_may_be_written(tokens_bundle: Path, tmp_path: Path) -> None:
    check_output(tmp_path / "new/deep", force=False)
    check_output(tmp_path, force=False)  # an empty folder
    check_output(tokens_bundle, force=False)  # a bundle is replaced by a bundle
    (tmp_path / "notes").write_text("a")
    check_output(tmp_path, force=True)


def test_outputs_that_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "work/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(
        BundleError, match=r"model/config\.json: exists and is no bundle; choose another -o, or --force"
    ):
        check_output(model / "config.json", force=False)
    with pytest.raises(BundleError, match="model: exists and is no bundle"):
        check_output(model, force=False)
    with pytest.raises(BundleError, match=r"config\.json is no folder; choose another -o"):
        check_output(model / "config.json/out", force=True)
    for output in (model, model.parent, Path()):  # not even by force: what is read would be gone
        with pytest.raises(BundleError, match=r"holds .*, which a bundle there would replace"):
            check_output(output, force=True, inputs=[Path("model")])


def test_an_output_in_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BundleError, match="cannot be written to; choose another -o"):
        check_output(tmp_path / "out", force=False)
