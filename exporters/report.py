"""report.json and a self-contained report.html: what the compiler did, what came of it, and how it was found.

The HTML needs jinja2 and pillow (`pip install 'dcompile[report]'`); the JSON, the terminal table and everything else
here but pictures need neither. Charts are inline SVG and CSS, so that they follow light and dark mode and print.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ..compiler.errors import ShapeError, UnsupportedError
from ..runtime.errors import BundleError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

Pixels = NDArray[np.uint8]

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
TEMPLATES = Path(__file__).parent / "templates"
DIFFERENCE_GAIN = 4  # the picture of differences shows them this much stronger

_SAME = 0.005  # relative: a smaller change is called none
_NOTHING = "–"
_GAP_PIXELS, _GAP_GREY = 2, 128  # between the pictures of a grid; grey shows on any background
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_SUMMARY = {  # summary key: (headline, the start of the table's metric that it sums up)
    "speedup": ("Speed-up", "latency"),
    "size_ratio": ("Size on disk", "bytes"),
    "memory_ratio": ("Peak memory", "peak"),
    "flops_ratio": ("Operations a sample", "flops"),
    "parameter_ratio": ("Parameters", "parameters"),
    "accuracy": ("Accuracy", "accuracy"),
    "accuracy_drop": ("Accuracy", "accuracy"),
    "frechet_increase": ("Fréchet distance", "frechet"),
    "psnr": ("PSNR, same seeds", "psnr"),
    "ssim": ("SSIM, same seeds", "ssim"),
    "relative_error": ("Relative error, same seeds", "relative_error"),
}


def can_draw() -> str | None:
    """None if report.html and pictures can be made here, else what is missing and how to get it."""
    missing = [package for package, module in (("jinja2", "jinja2"), ("pillow", "PIL")) if find_spec(module) is None]
    if not missing:
        return None
    return f"report.html and pictures need {' and '.join(missing)}: pip install 'dcompile[report]'"


def write_report(
    report: Mapping[str, Any],
    directory: Path,
    images_before: Pixels | None = None,
    images_after: Pixels | None = None,
) -> tuple[Path, Path | None]:
    """Writes report.json and report.html into `directory`; the second path is None where `can_draw` says why not.

    Args:
        report: only "name" must be there. What is not a finite number becomes null.
        images_before: uint8 [N, H, W, C] of the original model.
        images_after: the same of the artifact, same seeds and conditions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = to_plain(report)
    json_path, html_path = directory / REPORT_JSON, directory / REPORT_HTML
    json_path.write_text(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    if can_draw():
        return json_path, None
    html_path.write_text(render_html(plain, images_before, images_after), encoding="utf-8")
    return json_path, html_path


def render_html(
    report: Mapping[str, Any], images_before: Pixels | None = None, images_after: Pixels | None = None
) -> str:
    """The page, whole: styles and pictures are in it, and it asks for nothing from anywhere."""
    if why := can_draw():
        raise UnsupportedError(why)
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plain = to_plain(report)
    return environment.get_template("report.html.j2").render(
        name=plain["name"],
        target=plain.get("target"),
        version=plain.get("dcompile"),
        model=plain.get("model"),
        passed=plain.get("passed"),
        tiles=_tiles(plain),
        table=table_rows(plain),
        pictures=_pictures(plain.get("labels"), images_before, images_after),
        plan=_plan(plain.get("plan")),
        passes=_passes(plain.get("passes") or [], _befores(plain)),
        gates=[_gate(each) for each in plain.get("gates") or []],
        parity=[_parity(each) for each in plain.get("parity") or []],
        operators=[_operators(*each) for each in (plain.get("operators") or {}).items()],
        memory=_memory(plain.get("memory") or {}),
        layout=(plain.get("layout") or {}).get("reason"),
        not_executed=plain.get("not_executed"),
        regions=list((plain.get("regions") or {}).items()),
        recipe=_yaml(plain["recipe"]) if plain.get("recipe") else None,
        environment=[
            (title, [(str(key), compact(value)) for key, value in (plain.get(part) or {}).items()])
            for title, part in (("Tools", "tools"), ("Machine", "machine"))
            if plain.get(part)
        ],
        commands=plain.get("commands") or {},
    )


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a bundle, or of the folder that a failed gate leaves. Raises BundleError when there is none."""
    path = folder / REPORT_JSON
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: not found; only `dcompile build` writes a report, into the bundle") from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); build again") from error
    return found


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The table of before and after, for a terminal."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    styles = {"better": "green", "worse": "red", "same": "dim", "": ""}
    table = Table(title=escape(str(report["name"])), title_justify="left")
    table.add_column("")
    for title in ("before", "after", "ratio", "change"):
        table.add_column(title, justify="right")
    for row in table_rows(to_plain(report)):
        verdict = Text(row["verdict"], styles[row["kind"]])
        table.add_row(escape(row["label"]), row["before"], row["after"], row["ratio"], verdict)
    return table


def grid(images: Pixels, columns: int | None = None) -> Image:
    """Images [N, H, W, C], C of 1, 3 or 4, as one picture, row by row; about square if `columns` is not given."""
    if why := can_draw():
        raise UnsupportedError(why)
    from PIL import Image

    if images.ndim != 4 or images.dtype != np.uint8 or not images.size or images.shape[3] not in (1, 3, 4):
        found = f"{images.dtype} {list(images.shape)}"
        raise ShapeError(f"grid: images are {found}, needed uint8 [N, height, width, channels] with 1, 3 or 4 channels")
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + _GAP_PIXELS) - _GAP_PIXELS, columns * (width + _GAP_PIXELS) - _GAP_PIXELS, channels)
    sheet = np.full(shape, _GAP_GREY, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + _GAP_PIXELS), (index % columns) * (width + _GAP_PIXELS)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def save_grid(path: str | Path, images: Pixels, columns: int | None = None) -> None:
    """Writes `grid` as a picture; the ending of `path` says in which format."""
    picture = grid(images, columns)
    from PIL import Image

    ending = Path(path).suffix.lower()
    if ending not in Image.registered_extensions():
        raise UnsupportedError(f"{path}: pictures cannot be written as {ending or 'a file without ending'}; use .png")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def human(value: float | None, unit: str = "") -> str:
    """A figure for people: 1.2 GB, 34.5 ms, 12.3 M. Units: s, bytes, flops, fraction, dB, or any other word."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    if unit in ("fraction", "%"):
        return f"{value * (100 if unit == 'fraction' else 1):.1f} %"
    if unit == "s":
        return _human_seconds(value)
    if unit == "dB":
        return f"{value:.1f} dB"
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s * 0.9995), (1.0, ""))
    if scale == 1.0 and value != round(value):
        return f"{value:.3g} {unit}".strip()
    digits = f"{value:.0f}" if scale == 1.0 else _three_digits(value / scale)
    symbol = {"bytes": "B" if prefix else "bytes", "flops": "FLOPs"}.get(unit.lower(), unit)
    return f"{digits} {prefix}{symbol}".strip()


def compact(value: Any) -> str:
    """Anything JSON on one line: figures short, lists and objects without their quotes."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: _NOTHING}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {compact(each)}" for key, each in value.items()) or _NOTHING
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(compact(each) for each in value[:24])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 24 else shown or _NOTHING
    return str(value)


def table_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The before/after table in words; `kind` is better, worse, same, or nothing where there is no telling."""
    return [_table_row(row) for row in report.get("table") or []]


def to_plain(value: Any) -> Any:
    """Only what JSON has: numpy and dataclasses unwrapped, tuples as lists, infinite and undefined numbers as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Iterable):
        return [to_plain(each) for each in value]
    return str(value)


def _human_seconds(value: float) -> str:
    if abs(value) >= 120:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    scale, prefix = next(((s, p) for s, p in _SMALL if abs(value) >= s * 0.9995), (1e-9, "n"))
    return f"{_three_digits(value / scale)} {prefix}s" if value else "0 s"


def _three_digits(value: float) -> str:
    """1.23, 12.3, 123, 1234."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals == 2 and text.endswith("00") else text


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.{1 if fraction < 0.0095 else 0}f} %"


def _times(ratio: float) -> str:
    return f"{ratio:.3f}×" if ratio < 0.1 else f"{ratio:.2f}×" if ratio < 99.5 else f"{ratio:.0f}×"


def _table_row(row: Mapping[str, Any]) -> dict[str, str]:
    before, after, unit = row.get("before"), row.get("after"), str(row.get("unit") or "")
    ratio, step = None, 0.0
    if before is not None and after is not None and before != 0:
        ratio, step = after / before, after - before
    lower = row.get("better") == "lower"
    kind = ""
    if ratio is not None and ratio > 0 and row.get("better") in ("lower", "higher"):
        change = step * 10 if unit == "fraction" else ratio - 1  # 0.05 points of a fraction are a change
        kind = "same" if abs(change) < _SAME else "better" if (ratio < 1) == lower else "worse"
    mark = {"better": "▲", "worse": "▼", "same": "≈", "": ""}[kind]
    if kind == "same" or not kind:
        verdict = "about the same" if kind else ""
    elif unit in ("fraction", "%"):
        points = abs(step) * (100 if unit == "fraction" else 1)
        verdict = f"{points:.1f} points {kind}"
    elif kind == "better" and lower and ratio and ratio < 0.67:
        verdict = f"{_tidy(1 / ratio)}× {kind}"
    elif kind == "better" and ratio and ratio > 1.5:
        verdict = f"{_tidy(ratio)}× {kind}"
    else:
        assert ratio is not None
        verdict = f"{_percent(abs(ratio - 1))} {kind}"
    return {
        "metric": str(row.get("metric", "")),
        "label": str(row.get("label") or row.get("metric")),
        "before": human(before, unit),
        "after": human(after, unit),
        "ratio": _times(ratio) if ratio is not None and ratio > 0 else _NOTHING,
        "kind": kind,
        "verdict": f"{mark} {verdict}".strip(),
    }


def _tiles(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline figures, each with the pair of figures behind it and bars of their sizes."""
    tiles = []
    summary = report.get("summary") or {}
    for key, value in summary.items():
        if value is None or isinstance(value, bool | str) or (key == "accuracy" and "accuracy_drop" in summary):
            continue
        title, start = _SUMMARY.get(key, (key.replace("_", " ").capitalize(), key))
        row = next((each for each in report.get("table") or [] if str(each.get("metric")).startswith(start)), None)
        big, note, kind = _headline(key, float(value))
        bars = []
        if row and row.get("before") and row.get("after") is not None:
            most, unit = max(row["before"], row["after"]), str(row.get("unit") or "")
            for name in ("before", "after"):
                bars.append({"name": name, "text": human(row[name], unit), "percent": 100 * row[name] / most})
        title = str(row["label"]) if row and row.get("label") and start == "latency" else title  # it says which batch
        tiles.append({"big": big, "note": note, "kind": kind, "label": title, "bars": bars})
    return tiles


def _headline(key: str, value: float) -> tuple[str, str, str]:
    """(figure, word after it, better, worse or nothing)."""
    if key.endswith("speedup"):
        slower = value < 1 - _SAME
        return _tidy(1 / value if slower else value) + "×", "slower" if slower else "faster", _kind(value - 1)
    if key.endswith("_ratio") and value > 0:
        larger = value > 1 + _SAME
        words = ("more", "fewer") if key.startswith(("flops", "parameter")) else ("larger", "smaller")
        return _tidy(value if larger else 1 / value) + "×", words[0] if larger else words[1], _kind(1 - value)
    if key == "accuracy_drop":
        if abs(value) < 5e-4:
            return "±0", "points", "same"
        return f"{'−' if value > 0 else '+'}{abs(value) * 100:.1f}", "points", _kind(-value)
    if key.endswith(("_increase", "_drop")):
        return f"{'+' if value >= 0 else '−'}{abs(value) * 100:.1f}", "%", _kind(-value)
    if key == "accuracy":
        return f"{100 * value:.1f}", "%", ""
    return (f"{value:.1f}", "dB", "") if key == "psnr" else (f"{value:.3g}", "", "")


def _kind(gain: float) -> str:
    return "same" if abs(gain) < _SAME else "better" if gain > 0 else "worse"


def _tidy(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pictures(labels: Sequence[Any] | None, before: Pixels | None, after: Pixels | None) -> dict[str, Any] | None:
    """Grids as data URLs: before, after, and how they differ if they can be paired."""
    given = [(title, images) for title, images in (("Before", before), ("After", after)) if images is not None]
    if not given:
        return None
    count, height, width = given[0][1].shape[:3]
    columns = math.ceil(math.sqrt(count))
    if before is not None and after is not None and before.shape == after.shape:
        gap = np.abs(before[..., :3].astype(np.int16) - after[..., :3].astype(np.int16)) * DIFFERENCE_GAIN
        given.append((f"Difference, {DIFFERENCE_GAIN}×", gap.clip(0, 255).astype(np.uint8)))
    named = [str(each) for each in labels or []][:count]
    return {
        "count": count,
        "size": f"{width} × {height}",
        "columns": columns,
        "pixelated": max(height, width) * columns < 600,
        "labels": [named[start : start + columns] for start in range(0, len(named), columns)],
        "grids": [
            {"title": title, "url": _data_url(picture), "width": picture.width, "height": picture.height}
            for title, picture in ((title, grid(images, columns)) for title, images in given)
        ],
    }


def _data_url(picture: Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _plan(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows of the heat map; what is computed of every site, and of all."""
    if not plan or not plan.get("computed"):
        return None
    sites = [str(each) for each in plan.get("sites") or [f"site {i}" for i in range(len(plan["computed"]))]]
    rows = []
    for site, computed in zip(sites, plan["computed"], strict=True):
        done = sum(map(bool, computed))
        rows.append({"site": site, "computed": computed, "done": done, "percent": _percent(done / len(computed))})
    total = sum(len(row["computed"]) for row in rows)
    done = sum(row["done"] for row in rows)
    steps = max(len(row["computed"]) for row in rows)
    # Coordinates of the drawing, in CSS pixels: cells as wide as the page allows; with very many steps it scrolls.
    left = 12 + max(len(site) for site in sites) * 7
    cell = min(28, max(8, (1000 - left) // steps))
    return {
        "rows": rows,
        "steps": steps,
        "ticks": [step for step in range(steps) if step == 0 or (step + 1) % (5 if steps <= 60 else 10) == 0],
        "total": total,
        "done": done,
        "reused_percent": _percent((total - done) / total),
        "decided": len(plan.get("decided_steps") or ()),
        "cell": cell,
        "row_height": 22,
        "left": left,
        "width": left + steps * cell + 56,
        "height": 26 + len(rows) * 22,
    }


def _befores(report: Mapping[str, Any]) -> dict[str, Any]:
    return {str(row.get("metric")): row.get("before") for row in report.get("table") or []}


def _passes(passes: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the passes; `earlier` has the original's parameters and flops, for the first one's change."""
    most = max((_relative(each.get("error")) or 0.0 for each in passes), default=0.0)
    rows = []
    for each in passes:
        error = _relative(each.get("error"))
        refused = [(str(node), str(why)) for node, why in each.get("refused") or []]
        rows.append(
            {
                "name": str(each.get("name", "")),
                "options": [(str(key), compact(value)) for key, value in (each.get("options") or {}).items()],
                "seconds": human(each.get("seconds"), "s"),
                "changed": human(each.get("changed")),
                "parameters": human(each.get("parameters")),
                "parameters_change": _change(earlier.get("parameters"), each.get("parameters")),
                "flops": human(each.get("flops"), "FLOPs"),
                "flops_change": _change(earlier.get("flops"), each.get("flops")),
                "error": _NOTHING if error is None else f"{error:.2g}",
                "error_percent": 100 * error / most if error else 0.0,
                "psnr": human(each["error"].get("psnr"), "dB") if isinstance(each.get("error"), Mapping) else "",
                "details": [
                    (str(key), compact(value)) for key, value in (each.get("details") or {}).items() if key != "loss"
                ],
                "curve": _curve((each.get("details") or {}).get("loss")),
                "refused": refused,
            }
        )
        earlier = each
    return rows


def _curve(points: Sequence[Sequence[float]] | None, width: int = 360, height: int = 80) -> dict[str, Any] | None:
    """A loss over the steps of a training, as the points of a line; logarithmic, as losses fall by orders."""
    known = [(step, math.log(loss)) for step, loss in points or () if loss is not None and 0 < loss < math.inf]
    if len(known) < 2:
        return None
    last = known[-1][0]
    low, high = min(loss for _, loss in known), max(loss for _, loss in known)
    places = [(width * step / last, 2 + (height - 4) * (high - loss) / max(high - low, 1e-9)) for step, loss in known]
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
        "first": compact(math.exp(known[0][1])),
        "last": compact(math.exp(known[-1][1])),
        "steps": last,
        "width": width,
        "height": height,
    }


def _relative(error: Mapping[str, float] | float | None) -> float | None:
    """The relative error of a pass, which stands alone or beside its PSNR."""
    return error.get("relative_error") if isinstance(error, Mapping) else error


def _change(before: float | None, after: float | None) -> str:
    """The change against the pass before, if there is one to speak of."""
    if not before or after is None or abs(after / before - 1) < _SAME:
        return ""
    return f"{'−' if after < before else '+'}{_percent(abs(after / before - 1))}"


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    value = gate.get("value")
    shown = "not a number" if value is None else f"{value:.4g}"
    limit = f"{ {'<=': '≤', '>=': '≥'}.get(gate['op'], gate['op']) } {gate['limit']:.4g}"
    return {"metric": gate["metric"], "value": shown, "limit": limit, "passed": bool(gate["passed"])}


def _parity(parity: Mapping[str, Any]) -> dict[str, Any]:
    figures = {name: parity.get(name) for name in ("max_abs_error", "relative_error", "tolerance")}
    worst, tolerance = figures["relative_error"], figures["tolerance"]
    within = None if worst is None or tolerance is None else worst <= tolerance
    shown = {name: _NOTHING if value is None else f"{value:.1e}" for name, value in figures.items()}
    return {"engine": str(parity.get("engine", "")), "within": within, **shown}


def _operators(engine: str, counts: Mapping[str, int]) -> dict[str, Any]:
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    most = max(counts.values(), default=1) or 1
    bars = [{"name": name, "count": count, "percent": 100 * count / most} for name, count in ranked]
    return {"engine": engine, "total": sum(counts.values()), "top": bars[:8], "rest": bars[8:]}


def _memory(memory: Mapping[str, Any]) -> str | None:
    every, one, ratio = (memory.get(key) for key in ("pss_all_bytes", "pss_one_bytes", "ratio"))
    if every is None or one is None:
        return None
    ratio = every / one if ratio is None and one else ratio
    times = f"{_times(ratio)} the {human(one, 'bytes')} it holds with one" if ratio else "nothing with one"
    return f"With every engine loaded the process holds {human(every, 'bytes')}: {times}."


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip()
