"""Draw examples/glyphs/before_after.png: the same seeds, uncompressed above and compiled below.

python benchmarks/picture.py UNCOMPRESSED COMPILED
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import dcompile
from dcompile.exporters.report import save_grid

ROOT = Path(__file__).resolve().parent.parent
LABELS = list("DCOMPILE23456789AGKQ")


def main() -> None:
    rows = []
    for path in sys.argv[1:3]:
        with dcompile.load(path) as session:
            rows.append(session.images(session.generate(labels=LABELS, seed=7)))
    save_grid(ROOT / "examples/glyphs/before_after.png", np.concatenate(rows), columns=len(LABELS))


if __name__ == "__main__":
    main()
