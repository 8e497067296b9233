"""Trains the example diffusion transformer (diffusers `DiTTransformer2DModel`) on rendered characters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from data import NAMES
from diffusers import DiTTransformer2DModel
from flow import Plan, train, use_plain_attention, write_folder
from torch import nn

HERE = Path(__file__).resolve().parent
DEPTH_DROP = 0.1  # probability that training leaves out the last block; falls linearly to 0 at the first


def make_model() -> DiTTransformer2DModel:
    """12 blocks of width 160 on 8 x 8 patches, 6.5 M parameters, random weights."""
    return DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=12,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=len(NAMES),
    )


def zero_gates(model: DiTTransformer2DModel) -> None:
    """Starts every block as the identity and the output at 0, as the DiT paper does; diffusers leaves them random."""
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def prepare(model: DiTTransformer2DModel) -> None:
    """Training-time behaviour that the saved folder does not have."""
    use_plain_attention(model)
    for index, block in enumerate(model.transformer_blocks):
        # Each block has an own label embedder which would drop labels on its own; the training loop drops a label
        # for the whole model at once, which is what guidance asks for.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        block.forward = torch.compile(block.forward, dynamic=False)  # fuses the elementwise work, a fifth of a step
        _drop_at_random(block, DEPTH_DROP * index / (len(model.transformer_blocks) - 1))


def _drop_at_random(block: nn.Module, chance: float) -> None:
    """Stochastic depth: in training the block is left out, for a whole batch, with probability `chance`."""
    whole = block.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if block.training and torch.rand(()) < chance:
            return hidden_states
        kept: torch.Tensor = whole(hidden_states, *args, **kwargs)
        return kept

    block.forward = forward


def main() -> None:
    """Trains the diffusion transformer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon-rate", type=float, default=2e-3)
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
    zero_gates(model)
    plan = Plan(
        minutes=args.minutes,
        batch=args.batch,
        workers=args.workers,
        rate=args.rate,
        muon_rate=args.muon_rate,
        pool=args.pool,
    )
    train(model, plan, prepare, args.out, args.checkpoint, args.resume)


if __name__ == "__main__":
    main()
