"""Speed and memory of a bundle, in this process and no other: run it fresh for each figure.

    python -m dcompile.runtime.measure BUNDLE --batch 16 --threads 2 --json

Seconds: load_s (checks, the engine's package, engines), first_s (the first request), generate_s (median request after
it), step_s (per step of that). overhead_frac: the median part of a request spent outside engines. Bytes: peak_rss_bytes
(the most this process held), pss_bytes (after generating; pages shared with other processes count in part),
bundle_bytes (on disk). The two memory figures are null where /proc is not to be had.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from .engines import Array
from .errors import BundleError, DcompileError, did_you_mean
from .manifest import Call, Contract, Manifest, Slot, read, verify
from .session import Session, Timing


def measure(
    bundle: Path,
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    only: str | None = None,
    options: Mapping[str, str] | None = None,
) -> dict[str, float | None]:
    """The figures above. `only`: load one engine, and run only the calls of it."""
    started = perf_counter()
    manifest = read(bundle)
    verify(bundle, manifest)
    session = Session(bundle, restricted(manifest, only) if only else manifest, threads=threads, options=options)
    load_s = perf_counter() - started
    conditions = example_conditions(manifest.contract, batch)
    first, *timings = [_timed(session, conditions, batch) for _ in range(repeats + 1)]
    return {
        "load_s": load_s,
        "first_s": first.total_s,
        "generate_s": median(each.total_s for each in timings),
        "step_s": median(each.total_s / max(each.steps, 1) for each in timings),
        "overhead_frac": median(each.overhead_frac for each in timings),
        "peak_rss_bytes": _proc_bytes("/proc/self/status", "VmHWM:"),
        "pss_bytes": _proc_bytes("/proc/self/smaps_rollup", "Pss:"),
        "bundle_bytes": sum(file.bytes for file in manifest.files.values()),
    }


def restricted(manifest: Manifest, engine: str) -> Manifest:
    """The same bundle with one engine and the calls of it: for memory, its samples mean nothing."""
    if engine not in manifest.engines:
        raise BundleError(f"no engine is called {engine!r}; {did_you_mean(engine, manifest.engines)}")
    spec = manifest.engines[engine]
    there = {*manifest.slots, *(target.slot for target in spec.outputs.values())}
    for source in spec.inputs.values():
        if isinstance(source, Slot) and source.slot not in there:
            raise BundleError(f"engine {engine!r} takes {source.slot!r} from another engine; leave --only out")
    calls = tuple(row for row in manifest.script if isinstance(row, Call) and row.call == engine)
    return replace(manifest, engines={engine: spec}, script=calls)


def example_conditions(contract: Contract, batch: int) -> dict[str, Array]:
    """Something valid for every condition: classes in turn, zeros for the rest."""
    values = {each.name: np.zeros((batch, *each.shape), dtype=each.dtype) for each in contract.conditions}
    for each in contract.conditions:
        if each.classes is not None:
            values[each.name].T[:] = np.arange(batch) % each.classes
    return values


def _timed(session: Session, conditions: Mapping[str, Array], batch: int) -> Timing:
    session.generate(conditions=conditions, seed=range(batch))
    assert session.last_timing is not None
    return session.last_timing


def _proc_bytes(path: str, field: str) -> int | None:
    if not Path(path).exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in Path(path).read_text().splitlines() if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(prog="dcompile.runtime.measure", description="Speed and memory of a bundle.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of one operator; the engine decides if not given")
    parser.add_argument("--repeats", type=int, default=5, help="requests after the first (default 5)")
    parser.add_argument("--only", metavar="ENGINE", help="load this engine alone, and run only its calls")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="a setting of the engine")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    given = vars(parser.parse_args())
    as_json, options = given.pop("json"), dict(each.partition("=")[::2] for each in given.pop("option"))
    try:
        figures = measure(**given, options=options)
    except DcompileError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    if as_json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:<15} {value:.6g}" for name, value in figures.items() if value is not None))


if __name__ == "__main__":
    main()
