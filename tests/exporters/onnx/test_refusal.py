"""An operator that does not become ONNX is named, with the module that calls it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from dcompile.compiler.errors import UnsupportedError
from dcompile.compiler.step_graph import flatten
from dcompile.exporters.onnx.graph import to_onnx
from dcompile.exporters.onnx.refusal import refusal


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(0.1 * x)


def graph() -> fx.GraphModule:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), Odd())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.net(x)
            return result

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Step().eval(), (torch.randn(2, 4),), dynamic_shapes=({0: batch},))
    return flatten(program.module(), ["x"])


def test_the_operator_and_its_module_are_named() -> None:
    message = (
        r"net\.1: ONNX has no operator for prims\.erf_inv; rewrite that part of the model, or build for --target aoti"
    )
    with pytest.raises(UnsupportedError, match=message):
        to_onnx(graph(), ["x"], ["y"], {})


def test_an_error_without_an_operator_passes_on_its_first_line() -> None:
    error = refusal(ValueError("\n too deep \n and more"), graph())
    assert str(error) == "torch.onnx cannot write the network: too deep; try --target aoti"


def test_an_operator_that_is_nowhere_in_the_graph() -> None:
    error = refusal(ValueError("No function for <OpOverload(op='aten.nowhere', overload='default')>"), graph())
    assert str(error).startswith("the network: ONNX has no operator for aten.nowhere")
