"""What is written for Triton Inference Server. That the server takes it is tested in tests/deploy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tiny_bundle import tiny
from tritonclient.grpc.model_config_pb2 import TYPE_INT64, TYPE_STRING, ModelConfig

from dcompile.compiler.errors import UnsupportedError
from dcompile.exporters.deploy.triton import deploy_triton, why_alone
from dcompile.exporters.deploy.triton_config import Serving
from dcompile.runtime import BundleError, RequestError
from dcompile.runtime.manifest import Batch, Condition, SampleSpec, read, verify

__all__ = ["tiny"]

Build = Callable[..., Any]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bundle(tiny: Build) -> Any:
    """The tiny bundle, with the recipe of an untouched model."""
    made = tiny()
    (made.path / "recipe.yaml").write_text("passes: []\n")
    return made


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def test_config_says_what_the_bundle_takes(bundle: Any, tmp_path: Path) -> None:
    serving = Serving(instances=3, max_batch=2, max_queue_delay_us=700, threads=5)
    config = config_of(deploy_triton(bundle.path, tmp_path, "tiny", serving).folder)
    inputs = {each.name: (each.data_type, list(each.dims), each.optional) for each in config.input}
    assert inputs == {
        "seed": (TYPE_INT64, [1], False),
        "class_labels": (TYPE_INT64, [1], True),
        "label": (TYPE_STRING, [1], True),
        "steps": (TYPE_INT64, [1], True),
    }
    assert {each.name: list(each.dims) for each in config.output} == {"samples": [1, 4, 4], "images": [4, 4, 1]}
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 2)
    assert [(each.count, each.kind, list(each.gpus)) for each in config.instance_group] == [(3, 2, [])]  # KIND_CPU
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert config.parameters["threads"].string_value == "5"
    assert [set(each.inputs) for each in config.model_warmup] == [{"seed", "class_labels"}]


def test_a_version_is_whole_and_runs_by_itself(bundle: Any, tmp_path: Path) -> None:
    done = deploy_triton(bundle.path, tmp_path, "tiny", Serving())
    assert (done.folder, done.version, done.alone) == (tmp_path / "tiny", 1, None)
    version = tmp_path / "tiny" / "1"
    verify(version / "bundle", read(version / "bundle"))
    assert not (version / "bundle/recipe.yaml").exists()
    code = f"import sys; sys.path.insert(0, {str(version)!r}); import dcompile.runtime.triton_model as model"
    code += "; print(model.__file__)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(version / "dcompile/runtime/triton_model.py")
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"1", "config.pbtxt"}  # and nothing half-written


def test_the_next_bundle_is_the_next_version(bundle: Any, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        assert deploy_triton(bundle.path, tmp_path, "tiny", Serving(instances=number)).version == number
    shutil.rmtree(tmp_path / "tiny" / "2")
    assert deploy_triton(bundle.path, tmp_path, "tiny", Serving()).version == 4
    assert config_of(tmp_path / "tiny").instance_group[0].count == 1


def test_defaults_follow_the_bundle(bundle: Any, tmp_path: Path) -> None:
    contract = bundle.manifest.contract
    bundle.edit(contract=replace(contract, batch=Batch(1, 64), value_range=None))  # and a latent
    config = config_of(deploy_triton(bundle.path, tmp_path, "tiny", Serving()).folder)
    assert config.max_batch_size == 8
    assert [each.name for each in config.output] == ["samples"]
    bundle.edit(contract=replace(contract, sample=SampleSpec((4, 4), "float32")))  # no picture
    config = config_of(deploy_triton(bundle.path, tmp_path, "flat", Serving()).folder)
    assert [(each.name, list(each.dims)) for each in config.output] == [("samples", [4, 4])]


def test_other_conditions_are_inputs_that_must_be_given(bundle: Any, tmp_path: Path) -> None:
    contract = bundle.manifest.contract
    text = Condition("text", "float32", (77, 16))
    bundle.edit(contract=replace(contract, conditions=(replace(contract.conditions[0], labels=None), text)))
    config = config_of(deploy_triton(bundle.path, tmp_path, "tiny", Serving()).folder)
    found = [(each.name, list(each.dims), each.optional) for each in config.input]
    assert found == [
        ("seed", [1], False),
        ("class_labels", [1], False),
        ("text", [77, 16], False),
        ("steps", [1], True),
    ]


def test_what_would_collide_is_refused(bundle: Any, tmp_path: Path) -> None:
    contract = bundle.manifest.contract
    bundle.edit(contract=replace(contract, conditions=(*contract.conditions, Condition("seed", "float32", ()))))
    with pytest.raises(UnsupportedError, match="a condition is called 'seed'"):
        deploy_triton(bundle.path, tmp_path, "tiny", Serving())
    bundle.edit(
        contract=replace(contract, conditions=(contract.conditions[0], replace(contract.conditions[0], name="b")))
    )
    with pytest.raises(UnsupportedError, match="conditions class_labels and b both have label names"):
        deploy_triton(bundle.path, tmp_path, "tiny", Serving())
    assert not (tmp_path / "tiny").exists()


def test_requests_are_merged_only_where_a_sample_is_its_own(tiny: Build, tmp_path: Path) -> None:
    bundle = tiny(below=0.5)
    done = deploy_triton(bundle.path, tmp_path, "jumps", Serving())
    assert done.alone is not None
    assert done.alone.startswith("which engine runs at a step is decided for all samples")
    assert not config_of(done.folder).HasField("dynamic_batching")
    plain = replace(bundle.manifest, script=bundle.manifest.script[:1])
    with pytest.raises(
        BundleError, match=r"recipe.yaml: missing, so nothing says whether samples depend on their batch"
    ):
        why_alone(bundle.path, plain)
    recipe = bundle.path / "recipe.yaml"
    for options, alone in {
        "{activations: dynamic, symmetric: false}": True,
        "{activations: dynamic, symmetric: true}": False,  # a grid for each token
        "{activations: static, symmetric: false}": False,
        "{format: nvfp4, activations: dynamic, symmetric: false}": False,  # scales for each block
    }.items():
        recipe.write_text(f"passes: [quantize: {options}]\n")
        assert (why_alone(bundle.path, plain) is not None) == alone


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "-x"])
def test_names_are_those_of_folders(bundle: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="--name"):
        deploy_triton(bundle.path, tmp_path / "models", name, Serving())
    assert not (tmp_path / "models").exists()


def test_settings_that_the_bundle_cannot_serve(bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--max-batch 5: this bundle takes 1 to 4"):
        deploy_triton(bundle.path, tmp_path, "tiny", Serving(max_batch=5))
    with pytest.raises(UnsupportedError, match="engines of target 'onnx' run on the CPU"):
        deploy_triton(bundle.path, tmp_path, "tiny", Serving(gpus=(0,)))
    bundle.edit(target="trt")
    with pytest.raises(RequestError, match="--gpus 0,1"):
        deploy_triton(bundle.path, tmp_path, "tiny", Serving())
    config = config_of(deploy_triton(bundle.path, tmp_path, "tiny", Serving(gpus=(0, 2), instances=2)).folder)
    assert [(each.count, each.kind, list(each.gpus)) for each in config.instance_group] == [(2, 1, [0, 2])]  # KIND_GPU


def test_models_of_others_are_left_alone(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.pbtxt").write_text('name: "theirs"\n')
    with pytest.raises(BundleError, match="not written by dcompile; choose another --name"):
        deploy_triton(bundle.path, tmp_path, "theirs", Serving())
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is no folder"):
        deploy_triton(bundle.path, tmp_path, "file", Serving())


def test_the_command(bundle: Any, tmp_path: Path, command: Command) -> None:
    done = command("deploy", "triton", bundle.path, tmp_path / "models", "--name", "tiny", "--max-batch", 3)
    assert done.returncode == 0, done.stderr
    assert f"model     {tmp_path}/models/tiny/1" in done.stdout
    assert "batching  merges requests" in done.stdout
    assert config_of(tmp_path / "models/tiny").max_batch_size == 3
    done = command("deploy", "triton", bundle.path, tmp_path / "models", "--name", "tiny", "--gpus", "all")
    assert done.returncode == 2
    assert "--gpus 'all': needed whole numbers, as in 0,1" in done.stderr
    assert command("deploy", "--help").returncode == 0
