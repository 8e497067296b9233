"""A model of DiT-B/2's size, random weights: cache + quant against ONNX Runtime and PyTorch eager, both fp32.

    python benchmarks/dit_b2.py [--threads 2] [--batch 1] [--repeats 3]

12 blocks, width 768, latent 4x32x32, guidance, 20 steps. Compiles in a process of its own, to measure its time and
peak memory. Writes benchmarks/results/dit_b2.json. Latencies are medians of interleaved requests. Random weights: the
figures are about speed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
STEPS, GUIDANCE = 20, 4.0
PASSES = "cache:interval=5,quant,fold"


def network() -> torch.nn.Module:
    """A factory for `dcompile benchmarks.dit_b2:network`; the weights are the same in every process."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: torch.nn.Module = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # gates start at zero, which would make every block an identity
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.abs().max() == 0:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def compile_here(output: str, passes: str, threads: int) -> None:
    """Run in a fresh process: compile, and print seconds and peak bytes."""
    import dcompile
    from dcompile.exporters.settings import Settings

    torch.set_num_threads(threads)
    recipe = dcompile.Recipe(
        passes=(passes,) if passes else (), sampler="ddim", steps=STEPS, guidance=GUIDANCE, calibration_samples=1
    )
    started = time.perf_counter()
    dcompile.compile(f"{Path(__file__).stem}:network", output, recipe, Settings(threads=threads, evaluate=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_bytes": peak}))


def compile_apart(output: Path, passes: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--compile", str(output), "--passes", passes, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise SystemExit(f"compiling with {passes or 'no passes'} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def eager_seconds(model: torch.nn.Module, batch: int) -> float:
    """One request in PyTorch eager fp32: 20 calls of the network at twice the batch, and the DDIM update."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)])
    sample = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    with torch.inference_mode():
        for step in scheduler.timesteps:
            output = model(torch.cat([sample, sample]), timestep=step.expand(2 * batch), class_labels=labels).sample
            conditional, unconditional = output.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            sample = scheduler.step(guided, step, sample).prev_sample
    return time.perf_counter() - started


def measure(batch: int, threads: int, repeats: int) -> dict[str, object]:
    from dcompile.exporters.bench import machine, measure_fresh
    from dcompile.runtime import load

    torch.set_num_threads(threads)
    model = network()
    weight_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "uncompressed", Path(folder) / "compiled"
        compile_apart(plain, "", threads)
        compiling = compile_apart(small, PASSES, threads)
        seconds: dict[str, list[float]] = {"pytorch_eager_fp32": [], "onnxruntime_fp32": [], "dcompile": []}
        overhead = []
        labels = list(range(batch))
        with load(plain, threads=threads) as before, load(small, threads=threads) as after:
            for turn in range(repeats + 1):  # turn 0 warms up
                found = {"pytorch_eager_fp32": eager_seconds(model, batch)}
                for name, session in (("onnxruntime_fp32", before), ("dcompile", after)):
                    session.generate(labels=labels, seed=0)
                    assert session.last_timing is not None
                    found[name], outside = session.last_timing.total_s, session.last_timing.overhead_frac
                if turn:
                    overhead.append(outside)
                    for name, value in found.items():
                        seconds[name].append(value)
        paths = {"before": plain, "after": small}
        fresh = {name: measure_fresh(path, batch=batch, threads=threads) for name, path in paths.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "passes": PASSES, "steps": STEPS, "guidance": GUIDANCE, "batch": batch,
        "machine": {**machine(), "threads": threads},
        "median_s": median, "all_s": seconds,
        "speedup_over_onnxruntime_fp32": median["onnxruntime_fp32"] / median["dcompile"],
        "speedup_over_pytorch_eager_fp32": median["pytorch_eager_fp32"] / median["dcompile"],
        "overhead_frac": statistics.median(overhead),
        "compile_s": compiling["seconds"],
        "compile_peak_bytes": compiling["peak_bytes"],
        "compile_allowed_bytes": 2.2 * weight_bytes + 1.5 * 2**30,
        "weight_bytes": weight_bytes,
        "fresh": fresh,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", metavar="OUTPUT", help=argparse.SUPPRESS)
    parser.add_argument("--passes", default=PASSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        compile_here(given.compile, given.passes, given.threads)
        return
    RESULTS.mkdir(exist_ok=True)
    found = measure(given.batch, given.threads, given.repeats)
    (RESULTS / "dit_b2.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
