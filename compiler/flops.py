"""Floating-point operations of a graph, by node, from the shapes torch.export recorded. One multiply-add is two."""

from __future__ import annotations

from math import prod

from torch import fx

from .program import Program
from .rewrite import aten, hint, is_call, shape_of
from .step_graph import EXAMPLE_BATCH
from .variants import build_variant


def node_flops(node: fx.Node) -> float:
    """Operations of one node for one sample, both guidance halves together; 0 for what is no matrix product."""
    if node.op != "call_function":
        return 0.0
    return _total(node) / EXAMPLE_BATCH


def sample_flops(program: Program) -> float:
    """Operations of all steps for one sample, by the plan."""
    plan = program.plan
    by_mask = {
        mask: sum(node_flops(node) for node in build_variant(program, mask).graph.graph.nodes) for mask in plan.masks
    }
    return sum(by_mask[plan.mask(step)] for step in range(plan.steps))


def _sizes(value: object) -> list[int]:
    return [hint(size) for size in shape_of(value)] if isinstance(value, fx.Node) else []


def _total(node: fx.Node) -> float:
    out = _sizes(node)
    if is_call(node, aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default):
        return 2.0 * prod(out) * _sizes(node.args[0])[-1]
    if is_call(node, aten.addmm.default):
        return 2.0 * prod(out) * _sizes(node.args[1])[-1]
    if is_call(node, aten.conv2d.default, aten.conv3d.default, aten.convolution.default):
        return 2.0 * prod(out) * prod(_sizes(node.args[1])[1:])
    if is_call(node, aten.scaled_dot_product_attention.default):
        query, key = _sizes(node.args[0]), _sizes(node.args[1])
        return 4.0 * prod(query) * key[-2]
    return 0.0
