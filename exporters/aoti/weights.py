"""Weights of all engines of a bundle in one .safetensors file that is mapped, not read: equal content is there once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64  # a cache line, and the widest vector register: tensors whose size is a multiple of it start at one
_SPELLED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its name in the file, and its first byte from the beginning of the file."""

    name: str
    offset: int


@dataclass
class SharedWeights:
    """Collects tensors by content; `write` lays them out.

    kept: digest -> tensor. names: digest -> name in the file. digests: name in the file -> digest.
    """

    kept: dict[bytes, Tensor] = field(default_factory=dict)
    names: dict[bytes, str] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> bytes:
        """Take a tensor under `name`, or under a name derived from it where another has that. -> its digest"""
        value = value.detach().cpu().contiguous()
        digest = _digest(value)
        if digest not in self.kept:
            free = next(each for each in _numbered(name) if each not in self.digests)
            self.kept[digest], self.names[digest], self.digests[free] = value, free, digest
        return digest

    def write(self, path: Path) -> dict[bytes, Stored]:
        """Write the file, tensor by tensor. -> digest -> where it lies."""
        # Whole cache lines first, then by size of element: all is aligned without gaps, which the format bans.
        order = sorted(self.kept.items(), key=lambda each: (each[1].nbytes % ALIGNMENT != 0, -each[1].itemsize))
        begins = list(accumulate((value.nbytes for _, value in order), initial=0))
        entries = {
            self.names[digest]: {
                "dtype": _SPELLED[value.dtype],
                "shape": list(value.shape),
                "data_offsets": [begin, begin + value.nbytes],
            }
            for (digest, value), begin in zip(order, begins, strict=False)
        }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        with path.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for _, value in order:
                stream.write(_bytes(value))
        start = 8 + len(header)
        return {
            digest: Stored(self.names[digest], start + begin) for (digest, _), begin in zip(order, begins, strict=False)
        }


def _numbered(name: str) -> Iterable[str]:
    yield name
    number = 2
    while True:
        yield f"{name}.{number}"
        number += 1


def _bytes(value: Tensor) -> memoryview:
    """The tensor's own memory."""
    flat = value.reshape(-1)
    return (flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)).numpy().data


def _digest(value: Tensor) -> bytes:
    hasher = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    hasher.update(_bytes(value))
    return hasher.digest()
