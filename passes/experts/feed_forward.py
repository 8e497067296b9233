"""Feed-forwards of a graph: linear, activation, linear; gated forms too."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler import rewrite
from ...compiler.regions import all_blocks
from ...compiler.rewrite import aten

_THROUGH = (aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.alias.default)


@dataclass(frozen=True)
class FeedForward:
    """Node names. entry: what goes in, [B, N, D]. ups: layers into the hidden units. inner: what makes hidden units of
    theirs, in order; the last one is read by `down`, the layer out. hidden: number of hidden units.

    path: of the module that holds the layers.
    """

    path: str
    entry: str
    ups: tuple[str, ...]
    inner: tuple[str, ...]
    down: str
    hidden: int


def find_feed_forwards(graph: fx.GraphModule) -> tuple[FeedForward, ...]:
    """Those of blocks, on tokens: values of three dimensions, the features last. In graph order."""
    inside = {name for block in all_blocks(graph) for name in block.nodes}
    layers = [node for node in graph.graph.nodes if rewrite.is_call(node, aten.linear.default) and node.name in inside]
    return tuple(found for found in (_from_down(graph, node) for node in layers) if found is not None)


def _from_down(graph: fx.GraphModule, down: fx.Node) -> FeedForward | None:
    inner: dict[fx.Node, None] = {}
    ups: dict[fx.Node, None] = {}
    waiting = [down.args[0]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in inner or node in ups:
            continue
        if rewrite.is_call(node, aten.linear.default):
            ups[node] = None
        elif _is_inner(node):
            inner[node] = None
            waiting += node.all_input_nodes
        else:
            return None
    entries = {up.args[0] for up in ups}
    known = {*inner, down}
    leak = any(set(node.users) - known for node in (*inner, *ups))
    if not inner or not ups or len(entries) != 1 or leak or len(rewrite.shape_of(down)) != 3:
        return None
    hidden = _weight(graph, down).shape[1]
    if any(_weight(graph, up).shape[0] not in (hidden, 2 * hidden) for up in ups):
        return None
    (entry,) = entries
    assert isinstance(entry, fx.Node)
    order = [node for node in graph.graph.nodes if node in inner or node in ups]
    return FeedForward(
        _common([str(node.args[1].target) for node in (*ups, down)]),  # type: ignore[union-attr]
        entry.name,
        tuple(node.name for node in order if node in ups),
        tuple(node.name for node in order if node in inner),
        down.name,
        int(hidden),
    )


def _is_inner(node: fx.Node) -> bool:
    """What works on each hidden unit by itself, or sets the two halves of a gated layer side by side."""
    if rewrite.is_call(node, operator.getitem):
        return True
    if rewrite.is_call(node, aten.chunk.default):
        return tuple(node.args[1:]) in ((2, -1), (2, 2))
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return node.op == "call_function" and (pointwise or node.target in _THROUGH) and 0 < len(node.all_input_nodes) <= 2


def _weight(graph: fx.GraphModule, linear: fx.Node) -> Tensor:
    assert isinstance(linear.args[1], fx.Node)
    weight = linear.args[1]
    return rewrite.attribute(graph, str(weight.target)) if weight.op == "get_attr" else torch.zeros(0, 0)


def _common(paths: list[str]) -> str:
    """The module that all of these weights are inside."""
    parts = [path.split(".") for path in paths]
    same = 0
    while all(len(each) > same + 1 and each[same] == parts[0][same] for each in parts):
        same += 1
    return ".".join(parts[0][:same])


def rows_of(layer: Tensor, units: Tensor, hidden: int) -> Tensor:
    """The rows of a layer into the hidden units, [hidden or 2 * hidden, ...], that belong to some of them."""
    return layer[units] if len(layer) == hidden else torch.cat([layer[units], layer[hidden + units]])


def write_inner(module: fx.GraphModule, before: fx.Node, feed: FeedForward, ups: Mapping[str, fx.Node]) -> fx.Node:
    """The hidden values of other layers into hidden units; -> the last node."""
    made: dict[fx.Node, fx.Node] = {rewrite.node_named(module, name): node for name, node in ups.items()}
    change: Callable[[fx.Node], fx.Node] = made.__getitem__
    for name in feed.inner:
        node = rewrite.node_named(module, name)
        args = fx.node.map_arg(node.args, change)
        made[node] = rewrite.call(module, before, node.target, *args, like=node, **node.kwargs)
    return made[rewrite.node_named(module, feed.inner[-1])]


def write_units(module: fx.GraphModule, feed: FeedForward, name: str, units: Tensor, *, with_bias: bool) -> fx.Node:
    """Some hidden units as a feed-forward of their own before the layer out; -> what they add to each token.

    Its weights lie under `name` of the feed-forward's path. with_bias: the bias of the layer out too.
    """
    down = rewrite.node_named(module, feed.down)

    def linear(x: Any, layer: str, weight: Tensor, bias: Tensor | None) -> fx.Node:
        read = []
        for kind, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                path = f"{feed.path}.{name}.{layer}.{kind}"
                rewrite.assign(module, path, torch.nn.Parameter(value.detach().clone().contiguous()))
                read.append(rewrite.read_weight(module, path, down))
        return rewrite.call(module, down, aten.linear.default, x, *read, like=down)

    made = {}
    for up in feed.ups:
        node = rewrite.node_named(module, up)
        weight, bias = held(module, node)
        sliced = None if bias is None else rows_of(bias, units, feed.hidden)
        made[up] = linear(node.args[0], up, rows_of(weight, units, feed.hidden), sliced)
    hidden = write_inner(module, down, feed, made)
    weight, bias = held(module, down)
    return linear(hidden, "down", weight[:, units], bias if with_bias else None)


def run_units(graph: fx.GraphModule, feed: FeedForward, units: Tensor, x: Tensor) -> Tensor:
    """What some hidden units add to tokens [..., D], without the bias of the layer out."""
    values: dict[fx.Node, Any] = {}
    for name in feed.ups:
        up = rewrite.node_named(graph, name)
        weight, bias = held(graph, up)
        sliced = None if bias is None else rows_of(bias, units, feed.hidden)
        values[up] = torch.nn.functional.linear(x, rows_of(weight, units, feed.hidden), sliced)
    for name in feed.inner:
        node = rewrite.node_named(graph, name)
        target: Any = node.target
        values[node] = target(*fx.node.map_arg(node.args, values.__getitem__), **node.kwargs)
    weight, _ = held(graph, rewrite.node_named(graph, feed.down))
    return torch.nn.functional.linear(values[rewrite.node_named(graph, feed.inner[-1])], weight[:, units])


def held(module: fx.GraphModule, linear: fx.Node) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a linear layer."""
    found = [
        rewrite.attribute(module, str(node.target)).detach() for node in linear.args[1:] if isinstance(node, fx.Node)
    ]
    return found[0], found[1] if len(found) > 1 else None
