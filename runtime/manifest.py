"""manifest.json: what a bundle is, as frozen dataclasses whose field names are the JSON keys.

The annotations are the schema (see decode.py), so a wrong or missing field is named by its path, and `to_json` gives
back what `parse` read.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Literal

from .decode import decode
from .errors import BundleError, did_you_mean

SCHEMA = 1
FILE = "manifest.json"
DTYPES = ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool")

Dim = int | tuple[Literal["batch"], int]  # ["batch", k] is k times the batch


@dataclass(frozen=True)
class SampleSpec:
    shape: tuple[int, ...]  # without the batch
    dtype: str


@dataclass(frozen=True)
class Batch:
    min: int
    max: int


@dataclass(frozen=True)
class Condition:
    """An input beside the sample. `classes`: its values are 0..classes-1, called `labels` if those are given."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # without the batch
    classes: int | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Contract:
    """What a caller gives and gets. A sample starts as `initial_scale` times normal noise."""

    sample: SampleSpec
    value_range: tuple[float, float] | None  # of a finished sample; None: a latent
    predicts: str
    steps: int
    guidance: float
    initial_scale: float
    stochastic: bool  # slot "noise" holds fresh normal noise at every step
    batch: Batch
    conditions: tuple[Condition, ...]


@dataclass(frozen=True)
class StateSpec:
    """A tensor slot, with its batch axis; a state is zero when a request starts."""

    shape: tuple[Dim, ...]
    dtype: str

    def at(self, batch: int) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else dim[1] * batch for dim in self.shape)


@dataclass(frozen=True)
class Slot:
    slot: str


@dataclass(frozen=True)
class Table:
    table: str


@dataclass(frozen=True)
class EngineSpec:
    """A file, and where each input comes from and each output goes: a table gives the row that the call names."""

    file: str
    inputs: Mapping[str, Slot | Table]
    outputs: Mapping[str, Slot]


@dataclass(frozen=True)
class Call:
    call: str  # an engine
    row: int  # of every table it reads


@dataclass(frozen=True)
class Jump:
    """Go to script row `jump` (the script's length: finish) if the one float in `slot` is less than `below`."""

    jump: int
    slot: str
    below: float


@dataclass(frozen=True)
class FileSpec:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileSpec":
        """Measures a file in one streamed pass; its content is never in memory at once."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    schema: int = SCHEMA
    dcompile: str
    name: str
    target: str
    tools: Mapping[str, str]
    contract: Contract
    states: Mapping[str, StateSpec]
    engines: Mapping[str, EngineSpec]
    script: tuple[Call | Jump, ...]
    tables: str
    files: Mapping[str, FileSpec]

    @property
    def slots(self) -> dict[str, StateSpec]:
        """The slots whose shape is known before anything runs: sample, noise, conditions, states."""
        contract = self.contract
        sample = StateSpec((("batch", 1), *contract.sample.shape), contract.sample.dtype)
        given = {each.name: StateSpec((("batch", 1), *each.shape), each.dtype) for each in contract.conditions}
        return {"sample": sample} | ({"noise": sample} if contract.stochastic else {}) | given | dict(self.states)


def read(bundle: Path) -> Manifest:
    path = Path(bundle) / FILE
    if not path.is_file():
        raise BundleError(f"{path}: not found; a bundle is the directory that `dcompile MODEL -o DIRECTORY` writes")
    return parse(path.read_bytes(), source=str(path))


def parse(text: str | bytes, source: str = FILE) -> Manifest:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{source}: not JSON ({error}); the file is damaged: copy the bundle again") from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{source}: schema: expected a number from 1, found {schema!r}; is this a dcompile bundle?")
    if schema > SCHEMA:
        newer = f"written by a newer dcompile: schema {schema}, this runtime reads up to {SCHEMA}"
        raise BundleError(f"{source}: {newer}; upgrade dcompile")
    try:
        manifest: Manifest = decode(Manifest, value)
        _check(manifest)
    except BundleError as error:
        raise BundleError(f"{source}: {error}") from None
    return manifest


def to_json(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(manifest: Manifest, path: Path) -> None:
    """Writes the file `path`, after the checks that reading makes."""
    _check(manifest)
    path.write_text(to_json(manifest), encoding="utf-8")


def verify(bundle: Path, manifest: Manifest) -> None:
    """Raises BundleError naming the first file that is missing or is not, byte for byte, what was written."""
    for name, expected in manifest.files.items():
        path = Path(bundle) / name
        if not path.is_file():
            raise BundleError(f"{path}: missing; the bundle is incomplete: copy it again")
        if (size := path.stat().st_size) != expected.bytes:
            raise BundleError(f"{path}: {size} bytes, expected {expected.bytes}; damaged: copy the bundle again")
        if FileSpec.of(path) != expected:
            raise BundleError(f"{path}: its sha256 is not the manifest's; damaged or edited: copy the bundle again")


def _check(manifest: Manifest) -> None:
    """The facts that no single field shows: every name refers to something, every number is in range."""
    contract, engines, script, slots = manifest.contract, manifest.engines, manifest.script, manifest.slots
    batch = contract.batch
    _need(1 <= batch.min <= batch.max, f"contract.batch: expected 1 <= min <= max, found {batch.min} and {batch.max}")
    _need(contract.steps >= 1, f"contract.steps: expected 1 or more, found {contract.steps}")
    for each in contract.conditions:
        if each.labels is not None:
            found = f"{len(each.labels)} labels for {each.classes} classes"
            _need(len(each.labels) == each.classes, f"contract.conditions: {each.name!r} has {found}")
    for name, spec in slots.items():
        _need_known(f"dtype of {name!r}", spec.dtype, DTYPES)
    for name in manifest.files:
        path = PurePosixPath(name)
        _need(not path.is_absolute() and ".." not in path.parts, f"files: {name!r} is outside the bundle")
    _need_known("tables", manifest.tables, manifest.files)
    written = [*slots, *(target.slot for engine in engines.values() for target in engine.outputs.values())]
    for name, engine in engines.items():
        _need_known(f"engines.{name}.file", engine.file, manifest.files)
        for port, source in engine.inputs.items():
            if isinstance(source, Slot):
                _need_known(f"engines.{name}.inputs.{port}.slot", source.slot, written)
    _need(len(script) > 0, "script: expected a call or more, found none")
    for index, row in enumerate(script):
        if isinstance(row, Call):
            _need_known(f"script[{index}].call", row.call, engines)
            _need(row.row >= 0, f"script[{index}].row: expected 0 or more, found {row.row}")
        else:
            _need_known(f"script[{index}].slot", row.slot, written)
            within = 0 <= row.jump <= len(script)
            _need(within, f"script[{index}].jump: {row.jump} is outside the script (0..{len(script)})")


def _need(truth: bool, otherwise: str) -> None:
    if not truth:
        raise BundleError(otherwise)


def _need_known(where: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise BundleError(f"{where}: there is no {name!r}; {did_you_mean(name, known)}")
