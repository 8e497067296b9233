"""Samples from a bundle where neither PyTorch nor dcompile's command is installed.

python -m dcompile.runtime BUNDLE --label A --label B --seed 7 -o samples.npy
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from .errors import DcompileError
from .request import as_labels
from .session import load


def main() -> int:
    """Writes float32 [B, *sample shape]; the exit code is that of the error, if there is one."""
    parser = argparse.ArgumentParser(prog="python -m dcompile.runtime", description="Generate samples from BUNDLE.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-l", "--label", action="append", help="class of a sample, by name or number; repeat for more")
    parser.add_argument("--seed", type=int, default=0, help="sample i starts from seed + i (default: 0)")
    parser.add_argument("--threads", type=int, help="of an engine (default: it decides)")
    parser.add_argument("-o", "--output", type=Path, default=Path("samples.npy"), help="(default: samples.npy)")
    given = parser.parse_args()
    try:
        with load(given.bundle, threads=given.threads) as session:
            labels = as_labels(session.manifest.contract, given.label) if given.label else None
            samples = session.generate(labels=labels, seed=given.seed)
            assert session.last_timing is not None
            steps, seconds = session.last_timing.steps, session.last_timing.total_s
    except DcompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    np.save(given.output, samples)
    print(f"{given.output}  {list(samples.shape)} float32, {steps} steps in {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
