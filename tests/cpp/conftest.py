"""The C++ library as CMake builds it, in build/cpp, which a second run finds up to date."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import tiny

__all__ = ["tiny"]

ROOT = Path(__file__).parents[2]
INSTALL_FIRST = "run runtime/cpp/install_dependencies.sh first"
SANITIZERS = {
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Lets oneTBB, which OpenVINO brings, load its parts in a way that AddressSanitizer can follow.
    "TBB_ENABLE_SANITIZERS": "1",
}


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


def run_cmake(source: Path, build: Path, *definitions: str) -> None:
    """Configures and builds. What fails is shown whole: a compiler's first error is rarely its last line."""
    flags = [f"-D{each}" for each in definitions]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for words in (["-S", str(source), "-B", str(build), *generator, *flags], ["--build", str(build), "-j2"]):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{INSTALL_FIRST}"


@pytest.fixture(scope="session")
def cmake() -> Callable[..., None]:
    return run_cmake


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    return ROOT / "build" / "cpp"


@pytest.fixture(scope="session")
def engine_definitions() -> list[str]:
    """Definitions that find the engines' libraries in the wheels that Python runs."""
    return [
        f"OnnxRuntime_LIBRARY={next((package_folder('onnxruntime') / 'capi').glob('libonnxruntime.so.*'))}",
        f"OpenVINO_DIR={package_folder('openvino') / 'cmake'}",
        "DCOMPILE_WITH_ONNXRUNTIME=ON",
        "DCOMPILE_WITH_OPENVINO=ON",
    ]


@pytest.fixture(scope="session")
def compilers() -> list[str]:
    """Those that are here; the suite cannot run without g++ and CMake."""
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: {INSTALL_FIRST}")
    return [name for name in ("g++", "clang++") if shutil.which(name)]


@pytest.fixture(scope="session")
def sanitized(compilers: list[str], cpp_build: Path, engine_definitions: list[str]) -> Path:
    """The build folder of library, command and test programs, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    build = cpp_build / "sanitized"
    modes = [
        "CMAKE_BUILD_TYPE=Debug",
        "CMAKE_CXX_FLAGS_DEBUG=-g1",
        "DCOMPILE_SANITIZE=ON",
        "DCOMPILE_TESTS=ON",
        "DCOMPILE_WERROR=ON",
    ]
    run_cmake(ROOT / "runtime" / "cpp", build, *modes, "DCOMPILE_TESTS=ON", "DCOMPILE_WERROR=ON", *engine_definitions)
    return build


@dataclass(frozen=True)
class Driver:
    """Talks to driver.cpp, one process a call."""

    program: Path

    def __call__(self, *lines: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer for each line: {"open": path}, then requests of that bundle."""
        done = subprocess.run(
            [self.program],
            input="".join(json.dumps(each, default=str) + "\n" for each in lines),
            capture_output=True,
            text=True,
            env=os.environ | SANITIZERS,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def driver(sanitized: Path) -> Driver:
    return Driver(sanitized / "tests" / "dcompile-driver")


Built = Callable[..., Path]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`compiled(folder, **recipe)` is a bundle of the model in `folder`, of four steps and without figures."""
    from dcompile.compiler.recipe import Recipe
    from dcompile.exporters.build import compile_model
    from dcompile.exporters.settings import Settings

    def build(folder: Path, **recipe: Any) -> Path:
        output = tmp_path_factory.mktemp("compiled") / "bundle"
        chosen = Recipe(**{"steps": 4, "calibration_samples": 2, "eval_samples": 0, **recipe})
        return compile_model(str(folder), output, chosen, Settings(threads=1, evaluate=False)).bundle

    return build
