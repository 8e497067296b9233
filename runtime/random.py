"""Normal noise that is the same on every machine and in every language: Philox 4x32-10, then Box-Muller.

The rule, for element e of one sample (C order, without the batch axis), its 64-bit seed, and a draw number
(0 = first noise, k + 1 = noise for step k, however many engines a step calls):

    counter = (block & 0xFFFFFFFF, block >> 32, draw, 0)   block = e // 4
    key     = (seed & 0xFFFFFFFF, seed >> 32)
    r0..r3  = philox(counter, key)                         one block makes four normals
    u(r)    = ((r >> 8) + 1) / 2**24                       in (0, 1], exact in float32
    e % 4:    0 -> cos of (r0, r1)    1 -> sin of (r0, r1)    2 -> cos of (r2, r3)    3 -> sin of (r2, r3)
    cos of (a, b) = float32(sqrt(-2 ln u(a)) * cos(2 pi u(b))), and likewise sin

ln, sqrt, cos, sin and the products are float64, rounded to float32 once at the end. Maths libraries differ in the
last bits of float32 functions (one value in five between numpy and glibc), hardly ever in a rounded float64 result.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.2.
"""

from collections.abc import Sequence
from math import pi, prod

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox 4x32-10: counter [..., 4], key [..., 2] -> random words [..., 4]; leading axes broadcast."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    k0, k1 = np.moveaxis(key.astype(np.uint64), -1, 0)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normal(seeds: Sequence[int], draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise [len(seeds), *shape]; sample i depends on seeds[i] and `draw` alone."""
    size = prod(shape)
    block = np.arange(-(-size // 4), dtype=np.uint64)
    counter = np.stack([block & LOW, block >> HALF, np.full_like(block, draw), np.zeros_like(block)], axis=-1)
    noise = np.empty((len(seeds), size), dtype=np.float32)
    for row, seed in zip(noise, seeds, strict=True):
        words = philox(counter.astype(np.uint32), np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
        uniform = ((words >> np.uint32(8)) + 1.0) * 2.0**-24  # [blocks, 4] float64
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0::2])), 2.0 * pi * uniform[:, 1::2]  # [blocks, 2] each
        row[:] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:size]
    return noise.reshape(len(seeds), *shape)
