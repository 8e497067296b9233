"""Half precision where the network computes, float32 where a few bits move the whole sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, fx, nn

from dcompile.compiler import rewrite
from dcompile.compiler.execute import batch_size
from dcompile.compiler.ingest import Source, ingest
from dcompile.compiler.program import Program
from dcompile.compiler.rewrite import aten
from dcompile.compiler.step_graph import flatten
from dcompile.exporters.precision import HALF, to_precision
from dcompile.quant import formats

GLYPHS = Path(__file__).resolve().parents[2] / "examples/glyphs/model"
# A value of half precision is rounded by 2^-11 or 2^-8 of itself; a step rounds a hundred times, in no one direction.
BOUND = {"fp16": 2e-3, "bf16": 1.6e-2}


def step_inputs(program: Program, step: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, node in rewrite.placeholders(program.graph).items():
        example = node.meta["val"]
        shape = [batch_size(size, batch) for size in example.shape]
        if name in program.tables:
            found.append(program.tables[name][step])
        elif example.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator))
        else:
            found.append(torch.ones(shape, dtype=example.dtype))
    return found


@torch.no_grad()
def relative_error(found: fx.GraphModule, expected: fx.GraphModule, inputs: list[Tensor]) -> float:
    (a, *_), (b, *_) = found(*inputs), expected(*inputs)
    assert a.dtype == torch.float32
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_step_is_as_near_as_its_bits_allow(
    name: str, precision: str, program_of: Callable[[str], Program]
) -> None:  # fmt: skip
    program = program_of(name)
    half = to_precision(program.graph, precision, tables=program.tables)
    error = relative_error(half, program.graph, step_inputs(program, 2))
    assert 0 < error < BOUND[precision]
    products = [node for node in half.graph.nodes if rewrite.is_call(node, aten.scaled_dot_product_attention.default)]
    assert all(rewrite.tensor_of(node).dtype == HALF[precision] for node in products)  # type: ignore[union-attr]
    assert any(not isinstance(size, int) for node in products for size in rewrite.shape_of(node))


@pytest.mark.parametrize("precision", HALF)
def test_the_glyph_dit(precision: str) -> None:
    program = ingest(Source(str(GLYPHS)))
    half = to_precision(program.graph, precision, tables=program.tables)
    assert relative_error(half, program.graph, step_inputs(program, 15)) < BOUND[precision]


def dtypes(graph: fx.GraphModule) -> dict[str, torch.dtype]:
    return {n.name: rewrite.tensor_of(n).dtype for n in graph.graph.nodes if rewrite.tensor_of(n) is not None}  # type: ignore[union-attr]


def test_what_the_timestep_decides_and_what_the_sampler_does_stays_float32(dit: Program) -> None:
    half = to_precision(dit.graph, "fp16", tables=dit.tables)
    by_step = {node.name for node in rewrite.decided_by_step(dit.graph, dit.tables)}
    outside = {n.name for n in dit.graph.graph.nodes if n.op == "call_function" and "net" not in paths(n)}
    found, before = dtypes(half), dtypes(dit.graph)
    assert len(by_step) > 10
    assert len(outside) > 5
    assert all(found[name] == before[name] for name in (by_step | outside) & before.keys())
    blocks = {region.outputs[0] for region in dit.regions}
    assert {found[name] for name in blocks} == {torch.float16}  # the residual stream
    assert [v.meta["val"].dtype for v in rewrite.output_values(half)] == [torch.float32]


def paths(node: fx.Node) -> set[str]:
    return {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()}


def test_the_input_is_left_alone_and_its_weights_may_be_shared(dit: Program) -> None:
    text, weights = str(dit.graph.graph), rewrite.weights(dit.graph)
    kept = to_precision(dit.graph, "bf16", tables=dit.tables, convert_weights=False)
    converted = to_precision(dit.graph, "bf16", tables=dit.tables)
    assert str(dit.graph.graph) == text
    assert all(value is weights[name] for name, value in rewrite.weights(kept).items())
    halves = [value for value in rewrite.weights(converted).values() if value.dtype == torch.bfloat16]
    assert sum(value.numel() for value in halves) > 0.6 * dit.parameters  # the rest is the timestep's
    inputs = step_inputs(dit, 1)
    assert relative_error(kept, converted, inputs) == 0


def exported(network: nn.Module, *shape: int) -> fx.GraphModule:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x)
            return result

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Step().eval(), (torch.randn(2, *shape),), dynamic_shapes=({0: batch},))
    return flatten(program.module(), ["x"])


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_squares_do_not_leave_the_range_of_fp16() -> None:
    graph, x = exported(RmsNorm(), 8, 16), 1000 * torch.randn(2, 8, 16)
    half = to_precision(graph, "fp16")
    assert torch.isinf(x.half().pow(2)).any()  # what it would be
    assert relative_error(half, graph, [x]) < 1e-3
    kinds = {n.target: rewrite.tensor_of(n).dtype for n in half.graph.nodes if n.op == "call_function"}  # type: ignore[union-attr]
    assert kinds[aten.rsqrt.default] == kinds[aten.add.Tensor] == torch.float32
    assert kinds[aten.mul.Tensor] == torch.float16


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, -1e9).softmax(-1)


def test_a_constant_beyond_fp16_is_kept_in_float32() -> None:
    graph, x = exported(Masked(), 8, 16), torch.randn(2, 8, 16)
    assert relative_error(to_precision(graph, "fp16"), graph, [x]) < 1e-3


class Rotary(nn.Module):
    """Positions times frequencies: angles of thousands, of which fp16 would keep no fraction."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(1e4 ** -torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(4000, 4016)[:, None].float() * self.frequencies
        return x * angles.cos()


def test_what_no_input_decides_stays_float32() -> None:
    graph, x = exported(Rotary(), 16, 8), torch.randn(2, 16, 8)
    half = to_precision(graph, "fp16")
    assert dtypes(half)["cos"] == torch.float32
    assert relative_error(half, graph, [x]) < 1e-3


class Tied(nn.Module):
    """One matrix read by the network and by what no input decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.weight.exp().sum(0)


def test_a_weight_that_float32_reads_too_is_there_twice() -> None:
    graph, x = exported(Tied(), 4, 16), torch.randn(2, 4, 16)
    half = to_precision(graph, "fp16")
    kinds = {name: value.dtype for name, value in rewrite.weights(half).items()}
    assert kinds == {"net.weight": torch.float32, "net.weight_fp16": torch.float16}
    assert relative_error(half, graph, [x]) < 1e-3


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        for name, value in zip(("q", "scale"), formats.quantize_int8(weight), strict=True):
            self.register_buffer(name, value)
        self.register_buffer("x_scale", torch.tensor(0.03))
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.dcompile
        weight = ops.dequantize(self.q, self.scale, None, "int8", 0)
        return nn.functional.linear(ops.quantize_dequantize(x, self.x_scale, None, "int8"), weight, self.bias)


@pytest.mark.parametrize("precision", HALF)
def test_quantised_layers_keep_their_scales(precision: str) -> None:
    graph, x = exported(Quantised(), 4, 16), torch.randn(2, 4, 16)
    half = to_precision(graph, precision)
    kinds = {name: value.dtype for name, value in rewrite.weights(half).items()}
    stored = {"net.q": torch.int8, "net.scale": torch.float32, "net.x_scale": torch.float32}
    assert kinds == stored | {"net.bias": HALF[precision]}
    assert dtypes(half)["linear"] == HALF[precision]
    assert relative_error(half, graph, [x]) < BOUND[precision]
