"""Weights of several engines in one file: readable by others, aligned, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dcompile.exporters.aoti.weights import ALIGNMENT, SharedWeights

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Small tensors of all dtypes, few distinct values: many are equal, in content or in bytes alone."""
    shapes = st.lists(st.integers(0, 5), max_size=3)
    made = []
    for _ in range(draw(st.integers(1, 12))):
        value = torch.full(draw(shapes), draw(st.integers(0, 1)), dtype=torch.float32)
        made.append(value.to(draw(st.sampled_from(DTYPES))))
    return made


@settings(max_examples=60)
@given(tensors())
def test_what_is_written_is_what_was_given(tmp_path_factory: pytest.TempPathFactory, values: list[Tensor]) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    weights = SharedWeights()
    digests = [weights.add("weight", value) for value in values]
    stored = weights.write(path)
    found, content = load_file(path), path.read_bytes()
    assert found.keys() == {each.name for each in stored.values()}
    for digest, value in zip(digests, values, strict=True):
        where = stored[digest]
        assert found[where.name].dtype == value.dtype
        assert torch.equal(found[where.name].float(), value.float())
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        assert content[where.offset : where.offset + len(raw)] == raw
        assert where.offset % value.itemsize == 0
        assert value.nbytes % ALIGNMENT or where.offset % ALIGNMENT == 0
    distinct = {(value.dtype, value.shape, tuple(value.flatten().float().tolist())) for value in values}
    assert len(stored) == len(distinct)


def test_names_stay_where_they_can(tmp_path: Path) -> None:
    weights = SharedWeights()
    one, other = torch.arange(64.0), torch.arange(64.0) + 1
    assert weights.add("a", one) == weights.add("b", one.clone())  # equal content has one name, the first
    weights.add("a", other)
    weights.add("c", other.t().contiguous())
    weights.write(tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "a.2"}
        assert torch.equal(file.get_tensor("a.2"), other)


def test_a_view_is_written_as_it_reads(tmp_path: Path) -> None:
    weights = SharedWeights()
    value = torch.arange(12.0).reshape(3, 4)
    digest = weights.add("t", value.t())
    name = weights.write(tmp_path / "w.safetensors")[digest].name
    assert torch.equal(load_file(tmp_path / "w.safetensors")[name], value.t())
    assert digest == weights.add("u", value.t().contiguous())
    assert digest != weights.add("v", value.reshape(4, 3))
