"""Remove whole blocks from the residual stream."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..compiler import rewrite
from ..compiler.calibrate import Calibration, output_error, snapshots
from ..compiler.errors import PassError, RecipeError
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.regions import Region, all_blocks
from ..runtime.errors import did_you_mean

_SNAPSHOTS = 5


@dataclass(frozen=True)
class PruneLayers:
    """Take out the blocks that matter least: each output of such a block becomes the residual stream that entered it.

    ratio: part of the blocks to remove, 0 to 1. count: how many, in place of ratio. blocks: which, by module path, in
    place of both.
    method: "greedy" removes, one at a time, the block whose absence changes the step's output least (measured on the
    trajectory); "influence" ranks all blocks once by 1 - cos(input, output) (ShortGPT's block influence, 2403.03853,
    averaged over steps).

    Left alone: (1) regions with an output that carries no residual stream (U-Net stages that change the shape), (2) the
    last block that is left. Must run before cache_steps, whose sites name blocks.
    """

    name: ClassVar[str] = "prune_layers"

    ratio: float = 0.1
    count: int | None = None
    method: Literal["greedy", "influence"] = "greedy"
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise RecipeError(f"prune_layers: ratio is {self.ratio}, needed 0 to 1")
        if self.count is not None and self.count < 0:
            raise RecipeError(f"prune_layers: count is {self.count}, needed 0 or more")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        if program.plan.sites:
            raise PassError("prune_layers: the program already has cache sites; put prune before cache")
        blocks = all_blocks(program.graph)
        named = list(dict.fromkeys(_named(blocks, name).path for name in self.blocks))
        wanted = self.count if self.count is not None else int(self.ratio * len(blocks) + 0.5)
        if named:
            wanted = len(named)
        if wanted > max(0, len(blocks) - 1):
            raise PassError(
                f"prune_layers: {wanted} of {len(blocks)} blocks are to go; "
                "at least one must stay: lower ratio or count"
            )
        if named or wanted == 0:
            return Decision({"removed": named})
        choose = _greedy if self.method == "greedy" else _by_influence
        removed, scores = choose(program, calibration, blocks, wanted)
        return Decision({"removed": removed, "scores": scores})

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        removed = list(decision.choices["removed"])
        graph = remove_blocks(program, removed).graph if removed else program.graph
        refused = tuple(
            (region.path, "an output carries no residual stream; without the region the shapes do not fit")
            for top in program.regions
            for region in top.walk()
            if not region.is_block and not region.children
        )
        details = {"removed": removed, "scores": decision.choices.get("scores", {})}
        record = Record(self.name, changed=len(removed), refused=refused, details=details)
        return PassResult(program.with_graph(graph) if removed else program, record)


def remove_blocks(program: Program, paths: list[str]) -> Program:
    graph = rewrite.clone(program.graph)
    blocks = {region.path: region for region in all_blocks(graph)}
    # From the last to the first: an entry that is an earlier block's exit must still be there when it is named.
    for path in sorted(paths, key=lambda path: -list(blocks).index(path)):
        for stream in blocks[path].streams:
            exit_node = rewrite.node_named(graph, stream.exit)
            exit_node.replace_all_uses_with(rewrite.node_named(graph, stream.entry))
    return program.with_graph(rewrite.finish(graph))


def _named(blocks: tuple[Region, ...], name: str) -> Region:
    found = [region for region in blocks if f".{region.path}".endswith(f".{name}")]
    exact = [region for region in found if region.path in (name, f"net.{name}")] or found
    if len(exact) == 1:
        return exact[0]
    if exact:
        paths = ", ".join(region.path for region in exact)
        raise PassError(f"prune_layers: {len(exact)} blocks end in {name!r}: {paths}; give the whole path of one")
    raise PassError(
        f"prune_layers: no block is called {name!r}; {did_you_mean(name, [region.path for region in blocks])}"
    )


def _greedy(
    program: Program, calibration: Calibration, blocks: tuple[Region, ...], wanted: int
) -> tuple[list[str], dict[str, float]]:
    at = snapshots(program, calibration, _SNAPSHOTS)
    with torch.no_grad():
        expected = [program.graph(*inputs)[0] for _, inputs in at]
    removed: list[str] = []
    scores: dict[str, float] = {}
    left = [region.path for region in blocks]
    trials = sum(len(left) - i for i in range(wanted))
    done = 0
    for _ in range(wanted):
        errors = {}
        for path in left:
            errors[path] = output_error(remove_blocks(program, [*removed, path]), at, expected)
            done += 1
            calibration.progress(done / trials, f"pruning: trying without {path}")
        best = min(errors, key=lambda path: errors[path])
        removed.append(best)
        left.remove(best)
        scores[best] = errors[best]
    return removed, scores


def _by_influence(
    program: Program, calibration: Calibration, blocks: tuple[Region, ...], wanted: int
) -> tuple[list[str], dict[str, float]]:
    ends = {name for region in blocks for stream in region.streams for name in (stream.entry, stream.exit)}
    by_entry = defaultdict(list)
    for region in blocks:
        for stream in region.streams:
            by_entry[stream.exit].append((stream.entry, region.path))
    values: dict[str, Tensor] = {}
    totals: dict[str, list[float]] = defaultdict(list)

    def tap(step: int, name: str, value: Tensor) -> None:
        values[name] = value
        for entry, path in by_entry.get(name, ()):
            cosine = torch.nn.functional.cosine_similarity(values[entry].flatten(2), value.flatten(2), dim=-1)
            totals[path].append(1.0 - float(cosine.mean()))

    calibration.observe(program, sorted(ends), tap, "pruning: block influence")
    scores = {path: sum(found) / len(found) for path, found in totals.items()}
    removed = sorted(scores, key=lambda path: scores[path])[:wanted]
    return removed, {path: scores[path] for path in removed}
