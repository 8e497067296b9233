"""Write a bundle: aside first, renamed when whole, so that a reader finds a whole one or none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from ..compiler.program import Program
from ..runtime.errors import BundleError
from ..runtime.manifest import FILE, Batch, Contract, EngineSpec, FileSpec, Manifest, Slot, Table, read, verify, write
from ..runtime.version import __version__
from .lower import Lowered
from .target import Written

TABLES_FILE = "tables.safetensors"
RECIPE_FILE = "recipe.yaml"
# Measured on this very bundle, so written after the manifest; nothing that runs reads them.
REPORT_FILES = ("report.json", "report.html")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "diffusers")


def check_output(output: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises BundleError when `output` cannot be written, holds one of `inputs`, or is something other than a bundle.

    The last is no error if `force` is set: what is there will be replaced.
    """
    whole = output.resolve()
    for path in (*inputs, Path.cwd()):
        if path.exists() and path.resolve().is_relative_to(whole):
            raise BundleError(f"{output}: holds {path}, which a bundle there would replace; choose another -o")
    if output.exists() and not (output / FILE).exists() and not _is_empty_folder(output) and not force:
        raise BundleError(f"{output}: exists and is no bundle; choose another -o, or --force to replace it")
    parent = next(path for path in whole.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "cannot be written to" if parent.is_dir() else "is no folder"
        raise BundleError(f"{output}: {parent} {why}; choose another -o")


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write in; takes its name when the block ends, and is gone when the block raises.

    Raises BundleError when the disk is full.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    aside = output.parent / f".{output.name}.partial-{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
        _replace(aside, output)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise BundleError(
            f"{output}: {error.strerror}; nothing was written: make room, or choose another -o"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Folders that killed builds left beside `output`; those of running builds stay."""
    for path in output.parent.glob(f".{output.name}.*-*"):
        owner = path.name.rpartition("-")[2]
        # In a container a later build often has the number of the one that was killed: what bears our own is left over.
        if owner.isdigit() and (int(owner) == os.getpid() or not Path(f"/proc/{owner}").exists()):
            _remove(path)


def write_bundle(
    program: Program, lowered: Lowered, written: Written, target: str, recipe: Mapping[str, Any], folder: Path
) -> Manifest:
    """Tables, recipe and manifest beside the engines that are in `folder` already."""
    (folder / TABLES_FILE).write_bytes(save({name: table.contiguous() for name, table in lowered.tables.items()}))
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
    manifest = Manifest(
        dcompile=__version__,
        name=program.name,
        target=target,
        tools=tool_versions(),
        contract=_contract(program, written),
        states=lowered.states,
        engines={
            name: EngineSpec(
                file=written.files[name],
                inputs={
                    port: Table(source) if kind == "table" else Slot(source)
                    for port, (kind, source) in engine.inputs.items()
                },
                outputs={f"next_{slot}": Slot(slot) for slot in engine.outputs},
            )
            for name, engine in lowered.engines.items()
        },
        script=lowered.script,
        tables=TABLES_FILE,
        files={
            str(path.relative_to(folder)): FileSpec.of(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    )
    write(manifest, folder / FILE)
    return manifest


def _contract(program: Program, written: Written) -> Contract:
    if written.batch is None:
        return program.contract
    least, largest = written.batch
    return replace(program.contract, batch=Batch(least, largest))


def tool_versions() -> dict[str, str]:
    """What a bundle is made with: package -> version, of those that are installed."""
    found = {}
    for name in _TOOLS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_whole(folder: Path) -> bool:
    """Whether a bundle is there, and every file of it is as it was written."""
    try:
        verify(folder, read(folder))
    except BundleError:
        return False
    return True


def _replace(aside: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    os.replace(aside, output)
    _remove(old)


def _remove(path: Path) -> None:
    """Gone, whatever it was; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
