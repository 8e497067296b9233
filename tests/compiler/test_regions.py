"""Blocks, their streams and branches, in seven architectures; a block that is taken out leaves a network that runs."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from models import ARCHITECTURES

from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import run
from dcompile.compiler.program import Program
from dcompile.compiler.regions import Region, all_blocks, find_regions
from dcompile.passes.depth.removal import remove_blocks

ProgramOf = Callable[[str], Program]
# Blocks by the list that holds them: (class, number, residual streams of the first, branches of each of these streams).
TRANSFORMERS: dict[str, dict[str, tuple[str, int, int, list[list[str]]]]] = {
    "dit": {"net.transformer_blocks": ("BasicTransformerBlock", 3, 1, [["attn1", "ff"]])},
    "pixart": {"net.transformer_blocks": ("BasicTransformerBlock", 2, 1, [["attn1", "attn2", "ff"]])},
    "sd3": {"net.transformer_blocks": ("JointTransformerBlock", 3, 2, [["attn", "ff"], ["attn", "ff_context"]])},
    "flux": {
        "net.transformer_blocks": ("FluxTransformerBlock", 2, 2, [["attn", "ff"], ["attn", "ff_context"]]),
        "net.single_transformer_blocks": ("FluxSingleTransformerBlock", 2, 2, [[], []]),
    },
    "wan": {"net.blocks": ("WanTransformerBlock", 2, 1, [["attn1", "attn2", "ffn"]])},
}


def parent(region: Region) -> str:
    return region.path.rpartition(".")[0]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_blocks_are_found_by_list_with_their_streams_and_branches(name: str, program_of: ProgramOf) -> None:
    regions = find_regions(program_of(name).graph)
    assert all(region.is_block for region in regions)
    assert Counter(map(parent, regions)) == {path: number for path, (_, number, _, _) in TRANSFORMERS[name].items()}
    for path, (cls, number, streams, branches) in TRANSFORMERS[name].items():
        blocks = [region for region in regions if parent(region) == path]
        assert [block.path for block in blocks] == [f"{path}.{i}" for i in range(number)]
        assert {block.module_class for block in blocks} == {cls}
        assert len(blocks[0].streams) == streams
        assert [[branch.name for branch in stream.branches] for stream in blocks[0].streams] == branches


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_streams_run_from_block_to_block(name: str, program_of: ProgramOf) -> None:
    regions = find_regions(program_of(name).graph)
    for before, after in pairwise(regions):
        assert {stream.entry for stream in after.streams} <= {stream.exit for stream in before.streams}


def test_last_block_of_two_streams_may_end_one(program_of: ProgramOf) -> None:
    assert [len(block.streams) for block in find_regions(program_of("sd3").graph)] == [2, 2, 1]
    assert [len(block.streams) for block in find_regions(program_of("flux").graph)] == [2, 2, 2, 1]


def test_value_of_a_branch_is_before_its_gate(program_of: ProgramOf) -> None:
    program = program_of("dit")
    nodes = {node.name: node for node in program.graph.graph.nodes}
    attention, feed_forward = find_regions(program.graph)[0].streams[0].branches
    for branch in (attention, feed_forward):
        update, value = nodes[branch.update], nodes[branch.value]
        assert update.target is torch.ops.aten.mul.Tensor
        assert value in update.all_input_nodes
        assert update in nodes[branch.add].all_input_nodes
    assert nodes[feed_forward.value].target is torch.ops.aten.linear.default


def test_value_of_a_branch_without_a_gate_is_its_update(program_of: ProgramOf) -> None:
    cross_attention = find_regions(program_of("pixart").graph)[0].streams[0].branches[1]
    assert cross_attention.name == "attn2"
    assert cross_attention.value == cross_attention.update


@pytest.mark.parametrize(
    ("name", "stages", "blocks"),
    [
        (
            "unet2d",
            {"net.down_blocks.0": 2, "net.down_blocks.1": 2, "net.up_blocks.0": 5, "net.up_blocks.1": 2},
            [
                *("down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.0"),
                *("mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.0.attentions.0"),
                "up_blocks.0.attentions.1",
            ],
        ),
        (
            "unet_condition",
            {"net.down_blocks.0": 3, "net.down_blocks.1": 1, "net.up_blocks.0": 3, "net.up_blocks.1": 4},
            [
                *("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "mid_block.resnets.0"),
                *("mid_block.attentions.0", "mid_block.resnets.1", "up_blocks.1.attentions.0"),
                "up_blocks.1.attentions.1",
            ],
        ),
    ],
)
def test_unet_has_stages_that_nest_blocks(
    name: str, stages: dict[str, int], blocks: list[str], program_of: ProgramOf
) -> None:
    regions = find_regions(program_of(name).graph)
    assert {region.path: len(region.children) for region in regions if region.children} == stages
    assert [block.path.removeprefix("net.") for block in all_blocks(program_of(name).graph)] == blocks
    for region in regions:
        assert not (region.is_block and region.children)
        assert all(child.path.startswith(f"{region.path}.") for child in region.children)
        assert {name for child in region.children for name in child.nodes} <= set(region.nodes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_region_boundaries_are_true(name: str, program_of: ProgramOf) -> None:
    nodes = {node.name: node for node in program_of(name).graph.graph.nodes}
    for top in find_regions(program_of(name).graph):
        for region in top.walk():
            inside = {nodes[n] for n in region.nodes}
            for output in region.outputs:
                assert nodes[output] in inside
                assert any(user not in inside for user in nodes[output].users)
            for source in region.inputs:
                assert nodes[source] not in inside
                assert any(user in inside for user in nodes[source].users)
            for stream in region.streams:
                assert stream.entry in region.inputs
                assert stream.exit in region.outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_any_one_block_the_network_still_runs(name: str, program_of: ProgramOf) -> None:
    program = program_of(name)
    conditions = example_conditions(program.contract, 1)
    full = run(program, conditions, [0])
    blocks = all_blocks(program.graph)
    assert blocks
    for block in blocks:
        smaller = remove_blocks(program, [block.path])
        assert block.path not in {left.path for left in all_blocks(smaller.graph)}
        assert smaller.parameters < program.parameters
        sample = run(smaller, conditions, [0])
        assert sample.shape == full.shape
        assert not torch.equal(sample, full)  # else the block did nothing, and this test shows nothing


def test_all_blocks_can_go_at_once(program_of: ProgramOf) -> None:
    program = program_of("flux")
    empty = remove_blocks(program, [block.path for block in all_blocks(program.graph)])
    assert all_blocks(empty.graph) == ()
    assert run(empty, example_conditions(program.contract, 1), [0]).shape == (1, 16, 16)


def traced(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    with torch.no_grad():
        return torch.export.export(module, inputs).module()


def test_layer_that_only_keeps_the_shape_is_no_block() -> None:
    """Taken out, its output would be its input: for `h + layer(h)` that doubles h in place of leaving it."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = hidden + layer(hidden)
            return hidden

    regions = find_regions(traced(Network(), torch.randn(2, 3, 8)))
    assert [region.path for region in regions] == ["layers.0", "layers.1"]
    assert all_blocks(traced(Network(), torch.randn(2, 3, 8))) == ()


@pytest.mark.parametrize("cut", ["slice", "split"])
def test_streams_of_equal_length_that_are_joined_and_cut_apart_are_told_by_their_place(cut: str) -> None:
    class Joined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(8, 8)

        def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            both = torch.cat([text, image], dim=1)
            both = both + self.mix(both)
            if cut == "split":
                text, image = both.split([3, 3], dim=1)
                return text, image
            return both[:, :-3], both[:, -3:]

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Joined() for _ in range(2))

        def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for block in self.blocks:
                text, image = block(text, image)
            return text * 2, image * 3

    first, second = find_regions(traced(Network(), torch.randn(2, 3, 8), torch.randn(2, 3, 8)))
    assert first.is_block
    assert [stream.entry for stream in first.streams] == ["text", "image"]
    assert [stream.entry for stream in second.streams] == [stream.exit for stream in first.streams]
