"""Tokens to experts and back: against loops, their gradients against differences, and through ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, fx

from dcompile.compiler import rewrite
from dcompile.exporters.onnx.graph import to_onnx
from dcompile.exporters.onnx.runtime_forms import TRANSLATIONS
from dcompile.kernels import ADD_TOKENS, REFERENCES, TAKE_TOKENS


def example(batch: int = 3, tokens: int = 10, width: int = 4, experts: int = 5, each: int = 4) -> tuple[Tensor, ...]:
    """(x, places, rows), of doubles. Some tokens have several experts, some have none."""
    torch.manual_seed(0)
    places = torch.stack([torch.stack([torch.randperm(tokens)[:each] for _ in range(experts)]) for _ in range(batch)])
    x, rows = torch.randn(batch, tokens, width).double(), torch.randn(experts, batch * each, width).double()
    return x, places, rows


def looped(x: Tensor, places: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `take_tokens` and `add_tokens` return."""
    taken, total = torch.empty_like(rows), x.clone()
    batch, experts, each = places.shape
    for sample in range(batch):
        for expert in range(experts):
            for index in range(each):
                token, row = int(places[sample, expert, index]), sample * each + index
                taken[expert, row] = x[sample, token]
                total[sample, token] += rows[expert, row]
    return taken, total


@pytest.mark.parametrize("plain", [False, True])
def test_against_loops(plain: bool) -> None:
    x, places, rows = example()
    take, add = (REFERENCES[op] if plain else op for op in (TAKE_TOKENS, ADD_TOKENS))
    taken, total = looped(x, places, rows)
    assert torch.equal(take(x, places), taken)
    torch.testing.assert_close(add(x, places, rows), total)
    assert len(places[0].flatten().bincount(minlength=10).unique()) > 2  # none, one, several


def test_gradients() -> None:
    x, places, rows = example()
    x.requires_grad_()
    rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TAKE_TOKENS(x, places), (x,))
    assert torch.autograd.gradcheck(lambda x, rows: ADD_TOKENS(x, places, rows), (x, rows))


def test_meta() -> None:
    torch.library.opcheck(TAKE_TOKENS, example()[:2])
    torch.library.opcheck(ADD_TOKENS, example())


@pytest.mark.parametrize("tokens", [64, 600], ids=["a product", "one by one"])
def test_in_onnx_runtime_on_several_threads(tokens: int, tmp_path: Path) -> None:
    """Most tokens have several experts: where threads add without a lock, sums are lost."""
    values = [value.float() if value.is_floating_point() else value for value in example(4, tokens, 32, 6, tokens // 2)]
    graph = fx.Graph()
    x, places, rows = (graph.placeholder(name) for name in ("x", "places", "rows"))
    graph.output((graph.call_function(TAKE_TOKENS, (x, places)), graph.call_function(ADD_TOKENS, (x, places, rows))))
    module = fx.GraphModule(torch.nn.Module(), graph)
    for node, value in zip(rewrite.placeholders(module).values(), values, strict=True):
        node.meta["val"] = value
    model = to_onnx(module, ["x", "places", "rows"], ["taken", "total"], TRANSLATIONS)
    ir.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    inputs = {name: value.numpy() for name, value in zip(("x", "places", "rows"), values, strict=True)}
    for _ in range(5):
        found = session.run(None, inputs)
        for mine, theirs in zip(found, looped(*values), strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-5)
