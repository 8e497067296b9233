"""Taylor orders lowered for the noise of INT8, against orders as asked and what is best at a single step.

    python benchmarks/noise_aware.py [--interval 2 4] [--samples 32] [--calibration 4]

The glyph DiT, every branch extrapolated (`cache:method=taylorseer`), then `quant`: PSNR to the uncompressed model, same
seeds, in PyTorch. Results go to benchmarks/results/noise_aware.json, by interval.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dcompile.compiler.calibrate import Calibration, calibrate, compare_samples, example_conditions
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.quantize import Quantize

MODEL = Path(__file__).resolve().parent.parent / "examples" / "glyphs" / "model"
RESULT = Path(__file__).resolve().parent / "results" / "noise_aware.json"


def single_step(decision: Decision) -> Decision:
    """The decision with the order of each site that has the smallest error at a step."""
    noise = {site: {"order": int(np.argmin(told["errors"]))} for site, told in decision.choices["noise"].items()}
    return Decision({**decision.choices, "noise": noise})


def measure(program: Program, interval: int, samples: int, calibration: Calibration) -> dict[str, Any]:
    quantize = Quantize()
    copies, first, second = (
        CacheSteps(method="taylorseer", interval=interval, predictor=predictor)
        for predictor in ("copy", "taylor1", "taylor2")
    )
    ahead = replace(calibration, following=(quantize,))
    lowered = {step: step.decide(program, ahead) for step in (first, second)}
    cases: Mapping[str, tuple[CacheSteps, Decision]] = {
        "no cache": (CacheSteps(interval=1), Decision()),
        "copy": (copies, Decision()),
        "taylor1": (first, Decision()),
        "taylor1, noise-aware": (first, lowered[first]),
        "taylor2": (second, Decision()),
        "taylor2, noise-aware": (second, lowered[second]),
        "best at a single step": (second, single_step(lowered[second])),
    }
    conditions, seeds = example_conditions(program.contract, samples), list(range(samples))
    expected = run(program, conditions, seeds).numpy()
    found: dict[str, Any] = {}
    for name, (cache, decision) in cases.items():
        made = cache.apply(program, decision).program
        orders = Counter(site.states - 1 for site in made.plan.sites)
        made = quantize.apply(made, quantize.decide(made, calibration)).program
        error = compare_samples(run(made, conditions, seeds).numpy(), expected, program.contract)
        found[name] = {**error, "sites_by_order": {str(order): orders[order] for order in sorted(orders)}}
        print(interval, name, f"{error['psnr']:.2f} dB", found[name]["sites_by_order"], flush=True)
    return {"samples": samples, "cases": found, "sites": lowered[second].choices["noise"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--interval", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration", type=int, default=4)
    given = parser.parse_args()
    program = ingest(Source(str(MODEL)))
    calibration = calibrate(program, given.calibration)
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for interval in given.interval:
        results[str(interval)] = measure(program, interval, given.samples, calibration)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
