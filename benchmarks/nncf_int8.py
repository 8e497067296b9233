"""INT8 by NNCF (OpenVINO's own tool) against our quantize pass, on the same OpenVINO engine of the glyph DiT.

    pip install nncf && python benchmarks/targets.py --only glyphs && python benchmarks/nncf_int8.py

NNCF quantises the engine of the uncompressed bundle that targets.py left in build/targets, calibrated on whole
requests; the result takes the engine's place in a copy of that bundle, so that runtime, steps and seeds are the same.
Figures of all three are made as in targets.py. Writes benchmarks/results/nncf_int8.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from targets import BUNDLES, ROOT, judged

import dcompile
from dcompile.compiler.quality import load_judge
from dcompile.exporters.bench import machine
from dcompile.runtime.engines import Array
from dcompile.runtime.manifest import FILE, FileSpec, read, write

RESULT = Path(__file__).resolve().parent / "results" / "nncf_int8.json"
PLAIN, OURS = BUNDLES / "glyphs-openvino-uncompressed", BUNDLES / "glyphs-openvino-int8"
BATCH, SAMPLES = 16, 8  # of a timed request, and of the requests that calibrate


def recorded(bundle: Path, seeds: int, threads: int) -> list[dict[str, Array]]:
    """What the engine is given at every step of `seeds` requests."""
    given: list[dict[str, Array]] = []
    with dcompile.load(bundle, verify=False, threads=threads) as session:
        engine = session._stages["full"].engine
        really: Callable[[dict[str, Array]], dict[str, Array]] = engine.run

        def record(inputs: dict[str, Array]) -> dict[str, Array]:
            given.append({name: np.array(value) for name, value in inputs.items()})
            return really(inputs)

        engine.run = record  # type: ignore[method-assign]
        for seed in range(seeds):
            session.generate(labels=[(SAMPLES * seed + i) % 36 for i in range(SAMPLES)], seed=1000 * (seed + 1))
    return given


def quantise(output: Path, calibration: list[dict[str, Array]], smooth: bool) -> float:
    """A copy of the uncompressed bundle with NNCF's engine in it. -> seconds that NNCF took"""
    import nncf
    import openvino

    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(PLAIN, output)
    xml, weights = output / "engines/full.xml", output / "engines/weights.bin"
    model = openvino.Core().read_model(PLAIN / "engines/full.xml", PLAIN / "engines/weights.bin")
    names = [parameter.friendly_name for parameter in model.get_parameters()]
    started = time.perf_counter()
    advanced = nncf.AdvancedQuantizationParameters(smooth_quant_alpha=0.95 if smooth else -1)
    quantised = nncf.quantize(
        model,
        nncf.Dataset(calibration, lambda inputs: [inputs[name] for name in names]),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
        advanced_parameters=advanced,
    )
    spent = time.perf_counter() - started
    xml.unlink()
    weights.unlink()
    openvino.serialize(quantised, xml, weights)
    manifest = read(output)
    changed = {f"engines/{path.name}": FileSpec.of(path) for path in (xml, weights)}
    write(replace(manifest, files={**manifest.files, **changed}), output / FILE)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=360)
    parser.add_argument("--seeds", type=int, default=4, help="requests of 30 steps that calibrate")
    given = parser.parse_args()
    calibration = recorded(PLAIN, given.seeds, given.threads)
    bundles = {"uncompressed bf16": PLAIN, "dcompile quantize": OURS}
    seconds: dict[str, float] = {}
    for title, smooth in (("nncf", False), ("nncf with SmoothQuant", True)):
        bundles[title] = BUNDLES / f"glyphs-{title.replace(' ', '-')}"
        seconds[title] = quantise(bundles[title], calibration, smooth)
    sessions = {title: dcompile.load(path, verify=False, threads=given.threads) for title, path in bundles.items()}
    calls = {title: partial(session.generate, labels=list(range(BATCH)), seed=0) for title, session in sessions.items()}
    expected, spent = calls["uncompressed bf16"](), {title: list[float]() for title in calls}
    rows: dict[str, dict[str, Any]] = {title: {} for title in bundles}
    for turn in range(given.repeats + 1):
        for title, call in calls.items():
            started = time.perf_counter()
            found = call()
            if turn:
                spent[title].append(time.perf_counter() - started)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            rows[title]["relative_difference"] = float(error)
    judge = load_judge(ROOT / "examples/glyphs", given.threads)
    for title, path in bundles.items():
        rows[title] |= {"latency_s": median(spent[title]), "calibrated_in_s": seconds.get(title)}
        rows[title] |= {"engine_bytes": sum(file.stat().st_size for file in (path / "engines").iterdir())}
        rows[title] |= judged(path, judge, given.samples, given.threads)
        print(title, json.dumps(rows[title]), file=sys.stderr, flush=True)
    RESULT.write_text(json.dumps({"machine": machine(), "batch": BATCH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
