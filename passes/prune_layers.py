"""Remove whole blocks from the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..compiler.calibrate import Calibration
from ..compiler.errors import PassError, RecipeError
from ..compiler.program import Decision, PassResult, Program, Record
from ..compiler.regions import Region, all_blocks, block_lists, find_regions
from ..runtime.errors import did_you_mean
from .depth.removal import remove_blocks
from .depth.scores import Chosen, by_greedy_error, by_influence, by_magnitude
from .depth.tinyfusion import search_depth


@dataclass(frozen=True)
class PruneLayers:
    """Take out the blocks that matter least: each output of such a block becomes the residual stream that entered it.

    ratio: part of the blocks to remove, 0 to 1. count: how many, in place of ratio. blocks: which, by module path, in
    place of both.
    method: "greedy" removes, one at a time, the block whose absence changes the step's output least (measured on the
    trajectory); "influence" ranks all blocks once by 1 - cos(input, output) (ShortGPT's block influence, 2403.03853,
    averaged over steps); "magnitude" by their mean absolute weight; "tinyfusion" learns which `keep` of each `of`
    blocks in a row to keep, over `steps` of training on `batch` samples, as they would be after recovery (2412.01199).
    A `recover` pass after it does that. seed: of what it draws.

    Left alone: (1) regions with an output that carries no residual stream (U-Net stages that change the shape), (2) the
    last block that is left. Must run before cache_steps, whose sites name blocks.
    """

    name: ClassVar[str] = "prune_layers"

    ratio: float = 0.1
    count: int | None = None
    method: Literal["greedy", "influence", "magnitude", "tinyfusion"] = "greedy"
    blocks: tuple[str, ...] = ()
    keep: int = 1
    of: int = 2
    steps: int = 400
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise RecipeError(f"prune_layers: ratio is {self.ratio}, needed 0 to 1")
        if self.count is not None and self.count < 0:
            raise RecipeError(f"prune_layers: count is {self.count}, needed 0 or more")
        if not 1 <= self.keep <= self.of:
            raise RecipeError(f"prune_layers: keep is {self.keep} of {self.of} blocks, needed 1 to {self.of}")
        for option, least in (("steps", 1), ("batch", 4), ("seed", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"prune_layers: {option} is {getattr(self, option)}, needed {least} or more")

    def decide(self, program: Program, calibration: Calibration, /) -> Decision:
        if program.plan.sites:
            raise PassError("prune_layers: the program already has cache sites; put prune before cache")
        blocks = all_blocks(program.graph)
        if self.method == "tinyfusion" and not self.blocks:
            return self._searched(program, calibration)
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
        removed, scores = self._scored(program, calibration, blocks, wanted)
        return Decision({"removed": removed, "scores": scores})

    def _scored(self, program: Program, calibration: Calibration, blocks: tuple[Region, ...], wanted: int) -> Chosen:
        if self.method == "magnitude":
            return by_magnitude(program, blocks, wanted)
        choose = by_greedy_error if self.method == "greedy" else by_influence
        return choose(program, calibration, blocks, wanted)

    def _searched(self, program: Program, calibration: Calibration) -> Decision:
        if self.keep == self.of:
            return Decision({"removed": []})
        lists = block_lists(find_regions(program.graph))
        blocks = [block for found in lists.values() for block in found]
        if not blocks:
            raise PassError(
                "prune_layers: tinyfusion needs blocks in a row, and the network has none; `dcompile inspect` shows "
                "its regions"
            )
        if uneven := [(path, len(found)) for path, found in lists.items() if len(found) % self.of]:
            path, count = uneven[0]
            raise PassError(
                f"prune_layers: the {count} blocks of {path} are no groups of {self.of}; choose another `of`"
            )
        search = search_depth(program, blocks, self.keep, self.of, calibration, self.steps, self.batch, self.seed)
        removed = [block.path for place, block in enumerate(blocks) if place not in search.kept]
        return Decision({"removed": removed, "likely": list(search.likely), "loss": [*map(list, search.curve)]})

    def apply(self, program: Program, decision: Decision, /) -> PassResult:
        removed = list(decision.choices["removed"])
        graph = remove_blocks(program, removed).graph if removed else program.graph
        refused = tuple(
            (region.path, "an output carries no residual stream; without the region the shapes do not fit")
            for top in program.regions
            for region in top.walk()
            if not region.is_block and not region.children
        )
        details = {"removed": removed, **{name: each for name, each in decision.choices.items() if name != "removed"}}
        record = Record(self.name, changed=len(removed), refused=refused, details=details)
        return PassResult(program.with_graph(graph) if removed else program, record)


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
