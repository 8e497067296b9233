"""Blocks of graphs whose nodes carry no module paths."""

from collections.abc import Callable

import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.program import Program
from dcompile.compiler.regions import all_blocks
from dcompile.passes.depth.removal import remove_blocks

ProgramOf = Callable[[str], Program]


def without_paths(program: Program) -> Program:
    graph = rewrite.clone(program.graph)
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return program.with_graph(graph)


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_structure_alone_tells_the_same_streams_as_paths(name: str, program_of: ProgramOf) -> None:
    program = program_of(name)
    named, bare = all_blocks(program.graph), all_blocks(without_paths(program).graph)
    assert [region.path for region in bare] == [f"repeat.{i}" for i in range(len(named))]
    ends = [[(stream.entry, stream.exit) for stream in region.streams] for region in bare]
    assert ends == [[(stream.entry, stream.exit) for stream in region.streams] for region in named]


def test_such_a_block_can_be_taken_out(program_of: ProgramOf) -> None:
    program = without_paths(program_of("dit"))
    smaller = remove_blocks(program, ["repeat.1"])
    assert smaller.parameters < program.parameters


def test_a_graph_that_repeats_nothing_has_no_blocks() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin().cos().exp()

    module = torch.export.export(Plain(), (torch.ones(2),)).module()
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert all_blocks(module) == ()
