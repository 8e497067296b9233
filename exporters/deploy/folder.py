"""A bundle without what only its makers read, and the runtime beside it for machines that have no dcompile."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ...runtime import errors
from ...runtime.errors import BundleError
from ...runtime.manifest import FILE, Manifest, read, verify, write
from ..bundle import RECIPE_FILE, REPORT_FILES, written_aside

PACKAGE = "dcompile"
_UNREAD = (RECIPE_FILE, *REPORT_FILES)  # by the runtimes


@dataclass(frozen=True)
class Stripped:
    """Bytes on disk: of the bundle, of what was kept of it, and of the Python runtime beside it (0: left out)."""

    before_bytes: int
    after_bytes: int
    runtime_bytes: int


def deploy_dir(bundle: Path, output: Path, *, with_runtime: bool = False) -> Stripped:
    """Write what the runtimes need of `bundle` to the folder `output`; with_runtime adds the package that runs it.

    Raises BundleError for a damaged bundle, or where `output` is something else than a bundle or holds this one.
    """
    manifest = read(bundle)
    verify(bundle, manifest)
    if bundle.resolve().is_relative_to(output.resolve()):
        raise BundleError(f"{output}: holds the bundle that it would be made of; choose another folder")
    if output.exists() and not (output / FILE).exists() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output}: exists and is no bundle; choose another folder")
    with written_aside(output) as aside:
        strip(bundle, manifest, aside)
        after_bytes = folder_bytes(aside)
        if with_runtime:
            copy_runtime(aside)
        runtime_bytes = folder_bytes(aside) - after_bytes
    return Stripped(folder_bytes(bundle), after_bytes, runtime_bytes)


def strip(bundle: Path, manifest: Manifest, folder: Path) -> None:
    """The files that the runtimes read, hard links where that is possible, and a manifest that knows no others."""
    kept = {name: spec for name, spec in manifest.files.items() if name not in _UNREAD}
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(bundle / name, folder / name)
    write(replace(manifest, files=kept), folder / FILE)


def copy_runtime(folder: Path) -> None:
    """The package as far as its runtime: `import dcompile.runtime` works in `folder`."""
    runtime = Path(errors.__file__).parent
    target = folder / PACKAGE / runtime.name
    target.mkdir(parents=True)
    shutil.copy2(runtime.parent / "__init__.py", target.parent)
    for path in sorted(runtime.glob("*.py")):
        shutil.copy2(path, target)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _link_or_copy(source: Path, target: Path) -> None:
    """Bundles are never written to once they are whole, so that one content may have two names."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
