"""A cached program over a small network, and its engines: what most tests here look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import models
import pytest

from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.bundle import write_bundle
from dcompile.exporters.lower import Lowered, lower
from dcompile.exporters.onnx.target import export_engines
from dcompile.exporters.target import Written
from dcompile.passes.cache_steps import CacheSteps

FILES = {"full": "engines/full.onnx", "reuse": "engines/reuse.onnx"}


@pytest.fixture(scope="session")
def tokens_contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "contract.yaml"
    path.write_text(models.TOKENS_CONTRACT)
    return path


@pytest.fixture(scope="session")
def tokens(tokens_contract: Path) -> Program:
    """Residual blocks over [B, 6, 4], four steps of flow matching."""
    return ingest(Source("models:tokens", contract=tokens_contract, sampler="flow_euler", steps=4))


@pytest.fixture(scope="session")
def cached(tokens: Program) -> Program:
    """Steps 0 and 3 compute the last two blocks, 1 and 2 extrapolate them."""
    return CacheSteps(interval=3, warmup=1).apply(tokens, Decision()).program


@pytest.fixture(scope="session")
def lowered(cached: Program) -> Lowered:
    return lower(cached)


@pytest.fixture(scope="session")
def exported(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the engines of `lowered`; tests that write to it take a copy."""
    folder = tmp_path_factory.mktemp("exported")
    assert export_engines(lowered, folder) == FILES
    return folder


@pytest.fixture(scope="session")
def tokens_bundle(cached: Program, lowered: Lowered, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole bundle of `exported`, but for a report."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("bundle") / "tokens")
    write_bundle(cached, lowered, Written(FILES, {}, {}), "onnx", {"passes": ["cache"], "name": "grün"}, folder)
    return folder
