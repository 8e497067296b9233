"""Glyph DiT and U-Net, 30 steps, batch 16: speed, size, accuracy and Fréchet distance, compiled against uncompressed.

    python benchmarks/glyphs.py [--samples 1440] [--threads 2]

Writes benchmarks/results/glyphs.json, which the README's table is made from. Both bundles run on ONNX Runtime; requests
are interleaved in one process, figures are medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import dcompile
from dcompile.exporters.bench import bench
from dcompile.exporters.figures import BENCH_BATCH
from dcompile.exporters.settings import Settings, default_cache

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RECIPES = {"glyphs": ROOT / "examples/glyphs/recipe.yaml", "glyphs_unet": ROOT / "examples/glyphs_unet/recipe.yaml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=1440)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(RECIPES))
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "glyphs.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, recipe_file in RECIPES.items():
        if given.only in (None, name):
            results[name] = measure(name, recipe_file, given.samples, given.threads)
            path.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps({name: results[name]}, indent=2))


def measure(name: str, recipe_file: Path, samples: int, threads: int) -> dict[str, object]:
    from dcompile.compiler.recipe import parse_recipe, read_recipe

    given = read_recipe(recipe_file).model_dump(exclude_none=True, exclude_unset=True)
    judge = ROOT / "examples/glyphs"
    recipe = parse_recipe({**given, "eval_samples": samples, "judge": judge, "gate": None}, str(recipe_file))
    settings = Settings(cache=default_cache(), threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        built = dcompile.compile(str(ROOT / "examples" / name / "model"), Path(folder) / name, recipe, settings)
        report = built.report
        one = bench({"compiled": built.bundle}, batch=1, threads=threads, repeats=5)["bundles"]["compiled"]
    return {
        "recipe": report["recipe"]["passes"],
        "machine": report["machine"],
        "batch": BENCH_BATCH,
        "samples": samples,
        "table": report["table"],
        "summary": report["summary"],
        "quality": report["quality"],
        "memory": report["memory"],
        "passes": [{key: stage[key] for key in ("name", "seconds", "changed", "error")} for stage in report["passes"]],
        "latency_batch_1_s": one["latency_s"],
    }


if __name__ == "__main__":
    main()
