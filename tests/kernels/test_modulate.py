"""LayerNorm and modulation: the reference against float64, the kernel against the reference, and its machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dcompile.kernels import REFERENCES, modulate
from dcompile.kernels.modulate import reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is not installed")


def in_float64(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """By the definition, with nothing of torch.nn."""
    x, shift, scale = x.double(), shift.double(), scale.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def example(batch: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = 3 + 2 * torch.randn(batch, length, width, generator=generator)
    shift, scale = torch.randn(2, batch, width, generator=generator)
    return x.to(dtype), shift.to(dtype), scale.to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 48), (3, 16, 768)])
def test_the_reference_is_the_definition(shape: tuple[int, int, int]) -> None:
    values = example(*shape)
    torch.testing.assert_close(reference(*values, 1e-6).double(), in_float64(*values, 1e-6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_computes_the_reference_on_a_cpu(dtype: torch.dtype) -> None:
    values = example(2, 5, 48, dtype)
    found = torch.ops.dcompile.modulate(*values, 1e-6)
    assert found.dtype == dtype
    assert torch.equal(found, reference(*values, 1e-6))
    assert torch.equal(found, modulate(*values, 1e-6))
    assert REFERENCES[torch.ops.dcompile.modulate.default] is reference


def test_the_operator_keeps_its_contract() -> None:
    torch.library.opcheck(torch.ops.dcompile.modulate.default, (*example(2, 5, 48), 1e-6))


def test_it_stays_one_node_in_an_exported_graph() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            result: Tensor = torch.ops.dcompile.modulate(x, shift, scale, 1e-6)
            return result

    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(Block(), example(2, 5, 48), dynamic_shapes=({0: batch},) * 3)
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.dcompile.modulate.default]
    values = example(4, 5, 48)
    assert torch.equal(exported.module()(*values), reference(*values, 1e-6))


def run_python(code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_kernel_computes_the_reference_in_tritons_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported."""
    code = """
import torch
from dcompile.kernels.modulate import launch, modulate_kernel, reference
for shape in ((1, 1, 1), (2, 5, 48), (3, 4, 100), (2, 2, 768)):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        batch, length, width = shape
        x = (3 + 2 * torch.randn(shape)).to(dtype)
        wide = torch.randn(batch, 2 * width).to(dtype)
        shift, scale = wide.chunk(2, dim=1)  # as a model makes them: not contiguous
        found, expected = launch(modulate_kernel, x, shift, scale, 1e-6), reference(x, shift, scale, 1e-6)
        assert found.dtype == dtype and found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
"""
    run_python(code, TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_compiles_for_every_gpu_generation_without_one() -> None:
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dcompile.kernels.modulate import modulate_kernel
for pointer in ("*fp16", "*bf16", "*fp32"):
    names = {"x": pointer, "shift": pointer, "scale": pointer, "out": pointer, "length": "i32", "width": "i32"}
    source = ASTSource(modulate_kernel, {**names, "eps": "fp32", "BLOCK": "constexpr"}, {"BLOCK": 1024})
    for capability in (80, 90, 100, 120):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
        assert made.asm["cubin"][:4] == b"\\x7fELF"
        assert f".target sm_{capability}" in made.asm["ptx"]
"""
    run_python(code)


def test_without_triton_the_operator_is_its_reference() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from dcompile.kernels.modulate import reference
values = torch.randn(2, 5, 48), torch.randn(2, 48), torch.randn(2, 48), 1e-6
assert torch.equal(torch.ops.dcompile.modulate(*values), reference(*values))
"""
    run_python(code)


@pytest.mark.gpu
@needs_triton
def test_the_kernel_computes_the_reference_on_a_gpu() -> None:
    x, shift, scale = (value.cuda() for value in example(3, 16, 768))
    torch.testing.assert_close(torch.ops.dcompile.modulate(x, shift, scale, 1e-6), reference(x, shift, scale, 1e-6))
