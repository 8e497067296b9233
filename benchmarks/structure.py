"""Half the blocks, experts, and all of it with a cache and INT8: what is left of the glyph DiT after recovery.

    python benchmarks/structure.py [--cases depth,experts,composed] [--seeds 3] [--steps 600] [--samples 288]

Each row is a whole build for ONNX Runtime beside the uncompressed bundle: accuracy, Fréchet distance, speed of 16
samples. Every way of choosing blocks gets the same recovery. Rows are kept in benchmarks/results/structure.csv as they
come, and those that are there are not measured again (--again does).
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dcompile
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime.errors import DcompileError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
TABLE = RESULTS / "structure.csv"
FIELDS = (
    "case", "passes", "seed", "accuracy", "accuracy_before", "frechet", "frechet_before", "psnr", "speedup",
    "latency_s", "parameters_ratio", "flops_ratio", "training_s", "samples",
)  # fmt: skip
DEPTH = {
    "tinyfusion": "prune:method=tinyfusion,keep=1,of=2,steps={search},seed={seed}",
    "greedy": "prune:method=greedy,count=6",
    "influence": "prune:method=influence,count=6",
    "magnitude": "prune:method=magnitude,count=6",
}
RECOVERY = "recover:steps={steps},rate=5e-4,seed={seed}"


def cases(chosen: list[str], seeds: int, steps: int) -> Iterator[tuple[str, int, str]]:
    """(name, seed, passes)"""
    for seed in range(seeds):
        values = {"steps": steps, "search": steps // 2, "seed": seed}
        recovery = RECOVERY.format(**values)
        if "depth" in chosen:
            for name, prune in DEPTH.items():
                yield f"half depth, {name}", seed, f"{prune.format(**values)},{recovery}"
            if seed == 0:
                yield "half depth, greedy, not recovered", seed, DEPTH["greedy"]
        if "experts" in chosen:
            yield "experts 12, 2 active", seed, f"moe:experts=12,active=2,{recovery}"
            if seed == 0:
                yield "experts 12, 2 active, not recovered", seed, "moe:experts=12,active=2"
        if "composed" in chosen and seed == 0:
            passes = f"{DEPTH['greedy']},{recovery},cache:interval=4,quant,fold"
            yield "half depth, cache, int8", seed, passes


def measure(case: str, seed: int, passes: str, samples: int, threads: int) -> dict[str, Any]:
    recipe = dcompile.Recipe(passes=(passes,), eval_samples=samples, judge=ROOT / "examples/glyphs")
    settings = Settings(cache=default_cache(), threads=threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = dcompile.compile(str(ROOT / "examples/glyphs/model"), Path(folder) / "b", recipe, settings).report
    rows = {row["metric"]: row for row in report["table"]}
    trained = [stage for stage in report["passes"] if "loss" in stage["details"]]
    print(f"{case}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "case": case,
        "passes": passes,
        "seed": seed,
        **{name: rows[name]["after"] for name in ("accuracy", "frechet", "psnr")},
        **{f"{name}_before": rows[name]["before"] for name in ("accuracy", "frechet")},
        "speedup": rows["latency_s"]["before"] / rows["latency_s"]["after"],
        "latency_s": rows["latency_s"]["after"],
        "parameters_ratio": rows["parameters"]["before"] / rows["parameters"]["after"],
        "flops_ratio": rows["flops"]["before"] / rows["flops"]["after"],
        "training_s": sum(stage["seconds"] for stage in trained),
        "samples": samples,
    }


def read() -> list[dict[str, Any]]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as stream:
        table = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: (row["case"], int(row["seed"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="depth,experts,composed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=288)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    rows = read()
    for case, seed, passes in cases(given.cases.split(","), given.seeds, given.steps):
        known = [row for row in rows if (row["passes"], int(row["seed"])) == (passes, seed)]
        if known and not given.again:
            continue
        try:
            row = measure(case, seed, passes, given.samples, given.threads)
        except DcompileError as error:
            print(f"{case}: {error}", file=sys.stderr, flush=True)
            continue
        rows = [each for each in rows if each not in known] + [row]
        write(rows)
        print(
            f"{case}, seed {seed}: accuracy {row['accuracy']:.3f}, Fréchet {row['frechet']:.2f} (before "
            f"{row['frechet_before']:.2f}), {row['speedup']:.2f}x, trained {row['training_s']:.0f} s", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
