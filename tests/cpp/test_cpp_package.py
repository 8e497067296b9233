"""The library as others get it: installed, found by CMake, linked into the example; by both compilers."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcompile.runtime import load

Build = Callable[..., Any]
CMake = Callable[..., None]

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


@pytest.fixture(scope="session")
def installed(cpp_build: Path, compilers: list[str], cmake: CMake, engine_definitions: list[str]) -> dict[str, Path]:
    """Prefixes that the library is installed in: "static" by g++, "shared" by clang++ where it is there."""
    prefixes = {}
    for form, compiler in (("static", compilers[0]), ("shared", compilers[-1])):
        build, prefix = cpp_build / form, cpp_build / f"{form}-prefix"
        shutil.rmtree(prefix, ignore_errors=True)
        shared = "ON" if form == "shared" else "OFF"
        modes = [f"CMAKE_CXX_COMPILER={compiler}", f"BUILD_SHARED_LIBS={shared}", "DCOMPILE_WERROR=ON"]
        cmake(Path(__file__).parents[2] / "runtime" / "cpp", build, *modes, *engine_definitions)
        subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True, capture_output=True)
        prefixes[form] = prefix
    return prefixes


@pytest.mark.parametrize("form", ["static", "shared"])
def test_the_example_draws_what_python_draws(
    form: str, installed: dict[str, Path], cmake: CMake, tiny: Build, tmp_path: Path
) -> None:
    cmake(EXAMPLE, tmp_path / "build", f"CMAKE_PREFIX_PATH={installed[form]}")
    bundle, picture = tiny().path, tmp_path / "b.png"
    done = subprocess.run([tmp_path / "build/glyph", bundle, "B", "7", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3" in done.stderr
    assert f"{picture}: 4 x 4" in done.stdout
    with load(bundle) as session:
        expected = session.images(session.generate(labels="B", seed=7))
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected[0, :, :, 0])
    refused = subprocess.run([tmp_path / "build/glyph", bundle, "?", "7", picture], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no label of 'class_labels' is called '?'" in refused.stderr


@pytest.mark.parametrize("form", ["static", "shared"])
def test_the_installed_command_runs_anywhere(
    form: str, installed: dict[str, Path], tiny: Build, tmp_path: Path
) -> None:
    prefix = shutil.copytree(installed[form], tmp_path / "moved", symlinks=True)
    command = [prefix / "bin/dcompile-run", tiny().path, "--labels", "A", "-o", tmp_path / "samples"]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert (tmp_path / "samples").stat().st_size == 4 * 4 * 4


def test_the_shared_library_shows_its_interface_alone(installed: dict[str, Path]) -> None:
    library = next((installed["shared"] / "lib").glob("libdcompile.so"))
    listed = subprocess.run(["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split(maxsplit=2)[2] for line in listed.splitlines()}
    ours = {name for name in names if "dcompile::" in name and not name.startswith(("typeinfo", "vtable"))}
    assert {re.match(r"(dcompile::Program::~?\w+)", name) is not None for name in ours} == {True}


def test_an_engine_can_be_left_out(cpp_build: Path, cmake: CMake, engine_definitions: list[str], tiny: Build) -> None:
    build = cpp_build / "static"
    cached = (build / "CMakeCache.txt").read_text()
    assert "DCOMPILE_WITH_TENSORRT:STRING=AUTO" in cached
    configured = subprocess.run(["cmake", build], capture_output=True, text=True, check=True).stdout
    assert "TensorRT was not found; its engine is left out" in configured
    bundle = tiny()
    bundle.edit(target="trt")
    done = subprocess.run([build / "dcompile-run", bundle.path, "--labels", "A"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "target 'trt': this library was built without its engine" in done.stderr
