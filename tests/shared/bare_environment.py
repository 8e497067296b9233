"""A Python with numpy and ONNX Runtime and nothing else of ours, as on a small device or in a server's image."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "bare"
PACKAGES = ("numpy", "onnxruntime")


class CannotInstall(Exception):
    """Why the environment is not to be had: usually there is no network."""


def bare_python(folder: Path = FOLDER, **versions: str) -> Path:
    """Its interpreter; made on the first call and kept. versions: other than those of constraints.txt, by package."""
    python = folder / "bin" / "python"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    packages = [f"{name}=={versions.get(name, pinned[name])}" for name in PACKAGES]
    wanted = [sys.version, *packages]
    if not is_current(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        pip("--python", str(python), "install", "-q", *packages)
        mark_current(folder, wanted)
    return python


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise CannotInstall(f"pip {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


def is_current(folder: Path, wanted: Sequence[str]) -> bool:
    stamp = folder / "installed.json"
    return stamp.exists() and json.loads(stamp.read_text()) == list(wanted)


def mark_current(folder: Path, wanted: Sequence[str]) -> None:
    (folder / "installed.json").write_text(json.dumps(list(wanted)))


if __name__ == "__main__":
    print(bare_python())
