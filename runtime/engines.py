"""Engines: one file of a bundle each, all called the same way."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from .errors import EngineError, did_you_mean
from .manifest import Manifest, Slot, Table

Array = NDArray[Any]


class Port(NamedTuple):
    dtype: str
    shape: tuple[int | None, ...]  # None: any size


class Engine(Protocol):
    @property
    def inputs(self) -> Mapping[str, Port]: ...
    @property
    def outputs(self) -> Mapping[str, Port]: ...
    def run(self, inputs: dict[str, Array], /) -> dict[str, Array]: ...


def check_ports(name: str, engine: Engine, manifest: Manifest, tables: Mapping[str, Array]) -> None:
    """Raises EngineError unless the engine's inputs and outputs are those the manifest describes."""
    spec = manifest.engines[name]
    for role, said, found in (("input", spec.inputs, engine.inputs), ("output", spec.outputs, engine.outputs)):
        for port in said.keys() ^ found.keys():
            where = "in the manifest only" if port in said else "in the file only"
            raise EngineError(f"{spec.file}: {role} {port!r} is {where}; {did_you_mean(port, found)}; compile again")
        for port, (dtype, shape) in found.items():
            for needed_dtype, needed in _needed(said[port], manifest, tables):
                if dtype != needed_dtype or not _accepts(shape, needed):
                    says = f"the manifest says {needed_dtype} {_spelled(needed)}; compile again"
                    raise EngineError(f"{spec.file}: {role} {port!r} is {dtype} {_spelled(shape)}, {says}")


def _needed(source: Slot | Table, manifest: Manifest, tables: Mapping[str, Array]) -> list[tuple[str, tuple[int, ...]]]:
    """What the source holds at the least and the largest batch; nothing if only engines know its shape."""
    if isinstance(source, Table):
        table = tables[source.table]
        return [(str(table.dtype), table.shape[1:])]
    spec, batch = manifest.slots.get(source.slot), manifest.contract.batch
    return [(spec.dtype, spec.at(size)) for size in (batch.min, batch.max)] if spec else []


def _accepts(port: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(port) == len(shape) and all(have in (None, want) for have, want in zip(port, shape, strict=True))


def _spelled(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
