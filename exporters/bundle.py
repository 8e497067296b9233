"""Write a bundle: aside first, renamed when whole, so that a reader finds a whole one or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from ..compiler.program import Program
from ..runtime.errors import BundleError
from ..runtime.manifest import FILE, EngineSpec, FileSpec, Manifest, Slot, Table, write
from .lower import Lowered

TABLES_FILE = "tables.safetensors"
RECIPE_FILE = "recipe.yaml"
# Measured on this very bundle, so written after the manifest; nothing that runs reads them.
REPORT_FILES = ("report.json", "report.html")
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers")


def check_output(output: Path, force: bool) -> None:
    """Raises BundleError when `output` holds something that is not a bundle, and `force` is not set."""
    if output.exists() and not (output / FILE).exists() and not _is_empty_folder(output) and not force:
        raise BundleError(f"{output}: exists and is no bundle; choose another -o, or --force to replace it")


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write in; takes its name when the block ends, and is gone when the block raises."""
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    aside = output.parent / f".{output.name}.partial-{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
        _replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Folders that killed builds left beside `output`; those of running builds stay."""
    for path in output.parent.glob(f".{output.name}.*-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def write_bundle(
    program: Program, lowered: Lowered, files: Mapping[str, str], target: str, recipe: Mapping[str, Any], folder: Path
) -> Manifest:
    """Tables, recipe and manifest beside the engines that are in `folder` already.

    files: engine name -> path in the bundle.
    """
    save_file({name: table.contiguous() for name, table in lowered.tables.items()}, folder / TABLES_FILE)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
    manifest = Manifest(
        dcompile=_version("dcompile"),
        name=program.name,
        target=target,
        tools={name: _version(name) for name in _TOOLS if _version(name)},
        contract=program.contract,
        states=lowered.states,
        engines={
            name: EngineSpec(
                file=files[name],
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


def _replace(aside: Path, output: Path) -> None:
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    if output.exists():
        os.replace(output, old)
    os.replace(aside, output)
    shutil.rmtree(old, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
