"""Which sites are found, on which steps they are computed, what the graphs become, and what is left alone or refused.

That the numbers are those of the published methods is shown in tests/compiler/test_variants.py, with diffusers' caches.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError, RecipeError
from dcompile.compiler.execute import run
from dcompile.compiler.program import Decision, PassResult, Program
from dcompile.compiler.regions import all_blocks, find_regions
from dcompile.compiler.variants import build_variant
from dcompile.passes.cache_steps import CacheSteps

ProgramOf = Callable[[str], Program]


def cache(program: Program, **options: Any) -> PassResult:
    step = CacheSteps(**options)
    return step.apply(program, step.decide(program, Calibration({}, (), program, torch.zeros(0))))


def names(result: PassResult) -> list[str]:
    return [site.name for site in result.program.plan.sites]


# ---- sites --------------------------------------------------------------------------------------------------------


def test_range_is_the_blocks_between_front_and_back(dit: Program) -> None:
    streams = [region.streams[0] for region in find_regions(dit.graph)]
    for front, back, name in [(1, 0, "1_2"), (0, 0, "0_2"), (0, 2, "0_0"), (1, 1, "1_1")]:
        (site,) = cache(dit, front=front, back=back, predictor="delta").program.plan.sites
        assert site.name == f"transformer_blocks_{name}"
        assert (site.base, site.value) == (streams[front].entry, streams[2 - back].exit)


def test_copy_has_no_base_and_the_others_of_a_range_have(dit: Program) -> None:
    bases = {predictor: cache(dit, predictor=predictor).program.plan.sites[0].base for predictor in PREDICTORS}
    assert bases["copy"] is None
    assert bases["delta"] == bases["taylor1"] == bases["taylor2"] is not None


PREDICTORS = {"copy": 1, "delta": 1, "taylor1": 2, "taylor2": 3}


@pytest.mark.parametrize(("predictor", "states"), PREDICTORS.items())
def test_states_by_predictor(dit: Program, predictor: str, states: int) -> None:
    (site,) = cache(dit, predictor=predictor).program.plan.sites
    assert site.states == states
    assert site.reuse.shape == (6, states)
    assert site.refresh.shape == (6, states - 1)


def test_branches_are_attention_and_feed_forward_before_their_gates(dit: Program) -> None:
    result = cache(dit, site="branch")
    assert names(result) == [f"transformer_blocks_{i}_{branch}" for i in range(3) for branch in ("attn1", "ff")]
    for site in result.program.plan.sites:
        assert site.base is None
        user = next(iter(rewrite.node_named(dit.graph, site.value).users))
        assert rewrite.is_call(user, rewrite.aten.mul.Tensor)  # the gate


def test_branches_of_two_streams_are_told_apart(program_of: ProgramOf) -> None:
    found = names(cache(program_of("sd3"), site="branch"))
    assert found[:4] == [
        "transformer_blocks_0_attn_stream0",
        "transformer_blocks_0_ff_stream0",
        "transformer_blocks_0_attn_stream1",
        "transformer_blocks_0_ff_context_stream1",
    ]
    assert found[-2:] == ["transformer_blocks_2_attn", "transformer_blocks_2_ff"]


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan", "unet2d", "unet_condition"])
def test_the_output_is_the_networks_and_its_base_what_the_network_is_given(program_of: ProgramOf, name: str) -> None:
    program = program_of(name)
    (site,) = cache(program, site="output", predictor="delta").program.plan.sites
    value, base = (rewrite.node_named(program.graph, str(each)) for each in (site.value, site.base))
    scale, sample = (rewrite.node_named(program.graph, each) for each in ("select", "sample"))
    assert base.args == (sample, scale)  # s * x
    assert rewrite.shape_of(value) == rewrite.shape_of(sample)
    (converted,) = value.users
    assert converted.args[1].args[:3] == (rewrite.node_named(program.graph, "row"), 0, 2)  # type: ignore[union-attr]


def test_module_that_a_block_uses_twice_makes_two_sites(tokens: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(models.TokenBlock):
        def forward(self, hidden: Any) -> Any:
            return super().forward(super().forward(hidden))

    from dcompile.compiler.network import NetworkSpec
    from dcompile.compiler.step_graph import Step, export_step

    network = models.Tokens(blocks=1)
    network.blocks[0] = Twice(in_place=False)
    spec = NetworkSpec(sample="x", timestep="sigma", sample_shape=(6, 4), predicts="flow")
    graph = export_step(Step(models.randomise(network), spec, tokens.sampler, 1.0))
    result = cache(replace(tokens, graph=graph), site="branch", interval=2)
    assert names(result) == ["blocks_0_down", "blocks_0_down_1"]
    assert run(result.program, {}, [0]).shape == (1, 6, 4)


def test_cut_is_what_enters_the_last_stage_from_below(unet: Program) -> None:
    (site,) = cache(unet).program.plan.sites
    assert site.name == "cut1"
    assert site.base is None
    _, *_, before, last = find_regions(unet.graph)
    assert (before.path, last.path) == ("net.up_blocks.0", "net.up_blocks.1")
    assert site.value in before.outputs
    assert site.value in last.inputs
    assert len(last.inputs) > 1  # the skips, which every step computes


@pytest.mark.parametrize(("name", "kind"), [("dit", "range"), ("unet2d", "cut"), ("unet_condition", "cut")])
def test_auto_is_a_cut_where_there_are_stages(name: str, kind: str, program_of: ProgramOf) -> None:
    program = program_of(name)
    assert names(cache(program)) == names(cache(program, site=kind))


# ---- plan, record, graphs -----------------------------------------------------------------------------------------


def test_record_and_plan(dit: Program) -> None:
    result = cache(dit, interval=3, warmup=1, last=1)
    assert result.record.changed == 1
    assert result.record.details == {
        "method": "interval",
        "sites": ["transformer_blocks_1_2"],
        "computed_steps": [0, 3, 5],
    }
    assert result.program.graph is dit.graph
    (site,) = result.program.plan.sites
    assert [step for step, computed in enumerate(site.computed) if computed] == [0, 3, 5]
    assert dit.plan.sites == ()


@pytest.mark.parametrize("which", ["full", "reuse"])
def test_graph_of_a_step(tokens: Program, golden: Callable[[str, str], None], which: str) -> None:
    program = cache(tokens, predictor="taylor1", interval=2).program
    variant = build_variant(program, (which == "full",))
    golden(f"cache_steps/{which}", models.graph_text(variant.graph))


def test_longer_intervals_drift_further(dit: Program, calibration_of: Any) -> None:
    calibration = calibration_of(dit)
    errors = [calibration.error(cache(dit, interval=n, warmup=1).program)["relative_error"] for n in (1, 2, 5)]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5


# ---- left alone, refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"interval": 1}, {"interval": 3, "warmup": 6}, {"interval": 9, "last": 5}], ids=str
)
def test_nothing_to_reuse_is_the_same_program(dit: Program, options: dict[str, Any]) -> None:
    result = cache(dit, **options)
    assert result.program is dit
    assert result.record.changed == 0
    ((what, why),) = result.record.refused
    assert what == "every site"
    assert "compute all 6 steps" in why


def test_lists_too_short_for_front_and_back(program_of: ProgramOf) -> None:
    with pytest.raises(PassError, match="found no site of kind 'range' in flux; `dcompile inspect` shows its regions"):
        cache(program_of("flux"), site="range", front=2)


def test_one_short_list_among_others_is_named(unet: Program) -> None:
    result = cache(unet, site="range", interval=2)
    assert names(result) == ["mid_block_resnets_1_1"]
    assert dict(result.record.refused) == {
        "net.mid_block.attentions": "has 1 blocks; front 1 and back 0 leave none to cache"
    }


def test_network_without_blocks(tokens: Program) -> None:
    from dcompile.passes.depth.removal import remove_blocks

    bare = remove_blocks(tokens, [block.path for block in all_blocks(tokens.graph)])
    for site in ("auto", "range", "branch", "cut"):
        with pytest.raises(PassError, match=f"found no site of kind '{site}' in tokens"):
            cache(bare, site=site)


def test_network_without_stages_has_no_cut(dit: Program) -> None:
    with pytest.raises(PassError, match="found no site of kind 'cut'"):
        cache(dit, site="cut")


def test_second_cache_pass(dit: Program) -> None:
    once = cache(dit, interval=2).program
    with pytest.raises(PassError, match="cache_steps: the program already has cache sites; one cache pass a recipe"):
        CacheSteps().apply(once, Decision())


@pytest.mark.parametrize("site", ["branch", "cut"])
def test_delta_needs_an_input_of_the_same_shape(site: Any) -> None:
    with pytest.raises(RecipeError, match=f"predictor 'delta' needs site 'range' \\(a {site} has no input"):
        CacheSteps(site=site, predictor="delta")
