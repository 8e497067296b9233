"""The page in a real browser: npm packages, a server with bundles, Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Server
from tiny_bundle import tiny

__all__ = ["tiny"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "examples" / "web"


@pytest.fixture(scope="session")
def chromium() -> str:
    for tool, how in (("npm", "Node.js with npm"), ("chromium", "Chromium")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {how}, which is not installed: run tests/web/install.sh")
    return str(shutil.which("chromium"))


@pytest.fixture(scope="session")
def packages(chromium: str) -> None:
    """Installs what the two package-lock.json name, unless it was installed since they changed."""
    for folder in (PAGE, HERE):
        lock, installed = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            subprocess.run(["npm", "ci"], cwd=folder, check=True)


@pytest.fixture(scope="session")
def server(packages: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, str(PAGE / "serve.py"), "--port", "0", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Server(process.stdout.readline().strip(), folder)
        process.terminate()


@pytest.fixture(scope="session")
def chromium_page(chromium: str, packages: None) -> Iterator[Browser]:
    with Browser(chromium) as browser:
        yield browser


@pytest.fixture
def page(chromium_page: Browser, server: Server) -> Iterator[Browser]:
    """A blank page of the server's; what a test lets the page complain about, it takes with `complaints()`."""
    chromium_page.call("goto", f"{server.url}icon.svg")
    chromium_page.complaints()
    yield chromium_page
    assert chromium_page.complaints() == []


@pytest.fixture(scope="session")
def glyphs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example model, cached and folded in fp32: 30 steps of two engines. Its address, relative to the page."""
    from dcompile.compiler.recipe import Recipe
    from dcompile.exporters.build import compile_model
    from dcompile.exporters.settings import Settings

    bundle = tmp_path_factory.mktemp("glyphs") / "bundle"
    recipe = Recipe(passes=("cache:interval=4,fold",))
    compile_model(str(ROOT / "examples/glyphs/model"), bundle, recipe, Settings(evaluate=False))
    return server.put(bundle)
