"""Steps whose network reads nothing that changes run as one batch: Faster Diffusion's parallel decoder (2312.09608).

What the network makes of `count` steps is worked out ahead, in a batch of all of them: step by step within each half of
guidance, as [halves, count, batch]. Each of the steps then reads its part, and only moves the sample.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from . import rewrite
from .errors import PassError
from .execute import batch_factor
from .flops import node_flops
from .plan import Mask
from .program import Program
from .rewrite import aten
from .variants import Variant, build_variant, returning

# fixed: weights, and what follows from them. step: of a step, not of the batch. batch: of the batch, the same in every
# step. ahead: of both. moving: of the sample. size: an integer.
_Class = Literal["fixed", "step", "batch", "ahead", "moving", "size"]
_MOVING = ("sample", "history", "noise")


@dataclass(frozen=True)
class Span:
    """ahead: what the network makes of all steps of the span. update: one of its steps."""

    ahead: Variant
    update: Variant


def check_span(program: Program, mask: Mask) -> None:
    """Raises PassError where a step with this mask cannot run before its sample is known."""
    _read_ahead(program, build_variant(program, mask))


def build_span(program: Program, mask: Mask, count: int) -> Span:
    """For `count` steps in a row with this mask. Raises PassError as `check_span` does."""
    variant = build_variant(program, mask)
    kinds = _read_ahead(program, variant)
    crossing = _crossing(variant, kinds)
    slots = [f"ahead{count}.state{index}" for index in range(len(crossing))]
    ahead = _Batched(program, variant, kinds, count).build(crossing, slots)
    return Span(ahead, _update(variant, crossing, slots, count))


# ---- what does not read the sample ----------------------------------------------------------------------------------


def _read_ahead(program: Program, variant: Variant) -> dict[fx.Node, _Class]:
    """The class of each node, where the sample meets no layer."""
    if left := [slot for slot in variant.outputs if slot not in ("sample", "history")]:
        raise PassError(f"steps cannot run as one batch: each of them leaves {left[0]!r} behind; give span=1")
    kinds = _classes(variant)
    layers = [node for node in variant.graph.graph.nodes if node_flops(node) > 0]
    if moved := [node for node in layers if kinds[node] == "moving"]:
        raise PassError(
            f"steps cannot run as one batch: {moved[0].name} of a step that reuses reads the sample; give span=1, or "
            "sites that leave nothing of it to the later layers (site=encoder)"
        )
    if not any(kinds[node] == "ahead" for node in layers):
        raise PassError("steps cannot run as one batch: one that reuses has no layers left to run; give span=1")
    return kinds


def _classes(variant: Variant) -> dict[fx.Node, _Class]:
    kinds: dict[fx.Node, _Class] = {}
    for node in variant.graph.graph.nodes:
        kinds[node] = _input_class(variant, node) if node.op == "placeholder" else _class_of(node, kinds)
    return kinds


def _input_class(variant: Variant, node: fx.Node) -> _Class:
    kind, source = variant.inputs[node.name]
    return "step" if kind == "table" else "moving" if source in _MOVING else "batch"


def _class_of(node: fx.Node, kinds: Mapping[fx.Node, _Class]) -> _Class:
    if rewrite.is_size(node):
        return "size"
    sources = {kinds[source] for source in node.all_input_nodes} - {"size", "fixed"}
    if "moving" in sources:
        return "moving"
    value = rewrite.tensor_of(node)
    of_batch = bool(sources & {"batch", "ahead"}) or (
        value is not None and any(not isinstance(size, int) for size in value.shape)
    )
    of_step = bool(sources & {"step", "ahead"})
    return ("ahead" if of_batch else "step") if of_step else "batch" if of_batch else "fixed"


def _crossing(variant: Variant, kinds: Mapping[fx.Node, _Class]) -> list[fx.Node]:
    """What moves the sample by what was worked out ahead."""
    return [
        node for node in variant.graph.graph.nodes
        if kinds[node] == "ahead" and any(kinds[user] == "moving" or user.op == "output" for user in node.users)
    ]  # fmt: skip


# ---- the batch of all steps -----------------------------------------------------------------------------------------


class _Batched:
    """Writes the graph of a span, node after node: once, for each step, or for all steps together, as its class is."""

    def __init__(self, program: Program, variant: Variant, kinds: Mapping[fx.Node, _Class], count: int) -> None:
        self.halves = 1 if program.contract.guidance == 1.0 else 2
        self.variant, self.kinds, self.count = variant, kinds, count
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        for path, weight in rewrite.weights(variant.graph).items():
            rewrite.assign(self.module, path, weight)
        self.end = self.module.graph.output(())
        self.inputs: dict[str, tuple[str, str]] = {}
        self.once: dict[fx.Node, Any] = {}
        self.each: dict[fx.Node, list[fx.Node]] = {}
        self.together: dict[fx.Node, Any] = {}
        self._declare()

    def build(self, crossing: Sequence[fx.Node], slots: Sequence[str]) -> Variant:
        for node in self.variant.graph.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._write(node)
        written = [(slot, self._by_sample(node)) for slot, node in zip(slots, crossing, strict=True)]
        return returning(self.module, self.inputs, written)

    def _declare(self) -> None:
        """Every input; of a table, all rows of the span."""
        nodes = rewrite.placeholders(self.variant.graph)
        for name, node in nodes.items():
            kind, source = self.variant.inputs[name]
            of_step = kind == "table"
            with self.module.graph.inserting_before(self.end):
                made = self.once[node] = self.module.graph.placeholder(name)
            made.meta["val"] = rewrite.fake_result(self._stacked, (node,)) if of_step else node.meta["val"]
            self.inputs[name] = (kind, ahead_table(source, self.count) if of_step else source)
        for node in nodes.values():
            if self.kinds[node] == "step":
                rows = self.once.pop(node)
                self.each[node] = [self._call(aten.select.int, rows, 0, index) for index in range(self.count)]
        sample = next(node for node in nodes.values() if self._halves_of(node) == 1)
        self.samples = self._counted(aten.sym_size.int, self.once[sample], 0, rewrite.shape_of(sample)[0])

    def _stacked(self, row: Tensor) -> Tensor:
        return torch.stack([row] * self.count)

    def _write(self, node: fx.Node) -> None:
        kind = self.kinds[node]
        if kind == "size":
            self.once[node], self.together[node] = self._size(node, 1), self._size(node, self.count)
        elif node.op == "get_attr":
            self.once[node] = rewrite.read_weight(self.module, str(node.target), self.end)
        elif kind == "step":
            self.each[node] = [self._copy(node, self._of_step(index)) for index in range(self.count)]
        elif kind == "ahead":
            self.together[node] = self._copy(node, lambda source: self._together_for(node, source), self.count)
        elif kind != "moving":
            self.once[node] = self._copy(node, self.once.__getitem__)

    def _size(self, node: fx.Node, times: int) -> Any:
        value = node.meta["val"]
        if isinstance(value, int):
            return value
        factor = batch_factor(value) * times
        return self._counted(operator.mul, self.samples, factor, self.samples.meta["val"] * factor)

    def _counted(self, target: Any, one: fx.Node, other: int, value: Any) -> fx.Node:
        """Not worked out on fake values: that would settle the batch."""
        with self.module.graph.inserting_before(self.end):
            node = self.module.graph.call_function(target, (one, other))
        node.meta["val"] = value
        return node

    def _of_step(self, index: int) -> Callable[[fx.Node], Any]:
        return lambda source: self.each[source][index] if source in self.each else self.once[source]

    def _together_for(self, node: fx.Node, source: fx.Node) -> Any:
        """An argument as all steps have it."""
        kind = self.kinds[source]
        if kind == "step":
            return self._spread(node, source)
        if kind == "batch" and source not in self.together:
            self.together[source] = self._repeated(source)
        return self.once[source] if kind == "fixed" else self.together[source]

    def _repeated(self, source: fx.Node) -> fx.Node:
        """What is the same in every step, for each of them: [halves * batch, ...] -> [halves * count * batch, ...]."""
        halves, rest = self._halves_of(source), list(rewrite.shape_of(source)[1:])
        if halves is None:
            raise _not_by_sample(source)
        value = self._call(aten.reshape.default, self.once[source], [halves, 1, -1, *rest])
        value = self._call(aten.expand.default, value, [-1, self.count, *[-1] * (1 + len(rest))])
        return self._call(aten.reshape.default, value, [-1, *rest])

    def _spread(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """What a step has alone, as `node` broadcasts it over the samples: [halves * count * batch, ...]."""
        halves, rank = self._halves_of(node), len(rewrite.shape_of(node))
        shape = [*map(int, rewrite.shape_of(source))]
        row = [1] * (rank - len(shape)) + shape
        broadcasts = node.target is aten.expand.default or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if halves is None or not broadcasts or row[0] != 1:
            raise _not_by_sample(source)
        rows = [self._call(aten.reshape.default, each, [1, 1, 1, *row[1:]]) for each in self.each[source]]
        value = self._call(aten.cat.default, rows, 1)
        value = self._call(aten.expand.default, value, [halves, -1, self.samples, *[-1] * (rank - 1)])
        return self._call(aten.reshape.default, value, [-1, *row[1:]])

    def _by_sample(self, node: fx.Node) -> fx.Node:
        """A result of all steps, as a state: [halves * batch, count, ...]."""
        halves, rest = self._halves_of(node), list(rewrite.shape_of(node)[1:])
        if halves is None:
            raise _not_by_sample(node)
        value = self._call(aten.reshape.default, self.together[node], [halves, self.count, -1, *rest])
        value = self._call(aten.transpose.int, value, 1, 2)
        return self._call(aten.reshape.default, value, [-1, self.count, *rest])

    def _halves_of(self, node: fx.Node) -> int | None:
        """How often a value has each sample in its first dimension; None for one that has none there."""
        shape = rewrite.shape_of(node)
        factor = None if not shape or isinstance(shape[0], int) else batch_factor(shape[0])
        return factor if factor in (1, self.halves) else None

    def _copy(self, node: fx.Node, change: Callable[[fx.Node], Any], times: int = 1) -> fx.Node:
        """The same operator on other arguments, of so many times the samples."""
        with self.module.graph.inserting_before(self.end):
            made = self.module.graph.node_copy(node, change)
        made.meta["val"] = tree_map(lambda value: _widened(value, times), node.meta["val"])
        return made

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return rewrite.call(self.module, self.end, target, *args)


def _widened(value: Any, times: int) -> Any:
    """Not worked out on fake values: some operators would settle the batch."""
    if times == 1 or not isinstance(value, Tensor):
        return value
    return value.new_empty([size if isinstance(size, int) else size * times for size in value.shape])


def _not_by_sample(node: fx.Node) -> PassError:
    return PassError(
        f"steps cannot run as one batch: {node.name} of shape {list(rewrite.shape_of(node))} has no samples in its "
        "first dimension to stand beside those of other steps; give span=1"
    )


# ---- a step of the span ---------------------------------------------------------------------------------------------


def _update(variant: Variant, crossing: Sequence[fx.Node], slots: Sequence[str], count: int) -> Variant:
    """The step with its part of what was worked out ahead."""
    module, inputs = rewrite.clone(variant.graph), dict(variant.inputs)
    place = rewrite.add_input(module, f"place{count}", torch.zeros(count))
    inputs[place.name] = ("table", _place(count))
    for index, (slot, node) in enumerate(zip(slots, crossing, strict=True)):
        value = rewrite.node_named(module, node.name)
        example = rewrite.fake_result(lambda one: torch.stack([one] * count, dim=1), (value,))
        parts = rewrite.add_input(module, f"ahead{count}_{index}", example)
        inputs[parts.name] = ("slot", slot)
        shape = [count] + [1] * (len(rewrite.shape_of(value)) - 1)
        bits = rewrite.call(module, value, aten.reshape.default, place, shape)
        own = rewrite.call(module, value, aten.mul.Tensor, parts, bits)
        rewrite.change_call(value, aten.sum.dim_IntList, own, [1])
    return returning(module, inputs, list(zip(variant.outputs, rewrite.output_values(module), strict=True)))


# ---- tables ---------------------------------------------------------------------------------------------------------


def ahead_table(name: str, count: int) -> str:
    """The table whose rows have `count` rows of another, from its own on."""
    return f"{name}.ahead{count}"


def _place(count: int) -> str:
    return f"place{count}"


def span_tables(tables: Mapping[str, Tensor], spans: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What the graphs of these spans, (first step, count), read beside the tables of the steps: float32 [steps, ...].

    Of each table all rows of a span in the row of its first step, and the place of each step in its span.
    """
    found: dict[str, Tensor] = {}
    for first, count in spans:
        for name, table in tables.items():
            rows = found.setdefault(ahead_table(name, count), table.new_zeros((len(table), count, *table.shape[1:])))
            rows[first] = table[first : first + count]
        steps = len(next(iter(tables.values())))
        place = found.setdefault(_place(count), torch.zeros(steps, count))
        place[first : first + count] = torch.eye(count)
    return found
