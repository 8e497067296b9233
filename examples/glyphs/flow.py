"""Rectified-flow training and sampling, shared by the example models.

x_s = (1 - s) x_0 + s noise for s in 0..1, the model predicts v = noise - x_0 and is told the timestep 1000 s. A model
is any diffusers module that is called as `model(images, timesteps, labels)`; label 36 is the null class for guidance.

Training runs as one process per core. They own one set of weights in shared memory and meet twice in a step (gradients
written, weights updated); threads of one process would meet in every operator, which costs far more on a busy machine.
The learning rate follows the wall clock instead of a step count, so a run ends on time and always at rate 0.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import NAMES, FloatArray, render
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor
from judge import classify, load_judge
from torch import nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

NULL_LABEL = len(NAMES)
TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """What a training run does. Rates are peaks; `minutes` is wall time, evaluation included."""

    minutes: float
    batch: int = 64  # over all workers
    workers: int = 2
    rate: float = 1e-3  # AdamW: embeddings, biases, norms, convolutions
    muon_rate: float = 2e-3  # Muon: the matrices that `is_muon` names; scaled to AdamW's update size
    weight_decay: float = 0.01
    warmup_frac: float = 0.02
    label_dropout: float = 0.1
    ema: float = 0.999
    clip: float = 1.0
    pool: int = 200_000  # rendered once, kept as uint8
    seed: int = 0
    save_minutes: float = 3.0
    evaluate_minutes: float = 10.0
    guidance: float = 3.0


@dataclass
class Shared:
    """What the workers of one run hold in common; every tensor lies in shared memory."""

    model: ModelMixin
    average: dict[str, torch.Tensor]  # exponential moving average of the weights
    gradients: torch.Tensor  # [workers, parameters] float32
    pool: torch.Tensor  # [pool, 1, 32, 32] uint8
    labels: torch.Tensor  # [pool] int64
    clock: torch.Tensor  # [2] float64: seconds trained so far, steps done
    hits: torch.Tensor  # [workers, 2] float64: right answers and samples of an evaluation
    start: dict[str, Any] = field(default_factory=dict)  # optimizer states to resume from


Prepare = Callable[[Any], None]
"""Applied to the model in each worker before training: for what cannot be saved in a folder (stochastic depth)."""


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler's schedule: 1000 training timesteps, no shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=1.0)


def write_folder(model: ModelMixin, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the diffusers layout with float16 weights, each file in one step: no reader ever sees half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = type(model).from_config(model.config)
    copy.load_state_dict(weights)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name)
        copy.half().save_pretrained(made)
        make_scheduler().save_pretrained(made)
        (made / "labels.json").write_text(json.dumps(list(NAMES)) + "\n")
        for file in sorted(made.iterdir()):
            file.chmod(0o644)  # safetensors makes its file private
            os.replace(file, folder / file.name)


def use_plain_attention(model: nn.Module) -> None:
    """Swaps fused attention for plain products: the fused kernel's backward is several times slower on a CPU here."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


@torch.no_grad()
def sample(model: nn.Module, labels: torch.Tensor, steps: int, guidance: float, seed: int) -> FloatArray:
    """Draws one picture per label with Euler steps and classifier-free guidance, both halves in one batch.

    Args:
        labels: [N] int64 in 0..35.

    Returns:
        [N, 1, 32, 32] float32 in [-1, 1].
    """
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    count = labels.shape[0]
    images = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    for timestep in scheduler.timesteps:
        velocity = model(images.repeat(2, 1, 1, 1), timestep.expand(2 * count), both)[0].float()
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
        images = scheduler.step(velocity, timestep, images)[0]
    return images.clamp(-1, 1).numpy()


def balanced_labels(count: int) -> torch.Tensor:
    """[count] int64: the 36 classes in turn."""
    return torch.arange(count) % len(NAMES)


def draw_times(count: int) -> torch.Tensor:
    """[count] float32 in 0..1: 70 % logit-normal (mean 0, deviation 1), 30 % uniform so that both ends are seen."""
    normal = torch.sigmoid(torch.randn(count))
    return torch.where(torch.rand(count) < 0.3, torch.rand(count), normal)


def is_muon(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates it: the matrices inside transformer blocks, embeddings excepted."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ".emb." not in name


def rate_at(progress: float, warmup_frac: float) -> float:
    """Factor of the peak rate: linear warm-up, then a cosine to 0 at progress 1."""
    if progress < warmup_frac:
        return max(progress, 1e-3 * warmup_frac) / warmup_frac
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup_frac) / (1 - warmup_frac))))


class Worker:
    """One process of a run. It reads all weights and updates its share of them."""

    def __init__(self, rank: int, plan: Plan, shared: Shared, barrier: Barrier) -> None:
        self.rank, self.plan, self.shared, self.barrier = rank, plan, shared, barrier
        self.named = list(shared.model.named_parameters())
        self.mine = self._share_of_parameters()
        owned = [(name, parameter) for index, (name, parameter) in enumerate(self.named) if index in self.mine]
        muon = [parameter for name, parameter in owned if is_muon(name, parameter)]
        rest = [parameter for name, parameter in owned if not is_muon(name, parameter)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay)
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(
                    muon, lr=plan.muon_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.peaks = [plan.rate, plan.muon_rate]
        for optimizer, state in zip(self.optimizers, shared.start.get(f"optimizers{rank}", []), strict=False):
            optimizer.load_state_dict(state)

    def _share_of_parameters(self) -> set[int]:
        """Indices of this worker's parameters: dealt out largest first, to the worker with the least so far."""
        loads = [0.0] * self.plan.workers
        mine = set()
        for index, (name, parameter) in sorted(enumerate(self.named), key=lambda item: -item[1][1].numel()):
            cost = parameter.numel() * (20.0 if is_muon(name, parameter) else 1.0)
            worker = loads.index(min(loads))
            loads[worker] += cost
            if worker == self.rank:
                mine.add(index)
        return mine

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (images [B, 1, 32, 32] float32, labels [B] int64 with the null label in some places)."""
        size = self.plan.batch // self.plan.workers
        while True:
            chosen = torch.randint(0, self.shared.labels.shape[0], (size,))
            labels = self.shared.labels[chosen]
            labels = torch.where(torch.rand(size) < self.plan.label_dropout, NULL_LABEL, labels)
            yield self.shared.pool[chosen].float().div_(127.5).sub_(1), labels

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Writes this worker's gradients to shared memory; returns its loss."""
        times = draw_times(images.shape[0])
        noise = torch.randn_like(images)
        mixed = torch.lerp(images, noise, times[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.shared.model(mixed, times * TRAIN_STEPS, labels)[0]
        loss = (velocity.float() - (noise - images)).square().mean()
        loss.backward()
        start = 0
        row = self.shared.gradients[self.rank]
        for _, parameter in self.named:
            part = row[start : start + parameter.numel()]
            if parameter.grad is None:  # a block that stochastic depth left out
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
            parameter.grad = None
            start += parameter.numel()
        return float(loss.item())

    def update(self, progress: float, step: int) -> float:
        """Steps this worker's parameters and their average with the mean gradient; returns the gradient's norm."""
        mean = self.shared.gradients.mean(dim=0)
        norm = float(mean.norm().item())
        mean *= min(1.0, self.plan.clip / (norm + 1e-6))
        start = 0
        for index, (_, parameter) in enumerate(self.named):
            if index in self.mine:
                parameter.grad = mean[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        factor = rate_at(progress, self.plan.warmup_frac)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.plan.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for index in self.mine:
                name, parameter = self.named[index]
                self.shared.average[name].lerp_(parameter, 1 - decay)
        return norm

    def evaluate(self, count: int) -> float:
        """Judged accuracy of `count` guided samples of the averaged weights; the workers draw a share each."""
        model = type(self.shared.model).from_config(self.shared.model.config).eval()
        model.load_state_dict(self.shared.average)
        labels = balanced_labels(count)[self.rank :: self.plan.workers]
        with torch.autocast("cpu", torch.bfloat16):
            images = sample(model, labels, 30, self.plan.guidance, seed=77 + self.rank)
        right = (classify(load_judge(), images).argmax(1) == labels.numpy()).sum()
        self.shared.hits[self.rank] = torch.tensor([float(right), float(len(labels))])
        self.barrier.wait()
        total = self.shared.hits.sum(dim=0)
        return float(total[0] / total[1])


def _save_checkpoint(worker: Worker, path: Path) -> None:
    """Each worker writes its optimizers, worker 0 also the weights; called between two barriers."""
    parts: dict[str, Any] = {f"optimizers{worker.rank}": [part.state_dict() for part in worker.optimizers]}
    if worker.rank == 0:
        shared = worker.shared
        parts |= {"model": shared.model.state_dict(), "average": shared.average, "clock": shared.clock}
    target = path.with_suffix(f".{worker.rank}.pt")
    torch.save(parts, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


def _load_checkpoint(path: Path, workers: int) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for rank in range(workers):
        parts |= torch.load(path.with_suffix(f".{rank}.pt"))
    return parts


def _work(
    rank: int, plan: Plan, shared: Shared, barrier: Barrier, prepare: Prepare, folder: Path, checkpoint: Path
) -> None:
    torch.set_num_threads(1)
    worker = Worker(rank, plan, shared, barrier)
    first = int(shared.clock[1].item())
    torch.manual_seed(plan.seed * 1000 + rank + 17 * first)
    shared.model.train()
    prepare(shared.model)
    seconds, budget = shared.clock[0].item(), plan.minutes * 60
    entered = time.monotonic()
    began = entered - seconds
    saved = evaluated = seconds
    step, loss_mean = first, math.nan
    for images, labels in worker.batches():
        loss = worker.backward(images, labels)
        if rank == 0:
            shared.clock[0], shared.clock[1] = time.monotonic() - began, step + 1
        barrier.wait()
        # Read between the barriers: all workers see the same clock, so they take the same branches below.
        seconds = shared.clock[0].item()
        norm = worker.update(seconds / budget, step)
        barrier.wait()
        step += 1
        loss_mean = loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss
        done = seconds >= budget
        if rank == 0 and (step % 50 == 0 or done):
            pace = (step - first) / (time.monotonic() - entered)
            print(
                f"step {step} loss {loss_mean:.4f} norm {norm:.3f} {pace * plan.batch:.0f} images/s "
                f"{seconds / 60:.1f}/{plan.minutes:.0f} min",
                flush=True,
            )
        if done or seconds - saved > plan.save_minutes * 60:
            saved = seconds
            _save_checkpoint(worker, checkpoint)
            if rank == 0:
                write_folder(shared.model, shared.average, folder)
            barrier.wait()
        if done or seconds - evaluated > plan.evaluate_minutes * 60:
            evaluated = seconds
            accuracy = worker.evaluate(360)
            if rank == 0:
                print(f"step {step} judged accuracy {accuracy:.2%} guidance {plan.guidance}", flush=True)
            barrier.wait()
        if done:
            return


def train(model: ModelMixin, plan: Plan, prepare: Prepare, folder: Path, checkpoint: Path, resume: bool) -> None:
    """Trains the model and leaves its averaged weights in `folder`, checkpoints at `checkpoint`.{0,1,..}.pt.

    Args:
        prepare: applied to the model inside each worker; must be importable (a top-level function).
        resume: go on from `checkpoint`, its clock included.
    """
    if plan.batch % plan.workers:
        raise ValueError(f"batch {plan.batch} does not divide among {plan.workers} workers")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}: {count} parameters", flush=True)
    images, labels = render(plan.pool, plan.seed + 1)
    clock = torch.zeros(2, dtype=torch.float64)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start: dict[str, Any] = {}
    if resume:
        start = _load_checkpoint(checkpoint, plan.workers)
        model.load_state_dict(start["model"])
        average, clock = start["average"], start["clock"]
    shared = Shared(
        model=model.share_memory(),
        average={name: tensor.share_memory_() for name, tensor in average.items()},
        gradients=torch.zeros(plan.workers, count).share_memory_(),
        pool=torch.from_numpy(np.round((images + 1) * 127.5).astype(np.uint8)).share_memory_(),
        labels=torch.from_numpy(labels).share_memory_(),
        clock=clock.share_memory_(),
        hits=torch.zeros(plan.workers, 2, dtype=torch.float64).share_memory_(),
        start=start,
    )
    del images
    barrier = get_context("spawn").Barrier(plan.workers)
    arguments = (plan, shared, barrier, prepare, folder, checkpoint)
    spawn(_work, args=arguments, nprocs=plan.workers, join=True)
