"""Caching by cache-dit and DeepCache in PyTorch, and by our artifacts, on the same models, steps and noise.

    python benchmarks/cache_peers.py [--models glyphs,glyphs_unet] [--threads 2] [--repeats 3] [--batch 16]

Each tool at several settings: median latency of one request, interleaved in one process; PSNR to the same model without
a cache in PyTorch. For each setting of a peer, the fastest of our bundles that is at least as near. Writes
benchmarks/results/cache_peers.json; bundles are kept in build/cache_peers, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import peers
import torch
from numpy.typing import NDArray

import dcompile
from dcompile.compiler.quality import psnr
from dcompile.exporters.bench import machine
from dcompile.exporters.bundle import is_whole
from dcompile.exporters.settings import Settings, default_cache
from dcompile.runtime.random import normal

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BUNDLES = Path(__file__).resolve().parent / "results", ROOT / "build" / "cache_peers"
OURS = {
    "glyphs": (
        "method=interval,interval=2", "method=interval,interval=3", "method=interval,interval=5",
        "method=lesa,interval=2", "method=lesa,interval=3", "method=lesa,interval=5", "method=segments,interval=3",
        "method=fbcache,threshold=0.08", "method=fbcache,threshold=0.1",
        "method=dbcache,front=8,warmup=2,threshold=0.08",
    ),
    "glyphs_unet": (
        "method=deepcache,interval=2", "method=deepcache,interval=3", "method=deepcache,interval=5",
        "method=interval,interval=2", "method=interval,interval=3", "method=fora,interval=2", "method=fora,interval=3",
    ),
}  # fmt: skip
TARGETS: dict[str, Literal["fp32", "bf16"]] = {"onnx": "fp32", "openvino": "bf16"}


def cache_dit(model: peers.Model, *, front: int, threshold: float, order: int) -> None:
    import cache_dit
    from cache_dit.caching.cache_blocks.pattern_3_4_5 import CachedBlocks_Pattern_3_4_5

    network: Any = model.network
    adapter = cache_dit.BlockAdapter(
        transformer=network, blocks=network.transformer_blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
    )  # fmt: skip
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=front, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=2,
        num_inference_steps=model.steps,
    )  # fmt: skip
    # It puts one module in place of the blocks, and diffusers' DiT asks the first block for its norm.
    first = network.transformer_blocks[0]
    CachedBlocks_Pattern_3_4_5.norm1 = property(lambda self: first.norm1)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)


def deepcache(model: peers.Model, *, interval: int) -> None:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(SimpleNamespace(unet=model.network, scheduler=model.scheduler))
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()


def peer_calls(name: str, batch: int, threads: int, noise: torch.Tensor) -> dict[str, Callable[[], NDArray[Any]]]:
    """What each peer is called -> a request to it. "eager" runs without a cache."""
    settings: dict[str, Callable[[peers.Model], None]] = {"eager": lambda model: None}
    if name == "glyphs_unet":
        for interval in (2, 3, 5):
            settings[f"DeepCache interval {interval}"] = partial(deepcache, interval=interval)
    else:
        for front, threshold, order in ((1, 0.1, 0), (1, 0.2, 0), (1, 0.4, 0), (8, 0.08, 0), (1, 0.2, 1)):
            title = f"cache-dit F{front}B0 {threshold}" + (f" TaylorSeer {order}" if order else "")
            settings[title] = partial(cache_dit, front=front, threshold=threshold, order=order)
    calls: dict[str, Callable[[], NDArray[Any]]] = {}
    for title, accelerate in settings.items():
        model = peers.load_model(name)
        accelerate(model)
        network = peers.prepare("eager_fp32", model, batch, threads) if name == "glyphs" else _positional(model)
        calls[title] = partial(peers.request, model, network, batch, noise)
    return calls


def _positional(model: peers.Model) -> peers.Network:
    """DeepCache reads the time, one number, from the second argument."""
    return lambda samples, timestep, labels: model.network(samples, timestep, class_labels=labels, return_dict=False)[0]


def our_calls(name: str, batch: int, threads: int) -> dict[str, Callable[[], NDArray[Any]]]:
    calls: dict[str, Callable[[], NDArray[Any]]] = {}
    for target, precision in TARGETS.items():
        for options in OURS[name]:
            folder = BUNDLES / f"{name}-{target}-{options.replace('=', '-').replace(',', '-')}"
            if not is_whole(folder):
                print(f"compiling {folder.name}", file=sys.stderr, flush=True)
                recipe = dcompile.Recipe(target=target, passes=(f"cache:{options}",), precision=precision)
                inside = Settings(cache=default_cache(), threads=threads, evaluate=False, force=True)
                dcompile.compile(str(ROOT / "examples" / name / "model"), folder, recipe, inside)
            session = dcompile.load(folder, verify=False, threads=threads)
            labels = [i % 36 for i in range(batch)]
            calls[f"dcompile {target} {precision} {options}"] = partial(session.generate, labels=labels, seed=0)
    return calls


def measure(name: str, batch: int, threads: int, repeats: int) -> dict[str, Any]:
    shape = peers.load_model(name).shape
    noise = torch.from_numpy(normal(list(range(batch)), 0, shape))  # what our sessions start from
    ours = our_calls(name, batch, threads)
    calls = {**peer_calls(name, batch, threads, noise), **ours}
    seconds: dict[str, list[float]] = {title: [] for title in calls}
    samples: dict[str, NDArray[Any]] = {}
    for turn in range(repeats + 1):  # turn 0 warms up
        for title, call in calls.items():
            started = time.perf_counter()
            samples[title] = call()
            if turn:
                seconds[title].append(time.perf_counter() - started)
            print(f"{name} turn {turn} {title}: {time.perf_counter() - started:.3f} s", file=sys.stderr, flush=True)
    rows = {
        title: {
            "latency_s": median(seconds[title]),
            "psnr": float(np.mean(psnr(samples[title], samples["eager"], data_range=2.0))),
            "ours": title in ours,
        }
        for title in calls
        if title != "eager"
    }
    return {"eager_s": median(seconds["eager"]), "rows": rows, "at_equal_psnr": at_equal_psnr(rows)}


def at_equal_psnr(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Peer -> the fastest of ours that is no further from the uncached model, and how many times faster it is."""
    found = {}
    for peer, row in rows.items():
        near = {title: own for title, own in rows.items() if own["ours"] and own["psnr"] >= row["psnr"]}
        if row["ours"] or not near:
            continue
        best = min(near, key=lambda title: near[title]["latency_s"])
        found[peer] = {"ours": best, "times_faster": row["latency_s"] / near[best]["latency_s"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="glyphs,glyphs_unet")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    path = RESULTS / "cache_peers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in given.models.split(","):
        results[name] = measure(name, given.batch, given.threads, given.repeats)
        results["run"] = {"machine": machine(), "threads": given.threads, "batch": given.batch}
        path.write_text(json.dumps(results, indent=2) + "\n")
        for peer, row in results[name]["at_equal_psnr"].items():
            print(f"{name}: {row['times_faster']:.2f} times faster than {peer}: {row['ours']}")


if __name__ == "__main__":
    main()
