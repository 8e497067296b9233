"""What a plan makes of the graph: identities that hold bit for bit, and the caches of diffusers as oracles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import models
import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import example_conditions
from dcompile.compiler.execute import initial_slots, run
from dcompile.compiler.flops import sample_flops
from dcompile.compiler.plan import Plan, Site, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.rewrite import placeholders, weights
from dcompile.compiler.variants import build_variant, cache_tables, state_slot
from dcompile.passes.cache_steps import CacheSteps

SEEDS = [0, 1]


def cached(program: Program, **options: Any) -> Program:
    return CacheSteps(**options).apply(program, Decision()).program


def with_computed(program: Program, computed: tuple[bool, ...], order: int = 0) -> Program:
    """The same sites with another plan."""
    reuse, refresh = taylor(computed, order)
    sites = tuple(replace(site, computed=computed, reuse=reuse, refresh=refresh) for site in program.plan.sites)
    return replace(program, plan=Plan(program.steps, sites))


def samples(program: Program) -> Any:
    return run(program, example_conditions(program.contract, len(SEEDS)), SEEDS)


def trajectory(program: Program) -> list[Any]:
    found: list[Any] = []
    conditions = example_conditions(program.contract, len(SEEDS))
    run(program, conditions, SEEDS, on_step=lambda step, sample: found.append(sample.clone()))
    return found


SITES: list[dict[str, Any]] = [
    {"site": "range", "predictor": "copy"},
    {"site": "range", "predictor": "delta"},
    {"site": "range", "predictor": "taylor2"},
    {"site": "branch", "predictor": "copy"},
    {"site": "branch", "predictor": "taylor1"},
]


# ---- identities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SITES, ids=str)
def test_every_step_computed_is_no_cache_bit_for_bit(dit: Program, options: dict[str, Any]) -> None:
    """The states are kept and refreshed, and change nothing."""
    program = with_computed(cached(dit, **options), (True,) * dit.steps, order=2 if "2" in options["predictor"] else 0)
    assert program.plan.sites
    assert torch.equal(samples(program), samples(dit))


@pytest.mark.parametrize("options", SITES, ids=str)
def test_reused_steps_differ_and_the_ones_before_do_not(dit: Program, options: dict[str, Any]) -> None:
    program = cached(dit, interval=3, warmup=3, **options)  # computed: 0, 1, 2, 5
    for step, (found, full) in enumerate(zip(trajectory(program), trajectory(dit), strict=True)):
        if step < 3:
            assert torch.equal(found, full)
        else:
            assert (found - full).abs().max() > 1e-4
    assert (samples(program) - samples(dit)).norm() < 0.5 * samples(dit).norm()  # and is still that sample


def test_cut_of_a_unet(unet: Program) -> None:
    program = cached(unet, site="cut", predictor="copy", interval=2, warmup=1)
    assert torch.equal(samples(with_computed(program, (True,) * unet.steps)), samples(unet))
    assert not torch.equal(samples(program), samples(unet))
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)
    left = set(weights(full.graph)) - set(weights(reuse.graph))
    assert any(name.startswith("net.mid_block") for name in left)
    assert not any(name.startswith(("net.up_blocks.1", "net.conv_in", "net.conv_out")) for name in left)


@pytest.mark.parametrize("options", SITES, ids=str)
def test_reuse_equals_full_where_the_cached_value_is_what_it_would_compute(
    dit: Program, options: dict[str, Any]
) -> None:
    """One step, run twice on the same inputs: computed, then reused."""
    program = with_computed(cached(dit, **options), (True, False) + (True,) * (dit.steps - 2))
    conditions = example_conditions(dit.contract, 2)
    slots = initial_slots(dit, conditions, SEEDS)
    tables = {name: table[0] for name, table in program.tables.items()}  # of step 0 in both
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)

    def call(variant: Any) -> dict[str, Any]:
        values = []
        for name, (kind, source) in variant.inputs.items():
            assert name in placeholders(variant.graph)
            values.append(tables[source] if kind == "table" else slots[source])
        return dict(zip(variant.outputs, variant.graph(*values), strict=True))

    first = call(full)
    slots |= {name: value for name, value in first.items() if ".state" in name}
    second = call(reuse)
    assert set(second) == {"sample"}
    torch.testing.assert_close(second["sample"], first["sample"], rtol=1e-5, atol=1e-5)
    if options["predictor"] == "copy":
        assert torch.equal(second["sample"], first["sample"])


def test_delta_follows_its_input_and_copy_does_not(dit: Program) -> None:
    """Step 1 reuses. A copy is what step 0 computed; a delta adds step 0's change to what enters at step 1."""
    computed = (True, False) + (True,) * (dit.steps - 2)
    entered: dict[int, Any] = {}
    left: dict[int, Any] = {}
    ((_, base),) = {(site.value, site.base) for site in cached(dit, predictor="delta").plan.sites}
    ((value, none),) = {(site.value, site.base) for site in cached(dit, predictor="copy").plan.sites}
    assert none is None

    def tap(step: int, name: str, tensor: Any) -> None:
        (entered if name == base else left).setdefault(step, tensor)

    conditions = example_conditions(dit.contract, 2)
    assert base is not None
    run(dit, conditions, SEEDS, tap=tap, taps=[base, value])
    assert not torch.equal(entered[0], entered[1])  # step 1 starts from the same sample in all three
    expected = {"copy": left[0], "delta": entered[1] + (left[0] - entered[0])}
    for predictor, reused in expected.items():
        program = with_computed(cached(dit, predictor=predictor), computed)
        full = build_variant(dit, ()).graph
        forced = torch.fx.GraphModule(full, full.graph)
        found = trajectory(program)[1]
        assert torch.equal(found, forced_step(forced, dit, conditions, value, reused, trajectory(dit)[0]))


def forced_step(module: Any, program: Program, conditions: dict[str, Any], node: str, value: Any, sample: Any) -> Any:
    """Step 1 of the program from `sample`, with the named node's value given."""

    class Forced(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            return value if n.name == node else super().run_node(n)

    slots = {"sample": sample, **{name: torch.from_numpy(given) for name, given in conditions.items()}}
    inputs = [program.tables[n][1] if n in program.tables else slots[n] for n in placeholders(module)]
    with torch.no_grad():
        return Forced(module).run(*inputs)[0]


def test_variants_share_weights_and_reuse_needs_fewer(dit: Program) -> None:
    program = cached(dit, interval=3, predictor="delta")
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)
    small, large = weights(reuse.graph), weights(full.graph)
    assert set(small) < set(large)
    assert all(small[name].data_ptr() == large[name].data_ptr() for name in small)
    gone = {name.partition("transformer_blocks.")[2][:1] for name in set(large) - set(small)}
    assert gone == {"1", "2"}  # front=1 keeps block 0
    assert sample_flops(program) < sample_flops(dit)


def test_bindings_name_every_input_and_output(dit: Program) -> None:
    program = cached(dit, interval=3, predictor="taylor1")
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)
    (site,) = program.plan.sites
    states = [state_slot(site, order) for order in range(2)]
    assert full.outputs == ("sample", *states)
    assert reuse.outputs == ("sample",)
    for variant in (full, reuse):
        assert list(variant.inputs) == list(placeholders(variant.graph))
        assert len(variant.outputs) == len(list(variant.graph.graph.nodes)[-1].args[0])
    assert [source for kind, source in full.inputs.values() if ".state" in source] == states[:1]
    assert sorted(source for kind, source in reuse.inputs.values() if ".state" in source) == states
    assert ("table", f"{site.name}.refresh") in full.inputs.values()
    assert ("table", f"{site.name}.reuse") in reuse.inputs.values()
    assert {name: tuple(table.shape) for name, table in cache_tables(program).items()} == {
        f"{site.name}.reuse": (6, 2),
        f"{site.name}.refresh": (6, 1),
    }


def test_input_that_a_reuse_step_does_not_need_is_not_asked_for(program_of: Callable[[str], Program]) -> None:
    """PixArt's text is read by the blocks alone: without them it is no input."""
    program = cached(program_of("pixart"), interval=2, predictor="copy", front=0, warmup=1)
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)
    assert "encoder_hidden_states" in full.inputs
    assert "encoder_hidden_states" not in reuse.inputs
    assert "encoder_hidden_states" not in placeholders(reuse.graph)


def test_sites_of_two_streams_and_two_lists(program_of: Callable[[str], Program]) -> None:
    program = program_of("flux")
    found = cached(program, interval=2, predictor="delta", warmup=1)
    assert [site.name for site in found.plan.sites] == [
        "transformer_blocks_1_1_stream0",
        "transformer_blocks_1_1_stream1",
        "single_transformer_blocks_1_1",
    ]
    assert torch.equal(samples(with_computed(found, (True,) * 4)), samples(program))
    assert not torch.equal(samples(found), samples(program))


@pytest.mark.parametrize("computed", [(False, False), (True, False), (False, True)])
def test_site_that_starts_where_another_ends_takes_its_cached_value(
    computed: tuple[bool, bool], program_of: Callable[[str], Program]
) -> None:
    """FLUX with front=0: the single blocks' input is the double blocks' cached output, and nothing computes those."""
    program = cached(program_of("flux"), interval=2, predictor="delta", warmup=1, front=0)
    *double, single = program.plan.sites
    assert single.base in {site.value for site in double}
    variant = build_variant(program, (computed[0],) * len(double) + (computed[1],))
    left = {name.split(".")[1] for name in weights(variant.graph) if "transformer_blocks" in name}
    lists = ("transformer_blocks", "single_transformer_blocks")
    assert left == {name for name, full in zip(lists, computed, strict=True) if full}


def test_a_site_may_be_what_the_step_returns(tokens: Program) -> None:
    """A step that reuses it returns what an earlier one did."""
    result = rewrite.output_values(tokens.graph)[0].name
    computed = (True, False, False, True, True, True)
    site = Site("result", result, None, computed, *taylor(computed, 0))
    first, second, third, *_ = trajectory(replace(tokens, plan=Plan(6, (site,))))
    assert torch.equal(first, trajectory(tokens)[0])
    assert torch.equal(first, second)
    assert torch.equal(first, third)


# ---- oracles ------------------------------------------------------------------------------------------------------


def dit_loop(network: Any, program: Program) -> list[Any]:
    """Every sample of a DiT pipeline's loop, guidance in one batch, the network as it stands with its hooks."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(program.steps)
    conditions = example_conditions(program.contract, 2)
    sample = initial_slots(program, conditions, SEEDS)["sample"]
    labels = torch.from_numpy(np.concatenate([conditions["class_labels"], [10, 10]]))
    found = []
    with torch.no_grad(), context_of(network):
        for t in scheduler.timesteps:
            output = network(torch.cat([sample, sample]), t.expand(4), class_labels=labels).sample
            given, none = output.chunk(2)
            sample = scheduler.step(none + program.contract.guidance * (given - none), t, sample).prev_sample
            found.append(sample)
    return found


@contextmanager
def context_of(network: Any) -> Iterator[None]:
    """DiT has no `cache_context` of its own."""
    _set_cache_context(network, CacheContext("both"))
    yield
    _set_cache_context(network, None)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_on_branches_is_the_taylorseer_of_diffusers(dit: Program, order: int) -> None:
    network = models.dit()
    config = TaylorSeerCacheConfig(
        cache_interval=2,  # the one interval at which its schedule is the published one
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )
    apply_taylorseer_cache(network, config)
    predictor = ("copy", "taylor1", "taylor2")[order]
    program = cached(dit, site="branch", predictor=predictor, interval=2, warmup=3)
    assert [site.name for site in program.plan.sites[:2]] == ["transformer_blocks_0_attn1", "transformer_blocks_0_ff"]
    assert not all(program.plan.sites[0].computed)
    for found, expected in zip(trajectory(program), dit_loop(network, dit), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_delta_behind_the_first_block_is_the_first_block_cache_of_diffusers(dit: Program) -> None:
    """With a threshold that nothing reaches it computes the first step and adds that step's residual ever after."""
    network = models.dit()
    apply_first_block_cache(network, FirstBlockCacheConfig(threshold=1e9))
    program = with_computed(cached(dit, site="range", predictor="delta"), (True,) + (False,) * (dit.steps - 1))
    for found, expected in zip(trajectory(program), dit_loop(network, dit), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_oracle_without_a_cache_is_the_program(dit: Program) -> None:
    for found, expected in zip(trajectory(dit), dit_loop(models.dit(), dit), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
