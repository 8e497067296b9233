"""ONNX file to engine: what TensorRT says becomes a message that names op, region and next step; nothing is printed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec as really_find
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_graphs import FLOAT, HALF, Graph, shapes

from dcompile.compiler.errors import InternalError, UnsupportedError
from dcompile.exporters.legality import KNOWN, PORTABLE
from dcompile.exporters.tensorrt import builder as tensorrt_builder
from dcompile.exporters.tensorrt.builder import FOR_RTX, build_engine, choose_package, known_capabilities
from dcompile.runtime.errors import EngineError

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")


def layer(batch: int | str = 4) -> Graph:
    graph = Graph()
    weight = graph.constant(np.ones((64, 64)), HALF)
    graph.output(graph("MatMul", graph.input("x", HALF, batch, 64), weight, name="net.fc/linear"), HALF)
    return graph


def saved(graph: Graph, folder: Path) -> Path:
    path = folder / "graph.onnx"
    onnx.save(graph.model(), path)
    return path


def test_an_engine_file_for_several_gpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "full.engine"
    built = build_engine("full", saved(layer(), tmp_path), engine, PORTABLE, [], FOR_RTX)
    assert engine.stat().st_size > 64 * 64 * 2
    assert [each.types for each in built.layers] == ["fp16"]
    assert built.package == FOR_RTX
    assert capfd.readouterr() == ("", "")


def test_one_engine_for_all_gpus_is_no_larger_than_for_one(tmp_path: Path) -> None:
    sizes = []
    for capabilities in (PORTABLE[:1], PORTABLE):
        build_engine("full", saved(layer(), tmp_path), tmp_path / "e", capabilities, [], FOR_RTX)
        sizes.append((tmp_path / "e").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]


def test_profiles_in_their_order(tmp_path: Path) -> None:
    profiles = [shapes("x", 64, batches=(1, 1, 1)), shapes("x", 64, batches=(1, 8, 16))]
    built = build_engine("full", saved(layer("b"), tmp_path), tmp_path / "e", PORTABLE, profiles, FOR_RTX)
    rows = {each.profile: each.outputs[-1].shape[0] for each in built.layers}
    assert rows == {0: 1, 1: -1}


def test_a_weight_beside_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(layer().model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= 64 * 64 * 2
    build_engine("full", path, tmp_path / "e", PORTABLE, [], FOR_RTX)
    assert (tmp_path / "e").stat().st_size > 64 * 64 * 2


def test_an_operator_that_it_does_not_take(tmp_path: Path) -> None:
    graph = Graph()
    graph.output(graph("Det", graph.input("x", FLOAT, 2, 4, 4), name="net.blocks.3.attn/det"), FLOAT)
    message = r"engine 'full': TensorRT for RTX does not take operator Det of net\.blocks\.3\.attn; rewrite that part"
    with pytest.raises(UnsupportedError, match=message):
        build_engine("full", saved(graph, tmp_path), tmp_path / "e", PORTABLE, [], FOR_RTX)


def test_the_reason_that_it_gives_is_passed_on(tmp_path: Path) -> None:
    graph = Graph()
    graph.output(graph("Add", graph.input("x", HALF, 2), graph.constant(1.0, FLOAT), name="net.a/add"), HALF)
    with pytest.raises(UnsupportedError, match=r"operator Add of net\.a \(.*must have same input types"):
        build_engine("full", saved(graph, tmp_path), tmp_path / "e", PORTABLE, [], FOR_RTX)


def test_a_file_that_is_missing_is_a_bug_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"cannot read none\.onnx: .*cannot be found.*; please report this"):
        build_engine("full", tmp_path / "none.onnx", tmp_path / "e", PORTABLE, [], FOR_RTX)


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    message = r"engine 'full': TensorRT for RTX cannot build it: Network has dynamic or shape inputs, but no optimiz"
    with pytest.raises(EngineError, match=message):
        build_engine("full", saved(layer("b"), tmp_path), tmp_path / "e", PORTABLE, [], FOR_RTX)


def test_a_gpu_that_lacks_the_type_is_named(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.input("x", FLOAT, 4, 64)
    graph.output(graph("MatMul", x, graph.constant(np.ones((64, 64)), FLOAT), name="net.fc/linear"), FLOAT)
    with pytest.raises(EngineError, match=r"'net\.fc/linear' for Turing \(SM75\): FP32 GEMM is not supported"):
        build_engine("full", saved(graph, tmp_path), tmp_path / "e", ("7.5",), [], FOR_RTX)


class Older:
    """A builder that cannot write as it goes."""

    def __init__(self, builder: Any) -> None:
        self.build_serialized_network = builder.build_serialized_network


def test_a_version_without_streams_writes_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = tensorrt_builder.write_engine
    path = saved(layer(), tmp_path)
    build_engine("full", path, tmp_path / "streamed", PORTABLE, [], FOR_RTX)
    monkeypatch.setattr(tensorrt_builder, "write_engine", lambda builder, *rest: really(Older(builder), *rest))
    build_engine("full", path, tmp_path / "whole", PORTABLE, [], FOR_RTX)
    assert (tmp_path / "whole").stat().st_size == (tmp_path / "streamed").stat().st_size


def test_the_known_gpus_are_those_of_the_package() -> None:
    assert known_capabilities(FOR_RTX) == KNOWN


def test_without_a_gpu_the_package_that_needs_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "compute_capability", lambda: None)
    assert choose_package() == FOR_RTX


def test_with_neither_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name.startswith("tensorrt") else really_find(name)

    monkeypatch.setattr(tensorrt_builder, "find_spec", find)
    with pytest.raises(EngineError, match=r"tensorrt_rtx is not installed.*pip install 'dcompile\[trt\]'"):
        choose_package()


SHARED = """
import sys, onnx
sys.path.insert(0, {shared!r})
from pathlib import Path
from test_builder import layer, saved
from dcompile.exporters.legality import PORTABLE
from dcompile.exporters.tensorrt.builder import FOR_RTX, build_engine
folder = Path({folder!r})
"""


def in_fresh_process(body: str, folder: Path) -> str:
    """What the script prints as it ends: TensorRT keeps one logger a process, and a limit on memory stays."""
    here = Path(__file__).parent
    setup = SHARED.format(shared=str(here.parents[1] / "shared"), folder=str(folder))
    setup = setup.replace("import sys, onnx", f"import sys, onnx; sys.path.insert(0, {str(here)!r})")
    done = subprocess.run([sys.executable, "-c", setup + body], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_logger_that_was_there_first_hides_no_layers(tmp_path: Path) -> None:
    said = in_fresh_process(
        """
import tensorrt_rtx
first = tensorrt_rtx.Logger(tensorrt_rtx.Logger.INTERNAL_ERROR)
other = tensorrt_rtx.Builder(first)
print(len(build_engine("full", saved(layer(), folder), folder / "e", PORTABLE, [], FOR_RTX).layers))
""",
        tmp_path,
    )
    assert said == "1"


def test_out_of_memory_is_said_so(tmp_path: Path) -> None:
    said = in_fresh_process(
        """
import resource
import numpy as np
from onnx_graphs import HALF, Graph
graph = Graph()
x = graph.input("x", HALF, 64, 4096)
for number in range(4):
    x = graph("MatMul", x, graph.constant(np.full((4096, 4096), number + 1.0), HALF), name=f"net/{number}")
graph.output(x, HALF)
path = saved(graph, folder)
build_engine("warm", saved(layer(), folder / "warm"), folder / "e", PORTABLE, [], FOR_RTX)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)
try:
    build_engine("full", path, folder / "e", PORTABLE, [], FOR_RTX)
except Exception as error:
    print(type(error).__name__, error)
""".replace('build_engine("warm"', "(folder / 'warm').mkdir(); build_engine(\"warm\""),
        tmp_path,
    )
    assert said.startswith("EngineError engine 'full': out of memory while TensorRT built it")
    assert "nothing was written" in said
