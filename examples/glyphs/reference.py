"""Write reference.safetensors: what real glyphs look like to the judge, which Fréchet distances are measured against.

    python reference.py

Mean [64] and covariance [64, 64], float64, of the judge's features over 10,000 rendered glyphs. `dcompile --judge`
takes the folder that holds this file and judge.onnx.
"""

from __future__ import annotations

import numpy as np
import torch
from data import render
from judge import HERE, load_judge
from safetensors.numpy import save_file

COUNT, SEED = 10_000, 20_000_000  # a seed that no training run reaches


def main() -> None:
    judge = load_judge()
    images, _ = render(COUNT, SEED)
    with torch.no_grad():
        parts = [judge(torch.from_numpy(images[i : i + 500]))[1].numpy() for i in range(0, COUNT, 500)]
    features = np.concatenate(parts).astype(np.float64)
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
    save_file({"mean": mean, "covariance": covariance, "count": np.array([COUNT])}, HERE / "reference.safetensors")


if __name__ == "__main__":
    main()
