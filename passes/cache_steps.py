"""Unroll the sampler's steps into those that compute the costly regions and those that reuse what came before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx

from ..compiler import rewrite
from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError, RecipeError
from ..compiler.plan import Plan, Site, every, taylor
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.regions import Region, find_regions

_ORDERS = {"copy": 0, "delta": 0, "taylor1": 1, "taylor2": 2}


@dataclass(frozen=True)
class CacheSteps:
    """Static interval caching on sites found in the graph.

    interval: one step in so many is computed in full; 1 computes all.
    warmup, last: so many first and last steps are computed in full.
    predictor: "copy" of the value; "delta" (value minus the region's input, added to the current input); "taylor1",
    "taylor2": extrapolation from the last computed steps (TaylorSeer, 2503.06923), of the delta for a range of blocks,
    else of the value.
    site: "range" is the run of blocks between the first `front` and the last `back` of each block list (Delta-DiT,
    TeaCache); "branch" each attention or feed-forward before its gate (FORA, 2407.01425); "cut" the U-Net feature that
    enters the last up stage (DeepCache, 2312.00858); "auto" is "cut" for a network with stages, else "range".

    Left alone: (1) lists of blocks that are no longer than front + back, (2) streams that do not run through the whole
    range, (3) everything, where the options compute every step.
    """

    name: ClassVar[str] = "cache_steps"

    interval: int = 3
    warmup: int = 2
    last: int = 0
    predictor: Literal["copy", "delta", "taylor1", "taylor2"] = "taylor1"
    site: Literal["auto", "range", "branch", "cut"] = "auto"
    front: int = 1
    back: int = 0

    def __post_init__(self) -> None:
        for option, least in (("interval", 1), ("warmup", 1), ("last", 0), ("front", 0), ("back", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"cache_steps: {option} is {getattr(self, option)}, needed {least} or more")
        if self.site in ("branch", "cut") and self.predictor == "delta":
            raise RecipeError(
                f"cache_steps: predictor 'delta' needs site 'range' (a {self.site} has no input of the same shape); "
                "use copy or taylor1"
            )

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        return Decision()

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        if program.plan.sites:
            raise PassError("cache_steps: the program already has cache sites; one cache pass a recipe")
        refused: list[tuple[str, str]] = []
        computed = every(self.interval, program.steps, self.warmup, self.last)
        if all(computed):
            given = f"interval {self.interval}, warmup {self.warmup} and last {self.last}"
            why = f"{given} compute all {program.steps} steps"
            return PassResult(program, Record(self.name, refused=(("every site", why),)))
        reuse, refresh = taylor(computed, _ORDERS[self.predictor])
        sites = tuple(
            Site(name, value, base, computed, reuse, refresh)
            for name, value, base in _told_apart(self._sites(program.graph, refused))
        )
        if not sites:
            raise PassError(
                f"cache_steps: found no site of kind {self.site!r} in {program.name}; "
                "`dcompile inspect` shows its regions"
            )
        plan = Plan(program.steps, sites)
        details = {
            "sites": [site.name for site in sites],
            "computed_steps": [i for i, full in enumerate(computed) if full],
        }
        return PassResult(
            replace(program, plan=plan), Record(self.name, changed=len(sites), refused=tuple(refused), details=details)
        )

    def _sites(self, graph: fx.GraphModule, refused: list[tuple[str, str]]) -> Iterator[tuple[str, str, str | None]]:
        """(name, value node, base node or None) of each site, in graph order."""
        regions = find_regions(graph)
        kind = self.site
        if kind == "auto":
            kind = "cut" if any(region.children for region in regions) else "range"
        if kind == "range":
            yield from self._ranges(regions, refused)
        elif kind == "branch":
            yield from _branches(regions)
        else:
            yield from _cut(graph, regions)

    def _ranges(
        self, regions: tuple[Region, ...], refused: list[tuple[str, str]]
    ) -> Iterator[tuple[str, str, str | None]]:
        keeps_delta = self.predictor != "copy"
        for parent, blocks in block_lists(regions).items():
            inner = blocks[self.front : len(blocks) - self.back]
            if not inner:
                refused.append(
                    (parent, f"has {len(blocks)} blocks; front {self.front} and back {self.back} leave none to cache")
                )
                continue
            first, last = inner[0], inner[-1]
            label = f"{_short(parent)}_{_index(first)}_{_index(last)}"
            for number, stream in enumerate(last.streams):
                entry = _entry_of(inner, stream.exit)
                if entry is None:
                    refused.append((last.path, f"output {stream.exit} carries no stream through all of {label}"))
                    continue
                name = label if len(last.streams) == 1 else f"{label}_stream{number}"
                yield name, stream.exit, entry if keeps_delta else None


def _told_apart(sites: Iterable[tuple[str, str, str | None]]) -> Iterator[tuple[str, str, str | None]]:
    """The sites, with a number at the end of a name that came before: a block may use one of its modules twice."""
    times: Counter[str] = Counter()
    for name, value, base in sites:
        times[name] += 1
        yield name if times[name] == 1 else f"{name}_{times[name]}", value, base


def block_lists(regions: tuple[Region, ...]) -> dict[str, list[Region]]:
    """Top-level blocks by the list that holds them, in order."""
    lists: dict[str, list[Region]] = {}
    for region in regions:
        if region.is_block:
            lists.setdefault(region.path.rpartition(".")[0], []).append(region)
    return lists


def _entry_of(blocks: list[Region], output: str) -> str | None:
    """Follow a stream from the last block's exit back to the first block's entry."""
    for region in reversed(blocks):
        stream = region.stream_into(output)
        if stream is None:
            return None
        output = stream.entry
    return output


def _branches(regions: tuple[Region, ...]) -> Iterator[tuple[str, str, str | None]]:
    for top in regions:
        for region in top.walk():
            if not region.is_block:
                continue
            for number, stream in enumerate(region.streams):
                for branch in stream.branches:
                    suffix = f"_stream{number}" if len(region.streams) > 1 else ""
                    yield f"{_short(f'{region.path}.{branch.name}')}{suffix}", branch.value, None


def _cut(graph: fx.GraphModule, regions: tuple[Region, ...]) -> Iterator[tuple[str, str, str | None]]:
    """The stage output that enters the last stage, past the deepest part of the network: its other inputs are skips."""
    stages = [region for region in regions if region.children]
    if len(stages) < 2:
        return
    before, last = stages[-2], stages[-1]
    names = [name for name in last.inputs if name in before.outputs]
    if names and rewrite.tensor_of(rewrite.node_named(graph, names[0])) is not None:
        yield f"{_short(before.path)}_output", names[0], None


def _short(path: str) -> str:
    return path.removeprefix("net.").replace(".", "_").replace("@", "_")


def _index(region: Region) -> str:
    return region.path.rpartition(".")[2]
