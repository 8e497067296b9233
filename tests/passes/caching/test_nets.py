"""Networks that predict a site: in the graph they are the module, untrained they are a copy, trained they beat it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from dcompile.compiler import rewrite
from dcompile.compiler.calibrate import Calibration
from dcompile.compiler.errors import PassError
from dcompile.compiler.execute import initial_slots, run
from dcompile.compiler.program import Decision, Program
from dcompile.compiler.variants import build_variant
from dcompile.exporters.interpret import run_lowered
from dcompile.exporters.lower import lower
from dcompile.exporters.onnx.target import TARGET
from dcompile.exporters.parity import check_parity
from dcompile.exporters.target import TargetOptions
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.caching import nets
from dcompile.passes.caching.nets import Form, Predictor, from_tokens, to_tokens
from dcompile.passes.caching.sites import find_sites
from dcompile.passes.caching.training import _Moments, _Trainer
from dcompile.passes.caching.writing import find_candidates
from dcompile.passes.fold_timestep import FoldTimestep
from dcompile.passes.quantize import Quantize

CalibrationOf = Callable[[Program], Calibration]
KINDS = [("dit", "disca"), ("dit", "flowturbo"), ("unet", "flowturbo"), ("tokens", "disca"), ("tokens", "flowturbo")]


def step_of(method: str, **options: Any) -> CacheSteps:
    return CacheSteps(**{"method": method, "interval": 3, "warmup": 1, "runs": 2, "states": 1, **options})


def samples(program: Program, calibration: Calibration) -> Tensor:
    return run(program, calibration.conditions, calibration.seeds)


def random_weights(program: Program) -> dict[str, NDArray[np.float32]]:
    """For each of its networks: no weight is left as it was made."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).numpy()
        for name, value in rewrite.weights(program.graph).items() if name.startswith(nets.PATH)
    }  # fmt: skip


def with_networks(program: Program, method: str, **options: Any) -> Program:
    """Not trained, but of random weights."""
    step = step_of(method, **options)
    return step.apply(program, Decision({}, random_weights(step.apply(program, Decision()).program))).program


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (16, 32), (1, 32, 32), (4, 8, 8), (3, 6, 6), (40, 5, 5), (4, 2, 8, 8)])
def test_tokens_are_all_of_a_value_and_patches_stay_together(shape: tuple[int, ...]) -> None:
    form = Form(shape, 1, 8)
    value = torch.arange(2 * int(np.prod(shape)), dtype=torch.float32).reshape(2, *shape)
    tokens = to_tokens(value, form)
    assert tokens.shape == (2, form.tokens, form.channels)
    assert torch.equal(from_tokens(tokens, form), value)
    if form.patch > 1:
        corner = value[0]
        for axis in range(1, len(shape)):
            corner = corner.narrow(axis, 0, form.patch)
        assert set(tokens[0, 0].tolist()) == set(corner.flatten().tolist())


@pytest.mark.parametrize(("network", "method"), KINDS)
@pytest.mark.parametrize("states", [1, 2])
def test_in_the_graph_it_is_the_module(
    network: str, method: str, states: int, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    original: Program = request.getfixturevalue(network)
    program = with_networks(original, method, states=states)
    (site,) = program.plan.sites
    assert site.network is not None
    given, expected = _network_inputs(program, site.name), []
    path = f"{nets.PATH}.{site.name}."
    weights = {n.removeprefix(path): w for n, w in rewrite.weights(program.graph).items() if n.startswith(path)}
    shape = tuple(rewrite.shape_of(rewrite.node_named(program.graph, site.value))[1:])
    module = Predictor(Form(shape, states, weights["modulation.weight"].shape[1]), len(weights["first.bias"]))
    module.load_state_dict(weights)
    variant = build_variant(program, (False,))

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            seen[n.name] = value
            return value

    def compare(step: int, mask: object, values: list[Tensor]) -> None:
        if mask == (False,):
            seen.clear()
            Watching(variant.graph).run(*values)
            with torch.no_grad():
                found = module(*(seen[name] for name in given))
            expected.append(found)
            torch.testing.assert_close(seen[site.network or ""], found, rtol=1e-6, atol=1e-6)

    seen: dict[str, Tensor] = {}
    calibration = calibration_of(original)
    run(program, calibration.conditions, calibration.seeds, on_inputs=compare)
    assert len(expected) == 4
    assert min(float(each.abs().max()) for each in expected) > 0.05


def _network_inputs(program: Program, site: str) -> list[str]:
    """Names of the current value, the condition and the states: what leads into the network from outside."""
    weights = {f"{nets.PATH}.{site}.{name}" for name in ("modulation.weight", "mean")}
    states = [name for name in rewrite.placeholders(program.graph) if name.startswith(f"{site}_state")]
    for node in program.graph.graph.nodes:
        if rewrite.is_call(node, torch.ops.aten.linear.default) and str(node.args[1].target) in weights:
            condition = node.args[0].args[0].name  # behind the norm
        if rewrite.is_call(node, torch.ops.aten.sub.Tensor) and str(node.args[1].target) in weights:
            current = node.args[0].args[0][0]  # of what is side by side
    while current.op == "call_function" and current.target in (
        torch.ops.aten.reshape.default, torch.ops.aten.permute.default
    ):  # fmt: skip
        current = current.args[0]
    return [current.name, condition, *states]


# ---- the mechanism --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "method"), KINDS)
@pytest.mark.parametrize(("states", "predictor"), [(1, "copy"), (2, "taylor1")])
def test_untrained_it_is_what_it_starts_from(
    network: str, method: str, states: int, predictor: Literal["copy", "taylor1"], request: pytest.FixtureRequest,
    calibration_of: CalibrationOf,
) -> None:  # fmt: skip
    program: Program = request.getfixturevalue(network)
    calibration, step = calibration_of(program), step_of(method, states=states)
    assert step.site is not None
    start = CacheSteps(method="fora", schedule="interval", site=step.site, predictor=predictor, interval=3)
    started = start.apply(program, Decision()).program
    of_values = tuple(replace(site, base=None) for site in started.plan.sites)
    expected = samples(replace(started, plan=replace(started.plan, sites=of_values)), calibration)
    assert torch.equal(samples(step.apply(program, Decision()).program, calibration), expected)
    assert not torch.allclose(samples(with_networks(program, method, states=states), calibration), expected, atol=1e-3)


@pytest.mark.parametrize(("network", "method"), KINDS)
def test_both_layouts_equal_pytorch(
    network: str, method: str, request: pytest.FixtureRequest, calibration_of: CalibrationOf
) -> None:
    program: Program = request.getfixturevalue(network)
    calibration, made = calibration_of(program), with_networks(program, method)
    expected = samples(made, calibration)
    for layout in ("variants", "segments"):
        found = run_lowered(made, lower(made, layout), calibration.conditions, calibration.seeds)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_several_streams_have_a_network_each(program_of: Callable[[str], Program]) -> None:
    original = program_of("sd3")
    program = with_networks(original, "disca", interval=2)
    assert len(program.plan.sites) == len({site.network for site in program.plan.sites}) > 0
    assert len(rewrite.output_values(program.graph)) == 1 + len(program.plan.sites)


def test_its_weights_count_and_a_computed_step_has_none_of_them(dit: Program) -> None:
    program = with_networks(dit, "disca")
    own = {name: value for name, value in rewrite.weights(program.graph).items() if name.startswith(nets.PATH)}
    assert program.parameters - dit.parameters == sum(value.numel() for value in own.values()) > 0
    full, reuse = (build_variant(program, mask) for mask in program.plan.masks)
    assert not own.keys() & rewrite.weights(full.graph).keys()
    assert own.keys() <= rewrite.weights(reuse.graph).keys()
    assert full.outputs == ("sample", f"{program.plan.sites[0].name}.state0")
    assert reuse.outputs == ("sample",)


def test_it_grows_with_the_network() -> None:
    form = Form((64, 160), 1, 160)
    sizes = [sum(each.numel() for each in nets.make(form, most).parameters()) for most in (10_000, 100_000, 425_000)]
    assert sizes == sorted(set(sizes))
    assert 0.7 * 425_000 < sizes[-1] <= 425_000
    assert torch.equal(nets.make(form, 10_000).first.weight, nets.make(form, 10_000).first.weight)


def test_the_condition_tells_the_step_and_the_label(dit: Program, unet: Program, tokens: Program) -> None:
    """The first vector of both that a layer reads; of a network without one, a table of the steps."""
    for program, has_vector in ((dit, True), (unet, True), (tokens, False)):
        made = with_networks(program, "flowturbo")
        _, condition, _ = _network_inputs(made, "output")
        assert (condition == "output_step") != has_vector
        assert ("output_step" in made.tables) != has_vector
        if has_vector:
            behind = {condition}
            for node in reversed(made.graph.graph.nodes):
                if node.name in behind:
                    behind |= {source.name for source in node.all_input_nodes}
            assert {"timestep", "class_labels"} <= behind
            assert rewrite.is_call(rewrite.node_named(made.graph, condition), torch.ops.aten.silu.default)


def test_an_output_is_what_the_network_makes_of_its_input(dit: Program, unet: Program, tokens: Program) -> None:
    """Under guidance of both halves, before they become one."""
    for program, base in ((dit, "cat"), (unet, "cat"), (tokens, "mul")):
        (found,) = find_sites(program.graph, "output", refused=[])
        shapes = [rewrite.shape_of(rewrite.node_named(program.graph, name)) for name in (found.value, found.base or "")]
        assert found.base == base
        assert [str(size) for size in shapes[0]] == [str(size) for size in shapes[1]]


def test_a_site_without_an_input_is_refused(unet: Program) -> None:
    with pytest.raises(PassError, match="cut1 has no input of its own shape, which predictor 'net' looks at; take"):
        CacheSteps(predictor="net").apply(unet, Decision())


# ---- training -------------------------------------------------------------------------------------------------------


def trainer_of(program: Program, calibration: Calibration, **options: Any) -> _Trainer:
    step = step_of("disca", **options)
    draft = step.apply(program, Decision({}, random_weights(step.apply(program, Decision()).program))).program
    return _Trainer(draft, calibration)


def test_a_recorded_trajectory_is_what_the_programs_do(dit: Program, calibration_of: CalibrationOf) -> None:
    """Starts on the uncached path, or on the cached program's own; ends where the uncached one goes from there."""
    trainer = trainer_of(dit, calibration_of(dit))
    trainer.record(0, own=False)
    trainer.record(0, own=True)
    forced, own = trainer.recorded
    assert [stretch.steps for stretch in own.stretches] == [range(1, 3), range(4, 6)]
    conditions, seeds = {"class_labels": np.array([0, 5])}, [2_000_000, 2_000_001]
    assert forced.seeds == own.seeds == seeds
    full, cached = path(dit, conditions, seeds), path(trainer.program, conditions, seeds)
    for trajectory, starts in ((forced, full), (own, cached)):
        for stretch in trajectory.stretches:
            start = stretch.slots["sample"]
            torch.testing.assert_close(start, starts[stretch.steps.start], rtol=1e-5, atol=1e-5)
            end = start
            for step in stretch.steps:
                end = uncached_step(dit, conditions, step, end)
            torch.testing.assert_close(stretch.target, end, rtol=1e-5, atol=1e-5)
    name = f"{trainer.program.plan.sites[0].name}.state0"
    assert torch.equal(forced.stretches[0].slots[name], own.stretches[0].slots[name])
    assert not torch.equal(forced.stretches[1].slots[name], own.stretches[1].slots[name])


def path(program: Program, conditions: dict[str, Any], seeds: list[int]) -> list[Tensor]:
    """From the noise on."""
    found = [initial_slots(program, conditions, seeds)["sample"]]
    run(program, conditions, seeds, on_step=lambda step, sample: found.append(sample))
    return found


def uncached_step(program: Program, conditions: dict[str, Any], step: int, sample: Tensor) -> Tensor:
    slots = {"sample": sample, **{name: torch.from_numpy(value) for name, value in conditions.items()}}
    values = [program.tables[n][step] if n in program.tables else slots[n] for n in rewrite.placeholders(program.graph)]
    with torch.no_grad():
        found: Tensor = program.graph(*values)[0]
    return found


def test_the_loss_is_of_errors_that_add_up(dit: Program, calibration_of: CalibrationOf) -> None:
    trainer = trainer_of(dit, calibration_of(dit))
    trainer.record(0, own=False)
    (trajectory,) = trainer.recorded
    errors = []
    for stretch in trajectory.stretches:
        slots = dict(stretch.slots)
        for step in stretch.steps:
            with torch.no_grad():
                slots |= trainer._step((False,), step, slots, trajectory.seeds)
        errors.append(slots["sample"] - stretch.target)
    full = path(dit, {"class_labels": np.array([0, 5])}, [2_000_000, 2_000_001])
    ways = [(full[step + 1] - full[step]).square().mean() for step in (1, 2, 4, 5)]
    expected = (errors[0].square().mean() + (errors[0] + errors[1]).square().mean()) / 2 / (sum(ways) / 4)
    trainer.learn(0.0)
    assert trainer.loss == pytest.approx(float(expected), rel=1e-4)


def test_a_step_of_training_follows_the_slope_and_leaves_the_model(dit: Program, calibration_of: CalibrationOf) -> None:
    trainer = trainer_of(dit, calibration_of(dit))
    trainer.record(0, own=False)
    before = {name: value.clone() for name, value in rewrite.weights(trainer.program.graph).items()}
    trainer.learn(0.0)
    first = trainer.loss
    for name, value in rewrite.weights(trainer.program.graph).items():
        learns = name.startswith(nets.PATH) and name.rpartition(".")[2] not in ("mean", "inverse_std", "scale")
        assert torch.equal(value, before[name]) != learns
        assert learns or value.grad is None
    for _ in range(20):
        trainer.loss = float("nan")
        trainer.learn(0.0)
    assert trainer.loss < 0.9 * first


def test_what_is_measured_is_what_the_network_reads(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration, step = calibration_of(dit), step_of("disca")
    trainer = trainer_of(dit, calibration)
    seen: dict[int, Tensor] = {}
    site = trainer.program.plan.sites[0]
    calibration.observe(trainer.program, [site.value], lambda at, name, value: seen.update({at: value}), "")
    trainer.measure(find_candidates(step, dit.graph, []))
    kept = torch.cat([seen[0], seen[0], seen[3], seen[3]]).flatten(0, 1)
    weights = {n.rpartition(".")[2]: w for n, w in trainer.weights.items() if n.count(".") == 2}
    torch.testing.assert_close(weights["mean"][32:], kept.mean(0), rtol=1e-4, atol=1e-5)
    change = (seen[3] - seen[0]).flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(weights["scale"], change, rtol=1e-4, atol=1e-5)


def test_moments_are_numpys() -> None:
    values = np.random.default_rng(0).normal(3, 2, (2, 4, 5, 3)).astype(np.float32)
    moments = _Moments()
    for part in values:
        moments.add(torch.from_numpy(part))
    rows = values.reshape(-1, 3)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.deviation, rows.std(0), rtol=1e-5)
    np.testing.assert_allclose(moments.size, np.sqrt((rows**2).mean(0)), rtol=1e-5)


def test_trained_it_beats_the_copy_and_is_the_same_again(dit: Program, calibration_of: CalibrationOf) -> None:
    calibration, step = calibration_of(dit), step_of("disca", runs=4)
    decision = step.decide(dit, calibration)
    program = step.apply(dit, decision).program
    errors = [calibration.error(each)["relative_error"] for each in (step.apply(dit, Decision()).program, program)]
    assert errors[1] < 0.9 * errors[0]
    again = step.decide(dit, calibration).tensors
    assert decision.tensors.keys() == again.keys()
    assert all(np.array_equal(value, again[name]) for name, value in decision.tensors.items())


# ---- passes after it, and an exporter -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["variants", "segments"])
def test_quantised_after_the_cache_the_engines_agree(
    layout: Any, dit: Program, calibration_of: CalibrationOf, tmp_path: Path
) -> None:
    """Its layers too: int8 in PyTorch and in ONNX Runtime."""
    calibration, program = calibration_of(dit), with_networks(dit, "disca")
    quantise = Quantize(max_error=1.0, min_share=0.0)
    result = quantise.apply(program, quantise.decide(program, calibration))
    stored = {name for name, value in rewrite.weights(result.program.graph).items() if value.dtype == torch.int8}
    assert {f"{nets.PATH}.transformer_blocks_0_2.{name}.weight" for name in ("first", "up", "last")} <= stored
    folded = FoldTimestep().apply(result.program, Decision()).program
    lowered = lower(folded, layout)
    written = TARGET.write(lowered, tmp_path, TargetOptions(threads=1), lambda name: None)
    parity = check_parity(folded, lowered, written.open, lambda fraction: None)
    assert {each.engine for each in parity} == set(lowered.engines)
    torch.testing.assert_close(
        run_lowered(folded, lowered, calibration.conditions, calibration.seeds),
        samples(result.program, calibration), rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_folding_takes_what_the_step_alone_decides(tokens: Program, calibration_of: CalibrationOf) -> None:
    """Without a condition that is the network's modulation."""
    calibration, program = calibration_of(tokens), with_networks(tokens, "disca")
    folded = FoldTimestep().apply(program, Decision()).program
    assert not [name for name in rewrite.weight_names(folded.graph) if "modulation" in name]
    torch.testing.assert_close(samples(folded, calibration), samples(program, calibration), rtol=1e-5, atol=1e-5)
    assert replace(folded.plan.sites[0]).network in {node.name for node in folded.graph.graph.nodes}
