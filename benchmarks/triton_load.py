"""Load on a real Triton Inference Server: throughput and latency by concurrency, then memory over a long run.

    python benchmarks/triton_load.py [--bundle DIR] [--seconds 20] [--minutes 30] [--instances 1 2]

Callers send requests of one sample each, with random seeds and labels, the next as soon as the last is answered, over
gRPC. The server, its model and the callers share this machine; it is the server of the wheel nvidia-pytriton, installed
into build/triton. One instance gets all cores, two half of them each. Latency is what a caller waits. Memory is the
resident memory of the server and of the model's processes, with the last number of instances, every two seconds;
`growth_bytes` is the median of its last quarter less that of its second: the first quarter is left to caches. Writes
benchmarks/results/triton_load.json; ends with code 1 if a request failed or memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tritonclient.grpc

import dcompile
from dcompile.exporters.bench import machine, measure_fresh
from dcompile.exporters.bundle import is_whole
from dcompile.exporters.deploy.triton import deploy_triton
from dcompile.exporters.deploy.triton_config import Serving, max_batch
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime.manifest import Contract, read
from dcompile.runtime.measure import example_conditions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from triton_requests import inputs  # noqa: E402
from triton_server import WHEEL, Running, install, rss_bytes, serve  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "triton_load.json"
MODEL, GLYPHS = "model", "prune:count=2,cache:interval=4,quant,fold"
CONCURRENCIES, LONG_RUN = (1, 4, 16), 4
LOOK_EVERY_S = 2.0
ALLOWED_GROWTH = 0.02  # of the memory, beside what follows: an allocator's arenas settle late
ALLOWED_GROWTH_BYTES = 4 * 2**20


@dataclass
class Tally:
    """What callers met, seconds each; failures by their sentence."""

    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def callers(server: Running, contract: Contract, count: int) -> Iterator[Tally]:
    """So many callers send requests while the block runs."""
    tally, stop = Tally(), threading.Event()

    def call(number: int) -> None:
        random = np.random.default_rng(number)
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            while not stop.is_set():
                request = inputs(
                    tritonclient.grpc, [int(random.integers(2**62))], conditions=conditions(contract, random)
                )
                begun = time.perf_counter()
                try:
                    client.infer(MODEL, request)
                except tritonclient.utils.InferenceServerException as error:
                    tally.failures.append(str(error))
                    return
                tally.latencies_s.append(time.perf_counter() - begun)

    with ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(call, number) for number in range(count)]
        try:
            yield tally
        finally:
            stop.set()
            for each in waiting:
                each.result()


def conditions(contract: Contract, random: np.random.Generator) -> dict[str, Any]:
    """A random class where there are classes, zeros elsewhere."""
    found = example_conditions(contract, 1)
    for each in contract.conditions:
        if each.classes is not None:
            found[each.name][:] = random.integers(each.classes)
    return found


def measure_concurrency(server: Running, contract: Contract, count: int, seconds: float) -> dict[str, Any]:
    with callers(server, contract, count) as tally:
        time.sleep(min(2.0, seconds / 2))  # until the first ones are answered
        first, before, begun = len(tally.latencies_s), server.read_metrics(), time.perf_counter()
        time.sleep(seconds)
        spent, after, last = time.perf_counter() - begun, server.read_metrics(), len(tally.latencies_s)
    label = f'{{model="{MODEL}",version="1"}}'
    samples, runs = (
        after[name + label] - before[name + label] for name in ("nv_inference_count", "nv_inference_exec_count")
    )
    latencies_ms = 1e3 * np.array(tally.latencies_s[first:last] or [np.nan])
    return {
        "concurrency": count,
        "samples_per_s": samples / spent,
        "mean_batch": samples / max(runs, 1),
        "p50_ms": float(np.percentile(latencies_ms, 50)),
        "p99_ms": float(np.percentile(latencies_ms, 99)),
        "requests": last - first,
        "failures": tally.failures,
    }


def measure_memory(server: Running, contract: Contract, minutes: float) -> dict[str, Any]:
    seen: dict[str, list[int]] = {"server": [], "model": []}
    with callers(server, contract, LONG_RUN) as tally:
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until and not tally.failures:
            seen["server"].append(rss_bytes(server.process.pid))
            seen["model"].append(sum(rss_bytes(pid) for pid in server.stubs()))
            time.sleep(LOOK_EVERY_S)
    found: dict[str, Any] = {"minutes": minutes, "requests": len(tally.latencies_s), "failures": tally.failures}
    for name, values in seen.items():
        quarter = max(len(values) // 4, 1)
        early, late = median(values[quarter : 2 * quarter] or values), median(values[-quarter:])
        shown = values[:: max(len(values) // 60, 1)]
        found[name] = {"early_bytes": early, "late_bytes": late, "growth_bytes": late - early, "series_bytes": shown}
    return found


def has_grown(memory: dict[str, Any]) -> bool:
    allowed = {
        name: ALLOWED_GROWTH_BYTES + ALLOWED_GROWTH * memory[name]["early_bytes"] for name in ("server", "model")
    }
    return any(memory[name]["growth_bytes"] > most for name, most in allowed.items())


def glyphs(threads: int) -> Path:
    """The example model with the README's recipe; compiled unless it is there."""
    folder = ROOT / "build" / "triton_load"
    if not is_whole(folder):
        settings = Settings(cache=default_cache(), threads=threads, evaluate=False, force=True)
        dcompile.compile(str(ROOT / "examples/glyphs/model"), folder, dcompile.Recipe(passes=(GLYPHS,)), settings)
    return folder


def measure_all(server: Running, contract: Contract, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for count in CONCURRENCIES:
        row = measure_concurrency(server, contract, count, seconds)
        print(f"{row['concurrency']:>3} callers  {row['samples_per_s']:6.2f} samples/s  batch {row['mean_batch']:.2f}  "
              f"p50 {row['p50_ms']:.0f} ms  p99 {row['p99_ms']:.0f} ms", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def main() -> int:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: the glyph example, with the README's recipe")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each concurrency")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load while memory is watched; 0 leaves it out")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, cores], help="default: 1, and one a core")
    parser.add_argument("--max-queue-delay-us", type=int, default=5000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    bundle = given.bundle or glyphs(cores)
    contract = read(bundle).contract
    found: dict[str, Any] = {"machine": machine(), "server": WHEEL, "bundle": read(bundle).name, "servings": []}
    for number, instances in enumerate(given.instances, start=1):
        serving = Serving(instances, None, given.max_queue_delay_us, threads=max(cores // instances, 1))
        print(f"{instances} instances of {serving.threads} threads", flush=True)
        alone = measure_fresh(bundle, batch=1, threads=serving.threads)["generate_s"]
        with tempfile.TemporaryDirectory() as folder:
            deploy_triton(bundle, Path(folder) / "models", MODEL, serving)
            with serve(install(), Path(folder) / "models", Path(folder) / "log.txt") as server:
                rows = measure_all(server, contract, given.seconds)
                if given.minutes and number == len(given.instances):
                    found["memory"] = measure_memory(server, contract, given.minutes)
        found["servings"].append(
            {**asdict(serving), "max_batch": max_batch(read(bundle), serving), "without_server_s": alone, "load": rows}
        )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    return verdict(found)


def verdict(found: dict[str, Any]) -> int:
    """The exit code, after what it is about was printed."""
    failures = [sentence for each in found["servings"] for row in each["load"] for sentence in row["failures"]]
    grown = False
    if "memory" in found:
        for name in ("server", "model"):
            early, late = (found["memory"][name][f"{when}_bytes"] / 1e6 for when in ("early", "late"))
            print(f"memory of the {name:<6}  {early:.1f} MB, then {late:.1f} MB")
        failures += found["memory"]["failures"]
        grown = has_grown(found["memory"])
    for sentence in failures:
        print(f"failed: {sentence}", file=sys.stderr)
    if grown:
        print("memory grew", file=sys.stderr)
    return int(bool(failures) or grown)


if __name__ == "__main__":
    sys.exit(main())
