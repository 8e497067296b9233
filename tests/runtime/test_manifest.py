import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcompile.runtime.errors import BundleError
from dcompile.runtime.manifest import FileSpec, Jump, Manifest, StateSpec, parse, read, to_json, verify, write

Build = Callable[..., Any]


def test_round_trips_exactly(tiny: Build, tmp_path: Path) -> None:
    bundle = tiny(below=0.1)
    manifest = read(bundle.path)
    assert manifest == bundle.manifest
    text = (bundle.path / "manifest.json").read_text()
    assert to_json(parse(text)) == text
    write(manifest, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == text


def test_json_has_the_published_form(tiny: Build) -> None:
    value = json.loads(to_json(tiny(below=0.1).manifest))
    assert value["schema"] == 1
    assert value["states"]["cached"] == {"shape": [["batch", 1], 1, 4, 4], "dtype": "float32"}
    assert value["engines"]["reuse"]["inputs"]["row"] == {"table": "row"}
    assert value["engines"]["reuse"]["outputs"] == {"next_sample": {"slot": "sample"}}
    assert value["script"][:2] == [{"call": "full", "row": 0}, {"jump": 4, "slot": "metric", "below": 0.1}]
    assert value["contract"]["value_range"] == [-1.0, 1.0]


def test_state_shapes_follow_the_batch() -> None:
    assert StateSpec((("batch", 2), 64, 160), "float32").at(3) == (6, 64, 160)


def test_optional_fields_and_whole_floats(tiny: Build) -> None:
    value = json.loads(to_json(tiny().manifest))
    value["contract"] |= {"guidance": 3, "value_range": None}
    del value["contract"]["conditions"][0]["labels"]
    manifest = parse(json.dumps(value))
    assert isinstance(manifest.contract.guidance, float)
    assert manifest.contract.value_range is None
    assert manifest.contract.conditions[0].labels is None


def change(value: Any, path: str, to: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        value = value[part]
    if to is MISSING:
        del value[last]
    else:
        value[last] = to


MISSING = object()
MISTAKES = [
    ("schema", 2, "written by a newer dcompile: schema 2, this runtime reads up to 1; upgrade dcompile"),
    ("schema", "1", "schema: expected a number from 1, found '1'"),
    ("contract/steps", "thirty", "contract.steps: expected int, found 'thirty'"),
    ("contract/steps", True, "contract.steps: expected int, found True"),
    ("contract/steps", 0, "contract.steps: expected 1 or more, found 0"),
    ("contract/sample/shape", MISSING, "contract.sample.shape: missing"),
    ("contract/batch/max", 0, "contract.batch: expected 1 <= min <= max, found 1 and 0"),
    ("contract/value_range", [0], "contract.value_range: expected tuple[float, float] | None, found [0]"),
    ("contract/guidence", 3.0, "contract.guidence: unknown field; did you mean 'guidance'?"),
    ("contract/conditions/0/labels", ["A"], "contract.conditions: 'class_labels' has 1 labels for 5 classes"),
    ("contract/sample/dtype", "float33", "dtype of 'sample': there is no 'float33'; did you mean 'float32'?"),
    ("states/cached/shape", [["batches", 1]], "states.cached.shape[0][0]: expected Literal['batch'], found 'batches'"),
    ("engines/full/inputs/row", {"tabel": "row"}, "engines.full.inputs.row: expected Slot | Table, found {'tabel'"),
    ("engines/full/inputs/row", {"slot": "raw"}, "engines.full.inputs.row.slot: there is no 'raw'; known: sample"),
    ("engines/full/file", "full.onnx", "engines.full.file: there is no 'full.onnx'; did you mean 'engines/full.onnx'?"),
    ("tables", "table.safetensors", "tables: there is no 'table.safetensors'; did you mean 'tables.safetensors'?"),
    ("script", [], "script: expected a call or more, found none"),
    ("script/2/call", "fulll", "script[2].call: there is no 'fulll'; did you mean 'full'?"),
    ("script/0/row", -1, "script[0].row: expected 0 or more, found -1"),
    ("script/1/jump", 7, "script[1].jump: 7 is outside the script (0..6)"),
    ("script/1/slot", "metrik", "script[1].slot: there is no 'metrik'; did you mean 'metric'?"),
    ("files/..~shadow", {"bytes": 1, "sha256": ""}, "files: '../shadow' is outside the bundle"),
    ("files/weights.bin", {"bytes": 1}, "files.weights.bin.sha256: missing"),
]


@pytest.mark.parametrize(("path", "to", "message"), MISTAKES)
def test_mistakes_are_named_by_path(tiny: Build, path: str, to: Any, message: str) -> None:
    value = json.loads(to_json(tiny(below=0.1).manifest))
    change(value, path, to) if "~" not in path else value["files"].update({"../shadow": to})
    with pytest.raises(BundleError) as caught:
        parse(json.dumps(value), source="build/manifest.json")
    assert str(caught.value).startswith("build/manifest.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_manifest(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere/manifest.json: not found"):
        read(tmp_path / "nowhere")
    bundle = tiny()
    path = bundle.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BundleError, match=r"manifest.json: not JSON .*damaged"):
        read(bundle.path)
    path.write_text("[]")
    with pytest.raises(BundleError, match="is this a dcompile bundle"):
        read(bundle.path)


def test_writing_checks_too(tiny: Build) -> None:
    with pytest.raises(BundleError, match="outside the script"):
        tiny().edit(script=(Jump(9, "metric", 0.0),))


def test_a_jump_may_go_to_the_end(tiny: Build) -> None:
    bundle = tiny()
    bundle.edit(script=(*bundle.manifest.script, Jump(4, "metric", 0.0)))
    assert isinstance(read(bundle.path), Manifest)


def test_verify_names_the_damaged_file(tiny: Build) -> None:
    bundle = tiny()
    verify(bundle.path, bundle.manifest)
    weights = bundle.path / "engines/weights.bin"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"engines/weights.bin: its sha256"):
        verify(bundle.path, bundle.manifest)
    weights.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"engines/weights.bin: 63 bytes, expected 64"):
        verify(bundle.path, bundle.manifest)
    weights.unlink()
    with pytest.raises(BundleError, match=r"engines/weights.bin: missing"):
        verify(bundle.path, bundle.manifest)


def test_file_spec(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert FileSpec.of(tmp_path / "abc") == FileSpec(3, digest)
