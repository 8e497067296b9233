"""A deployed bundle where nothing is installed but numpy and ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bare_environment import ROOT, pip

from dcompile.exporters.deploy.folder import deploy_dir
from dcompile.runtime import load


@pytest.fixture(scope="module")
def deployed(glyphs_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed") / "glyphs"
    deploy_dir(glyphs_bundle, folder, with_runtime=True)
    return folder


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In `folder`, and without what the environment of this process would add."""
    return subprocess.run([python, *arguments], cwd=folder, env={}, capture_output=True, text=True, check=False)


def test_nothing_else_is_installed(bare: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))"
    found = set(json.loads(run(bare, tmp_path, "-c", code).stdout))
    assert found == {"numpy", "onnxruntime", "flatbuffers", "packaging", "protobuf"}  # the last three by onnxruntime


def test_a_deployed_folder_runs_by_itself(bare: Path, deployed: Path, glyphs_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples.npy"
    words = ["-m", "dcompile.runtime", ".", "--label", "A", "--label", "7", "--seed", "5", "-o", str(output)]
    done = run(bare, deployed, *words, "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "[2, 1, 32, 32] float32, 30 steps in" in done.stdout
    with load(glyphs_bundle, threads=1) as session:
        # numpy and ONNX Runtime are the same here and there, and so are the numbers
        np.testing.assert_array_equal(np.load(output), session.generate(labels=["A", "7"], seed=5))


def test_errors_are_one_line(bare: Path, deployed: Path, tmp_path: Path) -> None:
    done = run(bare, deployed, "-m", "dcompile.runtime", ".", "--label", "AB")
    assert (done.returncode, done.stderr) == (
        2,
        "error: no label of 'class_labels' is called 'AB'; did you mean 'B'?\n",
    )
    shutil.copytree(deployed, tmp_path / "damaged")
    (tmp_path / "damaged/engines/full.onnx").unlink()
    done = run(bare, tmp_path / "damaged", "-m", "dcompile.runtime", ".")
    assert done.stderr == "error: engines/full.onnx: missing; the bundle is incomplete: copy it again\n"


def test_the_wheel_runs_it_too(bare: Path, deployed: Path, glyphs_bundle: Path, tmp_path: Path) -> None:
    """`pip install --no-deps dcompile` is the other way to the runtime."""
    copy = tmp_path / "source"  # so that a build leaves nothing in this project
    ignored = shutil.ignore_patterns(".*", "build", "tests", "benchmarks", "node_modules", "__pycache__", "examples")
    shutil.copytree(ROOT, copy, ignore=ignored)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy))
    (wheel,) = tmp_path.glob("dcompile-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    bundle = tmp_path / "bundle"
    deploy_dir(glyphs_bundle, bundle)
    code = (
        "import sys; sys.path.insert(0, 'site'); import dcompile; session = dcompile.load('bundle', threads=1);"
        "import numpy; numpy.save('s.npy', session.generate(labels=['Q'], seed=3));"
        "print(sorted({'torch', 'yaml', 'safetensors', 'pydantic'} & sys.modules.keys()))"
    )
    done = run(bare, tmp_path, "-c", code)
    assert done.stdout == "[]\n", done.stderr
    with load(glyphs_bundle, threads=1) as session:
        np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), session.generate(labels=["Q"], seed=3))
