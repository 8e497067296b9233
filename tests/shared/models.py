"""Tiny networks of the architectures that dcompile reads: two or three blocks of width 32, and every parameter random.

Random on purpose: gates and last layers start at zero, and with them whatever a test does to the blocks behind would
pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, fx, nn

SCHEDULERS: dict[str, dict[str, Any]] = {
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "epsilon": {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "epsilon"},
}


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices of unit gain, vectors 0.1 away from the usual: no gate is shut, no value grows from block to block."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            random = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(random / value[0].numel() ** 0.5)
            else:  # of a norm, or a bias
                value.copy_(0.1 * random + name.endswith("weight"))
    return network.eval()


def dit() -> nn.Module:
    return randomise(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )


def pixart() -> nn.Module:
    return randomise(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            caption_channels=24,
            cross_attention_dim=32,
            use_additional_conditions=False,
        )
    )


def sd3() -> nn.Module:
    return randomise(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=8,
        )
    )


def flux() -> nn.Module:
    return randomise(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )


def wan() -> nn.Module:
    return randomise(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
        )
    )


def unet2d() -> nn.Module:
    """Eleven class embeddings: ten classes, and the last for "none"."""
    return randomise(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=8,
            num_class_embeds=11,
        )
    )


def unet_condition() -> nn.Module:
    return randomise(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=24,
        )
    )


@dataclass(frozen=True)
class Architecture:
    """A factory of this file, a sampler that suits its prediction, and the shape of a sample if its config has none."""

    make: Callable[[], nn.Module]
    sampler: str
    shape: tuple[int, ...] | None = None

    @property
    def spec(self) -> str:
        return f"models:{self.make.__name__}"


ARCHITECTURES = {
    "dit": Architecture(dit, "ddim"),
    "pixart": Architecture(pixart, "ddim"),
    "sd3": Architecture(sd3, "flow_euler"),
    "flux": Architecture(flux, "flow_euler", (16, 16)),
    "wan": Architecture(wan, "flow_euler", (4, 3, 8, 8)),
    "unet2d": Architecture(unet2d, "ddim"),
    "unet_condition": Architecture(unet_condition, "ddim"),
}


class Tokens(nn.Module):
    """No diffusers class: sample [B, 6, 4], residual blocks in a ModuleList, inputs called as its author liked."""

    def __init__(self, blocks: int = 3, in_place: bool = False) -> None:
        super().__init__()
        self.enter, self.time, self.leave = nn.Linear(4, 32), nn.Linear(1, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(TokenBlock(in_place) for _ in range(blocks))

    def forward(self, x: Tensor, sigma: Tensor, extra: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.enter(x) + self.time(sigma[:, None] / 1000)[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.leave(hidden)
        return output


class TokenBlock(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.act = nn.SiLU(inplace=in_place)
        self.in_place = in_place

    def forward(self, hidden: Tensor) -> Tensor:
        update: Tensor = self.down(self.act(self.up(self.norm(hidden))))
        if self.in_place:
            kept = update.clone()
            update.mul_(0.5)
            update = update + kept
        return hidden + update


class SharedCondition(nn.Module):
    """The form of DDT (2504.05741): encoder blocks make a condition, the others read it beside a fresh sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.time, self.enter = nn.Linear(4, 32), nn.Linear(1, 32), nn.Linear(4, 32)
        self.blocks = nn.ModuleList(ConditionedBlock() for _ in range(5))
        self.leave = nn.Linear(32, 4)

    def condition(self, x: Tensor, sigma: Tensor) -> Tensor:
        time = self.time(sigma[:, None] / 1000)[:, None]
        hidden: Tensor = self.encode(x)
        for block in self.blocks[:3]:
            hidden = block(hidden, time)
        return nn.functional.silu(time + hidden)

    def velocity(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden: Tensor = self.enter(x)
        for block in self.blocks[3:]:
            hidden = block(hidden, condition)
        output: Tensor = self.leave(hidden)
        return output

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.velocity(x, self.condition(x, sigma))


class ConditionedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulate, self.mix = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        gate, shift = self.modulate(condition).chunk(2, dim=-1)
        mixed: Tensor = hidden + gate * self.mix(self.norm(hidden) + shift)
        return mixed


UNET_CONTRACT = "conditions:\n  class_labels: {dtype: int64, classes: 10, unconditional: 10}\n"
TOKENS_CONTRACT = "sample: x\ntimestep: sigma\nsample_shape: [6, 4]\npredicts: flow\n"


def tokens() -> nn.Module:
    return randomise(Tokens())


def shared_condition() -> nn.Module:
    return randomise(SharedCondition())


def tokens_in_place() -> nn.Module:
    return randomise(Tokens(in_place=True))


def save(network: nn.Module, folder: Path, scheduler: Mapping[str, Any] | None = None, **files: str) -> Path:
    """A diffusers folder of this network; `files` are further ones, a double underscore standing for the dot."""
    network.save_pretrained(folder)  # type: ignore[operator]
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def graph_text(module: fx.GraphModule) -> str:
    """One line an input or a call, weights by their path: the form of the golden texts."""
    lines = []
    for node in module.graph.nodes:
        arguments = ", ".join(_shown(value) for value in node.args)
        if node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op == "call_function":
            lines.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({arguments})")
        elif node.op == "output":
            lines.append(f"return {arguments}")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(each) for each in value)}]"
    return str(value)
