"""The same models on other tools: PyTorch eager and compiled, and plain OpenVINO, each driven by diffusers' scheduler.

python benchmarks/peers.py glyphs openvino_bf16      # one request; prints seconds and memory as JSON
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("eager_fp32", "eager_bf16", "compile_fp32", "compile_bf16", "openvino_bf16")

# (samples of both guidance halves, timestep [], labels) -> what the network predicts, float32
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A network with what a request for it needs. no_label: the class that stands for none."""

    network: torch.nn.Module
    scheduler: Any
    shape: tuple[int, ...]
    classes: int
    no_label: int
    guidance: float
    steps: int


def load_model(name: str) -> Model:
    """An example's network ("glyphs", "glyphs_unet"), or "dit_b2", the DiT-B/2-sized one with random weights."""
    import diffusers

    if name == "dit_b2":
        import dit_b2

        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        return Model(dit_b2.network(), scheduler, (4, 32, 32), 1000, 1000, dit_b2.GUIDANCE, dit_b2.STEPS)
    folder = ROOT / "examples" / name / "model"
    network = diffusers.AutoModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    from dcompile.compiler.ingest import Source, ingest

    contract = ingest(Source(str(folder))).contract  # the very request that the bundles answer
    classes = contract.conditions[0].classes
    assert classes is not None
    return Model(network, scheduler, contract.sample.shape, classes, classes, contract.guidance, contract.steps)


def prepare(peer: str, model: Model, batch: int, threads: int) -> Network:
    """The network as this peer runs it."""
    torch.set_num_threads(threads)
    if peer == "openvino_bf16":
        return _openvino(model, batch, threads)
    how, _, dtype_name = peer.partition("_")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    network = model.network.to(dtype)
    call: Any = torch.compile(network) if how == "compile" else network

    def run(samples: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = call(
            samples.to(dtype), timestep=timestep.expand(len(samples)), class_labels=labels, return_dict=False
        )[0]
        return output.float()

    return run


def _openvino(model: Model, batch: int, threads: int) -> Network:
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.network

        def forward(self, samples: Tensor, timestep: Tensor, labels: Tensor) -> Any:
            return self.network(samples, timestep=timestep, class_labels=labels, return_dict=False)[0]

    examples = (torch.randn(2 * batch, *model.shape), torch.full((2 * batch,), 0.5), torch.zeros(2 * batch).long())
    with torch.no_grad():
        converted = openvino.convert_model(torch.export.export(Plain(), examples))
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def run(samples: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        given = (samples.numpy(), timestep.expand(len(samples)).float().numpy(), labels.numpy())
        return torch.from_numpy(compiled(given)[0])

    return run


@torch.inference_mode()
def request(model: Model, network: Network, batch: int, noise: Tensor | None = None) -> NDArray[np.float32]:
    """Samples [batch, ...]: both guidance halves in one call of the network, then one step of the scheduler."""
    model.scheduler.set_timesteps(model.steps)
    labels = torch.arange(batch) % model.classes
    labels = torch.cat([labels, torch.full_like(labels, model.no_label)])
    sample = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(0)) if noise is None else noise
    for timestep in model.scheduler.timesteps:
        conditional, unconditional = network(torch.cat([sample, sample]), timestep, labels).chunk(2)
        guided = unconditional + model.guidance * (conditional - unconditional)
        sample = model.scheduler.step(guided, timestep, sample, return_dict=False)[0]
    return np.asarray(sample)


def pss_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=("glyphs", "dit_b2"))
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    model = load_model(given.model)
    network = prepare(given.peer, model, given.batch, given.threads)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        request(model, network, given.batch)
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"first_s": seconds[0], "seconds": seconds[1], "pss_bytes": pss_bytes()}))


if __name__ == "__main__":
    main()
