"""runtime/*.js in Chromium against the Python runtime: the same noise, sentences, scripts, samples and pixels."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Server
from numpy.typing import NDArray

from dcompile.runtime import DcompileError, Session, load, random
from dcompile.runtime.errors import RequestError, did_you_mean
from dcompile.runtime.images import to_pixels
from dcompile.runtime.manifest import Call, parse, read

Build = Callable[..., Any]
Floats = NDArray[np.float32]

# Samples are the given BigInt seeds' and labels'; every step's array and engines come along.
GENERATE = """
const { load } = await import("/runtime/session.js");
const session = await load(given.address, { threads: 1 });
const steps = [];
const callback = (step, count, { data }, engines) => { steps.push({ step, count, data: Array.from(data), engines }); };
const results = [];
for (const { labels, seed } of given.requests) {
  steps.length = 0;
  const seeds = Array.isArray(seed) ? seed.map(BigInt) : BigInt(seed);
  const sample = await session.generate({ labels, seed: seeds, callback });
  results.push({ data: Array.from(sample.data), shape: sample.shape, timing: session.lastTiming, steps: [...steps] });
}
await session.close();
return results;
"""


def generate(page: Browser, address: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page's runtime makes of the requests. Seeds travel as text: JSON has no 64-bit integers."""
    spelled = [each | {"seed": spell(each["seed"])} for each in requests]
    results: list[dict[str, Any]] = page.run(GENERATE, {"address": f"/{address}", "requests": spelled})
    for result in results:
        result["samples"] = np.array(result["data"], dtype=np.float32).reshape(result["shape"])
    return results


# --- noise ---

KNOWN_ANSWERS = [  # Random123, kat_vectors: counter, key, expected
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
PHILOX = (
    'const { philox } = await import("/runtime/random.js"); return given.map(([counter, key]) => philox(counter, key))'
)


def test_philox_gives_the_known_answers(page: Browser) -> None:
    words = [[[int(word, 16) for word in part.split()] for part in row] for row in KNOWN_ANSWERS]
    assert page.run(PHILOX, [row[:2] for row in words]) == [row[2] for row in words]


def test_philox_is_python_s_bit_for_bit(page: Browser) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (500, 6), dtype=np.uint32)
    words[:8, :] |= np.uint32(0x80000000)  # sign bits: JavaScript's 32-bit integers have them
    expected = random.philox(words[:, :4], words[:, 4:])
    assert page.run(PHILOX, [[row[:4], row[4:]] for row in words.tolist()]) == expected.tolist()


def test_normals_are_python_s(page: Browser) -> None:
    seeds, shape = [0, 42, 2**32, 2**53 + 1, 2**64 - 1], (3, 7, 13)  # 273 elements: the last block is not full
    script = """const { normal } = await import("/runtime/random.js");
        return given.draws.map((draw) => Array.from(normal(given.seeds.map(BigInt), draw, given.shape).data))"""
    draws = [0, 1, 1000]
    found = np.array(page.run(script, {"seeds": [str(seed) for seed in seeds], "shape": shape, "draws": draws}))
    expected = np.stack([random.normal(seeds, draw, shape).reshape(-1) for draw in draws])
    assert np.abs(found - expected).max() <= 1e-6  # log and cos may differ in their last float64 bit
    assert np.mean(found == expected) > 0.999  # which rounding to float32 hides nearly always


# --- samples ---


def test_glyphs_are_python_s(page: Browser, server: Server, glyphs: str) -> None:
    requests: list[dict[str, Any]] = [
        {"labels": ["A"], "seed": 0},
        {"labels": [35], "seed": 2**64 - 1},
        {"labels": ["R", "7", "Q"], "seed": [7, 7, 99]},
    ]
    found = generate(page, glyphs, *requests)
    manifest = read(server.path(glyphs))
    engines = [[row.call] for row in manifest.script if isinstance(row, Call)]
    with load(server.path(glyphs), threads=1) as session:
        for request, result in zip(requests, found, strict=True):
            trajectory, watch = watched()
            samples = session.generate(**request, callback=watch)
            # fp32 sums in another order differ by 1e-7; 30 steps under guidance make 1e-5 of it.
            assert np.abs(result["samples"] - samples).max() <= 1e-4
            assert [(each["step"], each["count"]) for each in result["steps"]] == [(i, 30) for i in range(1, 31)]
            assert [each["engines"] for each in result["steps"]] == engines
            for step, expected in zip(result["steps"], trajectory, strict=True):
                assert np.abs(np.array(step["data"]) - expected.reshape(-1)).max() <= 1e-4
            assert result["timing"]["calls"] == result["timing"]["steps"] == 30
            assert 0 < result["timing"]["enginesMs"] <= result["timing"]["totalMs"]


def test_int8_is_as_close_as_python_is_to_itself(page: Browser, server: Server, built: Path) -> None:
    """A value by a rounding edge falls to either side as sums are ordered, and later layers round on from there. So the
    measure is how far Python's own samples move when their first noise is changed by a part in 65,536."""
    requests: list[dict[str, Any]] = [{"labels": list(range(10)), "seed": seed} for seed in (0, 100, 2000)]
    found = np.stack([result["samples"] for result in generate(page, server.put(built), *requests)])
    expected, nudged = (samples_of(built, requests, scale) for scale in (1.0, 1.0 + 2.0**-16))
    assert rms(nudged - expected) > 1e-3  # that does meet edges
    assert rms(found - expected) <= rms(nudged - expected)
    same = [np.abs(a - b).max() <= 1e-4 for a, b in zip(found.reshape(30, -1), expected.reshape(30, -1), strict=True)]
    assert np.mean(same) > 0.5  # few samples of this small model meet an edge at all


def test_two_threads_change_nothing(page: Browser, server: Server, built: Path) -> None:
    script = """
        const { load } = await import("/runtime/session.js");
        const session = await load(given.address, { threads: given.threads });
        const { data } = await session.generate({ labels: [3, 4], seed: 5 });
        const { describe } = await import("/runtime/engine.js");
        return [describe(), Array.from(data)];
    """
    address = f"/{server.put(built)}"
    assert page.run("return crossOriginIsolated"), "serve.py's headers allow threads"
    (_, one), (words, two) = (
        (page.call("reload"), page.run(script, {"address": address, "threads": threads}))[1] for threads in (1, 2)
    )
    assert words.endswith("2 threads")
    assert one == two


@pytest.mark.parametrize(
    "shape",
    [{}, {"below": 1e6}, {"below": 0.0}, {"stochastic": True}, {"labels": False}],
    ids=["plain", "jump taken", "jump not taken", "fresh noise", "numbered labels"],
)
def test_scripts_run_as_in_python(page: Browser, server: Server, tiny: Build, shape: dict[str, Any]) -> None:
    bundle = tiny(**shape)
    request: dict[str, Any] = {"labels": [0, 4, 2], "seed": [3, 2**63, 1]}
    [result] = generate(page, server.put(bundle.path), request)
    with load(bundle.path, threads=1) as session:
        expected = session.generate(**request)
        timing = session.last_timing
    np.testing.assert_allclose(result["samples"], expected, rtol=1e-5, atol=1e-6)  # sums of four products
    assert timing is not None
    assert (result["timing"]["calls"], result["timing"]["steps"]) == (timing.calls, timing.steps)
    middle = "full" if shape.get("below") == 0.0 else "reuse"
    assert [each["engines"] for each in result["steps"]] == [["full"], [middle], ["full"]]


# --- pixels ---


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (0.1, 0.1), None])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_are_python_s(page: Browser, value_range: tuple[float, float] | None, channels: int) -> None:
    samples = np.random.default_rng(0).normal(size=(3, channels, 5, 6)).astype(np.float32)
    samples[0, :, 0, :3] = [[-1.0, 1.0, 1.5 / 255]]  # ends, and a value that lies between two pixels
    script = """
        const { toPixels } = await import("/runtime/images.js");
        const { shape, data } = toPixels({ shape: given.shape, data: Float32Array.from(given.data) }, given.range);
        return { shape, data: Array.from(data) };
    """
    found = page.run(script, {"shape": samples.shape, "data": samples.reshape(-1).tolist(), "range": value_range})
    expected = to_pixels(samples, value_range)
    assert found["shape"] == list(expected.shape)
    assert found["data"] == expected.reshape(-1).tolist()


def test_pixels_need_pictures(page: Browser) -> None:
    script = """
        const { toPixels } = await import("/runtime/images.js");
        try { toPixels({ shape: [2, 9], data: new Float32Array(18) }, null) } catch (error) { return error.message }
    """
    with pytest.raises(RequestError) as caught:
        to_pixels(np.zeros((2, 9), dtype=np.float32), None)
    assert page.run(script) == str(caught.value)


# --- sentences ---

WRONG: list[Any] = [None, True, 7, -1, 0.5, "wrong", "it's", [], {}, [1], ["batch"], {"slot": "sample"}, {"slott": "x"}]


def test_every_wrong_manifest_is_refused_in_python_s_words(page: Browser, tiny: Build) -> None:
    """Each place of a manifest, left out, spelled wrong, and filled with values of every kind."""
    text = (tiny(below=0.1).path / "manifest.json").read_text()
    sound = json.loads(text, parse_float=lambda number: float(number) + 0.25)  # JavaScript has no 1.0, only 1
    texts = ["", "[]", "null", "3", json.dumps(sound), *map(json.dumps, mutants(sound))]
    script = """
        const { parse } = await import("/runtime/manifest.js");
        return given.map((text) => {
          try { parse(text, "b/manifest.json"); return null; } catch (error) { return error.message; }
        });
    """
    found, expected = page.run(script, texts), [refusal(text) for text in texts]
    assert sum(each is not None for each in expected) > 1000  # and some are sound: other numbers, other names
    for text, said, needed in zip(texts, found, expected, strict=True):
        if needed is not None and "not JSON" in needed:  # what is wrong with it is told by each language's own parser
            said, needed = (each and each.partition(" (")[0] for each in (said, needed))
        assert said == needed, text


def mutants(value: Any) -> Iterator[Any]:
    """Copies of a JSON value with one mistake each."""
    for path in places(value):
        yield from (changed(value, path, partial(put, each)) for each in WRONG)
        yield changed(value, path, lambda holder, key: holder.__delitem__(key))
        if isinstance(path[-1], str):
            yield changed(value, path, lambda holder, key: holder.__setitem__(f"{key[1:]}s", holder.pop(key)))
            yield changed(value, path, lambda holder, key: holder.__setitem__(f"{key}_", 1))


def put(value: Any, holder: Any, key: Any) -> None:
    holder[key] = value


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(value: Any, path: tuple[str | int, ...], change: Callable[[Any, Any], object]) -> Any:
    whole = holder = copy.deepcopy(value)
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return whole


def refusal(text: str) -> str | None:
    try:
        parse(text, source="b/manifest.json")
    except DcompileError as error:
        return str(error)
    return None


def test_hints_are_python_s(page: Browser) -> None:
    """difflib's ratio, ties and all."""
    letters = np.random.default_rng(0).choice(list("abcd"), size=(400, 7))
    words = ["".join(row[: 3 + i % 5]) for i, row in enumerate(letters)]
    cases = [(words[i], words[i + 1 : i + 9]) for i in range(len(words) - 9)]
    script = """const { didYouMean } = await import("/runtime/errors.js");
        return given.map(([name, known]) => didYouMean(name, known))"""
    assert page.run(script, cases) == [did_you_mean(name, known) for name, known in cases]


REQUESTS: list[dict[str, Any]] = [
    {"labels": ["Z"]},
    {"labels": ["a"]},
    {"labels": [0.5]},
    {"labels": [0, 99]},
    {"labels": [-1]},
    {"labels": [0] * 5},
    {"labels": []},
    {},
    {"labels": [0, 1], "seed": [1, 2, 3]},
    {"labels": [0], "seed": -1},
    {"labels": [0, 1], "seed": 2**64 - 1},
]


@pytest.mark.parametrize("labels", [True, False])
def test_bad_requests_get_python_s_sentences(page: Browser, server: Server, tiny: Build, labels: bool) -> None:
    script = """
        const { load } = await import("/runtime/session.js");
        const session = await load(given.address);
        const messages = [];
        for (const { labels, seed } of given.requests) {
          const seeds = Array.isArray(seed) ? seed.map(BigInt) : BigInt(seed);
          await session.generate({ labels, seed: seeds }).catch((error) => messages.push(error.message));
        }
        await session.close();
        await session.generate({ labels: ["A"] }).catch((error) => messages.push(error.message));
        return messages;
    """
    bundle = tiny(labels=labels)
    requests = [each | {"seed": spell(each.get("seed", 0))} for each in REQUESTS]
    found = page.run(script, {"address": f"/{server.put(bundle.path)}", "requests": requests})
    session = load(bundle.path)
    expected = [request_refusal(session, request) for request in REQUESTS]
    session.close()
    assert found == [*expected, request_refusal(session, {"labels": ["A"]})]


def spell(seed: int | list[int]) -> str | list[str]:
    return [str(each) for each in seed] if isinstance(seed, list) else str(seed)


def request_refusal(session: Session, request: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        session.generate(**request)
    return str(caught.value)


# --- for the tests of samples ---


def samples_of(bundle: Path, requests: list[dict[str, Any]], scale: float) -> Floats:
    """What Python makes of the requests, if their first noise were so much larger."""
    manifest = read(bundle)
    contract = replace(manifest.contract, initial_scale=manifest.contract.initial_scale * scale)
    with Session(bundle, replace(manifest, contract=contract), threads=1) as session:
        return np.stack([session.generate(**request) for request in requests])


def watched() -> tuple[list[Floats], Callable[[int, int, Any], None]]:
    """A list, and a callback that appends the sample to it after every step."""
    samples: list[Floats] = []
    return samples, lambda step, steps, sample: samples.append(sample)


def rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
