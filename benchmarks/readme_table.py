"""Put the measured figures of benchmarks/results into the README, between its two markers.

python benchmarks/readme_table.py           # rewrite README.md
python benchmarks/readme_table.py --check   # fail if README.md does not show the results
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rows import RESULTS, ROOT, read

README = ROOT / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/readme_table.py -->", "<!-- end of figures -->"
TITLES = {"glyphs": "Glyph DiT (6.4 M, 12 blocks)", "glyphs_unet": "Glyph U-Net (2.8 M)"}


def figures() -> str:
    """Markdown: the example models, the DiT-B/2-sized model, both on every target, TensorRT builds, layouts, orders."""
    sections = {
        "glyphs": _glyphs,
        "dit_b2": _dit_b2,
        "targets": _targets,
        "trt_builds": _trt_builds,
        "layouts": _layouts,
        "noise_aware": _noise_aware,
        "cache_peers": _cache_peers,
    }
    lines: list[str] = []
    for name, section in sections.items():
        path = RESULTS / f"{name}.json"
        if path.exists():  # what has not been measured yet is not shown
            lines += [*section(json.loads(path.read_text())), ""]
    for name, table in (("cache", _cache), ("structure", _structure)):
        if (RESULTS / f"{name}.csv").exists():
            lines += [*table(), ""]
    return "\n".join(lines[:-1])


def _cache() -> list[str]:
    rows = sorted(read(RESULTS / "cache.csv"), key=lambda row: (row["model"], -float(row["speedup"])))
    lines = [
        f"Cache methods alone, fp32 on ONNX Runtime, batch 16, quality on {rows[0]['samples']} samples "
        f"(`python benchmarks/cache.py`); all {len(rows)} measured rows are in "
        "[cache.csv](benchmarks/results/cache.csv), here those that no other beats in speed and PSNR:",
        "",
        "![Speed against PSNR and Fréchet distance, by method](benchmarks/results/cache.png)",
        "",
        "| `cache:` | model | faster | PSNR, same seeds | accuracy | Fréchet |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in filter(lambda row: not _is_beaten(row, rows), rows):
        change = 100 * (float(row["frechet"]) / float(row["frechet_before"]) - 1)
        cells = [
            f"`method={row['method']},{row['options']}`",
            _MODELS.get(row["model"], TITLES.get(row["model"], row["model"])),
            f"{float(row['speedup']):.2f}×",
            f"{float(row['psnr']):.1f} dB",
            f"{100 * (float(row['accuracy']) - float(row['accuracy_before'])):+.1f} points",
            f"{change:+.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _structure() -> list[str]:
    rows = read(RESULTS / "structure.csv")
    lines = [
        f"Networks cut, recovered and composed, fp32 on ONNX Runtime but where INT8 is named, batch 16, quality on "
        f"{rows[0]['samples']} samples, a figure a seed of the training (`python benchmarks/structure.py`, "
        "[structure.csv](benchmarks/results/structure.csv)):",
        "",
        "| what | model | accuracy | Fréchet | faster | parameters | training |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, case in dict.fromkeys((row["model"], row["case"]) for row in rows):
        own = [row for row in rows if (row["model"], row["case"]) == (model, case)]
        before = own[0]
        cells = [
            case,
            _MODELS.get(model, TITLES.get(model, model)),
            _each(own, "accuracy", 100, ".1f") + f" % ({100 * float(before['accuracy_before']):.1f} before)",
            _each(own, "frechet", 1, ".2f") + f" ({float(before['frechet_before']):.2f} before)",
            f"{sum(float(row['speedup']) for row in own) / len(own):.2f}×",
            f"{float(before['parameters_ratio']):.2f}× fewer",
            _seconds(max(float(row["training_s"]) for row in own)) if float(before["training_s"]) else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _each(rows: list[dict[str, Any]], column: str, times: float, form: str) -> str:
    return ", ".join(format(times * float(row[column]), form) for row in rows)


def _cache_peers(results: dict[str, Any]) -> list[str]:
    lines = [
        f"The same models and noise through cache-dit and DeepCache in PyTorch, batch {results['run']['batch']}; ours "
        "is the fastest artifact that is at least as near to the uncached model (`python benchmarks/cache_peers.py`):",
        "",
        "| peer | model | a request | PSNR | ours | a request | PSNR | faster |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for model, found in results.items():
        for peer, row in found["rows"].items() if model != "run" else ():
            if not row["ours"]:
                title = _MODELS.get(model, TITLES.get(model, model))
                cells = [peer, title, _seconds(row["latency_s"]), _decibels(row), *_nearest_of_ours(found, peer)]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def _nearest_of_ours(found: dict[str, Any], peer: str) -> list[str]:
    best = found["at_equal_psnr"].get(peer)
    if best is None:
        return ["none as near", "", "", ""]
    row, name = found["rows"][best["ours"]], best["ours"].removeprefix("dcompile ")
    return [f"`{name}`", _seconds(row["latency_s"]), _decibels(row), f"{best['times_faster']:.2f}×"]


def _decibels(row: dict[str, float]) -> str:
    return f"{row['psnr']:.1f} dB"


def _is_beaten(row: dict[str, str], rows: list[dict[str, str]]) -> bool:
    return any(
        other["model"] == row["model"]
        and float(other["speedup"]) > float(row["speedup"])
        and float(other["psnr"]) > float(row["psnr"])
        for other in rows
    )


def _noise_aware(results: dict[str, Any]) -> list[str]:
    samples = next(iter(results.values()))["samples"]
    lines = [
        "Where INT8 follows, `cache` lowers the Taylor order of the branches whose differences it makes noise: PSNR of "
        f"the Glyph DiT to the uncompressed model, {samples} samples (`python benchmarks/noise_aware.py`):",
        "",
        "| `cache:method=taylorseer` and `quant` | order as asked | lowered for the noise | branches lowered |",
        "|---|---:|---:|---:|",
    ]
    for interval, found in results.items():
        for order, asked in enumerate(("taylor1", "taylor2"), 1):
            plain, aware = found["cases"][asked], found["cases"][f"{asked}, noise-aware"]
            count = sum(aware["sites_by_order"].values())
            lowered = count - aware["sites_by_order"].get(str(order), 0)
            lines.append(
                f"| `interval={interval},predictor={asked}` | {plain['psnr']:.1f} dB | {aware['psnr']:.1f} dB | "
                f"{lowered} of {count} |"
            )
    return lines


def _glyphs(results: dict[str, Any]) -> list[str]:
    first = next(iter(results.values()))
    machine = first["machine"]
    lines = [
        f"30 steps with guidance, batch {first['batch']}, ONNX Runtime, "
        f"{machine['threads']} threads of {machine['cpu']}; quality on {first['samples']} samples "
        "(`python benchmarks/glyphs.py`):",
        "",
        "| model and passes | | uncompressed | compiled | |",
        "|---|---|---:|---:|---:|",
    ]
    for name, found in results.items():
        passes = ", ".join(f"`{next(iter(entry))}`" for entry in found["recipe"])
        title = f"**{TITLES[name]}**<br>{passes}"
        rows = {row["metric"]: row for row in found["table"]}
        for metric, show, note in (
            ("latency_s", _seconds, _faster),
            ("bytes", _megabytes, _smaller),
            ("flops", _gigaflops, _smaller),
            ("accuracy", _percent, _points),
            ("frechet", _plain, _change),
        ):
            row = rows[metric]
            lines.append(f"| {title} | {row['label']} | {show(row['before'])} | {show(row['after'])} | {note(row)} |")
            title = ""
        lines.append(f"| | PSNR, same seeds | | {rows['psnr']['after']:.1f} dB | |")
        lines.append(f"| | Memory, all engines loaded / the largest alone | | {found['memory']['ratio']:.2f} | |")
    return lines


def _dit_b2(found: dict[str, Any]) -> list[str]:
    median, gib = found["median_s"], 2**30
    eager, plain = found["speedup_over_pytorch_eager_fp32"], found["speedup_over_onnxruntime_fp32"]
    return [
        f"A DiT-B/2-sized model (random weights, 4x32x32, guidance, {found['steps']} steps, batch {found['batch']}, "
        f"`{found['passes']}`; `python benchmarks/dit_b2.py`):",
        "",
        "| | a sample | compiled is faster by |",
        "|---|---:|---:|",
        f"| PyTorch eager fp32 | {_seconds(median['pytorch_eager_fp32'])} | {eager:.1f}× |",
        f"| ONNX Runtime fp32, uncompressed | {_seconds(median['onnxruntime_fp32'])} | {plain:.1f}× |",
        f"| dcompile | {_seconds(median['dcompile'])} | |",
        "",
        f"Time outside the engines: {100 * found['overhead_frac']:.2f} %. Compiled in {found['compile_s']:.0f} s with "
        f"a peak of {found['compile_peak_bytes'] / gib:.2f} GiB, for {found['weight_bytes'] / gib:.2f} GiB of weights.",
    ]


_PEERS = {
    "eager_fp32": "PyTorch eager fp32",
    "eager_bf16": "PyTorch eager bf16",
    "compile_fp32": "torch.compile fp32",
    "compile_bf16": "torch.compile bf16",
    "openvino_bf16": "OpenVINO bf16",
}
_MODELS = {"glyphs": "Glyph DiT", "dit_b2": "DiT-B/2-sized model"}


def _targets(results: dict[str, Any]) -> list[str]:
    lines = ["Every target that runs on a CPU, and other tools in the same run (`python benchmarks/targets.py`):", ""]
    for name, found in results.items():
        rows = found["rows"]
        best = rows[found["best_peer"]]["latency_s"]
        has_quality = any("accuracy" in row for row in rows.values())
        lines += [
            f"**{_MODELS[name]}**, batch {found['batch']}, {found['steps']} steps; cache + int8 is `{found['passes']}`",
            "",
            "| | a request | over the best other tool | memory | on disk |" + (" accuracy |" if has_quality else ""),
            "|---|---:|---:|---:|---:|" + ("---:|" if has_quality else ""),
        ]
        for title, row in rows.items():
            cells = [
                _target_title(title, row),
                _seconds(row["latency_s"]),
                f"{best / row['latency_s']:.2f}×",
                _megabytes(row["pss_bytes"]),
                _megabytes(row["bytes"]) if "bytes" in row else "",
            ]
            if has_quality:
                cells.append(_percent(row["accuracy"]) if "accuracy" in row else "")
            is_best = title == found["best"]
            lines.append("| " + " | ".join(f"**{cell}**" if is_best and cell else cell for cell in cells) + " |")
        lines.append("")
    return lines[:-1]


def _target_title(title: str, row: dict[str, Any]) -> str:
    if title in _PEERS:
        return _PEERS[title]
    target, _, recipe = title.partition(" ")
    return f"`{target}` {recipe}, rest {row['precision']}" if recipe else f"`{target}` {row['precision']}"


def _trt_builds(results: dict[str, Any]) -> list[str]:
    lines = [
        "TensorRT engines of the DiT-B/2-sized model, built without a GPU for all that the format runs on, `cache`, "
        "the format and `fold` (`python benchmarks/trt_builds.py`; not executed, see Limits):",
        "",
        "| format, layout | built in | with a peak of | engines | products in that format |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, found in results["dit_b2"].items():
        kernel = "gemm " + title.partition(",")[0].replace("nvfp4", "fp4")
        products = {name: count for name, count in found["kernels"].items() if name.startswith("gemm")}
        cells = [
            title,
            _seconds(found["seconds"]),
            _megabytes(found["peak_bytes"]),
            _megabytes(sum(found["engines"].values())),
            f"{products[kernel]} of {sum(products.values())}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


_PLANS = {
    "range": "blocks 1 to 11, every 5th step",
    "branch": "each branch, every 3rd step",
    "types": "attention every 2nd, feed-forward every 3rd step",
}


def _layouts(found: dict[str, Any]) -> list[str]:
    lines = [
        f"The two layouts of the DiT-B/2-sized model in fp32, {found['steps']} steps, batch {found['batch']}, on ONNX "
        "Runtime (`python benchmarks/layouts.py`):",
        "",
        "| computed | layout | engines | calls a step | a request | memory | weights, stored once | by each engine |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, plan in found["plans"].items():
        for layout in ("variants", "segments"):
            row = plan[layout]
            cells = [
                _PLANS[name] if layout == "variants" else "",
                layout,
                f"{row['engines']:.0f}",
                f"{row['calls_a_step']:.3g}",
                _seconds(row["latency_s"]),
                _megabytes(row["pss_bytes"]),
                _megabytes(row["weight_bytes"]),
                _megabytes(row["weight_bytes_if_embedded"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def _gigaflops(value: float) -> str:
    return f"{value / 1e9:.1f} GFLOP"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _faster(row: dict[str, float]) -> str:
    return f"**{row['before'] / row['after']:.1f}× faster**"


def _smaller(row: dict[str, float]) -> str:
    return f"{row['before'] / row['after']:.1f}× smaller"


def _points(row: dict[str, float]) -> str:
    return f"{100 * (row['after'] - row['before']):+.1f} points"


def _change(row: dict[str, float]) -> str:
    return f"{100 * (row['after'] / row['before'] - 1):+.0f} %"


def main() -> None:
    text = README.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    new = f"{head}{BEGIN}\n{figures()}\n{END}{tail}"
    if "--check" in sys.argv:
        if new != text:
            raise SystemExit("README.md does not show benchmarks/results; run python benchmarks/readme_table.py")
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
