"""Every target that runs here, uncompressed, in INT8, and with the whole recipe; and other tools in the same run.

    python benchmarks/targets.py [--only glyphs] [--threads 2] [--repeats 3] [--samples 360]

The glyph DiT (batch 16, 30 steps, with its judge) and a model of DiT-B/2's size (random weights, batch 1, 20 steps).
Requests are interleaved in one process, latencies are medians; memory is the resident memory (PSS) of a fresh process
after a request. Writes benchmarks/results/targets.json. Bundles are kept in build/targets, so that a second run only
measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers

import dcompile
from dcompile.compiler.quality import Judge, load_judge
from dcompile.exporters.bench import machine, measure_fresh
from dcompile.exporters.bundle import is_whole
from dcompile.exporters.evaluate import eval_labels, sample
from dcompile.exporters.settings import Settings, default_cache
from dcompile.exporters.targets import TARGETS
from dcompile.runtime.manifest import read

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BUNDLES = Path(__file__).resolve().parent / "results", ROOT / "build" / "targets"


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    recipes: dict[str, str]  # what the table calls it -> --passes
    given: dict[str, Any]  # the rest of the recipe
    judge: Path | None


CASES = {
    "glyphs": Case(
        model=str(ROOT / "examples/glyphs/model"),
        batch=16,
        recipes={"": "", "int8": "quant", "cache + int8": "prune:count=2,cache:interval=4,quant,fold"},
        given={},
        judge=ROOT / "examples/glyphs",
    ),
    "dit_b2": Case(
        model="dit_b2:network",
        batch=1,
        recipes={"": "", "int8": "quant", "cache + int8": "cache:interval=5,quant,fold"},
        given={"sampler": "ddim", "steps": 20, "guidance": 4.0, "calibration_samples": 1},
        judge=None,
    ),
}


def compile_all(name: str, case: Case, threads: int) -> dict[str, Path]:
    """Bundles by '<target> <recipe>', made where they are not there already."""
    bundles = {}
    for target in TARGETS.values():
        if target.cannot_run():
            continue
        for title, passes in case.recipes.items():
            folder = BUNDLES / f"{name}-{target.name}-{title.replace(' + ', '-') or 'uncompressed'}"
            bundles[f"{target.name} {title}".strip()] = folder
            if is_whole(folder):
                continue
            print(f"compiling {folder.name}", file=sys.stderr, flush=True)
            recipe = dcompile.Recipe(target=target.name, passes=(passes,) if passes else (), **case.given)
            settings = Settings(cache=default_cache(), threads=threads, evaluate=False, force=True)
            dcompile.compile(case.model, folder, recipe, settings)
    return bundles


def measure(name: str, case: Case, threads: int, repeats: int, samples: int) -> dict[str, Any]:
    bundles = compile_all(name, case, threads)
    model = peers.load_model(name)
    sessions = {title: dcompile.load(folder, verify=False, threads=threads) for title, folder in bundles.items()}
    labels = [i % model.classes for i in range(case.batch)]
    calls: dict[str, Callable[[], object]] = {
        title: partial(session.generate, labels=labels, seed=0) for title, session in sessions.items()
    }
    for peer in peers.PEERS:
        own = peers.load_model(name)  # bfloat16 changes a network in place
        network = peers.prepare(peer, own, case.batch, threads)
        calls[peer] = partial(peers.request, own, network, case.batch)
    seconds: dict[str, list[float]] = {title: [] for title in calls}
    for turn in range(repeats + 1):  # turn 0 warms up
        for title, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                seconds[title].append(time.perf_counter() - started)
            print(f"{name} turn {turn} {title}: {time.perf_counter() - started:.3f} s", file=sys.stderr, flush=True)
    for session in sessions.values():
        session.close()
    rows: dict[str, Any] = {
        title: {"latency_s": median(spent), "latencies_s": spent, "ours": title in bundles}
        for title, spent in seconds.items()
    }
    for title, folder in bundles.items():
        fresh = measure_fresh(folder, batch=case.batch, threads=threads)
        rows[title] |= {"bytes": fresh["bundle_bytes"], "pss_bytes": fresh["pss_bytes"]}
        rows[title] |= {"precision": read_precision(folder), "layout_calls": calls_a_step(folder)}
    for peer in peers.PEERS:
        rows[peer]["pss_bytes"] = peer_memory(name, peer, case.batch, threads)
    if case.judge and samples:
        judge = load_judge(case.judge, threads)
        for title, folder in bundles.items():
            rows[title] |= judged(folder, judge, samples, threads)
    best_peer = min(peers.PEERS, key=lambda peer: rows[peer]["latency_s"])
    best = min(bundles, key=lambda title: rows[title]["latency_s"])
    return {
        "machine": machine(),
        "threads": threads,
        "batch": case.batch,
        "steps": model.steps,
        "samples": samples if case.judge else 0,
        "passes": case.recipes["cache + int8"],
        "rows": rows,
        "best": best,
        "best_peer": best_peer,
        "speedup_over_best_peer": rows[best_peer]["latency_s"] / rows[best]["latency_s"],
    }


def read_precision(folder: Path) -> str:
    precision: str = json.loads((folder / "report.json").read_text())["precision"]
    return precision


def calls_a_step(folder: Path) -> float:
    manifest = read(folder)
    return len(manifest.script) / manifest.contract.steps


def peer_memory(name: str, peer: str, batch: int, threads: int) -> int | None:
    command = [sys.executable, str(Path(peers.__file__)), name, peer, "--batch", str(batch), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["pss_bytes"])


def judged(folder: Path, judge: Judge, count: int, threads: int) -> dict[str, float]:
    """Class accuracy of the bundle's samples, and their Fréchet distance to real data where the judge can tell."""
    from dcompile.compiler.quality import measure_quality

    print(f"sampling {folder.name}", file=sys.stderr, flush=True)
    contract = read(folder).contract
    found = sample(folder, count, threads, lambda fraction: None)
    labels = eval_labels(contract, count)
    figures = measure_quality(found, found, labels=labels, judge=judge, value_range=contract.value_range)
    return {name: figures[name] for name in ("accuracy", "frechet") if np.isfinite(figures.get(name, np.nan))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--only", choices=tuple(CASES))
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "targets.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, case in CASES.items():
        if given.only in (None, name):
            results[name] = measure(name, case, given.threads, given.repeats, given.samples)
            path.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps(results[name], indent=2))


if __name__ == "__main__":
    main()
