"""What a model, a plan or a bundle is, as trees and tables for a terminal.

Nothing is measured, and no weight of a bundle is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table
from rich.tree import Tree

from ..compiler.errors import PassError
from ..compiler.flops import node_flops
from ..compiler.ingest import Source, ingest
from ..compiler.plan import Plan
from ..compiler.program import Decision, Program
from ..compiler.recipe import Recipe, options_of
from ..compiler.regions import Region
from ..compiler.rewrite import attribute
from ..passes import PASSES, SHORT_NAMES
from ..passes.caching.methods import METHODS
from ..runtime.manifest import Call, Contract, Jump, Manifest, Slot, read, verify
from .build import check_recipe, inputs_of, source_of
from .bundle import check_output
from .report import human
from .settings import Settings


def model_tree(
    model: str, shape: tuple[int, ...] | None, contract: Path | None, sampler: str | None, trust_pickle: bool
) -> Tree:
    """Regions with parameters and operations a sample, nested as they are in the network."""
    return program_tree(ingest(Source(model, shape, contract, sampler, trust_pickle=trust_pickle)))


def program_tree(program: Program) -> Tree:
    nodes = {node.name: node for node in program.graph.graph.nodes}
    total = sum(node_flops(node) for node in nodes.values())
    tree = Tree(f"[bold]{escape(program.name)}[/bold]  {_size(program.parameters, total)} a step")
    tree.add(contract_line(program.contract))
    tree.add(f"sampler {program.sampler.name}, ring {program.sampler.ring}")
    regions = tree.add("regions")
    for region in program.regions:
        _add_region(regions, region, program, nodes)
    return tree


def contract_line(contract: Contract) -> str:
    shape = "x".join(str(size) for size in contract.sample.shape)
    conditions = ", ".join(
        f"{c.name} ({c.classes} classes)" if c.classes is not None else f"{c.name} {list(c.shape)}"
        for c in contract.conditions
    )
    return (
        f"sample {shape}, predicts {contract.predicts}, {contract.steps} steps, guidance {contract.guidance:g}, "
        f"batch {contract.batch.min}..{contract.batch.max}, conditions: {conditions or 'none'}"
    )


def _add_region(tree: Tree, region: Region, program: Program, nodes: Mapping[str, Any]) -> None:
    own = [nodes[name] for name in region.nodes]
    paths = {str(source.target) for node in own for source in node.all_input_nodes if source.op == "get_attr"}
    parameters = sum(attribute(program.graph, path).numel() for path in paths)
    kind = "block" if region.is_block else "stage" if region.children else "layer"
    branches = [branch.name for stream in region.streams for branch in stream.branches] if region.is_block else []
    size = _size(parameters, sum(map(node_flops, own)))
    text = f"{region.path.removeprefix('net.')}  [dim]{region.module_class}[/dim]  {kind}  {size}"
    child = tree.add(text + (f"  [dim]{' + '.join(branches)}[/dim]" if branches else ""))
    for inner in region.children:
        _add_region(child, inner, program, nodes)


def _size(parameters: int, flops: float) -> str:
    return f"{human(parameters)} parameters, {human(flops, 'flops')}"


def plan_tree(model: str, output: Path, recipe: Recipe, settings: Settings) -> Tree:
    """What a build would do, after all of its checks: the model as read, and each pass with all of its options."""
    checked = check_recipe(recipe, settings)
    passes = checked.passes
    check_output(output, settings.force, inputs_of(model, recipe))
    program = ingest(source_of(model, recipe, settings))
    tree = Tree(f"[bold]{escape(model)}[/bold] -> {escape(str(output))}  (dry run: nothing is measured or written)")
    tree.add(contract_line(program.contract))
    steps = tree.add("passes") if passes else tree.add("no passes: the model as it is")
    for step in passes:
        given = {name: value for name, value in options_of(step).items() if value is not None}
        options = ", ".join(f"{name}={value}" for name, value in given.items())
        branch = steps.add(f"[bold]{step.name}[/bold]  {options}".rstrip())
        if step.name == "cache_steps":
            branch.add(_plan_line(program, step))
    measured = (
        f"{recipe.eval_samples} samples and a timing against the uncompressed model" if settings.evaluate else "nothing"
    )
    tree.add(f"calibration on {recipe.calibration_samples} samples; evaluation: {measured}")
    limits = ", ".join(f"{gate.metric}{gate.op}{gate.limit:g}" for gate in checked.gates)
    tree.add(f"judge {recipe.judge if checked.judge else 'none'}; gates: {limits or 'none'}")
    made = f"target {recipe.target}, {checked.options.precision}, layout {recipe.layout}"
    tree.add(f"{made}; kept results in {settings.cache or 'nowhere'}")
    return tree


def _plan_line(program: Program, step: Any) -> str:
    try:
        plan: Plan = step.apply(program, Decision()).program.plan
    except PassError as error:
        return str(error)
    full = [i for i in range(plan.steps) if all(plan.mask(i))]
    names = ", ".join(site.name for site in plan.sites[:3]) + (", ..." if len(plan.sites) > 3 else "")
    return f"{len(plan.sites)} {'site' if len(plan.sites) == 1 else 'sites'} ({names}); full steps: {full}"


def bundle_tree(path: Path, check: bool) -> Tree:
    """What is in a bundle, from its manifest alone; with `check`, every file is compared with its checksum too."""
    manifest = read(path)
    if check:
        verify(path, manifest)
    total = sum(file.bytes for file in manifest.files.values())
    tree = Tree(
        f"[bold]{escape(manifest.name)}[/bold]  target {manifest.target}, {human(total, 'bytes')}, "
        f"written by dcompile {manifest.dcompile}"
    )
    tree.add(contract_line(manifest.contract))
    kinds = _kinds_of_steps(manifest)
    decides = any(isinstance(row, Jump) for row in manifest.script)
    calls = sum(len(names) * len(steps) for names, steps in kinds.items())
    engines = tree.add("engines" if decides else f"engines ({calls} calls a sample)")
    for name, engine in manifest.engines.items():
        size = human(manifest.files[engine.file].bytes, "bytes")
        count = sum(isinstance(row, Call) and row.call == name for row in manifest.script)
        most = "up to " if decides else ""
        engines.add(f"{name}  {most}{count} calls  [dim]{engine.file}, {size}[/dim]")
    script = tree.add(f"script ({manifest.contract.steps} steps{', some decide what they run' if decides else ''})")
    for engine_names, steps in kinds.items():
        script.add(f"{len(steps)} x {' + '.join(engine_names)}  [dim]steps {_ranges(steps)}[/dim]")
    files = tree.add("files" + (" (all match their checksums)" if check else ""))
    for name, file in manifest.files.items():
        files.add(f"{name}  {human(file.bytes, 'bytes')}")
    tree.add("made with " + ", ".join(f"{name} {version}" for name, version in manifest.tools.items()))
    return tree


def _kinds_of_steps(manifest: Manifest) -> dict[tuple[str, ...], list[int]]:
    """The calls that make up a step -> the steps that make these calls, or may: a step that decides has several."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    waiting: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]  # row of the script, step, calls of it so far
    seen = set()
    while waiting:
        position, step, calls = waiting.pop()
        if position >= len(manifest.script) or (position, step, calls) in seen:
            continue
        seen.add((position, step, calls))
        row = manifest.script[position]
        if isinstance(row, Jump):
            waiting += [(row.jump, step, calls), (position + 1, step, calls)]
        elif Slot("sample") in manifest.engines[row.call].outputs.values():
            steps = kinds.setdefault((*calls, row.call), [])
            steps += [step] if step not in steps else []
            following = position + 1
            while following < len(manifest.script) and isinstance(past := manifest.script[following], Jump):
                following = past.jump  # past the other ways to end the step
            waiting.append((following, step + 1, ()))
        else:
            waiting.append((position + 1, step, (*calls, row.call)))
    return {names: sorted(steps) for names, steps in kinds.items()}


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def bench_table(found: Mapping[str, Any]) -> Table:
    bundle = Column("bundle", overflow="fold")
    table = Table(bundle, "latency", "a step", "samples/s", "speed-up", "cold load", "peak memory", "on disk")
    for name, row in found["bundles"].items():
        least, most = human(row["latency_min_s"], "s"), human(row["latency_max_s"], "s")
        table.add_row(
            escape(name),
            f"{human(row['latency_s'], 's')}  [dim]{least}..{most}[/dim]",
            human(row["step_s"], "s"),
            human(row["samples_per_s"]),
            f"{row['speedup']:.2f}",
            human(row["load_s"], "s"),
            human(row["peak_rss_bytes"], "bytes"),
            human(row["bundle_bytes"], "bytes"),
        )
    return table


def passes_table() -> Table:
    short = {full: name for name, full in SHORT_NAMES.items()}
    table = Table("pass", "short", "options and defaults", "what it does", show_lines=True)
    for name, cls in PASSES.items():
        defaults = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
        options = "\n".join(f"{name}={value!r}" for name, value in defaults.items() if value is not None)
        if unset := [name for name, value in defaults.items() if value is None]:
            options += f"\n{', '.join(unset)}"
        table.add_row(name, short.get(name, ""), options, (cls.__doc__ or "").strip().split("\n\n")[0])
    return table


def methods_table() -> Table:
    """The published cache methods: what each does, where it comes from, what ours is verified against."""
    table = Table("method", "what it caches, and when", "source", "verified against", show_lines=True)
    for name, method in METHODS.items():
        does = method.does + (f"\n[dim]ours: {method.reconstructed}[/dim]" if method.reconstructed else "")
        table.add_row(f"[bold]{name}[/bold]\n{method.title}", does, method.source, method.checked)
    table.caption = "as in --passes cache:method=fora,interval=4; `dcompile passes` lists the options"
    return table
