"""Put a small torch module into a program's graph: its operators between the graph's, its weights among the graph's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from . import rewrite
from .errors import InternalError
from .step_graph import flatten


def export_small(module: nn.Module, examples: Sequence[Tensor]) -> fx.GraphModule:
    """The module as a flat ATen graph of positional inputs; a first dimension above 1 is the batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    dynamic = (tuple({0: batch} if len(example) > 1 else None for example in examples),)
    with torch.no_grad():
        exported = torch.export.export(_Positional(module), tuple(examples), dynamic_shapes=dynamic)
    return flatten(exported.module(), [f"input{index}" for index in range(len(examples))])


class _Positional(nn.Module):
    """One output, and as many inputs as are given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *values: Tensor) -> Tensor:
        result: Tensor = self.module(*values)
        return result


def inline(
    graph: fx.GraphModule, small: fx.GraphModule, inputs: Sequence[fx.Node], before: fx.Node, path: str
) -> fx.Node:
    """Write what `small` computes of these nodes before `before`, its weights under `path`; -> its result."""
    made = dict(zip(rewrite.placeholders(small).values(), inputs, strict=True))
    for node in small.graph.nodes:
        if node.op == "get_attr":
            target = f"{path}.{str(node.target).removeprefix('module.')}"
            rewrite.assign(graph, target, rewrite.attribute(small, str(node.target)).detach())
            made[node] = rewrite.read_weight(graph, target, before)
        elif node.op == "call_function":
            if node.kwargs:
                raise InternalError(f"{path}: {node.target} is called by keyword; give its arguments in order")
            made[node] = rewrite.call(graph, before, node.target, *fx.node.map_arg(node.args, made.__getitem__))
    (result,) = rewrite.output_values(small)
    return made[result]
