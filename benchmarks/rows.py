"""Builds measured one after another, a row of a CSV each: what is there is not measured again."""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dcompile
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime.errors import DcompileError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = Mapping[str, Any]


def build(model: str, passes: str, samples: int, threads: int) -> Row:
    """The report of an example model with these passes, fp32 for ONNX Runtime, judged by the glyphs' judge."""
    recipe = dcompile.Recipe(passes=(passes,), eval_samples=samples, judge=ROOT / "examples/glyphs")
    settings = Settings(cache=default_cache(), threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        return dcompile.compile(str(ROOT / "examples" / model / "model"), Path(folder) / "b", recipe, settings).report


def quality_and_speed(report: Row) -> dict[str, float]:
    """What every table of builds shows: of 16 samples the latency, interleaved with the uncompressed bundle's."""
    rows = {row["metric"]: row for row in report["table"]}
    return {
        "latency_s": rows["latency_s"]["after"],
        "speedup": rows["latency_s"]["before"] / rows["latency_s"]["after"],
        **{name: rows[name]["after"] for name in ("psnr", "ssim", "accuracy", "frechet")},
        "accuracy_before": rows["accuracy"]["before"],
        "frechet_before": rows["frechet"]["before"],
        "flops_ratio": rows["flops"]["before"] / rows["flops"]["after"],
        "parameters_ratio": rows["parameters"]["before"] / rows["parameters"]["after"],
    }


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def fill(
    path: Path, fields: Sequence[str], cases: Iterable[Row], measure: Callable[[Row], Row], *, again: bool = False
) -> list[dict[str, Any]]:
    """The table with a row for each case, measured and written as they come. A case is the first columns of its row."""
    rows = read(path)
    for case in cases:
        known = [row for row in rows if all(row[name] == str(value) for name, value in case.items())]
        if known and not again:
            continue
        try:
            found = measure(case)
        except DcompileError as error:
            print(f"{' '.join(map(str, case.values()))}: {error}", file=sys.stderr, flush=True)
            continue
        row = {name: {**case, **found}[name] for name in fields}
        rows = sorted([each for each in rows if each not in known] + [row], key=lambda row: [*map(str, row.values())])
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, fields, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        figures = f"{row['speedup']:.2f}x, {row['psnr']:.1f} dB, accuracy {row['accuracy']:.3f}"
        print(*case.values(), f"{figures}, Fréchet {row['frechet']:.2f}", flush=True)
    return rows
