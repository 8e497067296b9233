"""The twin of a graph: what an engine may compute in its place without being wrong.

Low precision and hard choices are chaotic. A value by a rounding edge lands on its other side, of two tokens that score
alike an expert takes the other, and what follows differs from there. So an engine may be about as far from its graph as
the graph is from its twin, which does not round, and whose choices go by scores that are a little off.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.rewrite import aten
from ..quant import ops

# Every operator of ours that rounds a value in flight; its first argument is that value.
_ROUNDING = (
    torch.ops.dcompile.quantize_dequantize.default,
    torch.ops.dcompile.quantize_dequantize_dynamic.default,
    torch.ops.dcompile.quantize_dequantize_nvfp4.default,
)
_CHOOSING = (aten.topk.default,)  # by its first argument
assert ops  # the operators above are registered by its import


def twin_of(graph: fx.GraphModule, off: float) -> fx.GraphModule | None:
    """The graph with the same stored weights, activations that are not rounded, and scores off by `off` of their
    deviation; None if it neither rounds activations nor chooses."""
    twin = rewrite.clone(graph)
    rounding = [node for node in twin.graph.nodes if rewrite.is_call(node, *_ROUNDING)]
    choosing = [node for node in twin.graph.nodes if rewrite.is_call(node, *_CHOOSING)]
    for node in rounding:
        node.replace_all_uses_with(node.args[0])
    for node in choosing:
        with twin.graph.inserting_before(node):
            node.update_arg(0, twin.graph.call_function(_a_little_off, (node.args[0], off)))
    return rewrite.finish(twin) if rounding or choosing else None


def _a_little_off(scores: Tensor, off: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return scores + off * scores.std() * torch.randn(scores.shape, generator=generator, dtype=scores.dtype)
