"""What the driver says: here, or on a machine whose driver is written for the test."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from dcompile.runtime import cuda

DRIVER = """
typedef int CUdevice;
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
int cuDeviceGet(CUdevice *device, int ordinal) { *device = 7; return ordinal >= DEVICES; }
int cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return device != 7;
}
"""


def library(folder: Path, devices: int) -> Path:
    """A real shared library with the driver's four functions."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, built = folder / "driver.c", folder / f"libcuda{devices}.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", f"-DDEVICES={devices}", source, "-o", built], check=True)
    return built


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", "libnothing.so.1")
    assert cuda.compute_capability() is None
    assert cuda.why_no_gpu() == "this machine has no CUDA driver (libnothing.so.1 is not found)"


def test_a_driver_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", str(library(tmp_path, 0)))
    assert cuda.compute_capability() is None
    assert cuda.why_no_gpu() == "the CUDA driver finds no GPU"


def test_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", str(library(tmp_path, 2)))
    assert cuda.compute_capability() == "8.9"
    assert cuda.why_no_gpu() is None


def test_this_machine_is_consistent() -> None:
    has_driver = True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        has_driver = False
    assert (cuda.why_no_gpu() is None) == (cuda.compute_capability() is not None)
    assert has_driver or cuda.compute_capability() is None
