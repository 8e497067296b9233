"""Weights of several ONNX models in one file, which the runtime maps into memory."""

from __future__ import annotations

import hashlib
from typing import BinaryIO

import onnx_ir as ir

ALIGNMENT = 4096  # a page: the runtime maps each weight, it does not copy it
_INLINE_BYTES = 1024  # smaller initialisers stay in the .onnx


class SharedWeights:
    """Appends initialisers to one file and points the models at it; content that it holds is not written again.

    location: the file's path from the folder of the models.
    """

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self.stream, self.location = stream, location
        self.known: dict[bytes, tuple[int, int]] = {}  # digest -> (offset, length)

    def move(self, model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in self.known:
                self.stream.write(b"\0" * (-self.stream.tell() % ALIGNMENT))
                self.known[digest] = (self.stream.tell(), len(data))
                self.stream.write(data)
            offset, length = self.known[digest]
            value.const_value = ir.ExternalTensor(
                self.location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
            )
