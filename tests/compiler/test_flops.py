"""Operations by closed form, against torch's own counter on the same network."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcompile.compiler.flops import node_flops, sample_flops
from dcompile.compiler.program import Decision, Program
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.prune_layers import PruneLayers


def counted(call: Callable[[], Any]) -> float:
    """By torch; attention as two matrix products, whose count is the closed form."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def exported(module: nn.Module, *inputs: torch.Tensor) -> float:
    """Of all nodes of the module's graph; inputs have the example's batch of two, and the figure is for one sample."""
    graph = torch.export.export(module.eval(), inputs).module().graph
    return sum(node_flops(node) for node in graph.nodes)


class Attention(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key)


class Products(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return a @ b, torch.bmm(a, b), torch.mm(a[0], b[0]), torch.addmm(b[0, :1], a[0], b[0])


@pytest.mark.parametrize(
    ("module", "inputs", "flops"),
    [
        (nn.Linear(7, 5), [(2, 3, 7)], 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 6, 3, padding=1), [(2, 4, 8, 8)], 2 * 6 * 8 * 8 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), [(2, 4, 9, 9)], 2 * 6 * 4 * 4 * 2 * 9),
        (nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), [(2, 2, 5, 4, 4)], 2 * 3 * 5 * 2 * 2 * 2 * 4),
        (Attention(), [(2, 3, 10, 4), (2, 3, 6, 4)], 4 * 3 * 10 * 6 * 4),
        (nn.GELU(), [(2, 64)], 0),
    ],
)
def test_closed_forms(module: nn.Module, inputs: list[tuple[int, ...]], flops: float) -> None:
    values = [torch.randn(shape) for shape in inputs]
    assert exported(module, *values) == flops
    assert counted(lambda: module(*values)) == 2 * flops  # for both samples


def test_plain_products() -> None:
    values = torch.randn(2, 3, 7), torch.randn(2, 7, 5)
    assert exported(Products(), *values) * 2 == counted(lambda: Products()(*values))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_whole_network_is_what_torch_counts(name: str, program_of: Callable[[str], Program]) -> None:
    from dcompile.compiler.calibrate import example_conditions

    program = program_of(name)
    sample = torch.randn(1, *program.contract.sample.shape)
    given = [torch.from_numpy(value) for value in example_conditions(program.contract, 1).values()]
    inputs = [sample, *given, program.tables["timestep"][0], program.tables["row"][0]]
    total = counted(lambda: program.graph(*inputs))
    assert total > 1e5
    assert sample_flops(program) == pytest.approx(4 * total, rel=0.02)  # four steps


def test_guidance_counts_both_halves(dit: Program, program_of: Callable[[str], Program]) -> None:
    assert sample_flops(dit) / 6 == pytest.approx(2 * sample_flops(program_of("dit")) / 4, rel=1e-6)


def test_reused_steps_count_what_they_run(dit: Program) -> None:
    full = sample_flops(dit)
    one_block = full - sample_flops(
        PruneLayers().apply(dit, Decision({"removed": ["net.transformer_blocks.1"]})).program
    )
    cached = CacheSteps(interval=3, warmup=2, predictor="delta").apply(dit, Decision()).program
    assert sum(cached.plan.sites[0].computed) == 3  # of 6 steps; the others leave out 2 of 3 blocks
    assert full - sample_flops(cached) == pytest.approx(2 * one_block * 3 / 6, rel=1e-6)
