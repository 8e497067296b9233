"""The glyph bundle in headless Chromium and in Python on one machine: bytes, start, seconds a sample, equality.

    python benchmarks/web.py [--repeats 7] [--screenshot examples/web/screenshot.png]

Writes benchmarks/results/web.json, which docs/web.md quotes. ONNX Runtime on one thread in both; requests alternate,
and the least of the repeats counts, for other work only adds to it. Needs what the tests of the page need: Chromium and
npm (tests/web/install.sh), then `npm ci` in examples/web and in tests/web.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dcompile
from dcompile.exporters.bench import machine
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime import Session
from dcompile.runtime.manifest import read

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "shared"))  # the driver of the browser

from browser import Browser, Server  # noqa: E402

PAGE = ROOT / "examples" / "web"
PACKAGE = PAGE / "node_modules" / "onnxruntime-web"
RESULTS = Path(__file__).resolve().parent / "results"
PASSES = {
    "fp32": "prune:count=2,cache:interval=4,fold",
    "int8": "prune:count=2,cache:interval=4,quant,fold",
}
BATCHES = [(list(range(first, first + 6)), first) for first in range(0, 36, 6)]  # labels, first seed

LOAD = """
const { load } = await import("/runtime/session.js");
const started = performance.now();
globalThis.session = await load(given, { threads: 1 });
return (performance.now() - started) / 1000;
"""
GENERATE = """
const steps = [];
const callback = (step, count, sample, [engine]) => { steps.push([engine, performance.now()]); };
const started = performance.now();
const { data } = await session.generate({ labels: given.labels, seed: given.seed, callback });
const times = steps.map(([engine, end], i) => [engine, end - (i ? steps[i - 1][1] : started)]);
return { seconds: session.lastTiming.totalMs / 1000, data: given.values ? Array.from(data) : null, steps: times };
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--screenshot", type=Path, help="write a picture of the page here")
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = {name: compile_to(folder / name, passes) for name, passes in PASSES.items()}
        server = Server(serve(folder, stack), folder)
        browser = stack.enter_context(Browser("/usr/bin/chromium"))
        results = {name: measure(browser, server, address, given.repeats) for name, address in addresses.items()}
        if given.screenshot:
            take_picture(browser, server, addresses["int8"], given.screenshot)
    files = [PACKAGE / "dist" / name for name in ("ort-wasm-simd-threaded.wasm", "ort.wasm.bundle.min.mjs")]
    runtime = {
        "version": json.loads((PACKAGE / "package.json").read_text())["version"],
        "bytes": sum(file.stat().st_size for file in files),
        "gzip_bytes": sum(len(gzip.compress(file.read_bytes())) for file in files),
    }
    written = {"machine": machine(), "passes": PASSES, "onnxruntime_web": runtime, "bundles": results}
    (RESULTS / "web.json").write_text(json.dumps(written, indent=2) + "\n")
    print(json.dumps(written, indent=2))


def serve(folder: Path, stack: ExitStack) -> str:
    command = [sys.executable, str(PAGE / "serve.py"), "--port", "0", str(folder)]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.terminate)
    assert process.stdout is not None
    return process.stdout.readline().strip()


def compile_to(bundle: Path, passes: str) -> str:
    settings = Settings(cache=default_cache(), evaluate=False)
    dcompile.compile(str(ROOT / "examples/glyphs/model"), bundle, dcompile.Recipe(passes=(passes,)), settings)
    return f"bundle/{bundle.name}"


def measure(browser: Browser, server: Server, address: str, repeats: int) -> dict[str, Any]:
    loads = []
    for _ in range(3):
        browser.call("goto", f"{server.url}icon.svg")  # a new page: nothing is compiled or held any more
        loads.append(browser.run(LOAD, f"/{address}"))
    steps: dict[str, list[float]] = {}
    chromium, python = [], []
    with dcompile.load(server.path(address), threads=1) as session:
        for _ in range(repeats):
            found = browser.run(GENERATE, {"labels": [0], "seed": 0})
            chromium.append(found["seconds"])
            for engine, ms in found["steps"]:
                steps.setdefault(engine, []).append(ms)
            started = perf_counter()
            session.generate(labels=[0], seed=0)
            python.append(perf_counter() - started)
        bundle_bytes = sum(file.bytes for file in session.manifest.files.values())
    batches = [browser.run(GENERATE, {"labels": labels, "seed": seed, "values": True}) for labels, seed in BATCHES]
    found = np.concatenate([each["data"] for each in batches]).astype(np.float32)
    expected, nudged = (python_samples(server.path(address), scale) for scale in (1.0, 1.0 + 2.0**-23))
    return {
        "bundle_bytes": bundle_bytes,
        "load_s": min(loads),
        "sample_s": min(chromium),
        "python_sample_s": min(python),
        "step_ms": {engine: min(times) for engine, times in steps.items()},
        "all_labels_s": sum(each["seconds"] for each in batches),
        "from_python": compare(found, expected),
        "python_from_noise_changed_in_its_last_bit": compare(nudged, expected),
    }


def python_samples(bundle: Path, scale: float) -> NDArray[np.float32]:
    """The samples of BATCHES, if their first noise were so much larger."""
    manifest = read(bundle)
    contract = replace(manifest.contract, initial_scale=manifest.contract.initial_scale * scale)
    with Session(bundle, replace(manifest, contract=contract), threads=1) as session:
        return np.concatenate([session.generate(labels=labels, seed=seed).reshape(-1) for labels, seed in BATCHES])


def compare(found: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, float]:
    """Samples reach from -1 to 1, so the peak of the signal-to-noise ratio is 2."""
    difference = np.abs(found.astype(np.float64) - expected)
    mean_square = max(float(np.mean(np.square(difference))), 1e-30)
    return {"largest": float(difference.max()), "psnr_db": 10 * float(np.log10(4 / mean_square))}


def take_picture(browser: Browser, server: Server, address: str, path: Path) -> None:
    browser.call("setViewportSize", {"width": 1040, "height": 800})
    browser.call("goto", f"{server.url}?bundle={address}#label=R&seed=7")
    browser.wait("document.getElementById('caption').textContent.includes('in the engines')")
    browser.call("click", "#draw-all")
    browser.wait("document.getElementById('all-status').textContent.includes('pictures from')", 120)
    browser.call("click", "button[type=submit]")  # once more, now that everything is warm
    browser.wait("document.getElementById('caption').textContent.includes('in the engines')")
    browser.call("screenshot", {"path": str(path.resolve()), "fullPage": True})


if __name__ == "__main__":
    main()
