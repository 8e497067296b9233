"""Peak memory of building a TensorRT engine from 2.5 GB of weights, in a fresh process: a linear stack, random weights.

    python benchmarks/large_trt.py [--layers 38] [--width 4096]

Allowed: 2.2 times the weights plus 1.5 GiB. Writes benchmarks/results/large_trt.json: weights, peak (resident, mapped
files too) after each stage of the build, its seconds, and the engine's size.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = 64
CONTRACT = f"sample: x\nsample_shape: [{TOKENS}, %d]\ntimestep: sigma\npredicts: flow\n"
_SIZE = {"layers": 38, "width": 4096}


class Stack(nn.Module):
    """x + W_n ... W_1 x, the timestep beside it."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        hidden = x + self.time(sigma[:, None] / 1000)[:, None]
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        result: Tensor = hidden
        return result


def network() -> nn.Module:
    """A factory for `dcompile large_trt:network`; --compile sets the size before it is called."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = Stack(_SIZE["layers"], _SIZE["width"])
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.1)
    return model.eval()


def compile_here(output: str, layers: int, width: int, threads: int) -> None:
    """Run in a fresh process: compile, and print seconds by stage and peak bytes."""
    import dcompile
    from dcompile.exporters.settings import Settings, Silent

    importlib.import_module("large_trt")._SIZE.update(layers=layers, width=width)  # not __main__, that dcompile imports
    torch.set_num_threads(threads)
    contract = Path(output).parent / "contract.yaml"
    contract.write_text(CONTRACT % width)
    stages: list[tuple[str, float, int]] = []

    class Clock(Silent):
        def stage(self, title: str) -> None:
            stages.append((title, time.perf_counter(), peak_bytes()))

    recipe = dcompile.Recipe(target="trt", sampler="flow_euler", steps=1, contract=contract, calibration_samples=1)
    dcompile.compile("large_trt:network", output, recipe, Settings(threads=threads, evaluate=False, listener=Clock()))
    Clock().stage("")
    pairs = list(itertools.pairwise(stages))
    seconds = {title: after[1] - at for (title, at, _), after in pairs}
    peaks = {title: after[2] for (title, _, _), after in pairs}
    print(json.dumps({"seconds": seconds, "peak_bytes_after": peaks, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(layers: int, width: int, threads: int) -> dict[str, object]:
    weight_bytes = 4 * layers * width * width
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bundle"
        command = [sys.executable, __file__, "--compile", str(output), "--threads", str(threads)]
        command += ["--layers", str(layers), "--width", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        if done.returncode:
            raise SystemExit(f"compiling failed:\n{done.stderr}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        engine = sum(path.stat().st_size for path in output.rglob("*.engine"))
        left = [path.name for path in Path(folder).iterdir() if path != output and path.suffix != ".yaml"]
    allowed = 2.2 * weight_bytes + 1.5 * 2**30
    return {
        "layers": layers, "width": width, "weight_bytes": weight_bytes, "engine_bytes": engine, **found,
        "allowed_bytes": allowed, "share_of_allowed": found["peak_bytes"] / allowed, "left_beside_the_bundle": left,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=_SIZE["layers"])
    parser.add_argument("--width", type=int, default=_SIZE["width"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", metavar="OUTPUT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        compile_here(given.compile, given.layers, given.width, given.threads)
        return
    RESULTS.mkdir(exist_ok=True)
    found = measure(given.layers, given.width, given.threads)
    (RESULTS / "large_trt.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
