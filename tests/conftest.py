"""What every test gets: fixed seeds, no network, and markers that skip with a reason."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:  # a test of the runtime must not pay for the import of torch
    from dcompile.compiler.calibrate import Calibration
    from dcompile.compiler.program import Program

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports diffusers, which reads it once

# The same examples in every run, and no limit on a single one: the machine may be busy.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts anew; review them as a diff")


def why_skip(item: pytest.Item) -> str | None:
    """None if this machine can run the test."""
    wants_trt = item.get_closest_marker("trt") is not None
    if wants_trt and not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        return "needs tensorrt or tensorrt-rtx, which are not installed"
    if wants_trt:
        from dcompile.runtime.cuda import why_no_gpu  # its engines need no torch, and torch may be built without CUDA

        if why := why_no_gpu():
            return f"needs a CUDA device: {why}"
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device, and torch sees none"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := why_skip(item):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # a test of the runtime must not pay for its import
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def connect_here_only(self: socket.socket, address: tuple[str, int] | str) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here_only)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("prune/one_block", text)` compares with tests/golden/prune/one_block.txt; --update-golden writes it."""

    def compare(case: str, text: str) -> None:
        path = GOLDEN / f"{case}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest --update-golden and review it"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: DiT with ten classes, flow matching."""
    import models

    return models.save(models.dit(), tmp_path_factory.mktemp("dit"), models.SCHEDULERS["flow"])


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: UNet2D whose contract says that the last of its eleven labels means none."""
    import models

    folder = tmp_path_factory.mktemp("unet")
    return models.save(models.unet2d(), folder, models.SCHEDULERS["flow"], contract__yaml=models.UNET_CONTRACT)


@pytest.fixture(scope="session")
def dit(dit_folder: Path) -> Program:
    """Six steps of flow matching under guidance: one batch of both halves."""
    from dcompile.compiler.ingest import Source, ingest

    return ingest(Source(str(dit_folder), steps=6, guidance=2.0))


@pytest.fixture(scope="session")
def unet(unet_folder: Path) -> Program:
    """Six steps of flow matching under guidance by the label that means none."""
    from dcompile.compiler.ingest import Source, ingest

    return ingest(Source(str(unet_folder), steps=6, guidance=1.5))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The smallest: no diffusers class, no condition, three blocks; six steps of flow matching."""
    import models

    from dcompile.compiler.ingest import Source, ingest

    contract = tmp_path_factory.mktemp("tokens") / "contract.yaml"
    contract.write_text(models.TOKENS_CONTRACT)
    return ingest(Source("models:tokens", contract=contract, sampler="flow_euler", steps=6))


@pytest.fixture(scope="session")
def program_of() -> Callable[[str], Program]:
    """Any of models.ARCHITECTURES as a program of four steps; each is ingested once."""
    import models

    from dcompile.compiler.ingest import Source, ingest

    @cache
    def make(name: str) -> Program:
        architecture = models.ARCHITECTURES[name]
        return ingest(Source(architecture.spec, shape=architecture.shape, sampler=architecture.sampler, steps=4))

    return make


@pytest.fixture(scope="session")
def calibration_of() -> Callable[[Program], Calibration]:
    """Two samples of the program's own trajectory, run once; valid for what passes make of it too."""
    from dcompile.compiler.calibrate import calibrate

    made: dict[int, tuple[Program, Calibration]] = {}  # the program too: an id may be given again

    def make(program: Program) -> Calibration:
        if id(program) not in made:
            made[id(program)] = program, calibrate(program, 2)
        return made[id(program)][1]

    return make


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of everything: DiT, pruned, cached, quantised and folded, with its report. Beside it: model, cache."""
    import models

    from dcompile.compiler.recipe import Recipe
    from dcompile.exporters.build import compile_model
    from dcompile.exporters.settings import Settings

    folder = tmp_path_factory.mktemp("built")
    labels = json.dumps([f"class {number}" for number in range(10)])
    models.save(models.dit(), folder / "model", models.SCHEDULERS["flow"], labels__json=labels)
    recipe = Recipe(
        passes=("prune:count=1,cache:interval=2,warmup=1,quant:max_error=1,fold",),
        steps=4,
        guidance=2.0,
        calibration_samples=2,
        eval_samples=4,
    )
    settings = Settings(cache=folder / "cache", threads=1)
    return compile_model(str(folder / "model"), folder / "bundle", recipe, settings).bundle


@pytest.fixture(scope="session")
def glyphs_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model, cached and folded, in float32: 30 steps of two engines. Tests that write to it take a copy."""
    from dcompile.compiler.recipe import Recipe
    from dcompile.exporters.build import compile_model
    from dcompile.exporters.settings import Settings

    model = Path(__file__).parents[1] / "examples" / "glyphs" / "model"
    recipe = Recipe(passes=("cache:interval=4,fold",), calibration_samples=2)
    settings = Settings(evaluate=False, threads=1)
    return compile_model(str(model), tmp_path_factory.mktemp("glyphs") / "bundle", recipe, settings).bundle


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("run", path)` is `dcompile run PATH` in this process; what is no error of the user's is raised."""
    from dcompile import cli

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(each) for each in arguments]
        monkeypatch.setattr(sys, "argv", ["dcompile", *words])
        monkeypatch.setattr(cli.out, "width", 200)
        capsys.readouterr()
        try:
            cli.main()
            code: object = 0
        except SystemExit as exit:
            code = exit.code
        written = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(str(code or 0)), written.out, written.err)

    return run
