"""The page as its users meet it: choose, draw, look back, draw all, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
from browser import Browser, Server
from numpy.typing import NDArray

from dcompile.runtime import DcompileError, load
from dcompile.runtime.manifest import Call, FileSpec, read

Build = Callable[..., Any]
Pixels = NDArray[np.uint8]

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "web.md"
DONE = "document.getElementById('caption').textContent.includes('in the engines')"
ALL_DONE = "document.getElementById('all-status').textContent.includes('pictures from')"
FAILED = "!document.getElementById('error').hidden"


def visit(page: Browser, server: Server, address: str, **chosen: object) -> None:
    page.call("goto", f"{server.url}?bundle={address}#{urlencode(chosen)}")


def text(page: Browser, element: str) -> str:
    found: str = page.call("textContent", f"#{element}")
    return found


def pixels(page: Browser, canvas: str) -> Pixels:
    """What the canvas shows [H, W]; it is grey."""
    script = """
        const canvas = document.querySelector(given);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return { shape: [canvas.height, canvas.width, 4], data: Array.from(data) };
    """
    found = page.run(script, canvas)
    image = np.array(found["data"], dtype=np.uint8).reshape(found["shape"])
    assert (image[..., 3] == 255).all()
    assert (image[..., 0] == image[..., 1]).all()
    assert (image[..., 0] == image[..., 2]).all()
    return image[..., 0]


def python_steps(bundle: Path, label: str, seed: int) -> list[Pixels]:
    """What Python shows after each step [H, W]."""
    steps: list[Pixels] = []
    with load(bundle, threads=1) as session:

        def keep(step: int, count: int, sample: Any) -> None:
            steps.append(session.images(sample)[0, ..., 0])

        session.generate(labels=label, seed=seed, callback=keep)
    return steps


def assert_same_picture(found: Pixels, expected: Pixels) -> None:
    """A sample within 1e-4 is within 0.013 of a level, so a pixel moves by one level at most, and hardly ever."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.03


def test_it_draws_what_the_address_says_and_looks_back(page: Browser, server: Server, glyphs: str) -> None:
    bundle = server.path(glyphs)
    visit(page, server, glyphs, label="R", seed=7)
    page.wait(DONE)
    steps = python_steps(bundle, "R", 7)
    assert_same_picture(pixels(page, "#picture"), steps[-1])
    assert page.call("getAttribute", "#picture", "aria-label") == "R, seed 7"
    assert text(page, "step-number") == "30 of 30"

    page.call("fill", "#step", "12")
    assert text(page, "step-number") == "12 of 30"
    assert_same_picture(pixels(page, "#picture"), steps[11])
    assert page.run("return document.querySelectorAll('#chart .shown').length") == 12

    calls = [row.call for row in read(bundle).script if isinstance(row, Call)]
    for engine in ("full", "reuse"):
        assert f"{engine}: {calls.count(engine)} × " in text(page, "legend")
    assert [each in text(page, "facts") for each in ("glyphs", "30", "full, reuse")] == [True] * 3


def test_a_click_draws_another_character(page: Browser, server: Server, glyphs: str) -> None:
    visit(page, server, glyphs, label="A", seed=1)
    page.wait(DONE)
    page.call("click", "label:has(input[name=label]) >> text=Q")
    page.wait("document.getElementById('picture').ariaLabel === 'Q, seed 1'")
    assert_same_picture(pixels(page, "#picture"), python_steps(server.path(glyphs), "Q", 1)[-1])
    assert page.run("return location.hash") == "#label=Q&seed=1"


def test_draw_all_splits_by_batch_and_tiles_lead_to_the_picture(page: Browser, server: Server, tiny: Build) -> None:
    bundle = tiny()  # five labels, at most four in a batch
    visit(page, server, server.put(bundle.path), seed=3)
    page.wait(DONE)
    page.call("click", "#draw-all")
    page.wait(ALL_DONE)
    assert text(page, "all-status").startswith("5 pictures from seed 3")
    for i, label in enumerate("ABCDE"):
        tile = pixels(page, f"#grid button:nth-child({i + 1}) canvas")
        assert_same_picture(tile, python_steps(bundle.path, label, 3)[-1])
    page.call("click", "#grid button:nth-child(5)")
    page.wait("document.getElementById('picture').ariaLabel === 'E, seed 3'")
    assert (pixels(page, "#picture") == tile).all()


def test_another_request_ends_the_one_that_runs(page: Browser, server: Server, glyphs: str) -> None:
    visit(page, server, glyphs, label="A", seed=1)
    page.wait(DONE)
    page.call("click", "#draw-all")
    page.wait("document.getElementById('all-status').textContent.startsWith('A to F: step')")
    assert text(page, "draw-all") == "Stop"
    page.call("click", "#draw-all")
    assert (text(page, "draw-all"), text(page, "all-status")) == ("Draw all", "Stopped")
    page.call("click", "#random-seed")
    page.call("click", "label:has(input[name=label]) >> text=B")
    page.wait("document.getElementById('picture').ariaLabel.startsWith('B, seed ') && " + DONE)
    seed = int(page.call("inputValue", "#seed"))
    assert_same_picture(pixels(page, "#picture"), python_steps(server.path(glyphs), "B", seed)[-1])
    assert text(page, "all-status") == "Stopped"


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", str(2**64)])
def test_a_wrong_seed_is_refused_at_its_field(page: Browser, server: Server, tiny: Build, seed: str) -> None:
    visit(page, server, server.put(tiny().path), seed=2**64 - 1)
    page.wait(DONE)
    before = pixels(page, "#picture")
    page.call("fill", "#seed", seed)
    page.call("click", "button[type=submit]")
    assert page.run("return document.getElementById('seed').validationMessage").startswith("Any whole number")
    assert page.run("return location.hash") == f"#label=A&seed={2**64 - 1}"
    assert (pixels(page, "#picture") == before).all()
    page.call("fill", "#seed", "5")  # and it draws on once that is mended
    page.call("click", "button[type=submit]")
    page.wait("document.getElementById('picture').ariaLabel === 'A, seed 5'")


# --- damage ---


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights flipped": ("engines/weights.bin", flip),
    "engine flipped": ("engines/full.onnx", flip),
    "tables cut off": ("tables.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8])),
    "weights gone": ("engines/weights.bin", Path.unlink),
    "manifest gone": ("manifest.json", Path.unlink),
    "newer schema": ("manifest.json", lambda path: edit(path, schema=2)),
    "other target": ("manifest.json", lambda path: edit(path, target="openvino")),
    "no script": ("manifest.json", lambda path: edit(path, script=[])),
    "rows past the table": ("manifest.json", lambda path: edit(path, script=[{"call": "full", "row": 9}])),
    "wrong state": ("manifest.json", lambda path: edit(path, states={"cached": {"shape": [3], "dtype": "float32"}})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_in_python_s_words(page: Browser, server: Server, tiny: Build, damage: str) -> None:
    address = server.put(tiny().path)
    bundle = server.path(address)
    file, do = DAMAGE[damage]
    do(bundle / file)
    visit(page, server, address)
    page.wait(FAILED)
    if damage == "other target":  # Python runs it, or lacks OpenVINO
        expected = "this runtime has no engine for target 'openvino'; known: onnx"
    else:
        with pytest.raises(DcompileError) as caught:
            load(bundle)
        expected = str(caught.value).replace(str(bundle), f"{server.url}{address}")
    assert text(page, "error") == expected
    assert page.call("isVisible", "[role=alert]")
    assert not page.call("isVisible", "#loading")
    assert [each for each in page.complaints() if "404" not in each] == []


def test_a_damaged_manifest_is_said_to_be_no_json(page: Browser, server: Server, tiny: Build) -> None:
    address = server.put(tiny().path)
    path = server.path(address) / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    visit(page, server, address)
    page.wait(FAILED)
    assert "manifest.json: not JSON (" in text(page, "error")
    assert text(page, "error").endswith("); the file is damaged: copy the bundle again")


def test_an_engine_that_is_no_onnx_is_named(page: Browser, server: Server, tiny: Build) -> None:
    bundle = tiny()
    (bundle.path / "engines/full.onnx").write_bytes(b"not a graph")
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    spec = FileSpec.of(bundle.path / "engines/full.onnx")
    manifest["files"]["engines/full.onnx"] = {"bytes": spec.bytes, "sha256": spec.sha256}
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    visit(page, server, server.put(bundle.path))
    page.wait(FAILED)
    assert "engines/full.onnx: ONNX Runtime 1." in text(page, "error")
    assert "does not load it: " in text(page, "error")


# --- looks ---


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_every_width(page: Browser, server: Server, tiny: Build, width: int) -> None:
    page.call("setViewportSize", {"width": width, "height": 800})
    visit(page, server, server.put(tiny().path))
    page.wait(DONE)
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.call("setViewportSize", {"width": 1280, "height": 720})


def test_it_follows_the_colour_scheme(page: Browser, server: Server, tiny: Build) -> None:
    visit(page, server, server.put(tiny().path))
    grounds = []
    for scheme in ("light", "dark"):
        page.call("emulateMedia", {"colorScheme": scheme})
        grounds.append(page.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"))
    page.call("emulateMedia", {"colorScheme": None})
    assert min(grounds[0]) > 200
    assert max(grounds[1]) < 50
    page.wait(DONE)


def test_every_control_has_a_name(page: Browser, server: Server, tiny: Build) -> None:
    visit(page, server, server.put(tiny().path))
    page.wait(DONE)
    script = """
        const nameOf = (each) => each.ariaLabel ?? (each.labels?.[0] ?? each).textContent.trim();
        return [...document.querySelectorAll("button, input, canvas[role=img]")].map(nameOf);
    """
    names = page.run(script)
    assert all(names), names
    assert names[-5:] == list("ABCDE")  # the tiles


def test_the_published_files_are_enough(page: Browser, tiny: Build, tmp_path: Path) -> None:
    """The command in docs/web.md, on a server that sends no headers: one thread."""
    command = next(line for line in DOCUMENT.read_text().splitlines() if "cp -r --parents" in line)
    subprocess.run(["bash", "-c", command.replace("../../site", str(tmp_path))], cwd=ROOT / "examples/web", check=True)
    tiny().path.rename(tmp_path / "bundle")
    handler = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page.call("goto", f"http://127.0.0.1:{server.server_port}/")
        page.wait(DONE)
        server.shutdown()
    assert "1 thread." in text(page, "runs-on")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def test_serve_allows_threads_and_keeps_to_its_folders(server: Server) -> None:
    with urlopen(f"{server.url}index.html") as response:
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for path in ("bundle/../../conftest.py", "../serve.py/../../README.md", "bundle/%2e%2e/%2e%2e/etc/passwd"):
        with pytest.raises(OSError, match="404"):
            urlopen(f"{server.url}{path}")
