"""Find the structure of a network in its graph: blocks, their residual streams, and the branches that feed those.

A *region* is what one item of a ModuleList computes. It is a *block* when it carries a residual stream (an output that
is an input plus something) and a *stage* otherwise (a U-Net's down or up stage, whose shapes change); stages nest
blocks. Regions are found from the module paths that torch.export leaves on the nodes, and from repeated structure where
there are none.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .repeats import CLASS as REPEAT_CLASS
from .repeats import lend_paths
from .rewrite import aten, hint, is_call, shape_of, tensor_of

# Unary calls through which a residual stream is still the same stream.
_CARRIERS = (aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.dropout.default, aten.alias.default)


@dataclass(frozen=True)
class Branch:
    """One term added to a residual stream.

    name: path of the submodule that made it, relative to the region ("attn1", "ff").
    update: node that is added. value: the same before its gate (equal to `update` where there is none). add: the
    addition.
    """

    name: str
    update: str
    value: str
    add: str


@dataclass(frozen=True)
class Stream:
    """A residual stream through a region: node names at its entry and exit, and the branches added on the way."""

    entry: str
    exit: str
    branches: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Region:
    path: str
    module_class: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    streams: tuple[Stream, ...]
    children: tuple[Region, ...] = ()

    @property
    def is_block(self) -> bool:
        """Every output carries a stream of its own, so the region can be taken out and the network still runs."""
        entries = {stream.entry for stream in self.streams}
        return len(entries) == len(self.streams) == len(self.outputs) > 0

    def stream_into(self, output: str) -> Stream | None:
        return next((stream for stream in self.streams if stream.exit == output), None)

    def walk(self) -> Iterator[Region]:
        yield self
        for child in self.children:
            yield from child.walk()


def find_regions(module: fx.GraphModule) -> tuple[Region, ...]:
    """The outermost regions of a graph, in the order in which they run."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    if any(module_path(node) for node in calls):
        return _find(calls, depth=0)
    members: dict[str, list[fx.Node]] = defaultdict(list)
    for node, path in lend_paths(calls).items():
        members[path].append(node)
    found = (_region(path, REPEAT_CLASS, nodes) for path, nodes in members.items())
    return tuple(region for region in found if region is not None)


def all_blocks(module: fx.GraphModule) -> tuple[Region, ...]:
    """Every block of the graph, nested ones too, in the order in which they run."""
    return tuple(region for top in find_regions(module) for region in top.walk() if region.is_block)


def block_lists(regions: tuple[Region, ...]) -> dict[str, list[Region]]:
    """Top-level blocks by the list that holds them, in order."""
    lists: dict[str, list[Region]] = {}
    for region in regions:
        if region.is_block:
            lists.setdefault(region.path.rpartition(".")[0], []).append(region)
    return lists


def find_prediction(module: fx.GraphModule) -> tuple[fx.Node, fx.Node | None] | None:
    """What the network predicts, both halves of guidance, and the sample as it is given to it, if there is one alike.

    None for a graph that does not say which modules its nodes come from.
    """
    # The outermost module is the step, whose own calls are guidance and the sampler's update.
    inside = [node for node in module.graph.nodes if node.op == "call_function" and len(module_path(node)) > 1]
    members = set(inside)
    leaving = [node for node in inside if tensor_of(node) is not None and set(node.users) - members]
    if not leaving:
        return None
    value = leaving[-1]
    given = {source for node in inside for source in node.all_input_nodes if source not in members}
    # A network that also predicts a variance is cut to the first half outside.
    for found in (value, *(value.users if len(value.users) == 1 else ())):
        like = [
            node for node in given
            if node.op != "get_attr" and tensor_of(node) is not None and shape_of(node) == shape_of(found)
        ]  # fmt: skip
        if len(like) == 1:
            return found, like[0]
    return value, None


def module_path(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """((path, class), ...) of the modules whose call made this node, outermost first; each repeated call has a path."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for key, (path, cls) in stack.items():
        call = key.partition("@")[2]
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        found.append((f"{path}@{call}" if call and "@" not in path else path, name))
    return tuple(found)


def _find(calls: Sequence[fx.Node], depth: int) -> tuple[Region, ...]:
    members: dict[str, list[fx.Node]] = defaultdict(list)
    classes: dict[str, str] = {}
    for node in calls:
        items = [(path, cls) for path, cls in module_path(node) if path.split("@")[0].rpartition(".")[2].isdigit()]
        if len(items) > depth:
            path, classes[path] = items[depth]
            members[path].append(node)
    regions = []
    for path, nodes in members.items():
        region = _region(path, classes[path], nodes)
        if region is None:
            continue
        if not region.is_block:
            region = replace(region, children=_find(nodes, depth + 1))
        regions.append(region)
    return tuple(regions)


def _region(path: str, module_class: str, nodes: Sequence[fx.Node]) -> Region | None:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr" and tensor_of(source) is not None:
                inputs[source] = None
    outputs = [n for n in nodes if tensor_of(n) is not None and any(user not in inside for user in n.users)]
    if not outputs or not inputs:
        return None
    streams = [stream for output in outputs if (stream := _stream(output, inputs, inside, path)) is not None]
    return Region(
        path=path,
        module_class=module_class.rpartition(".")[2],
        nodes=tuple(n.name for n in nodes),
        inputs=tuple(n.name for n in inputs),
        outputs=tuple(n.name for n in outputs),
        streams=tuple(streams),
    )


def _stream(output: fx.Node, inputs: dict[fx.Node, None], inside: set[fx.Node], path: str) -> Stream | None:
    """Follow the additions from an output back to an input of the same shape."""
    found = _follow(output, inputs, inside, path)
    if found is not None:
        entry, branches = found
        return Stream(entry.name, output.name, branches)
    joined = _joined_entry(output, inputs, inside, path)
    return Stream(joined.name, output.name) if joined is not None else None


def _joined_entry(output: fx.Node, inputs: dict[fx.Node, None], inside: set[fx.Node], path: str) -> fx.Node | None:
    """The input in an output's place where streams are joined, updated as one, and cut apart: FLUX's single blocks."""
    cut = _cut_from(output)
    if cut is None:
        return None
    source, dim, start = cut
    found = _follow(source, {node: None for node in inside if is_call(node, aten.cat.default)}, inside, path)
    if found is None:
        return None
    parts, *axis = found[0].args
    assert isinstance(parts, list | tuple)
    if (axis[0] if axis else 0) != dim:
        return None
    offset = 0
    for part in parts:
        assert isinstance(part, fx.Node)
        if offset == start and part in inputs and shape_of(part) == shape_of(output):
            return part
        offset += hint(shape_of(part)[dim])
    return None


def _cut_from(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(what it is a slice or a split of, along which dimension, from where); None for what is neither."""
    if is_call(node, aten.slice.Tensor) and len(node.args) > 2:
        source, dim, start = node.args[:3]
        if isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(start, int):
            return source, dim, start % hint(shape_of(source)[dim])
    split: Any = node.args[0] if is_call(node, operator.getitem) else None
    if isinstance(split, fx.Node) and is_call(split, aten.split_with_sizes.default):
        given: tuple[Any, ...] = split.args
        source, sizes, *axis = given
        return source, axis[0] if axis else 0, sum(sizes[: node.args[1]])
    return None


def _follow(
    node: fx.Node, inputs: dict[fx.Node, None], inside: set[fx.Node], path: str
) -> tuple[fx.Node, tuple[Branch, ...]] | None:
    if node in inputs:
        return node, ()
    if node not in inside:
        return None
    if is_call(node, *_CARRIERS) or (is_call(node, aten.div.Tensor) and not isinstance(node.args[1], fx.Node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _follow(source, inputs, inside, path)
    if not is_call(node, aten.add.Tensor):
        return None
    terms = [term for term in node.args if isinstance(term, fx.Node) and shape_of(term) == shape_of(node)]
    for index, term in enumerate(terms):
        if len(terms) != 2:
            return None
        found = _follow(term, inputs, inside, path)
        if found is not None:
            update = terms[1 - index]
            value = _before_gate(update)
            branch = Branch(_owner(value, path), update.name, value.name, node.name)
            return found[0], (*found[1], branch)
    return None


def _before_gate(update: fx.Node) -> fx.Node:
    """The larger factor of `gate * value` where the gate is broadcast over the tokens; the update itself otherwise."""
    if not is_call(update, aten.mul.Tensor):
        return update
    factors = [factor for factor in update.args if isinstance(factor, fx.Node) and tensor_of(factor) is not None]
    if len(factors) != 2:
        return update
    small, large = sorted(factors, key=_elements)
    return large if _elements(small) < _elements(large) and shape_of(large) == shape_of(update) else update


def _elements(node: fx.Node) -> int:
    return int(torch.Size([hint(size) for size in shape_of(node)]).numel())


def _owner(node: fx.Node, path: str) -> str:
    """The submodule of the region that made the node, by its first path component ("attn1")."""
    prefix = path + "."
    for candidate, _ in module_path(node):
        if candidate.startswith(prefix):
            return candidate[len(prefix) :].split(".")[0]
    source = node.args[0] if node.args else None
    return _owner(source, path) if isinstance(source, fx.Node) else "update"
