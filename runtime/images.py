"""Samples as pixels."""

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError


def to_pixels(samples: NDArray[np.float32], value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Samples [B, C, H, W] -> pixels [B, H, W, C]: floor(255 * x + 0.5), value_range mapped to x in 0..1.

    Without a value_range (a latent), the first three channels (the first, if there are fewer) are stretched
    between each sample's own minimum and maximum: for looking at, not for measuring.
    """
    if samples.ndim != 4:
        raise RequestError(f"images: samples have shape {list(samples.shape)}, needed [B, C, H, W]")
    if value_range is None:
        samples = samples[:, :3] if samples.shape[1] >= 3 else samples[:, :1]
        low = samples.min(axis=(1, 2, 3), keepdims=True)
        high = samples.max(axis=(1, 2, 3), keepdims=True)
    else:
        low, high = (np.float32(end) for end in value_range)
    unit = np.clip((samples - low) / np.maximum(high - low, np.finfo(np.float32).tiny), 0.0, 1.0)
    pixels: NDArray[np.uint8] = np.floor(unit * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)
