"""Rendered characters: an unlimited, seeded data set of 36 classes (A-Z, 0-9) made from the fonts inside matplotlib.

Every glyph of every font is rasterised once at a large size; `render` then draws affine variations of those masters.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

NAMES: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
FONTS: tuple[str, ...] = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
)
SIZE = 32
MASTER = 96  # pixels per side of a master; one picture pixel covers 3 x 3 of them at scale 1
CAP_HEIGHT = 20.0  # picture pixels of a capital 'H' at scale 1
MAX_SIDE = 25.0  # wide glyphs (W, M) are shrunk, aspect kept, to this many picture pixels
CHUNK = 4096  # images per pass: bounds the memory of the sampling grid

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def draw_master(font_name: str, character: str) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """One glyph, centred, anti-aliased, white on black.

    Returns:
        (picture [MASTER, MASTER] uint8, half extents (x, y) of its ink in picture pixels at scale 1).
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font_name}.ttf"
    if not path.exists():
        raise FileNotFoundError(f"matplotlib {matplotlib.__version__} does not ship the font {font_name!r}: {path}")
    probe = 400
    font = ImageFont.truetype(str(path), probe)
    cap = _ink_box(font, "H")
    box = _ink_box(font, character)
    per_pixel = CAP_HEIGHT / (cap[3] - cap[1])
    side = max(box[2] - box[0], box[3] - box[1]) * per_pixel
    per_pixel *= min(1.0, MAX_SIDE / side)

    width, height = box[2] - box[0], box[3] - box[1]
    big = Image.new("L", (width, height), 0)
    ImageDraw.Draw(big).text((-box[0], -box[1]), character, font=font, fill=255)
    scale = per_pixel * MASTER / SIZE
    small = big.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    master = Image.new("L", (MASTER, MASTER), 0)
    master.paste(small, ((MASTER - small.width) // 2, (MASTER - small.height) // 2))
    return np.asarray(master), (width * per_pixel / 2, height * per_pixel / 2)


def _ink_box(font: ImageFont.FreeTypeFont, character: str) -> tuple[int, int, int, int]:
    left, top, right, bottom = font.getbbox(character)
    return int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))


@functools.cache
def masters() -> tuple[torch.Tensor, FloatArray]:
    """All masters: ([fonts * classes, 1, MASTER, MASTER] float32 in 0..1, half extents [fonts * classes, 2])."""
    drawn = [draw_master(font, name) for font in FONTS for name in NAMES]
    pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn])).float().div_(255).unsqueeze(1)
    return pictures, np.asarray([extent for _, extent in drawn], dtype=np.float32)


def random_affine(extent: FloatArray, random: np.random.Generator) -> FloatArray:
    """Maps from picture to master coordinates, one for each row of `extent`.

    Modest on purpose: aspect within 10 % so that 0/O and 1/I stay apart, and a shift that keeps the ink inside.

    Args:
        extent: [count, 2] half extents of the ink in picture pixels at scale 1.

    Returns:
        [count, 2, 3] float32, as `torch.nn.functional.affine_grid` wants it.
    """
    count = extent.shape[0]
    angle = np.deg2rad(random.uniform(-9.0, 9.0, count))
    shear = random.uniform(-0.12, 0.12, count)
    scale = random.uniform(0.85, 1.12, count)
    aspect = np.sqrt(random.uniform(0.9, 1.1, count))
    cos, sin = np.cos(angle), np.sin(angle)
    rotate = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], 1)
    zero = np.zeros(count)
    stretch = np.stack([np.stack([scale * aspect, shear * scale], -1), np.stack([zero, scale / aspect], -1)], 1)
    forward = rotate @ stretch
    reach = np.einsum("nij,nj->ni", np.abs(forward), extent)
    room = np.clip(SIZE / 2 - 1.0 - reach, 0.0, 2.5)
    shift = random.uniform(-1.0, 1.0, (count, 2)) * room / (SIZE / 2)
    inverse = np.linalg.inv(forward)
    return np.concatenate([inverse, -inverse @ shift[..., None]], axis=2).astype(np.float32)


def render(count: int, seed: int) -> tuple[FloatArray, IntArray]:
    """Draws `count` random characters; the same arguments give the same pictures.

    Returns:
        (images [count, 1, 32, 32] float32 in [-1, 1], white ink on black; labels [count] int64 in 0..35).
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    random = np.random.default_rng(seed)
    pictures, extents = masters()
    labels = random.integers(0, len(NAMES), count)
    chosen = random.integers(0, len(FONTS), count) * len(NAMES) + labels
    theta = torch.from_numpy(random_affine(extents[chosen], random))
    images = torch.empty(count, 1, SIZE, SIZE)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        # Two samples per pixel and side, then the mean: plain sampling at 32 x 32 would alias the 96 x 96 masters.
        grid = F.affine_grid(theta[part], [theta[part].shape[0], 1, 2 * SIZE, 2 * SIZE], align_corners=False)
        drawn = F.grid_sample(pictures[chosen[part]], grid, mode="bilinear", align_corners=False)
        images[part] = F.avg_pool2d(drawn, 2)
    return images.mul_(2).sub_(1).clamp_(-1, 1).numpy(), labels


def save_grid(images: FloatArray, path: str | Path, columns: int) -> None:
    """Writes images [count, 1, H, W] in [-1, 1] as one grey PNG with `columns` pictures per row."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width), dtype=np.uint8)
    grey = np.clip((images[:, 0] + 1) * 127.5, 0, 255).round().astype(np.uint8)
    for index in range(count):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = grey[index]
    Image.fromarray(sheet).save(path, optimize=True)


def main() -> None:
    """Writes a contact sheet: the masters (one row per font), or random renders."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("glyphs.png"))
    parser.add_argument("--random", type=int, default=0, help="draw this many random renders instead of the masters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.random:
        save_grid(render(args.random, args.seed)[0], args.out, columns=len(NAMES))
    else:
        pictures = F.avg_pool2d(masters()[0], 2) * 2 - 1
        save_grid(pictures.numpy(), args.out, columns=len(NAMES))


if __name__ == "__main__":
    main()
