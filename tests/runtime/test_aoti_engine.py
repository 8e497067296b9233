"""AOTInductor packages run from Python and from C++, and what they refuse."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcompile.compiler.step_graph import flatten
from dcompile.compiler.variants import Variant
from dcompile.exporters.aoti import target as aoti
from dcompile.exporters.lower import Lowered
from dcompile.exporters.target import TargetOptions
from dcompile.quant import formats
from dcompile.runtime.aoti_engine import AotiEngine, cpu_features, read_metadata
from dcompile.runtime.engines import Port
from dcompile.runtime.errors import EngineError

Ops = torch.ops.dcompile
Inputs = dict[str, NDArray[np.generic]]


class Net(nn.Module):
    """Every kind of constant: packed for a linear layer and a convolution in INT8, for one in bfloat16, and plain."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(4 / 127))
        for name, shape in {"conv": (8, 4, 3, 3), "linear": (16, 8)}.items():
            stored, scale = formats.quantize_int8(torch.randn(shape) / np.prod(shape[1:]) ** 0.5)
            self.register_buffer(name, stored)
            self.register_buffer(f"{name}_scale", scale)
        self.embedding, self.last = nn.Embedding(5, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor, labels: Tensor, row: Tensor) -> Tensor:
        y = nn.functional.conv2d(self.rounded(x), self.weight("conv"), padding=1, stride=2)
        y = self.rounded(y).flatten(2).transpose(1, 2)
        y = nn.functional.silu(nn.functional.linear(self.rounded(y), self.weight("linear")))
        y = Ops.modulate(y, self.embedding(labels), self.embedding(labels), 1e-6)
        result: Tensor = self.last(y) * row[0]
        return result

    def rounded(self, x: Tensor) -> Tensor:
        return Ops.quantize_dequantize(x, self.scale, None, "int8")  # type: ignore[no-any-return]

    def weight(self, name: str) -> Tensor:
        stored, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        return Ops.dequantize(stored, scale, None, "int8", 0)  # type: ignore[no-any-return]


class Step(nn.Module):
    """The network, and an output that is float32 arithmetic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, labels: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x, labels, row), x * row[1]


@pytest.fixture(scope="module")
def step() -> Step:
    torch.manual_seed(0)
    return Step().eval()


@pytest.fixture(scope="module")
def package(step: Step, tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64), torch.ones(3))
    exported = torch.export.export(step, example, dynamic_shapes=({0: batch}, {0: batch}, None))
    names = ["x", "labels", "row"]
    variant = Variant(flatten(exported.module(), names), {n: ("slot", n) for n in names}, ("sample", "kept"))
    folder = tmp_path_factory.mktemp("package")
    aoti.write(Lowered({"step": variant}, (), {}, {}), folder, TargetOptions("bf16"), lambda name: None)
    return folder / "engines/step.pt2"


def inputs_of(batch: int) -> Inputs:
    generator = np.random.default_rng(batch)
    return {
        "x": generator.standard_normal((batch, 4, 8, 8), dtype=np.float32),
        "labels": generator.integers(0, 5, batch),
        "row": np.array([0.5, 2.0, 1.0], dtype=np.float32),
    }


def edited(package: Path, folder: Path, changes: Mapping[str, str | None]) -> Path:
    """A copy of the package and its weights whose metadata says something else; None leaves the entry out."""
    folder.mkdir(exist_ok=True)
    shutil.copy(package.parent / "weights.safetensors", folder)
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(folder / "step.pt2", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("wrapper_metadata.json"):
                about = {**json.loads(content), **changes}
                content = json.dumps({key: value for key, value in about.items() if value is not None}).encode()
            target.writestr(name, content)
    return folder / "step.pt2"


def test_ports_are_those_of_the_graph(package: Path) -> None:
    engine = AotiEngine(package)
    assert engine.inputs == {
        "x": Port("float32", (None, 4, 8, 8)),
        "labels": Port("int64", (None,)),
        "row": Port("float32", (3,)),
    }
    assert engine.outputs == {
        "next_sample": Port("float32", (None, 16, 6)),
        "next_kept": Port("float32", (None, 4, 8, 8)),
    }


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_any_batch_gives_what_the_graph_gives(batch: int, package: Path, step: Step) -> None:
    inputs = inputs_of(batch)
    found = AotiEngine(package).run(inputs)
    with torch.no_grad():
        expected, kept = step(*(torch.from_numpy(value) for value in inputs.values()))
    np.testing.assert_array_equal(found["next_kept"], kept.numpy())
    assert found["next_sample"].dtype == np.float32
    # bfloat16 has 8 significant bits; a value that it moves over a rounding edge of INT8 is one of 127 steps away.
    error = np.linalg.norm(found["next_sample"] - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 0.03


def test_outputs_are_the_callers_and_inputs_are_left_alone(package: Path) -> None:
    engine = AotiEngine(package)
    inputs = inputs_of(3)
    before = {name: value.copy() for name, value in inputs.items()}
    first = engine.run(inputs)
    kept = {name: value.copy() for name, value in first.items()}
    engine.run({**inputs, "x": inputs["x"] + 1})
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])
        value.fill(0.0)
    for name, value in before.items():
        np.testing.assert_array_equal(inputs[name], value)
    again = engine.run(inputs)
    for name, value in kept.items():
        np.testing.assert_array_equal(again[name], value)


def test_only_inputs_that_no_tensor_can_stand_on_are_copied(package: Path) -> None:
    engine = AotiEngine(package)
    inputs = inputs_of(2)
    expected = engine.run(inputs)
    assert engine.copied_bytes == 0
    table = np.repeat(inputs["row"][None], 4, axis=0)
    table.flags.writeable = False  # as a row of a table that was mapped
    assert_same(engine.run({**inputs, "row": table[1, ...]}), expected)
    assert engine.copied_bytes == 3 * 4
    across = np.ascontiguousarray(inputs["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert_same(engine.run({**inputs, "x": across}), expected)
    assert engine.copied_bytes == 3 * 4 + inputs["x"].nbytes


def assert_same(found: Mapping[str, NDArray[np.generic]], expected: Mapping[str, NDArray[np.generic]]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 4, 8, 7), np.float32)}, r"'x' is float32 \[2, 4, 8, 7\], needed float32 \[2, 4, 8, 8\]"),
        ({"x": np.zeros((2, 4, 8, 8))}, r"input 'x' is float64 .* needed float32 \[2, 4, 8, 8\] at batch 2"),
        ({"labels": np.zeros(3, np.int64)}, r"input 'labels' is int64 \[3\], needed int64 \[2\] at batch 2"),
        ({"row": np.zeros(2, np.float32)}, r"input 'row' is float32 \[2\], needed float32 \[3\]"),
        ({"labls": np.zeros(2, np.int64)}, r"'labls' is given, and no input; did you mean 'labels'"),
    ],
    ids=["shape", "dtype", "batch", "row", "name"],
)
def test_what_does_not_fit_is_refused_before_the_code_reads_past_its_end(
    change: Inputs, message: str, package: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        AotiEngine(package).run(inputs_of(2) | change)


def test_a_missing_input_is_named(package: Path) -> None:
    inputs = inputs_of(2)
    del inputs["row"]
    with pytest.raises(EngineError, match=r"step\.pt2: 'row' is an input, and not given"):
        AotiEngine(package).run(inputs)


def test_threads_hold_while_the_engine_runs(package: Path) -> None:
    outside = torch.get_num_threads()
    engine = AotiEngine(package, threads=outside + 1)
    seen = []

    class Watched:
        def boxed_run(self, values: list[Tensor]) -> list[Tensor]:
            seen.append(torch.get_num_threads())
            raise RuntimeError("it broke\nin the middle")

    engine._loader = Watched()  # type: ignore[assignment]
    with pytest.raises(EngineError, match=r"step\.pt2: PyTorch failed: it broke$"):
        engine.run(inputs_of(1))
    assert seen == [outside + 1]
    assert torch.get_num_threads() == outside


def test_engines_of_one_file_share_its_tensors_and_the_last_one_frees_them(package: Path) -> None:
    first, second = AotiEngine(package), AotiEngine(package)
    tensors = first._weights._tensors
    assert second._weights is first._weights
    assert any(value.is_mkldnn for value in tensors.values())
    plain = [value for value in tensors.values() if not value.is_mkldnn]
    assert str(package.parent) in Path("/proc/self/maps").read_text()
    expected = first.run(inputs_of(2))
    del first
    gc.collect()
    assert_same(second.run(inputs_of(2)), expected)
    assert all(value.untyped_storage().nbytes() for value in plain)
    del second
    gc.collect()
    assert not any(value.untyped_storage().nbytes() for value in plain)
    assert str(package.parent) not in Path("/proc/self/maps").read_text()


def test_another_file_at_the_same_place_is_another_file(package: Path, tmp_path: Path) -> None:
    path = edited(package, tmp_path, {})
    engine = AotiEngine(path)
    expected = engine.run(inputs_of(2))
    content = bytearray((tmp_path / "weights.safetensors").read_bytes())
    offset = next(
        int(line.split()[2])
        for line in read_metadata(path)["dcompile.constants"].splitlines()
        if line.startswith("net.last.bias ")
    )
    content[offset : offset + 12] = torch.full((6,), 3.0, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    (tmp_path / "new").write_bytes(content)
    (tmp_path / "new").rename(tmp_path / "weights.safetensors")
    changed = AotiEngine(path).run(inputs_of(2))
    assert np.abs(changed["next_sample"] - expected["next_sample"]).max() > 0.5
    assert_same(engine.run(inputs_of(2)), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dcompile.cpu": "avx2 amx_complex9 sse9"}, r"for a CPU with amx_complex9, sse9, which this one lacks; comp"),
        ({"AOTI_MACHINE": "riscv64"}, r"compiled for riscv64, this is \w+; compile again here"),
        ({"dcompile.constants": None}, r"an AOTInductor package that dcompile has not written; compile again"),
        ({"dcompile.constants": ""}, r"its weights in weights.safetensors do not load: constant '.*' is unknown"),
        ({"dcompile.weights": "gone.safetensors"}, r"gone\.safetensors: cannot be read \(.*No such file"),
    ],
    ids=["cpu", "machine", "foreign", "constants", "weights"],
)
def test_a_package_that_would_not_run_here_is_refused(
    changes: Mapping[str, str | None], message: str, package: Path, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        AotiEngine(edited(package, tmp_path, changes))


def test_an_unknown_packing_is_refused(package: Path, tmp_path: Path) -> None:
    constants = read_metadata(package)["dcompile.constants"].replace(" qlinear ", " squeezed ")
    with pytest.raises(EngineError, match=r"packed as 'squeezed', which this runtime does not know; upgrade dcompile"):
        AotiEngine(edited(package, tmp_path, {"dcompile.constants": constants}))


def test_a_package_for_a_gpu_needs_one(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"compiled for CUDA, and PyTorch .* sees no GPU; compile for the CPU"):
        AotiEngine(edited(package, tmp_path, {"dcompile.device": "cuda"}))


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_a_damaged_file_is_refused(size: int, package: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.pt2"
    path.write_bytes(package.read_bytes()[:size])
    with pytest.raises(EngineError, match=r"step\.pt2: no AOTInductor package, or a damaged one; copy the bundle aga"):
        AotiEngine(path)


@pytest.mark.parametrize("size", [0, 1000])
def test_damaged_weights_are_refused(size: int, package: Path, tmp_path: Path) -> None:
    path = edited(package, tmp_path, {})
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(EngineError, match=r"weights\.safetensors"):
        AotiEngine(path)


def test_options_are_refused_as_there_are_none(package: Path) -> None:
    with pytest.raises(EngineError, match=r"option 'speed': target 'aoti' has no options; leave it out"):
        AotiEngine(package, options={"speed": "high"})


def test_without_pytorch_the_message_says_what_to_install(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"target 'aoti' needs PyTorch at run time: pip install torch"):
        AotiEngine(package)


def test_importing_the_engine_does_not_load_pytorch() -> None:
    code = "import sys, dcompile.runtime.aoti_engine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_features_of_this_cpu_cover_what_was_compiled_here(package: Path) -> None:
    needed = set(read_metadata(package)["dcompile.cpu"].split())
    assert needed <= cpu_features()
    assert needed  # this package was not compiled for any CPU at all


@pytest.fixture(scope="module")
def run_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The program of run_package.cpp, compiled against PyTorch's own headers and libraries."""
    from torch.utils.cpp_extension import include_paths, library_paths

    if shutil.which("g++") is None:
        pytest.skip("needs g++, which is not installed")
    program = tmp_path_factory.mktemp("program") / "run_package"
    source = Path(__file__).parent / "run_package.cpp"
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    options = ["-std=c++20", "-O0", *includes, *libraries, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(program)]
    subprocess.run(["g++", str(source), *options], check=True)

    def run(*arguments: object) -> None:
        subprocess.run([str(program), *map(str, arguments)], check=True)

    return run


def test_a_cpp_program_computes_the_same(package: Path, run_package: Callable[..., None], tmp_path: Path) -> None:
    inputs = inputs_of(3)
    for name, value in inputs.items():
        value.tofile(tmp_path / name)
    outputs = [tmp_path / "next_sample", tmp_path / "next_kept"]
    run_package(package, 3, *(tmp_path / name for name in inputs), *outputs)
    for path, (name, expected) in zip(outputs, AotiEngine(package).run(inputs).items(), strict=True):
        assert path.name == name
        np.testing.assert_array_equal(np.fromfile(path, np.float32).reshape(expected.shape), expected)
