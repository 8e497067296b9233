"""Deployed models on the real Triton Inference Server, asked over HTTP and gRPC."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tiny_bundle import TinyBundle, write_tiny
from triton_requests import inputs
from triton_server import Installed, Running, serve
from tritonclient.utils import InferenceServerException

from dcompile.exporters.deploy.triton import deploy_triton
from dcompile.exporters.deploy.triton_config import Serving
from dcompile.runtime import Session, load
from dcompile.runtime.triton_watch import Watch, living_stubs

HTTP, GRPC = tritonclient.http, tritonclient.grpc
Asked = dict[str, Any]  # arguments of `inputs`
DELAY_S = 0.1  # longer than requests of a few threads lie apart, even on a busy machine


def deployable(bundle: TinyBundle) -> TinyBundle:
    (bundle.path / "recipe.yaml").write_text("passes: []\n")
    return bundle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """Three steps of two engines, with fresh noise at each."""
    return deployable(write_tiny(tmp_path_factory.mktemp("tiny") / "bundle", stochastic=True))


@pytest.fixture(scope="module")
def repository(glyphs_bundle: Path, tiny: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The glyph model, and two names for the tiny one, which tests here load, damage and replace."""
    folder = tmp_path_factory.mktemp("models")
    serving = Serving(max_queue_delay_us=int(DELAY_S * 1e6), threads=1)
    deploy_triton(glyphs_bundle, folder, "glyphs", serving)
    for name in ("tiny", "other", "damaged"):
        deploy_triton(tiny.path, folder, name, replace(serving, max_queue_delay_us=0))
    deploy_triton(tiny.path, folder, "pair", Serving(instances=2))
    return folder


@pytest.fixture(scope="module")
def server(triton: Installed, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two models at once, and others to be loaded."""
    options = ["--model-control-mode=explicit", "--load-model=glyphs", "--load-model=tiny"]
    with serve(triton, repository, tmp_path_factory.mktemp("server") / "log.txt", options) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[Any]:
    with HTTP.InferenceServerClient(server.http, network_timeout=60, connection_timeout=60, concurrency=8) as client:
        yield client


@pytest.fixture(scope="module")
def grpc(server: Running) -> Iterator[Any]:
    with GRPC.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def session(glyphs_bundle: Path) -> Iterator[Session]:
    with load(glyphs_bundle, threads=1) as session:
        yield session


def refused(ask: Callable[[], object]) -> tuple[str, str]:
    """(status, sentence) of the error that `ask` raises."""
    with pytest.raises(InferenceServerException) as caught:
        ask()
    return str(caught.value.status()), str(caught.value.message())


def ask_together(client: Any, kind: Any, requests: list[Asked], model: str = "glyphs") -> list[Any]:
    """The answers to all of them, sent at the same moment; an error is an answer."""
    given = [inputs(kind, **request) for request in requests]
    if kind is HTTP:  # whose client belongs to its thread, and has greenlets of its own
        pending = [client.async_infer(model, each) for each in given]
        return [answered(each.get_result) for each in pending]
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(lambda each: answered(lambda: client.infer(model, each)), given))


def answered(ask: Callable[[], Any]) -> Any:
    try:
        return ask().as_numpy("samples")
    except InferenceServerException as error:
        return error


def counted(server: Running, name: str, model: str = "glyphs") -> float:
    """The figure once it stands: the server counts a request a moment after it has answered it."""
    label = f'nv_inference_{name}{{model="{model}",version="1"}}'
    before, now = None, server.read_metrics()[label]
    while now != before:
        time.sleep(0.3)
        before, now = now, server.read_metrics()[label]
    return now


def test_two_models_are_healthy(http: Any, grpc: Any) -> None:
    for client in (http, grpc):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("glyphs")
        assert client.is_model_ready("tiny")
        assert not client.is_model_ready("other")
    found = http.get_model_metadata("glyphs")
    assert [each["name"] for each in found["inputs"]] == ["seed", "class_labels", "label", "steps"]
    assert found["outputs"][1] == {"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 1]}


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=["http", "grpc"])
def test_samples_are_those_of_the_python_runtime(kind: Any, http: Any, grpc: Any, session: Session) -> None:
    client = http if kind is HTTP else grpc
    answer = client.infer("glyphs", inputs(kind, [7, 3], label=["A", "9"], steps=[30, 30]))
    expected = session.generate(labels=["A", "9"], seed=[7, 3])
    # Same engine, same library; the server's numpy is another, and may differ in the last bit of a random number.
    np.testing.assert_allclose(answer.as_numpy("samples"), expected, rtol=0, atol=1e-6)
    difference = answer.as_numpy("images").astype(int) - session.images(expected)
    assert np.abs(difference).max() <= 1
    numbers = client.infer("glyphs", inputs(kind, [7, 3], conditions={"class_labels": np.array([0, 35])}))
    np.testing.assert_array_equal(numbers.as_numpy("samples"), answer.as_numpy("samples"))


def test_only_what_is_asked_for_is_sent(http: Any) -> None:
    wanted = [HTTP.InferRequestedOutput("images")]
    answer = http.infer("glyphs", inputs(HTTP, [1], label=["B"]), outputs=wanted)
    assert answer.as_numpy("images").shape == (1, 32, 32, 1)
    assert answer.as_numpy("samples") is None


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=["http", "grpc"])
def test_merged_requests_get_what_they_would_get_alone(kind: Any, server: Running, http: Any, grpc: Any) -> None:
    client = http if kind is HTTP else grpc
    requests: list[Asked] = [{"seeds": [100 + i], "label": ["ABCDEF"[i]]} for i in range(5)]
    requests.append({"seeds": [7, 8], "label": ["X", "Y"]})  # two samples of one caller
    alone = [client.infer("glyphs", inputs(kind, **each)).as_numpy("samples") for each in requests]
    samples, runs = counted(server, "count"), counted(server, "exec_count")
    merged = ask_together(client, kind, requests)
    for expected, found in zip(alone, merged, strict=True):
        np.testing.assert_array_equal(found, expected)  # to the bit
    assert counted(server, "count") - samples == 7
    assert counted(server, "exec_count") - runs <= 3  # usually 1, or 2 where the first went ahead


def test_names_and_numbers_are_batches_of_their_own(server: Running, http: Any) -> None:
    """Triton merges requests that give the same inputs."""
    names: list[Asked] = [{"seeds": [i], "label": ["A"]} for i in range(2)]
    numbers: list[Asked] = [{"seeds": [i], "conditions": {"class_labels": np.array([0])}} for i in range(2)]
    runs = counted(server, "exec_count")
    answers = ask_together(http, HTTP, names + numbers)
    assert 2 <= counted(server, "exec_count") - runs <= 4
    np.testing.assert_array_equal(answers[0], answers[2])


WRONG: dict[str, Asked] = {
    "no label of 'class_labels' is called 'AB'; did you mean 'B'?": {"seeds": [1], "label": ["AB"]},
    "label 36 of 'class_labels': this bundle knows 36, 0..35": {
        "seeds": [1],
        "conditions": {"class_labels": np.array([36])},
    },
    "seed -1 is outside 0..2**64 - 1": {"seeds": [-1], "label": ["A"]},
    "steps 20: this bundle takes 30, for which it was compiled; leave 'steps' out": {
        "seeds": [1],
        "label": ["A"],
        "steps": [20],
    },
    "give 'class_labels' as numbers or 'label' as names, one of the two; neither is there": {"seeds": [1]},
    "give 'class_labels' as numbers or 'label' as names, one of the two; both are there": {
        "seeds": [1],
        "label": ["A"],
        "conditions": {"class_labels": np.array([0])},
    },
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_request_is_a_400_with_a_sentence(sentence: str, http: Any, grpc: Any) -> None:
    assert refused(lambda: http.infer("glyphs", inputs(HTTP, **WRONG[sentence]))) == ("400", sentence)
    found = refused(lambda: grpc.infer("glyphs", inputs(GRPC, **WRONG[sentence])))
    assert found == ("StatusCode.INVALID_ARGUMENT", sentence)


def test_what_the_server_itself_refuses_is_a_400_too(http: Any) -> None:
    """Shapes, types and names are checked before the model sees them."""
    for given, said in (
        (inputs(HTTP, range(9), label=["A"] * 9), "must be <= 8"),
        (inputs(HTTP, [1], conditions={"class_labels": np.zeros((1, 2), np.int64)}), "unexpected shape"),
        (inputs(HTTP, [1], conditions={"class_labels": np.zeros(1, np.float32)}), "expects 'INT64'"),
        (inputs(HTTP, [1], conditions={"width": np.zeros(1, np.int64)}), "width"),
    ):
        status, sentence = refused(partial(http.infer, "glyphs", given))
        assert status == "400"
        assert said in sentence
    without_seed = inputs(HTTP, [1], label=["A"])[1:]
    assert refused(lambda: http.infer("glyphs", without_seed)) == (
        "400",
        "input 'seed' is missing; give one for each sample",
    )


def test_a_wrong_request_does_not_hinder_those_it_is_merged_with(server: Running, grpc: Any) -> None:
    good: list[Asked] = [{"seeds": [i], "label": ["ABC"[i]]} for i in range(3)]
    alone = [grpc.infer("glyphs", inputs(GRPC, **each)).as_numpy("samples") for each in good]
    runs = counted(server, "exec_count")
    answers = ask_together(grpc, GRPC, [good[0], {"seeds": [5], "label": ["?"]}, *good[1:]])
    assert counted(server, "exec_count") - runs <= 3
    assert "no label of 'class_labels' is called '?'" in str(answers.pop(1))
    for expected, found in zip(alone, answers, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert grpc.is_model_ready("glyphs")


def test_models_come_and_go(http: Any) -> None:
    http.load_model("other")
    given = inputs(HTTP, [1], label=["E"])
    expected = http.infer("tiny", given).as_numpy("samples")
    np.testing.assert_array_equal(http.infer("other", given).as_numpy("samples"), expected)
    http.unload_model("other")
    wait_for(lambda: not http.is_model_ready("other"), 10)
    assert "other" in refused(lambda: http.infer("other", given))[1]
    np.testing.assert_array_equal(http.infer("tiny", given).as_numpy("samples"), expected)  # its neighbour stays


def test_a_new_version_takes_over_without_a_gap(http: Any, grpc: Any, repository: Path, tmp_path: Path) -> None:
    http.load_model("other")
    given = inputs(GRPC, [1], label=["E"])
    new = deployable(write_tiny(tmp_path / "bundle"))  # without the noise: other samples
    assert deploy_triton(new.path, repository, "other", Serving()).version == 2
    answers, stop = [grpc.infer("other", given)], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(grpc.infer("other", given))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        http.load_model("other")
        time.sleep(0.5)
        stop.set()
        asking.result()  # raises what a request met
    versions = [each.get_response().model_version for each in answers]
    assert (versions[0], versions[-1]) == ("1", "2")
    assert versions == sorted(versions)
    with load(new.path) as session:
        expected = session.generate(labels=["E"], seed=1)
    np.testing.assert_allclose(answers[-1].as_numpy("samples"), expected, rtol=0, atol=1e-6)
    http.unload_model("other")


def test_a_damaged_bundle_is_not_loaded(http: Any, repository: Path) -> None:
    engine = repository / "damaged/1/bundle/engines/full.onnx"
    content = engine.read_bytes()
    engine.unlink()  # the file may be a hard link to the bundle's
    engine.write_bytes(content[:-1] + b"?")
    status, sentence = refused(lambda: http.load_model("damaged"))
    assert status == "400"
    assert "engines/full.onnx: its sha256 is not the manifest's" in sentence
    assert http.is_model_ready("tiny")


def test_a_killed_process_is_an_error_until_it_is_replaced(server: Running, http: Any) -> None:
    """Triton reports a model ready whose process is dead; dcompile's watch has it loaded anew."""
    watch = Watch(f"http://{server.http}", grace_s=600)
    watch.look()
    given = inputs(HTTP, [1], label=["E"])
    expected = http.infer("tiny", given).as_numpy("samples")
    kill_one("tiny")
    assert refused(lambda: http.infer("tiny", given)) == ("500", "Stub process 'tiny_0_0' is not healthy.")
    assert http.is_model_ready("tiny")
    assert http.infer("glyphs", given) is not None  # its neighbour does not notice
    assert watch.look() == []  # dead for the first time: its server may have ended it just now
    (line,) = watch.look()
    assert line.startswith("tiny: process ")
    assert line.endswith(" is dead: loaded anew")
    np.testing.assert_array_equal(http.infer("tiny", given).as_numpy("samples"), expected)
    assert watch.look() == []


def test_what_a_dead_instance_leaves_behind_is_ended(server: Running, http: Any) -> None:
    http.load_model("pair")
    watch = Watch(f"http://{server.http}", grace_s=1)
    watch.look()
    old = {stub.pid for stub in living_stubs() if stub.model == "pair"}
    assert len(old) == 2
    killed = kill_one("pair")
    given = inputs(HTTP, [1], label=["E"])
    refusals = 0
    for _ in range(6):  # instances take turns
        try:
            http.infer("pair", given)
        except InferenceServerException:
            refusals += 1
    assert 0 < refusals < 6
    lines = [line for _ in range(2) for line in watch.look()]
    assert [line.partition(": ")[0] for line in lines] == ["pair"]
    (left,) = old - {killed}
    wait_for(lambda: f"pair: process {left} was replaced 1 s ago: killed" in watch.look(), 10)
    assert len({stub.pid for stub in living_stubs() if stub.model == "pair"} - old) == 2
    for _ in range(4):
        http.infer("pair", given)


def test_a_server_that_would_garble_arrays_is_refused(
    triton: Installed, bare: Path, repository: Path, tmp_path: Path
) -> None:
    """This server's backend was built before numpy 2, and gives arrays whose elements are all the first."""
    environment = {**triton.environment, "PATH": f"{bare.parent}:{triton.environment['PATH']}"}
    options = ["--model-control-mode=explicit"]
    with serve(replace(triton, environment=environment), repository, tmp_path / "log.txt", options) as running:
        client = HTTP.InferenceServerClient(running.http, network_timeout=60)
        _, sentence = refused(lambda: client.load_model("tiny"))
        client.close()
    assert "this server's Python backend cannot exchange arrays with numpy 2" in sentence
    assert "install 'numpy<2' for the Python that it runs" in sentence


def kill_one(model: str) -> int:
    pid = min(stub.pid for stub in living_stubs() if stub.model == model)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pid not in {stub.pid for stub in living_stubs()}, 5)
    return pid


def wait_for(truth: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_stripped_repository_moves(triton: Installed, repository: Path, tmp_path: Path) -> None:
    """A copy elsewhere serves: nothing in it points back. The server finds new models by itself when it polls."""
    copy = tmp_path / "models"
    copy.mkdir()
    options = ["--model-control-mode=poll", "--repository-poll-secs=1"]
    with serve(triton, copy, tmp_path / "log.txt", options) as running:
        shutil.copytree(repository / "tiny", copy / "moved", ignore=shutil.ignore_patterns("__pycache__"))
        config = copy / "moved/config.pbtxt"
        config.write_text(config.read_text().replace('name: "tiny"', 'name: "moved"'))
        client = HTTP.InferenceServerClient(running.http, network_timeout=60)
        wait_for(lambda: client.is_model_ready("moved"), 20)
        assert client.infer("moved", inputs(HTTP, [1], label=["E"])).as_numpy("samples").shape == (1, 1, 4, 4)
        client.close()
