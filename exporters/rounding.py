"""What quantisation's rounding does to a graph: its twin that multiplies the same stored weights without rounding."""

from __future__ import annotations

import torch
from torch import fx

from ..compiler import rewrite
from ..quant import ops

# Every operator of ours that rounds a value in flight; its first argument is that value.
_ROUNDING = (
    torch.ops.dcompile.quantize_dequantize.default,
    torch.ops.dcompile.quantize_dequantize_dynamic.default,
    torch.ops.dcompile.quantize_dequantize_nvfp4.default,
)
assert ops  # the operators above are registered by its import


def without_rounding(graph: fx.GraphModule) -> fx.GraphModule | None:
    """The graph with weights as they are stored and activations that are not rounded; None if no activation is."""
    twin = rewrite.clone(graph)
    rounding = [node for node in twin.graph.nodes if rewrite.is_call(node, *_ROUNDING)]
    for node in rounding:
        node.replace_all_uses_with(node.args[0])
    return rewrite.finish(twin) if rounding else None
