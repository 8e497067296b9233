"""The network of a program as something to train: what it predicts, what its blocks say, and its weights as leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.execute import step_values
from ...compiler.program import Program
from ...compiler.regions import find_prediction


class Network:
    """Call it with a step and the slots of a batch; -> its prediction, then the values of `taps`.

    results: then what the step leaves behind, sample and history. weights: by path, copies that may be trained, of all
    that the prediction follows from.
    """

    def __init__(self, program: Program, taps: Sequence[str] = (), results: bool = False) -> None:
        graph = rewrite.clone(program.graph)
        values = [prediction(graph), *(rewrite.node_named(graph, name) for name in taps)]
        left = rewrite.output_values(graph) if results else ()
        rewrite.output_node(graph).args = ((*values, *left),)
        self.program = program.with_graph(rewrite.finish(graph))
        self.weights: dict[str, Tensor] = {}

    def __call__(self, step: int, slots: Mapping[str, Tensor]) -> list[Tensor]:
        return list(self.program.graph(*step_values(self.program, step, slots)))

    def parameters(self) -> list[str]:
        """Paths of the model's parameters, not of its buffers; of all weights where none is marked as a parameter."""
        weights = rewrite.weights(self.program.graph)
        found = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
        return [name for name, weight in found.items() if isinstance(weight, torch.nn.Parameter)] or list(found)

    def unfreeze(self, names: Collection[str] | None = None) -> None:
        """Give it weights of its own to train: those of these paths, else its parameters."""
        graph = rewrite.clone(self.program.graph)
        for name in self.parameters() if names is None else names:
            self.weights[name] = rewrite.attribute(graph, name).detach().clone().requires_grad_()
            rewrite.assign(graph, name, self.weights[name])
        self.program = self.program.with_graph(rewrite.finish(graph))


def prediction(graph: fx.GraphModule) -> fx.Node:
    """Of a graph that does not tell the network from the sampler, the next sample."""
    found = find_prediction(graph)
    return found[0] if found else rewrite.output_values(graph)[0]
