"""A real Triton Inference Server, and an environment with numpy and ONNX Runtime alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from bare_environment import CannotInstall, bare_python
from triton_server import Installed, install


@pytest.fixture(scope="session")
def bare() -> Path:
    """The interpreter of that environment. The first call installs it into build/bare."""
    try:
        return bare_python()
    except CannotInstall as error:
        pytest.skip(f"no environment to run in: {error}")


@pytest.fixture(scope="session")
def triton() -> Installed:
    """The first call installs it into build/triton."""
    try:
        return install()
    except CannotInstall as error:
        pytest.skip(f"no Triton Inference Server: {error}")
