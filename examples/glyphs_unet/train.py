"""Trains the example class-conditioned U-Net (diffusers `UNet2DModel`) on the same rendered characters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "glyphs"))  # the data, the judge and the training loop are shared

from data import NAMES  # noqa: E402  (found through the line above)
from flow import Plan, train, use_plain_attention, write_folder  # noqa: E402


def make_model() -> UNet2DModel:
    """Three resolutions (32, 16, 8), attention at the lower two, random weights; class 36 is the null class."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=16,
        num_class_embeds=len(NAMES) + 1,
    )


def prepare(model: UNet2DModel) -> None:
    """Training-time behaviour that the saved folder does not have."""
    use_plain_attention(model)


def main() -> None:
    """Trains the U-Net."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pool", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--untrained", action="store_true", help="only write the folder, with random weights")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = make_model()
    if args.untrained:
        write_folder(model, model.state_dict(), args.out)
        return
    plan = Plan(minutes=args.minutes, batch=args.batch, workers=args.workers, rate=args.rate, pool=args.pool)
    train(model, plan, prepare, args.out, args.checkpoint, args.resume)


if __name__ == "__main__":
    main()
