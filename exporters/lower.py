"""Program -> engines and script: one whole graph for each distinct row of the plan, and the rows that call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.execute import batch_factor
from ..compiler.plan import Mask
from ..compiler.program import Program
from ..compiler.rewrite import aten
from ..compiler.variants import Variant, build_variant, cache_tables
from ..runtime.manifest import Call, Dim, Jump, StateSpec


@dataclass(frozen=True)
class Lowered:
    """What an exporter writes.

    engines: name -> graph with its bindings, in order of first call. tables: float32 [steps, ...].
    """

    engines: Mapping[str, Variant]
    script: tuple[Call | Jump, ...]
    states: Mapping[str, StateSpec]
    tables: Mapping[str, Tensor]


def lower(program: Program) -> Lowered:
    """Engines are called "full" (every site computed), "reuse" (none), and "mixed1", ... for the rest."""
    names = engine_names(program.plan.masks)
    engines = {name: build_variant(program, mask) for mask, name in names.items()}
    script = tuple(Call(names[program.plan.mask(step)], step) for step in range(program.steps))
    tables = {**program.tables, **cache_tables(program)}
    read = {source for engine in engines.values() for kind, source in engine.inputs.values() if kind == "table"}
    states = {slot: spec for engine in engines.values() for slot, spec in _states(engine).items()}
    return Lowered(engines, script, states, {name: table for name, table in tables.items() if name in read})


def engine_names(masks: tuple[Mask, ...]) -> dict[Mask, str]:
    names: dict[Mask, str] = {}
    for mask in masks:
        names[mask] = "full" if all(mask) else "reuse" if not any(mask) else f"mixed{len(names)}"
    return names


def _states(engine: Variant) -> dict[str, StateSpec]:
    """Slots that the engine takes and that no user gives: cache states and the sampler's history."""
    found = {}
    nodes = rewrite.placeholders(engine.graph)
    for name, (kind, slot) in engine.inputs.items():
        if kind == "slot" and (slot == "history" or ".state" in slot):
            found[slot] = state_spec(nodes[name])
    return found


def state_spec(node: fx.Node) -> StateSpec:
    example = rewrite.tensor_of(node)
    assert example is not None
    dims: tuple[Dim, ...] = tuple(
        size if isinstance(size, int) else ("batch", batch_factor(size)) for size in example.shape
    )
    return StateSpec(dims, str(example.dtype).removeprefix("torch."))


def transpose_linear_weights(module: fx.GraphModule) -> fx.GraphModule:
    """linear(x, W [N, K], b) -> matmul(x, W' [K, N]) + b, W' under the weight's own name.

    Runtimes multiply by [K, N]: a transposition left in the graph would be folded at load into a private copy.
    """
    module = rewrite.clone(module)
    readers: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    for node in list(module.graph.nodes):
        if not rewrite.is_call(node, aten.linear.default):
            continue
        x, weight, *rest = node.args
        assert isinstance(weight, fx.Node)
        path = str(weight.target)
        if weight.op != "get_attr" or readers[path] > 1:
            continue
        transposed = rewrite.attribute(module, path).detach().t().contiguous()
        rewrite.assign(module, path, transposed)
        weight.meta["val"] = transposed
        product = rewrite.call(module, node, aten.matmul.default, x, weight, like=node)
        if rest and rest[0] is not None:
            product = rewrite.call(module, node, aten.add.Tensor, product, rest[0], like=node)
        node.replace_all_uses_with(product)
    return rewrite.finish(module)


def dynamic_shapes(module: fx.GraphModule, max_batch: int) -> tuple[dict[int, torch.export.Dim] | None, ...]:
    """For torch.export: which dimension of each input is the batch (or a multiple of it)."""
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    shapes: list[dict[int, torch.export.Dim] | None] = []
    for node in rewrite.placeholders(module).values():
        example = rewrite.tensor_of(node)
        assert example is not None
        dims = {i: size for i, size in enumerate(example.shape) if not isinstance(size, int)}
        shapes.append({i: batch if batch_factor(s) == 1 else batch_factor(s) * batch for i, s in dims.items()} or None)
    return tuple(shapes)
