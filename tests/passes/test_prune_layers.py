"""Blocks that leave: the graph, the numbers of the network without them, which ones are chosen, what is left alone."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration, output_error, snapshots
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.regions import all_blocks
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.depth.removal import remove_blocks
from dcompile.passes.prune_layers import PruneLayers

CalibrationOf = Callable[[Program], Calibration]


def prune(program: Program, calibration: Any = None, **options: Any) -> Program:
    step = PruneLayers(**options)
    return step.apply(program, step.decide(program, calibration)).program


def removed(program: Program, calibration: Any = None, **options: Any) -> list[str]:
    choices = PruneLayers(**options).decide(program, calibration).choices["removed"]
    return [path.removeprefix("net.") for path in choices]


# ---- structure ----------------------------------------------------------------------------------------------------


def test_graph_without_a_block(tokens: Program, golden: Callable[[str, str], None]) -> None:
    golden("prune_layers/before", models.graph_text(tokens.graph))
    golden("prune_layers/expected", models.graph_text(prune(tokens, blocks=("blocks.1",)).graph))


def test_weights_of_the_block_leave_and_no_others(dit: Program) -> None:
    before, after = rewrite.weights(dit.graph), rewrite.weights(prune(dit, blocks=("transformer_blocks.1",)).graph)
    assert {name for name in before if name.startswith("net.transformer_blocks.1.")} == set(before) - set(after)
    assert all(after[name] is before[name] for name in after)


def test_record_says_what_left_and_why(tokens: Program, calibration_of: CalibrationOf) -> None:
    step = PruneLayers(count=2)
    decision = step.decide(tokens, calibration_of(tokens))
    record = step.apply(tokens, decision).record
    assert (record.name, record.changed) == ("prune_layers", 2)
    assert record.details["removed"] == decision.choices["removed"]
    assert list(record.details["scores"]) == record.details["removed"]
    assert all(score > 0 for score in record.details["scores"].values())


# ---- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 2), (1, 2)])
def test_program_is_the_network_without_the_blocks(tokens: Program, gone: tuple[int, ...]) -> None:
    network: Any = models.tokens()
    network.blocks = torch.nn.ModuleList(block for i, block in enumerate(network.blocks) if i not in gone)
    pruned = prune(tokens, blocks=tuple(f"blocks.{i}" for i in gone))
    assert len(all_blocks(pruned.graph)) == 3 - len(gone)
    sample, timestep, row = torch.randn(2, 6, 4), tokens.tables["timestep"][1], tokens.tables["row"][1]
    _, p, q, a, _, b = row  # flow matching leaves the sample as it is
    with torch.no_grad():
        expected = a * sample + b * (p * sample + q * network(sample, timestep.expand(2)))
    torch.testing.assert_close(pruned.graph(sample, timestep, row)[0], expected, rtol=1e-5, atol=1e-5)


def test_both_streams_pass_a_block_that_leaves(program_of: Callable[[str], Program]) -> None:
    """FLUX without its second double block and its first single block."""
    program = program_of("flux")
    network: Any = models.flux()
    del network.transformer_blocks[1]
    del network.single_transformer_blocks[0]
    pruned = prune(program, blocks=("net.transformer_blocks.1", "net.single_transformer_blocks.0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "cut_flux", lambda: network, raising=False)
        expected = ingest(Source("models:cut_flux", shape=(16, 16), sampler="flow_euler", steps=4))
    inputs = [torch.randn(2, *node.meta["val"].shape[1:]) for node in rewrite.placeholders(program.graph).values()][:3]
    inputs += [program.tables["timestep"][2], program.tables["row"][2]]
    torch.testing.assert_close(pruned.graph(*inputs)[0], expected.graph(*inputs)[0], rtol=1e-5, atol=1e-5)


# ---- which blocks -------------------------------------------------------------------------------------------------


def weakened(program: Program, block: int, by: float = 1e-3) -> Program:
    """The program with one block that does next to nothing."""
    graph = rewrite.clone(program.graph)
    for name, value in rewrite.weights(graph).items():
        if name.startswith(f"net.blocks.{block}.down"):
            rewrite.assign(graph, name, value.detach() * by)
    return replace(program, graph=graph)


@pytest.mark.parametrize("method", ["greedy", "influence"])
@pytest.mark.parametrize("weak", [0, 1, 2])
def test_block_that_does_nothing_goes_first(
    tokens: Program, calibration_of: CalibrationOf, method: str, weak: int
) -> None:
    program = weakened(tokens, weak)
    assert removed(program, calibration_of(tokens), count=1, method=method) == [f"blocks.{weak}"]
    assert removed(program, calibration_of(tokens), count=2, method=method)[0] == f"blocks.{weak}"


def test_greedy_is_the_best_choice_given_those_before(tokens: Program, calibration_of: CalibrationOf) -> None:
    """Against every choice, tried by hand."""
    calibration = calibration_of(tokens)
    paths = [block.path for block in all_blocks(tokens.graph)]
    at = snapshots(tokens, calibration, 5)
    expected = [tokens.graph(*inputs)[0] for _, inputs in at]
    alone = {path: output_error(remove_blocks(tokens, [path]), at, expected) for path in paths}
    first = min(alone, key=lambda path: alone[path])
    pairs = {
        other: output_error(remove_blocks(tokens, [first, other]), at, expected) for other in paths if other != first
    }
    second = min(pairs, key=lambda path: pairs[path])
    decision = PruneLayers(count=2).decide(tokens, calibration)
    assert decision.choices["removed"] == [first, second]
    assert decision.choices["scores"] == pytest.approx({first: alone[first], second: pairs[second]}, rel=1e-6)


def test_influence_is_one_minus_the_cosine_over_the_trajectory(tokens: Program, calibration_of: CalibrationOf) -> None:
    calibration = calibration_of(tokens)
    blocks = all_blocks(tokens.graph)
    entering: dict[str, Any] = {}
    found: dict[str, list[float]] = {block.path: [] for block in blocks}

    def tap(step: int, name: str, value: Any) -> None:
        entering[name] = value
        for block in blocks:
            if name == block.streams[0].exit:
                pair = entering[block.streams[0].entry], value
                before, after = (x.reshape(-1, 32) for x in pair)
                cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
                found[block.path].append(float(1 - cosine.mean()))

    names = [name for block in blocks for name in (block.streams[0].entry, block.streams[0].exit)]
    run(tokens, calibration.conditions, calibration.seeds, tap=tap, taps=names)
    scores = PruneLayers(count=2, method="influence").decide(tokens, calibration).choices["scores"]
    means = {path: sum(values) / 6 for path, values in found.items()}
    assert all(len(values) == 6 for values in found.values())
    assert list(scores) == sorted(means, key=lambda path: means[path])[:2]
    assert scores == pytest.approx({path: means[path] for path in scores}, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"ratio": 0.0}, 0), ({}, 0), ({"ratio": 0.17}, 1), ({"ratio": 0.5}, 2), ({"ratio": 0.9, "count": 1}, 1)],
    ids=str,
)
def test_how_many(tokens: Program, calibration_of: CalibrationOf, options: dict[str, Any], count: int) -> None:
    assert len(removed(tokens, calibration_of(tokens), method="influence", **options)) == count


def test_blocks_by_name_need_no_measuring(dit: Program) -> None:
    assert removed(dit, blocks=("net.transformer_blocks.2",)) == ["transformer_blocks.2"]
    assert removed(dit, blocks=("transformer_blocks.2", "net.transformer_blocks.2"), ratio=0.9) == [
        "transformer_blocks.2"
    ]


def test_a_full_path_is_no_ending_of_another(program_of: Callable[[str], Program]) -> None:
    assert removed(program_of("flux"), blocks=("transformer_blocks.0",)) == ["transformer_blocks.0"]


# ---- left alone, refused ------------------------------------------------------------------------------------------


def test_nothing_to_remove_is_the_same_program(tokens: Program) -> None:
    result = PruneLayers(count=0).apply(tokens, Decision({"removed": []}))
    assert result.program is tokens
    assert result.record.changed == 0


def test_stages_of_a_unet_are_left_alone(unet: Program) -> None:
    step = PruneLayers(blocks=("mid_block.resnets.0",))
    record = step.apply(unet, step.decide(unet, None)).record  # type: ignore[arg-type]
    refused = dict(record.refused)
    assert "net.up_blocks.0.upsamplers.0" in refused
    assert "net.down_blocks.0.downsamplers.0" in refused
    assert "carries no residual stream" in refused["net.up_blocks.0.upsamplers.0"]
    assert not set(refused) & {block.path for block in all_blocks(unet.graph)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "3 of 3 blocks are to go; at least one must stay: lower ratio or count"),
        ({"count": 7}, "7 of 3 blocks are to go"),
        ({"blocks": ("blocks.0", "blocks.1", "blocks.2")}, "3 of 3 blocks are to go"),
        ({"blocks": ("blocks.3",)}, "no block is called 'blocks.3'; did you mean 'net.blocks.2'?"),
        ({"blocks": ("locks.1",)}, "no block is called 'locks.1'"),
    ],
    ids=str,
)
def test_choice_that_cannot_be(tokens: Program, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PassError) as caught:
        removed(tokens, **options)
    assert str(caught.value).startswith("prune_layers: ")
    assert words in str(caught.value)


def test_name_that_several_blocks_end_in(unet: Program) -> None:
    with pytest.raises(
        PassError, match=r"blocks end in 'resnets.0': net.down_blocks.0.resnets.0, .*give the whole path"
    ):
        removed(unet, blocks=("resnets.0",))


def test_after_a_cache_pass(dit: Program) -> None:
    cached = CacheSteps(interval=2).apply(dit, Decision()).program
    with pytest.raises(PassError, match="prune_layers: the program already has cache sites; put prune before cache"):
        removed(cached, count=1)


def test_twice_is_two(tokens: Program, calibration_of: CalibrationOf) -> None:
    once = prune(tokens, calibration_of(tokens), count=1, method="influence")
    twice = prune(once, calibration_of(tokens), count=1)
    assert len(all_blocks(twice.graph)) == 1
    for first, second in itertools.pairwise([tokens, once, twice]):
        assert second.parameters < first.parameters
