"""Samples from a model folder in PyTorch and prints what the judge thinks of the pictures."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from data import FloatArray, render, save_grid
from diffusers import ModelMixin
from flow import balanced_labels, sample
from judge import frechet_distance, judge_images, load_judge

HERE = Path(__file__).resolve().parent
REFERENCE_SEED = 900_100
CHUNK = 144  # pictures per batch; guidance doubles it


def load_model(folder: Path) -> ModelMixin:
    """The model of a diffusers folder, in float32 and eval mode; its class is the one `config.json` names."""
    config = folder / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    name = json.loads(config.read_text())["_class_name"]
    model: ModelMixin = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval()


def sample_many(model: ModelMixin, labels: torch.Tensor, steps: int, guidance: float, seed: int) -> FloatArray:
    """Like `flow.sample`, in batches of at most `CHUNK` pictures; batch i uses seed + i."""
    parts = labels.split(CHUNK)
    return np.concatenate([sample(model, part, steps, guidance, seed + index) for index, part in enumerate(parts)])


def main() -> None:
    """Prints the judged accuracy and the Frechet distance of samples, and draws some of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--count", type=int, default=2016)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="write the first 288 samples as a PNG")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    args = parser.parse_args()

    model, judge = load_model(args.model), load_judge()
    labels = balanced_labels(args.count)
    reference = judge_images(judge, render(10_000, REFERENCE_SEED)[0])[1]
    floor = judge_images(judge, render(args.count, REFERENCE_SEED + 1)[0])[1]
    print(f"{args.count} fresh renders: Frechet distance {frechet_distance(floor, reference):.3f}", flush=True)
    for guidance in args.guidance:
        started = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            images = sample_many(model, labels, args.steps, guidance, args.seed)
        seconds = time.monotonic() - started
        logits, features = judge_images(judge, images)
        accuracy = float((logits.argmax(1) == labels.numpy()).mean())
        print(
            f"{args.count} samples, {args.steps} steps, guidance {guidance:g}: accuracy {accuracy:.2%}, "
            f"Frechet distance {frechet_distance(features, reference):.3f}, {seconds:.0f} s",
            flush=True,
        )
        if args.grid:
            save_grid(images[:288], args.grid, columns=36)


if __name__ == "__main__":
    main()
