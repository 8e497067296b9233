"""Both layouts as ONNX bundles: the same samples, every weight stored once, arrays handed on as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.plan import Plan, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.bundle import write_bundle
from dcompile.exporters.lower import Layout, lower
from dcompile.exporters.onnx.target import TARGET
from dcompile.exporters.parity import FP32_TOLERANCE, check_parity
from dcompile.exporters.target import TargetOptions
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime import load
from dcompile.runtime.engines import Array, Engine, Port
from dcompile.runtime.manifest import Call, Slot, read
from dcompile.runtime.script import Stage, dead_after

LAYOUTS: tuple[Layout, Layout] = ("variants", "segments")


def cached(program: Program, **options: Any) -> Program:
    return CacheSteps(**{"interval": 2, "warmup": 1, **options}).apply(program, Decision()).program


def write(program: Program, layout: Layout, folder: Path) -> Path:
    """A bundle, its engines compared with the program."""
    folder.mkdir()
    lowered = lower(program, layout)
    written = TARGET.write(lowered, folder, TargetOptions(threads=1), lambda name: None)
    told: list[float] = []
    parity = check_parity(program, lowered, written.open, told.append)
    assert {each.engine for each in parity} == set(lowered.engines)
    assert max(each.relative_error for each in parity) <= FP32_TOLERANCE
    assert len(told) == len(lowered.script)
    write_bundle(program, lowered, written, TARGET.name, {"passes": []}, folder)
    return folder


def check(program: Program, folder: Path, segments: Path | None = None) -> None:
    """Both layouts give the program's samples. segments: a bundle of that layout that is there already."""
    bundles = {
        "variants": write(program, "variants", folder / "variants"),
        "segments": segments or write(program, "segments", folder / "segments"),
    }
    conditions = example_conditions(program.contract, 3)
    samples = {}
    for layout, bundle in bundles.items():
        with load(bundle, threads=1) as session:
            samples[layout] = session.generate(conditions=conditions, seed=[0, 1, 2])
            timing = session.last_timing
            assert timing is not None
            assert (timing.steps, timing.copied_bytes) == (program.steps, 0)
            first = session.generate(conditions={name: value[:1] for name, value in conditions.items()}, seed=0)[0]
            np.testing.assert_allclose(first, samples[layout][0], rtol=1e-5, atol=1e-5)
    # Sums may be taken in another order where ONNX Runtime fuses across what is a boundary in the other layout.
    np.testing.assert_allclose(samples["segments"], samples["variants"], rtol=0, atol=1e-5)
    expected = run(program, conditions, [0, 1, 2]).numpy()
    np.testing.assert_allclose(samples["segments"], expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(samples["segments"][0], samples["segments"][1], atol=0.1)
    check_initialisers(bundles["variants"], bundles["segments"])


def check_initialisers(variants: Path, segments: Path) -> None:
    """Summed over the engines of segments they are what the engines of variants hold together, each once."""
    once = dict(initialisers(variants))
    stored = initialisers(segments)
    assert len({name for name, _ in stored}) == len(stored)
    assert {name for name, _ in stored if name.startswith("net.")} == {name for name in once if name.startswith("net.")}
    total = sum(size for _, size in stored)
    assert total == pytest.approx(sum(once.values()), rel=0.01)  # what an exporter folds is folded in other places


def initialisers(bundle: Path) -> list[tuple[str, int]]:
    """(name, bytes) of those that lie in the weights file, once for each engine that has them."""
    found = []
    for spec in read(bundle).engines.values():
        for value in onnx.load(bundle / spec.file, load_external_data=False).graph.initializer:
            found += [(value.name, int(entry.value)) for entry in value.external_data if entry.key == "length"]
    return found


# ---- the same samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["delta", "taylor1"])
def test_residual_blocks(predictor: str, tokens: Program, tmp_path: Path) -> None:
    check(cached(tokens, predictor=predictor), tmp_path)


def test_states_that_every_step_moves_on(tokens: Program, tmp_path: Path) -> None:
    program = cached(tokens, method="lesa", interval=3, states=3)
    (site,) = program.plan.sites
    table = np.array([[1.5, -0.25, -0.25]] * program.steps, np.float32)
    check(replace(program, plan=Plan(program.steps, (replace(site, reuse=table),))), tmp_path)


@pytest.fixture(scope="module")
def scattered(tokens: Program) -> Program:
    """A column of its own for each site, drawn at random."""
    program = cached(tokens, site="branch", predictor="taylor1")
    generator = np.random.default_rng(3)
    sites = []
    for site in program.plan.sites:
        computed = (True, *(bool(each < 0.5) for each in generator.random(program.steps - 1)))
        reuse, refresh = taylor(computed, site.states - 1)
        sites.append(replace(site, computed=computed, reuse=reuse, refresh=refresh))
    return replace(program, plan=Plan(program.steps, tuple(sites)))


@pytest.fixture(scope="module")
def pieces(scattered: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with several calls a step."""
    return write(scattered, "segments", tmp_path_factory.mktemp("pieces") / "bundle")


def test_each_site_with_a_plan_of_its_own(scattered: Program, pieces: Path, tmp_path: Path) -> None:
    check(scattered, tmp_path, pieces)


def test_noise_and_history(tokens_contract: Path, tmp_path: Path) -> None:
    """A sampler that adds noise and keeps earlier outputs."""
    contract = tmp_path / "contract.yaml"
    contract.write_text(tokens_contract.read_text().replace("flow", "epsilon"))
    program = ingest(Source("models:tokens", contract=contract, sampler="dpm++2m_sde", steps=5))
    assert program.contract.stochastic
    assert program.sampler.ring > 1
    check(cached(program, predictor="copy"), tmp_path)


def test_branches_of_a_transformer(dit: Program, tmp_path: Path) -> None:
    check(cached(dit, site="branch", predictor="copy", interval=3), tmp_path)


def test_a_cut_through_a_unet(unet: Program, tmp_path: Path) -> None:
    check(cached(unet, site="cut", predictor="taylor1"), tmp_path)


def test_two_streams(program_of: Callable[[str], Program], tmp_path: Path) -> None:
    check(cached(program_of("sd3"), predictor="delta"), tmp_path)


# ---- what the runtime does with the arrays -------------------------------------------------------------------------


class Watched:
    """An engine of ONNX Runtime, and the very arrays that went in and came out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs: Mapping[str, Port] = engine.inputs
        self.outputs: Mapping[str, Port] = engine.outputs
        self.calls: list[tuple[dict[str, Array], dict[str, Array]]] = []

    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]:
        outputs = self.engine.run(inputs)
        self.calls.append((inputs, outputs))
        return outputs


def test_what_an_engine_gives_is_what_the_next_one_takes(pieces: Path) -> None:
    with load(pieces, threads=1) as session:
        watched = {name: Watched(stage.engine) for name, stage in session._stages.items()}
        session._stages = {name: Stage(session._stages[name].spec, each) for name, each in watched.items()}
        samples = session.generate(seed=[0, 1])
    manifest = read(pieces)
    slots: dict[str, Array] = {}
    done = Counter[str]()
    compared = 0
    for row in manifest.script:
        assert isinstance(row, Call)
        spec = manifest.engines[row.call]
        inputs, outputs = watched[row.call].calls[done[row.call]]
        done[row.call] += 1
        for port, source in spec.inputs.items():
            if isinstance(source, Slot) and source.slot in slots:
                assert inputs[port] is slots[source.slot]
                compared += 1
        slots |= {target.slot: outputs[port] for port, target in spec.outputs.items()}
    assert compared > len(manifest.script)
    assert samples is slots["sample"]


def test_values_between_pieces_are_gone_when_the_step_is(pieces: Path) -> None:
    manifest = read(pieces)
    alive: set[str] = set()
    largest = 0
    for row, gone in zip(manifest.script, dead_after(manifest.script, manifest.engines), strict=True):
        assert isinstance(row, Call)
        written = {target.slot for target in manifest.engines[row.call].outputs.values()}
        alive |= written
        largest = max(largest, len(alive))
        alive -= gone
        if "sample" in written:
            assert {slot for slot in alive if ".state" not in slot} == {"sample"}
    assert alive == {"sample"}  # not even the states are kept
    assert largest > 3
