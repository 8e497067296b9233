"""Results of slow work, kept on disk under the hash of all that decides them: a killed build goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .errors import StoreError
from .program import Program
from .rewrite import weights

Entry = tuple[dict[str, Any], dict[str, NDArray[Any]]]


class Store:
    """Entries of JSON and arrays. A directory of None keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def get(self, key: str) -> Entry | None:
        """None for what is not there, or cannot be read whole."""
        if self.directory is None:
            return None
        try:
            values = json.loads((self.directory / f"{key}.json").read_text())
            return values, load_file(self.directory / f"{key}.safetensors")
        except (OSError, ValueError, SafetensorError):
            return None

    def put(self, key: str, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Arrays first, then the JSON that makes the entry visible, each written aside and renamed.

        Raises StoreError when the directory cannot be written to.
        """
        if self.directory is None:
            return
        contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory) as aside:
                (Path(aside) / "arrays").write_bytes(save(contiguous))
                (Path(aside) / "values").write_text(json.dumps(values))
                os.replace(f"{aside}/arrays", self.directory / f"{key}.safetensors")
                os.replace(f"{aside}/values", self.directory / f"{key}.json")
        except OSError as error:
            hint = "make room, give another --cache-dir, or build with --no-cache"
            raise StoreError(f"{self.directory}: results cannot be kept here ({error.strerror}); {hint}") from error


NOWHERE = Store(None)


def digest(*parts: Any) -> str:
    """A short hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint(program: Program) -> str:
    """Hash of the graph, every weight and table, and the sampler: equal programs compile to equal artifacts."""
    total = hashlib.sha256(str(program.graph.graph).encode())
    tensors = {**weights(program.graph), **program.tables}
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)  # numpy has no float8
    total.update(json.dumps(program.sampler.describe(), sort_keys=True).encode())
    total.update(repr(program.contract).encode())
    return total.hexdigest()[:32]
