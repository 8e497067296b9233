"""Segments against variants on the DiT-B/2-sized model in fp32: latency, bytes, resident memory, calls a step.

    python benchmarks/layouts.py [--threads 2] [--batch 1] [--repeats 5] [--plans range branch types]

Three plans of 20 steps: "range" (blocks 1 to 11 extrapolated from every fifth step), "branch" (each attention and
feed-forward copied from every third), "types" (attention every second, feed-forward every third: no two neighbours
agree, which is the most calls that segments can take). Both layouts run on ONNX Runtime; their requests are
interleaved, and the least of the repeats counts, for other work only adds to it. Memory is that of a fresh process
which has loaded every engine and answered a request. Writes benchmarks/results/layouts.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.plan import Plan, every, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.exporters.bench import machine, measure_fresh
from dcompile.exporters.bundle import write_bundle
from dcompile.exporters.lower import Layout, choose_layout, lower
from dcompile.exporters.target import TargetOptions
from dcompile.exporters.targets import find_target
from dcompile.passes.cache_steps import CacheSteps
from dcompile.runtime import Session, load

RESULTS = Path(__file__).resolve().parent / "results"
STEPS, GUIDANCE = 20, 4.0
LAYOUTS: tuple[Layout, Layout] = ("variants", "segments")


def in_range(program: Program) -> Program:
    return CacheSteps(interval=5).apply(program, Decision()).program


def in_branches(program: Program) -> Program:
    return CacheSteps(interval=3, site="branch", predictor="copy").apply(program, Decision()).program


def by_type(program: Program) -> Program:
    cached = CacheSteps(site="branch", predictor="copy").apply(program, Decision()).program
    sites = []
    for site in cached.plan.sites:
        computed = every(3 if site.name.endswith("ff") else 2, program.steps)
        reuse, refresh = taylor(computed, 0)
        sites.append(replace(site, computed=computed, reuse=reuse, refresh=refresh))
    return replace(cached, plan=Plan(program.steps, tuple(sites)))


PLANS: dict[str, Callable[[Program], Program]] = {"range": in_range, "branch": in_branches, "types": by_type}


def measure_plan(program: Program, folder: Path, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    target = find_target("onnx")
    bundles = {}
    for layout in LAYOUTS:
        bundles[layout] = folder / layout
        bundles[layout].mkdir(parents=True)
        lowered = lower(program, layout)
        written = target.write(lowered, bundles[layout], TargetOptions(threads=threads), lambda name: None)
        write_bundle(program, lowered, written, target.name, {"passes": []}, bundles[layout])
    fresh = {layout: measure_fresh(path, batch=batch, threads=threads) for layout, path in bundles.items()}
    with ExitStack() as stack:
        sessions = {n: stack.enter_context(load(path, verify=False, threads=threads)) for n, path in bundles.items()}
        samples = {layout: request(session, batch)[0] for layout, session in sessions.items()}  # warms up too
        taken: dict[str, list[tuple[float, float]]] = {layout: [] for layout in LAYOUTS}
        for _ in range(repeats):
            for layout, session in sessions.items():
                taken[layout].append(request(session, batch)[1:])
        timings = {layout: session.last_timing for layout, session in sessions.items()}
    embedded = choose_layout(program, shares_weights=False).figures
    shared = choose_layout(program, shares_weights=True)
    found: dict[str, Any] = {
        "kinds_of_steps": len(program.plan.masks), "auto_onnx": shared.reason,
        "max_abs_difference": float(np.abs(samples["variants"] - samples["segments"]).max()),
    }  # fmt: skip
    for layout in LAYOUTS:
        timing = timings[layout]
        assert timing is not None
        wall, cpu = (min(each[index] for each in taken[layout]) for index in (0, 1))
        found[layout] = {
            **shared.figures[layout],
            "weight_bytes_if_embedded": embedded[layout]["weight_bytes"],
            "bundle_bytes": fresh[layout]["bundle_bytes"],
            "latency_s": wall, "cpu_s": cpu, "copied_bytes": timing.copied_bytes,
            "overhead_frac": timing.overhead_frac, "load_s": fresh[layout]["load_s"],
            "pss_bytes": fresh[layout]["pss_bytes"], "peak_rss_bytes": fresh[layout]["peak_rss_bytes"],
        }  # fmt: skip
    return found


def request(session: Session, batch: int) -> tuple[np.ndarray, float, float]:
    """(samples, wall seconds, processor seconds of all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    samples = session.generate(labels=list(range(batch)), seed=0)
    return samples, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--output", type=Path, default=RESULTS / "layouts.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    program = ingest(Source("dit_b2:network", sampler="ddim", steps=STEPS, guidance=GUIDANCE))
    found: dict[str, Any] = {
        "steps": STEPS, "guidance": GUIDANCE, "batch": given.batch, "repeats": given.repeats,
        "machine": {**machine(), "threads": given.threads}, "plans": {},
    }  # fmt: skip
    for name in given.plans:
        with tempfile.TemporaryDirectory() as folder:
            planned = PLANS[name](program)
            found["plans"][name] = measure_plan(planned, Path(folder), given.batch, given.threads, given.repeats)
    given.output.parent.mkdir(exist_ok=True)
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
