"""What is kept between runs: whole entries under the hash of what decides them, and nothing that is damaged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dcompile.compiler import pipeline
from dcompile.compiler.calibrate import calibrate
from dcompile.compiler.errors import StoreError
from dcompile.compiler.pipeline import run_passes
from dcompile.compiler.program import Program
from dcompile.compiler.rewrite import assign, clone, weights
from dcompile.compiler.store import Store, digest, fingerprint
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.quantize import Quantize

VALUES = {"choices": {"removed": ["a"], "ranges": {"x": [-1.5, 2.0]}}, "error": {"psnr": 30.5}}
ARRAYS: dict[str, NDArray[Any]] = {
    "scale": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "codes": np.array([1, -1], np.int8),
}


def test_entry_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "made" / "when needed")
    assert store.get("key") is None
    store.put("key", VALUES, ARRAYS)
    kept = store.get("key")
    assert kept is not None
    values, arrays = kept
    assert values == VALUES
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    store.put("key", {"choices": {}}, {})
    assert store.get("key") == ({"choices": {}}, {})
    assert sorted(path.name for path in store.directory.iterdir()) == ["key.json", "key.safetensors"]  # type: ignore[union-attr]


def test_no_directory_keeps_nothing() -> None:
    store = Store(None)
    store.put("key", VALUES, ARRAYS)
    assert store.get("key") is None


@pytest.mark.parametrize("name", ["key.json", "key.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_damaged_entry_is_no_entry(tmp_path: Path, name: str, damage: str) -> None:
    store = Store(tmp_path)
    store.put("key", VALUES, ARRAYS)
    path = tmp_path / name
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-3], "empty": b"", "other": b"\xff" * len(whole)}[damage])
    assert store.get("key") is None
    store.put("key", VALUES, ARRAYS)  # and it can be written again
    assert store.get("key") is not None


def test_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"results cannot be kept here .*--no-cache"):
        Store(tmp_path / "file" / "below").put("key", VALUES, ARRAYS)


def test_digest() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(), digest(1), digest("1"), digest([1]), digest(1, 2), digest([1, 2])}) == 6


def test_fingerprint_follows_what_decides_the_program(dit: Program) -> None:
    same = fingerprint(dit)
    assert fingerprint(dit) == same
    changed = [replace(dit, contract=replace(dit.contract, guidance=2.5))]
    graph = clone(dit.graph)
    name, weight = next(iter(weights(graph).items()))
    other = weight.detach().clone()
    other.view(-1)[0] += 1e-6
    assign(graph, name, other)
    changed.append(replace(dit, graph=graph))
    changed.append(replace(dit, tables={**dit.tables, "timestep": dit.tables["timestep"] + 1}))
    changed.append(
        replace(dit, graph=PruneLayers(count=1).apply(dit, _removed("net.transformer_blocks.1")).program.graph)
    )
    smaller = clone(dit.graph)
    assign(smaller, name, weight.detach().to(torch.float8_e4m3fn))  # as a quantize pass leaves it
    changed.append(replace(dit, graph=smaller))
    prints = [fingerprint(program) for program in changed]
    assert len({same, *prints}) == 6


def _removed(path: str) -> Any:
    from dcompile.compiler.program import Decision

    return Decision({"removed": [path]})


# ---- resuming -----------------------------------------------------------------------------------------------------

# What the cache pass finds out about a quantize pass after it has tests of its own.
PASSES = (PruneLayers(count=1, method="influence"), CacheSteps(interval=2, noise_aware=False), Quantize())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that measured, and "teacher" where the teacher ran."""
    found: list[str] = []
    for cls in {type(step) for step in PASSES}:
        monkeypatch.setattr(cls, "decide", _noting(cls.decide, found, cls.name))
    monkeypatch.setattr(pipeline, "calibrate", _noting(calibrate, found, "teacher"))
    return found


def _noting(function: Callable[..., Any], found: list[str], name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        found.append(name)
        return function(*arguments)

    return call


def test_second_run_measures_nothing_and_gives_the_same(dit: Program, tmp_path: Path, measured: list[str]) -> None:
    store = Store(tmp_path)
    first, stages = run_passes(dit, PASSES, 1, store)
    assert measured == ["teacher", "prune_layers", "cache_steps", "quantize"]
    assert all(stage.seconds > 0 for stage in stages)
    measured.clear()
    again, kept = run_passes(dit, PASSES, 1, store)
    assert measured == []
    assert str(again.graph.graph) == str(first.graph.graph)
    assert all(torch.equal(weights(again.graph)[name], value) for name, value in weights(first.graph).items())
    assert [replace(stage, seconds=0.0) for stage in stages] == list(kept)
    assert repr(again.plan) == repr(first.plan)


def test_a_killed_run_goes_on_where_it_was(dit: Program, tmp_path: Path, measured: list[str]) -> None:
    store = Store(tmp_path)
    run_passes(dit, PASSES[:2], 1, store)
    measured.clear()
    run_passes(dit, PASSES, 1, store)
    assert measured == ["quantize"]


@pytest.mark.parametrize(
    ("passes", "samples", "expected"),
    [
        ((PruneLayers(count=1, method="greedy"), *PASSES[1:]), 1, ["prune_layers", "cache_steps", "quantize"]),
        ((PASSES[0], CacheSteps(interval=3, noise_aware=False), PASSES[2]), 1, ["cache_steps", "quantize"]),
        (PASSES, 2, ["teacher", "prune_layers", "cache_steps", "quantize"]),
        (PASSES[1:], 1, ["cache_steps", "quantize"]),
    ],
    ids=["an option", "a later option", "samples", "order"],
)
def test_what_decides_a_pass_is_measured_anew(
    passes: tuple[Any, ...], samples: int, expected: list[str], dit: Program, tmp_path: Path, measured: list[str]
) -> None:
    store = Store(tmp_path)
    run_passes(dit, PASSES, 1, store)
    measured.clear()
    run_passes(dit, passes, samples, store)
    assert measured == expected


def test_damaged_entries_are_measured_anew(dit: Program, tmp_path: Path, measured: list[str]) -> None:
    store = Store(tmp_path)
    run_passes(dit, PASSES[:2], 1, store)
    measured.clear()
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-2])
    run_passes(dit, PASSES[:2], 1, store)
    assert measured == ["teacher", "prune_layers", "cache_steps"]
