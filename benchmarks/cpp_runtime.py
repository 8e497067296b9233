"""The C++ runtime beside the Python one: overhead outside engines, cold start, memory, size.

    python benchmarks/cpp_runtime.py [--threads 2] [--rounds 5] [--repeats 5]

The glyph DiT with the whole recipe, on every target that both runtimes run here, batch 1 and 16. Each figure comes from
a fresh process, the two runtimes in turn, and is the median of the rounds. cold_start_s: from the start of the process
to its end, for one sample. overhead_us: outside engines, a step. Writes benchmarks/results/cpp_runtime.json. Needs what
runtime/cpp/install_dependencies.sh installs; the library is built in build/cpp/benchmark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import dcompile
from dcompile.exporters.bench import machine, measure_fresh
from dcompile.exporters.bundle import is_whole
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime.manifest import read

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BUILD = Path(__file__).resolve().parent / "results", ROOT / "build" / "cpp" / "benchmark"
MODEL, PASSES = ROOT / "examples/glyphs/model", "prune:count=2,cache:interval=4,quant,fold"
TARGETS, BATCHES = ("onnx", "openvino"), (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes of each runtime")
    parser.add_argument("--repeats", type=int, default=5, help="requests after the first, in each process")
    given = parser.parse_args()
    command = build_library()
    cases = {}
    for target in TARGETS:
        bundle = compile_bundle(target, given.threads)
        for batch in BATCHES:
            print(f"{target}, batch {batch}", file=sys.stderr, flush=True)
            cases[f"{target} batch {batch}"] = compare(command, bundle, batch, given)
    results = {
        "machine": machine(),
        "threads": given.threads,
        "rounds": given.rounds,
        "passes": PASSES,
        "bytes": sizes(command),
        "cases": cases,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpp_runtime.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def build_library() -> Path:
    """The command dcompile-run of a release build, whose engines are the libraries of the Python packages."""
    onnxruntime, openvino = (folder_of(name) for name in ("onnxruntime", "openvino"))
    definitions = [
        f"OnnxRuntime_LIBRARY={next((onnxruntime / 'capi').glob('libonnxruntime.so.*'))}",
        f"OpenVINO_DIR={openvino / 'cmake'}",
        "DCOMPILE_WITH_ONNXRUNTIME=ON",
        "DCOMPILE_WITH_OPENVINO=ON",
    ]
    configure = ["cmake", "-S", str(ROOT / "runtime/cpp"), "-B", str(BUILD), *(f"-D{each}" for each in definitions)]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD), "-j2"], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "dcompile-run"


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed")
    return Path(spec.origin).parent


def compile_bundle(target: str, threads: int) -> Path:
    bundle = ROOT / "build" / "cpp" / "bundles" / target
    if not is_whole(bundle):
        recipe = dcompile.Recipe(target=target, passes=(PASSES,))
        settings = Settings(cache=default_cache(), threads=threads, evaluate=False, force=True)
        dcompile.compile(str(MODEL), bundle, recipe, settings)
    return bundle


def compare(command: Path, bundle: Path, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of both runtimes by name, and the largest difference of their samples."""
    found: dict[str, list[dict[str, float]]] = {"cpp": [], "python": []}
    for _ in range(given.rounds):
        found["cpp"].append(measure_cpp(command, bundle, batch, given) | {"cold_start_s": cold_start(command, bundle)})
        python = measure_fresh(bundle, batch=batch, threads=given.threads, repeats=given.repeats)
        known = {name: value for name, value in python.items() if value is not None}
        found["python"].append(known | {"cold_start_s": cold_start(None, bundle)})
    steps = read(bundle).contract.steps
    rows: dict[str, Any] = {}
    for runtime, rounds in found.items():
        row = {name: median(each[name] for each in rounds) for name in rounds[0] if name != "bundle_bytes"}
        row["overhead_us"] = 1e6 * row["overhead_frac"] * row["generate_s"] / steps
        rows[runtime] = row
    rows["largest_difference"] = difference(command, bundle, batch, given.threads)
    return rows


def labels_of(bundle: Path, batch: int) -> str:
    (condition,) = read(bundle).contract.conditions
    assert condition.labels is not None
    return ",".join(condition.labels[i % len(condition.labels)] for i in range(batch))


def measure_cpp(command: Path, bundle: Path, batch: int, given: argparse.Namespace) -> dict[str, float]:
    words = [str(command), str(bundle), "--labels", labels_of(bundle, batch), "--measure"]
    words += ["--threads", str(given.threads), "--repeats", str(given.repeats)]
    figures: dict[str, float] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return figures


def cold_start(command: Path | None, bundle: Path) -> float:
    """Seconds of a process that writes one sample; command: of the C++ runtime, None for the Python one."""
    with TemporaryDirectory() as folder:
        words = ["--seed", "0", "-o", f"{folder}/sample.npy"]
        if command:
            whole = [str(command), str(bundle), "--labels", "A", *words]
        else:
            whole = [sys.executable, "-P", "-m", "dcompile.runtime", str(bundle), "--label", "A", *words]
        started = time.perf_counter()
        subprocess.run(whole, check=True, capture_output=True)
        return time.perf_counter() - started


def difference(command: Path, bundle: Path, batch: int, threads: int) -> float:
    labels = labels_of(bundle, batch)
    with TemporaryDirectory() as folder:
        words = ["--labels", labels, "--seed", "7", "--threads", str(threads), "-o", f"{folder}/samples"]
        subprocess.run([str(command), str(bundle), *words], check=True)
        found = np.fromfile(f"{folder}/samples", np.float32)
    with dcompile.load(bundle, threads=threads) as session:
        expected = session.generate(labels=labels.split(","), seed=7)
    return float(np.abs(found - expected.flatten()).max())


def sizes(command: Path) -> dict[str, int]:
    """Bytes: the command with the library in it, stripped; and ONNX Runtime's library, which it needs beside it."""
    with TemporaryDirectory() as folder:
        subprocess.run(["strip", "-o", f"{folder}/stripped", str(command)], check=True)
        stripped = Path(f"{folder}/stripped").stat().st_size
    library = next((folder_of("onnxruntime") / "capi").glob("libonnxruntime.so.*"))
    return {"dcompile_run": stripped, "libonnxruntime": library.stat().st_size}


if __name__ == "__main__":
    main()
