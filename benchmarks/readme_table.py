"""Put the measured figures of benchmarks/results into the README, between its two markers.

python benchmarks/readme_table.py           # rewrite README.md
python benchmarks/readme_table.py --check   # fail if README.md does not show the results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: written by benchmarks/readme_table.py -->", "<!-- end of figures -->"
TITLES = {"glyphs": "Glyph DiT (6.4 M, 12 blocks)", "glyphs_unet": "Glyph U-Net (2.8 M)"}


def figures() -> str:
    """Markdown: one table for the example models, one for the DiT-B/2-sized model."""
    glyphs = json.loads((RESULTS / "glyphs.json").read_text())
    return "\n".join([*_glyphs(glyphs), "", *_dit_b2(json.loads((RESULTS / "dit_b2.json").read_text()))])


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
