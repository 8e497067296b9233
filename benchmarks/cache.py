"""Every cache method on both example models at three budgets: speed of the artifact, and what it costs.

    python benchmarks/cache.py [--models glyphs] [--methods fora,bac] [--budgets 1] [--samples 144] [--threads 2]

Each row is a whole build for ONNX Runtime in fp32 without any other pass, compared with the uncompressed bundle by the
same seeds: latency of 16 samples, interleaved. Rows are kept in benchmarks/results/cache.csv as they come, and those
that are there are not measured again (--again does). Draws benchmarks/results/cache.png: speed against PSNR, Fréchet.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from rows import RESULTS, Row, build, fill, quality_and_speed

from dcompile.passes.caching.methods import METHODS

TABLE, PLOT = RESULTS / "cache.csv", RESULTS / "cache.png"
MODELS = ("glyphs", "glyphs_unet")
FIELDS = (
    "model", "method", "options", "computed_steps", "latency_s", "speedup", "psnr", "ssim", "accuracy", "frechet",
    "accuracy_before", "frechet_before", "samples", "flops_ratio",
)  # fmt: skip
# From careful to bold, where intervals of 2, 3 and 5 are not the method's own measure.
BUDGETS: dict[str, tuple[str, ...]] = {
    "deepcache_nonuniform": ("budget=15", "budget=10", "budget=6"),
    "profilingdit": ("interval=2", "interval=4", "interval=6"),
    "ertacache": ("threshold=0.05", "threshold=0.1", "threshold=0.2"),
    "teacache": ("threshold=0.1", "threshold=0.2", "threshold=0.4"),
    "fbcache": ("threshold=0.08,last=1", "threshold=0.1,last=1", "threshold=0.2,last=1"),
    "dbcache": tuple(f"front=2,warmup=3,threshold={threshold},last=1" for threshold in (0.08, 0.12, 0.2)),
    "tdc": ("threshold=0.15", "threshold=0.2", "threshold=0.4"),
    "learning_to_cache": ("share=0.75", "share=0.65", "share=0.55"),
    "edit": ("share=0.8", "share=0.7", "share=0.6"),
}
INTERVALS = ("interval=2", "interval=3", "interval=5")
U_NETS_ONLY = ("deepcache", "deepcache_nonuniform", "faster_diffusion", "cachequant")
DITS_ONLY = (
    "delta_dit", "profilingdit", "ddt", "bac", "qandc", "teacache", "fbcache", "dbcache", "tdc", "lesa",
    "learning_to_cache", "harmonica", "ecad", "edit", "disca",
)  # fmt: skip


def cases(models: list[str], methods: list[str], budgets: int) -> list[Row]:
    """The boldest first of each method would mislead least alone: so the middle one, then the others."""
    order = (1, 2, 0)[:budgets]
    return [
        {"model": model, "method": method, "options": BUDGETS.get(method, INTERVALS)[place]}
        for place in order
        for model in models
        for method in methods
        if method not in (DITS_ONLY if model == "glyphs_unet" else U_NETS_ONLY)
    ]


def measure(case: Row, samples: int, threads: int) -> Row:
    report = build(case["model"], f"cache:method={case['method']},{case['options']}", samples, threads)
    steps = report["passes"][0]["details"]["computed_steps"]
    return {"computed_steps": len(steps), "samples": samples, **quality_and_speed(report)}


def draw(rows: list[dict[str, Any]]) -> None:
    """Speed against PSNR and Fréchet distance, a row of panels a model; a line joins the budgets of a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = sorted({row["model"] for row in rows})
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    figure = Figure(figsize=(13, 4.8 * len(models)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), 2, squeeze=False)
    for model, (left, right) in zip(models, panels, strict=True):
        own = [row for row in rows if row["model"] == model]
        for number, method in enumerate(methods):
            points = sorted((float(r["speedup"]), i, r) for i, r in enumerate(own) if r["method"] == method)
            style = {"color": f"C{number % 10}", "marker": "osD^vP*X"[number % 8], "label": method, "markersize": 6}
            for axes, metric in ((left, "psnr"), (right, "frechet")):
                if points:
                    axes.plot([p[0] for p in points], [float(p[2][metric]) for p in points], linewidth=0.8, **style)
        best = [max(float(r["psnr"]) for r in own if float(r["speedup"]) >= float(one["speedup"])) for one in own]
        front = sorted(zip((float(row["speedup"]) for row in own), best, strict=True))
        left.step(*zip(*front, strict=True), where="pre", color="0.6", linewidth=3, alpha=0.5, zorder=0, label="best")
        right.axhline(float(own[0]["frechet_before"]), color="0.5", linestyle=":", label="uncompressed")
        for axes, what in ((left, "PSNR to the uncompressed model, dB"), (right, "Fréchet distance to real data")):
            axes.set_xlabel("times faster, ONNX Runtime")
            axes.set_ylabel(what)
            axes.set_title(model)
            axes.grid(alpha=0.3)
        left.legend(fontsize=7, ncols=2)
    figure.savefig(PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budgets", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--samples", type=int, default=144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    chosen = cases(given.models.split(","), given.methods.split(","), given.budgets)
    rows = fill(
        TABLE, FIELDS, chosen, partial(measure, samples=given.samples, threads=given.threads), again=given.again
    )
    draw(rows)


if __name__ == "__main__":
    main()
