"""Pieces of a step: together the variant, operator for operator; apart, no weight twice and nothing computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.execute import run
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.plan import Plan, Site, taylor
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.rewrite import aten
from dcompile.compiler.segments import Segments, build_segments
from dcompile.compiler.units import TINY_BYTES
from dcompile.compiler.variants import Variant, build_variant
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import Layout, Lowered, lower
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.quantize import Quantize
from dcompile.runtime.manifest import Call

HEAVY = (aten.linear.default, aten.conv2d.default, aten.scaled_dot_product_attention.default, aten.embedding.default)
SEEDS = [0, 1]


def cached(program: Program, **options: Any) -> Program:
    return CacheSteps(**{"interval": 2, "warmup": 1, **options}).apply(program, Decision()).program


def with_columns(program: Program, columns: Mapping[str, tuple[bool, ...]] | tuple[tuple[bool, ...], ...]) -> Program:
    """The same sites, each with a plan of its own: by name, or in order."""
    sites = []
    for index, site in enumerate(program.plan.sites):
        computed = columns[site.name] if isinstance(columns, Mapping) else columns[index]
        reuse, refresh = taylor(computed, site.states - 1)
        sites.append(replace(site, computed=computed, reuse=reuse, refresh=refresh))
    return replace(program, plan=Plan(program.steps, tuple(sites)))


def conditions_of(program: Program, batch: int) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(0)
    return {
        each.name: generator.integers(each.classes, size=batch)
        if each.classes is not None
        else generator.normal(size=(batch, *each.shape)).astype(each.dtype)
        for each in program.contract.conditions
    }


def check(program: Program) -> Segments:
    """Everything that segments promise, on this program; -> them."""
    segments = build_segments(program)
    variants = {mask: build_variant(program, mask) for mask in program.plan.masks}
    check_weights(segments, variants.values())
    for calls in segments.calls.values():
        check_order([segments.engines[name] for name in calls], segments, program)
    conditions = conditions_of(program, len(SEEDS))
    layouts: tuple[Layout, ...] = ("variants", "segments")
    whole, pieces = (Ran(program, lower(program, layout), conditions) for layout in layouts)
    assert torch.equal(pieces.samples, whole.samples)
    for step in range(program.steps):
        assert set(pieces.results[step]) == set(whole.results[step])  # what the variant computes, and no more
        assert all(count <= whole.results[step][result] for result, count in pieces.results[step].items())
    return segments


def check_weights(segments: Segments, variants: Iterable[Variant]) -> None:
    """Every weight is in one engine, none is missing, none is new."""
    needed = {name: value.nbytes for variant in variants for name, value in rewrite.weights(variant.graph).items()}
    held = Counter(name for engine in segments.engines.values() for name in rewrite.weight_names(engine.graph))
    assert held.keys() == needed.keys()
    assert not [name for name, count in held.items() if count > 1 and needed[name] >= TINY_BYTES]


def check_order(pieces: list[Variant], segments: Segments, program: Program) -> None:
    """Pieces take what is there when they run; no slot is written twice in a step; the sample comes last."""
    given = {"sample", "history", "noise", *(each.name for each in program.contract.conditions)}
    states = {slot for engine in segments.engines.values() for slot in engine.outputs if ".state" in slot}
    written: list[str] = []
    for piece in pieces:
        piece.graph.graph.lint()
        assert list(piece.inputs) == list(rewrite.placeholders(piece.graph))
        taken = {source for kind, source in piece.inputs.values() if kind == "slot"}
        assert taken <= given | states | set(written)
        written += piece.outputs
    assert len(set(written)) == len(written)
    assert "sample" in pieces[-1].outputs


class Ran:
    """A run in PyTorch: its samples, and per step how often the heavy operators gave each result."""

    def __init__(self, program: Program, lowered: Lowered, conditions: dict[str, NDArray[Any]]) -> None:
        self.results: list[Counter[bytes]] = [Counter() for _ in range(program.steps)]

        def count(position: int, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
            row = lowered.script[position]
            assert isinstance(row, Call)
            Heavy(lowered.engines[name].graph, self.results[row.row]).run(*inputs)

        self.samples = run_lowered(program, lowered, conditions, SEEDS, on_call=count)


class Heavy(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, results: Counter[bytes]) -> None:
        super().__init__(graph)
        self.results = results

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if rewrite.is_call(n, *HEAVY):
            self.results[sha256(value.contiguous().numpy().tobytes()).digest()] += 1
        return value


# ---- what it makes of the sites that passes find -------------------------------------------------------------------


def test_a_range_is_a_piece_between_head_and_finish(dit: Program) -> None:
    segments = check(cached(dit, predictor="taylor1"))
    site = "transformer_blocks_1_2"
    assert segments.calls == {(True,): ("head", site, "finish"), (False,): ("head", f"{site}_reuse", "finish")}
    reuse = segments.engines[f"{site}_reuse"]
    assert rewrite.weight_names(reuse.graph) == []
    assert set(reuse.inputs.values()) >= {("slot", f"{site}.state1"), ("table", f"{site}.reuse")}
    assert segments.engines[site].outputs[:2] == (f"{site}.state0", f"{site}.state1")


def test_a_copy_is_read_from_its_state_without_a_piece(dit: Program) -> None:
    segments = check(cached(dit, predictor="copy"))
    site = "transformer_blocks_1_2"
    assert segments.calls == {(True,): ("head", site, "finish"), (False,): ("head", "finish")}
    assert segments.engines[site].outputs == (f"{site}.state0",)  # and no second copy of it under its own name
    assert ("slot", f"{site}.state0") in segments.engines["finish"].inputs.values()


def test_sites_with_the_same_column_are_one_piece_with_the_glue_between_them(dit: Program) -> None:
    segments = check(cached(dit, site="branch", predictor="copy"))
    whole = "transformer_blocks_0_attn1_to_2_ff"
    assert list(segments.calls.values()) == [("head", whole, "finish"), ("head", f"{whole}_reuse", "finish")]
    assert rewrite.weight_names(segments.engines[f"{whole}_reuse"].graph) == []
    assert len(segments.engines[whole].outputs) == len(dit.plan.sites) + 6 + 1  # a state each, and the residual stream


def test_neighbours_with_different_columns_are_pieces_of_their_own(dit: Program) -> None:
    """Where both are reused, nothing between head and finish has weights, and that is one piece again."""
    program = cached(dit, site="branch", predictor="copy")
    names = [site.name for site in program.plan.sites]
    columns = {name: tuple(step % (2 if "attn" in name else 3) == 0 for step in range(6)) for name in names}
    segments = check(with_columns(program, columns))
    assert segments.calls[(True,) * 6] == ("head", *names, "finish")
    assert segments.calls[(False,) * 6] == ("head", "transformer_blocks_0_attn1_to_2_ff_reuse", "finish")
    attention = segments.calls[(True, False) * 3]
    assert [name for name in attention if not name.endswith("reuse")] == ["head", *names[::2], "finish"]
    assert len(attention) == 7  # glue between attentions; the last is with what finishes the step


def test_every_step_computed_is_one_engine_bit_for_bit(dit: Program) -> None:
    program = cached(dit, site="branch", predictor="taylor1")
    computed = with_columns(program, ((True,) * 6,) * len(program.plan.sites))
    assert list(check(computed).engines) == ["full"]
    conditions = conditions_of(dit, 2)
    samples = run_lowered(computed, lower(computed, "segments"), conditions, SEEDS)
    assert torch.equal(samples, run(dit, conditions, SEEDS))
    assert list(build_segments(dit).engines) == ["full"]


def program_without_sites(program: Program) -> Program:
    return replace(program, plan=Plan(program.steps))


def test_the_cut_of_a_unet_is_the_deep_part(unet: Program) -> None:
    segments = check(cached(unet, predictor="copy"))
    assert list(segments.calls.values()) == [("head", "cut1", "finish"), ("head", "finish")]
    deep = rewrite.weight_names(segments.engines["cut1"].graph)
    assert any(name.startswith("net.mid_block") for name in deep)
    assert not any(name.startswith(("net.conv_in", "net.conv_out", "net.up_blocks.1")) for name in deep)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("dit", {"predictor": "taylor1", "site": "branch"}),
    ("sd3", {"predictor": "delta"}),
    ("sd3", {"predictor": "taylor1", "site": "branch"}),
    ("flux", {"predictor": "taylor2"}),
    ("flux", {"predictor": "delta", "front": 0}),
    ("flux", {"predictor": "copy", "site": "branch"}),
    ("wan", {"predictor": "delta"}),
    ("pixart", {"predictor": "taylor1", "site": "branch"}),
    ("unet_condition", {"predictor": "taylor1"}),
    ("unet_condition", {"predictor": "copy", "site": "branch"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_every_architecture(name: str, options: dict[str, Any], program_of: Callable[[str], Program]) -> None:
    """As planned, and with a random column for each site."""
    program = cached(program_of(name), **options)
    check(program)
    generator = np.random.default_rng(1)
    columns = {s.name: (True, *(bool(each < 0.5) for each in generator.random(3))) for s in program.plan.sites}
    check(with_columns(program, columns))


@settings(max_examples=10, deadline=None)
@given(columns=st.lists(st.tuples(*[st.booleans()] * 5), min_size=3, max_size=3))
def test_any_plan_of_branches(tokens: Program, columns: list[tuple[bool, ...]]) -> None:
    program = cached(tokens, site="branch", predictor="taylor1")
    check(with_columns(program, tuple((True, *column) for column in columns)))


# ---- what passes do not make ---------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_nodes_may_be_sites(tokens: Program, data: st.DataObject) -> None:
    """Overlapping, nested, one starting where another ends: whatever a plan may say."""
    program = program_without_sites(tokens)
    values = [node.name for node in program.graph.graph.nodes if is_token_sized(node)]
    chosen = sorted(data.draw(st.sets(st.sampled_from(values), min_size=1, max_size=3)), key=values.index)
    sites = []
    for value in chosen:
        computed = (True, *data.draw(st.tuples(*[st.booleans()] * 5)))
        order = data.draw(st.integers(0, 2))
        earlier = [
            name for name in values if values.index(name) < values.index(value) and same_shape(program, name, value)
        ]
        base = data.draw(st.sampled_from([None, *earlier]))
        rolling = data.draw(st.booleans())
        sites.append(Site(f"site_{value}", value, base, computed, *taylor(computed, order), rolling=rolling))
    check(replace(program, plan=Plan(program.steps, tuple(sites))))


def is_token_sized(node: fx.Node) -> bool:
    return node.op == "call_function" and len(rewrite.shape_of(node)) == 3


def same_shape(program: Program, first: str, second: str) -> bool:
    shapes = [rewrite.shape_of(rewrite.node_named(program.graph, name)) for name in (first, second)]
    return bool(shapes[0] == shapes[1])


def test_a_site_may_be_one_of_several_results(dit: Program) -> None:
    """A shift of the second block's modulation: the other five parts of the chunk are computed all the same."""
    (part,) = [node.name for node in dit.graph.graph.nodes if node.name == "getitem_6"]
    computed = (True, False, True, False, False, True)
    site = Site("shift", part, None, computed, *taylor(computed, 0))
    segments = check(replace(dit, plan=Plan(6, (site,))))
    assert ("slot", "shift.state0") in {source for e in segments.engines.values() for source in e.inputs.values()}


class Tied(nn.Module):
    """Its first and last blocks share a matrix that reads different values."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = models.Tokens()
        first, _, last = (block.get_submodule("up") for block in self.tokens.blocks)
        last.weight = first.weight

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        result: Tensor = self.tokens(x, sigma)
        return result


def weights_of(segments: Segments) -> list[str]:
    return [name for engine in segments.engines.values() for name in rewrite.weight_names(engine.graph)]


def tied_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(models, "tied", lambda: models.randomise(Tied()), raising=False)
    contract = tmp_path / "contract.yaml"
    contract.write_text(models.TOKENS_CONTRACT)
    return ingest(Source("models:tied", contract=contract, sampler="flow_euler", steps=4))


def test_a_weight_of_two_pieces_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = check(cached(tied_program(tmp_path, monkeypatch), predictor="delta"))
    (shared,) = {"net.tokens.blocks.0.up.weight", "net.tokens.blocks.2.up.weight"} & set(weights_of(segments))
    assert shared in rewrite.weight_names(segments.engines["head"].graph)
    inner = segments.engines["tokens_blocks_1_2"]
    assert shared not in rewrite.weight_names(inner.graph)
    (slot,) = set(segments.engines["head"].outputs) & {slot for _, slot in inner.inputs.values()} - {"add_1"}
    assert rewrite.placeholders(inner.graph)[slot].meta["val"].shape == (64, 32)  # the matrix itself


# ---- quantised programs --------------------------------------------------------------------------------------------


QUANTISED = [
    ("dit", {"predictor": "taylor1"}),
    ("dit", {"predictor": "copy", "site": "branch"}),
    ("unet", {"predictor": "taylor1"}),
]


@pytest.mark.parametrize(("name", "options"), QUANTISED, ids=str)
def test_rounding_and_stored_weights_stand_beside_their_layers(
    name: str,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
    calibration_of: Callable[[Program], Calibration],
) -> None:
    """Or no target would run those layers in few bits."""
    original: Program = request.getfixturevalue(name)
    program = cached(original, **options)
    step = Quantize(max_error=1.0, min_share=0.0, format="int8", activations="static", symmetric=False)
    program = step.apply(program, step.decide(program, calibration_of(original))).program
    segments = check(program)
    for mask in program.plan.masks:
        whole = stored_layers(build_variant(program, mask).graph)
        pieces = [layer for name in segments.calls[mask] for layer in stored_layers(segments.engines[name].graph)]
        assert len(set(pieces)) == len(pieces) > 0
        assert set(pieces) <= set(whole)
        assert {kind for _, kind in whole} == {kind for _, kind in pieces}
    for engine in segments.engines.values():
        for node in engine.graph.graph.nodes:
            if is_stored(node):
                assert is_rounding(node.args[0])
                assert node.target is not aten.conv2d.default or [is_rounding(user) for user in node.users] == [True]


def stored_layers(graph: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.name, str(node.target)) for node in graph.graph.nodes if is_stored(node)]


def is_stored(node: fx.Node) -> bool:
    """A layer whose weight is dequantised."""
    if not rewrite.is_call(node, aten.linear.default, aten.conv2d.default):
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and rewrite.is_call(weight, torch.ops.dcompile.dequantize.default)


def is_rounding(node: Any) -> bool:
    return rewrite.is_call(node, torch.ops.dcompile.quantize_dequantize.default)
