"""A loaded bundle, ready to generate samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import random
from .backends import open_engine
from .engines import Array, check_ports
from .errors import BundleError, RequestError, did_you_mean
from .images import to_pixels
from .manifest import Call, Manifest, Table, read
from .manifest import verify as verify_files
from .request import Label, read_conditions, read_seeds
from .script import Stage, run
from .tensors import read_tensors


@dataclass(frozen=True)
class Timing:
    """Where the last `generate` spent its time.

    calls: of engines. copied_bytes: what engines copied between their own memory and arrays.
    """

    total_s: float
    engines_s: float
    calls: int
    steps: int
    copied_bytes: int = 0

    @property
    def overhead_frac(self) -> float:
        """The part of the time that was not spent in engines."""
        return 1.0 - self.engines_s / self.total_s


def load(
    path: str | Path, *, verify: bool = True, threads: int | None = None, options: Mapping[str, str] | None = None
) -> "Session":
    """Opens the bundle directory `path`; schema, files, tables and shapes are checked before anything runs.

    Args:
        verify: compare every file's size and sha256 with the manifest.
        threads: for one operator; None lets the engine decide.
        options: settings of the engine, by its own names.
    """
    manifest = read(Path(path))
    if verify:
        verify_files(Path(path), manifest)
    return Session(Path(path), manifest, threads=threads, options=options)


class Session:
    """Loads on construction. Every request starts from zero states, so none depends on the ones before it."""

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.manifest = manifest
        self.last_timing: Timing | None = None
        self._tables = _read_tables(bundle, manifest)
        self._stages: dict[str, Stage] = {}
        for name, spec in manifest.engines.items():
            engine = open_engine(manifest.target, bundle / spec.file, threads=threads, options=options)
            check_ports(name, engine, manifest, self._tables)
            self._stages[name] = Stage(spec, engine)

    def generate(
        self,
        *,
        labels: Label | Sequence[Label] | None = None,
        conditions: Mapping[str, Any] | None = None,
        seed: int | Sequence[int] = 0,
        callback: Callable[[int, int, Array], None] | None = None,
    ) -> NDArray[np.float32]:
        """Samples [B, *sample shape]. A sample depends on its own seed and conditions, not on its batch.

        Args:
            labels: names or numbers for the one condition that has classes.
            conditions: values [B, ...] by condition name.
            seed: sample i starts from seed + i; or one seed for each sample.
            callback: called with (step, steps, sample) after every step, from 1.
        """
        if not self._stages:
            raise RequestError("the session is closed; load the bundle again")
        started = perf_counter()
        contract = self.manifest.contract
        given = read_conditions(contract, labels, conditions)
        seeds = read_seeds(contract, seed, given)

        def noise(draw: int) -> Array:
            return random.normal(seeds, draw, contract.sample.shape).astype(contract.sample.dtype)

        slots: dict[str, Array] = {"sample": noise(0) * np.dtype(contract.sample.dtype).type(contract.initial_scale)}
        for name, spec in self.manifest.states.items():
            slots[name] = np.zeros(spec.at(len(seeds)), dtype=spec.dtype)
        slots |= given

        def refill(step: int) -> None:
            slots["noise"] = noise(step + 1)

        def report(step: int) -> None:
            assert callback is not None
            callback(step, contract.steps, slots["sample"])

        spent = run(
            self.manifest.script,
            self._stages,
            self._tables,
            slots,
            before_step=refill if contract.stochastic else None,
            after_step=report if callback else None,
        )
        self.last_timing = Timing(perf_counter() - started, **spent._asdict())
        return slots["sample"].astype(np.float32, copy=False)

    def images(self, samples: Array) -> NDArray[np.uint8]:
        """Samples [B, C, H, W] -> pixels [B, H, W, C]: floor(255 * x + 0.5), value_range mapped to x in 0..1.

        Without a value_range (a latent), the first three channels (the first, if there are fewer) are stretched
        between each sample's own minimum and maximum: for looking at, not for measuring.
        """
        return to_pixels(samples, self.manifest.contract.value_range)

    def reset(self) -> None:
        """Forgets the last request. States do not outlive a request, so only `last_timing` is left to forget."""
        self.last_timing = None

    def close(self) -> None:
        """Releases the engines and their memory."""
        self._stages.clear()
        self._tables.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_tables(bundle: Path, manifest: Manifest) -> dict[str, Array]:
    """The tables, once every row that a call asks for is known to be there."""
    path = bundle / manifest.tables
    tables = read_tensors(path)
    calls = [(index, row) for index, row in enumerate(manifest.script) if isinstance(row, Call)]
    for name, spec in manifest.engines.items():
        for table in (source.table for source in spec.inputs.values() if isinstance(source, Table)):
            if table not in tables or tables[table].ndim == 0:
                raise BundleError(f"{path}: engine {name!r} reads rows of {table!r}; {did_you_mean(table, tables)}")
            for index, row in calls:
                if row.call == name and row.row >= len(tables[table]):
                    found = f"table {table!r} has {len(tables[table])} rows"
                    raise BundleError(f"{path}: {found}, script[{index}] asks for row {row.row}; compile again")
    return tables
