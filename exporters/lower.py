"""Program -> engines and script: as whole graphs, one for each distinct row of the plan, or as pieces of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..compiler import rewrite
from ..compiler.execute import batch_factor
from ..compiler.plan import Mask, Plan
from ..compiler.program import Program
from ..compiler.segments import build_segments
from ..compiler.spans import build_span, span_tables
from ..compiler.variants import Variant, build_probe, build_variant, cache_tables
from ..runtime.manifest import Call, Dim, Jump, StateSpec
from .branching import step_rows

Layout = Literal["variants", "segments"]
MOST_VARIANTS = 3  # whole graphs that are worth it: where engines share weights, each still packs some for itself


@dataclass(frozen=True)
class Lowered:
    """What an exporter writes.

    engines: name -> graph with its bindings, in order of first call. tables: float32 [steps, ...].
    calls_a_step: mean over steps, as is to be expected where they decide themselves.
    """

    engines: Mapping[str, Variant]
    script: tuple[Call | Jump, ...]
    states: Mapping[str, StateSpec]
    tables: Mapping[str, Tensor]
    layout: Layout = "variants"
    calls_a_step: float = 1.0


@dataclass(frozen=True)
class Choice:
    """A layout, why in one sentence, and per layout: engines, bytes of weights as stored, engine calls a step."""

    layout: Layout
    reason: str
    figures: Mapping[str, Any]


def lower(program: Program, layout: Layout = "variants") -> Lowered:
    """Variants: engines are called "full" (every site computed), "reuse" (none), and "mixed1", ... for the rest.

    Where steps run as one batch, "ahead2", "ahead3", ... do so, and "update2", ... are what is left of each.
    Segments: "head", "finish", and between them the sites' names; a step calls several.
    """
    engines, paths = _variants(program) if layout == "variants" else _segments(program)
    script: list[Call | Jump] = []
    calls = 0
    for step in range(program.steps):
        wanted = {mask: paths(step, mask) for mask in program.plan.possible(step)}
        calls += len(wanted[program.plan.mask(step)])
        script += step_rows(program.plan, engines, wanted, step, len(script))
    tables = {**program.tables, **cache_tables(program)}
    if layout == "variants":
        tables |= span_tables(tables, program.plan.spans)
    read = {source for engine in engines.values() for kind, source in engine.inputs.values() if kind == "table"}
    states = {slot: spec for engine in engines.values() for slot, spec in _states(engine).items()}
    kept = {name: table for name, table in tables.items() if name in read}
    return Lowered(engines, tuple(script), states, kept, layout, calls / program.steps)


def choose_layout(program: Program, shares_weights: bool, layout: str = "auto") -> Choice:
    """The layout that is asked for; for "auto", variants where they are few and share weights, segments otherwise."""
    names: tuple[Layout, Layout] = ("variants", "segments")
    figures: dict[str, Any] = {name: _figures(lower(program, name), shares_weights) for name in names}
    count = len(program.plan.masks)
    few = shares_weights and count <= MOST_VARIANTS and not program.plan.predicates
    wins: Layout = "variants" if count == 1 or few or program.plan.spans else "segments"
    chosen = next((name for name in names if name == layout), wins)
    if count == 1:
        return Choice(chosen, "one engine, because every step computes the same", figures)
    variants, segments = (_spelled(figures[name]) for name in names)
    other = f"segments would take {segments}" if chosen == "variants" else f"variants would take {variants}"
    why = "as asked" if layout != "auto" else _why(program.plan, shares_weights)
    return Choice(chosen, f"{chosen}, {why}: {variants if chosen == 'variants' else segments}; {other}", figures)


def _why(plan: Plan, shares_weights: bool) -> str:
    kinds = len(plan.masks)
    if plan.spans:
        return "because steps run as one batch"
    if not shares_weights:
        return "because engines of this target each store their own weights"
    if plan.predicates:
        return "because what a step decides by is then computed once"
    few = f"because {kinds} kinds of steps share one copy of the weights"
    return (
        few if kinds <= MOST_VARIANTS else f"because {kinds} kinds of steps are more than {MOST_VARIANTS} whole graphs"
    )


def _spelled(figures: Mapping[str, float]) -> str:
    engines, calls = int(figures["engines"]), figures["calls_a_step"]
    made = f"{engines} {'engine' if engines == 1 else 'engines'} of {figures['weight_bytes'] / 1e6:.3g} MB"
    return f"{made}, {'1 call' if calls == 1 else f'{calls:.3g} calls'} a step"


def _figures(lowered: Lowered, shares_weights: bool) -> dict[str, float]:
    """engines; weight_bytes that they store, once where they share; calls_a_step, the mean over steps."""
    held = [rewrite.weights(engine.graph) for engine in lowered.engines.values()]
    stored = [{name: value for weights in held for name, value in weights.items()}] if shares_weights else held
    stored_bytes = sum(value.nbytes for weights in stored for value in weights.values())
    return {
        "engines": len(lowered.engines), "weight_bytes": stored_bytes, "calls_a_step": lowered.calls_a_step
    }  # fmt: skip


Engines = Mapping[str, Variant]
Paths = Callable[[int, Mask], tuple[str, ...]]  # (step, mask) -> the engines that the step calls if it has that mask


def _variants(program: Program) -> tuple[Engines, Paths]:
    plan = program.plan
    names = engine_names(plan.masks)
    spans = {first + i: (first, count) for first, count in plan.spans for i in range(count)}
    alone = {mask for step in range(plan.steps) if step not in spans for mask in plan.possible(step)}
    engines = {name: build_variant(program, mask) for mask, name in names.items() if mask in alone}

    def path(step: int, mask: Mask) -> tuple[str, ...]:
        if step in spans:
            begins, count = spans[step]
            ahead, update = f"ahead{count}", f"update{count}"
            if ahead not in engines:
                built = build_span(program, mask, count)
                engines[ahead], engines[update] = built.ahead, built.update
            return (ahead, update) if step == begins else (update,)
        first = known = plan.possible(step)[0]
        called = []
        for predicate in plan.open(step):
            name = f"probe_{predicate.name}" + (f"_{names[known]}" if known != first else "")
            if name not in engines:
                engines[name] = build_probe(program, known, predicate)
            called.append(name)
            known = plan.decided(known, predicate, plan.computes(mask, predicate))
        return (*called, names[mask])

    return engines, path


def _segments(program: Program) -> tuple[Engines, Paths]:
    segments = build_segments(program)
    return segments.engines, lambda step, mask: segments.calls[mask]


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
