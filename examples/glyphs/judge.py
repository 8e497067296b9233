"""The judge: a small classifier of rendered characters that scores what the diffusion models draw.

Accuracy of its `classify` says whether a sample shows the class that was asked for; the Frechet distance between its
`features` of samples and of renders says how far the two sets of pictures lie apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn

CLASSES = 36
FEATURES = 64
BATCH = 512
HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "judge.safetensors"

FloatArray = npt.NDArray[np.float32]


def _convolve(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """image [N, 1, 32, 32] float32 in [-1, 1] -> (logits [N, 36] float32, features [N, 64] float32)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolve(1, 24),
            nn.MaxPool2d(2),
            _convolve(24, 48),
            _convolve(48, 48),
            nn.MaxPool2d(2),
            _convolve(48, 96),
            _convolve(96, 96),
            nn.MaxPool2d(2),
            nn.Conv2d(96, 24, 1),
            nn.Flatten(),
        )
        self.features = nn.Linear(24 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.body(image))
        return self.head(torch.relu(features)), features


def load_judge(path: str | Path = WEIGHTS) -> Judge:
    """The trained judge in eval mode and float32, whatever precision the file at `path` has."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no judge weights at {path}; run train_judge.py to make them")
    judge = Judge()
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    judge.load_state_dict(state)
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, path: str | Path = WEIGHTS) -> None:
    """Writes the weights as float16 safetensors."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in judge.state_dict().items()
    }
    save_file(state, path)
    Path(path).chmod(0o644)  # safetensors makes its file private


def judge_images(judge: Judge, images: FloatArray) -> tuple[FloatArray, FloatArray]:
    """images [N, 1, 32, 32] float32 -> (logits [N, 36], features [N, 64])."""
    if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
        raise ValueError(f"the judge takes images [N, 1, 32, 32], got {list(images.shape)}")
    logits, features = [], []
    with torch.no_grad():
        for part in torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).split(BATCH):
            part_logits, part_features = judge(part)
            logits.append(part_logits)
            features.append(part_features)
    return torch.cat(logits).numpy(), torch.cat(features).numpy()


def classify(judge: Judge, images: FloatArray) -> FloatArray:
    """images [N, 1, 32, 32] float32 -> logits [N, 36] float32."""
    return judge_images(judge, images)[0]


def features(judge: Judge, images: FloatArray) -> FloatArray:
    """images [N, 1, 32, 32] float32 -> penultimate features [N, 64] float32."""
    return judge_images(judge, images)[1]


def frechet_distance(features_a: FloatArray, features_b: FloatArray) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features, [Na, D] and [Nb, D].

    |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), with A and B the covariances. The trace of the root is taken as
    the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex parts to discard.
    """
    for name, given in (("features_a", features_a), ("features_b", features_b)):
        if given.ndim != 2 or given.shape[0] < 2:
            raise ValueError(f"{name} must be [N, D] with N >= 2, got {list(given.shape)}")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"feature widths differ: {features_a.shape[1]} and {features_b.shape[1]}")
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    shift = a.mean(axis=0) - b.mean(axis=0)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    root_trace = np.sqrt(inner.clip(min=0)).sum()
    return float(shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace)


def export_onnx(judge: Judge, path: str | Path) -> None:
    """Writes the judge as ONNX: `image` [N, 1, 32, 32] -> `logits` [N, 36], `features` [N, 64], all float32, N free."""
    import onnx

    program = torch.onnx.export(
        judge,
        (torch.zeros(2, 1, 32, 32),),
        input_names=["image"],
        output_names=["logits", "features"],
        dynamic_shapes={"image": {0: torch.export.Dim("N")}},
        opset_version=20,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    model.ir_version = 10  # what the oldest runtime that the project supports can read
    del model.graph.metadata_props[:]  # the exporter's notes; those of the nodes are stack traces
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in model.graph.value_info:
        del value.metadata_props[:]
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def main() -> None:
    """Exports the judge to ONNX."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=HERE / "judge.onnx")
    args = parser.parse_args()
    export_onnx(load_judge(args.weights), args.out)


if __name__ == "__main__":
    main()
