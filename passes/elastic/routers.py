"""The network with a router before each block, which says whether to compute it and how wide (Elastic DiT, 2602.13993).

A router is Linear to HIDDEN, ReLU, then a logit for the block and one for each width, meant over tokens. It reads the
block's input, normalised as the block does, without its modulation. Decisions are hard, their gradients those of the
soft ones (straight-through).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from ...compiler import rewrite
from ...compiler.regions import Region
from ..experts.feed_forward import FeedForward

HIDDEN, OPEN, WIDEST = 128, 0.7, 2.0  # width of a router; chance of a block untrained; logit of the whole width
ROUTERS = "elastic_routers"  # module path of what is added
OPENED, WIDTHS = "elastic_opened", "elastic_widths"  # nodes: chances [blocks, rows], and of widths [blocks, rows, W]


@dataclass(frozen=True)
class ElasticBlock:
    """feeds: its feed-forwards, with the order in which their hidden units count."""

    region: Region
    feeds: Sequence[tuple[FeedForward, Tensor]]


def with_routers(graph: fx.GraphModule, blocks: Sequence[ElasticBlock], widths: int, seed: int = 0) -> fx.GraphModule:
    """The graph whose blocks are computed as their routers say; `OPENED` and `WIDTHS` are nodes of it."""
    module = rewrite.clone(graph)
    named = {node.name: node for node in module.graph.nodes}
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    generator = torch.Generator().manual_seed(seed)
    said: list[fx.Node] = []
    for index, block in enumerate(blocks):
        entries = [named[stream.entry] for stream in block.region.streams]
        first = max(entries, key=order.__getitem__)
        spot = first.next if first.op == "call_function" else _first_call(module)
        weights = _add_router(module, index, spot, entries, widths, generator)
        with module.graph.inserting_before(spot):
            said.append(module.graph.call_function(route, (widths, *weights, *entries)))
    past: dict[fx.Node, fx.Node] = {}
    for logits, block in zip(said, blocks, strict=True):
        for feed, units in block.feeds:
            _narrow(module, logits, feed, units, widths)
        for stream in block.region.streams:
            left, entered = named[stream.exit], named[stream.entry]
            readers = list(left.users)
            with module.graph.inserting_after(left):
                mixed = module.graph.call_function(skip, (past.get(entered, entered), left, logits))
            mixed.meta["val"] = left.meta["val"]
            past[left] = mixed
            for reader in readers:
                reader.replace_input_with(left, mixed)
    with module.graph.inserting_before(rewrite.output_node(module)):
        module.graph.create_node("call_function", chances_open, (said,), name=OPENED)
        module.graph.create_node("call_function", chances_wide, (said,), name=WIDTHS)
    module.graph.lint()
    return fx.GraphModule(module, module.graph)


def _add_router(
    module: fx.GraphModule, index: int, before: fx.Node, entries: Sequence[fx.Node], widths: int,
    generator: torch.Generator,
) -> list[fx.Node]:  # fmt: skip
    shape = rewrite.shape_of(entries[0])
    channels = int(shape[rewrite.channel_axis(len(shape))])
    bound = 1 / math.sqrt(channels)  # as nn.Linear begins
    biases = torch.tensor([math.log(OPEN / (1 - OPEN)), *[0.0] * (widths - 1), WIDEST])
    values = {
        "up": torch.empty(HIDDEN, channels).uniform_(-bound, bound, generator=generator),
        "up_bias": torch.empty(HIDDEN).uniform_(-bound, bound, generator=generator),
        "down": torch.randn(1 + widths, HIDDEN, generator=generator) * 1e-3,
        "down_bias": biases,
    }
    found = []
    for name, value in values.items():
        path = f"{ROUTERS}.{index}.{name}"
        rewrite.assign(module, path, torch.nn.Parameter(value))
        found.append(rewrite.read_weight(module, path, before))
    return found


def _first_call(module: fx.GraphModule) -> fx.Node:
    """Before which what reads inputs alone may stand."""
    found: fx.Node = next(node for node in module.graph.nodes if node.op == "call_function")
    return found


def _narrow(module: fx.GraphModule, logits: fx.Node, feed: FeedForward, units: Tensor, widths: int) -> None:
    """Multiply the hidden values by the mask of the width."""
    down = rewrite.node_named(module, feed.down)
    rank = torch.empty_like(units)
    rank[units] = torch.arange(len(units))
    ends = torch.tensor(part_ends(len(units), widths))
    masks = (rank[None] < ends[:, None]).float()  # [widths, hidden]
    path = f"{ROUTERS}.masks.{feed.down}"
    rewrite.assign(module, path, masks)
    read = rewrite.read_weight(module, path, down)
    hidden = down.args[0]
    with module.graph.inserting_before(down):
        narrowed = module.graph.call_function(narrow, (hidden, logits, read))
    down.update_arg(0, narrowed)


def part_ends(hidden: int, widths: int) -> list[int]:
    """How many hidden units each width has."""
    return [round(hidden * (number + 1) / widths) for number in range(widths)]


# ---- what the nodes compute -----------------------------------------------------------------------------------------


def route(widths: int, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, *streams: Tensor) -> Tensor:
    """[rows, 1 + widths] of the block's streams; channels are the second dimension of values with four or more."""
    tokens = [x.movedim(1, -1).flatten(1, -2) if x.dim() >= 4 else x for x in streams]
    normal = torch.cat([functional.layer_norm(x, x.shape[-1:]) for x in tokens], dim=1)
    return functional.linear(functional.relu(functional.linear(normal, up, up_bias)), down, down_bias).mean(dim=1)


def skip(entered: Tensor, left: Tensor, logits: Tensor) -> Tensor:
    """What left the block where it is computed, what entered it where not."""
    soft = torch.sigmoid(logits[:, 0])
    gate = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # in this order: exactly 0 or 1
    return torch.lerp(entered, left, gate.reshape(-1, *[1] * (left.dim() - 1)))


def narrow(hidden: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    """hidden [rows, N, H]; masks [widths, H]."""
    soft = functional.softmax(logits[:, 1:], dim=-1)
    hard = functional.one_hot(soft.argmax(-1), masks.shape[0]).to(soft.dtype)
    return hidden * ((hard + (soft - soft.detach())) @ masks)[:, None]


def chances_open(said: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.sigmoid(logits[:, 0]) for logits in said])


def chances_wide(said: Sequence[Tensor]) -> Tensor:
    return torch.stack([functional.softmax(logits[:, 1:], dim=-1) for logits in said])


def budget_loss(opened: Tensor, wide: Tensor, share: float, width: float) -> Tensor:
    """How far the routers are from what they may spend: of blocks, and of hidden units in the blocks that are computed.

    opened [blocks, rows], wide [blocks, rows, W] -> [].
    """
    parts = torch.arange(1, wide.shape[-1] + 1) / wide.shape[-1]
    computed = (opened > 0.5).float().detach()
    mean_width = ((wide @ parts) * computed).sum() / computed.sum().clamp_min(1.0)
    return (opened.mean() - share).square() + (mean_width - width).square()


def router_weights(weights: Iterable[str]) -> list[str]:
    """Paths of what routers learn."""
    return [name for name in weights if name.startswith(f"{ROUTERS}.") and ".masks." not in name]
