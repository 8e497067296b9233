"""Load on the real server, by the script that makes the figures: a minute of thousands of requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bare_environment import ROOT
from tiny_bundle import write_tiny
from triton_server import Installed


def test_load_merges_requests_and_takes_no_memory(triton: Installed, tmp_path: Path) -> None:
    """A model that computes next to nothing: what grows with each request shows soonest."""
    bundle = write_tiny(tmp_path / "bundle")
    (bundle.path / "recipe.yaml").write_text("passes: []\n")
    script, output = ROOT / "benchmarks" / "triton_load.py", tmp_path / "load.json"
    options = [
        "--bundle",
        str(bundle.path),
        "--output",
        str(output),
        "--seconds",
        "2",
        "--minutes",
        "0.85",
        "--instances",
        "1",
    ]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    (serving,) = found["servings"]
    assert [row["concurrency"] for row in serving["load"]] == [1, 4, 16]
    alone, _, many = serving["load"]
    assert alone["mean_batch"] == 1
    assert many["mean_batch"] > 2  # of at most 4, the bundle's
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in serving["load"])
    assert found["memory"]["requests"] > 500  # a page lost at each would be seen
