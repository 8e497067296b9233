"""Samplers that remember, and samplers that draw noise: the bundle gives what the program gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import TOKENS_CONTRACT

from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision
from dcompile.exporters.export import export
from dcompile.exporters.settings import Settings
from dcompile.exporters.target import TargetOptions
from dcompile.exporters.targets import find_target
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime import load


@pytest.mark.parametrize(
    ("sampler", "states", "stochastic"),
    [("flow_dpm++2m", {"history"}, False), ("flow_lcm", set(), True), ("flow_unipc", {"history"}, False)],
)
def test_rings_and_noise_survive_the_way_into_a_bundle(
    sampler: str, states: set[str], stochastic: bool, tmp_path: Path
) -> None:
    (tmp_path / "contract.yaml").write_text(TOKENS_CONTRACT)
    source = Source("models:tokens", contract=tmp_path / "contract.yaml", sampler=sampler, steps=5)
    program = CacheSteps(interval=3, warmup=1, predictor="copy").apply(ingest(source), Decision()).program
    export(
        program, find_target("onnx"), TargetOptions(threads=1), "auto", {"passes": []}, tmp_path / "bundle", Settings()
    )
    seeds = [5, 6, 7]
    expected = run(program, {}, seeds).numpy()
    with load(tmp_path / "bundle", threads=1) as session:
        assert set(session.manifest.states) == {*states, "blocks_1_2.state0"}
        assert session.manifest.contract.stochastic == stochastic
        found = session.generate(seed=seeds)
        again = session.generate(seed=seeds)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found, again)  # no state of a request is left for the next
