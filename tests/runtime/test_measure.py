import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcompile.runtime.errors import BundleError
from dcompile.runtime.measure import measure

Build = Callable[..., Any]


def command(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dcompile.runtime.measure", str(bundle), *options]
    return subprocess.run(line, check=False, capture_output=True, text=True)


def test_figures(tiny: Build) -> None:
    bundle = tiny()
    done = command(bundle.path, "--batch", "4", "--threads", "1", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bundle_bytes"] == sum(each.bytes for each in bundle.manifest.files.values())
    assert 0 < figures["step_s"] < figures["generate_s"]
    assert figures["load_s"] > 0
    assert 0 < figures["overhead_frac"] < 1
    if figures["pss_bytes"] is not None:
        assert 1e6 < figures["pss_bytes"] <= figures["peak_rss_bytes"] < 1e9


def test_only_one_engine(tiny: Build) -> None:
    bundle = tiny()
    (bundle.path / "engines/full.onnx").touch()
    assert measure(bundle.path, repeats=1, only="reuse")["step_s"] is not None
    with pytest.raises(BundleError, match="no engine is called 'reus'; did you mean 'reuse'"):
        measure(bundle.path, only="reus")
    bundle.edit(states={})
    with pytest.raises(BundleError, match="engine 'reuse' takes 'cached' from another engine; leave --only out"):
        measure(bundle.path, only="reuse")


def test_mistakes_are_one_line(tiny: Build, tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    done = command(tiny().path, "--batch", "5")
    assert "batch 5: this bundle takes 1..4" in done.stderr
