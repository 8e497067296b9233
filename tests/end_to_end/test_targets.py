"""One recipe on every target: the same pictures where engines run here, real engines where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import dcompile
from dcompile.compiler import quality
from dcompile.compiler.errors import RecipeError
from dcompile.exporters.settings import Settings
from dcompile.runtime import EngineError, load
from dcompile.runtime.manifest import read

GLYPHS = Path(__file__).parents[2] / "examples" / "glyphs" / "model"
PASSES = "prune:count=1,cache:interval=2,{quant},fold"
RUN_HERE = ("onnx", "openvino", "aoti")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of passes that more than one target needs."""
    return tmp_path_factory.mktemp("kept")


def compiled(model: Path, output: Path, kept: Path, **given: Any) -> tuple[Path, dict[str, Any]]:
    recipe = dcompile.Recipe(steps=6, guidance=2.0, calibration_samples=1, **given)
    built = dcompile.compile(str(model), output, recipe, Settings(cache=kept, threads=1, evaluate=False))
    report: dict[str, Any] = json.loads((built.bundle / "report.json").read_text())
    return built.bundle, report


def samples(bundle: Path) -> NDArray[np.float32]:
    with load(bundle, threads=1) as session:
        return session.generate(labels=[0, 3, 7], seed=5)


@pytest.mark.parametrize("quant", ["", "quant:max_error=1"], ids=["real", "int8"])
def test_one_recipe_gives_the_same_pictures_on_every_target(
    quant: str, dit_folder: Path, kept: Path, tmp_path: Path
) -> None:
    """In fp32 to rounding. INT8 grids differ by target (with or without a zero point), so the pictures do, a little."""
    passes = (PASSES.format(quant=quant).replace(",,", ","),)
    found = {}
    for target in RUN_HERE:
        bundle, report = compiled(dit_folder, tmp_path / target, kept, target=target, precision="fp32", passes=passes)
        assert report["not_executed"] is None
        assert all(each["relative_error"] <= each["tolerance"] for each in report["parity"])
        found[target] = samples(bundle)
    size = float(np.ptp(found["onnx"]))
    for target in RUN_HERE[1:]:
        if quant:
            assert quality.psnr(found[target], found["onnx"], size).min() > 25
        else:
            np.testing.assert_allclose(found[target], found["onnx"], atol=1e-4 * size)


@pytest.mark.parametrize(
    ("quant", "capabilities", "kernel"),
    [("quant", ["8.0", "8.6", "8.9", "12.0"], "int8"), ("quant:format=fp8", ["8.9", "12.0"], "fp8"),
     ("quant:format=nvfp4", ["12.0"], "fp4")],
    ids=["int8", "fp8", "nvfp4"],
)  # fmt: skip
def test_tensorrt_engines_of_the_example_are_real(
    quant: str, capabilities: list[str], kernel: str, kept: Path, tmp_path: Path
) -> None:
    bundle, report = compiled(
        GLYPHS, tmp_path / "trt", kept, target="trt", passes=(PASSES.format(quant=quant),), profiles={"one": (1, 1, 1)}
    )
    for capability in capabilities:
        assert capability in report["not_executed"]
    assert "not executed here" in report["not_executed"]
    manifest = read(bundle)
    assert (manifest.contract.batch.min, manifest.contract.batch.max) == (1, 1)
    engines = [bundle / engine.file for engine in manifest.engines.values()]
    assert all(path.stat().st_size > 1000 for path in engines)
    weights = next(row for row in report["table"] if row["metric"] == "parameters")["after"]
    assert sum(path.stat().st_size for path in engines) > weights / 2  # 4 bits each, at the least
    promised = next(each for each in report["passes"] if each["name"] == "quantize")["changed"]
    rows = [row for regions in report["regions"].values() for row in regions]
    assert promised >= 40
    running = sum(kernel in types.lower() or kernel in name.lower() for _, name, types in rows)
    assert running >= promised / 3  # q, k and v become one kernel
    with pytest.raises(EngineError, match="CUDA"):
        load(bundle)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_capability": "9.0"}, "--compute-capability 9.0: TensorRT builds for 7.5, 8.0"),
        ({"compute_capability": "8.0", "passes": ("quant:format=fp8",)}, "do not compute in fp8, which needs 8.9"),
        ({"target": "onnx", "passes": ("quant:format=nvfp4",)}, "there is no FP4 kernel for CPUs; take format=int4"),
        ({"target": "onnx", "compute_capability": "8.9"}, "target 'onnx' compiles for no GPU; leave it out"),
        ({"target": "openvino", "profiles": {"one": (1, 1, 1)}}, "target 'openvino' takes any batch; leave it out"),
        ({"gate": "speedup>=2"}, "gate on 'speedup' needs to run the engines, but"),
    ],
)
def test_what_a_target_cannot_do_is_refused_before_any_work(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = dcompile.Recipe.model_validate({"target": "trt", **given})
    with pytest.raises(RecipeError) as error:
        dcompile.compile("nowhere", tmp_path / "out", recipe, Settings())
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
