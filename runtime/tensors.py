"""Arrays of a .safetensors file, with numpy alone: one package less to install beside an engine.

The format: a little-endian 64-bit length, JSON of that length, {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .decode import decode
from .engines import Array
from .errors import BundleError, did_you_mean

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # from the end of the header


def read_tensors(path: Path) -> dict[str, Array]:
    """Every array by name, each in memory of its own. Raises BundleError for a file that is missing or damaged."""
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error
    except BundleError as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from None


def _read(file: BinaryIO, size: int) -> dict[str, Array]:
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < length <= size - _LENGTH_BYTES:
        raise BundleError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise BundleError("the header is no object")
    header.pop("__metadata__", None)
    start = _LENGTH_BYTES + length
    tensors = {}
    for name, value in header.items():
        entry = decode(_Entry, value, name)
        dtype = _checked_dtype(name, entry, size - start)
        file.seek(start + entry.data_offsets[0])
        tensors[name] = np.fromfile(file, dtype, prod(entry.shape)).reshape(entry.shape)
    return tensors


def _checked_dtype(name: str, entry: _Entry, data_bytes: int) -> np.dtype[np.generic]:
    """Raises BundleError unless the entry's numbers agree with each other and with the file."""
    if entry.dtype not in _DTYPES:
        raise BundleError(f"{name}: dtype {entry.dtype!r}; {did_you_mean(entry.dtype, _DTYPES)}")
    dtype, (begin, end) = np.dtype(_DTYPES[entry.dtype]), entry.data_offsets
    needed = dtype.itemsize * prod(entry.shape)
    if min(entry.shape, default=0) < 0 or not 0 <= begin <= end <= data_bytes or end - begin != needed:
        raise BundleError(f"{name}: {list(entry.shape)} {entry.dtype} at bytes {begin} to {end} of {data_bytes}")
    return dtype
