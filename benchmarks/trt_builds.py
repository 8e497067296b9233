"""Real TensorRT-RTX engines of the glyph DiT and a DiT-B/2-sized model, built here without a GPU, in every format.

    python benchmarks/trt_builds.py [--only glyphs] [--formats int8,nvfp4] [--layouts variants]

Each build is a fresh process: cache (every fourth step computed), the format, fold. Written to
benchmarks/results/trt_builds.json: seconds to export and build the engines, and in all, peak memory, bytes of engines,
how often each kernel was compiled and in which type, and how far the ONNX that TensorRT was given is from the program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"glyphs": str(ROOT / "examples/glyphs/model"), "dit_b2": "dit_b2:network"}
FORMATS = {"fp16": "", "int8": "quant,", "fp8": "quant:format=fp8,", "nvfp4": "quant:format=nvfp4,"}
STEPS = 12


def build_here(model: str, name: str, layout: str, output: str, threads: int) -> None:
    """Run in a fresh process: compile, and print what it took."""
    import dcompile
    from dcompile.exporters.settings import Settings, Silent

    torch.set_num_threads(threads)
    stages: list[tuple[str, float]] = []

    class Clock(Silent):
        def stage(self, title: str) -> None:
            stages.append((title, time.perf_counter()))

    passes = f"cache:interval=4,{FORMATS[name]}fold"
    more: dict[str, Any] = {} if model == "glyphs" else {"sampler": "ddim", "guidance": 4.0}
    given = {"layout": layout, "passes": (passes,), "steps": STEPS, "calibration_samples": 1, **more}
    recipe = dcompile.Recipe.model_validate({"target": "trt", **given})
    built = dcompile.compile(MODELS[model], output, recipe, Settings(threads=threads, evaluate=False, listener=Clock()))
    stages.append(("", time.perf_counter()))
    seconds = {title: after[1] - at for (title, at), after in itertools.pairwise(stages)}
    kernels: Counter[str] = Counter()
    for counts in built.report["operators"].values():
        kernels.update(counts)
    found = {
        "seconds": sum(seconds.values()),
        "export_seconds": next(value for title, value in seconds.items() if title.startswith("exporting")),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engines": {path.stem: path.stat().st_size for path in sorted(Path(output).rglob("*.engine"))},
        "kernels": dict(sorted(kernels.items())),
        "parity": {each["engine"]: each["relative_error"] for each in built.report["parity"]},
        "not_executed": built.report["not_executed"],
    }
    print(json.dumps(found))


def build_apart(model: str, name: str, layout: str, threads: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--build", f"{Path(folder)}/bundle", "--threads", str(threads)]
        command += ["--only", model, "--formats", name, "--layouts", layout]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise SystemExit(f"{model} in {name}, {layout}, failed:\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=tuple(MODELS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--layouts", default="variants,segments")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--build", metavar="OUTPUT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        build_here(given.only, given.formats, given.layouts, given.build, given.threads)
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "trt_builds.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for model in MODELS:
        for name, layout in itertools.product(given.formats.split(","), given.layouts.split(",")):
            if given.only in (None, model):
                found = build_apart(model, name, layout, given.threads)
                results.setdefault(model, {})[f"{name}, {layout}"] = found
                path.write_text(json.dumps(results, indent=2) + "\n")
                print(model, name, layout, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
