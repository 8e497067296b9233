"""Trees and tables for a terminal, as text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from dcompile.compiler.errors import RecipeError
from dcompile.compiler.program import Program
from dcompile.compiler.recipe import Recipe
from dcompile.exporters import explain
from dcompile.exporters.explain import bench_table, bundle_tree, passes_table, plan_tree, program_tree
from dcompile.exporters.settings import Settings
from dcompile.passes import PASSES, SHORT_NAMES
from dcompile.runtime import BundleError


def lines(shown: RenderableType) -> list[str]:
    """Without the branches of trees and the frames of tables."""
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return [line.strip("│├└─┃ ").rstrip() for line in capture.get().splitlines()]


def test_a_model_is_its_contract_its_sampler_and_its_regions(dit: Program) -> None:
    shown = lines(program_tree(dit))
    assert shown[0].startswith(f"{dit.name}  ")
    assert shown[1] == (
        "sample 4x8x8, predicts flow, 6 steps, guidance 2, batch 1..64, conditions: class_labels (10 classes)"
    )
    assert shown[2].startswith("sampler FlowMatchEulerDiscreteScheduler")
    blocks = [line for line in shown if line.startswith("transformer_blocks.")]
    assert len(blocks) == 3
    assert blocks[0].startswith("transformer_blocks.0  BasicTransformerBlock  block  ")
    assert blocks[0].endswith("attn1 + ff")


def test_stages_show_what_is_in_them(unet: Program) -> None:
    shown = lines(program_tree(unet))
    assert any(line.startswith("down_blocks.0  DownBlock2D  stage") for line in shown)
    assert any(line.startswith("down_blocks.0.resnets.0  ResnetBlock2D  ") for line in shown)


def test_a_plan_shows_passes_with_all_options_and_which_steps_are_full(
    dit: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(explain, "ingest", lambda source: dit)
    recipe = Recipe(passes=("cache:interval=2", "fold"), gate="psnr>=20")
    shown = lines(plan_tree("model", tmp_path / "out", recipe, Settings(cache=Path("/kept"))))
    assert shown[0] == f"model -> {tmp_path / 'out'}  (dry run: nothing is measured or written)"
    options = "method=interval, interval=2, warmup=2, last=0, predictor=taylor1, site=auto, front=1, back=0"
    assert f"cache_steps  {options}, schedule=interval, apart=True, noise_aware=True" in shown
    assert "1 site (transformer_blocks_1_2); full steps: [0, 1, 3, 5]" in shown
    assert "fold_timestep" in shown
    assert "judge none; gates: psnr>=20" in shown
    assert "target onnx, fp32, layout auto; kept results in /kept" in shown


def test_a_plan_is_refused_where_a_build_would_be(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a")
    with pytest.raises(RecipeError, match="no such target"):
        plan_tree("model", tmp_path / "out", Recipe(target="onxn"), Settings())
    with pytest.raises(BundleError, match="exists and is no bundle"):
        plan_tree("model", tmp_path, Recipe(), Settings())


def test_a_cache_without_a_site_is_said_in_the_plan(dit: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "ingest", lambda source: dit)
    shown = lines(plan_tree("model", Path("out"), Recipe(passes=("cache:site=cut",)), Settings(evaluate=False)))
    assert any(line.startswith("cache_steps: found no site of kind 'cut'") for line in shown)
    assert "calibration on 8 samples; evaluation: nothing" in shown


def test_a_bundle_is_its_engines_its_script_and_its_files(built: Path) -> None:
    shown = lines(bundle_tree(built, check=True))
    assert shown[0].startswith("built0  target onnx, ")
    assert "engines (4 calls a sample)" in shown
    assert any(line.startswith("full  2 calls  engines/full.onnx, ") for line in shown)
    assert "script (4 steps)" in shown
    assert "2 x full  steps 0, 2" in shown
    assert "2 x reuse  steps 1, 3" in shown
    assert "files (all match their checksums)" in shown
    assert any(line.startswith("made with torch ") for line in shown)


def test_only_a_check_reads_the_files(built: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(built, tmp_path / "bundle")
    (bundle / "engines/weights.bin").write_bytes(b"")
    assert "files" in lines(bundle_tree(bundle, check=False))
    with pytest.raises(BundleError, match=r"weights\.bin: 0 bytes, expected"):
        bundle_tree(bundle, check=True)


def test_passes_are_listed_with_their_defaults() -> None:
    shown = "\n".join(lines(passes_table()))
    for name in (*PASSES, *SHORT_NAMES, "interval=3", "method='greedy'", "format='int8'"):
        assert name in shown


def test_bundles_are_compared_in_a_row_each() -> None:
    row: dict[str, Any] = dict(
        latency_s=0.5, latency_min_s=0.4, latency_max_s=0.6, step_s=0.05, samples_per_s=2048.0, speedup=1.5, load_s=0.1,
        peak_rss_bytes=2e8, bundle_bytes=1e6,
    )  # fmt: skip
    shown = next(line for line in lines(bench_table({"bundles": {"a/b": row}})) if line.startswith("a/b"))
    for figure in ("500 ms", "400 ms..600 ms", "50.0 ms", "2.05 k", "1.50", "100 ms", "200 MB", "1 MB"):
        assert figure in shown
