"""Half the blocks, experts, and all of it with a cache and INT8: what is left of the glyph DiT after recovery.

    python benchmarks/structure.py [--cases depth,experts,steps,composed] [--seeds 3] [--steps 600] [--samples 144]

Each row is a whole build for ONNX Runtime beside the uncompressed bundle: accuracy, Fréchet distance, speed of 16
samples. Every way of choosing blocks gets the same recovery. Rows are kept in benchmarks/results/structure.csv as they
come, and those that are there are not measured again (--again does).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from rows import RESULTS, Row, build, fill, quality_and_speed

TABLE = RESULTS / "structure.csv"
FIELDS = (
    "model", "case", "seed", "passes", "accuracy", "accuracy_before", "frechet", "frechet_before", "psnr", "speedup",
    "latency_s", "parameters_ratio", "flops_ratio", "training_s", "samples",
)  # fmt: skip
DEPTH = {
    "tinyfusion": "prune:method=tinyfusion,keep=1,of=2,steps={search},seed={seed}",
    "greedy": "prune:method=greedy,count=6",
    "influence": "prune:method=influence,count=6",
    "magnitude": "prune:method=magnitude,count=6",
}
EXPERTS = "moe:experts=12,active=2"
RECOVERY = "recover:steps={steps},rate=5e-4,seed={seed}"


def cases(groups: list[str], seeds: int, steps: int) -> Iterator[Row]:
    """What training makes differ is there once a seed, the rest once."""
    for seed in range(seeds):
        values = {"steps": steps, "search": steps // 2, "seed": seed}
        recovery = RECOVERY.format(**values)
        for group, model, case, passes in (
            *(("depth", "glyphs", f"half depth, {name}", f"{DEPTH[name]},{recovery}") for name in DEPTH),
            ("experts", "glyphs", "12 experts, 2 active", f"{EXPERTS},{recovery}"),
        ):
            if group in groups:
                yield {"model": model, "case": case, "seed": seed, "passes": passes.format(**values)}
    recovery = RECOVERY.format(steps=steps, seed=0)
    for group, model, case, passes in (
        ("depth", "glyphs", "half depth, greedy, not recovered", DEPTH["greedy"]),
        ("depth", "glyphs_unet", "3 units out, greedy", "prune:method=greedy,count=3"),
        ("depth", "glyphs_unet", "3 units out, greedy, recovered", f"prune:method=greedy,count=3,{recovery}"),
        ("experts", "glyphs", "12 experts, 2 active, not recovered", EXPERTS),
        ("steps", "glyphs", "10 steps, uniform", "steps:count=10,trials=1"),
        ("steps", "glyphs", "10 steps, chosen", "steps:count=10"),
        *(
            (
                "composed",
                "glyphs",
                f"half depth, cache every {interval}th step, int8",
                f"{DEPTH['greedy']},{recovery},cache:interval={interval},quant,fold",
            )
            for interval in (4, 6)
        ),
    ):
        if group in groups:
            yield {"model": model, "case": case, "seed": 0, "passes": passes}


def measure(case: Row, samples: int, threads: int) -> Row:
    report = build(case["model"], case["passes"], samples, threads)
    trained = sum(stage["seconds"] for stage in report["passes"] if "loss" in stage["details"])
    return {"training_s": trained, "samples": samples, **quality_and_speed(report)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="depth,experts,steps,composed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    chosen = cases(given.cases.split(","), given.seeds, given.steps)
    fill(TABLE, FIELDS, chosen, partial(measure, samples=given.samples, threads=given.threads), again=given.again)


if __name__ == "__main__":
    main()
