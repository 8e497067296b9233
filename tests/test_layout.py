"""The shape of the package: what importing it costs, what it shows, and what its folders hold."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dcompile

ROOT = Path(__file__).parents[1]
FOLDERS = ("compiler", "exporters", "kernels", "passes", "quant", "runtime")
SCRIPTS = ("examples", "benchmarks")
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "diffusers", "pydantic", "typer"}


def run_elsewhere(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that finds only what is installed: -P leaves the current directory out."""
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def modules_after(statement: str, directory: Path) -> tuple[set[str], float]:
    """(top-level modules, seconds) of one statement in a new interpreter."""
    code = (
        f"import sys, time; start = time.perf_counter(); {statement}; seconds = time.perf_counter() - start;"
        "print(seconds, *{name.partition('.')[0] for name in sys.modules})"
    )
    done = run_elsewhere(code, directory)
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stdout.split()
    return set(modules), float(seconds)


def test_importing_dcompile_loads_nothing_heavy(tmp_path: Path) -> None:
    modules, _ = modules_after("import dcompile", tmp_path)
    assert not modules & HEAVY


def test_importing_the_runtime_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    runs = [modules_after("import dcompile.runtime", tmp_path) for _ in range(3)]
    assert not runs[0][0] & {"torch", "onnx", "diffusers", "pydantic", "typer"}
    assert min(seconds for _, seconds in runs) < 0.5  # the best of three: the others may share their core


@pytest.mark.parametrize("name", [*FOLDERS, "cli"])
def test_folders_are_not_importable_bare(name: str, tmp_path: Path) -> None:
    done = run_elsewhere(f"import {name}", tmp_path)
    assert f"No module named '{name}'" in done.stderr


def test_public_names_resolve() -> None:
    assert dir(dcompile) == sorted(dcompile.__all__)
    for name in dcompile.__all__:
        assert getattr(dcompile, name) is not None
    assert callable(dcompile.compile)
    assert callable(dcompile.load)
    assert isinstance(dcompile.Recipe, type)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dcompile' has no attribute 'lode'"):
        dcompile.lode  # type: ignore[attr-defined]  # noqa: B018


def test_every_folder_is_in_the_wheel() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    marked = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    holding = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert holding == marked  # a folder of modules without __init__.py would be left out
    assert set(packages) == {"dcompile"} | {".".join(("dcompile", *folder.parts)) for folder in marked}


def test_every_module_says_what_it_is() -> None:
    paths = [*ROOT.glob("*.py"), *(path for folder in (*FOLDERS, *SCRIPTS) for path in (ROOT / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    assert [str(path.relative_to(ROOT)) for path, tree in trees.items() if not ast.get_docstring(tree)] == []
