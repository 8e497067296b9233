"""Trains the judge on fresh renders, with noise, blur and contrast changes so that it is fair to generated pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import FloatArray, render
from judge import WEIGHTS, Judge, classify, features, frechet_distance, load_judge, save_judge

VALIDATION_SEED = 900_001


def augment(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """images [N, 1, 32, 32] in [-1, 1] -> the same with a random blur, contrast and noise for each picture."""
    count = images.shape[0]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), value=-1.0), 3, stride=1)
    mix = (torch.rand(count, 1, 1, 1, generator=random) - 0.4).clamp(min=0)
    gain = 0.8 + 0.3 * torch.rand(count, 1, 1, 1, generator=random)
    noise = 0.3 * torch.rand(count, 1, 1, 1, generator=random) ** 2
    images = torch.lerp(images, blurred, mix)
    images = (images + 1) * gain - 1 + noise * torch.randn(images.shape, generator=random)
    return images.clamp(-1, 1)


@torch.no_grad()
def scale_features(judge: Judge, images: FloatArray) -> None:
    """Rescales the features to deviation 1 over `images` and undoes it in the head: the logits stay as they are.

    It gives the Frechet distance a readable size. Exact because relu(a x) = a relu(x) for a > 0.
    """
    factor = 1.0 / float(features(judge, images).std())
    judge.features.weight.mul_(factor)
    judge.features.bias.mul_(factor)
    judge.head.weight.div_(factor)


def main() -> None:
    """Trains, reports the accuracy on fresh renders and writes the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool", type=int, default=60_000, help="training renders")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    rendered, answers = render(args.pool, seed=1)
    images, labels = torch.from_numpy(rendered), torch.from_numpy(answers)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=args.steps)
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        chosen = torch.randint(0, args.pool, (args.batch,), generator=random)
        logits, _ = judge(augment(images[chosen], random))
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{args.steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)

    scale_features(judge.eval(), rendered[:10_000])
    save_judge(judge, args.out)
    judge = load_judge(args.out)
    fresh, answers = render(20_000, VALIDATION_SEED)
    noisy = augment(torch.from_numpy(fresh), random).numpy()
    for name, pictures in (("fresh renders", fresh), ("fresh renders with noise and blur", noisy)):
        accuracy = float((classify(judge, pictures).argmax(1) == answers).mean())
        print(f"accuracy on 20000 {name}: {accuracy:.4%}", flush=True)
    halves = features(judge, fresh[:10_000]), features(judge, fresh[10_000:])
    print(f"Frechet distance between two sets of 10000 fresh renders: {frechet_distance(*halves):.4f}", flush=True)


if __name__ == "__main__":
    main()
