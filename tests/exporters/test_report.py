"""What the page and the tables say: figures for people, no empty parts, nothing fetched, nothing unescaped."""

import base64
import importlib.util
import io
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dcompile.compiler.errors import ShapeError, UnsupportedError
from dcompile.exporters import report as reports
from dcompile.exporters.report import (
    can_draw,
    compact,
    grid,
    human,
    read_report,
    render_html,
    save_grid,
    table_rows,
    terminal_table,
    to_plain,
    write_report,
)
from dcompile.runtime.errors import BundleError

RNG = np.random.default_rng(5)
BEFORE = RNG.integers(0, 256, size=(5, 8, 6, 1), dtype=np.uint8)
AFTER = RNG.integers(0, 256, size=(5, 8, 6, 1), dtype=np.uint8)
REPORT: dict[str, Any] = {
    "name": "glyphs",
    "target": "onnx",
    "dcompile": "0.1.0",
    "model": "examples/glyphs/model",
    "recipe": {"passes": [{"pass": "prune_blocks", "keep": 0.75}]},
    "summary": {"speedup": 4.0, "size_ratio": 0.25, "accuracy_drop": 0.008},
    "table": [
        {
            "metric": "latency_s",
            "label": "Latency, batch 16",
            "unit": "s",
            "before": 1.2,
            "after": 0.3,
            "better": "lower",
        },
        {"metric": "parameters", "label": "Parameters", "unit": "", "before": 6.5e6, "after": 5.2e6, "better": "lower"},
        {
            "metric": "accuracy",
            "label": "Accuracy",
            "unit": "fraction",
            "before": 0.98,
            "after": 0.972,
            "better": "higher",
        },
        {"metric": "psnr", "label": "PSNR", "unit": "dB", "before": None, "after": 24.31, "better": "higher"},
        {"metric": "steps", "label": "Steps", "unit": "", "before": 30, "after": 30, "better": "lower"},
    ],
    "passes": [
        {
            "name": "prune_blocks",
            "options": {"keep": 0.75},
            "seconds": 12.3,
            "changed": 3,
            "parameters": 5.2e6,
            "flops": 1.9e10,
            "error": 0.03,
            "details": {"removed": ["blocks.4"], "exact": True},
            "refused": [["blocks.0", "the first block stays"]],
        },
        {
            "name": "quantize",
            "options": {},
            "seconds": 0.4,
            "changed": 61,
            "error": {"relative_error": 0.06, "psnr": 21.0},
        },
    ],
    "plan": {"steps": 4, "sites": ["blocks 2-10"], "computed": [[True, False, False, True]]},
    "parity": [{"engine": "full", "max_abs_error": 1e-6, "relative_error": 2e-3, "tolerance": 1e-3}],
    "operators": {"full": {"Add": 2, "MatMulIntegerToFloat": 60}},
    "memory": {"pss_all_bytes": 2.1e8, "pss_one_bytes": 2e8, "ratio": 1.05},
    "gates": [
        {"metric": "accuracy_drop", "op": "<=", "limit": 0.02, "value": 0.008, "passed": True},
        {"metric": "psnr", "op": ">=", "limit": 30, "value": math.nan, "passed": False},
    ],
    "passed": False,
    "labels": ["A", "B", "C", "D", "E"],
    "tools": {"onnxruntime": "1.31.1"},
    "machine": {"cpu": "a CPU", "threads": 2},
    "commands": {"run": "dcompile run build -o sample.png"},
}


class Page(HTMLParser):
    """The text of a page, and what it refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []  # every element is closed
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.234e9, "bytes", "1.23 GB"),
        (1e9, "bytes", "1 GB"),
        (999.7e6, "bytes", "1 GB"),
        (512, "bytes", "512 bytes"),
        (0.0345, "s", "34.5 ms"),
        (1.2, "s", "1.20 s"),
        (0, "s", "0 s"),
        (4.2e-6, "s", "4.20 µs"),
        (185, "s", "3 min 05 s"),
        (7260, "s", "2 h 01 min"),
        (12.34e6, "", "12.3 M"),
        (123.4e6, "", "123 M"),
        (30, "", "30"),
        (1.832, "", "1.83"),
        (0.9312, "", "0.931"),
        (9.13e9, "FLOPs", "9.13 GFLOPs"),
        (0.972, "fraction", "97.2 %"),
        (24.31, "dB", "24.3 dB"),
        (math.inf, "dB", "–"),
        (None, "s", "–"),
    ],
)
def test_figures_for_people(value: float | None, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_anything_on_one_line() -> None:
    assert compact({"keep": 0.123456, "sites": ["a", 2], "exact": True, "empty": [], "none": None}) == (
        "keep: 0.1235, sites: a, 2, exact: yes, empty: –, none: –"
    )
    assert compact(list(range(100))).endswith("22, 23, … (100 in all)")


def test_rows_say_what_is_better() -> None:
    rows = {row["metric"]: row for row in table_rows(REPORT)}
    assert [rows["latency_s"][key] for key in ("before", "after", "ratio")] == ["1.20 s", "300 ms", "0.25×"]
    assert rows["latency_s"]["verdict"] == "▲ 4.0× better"
    assert rows["parameters"]["verdict"] == "▲ 20 % better"
    assert rows["accuracy"]["verdict"] == "▼ 0.8 points worse"
    assert rows["steps"]["verdict"] == "≈ about the same"
    assert (rows["psnr"]["before"], rows["psnr"]["ratio"], rows["psnr"]["verdict"]) == ("–", "–", "")
    slower = {"metric": "latency_s", "unit": "s", "before": 1.0, "after": 1.004, "better": "lower"}
    assert table_rows({"table": [slower]})[0]["kind"] == "same"
    assert table_rows({"table": [slower | {"after": 2.0}]})[0]["verdict"] == "▼ 100 % worse"
    assert table_rows({"table": [slower | {"before": 0.0}]})[0]["kind"] == ""


def test_what_is_not_json_becomes_json() -> None:
    @dataclass
    class Outcome:
        value: float
        where: Path

    found = to_plain(
        {"a": np.float32(0.5), "b": np.array([1, 2]), 3: (math.inf, True), "o": Outcome(math.nan, Path("x"))}
    )
    assert found == {"a": 0.5, "b": [1, 2], "3": [None, True], "o": {"value": None, "where": "x"}}


def test_headlines() -> None:
    summary = {"speedup": 0.5, "size_ratio": 1.5, "flops_ratio": 0.25, "accuracy": 0.9, "psnr": 24.31, "note": None}
    page = Page(render_html({"name": "x", "summary": summary | {"frechet_increase": 0.1, "watts": 12.0}}))
    for said in (
        "Speed-up 2.0× slower",
        "Size on disk 1.50× larger",
        "Operations a sample 4.0× fewer",
        "Accuracy 90.0 %",
        "PSNR, same seeds 24.3 dB",
        "Fréchet distance +10.0 %",
        "Watts 12",
    ):
        assert said in page.text
    twice = Page(render_html({"name": "x", "summary": {"accuracy": 0.9, "accuracy_drop": 0.0}})).text
    assert "±0 points" in twice
    assert "90.0" not in twice


def test_a_report_is_read_again(tmp_path: Path) -> None:
    write_report(REPORT, tmp_path)
    assert read_report(tmp_path)["name"] == "glyphs"
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(BundleError, match=r"report\.json: not JSON .*; build again"):
        read_report(tmp_path)
    with pytest.raises(BundleError, match=r"report\.json: not found; only"):
        read_report(tmp_path / "nothing")


def test_both_files_are_written(tmp_path: Path) -> None:
    json_path, html_path = write_report(REPORT, tmp_path / "deep/build", BEFORE, AFTER)
    assert html_path is not None
    assert json_path.name == "report.json"
    written = json.loads(json_path.read_text(encoding="utf-8"))
    assert written["gates"][1]["value"] is None
    assert written["summary"] == REPORT["summary"]
    page = Page(html_path.read_text(encoding="utf-8"))
    for said in (
        "✗ A gate failed",
        "4.0× faster",
        "−0.8 points",
        "▲ 4.0× better",
        "5 samples of 6 × 8 pixels, from the same seeds",
        "A B C / D E",
        "50 % of 4 evaluations are reused",
        "blocks 2-10, step 2: reused",
        "prune_blocks keep = 0.75",
        "−20 %",  # parameters against the original's
        "removed: blocks.4",
        "1 left alone",
        "0.06 21.0 dB",
        "the first block stays",
        "psnr ≥ 30 not a number ✗ failed",
        "2.0e-03 1.0e-03 ✗ outside",
        "MatMulIntegerToFloat",
        "holds 210 MB: 1.05× the 200 MB it holds with one",
        "- pass: prune_blocks keep: 0.75",
        "dcompile run build -o sample.png",
        "onnxruntime 1.31.1",
    ):
        assert said in page.text
    assert len(page.sources) == 3  # before, after, difference
    assert all(each.startswith("data:image/png;base64,") for each in page.sources)
    assert "url(" not in html_path.read_text(encoding="utf-8")


def test_a_loss_is_drawn_over_its_steps() -> None:
    row: dict[str, Any] = {"name": "recover", "details": {"loss": [[10, 1.0], [20, 0.1], [40, 0.01]], "matched": {}}}
    page = render_html({"name": "x", "passes": [row]})
    assert '<polyline points="90.0,2.0 180.0,40.0 360.0,78.0"/>' in page
    assert "Loss over 40 steps of training, 1 to 0.01" in page
    assert "loss:</span>" not in page  # not in figures too
    for found in ([[10, 1.0]], [], None, [[10, float("nan")], [20, None]]):
        assert "<polyline" not in render_html({"name": "x", "passes": [{**row, "details": {"loss": found}}]})


def test_the_pictures_are_the_samples() -> None:
    sources = Page(render_html({"name": "x"}, BEFORE, AFTER)).sources
    before, after, difference = (Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2]))) for each in sources)
    np.testing.assert_array_equal(np.asarray(before)[:8, :6], BEFORE[0, :, :, 0])
    np.testing.assert_array_equal(np.asarray(after)[10:18, 8:14], AFTER[4, :, :, 0])
    gap = np.abs(BEFORE[1].astype(int) - AFTER[1].astype(int))[:, :, 0] * 4
    np.testing.assert_array_equal(np.asarray(difference)[:8, 8:14], gap.clip(0, 255))


def test_a_name_is_enough() -> None:
    page = Page(render_html({"name": "only a name"}))
    assert "only a name" in page.text
    for absent in ("Before and after", "Samples", "Gates", "Cache plan", "Passes", "Engines", "To do it again"):
        assert absent not in page.text
    assert "None" not in page.text


def test_one_side_of_pictures() -> None:
    page = Page(render_html({"name": "x"}, images_after=AFTER))
    assert len(page.sources) == 1
    assert "same seeds" not in page.text


def test_everything_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    page = Page(
        render_html(REPORT | {"name": evil, "labels": [evil], "recipe": {evil: evil}, "commands": {evil: evil}}, AFTER)
    )
    assert evil in page.text


def test_without_the_extra_there_is_json_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_draw() is None
    found = importlib.util.find_spec
    monkeypatch.setattr(reports, "find_spec", lambda name: None if name == "jinja2" else found(name))
    assert can_draw() == "report.html and pictures need jinja2: pip install 'dcompile[report]'"
    assert write_report(REPORT, tmp_path) == (tmp_path / "report.json", None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(UnsupportedError, match="need jinja2: pip install"):
        grid(AFTER)


def test_grid_places_images_row_by_row() -> None:
    images = RNG.integers(0, 256, size=(3, 4, 5, 3), dtype=np.uint8)
    sheet = np.asarray(grid(images, columns=2))
    assert sheet.shape == (4 + 2 + 4, 5 + 2 + 5, 3)
    np.testing.assert_array_equal(sheet[:4, 7:], images[1])
    np.testing.assert_array_equal(sheet[6:, :5], images[2])
    assert (sheet[6:, 5:] == 128).all()
    assert grid(images, columns=9).size == (5 * 3 + 4, 4)
    assert grid(images[:1]).size == (5, 4)
    assert grid(BEFORE).mode == "L"


def test_grids_are_saved(tmp_path: Path) -> None:
    save_grid(tmp_path / "new/sample.png", BEFORE, columns=5)
    with Image.open(tmp_path / "new/sample.png") as picture:
        assert picture.size == (6 * 5 + 8, 8)
    with pytest.raises(UnsupportedError, match=r"pictures cannot be written as \.pgn; use \.png"):
        save_grid(tmp_path / "sample.pgn", BEFORE)
    with pytest.raises(ShapeError, match=r"images are float64 \[2, 4, 4, 3\], needed uint8"):
        grid(np.zeros((2, 4, 4, 3)))  # type: ignore[arg-type]


def test_terminal_table() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(REPORT | {"name": "glyphs [int8]"}))
    text = console.export_text()
    assert "glyphs [int8]" in text  # no markup
    assert re.search(r"Latency, batch 16 .* 1\.20 s .* 300 ms .* 0\.25× .* ▲ 4\.0× better", text)
