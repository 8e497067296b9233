"""Each rule of a plan, broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dcompile.compiler import rewrite
from dcompile.compiler.errors import PassError
from dcompile.compiler.pipeline import apply_checked
from dcompile.compiler.plan import Plan, Site, taylor
from dcompile.compiler.program import Decision, PassResult, Program, Record
from dcompile.compiler.validate import validate
from dcompile.passes.cache_steps import CacheSteps


def cached(program: Program, **options: Any) -> Program:
    return CacheSteps(**options).apply(program, Decision()).program


def with_site(program: Program, number: int = 0, **changes: Any) -> Program:
    """The program with something else about one site of its plan."""
    sites = list(program.plan.sites)
    sites[number] = replace(sites[number], **changes)
    return replace(program, plan=Plan(program.plan.steps, tuple(sites)))


def site(name: str, value: str, base: str | None, computed: tuple[bool, ...]) -> Site:
    return Site(name, value, base, computed, *taylor(computed, 0))


@pytest.mark.parametrize("options", [{"predictor": "taylor2"}, {"method": "fora"}, {"method": "delta_dit", "turn": 3}])
def test_plans_of_the_cache_pass_hold(dit: Program, options: dict[str, Any]) -> None:
    validate(dit)
    validate(cached(dit, **options))


def test_as_many_steps_as_the_sampler(dit: Program) -> None:
    with pytest.raises(PassError, match="the plan has 5 steps, the sampler 6; plan it again"):
        validate(replace(dit, plan=Plan(5)))
    short = {**dit.tables, "row": dit.tables["row"][:-1]}
    with pytest.raises(PassError, match="table 'row' has 5 rows, the sampler 6 steps"):
        validate(replace(dit, tables=short))


def test_a_row_of_each_table_for_each_step(dit: Program) -> None:
    program = cached(dit, predictor="taylor1")
    (one,) = program.plan.sites
    with pytest.raises(PassError, match=rf"table 'reuse' of cache site '{one.name}' has 4 rows, the sampler 6 steps"):
        validate(with_site(program, reuse=one.reuse[:4]))
    with pytest.raises(PassError, match=r"refresh \[6, 3\], needed \[6, states\] and \[6, states - 1\]"):
        validate(with_site(program, refresh=np.ones((6, 3), np.float32)))
    with pytest.raises(PassError, match=r"correction has shape \[6, 2, 5\], needed \[6, 2, 32\]"):
        validate(with_site(program, correction=np.ones((6, 2, 5), np.float32)))


def test_names_and_values_of_their_own(dit: Program) -> None:
    program = cached(dit, method="fora")
    first, second = program.plan.sites[:2]
    with pytest.raises(PassError, match=f"two cache sites are called '{first.name}'"):
        validate(with_site(program, 1, name=first.name))
    with pytest.raises(PassError, match=f"'{first.name}' and '{second.name}' are the same value"):
        validate(with_site(program, 1, value=first.value))
    with pytest.raises(PassError, match="the graph has no node 'nowhere', its value"):
        validate(with_site(program, value="nowhere"))
    with pytest.raises(PassError, match="overlaps 'nothing', which is no site of the plan"):
        validate(with_site(program, overlaps=("nothing",)))


def test_a_base_of_the_same_shape_that_comes_before(dit: Program) -> None:
    program = cached(dit, predictor="delta")
    with pytest.raises(PassError, match=r"its value has shape \[4, 16, 32\], its base 'sample' \[2, 4, 8, 8\]"):
        validate(with_site(program, base="sample"))
    blocks = [region.streams[0] for region in dit.regions]
    mask = (True, False, True, False, True, False)
    inner, outer = (site(str(i), blocks[i].exit, blocks[i].entry, mask) for i in (1, 2))
    validate(replace(dit, plan=Plan(6, (inner, outer))))
    with pytest.raises(PassError, match="'2' adds to the value of '1', which comes after it in the plan"):
        validate(replace(dit, plan=Plan(6, (outer, inner))))


def test_what_is_reused_was_left_behind(dit: Program) -> None:
    program = cached(dit, predictor="taylor2", interval=3, warmup=2)
    (one,) = program.plan.sites
    early = one.reuse.copy()
    early[2, 2] = 0.5  # the second difference needs three computed steps, and there were two
    with pytest.raises(PassError, match="step 2 reuses state 2, which no step before it has left behind"):
        validate(with_site(program, reuse=early))
    cut = one.refresh.copy()
    cut[1, 0] = 0.0  # no slope is worked out
    with pytest.raises(PassError, match="step 2 reuses state 1, which no step before it has left behind"):
        validate(with_site(program, refresh=cut))
    with pytest.raises(PassError, match="step 0 must compute it"):
        with_site(program, computed=(False, *one.computed[1:]))


def test_nothing_is_computed_inside_what_is_reused(dit: Program) -> None:
    blocks = [region.streams[0] for region in dit.regions]
    outer = site("outer", blocks[2].exit, blocks[0].entry, (True, False, True, False, True, False))
    inner = site("inner", blocks[1].exit, blocks[1].entry, (True, False, True, True, True, False))
    nested = replace(dit, plan=Plan(6, (inner, outer)))
    with pytest.raises(PassError, match="'inner': step 3 is to compute it inside 'outer', which it reuses; reuse both"):
        validate(nested)
    validate(with_site(nested, computed=outer.computed))  # both reused
    validate(with_site(nested, overlaps=("outer",)))  # left alone


def test_a_base_inside_what_is_reused(dit: Program) -> None:
    program = cached(dit, method="delta_dit", turn=3)
    with pytest.raises(PassError, match=r"'transformer_blocks_1_2': step 3 is to compute it inside '.*_0_1'"):
        validate(with_site(program, 1, overlaps=()))


def test_what_only_the_reused_reads_may_be_computed(program_of: Callable[[str], Program]) -> None:
    """The text that leaves FLUX's first single block: the second one reads it, whose image alone is a site."""
    program = cached(program_of("flux"), method="delta_dit", turn=2)
    validate(program)
    names = [each.name for each in program.plan.sites if each.name.startswith("single")]
    assert len(names) == 3  # two streams in front, one in the rear


def test_every_pass_is_held_to_it(dit: Program) -> None:
    class Careless:
        name = "careless"

        def apply(self, program: Program, decision: Decision, /) -> PassResult:
            found = cached(program)
            return PassResult(with_site(found, base="sample"), Record(self.name, changed=1))

    with pytest.raises(PassError, match="take a base of the same shape, or none"):
        apply_checked(Careless(), dit, Decision())  # type: ignore[arg-type]


def test_a_value_that_a_pass_removed(dit: Program) -> None:
    program = cached(dit)
    graph = rewrite.clone(program.graph)
    value = rewrite.node_named(graph, program.plan.sites[0].value)
    value._rename("renamed")
    with pytest.raises(PassError, match=f"the graph has no node '{program.plan.sites[0].value}'"):
        validate(program.with_graph(graph))
