"""A model repository for Triton Inference Server, made of a bundle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...compiler.errors import UnsupportedError
from ...compiler.recipe import read_recipe
from ...runtime.errors import BundleError, RequestError, did_you_mean
from ...runtime.manifest import Jump, Manifest, read, verify
from ...runtime.triton_model import BUNDLE
from ...runtime.version import __version__
from ..bundle import RECIPE_FILE, written_aside
from ..targets import TARGETS
from .folder import copy_runtime, folder_bytes, strip
from .triton_config import FILE, Serving, model_config, write_config

_COMMENT = "Written by dcompile"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# What the server imports. Its Python reads no PYTHONPATH; where another dcompile is installed, this one goes first.
_MODEL_PY = f'''"""{_COMMENT} {__version__}: serves the bundle beside this file, with the runtime beside it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dcompile.runtime.triton_model import TritonPythonModel  # noqa: E402, F401
'''


@dataclass(frozen=True)
class Deployed:
    """folder: of the model. version: the number of the one just written. alone: why requests are not merged, if so."""

    folder: Path
    version: int
    size_bytes: int
    alone: str | None


def deploy_triton(bundle: Path, repository: Path, name: str, serving: Serving) -> Deployed:
    """Write `bundle` as the next version of the model `name`, and the configuration that goes with it.

    Raises BundleError for a damaged bundle or a folder of someone else's, RequestError for settings that the bundle
    cannot serve, UnsupportedError where tritonclient is missing.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(f"--name {name!r}: needed letters, digits, '_', '-' and '.', the first a letter or a digit")
    manifest = read(bundle)
    verify(bundle, manifest)
    _check_gpus(manifest, serving)
    alone = why_alone(bundle, manifest)
    config = model_config(name, manifest, serving, merges=alone is None)
    folder = repository / name
    _check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    version = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
    with written_aside(folder / str(version)) as aside:
        (aside / BUNDLE).mkdir()
        strip(bundle, manifest, aside / BUNDLE)
        copy_runtime(aside)
        (aside / "model.py").write_text(_MODEL_PY, encoding="utf-8")
        verify(aside / BUNDLE, read(aside / BUNDLE))
        size_bytes = folder_bytes(aside)
    # Last, and in one piece: a server that polls takes a version without it for an unfinished model.
    write_config(config, f"{_COMMENT} {__version__} for {manifest.name} ({manifest.target})", folder / FILE)
    return Deployed(folder, version, size_bytes, alone)


def why_alone(bundle: Path, manifest: Manifest) -> str | None:
    """Why a sample would depend on the requests it is merged with, or None: then the server may merge."""
    if any(isinstance(row, Jump) for row in manifest.script):
        return "which engine runs at a step is decided for all samples of a batch together"
    path = bundle / RECIPE_FILE
    if not path.exists():
        raise BundleError(
            f"{path}: missing, so nothing says whether samples depend on their batch; deploy the bundle as it was built"
        )
    for name, options in read_recipe(path).steps_of_passes():
        per_tensor = options.get("activations") == "dynamic" and not options.get("symmetric")
        if name == "quantize" and options.get("format", "int8") == "int8" and per_tensor:
            return "activations are rounded to a range that all samples of a batch share (quant:activations=dynamic)"
    return None


def _check_gpus(manifest: Manifest, serving: Serving) -> None:
    target = TARGETS.get(manifest.target)
    if target is None:
        raise BundleError(f"target {manifest.target!r} is none of ours; {did_you_mean(manifest.target, TARGETS)}")
    if "cpu" not in target.devices and not serving.gpus:
        raise RequestError(
            f"this bundle is for NVIDIA GPUs (target {target.name}): give their numbers, as in --gpus 0,1"
        )
    if "gpu" not in target.devices and serving.gpus:
        raise UnsupportedError(f"--gpus: engines of target {target.name!r} run on the CPU; leave it out")


def _check_ours(folder: Path) -> None:
    """Raises BundleError for a model that dcompile did not write: its configuration would be lost."""
    config = folder / FILE
    if config.exists() and not config.read_text(encoding="utf-8").startswith(f"# {_COMMENT}"):
        raise BundleError(f"{config}: not written by dcompile; choose another --name, or move that model away")
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder}: is no folder; choose another --name")
