"""The command `dcompile`: compile a diffusion model, run what was built, and see what it cost.

`dcompile MODEL ...` is short for `dcompile build MODEL ...`. Nothing here computes: each command reads its options,
calls one function of the package, and prints. Errors that a user can act on are one line and an exit code; anything
else is a bug.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column

from .runtime.errors import DcompileError, RequestError, did_you_mean
from .runtime.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Compile a trained diffusion model into an artifact to ship: "
        "smaller, faster, without PyTorch, with a report of what it cost."
        "\n\n[bold]dcompile MODEL --passes prune,cache,quant,fold -o build/NAME[/bold]"
        "  (short for `dcompile build MODEL ...`)"
        "\n\n[bold]dcompile run build/NAME --label A --seed 0 -o sample.png[/bold]"
    ),
)
out, err = Console(), Console(stderr=True)


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"dcompile {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    # No docstring: it would take the place of the help text above.
    ...


@app.command()
def build(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A diffusers model folder, model.pt2, model.pt, or package.module:factory.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Bundle directory to write. (default: build/NAME)")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="In order, with options: prune:ratio=0.25,cache:interval=3,quant,fold. `dcompile passes` lists them."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options; the command line overrides it.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="onnx, openvino, trt or aoti; `dcompile targets` says what each can do here. (default: onnx)"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16, of what is not quantised. (default: the target's)")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="variants: a whole graph for each kind of step; segments: pieces that share no weight. (default: auto)"
        ),
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="GPUs to compile for (trt): 8.9,12.0. (default: all that the formats run on)")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Batches to optimise for (trt), by name: one=1 or many=1:8:16 (least:usual:largest); repeat."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Sample without the batch, for example 4x32x32. (default: from the config)")
    ] = None,
    contract: Annotated[
        Path | None, typer.Option(help="YAML with the roles of the inputs, for networks that are not diffusers'.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, euler, dpm++2m, flow_euler, ... (default: the model's scheduler)")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps. (default: the model's, or 30)")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance scale; 1 is none. (default: the model's, or 1)")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Folder with judge.onnx, to measure accuracy and Fréchet distance.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="Fail with exit code 3 unless met: accuracy_drop<=0.02,psnr>=20")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples that passes measure on. (default: 8)")
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(min=0, help="Samples that quality is measured on. (default: 72)")
    ] = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Build only: measure neither quality nor speed.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an engine. (default: it decides)")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be built, and stop before measuring anything.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output directory that is no bundle.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep results of earlier builds.")
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where results are kept. (default: ~/.cache/dcompile)")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled module, running the code in it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")] = False,
) -> None:
    """Compile MODEL into a bundle: engines, the table that says which runs at each step, and a report."""
    from .compiler.ingest import model_name
    from .exporters.build import compile_model
    from .exporters.settings import Settings, default_cache

    plan = _recipe(recipe, model=model, target=target, shape=shape, contract=contract, sampler=sampler, steps=steps,
                   guidance=guidance, judge=judge, gate=gate, calibration_samples=calibration_samples,
                   eval_samples=eval_samples, passes=passes, precision=precision, layout=layout,
                   compute_capability=compute_capability, profiles=_profiles(profile))  # fmt: skip
    if plan.model is None:
        raise RequestError("no model: give a folder, a file or package.module:factory, or `model:` in the recipe")
    output = output or Path("build") / model_name(plan.model)
    cache = None if no_cache else cache_dir or default_cache()
    with _listener(quiet) as listener:
        settings = Settings(trust_pickle, force, cache, threads, not no_eval, listener)
        if dry_run:
            from .exporters.explain import plan_tree

            tree = plan_tree(plan.model, output, plan, settings)
        else:
            try:
                built = compile_model(plan.model, output, plan, settings)
            except KeyboardInterrupt:
                kept = ", and the same command goes on after the last finished pass" if cache else ""
                err.print(f"interrupted: nothing was written{kept}", highlight=False, soft_wrap=True)
                raise typer.Exit(130) from None
    if dry_run:
        out.print(tree)
        return
    from .exporters.report import can_draw, terminal_table

    out.print(terminal_table(dict(built.report)))
    if not_executed := built.report["not_executed"]:
        _lines(note=not_executed)
    _lines(layout=built.report["layout"]["reason"])
    page = built.bundle / "report.html"
    _lines(
        bundle=built.bundle,
        report=page if page.exists() else can_draw(),
        next=built.report["commands"]["sample from it"],
    )


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="sample.png for a picture, sample.npy for the numbers.")
    ] = Path("sample.png"),
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="Class of a sample, by name or number; repeat for more."),
    ] = None,
    count: Annotated[
        int,
        typer.Option("-n", "--count", min=1, help="Samples; those labels, or else all classes, are taken in turn."),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Sample i starts from seed + i.")] = 0,
    conditions: Annotated[
        Path | None, typer.Option(help="An .npz or .safetensors file with the model's other inputs by name.")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="Columns of the picture.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an engine. (default: it decides)")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Generate samples from BUNDLE, without PyTorch."""
    from .exporters.sampling import generate_file

    with _listener(quiet) as listener:
        listener.stage("loading")
        timing = generate_file(bundle, output, label, count, seed, conditions, columns, threads, listener.progress)
    spent = f"{timing.steps} steps in {timing.total_s:.2f} s, {100 * timing.overhead_frac:.1f} % outside the engines"
    out.print(f"{output}  ({spent})", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="A model (as for build) or a bundle directory.")],
    shape: Annotated[str | None, typer.Option(help="Sample without the batch, for example 4x32x32.")] = None,
    contract: Annotated[Path | None, typer.Option(help="YAML with the roles of the inputs.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled module, running the code in it.")
    ] = False,
    sampler: Annotated[str | None, typer.Option(help="For a model without a scheduler; as for build.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a bundle, also compare every file with its checksum.")
    ] = False,
) -> None:
    """Show the regions of a model, with parameters and operations; or what is in a bundle, from its manifest alone."""
    from .exporters.explain import bundle_tree, model_tree
    from .runtime.manifest import FILE

    if (Path(what) / FILE).exists():
        out.print(bundle_tree(Path(what), verify))
        return
    with _listener(False) as listener:
        listener.stage(f"reading {what}")
        tree = model_tree(what, _shape(shape), contract, sampler, trust_pickle)
    out.print(tree)


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="One or more bundles; each is compared with the first.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples a request.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed requests of each bundle.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an engine. (default: it decides)")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Time bundles against each other: interleaved requests in one process, medians."""
    from .exporters.bench import bench as run_bench
    from .exporters.explain import bench_table

    with _listener(quiet) as listener:
        listener.stage("timing")
        named = {str(path): path for path in bundles}
        found = run_bench(named, batch=batch, threads=threads, repeats=repeats,
                          progress=lambda done, total, what: listener.progress(done / total, what))  # fmt: skip
    if json:
        import json as json_module

        json.write_text(json_module.dumps(found, indent=2))
    out.print(bench_table(found))


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or the .report folder of a build that failed its gate.")],
) -> None:
    """Print the before/after table of a build, and where its pictures are."""
    from .exporters.report import read_report, terminal_table

    found = read_report(bundle)
    out.print(terminal_table(found))
    if (bundle / "report.html").exists():
        _lines(pictures=bundle / "report.html")


@app.command()
def targets() -> None:
    """List the targets: what is installed, what runs on this machine, and which number formats each takes."""
    from .exporters.explain_targets import formats_table, targets_table

    out.print(targets_table())
    out.print(formats_table())


@app.command()
def passes() -> None:
    """List the passes with their options and defaults."""
    from .exporters.explain import passes_table

    out.print(passes_table())


@app.command()
def methods(
    family: Annotated[str, typer.Argument(help="Of which pass: cache.")] = "cache",
) -> None:
    """List the published methods of a pass: what each does, its source, what ours is verified against."""
    from .exporters.explain import methods_table

    if family not in ("cache", "cache_steps"):
        raise RequestError(f"methods {family!r}: only cache has methods; `dcompile passes` lists the passes")
    out.print(methods_table())


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A model, as for build.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Heat map to write; the figures go beside it, as .csv.")
    ] = Path("profile.png"),
    site: Annotated[str, typer.Option(help="block, branch, cut, encoder or output: what is measured.")] = "block",
    samples: Annotated[
        int, typer.Option(min=1, help="Samples to run; a build that calibrates on as many runs the same.")
    ] = 8,
    shape: Annotated[str | None, typer.Option(help="Sample without the batch, for example 4x32x32.")] = None,
    contract: Annotated[Path | None, typer.Option(help="YAML with the roles of the inputs.")] = None,
    sampler: Annotated[str | None, typer.Option(help="As for build.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="As for build.")] = None,
    guidance: Annotated[float | None, typer.Option(help="As for build.")] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep what earlier runs recorded.")
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="As for build.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load a pickled module, running the code in it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Show how much each part of MODEL changes from step to step: what little changes, a cache may reuse."""
    from .compiler.ingest import Source, ingest
    from .compiler.store import Store
    from .exporters.profile import SITES, profile_program, profile_table, write_csv, write_heat_map
    from .exporters.settings import default_cache

    if site not in SITES:
        raise RequestError(f"--site {site!r}: {did_you_mean(site, SITES)}")
    with _listener(quiet) as listener:
        listener.stage(f"reading {model}")
        program = ingest(Source(model, _shape(shape), contract, sampler, steps, guidance, trust_pickle=trust_pickle))
        listener.stage("running it")
        store = Store(None if no_cache else cache_dir or default_cache())
        found = profile_program(program, site, samples, listener.progress, store)
    out.print(profile_table(found))
    write_csv(found, output.with_suffix(".csv"))
    write_heat_map(found, output)
    _lines(figures=output.with_suffix(".csv"), picture=output)


deploy = typer.Typer(no_args_is_help=True, help="Write a bundle in the form in which it is served or shipped.")
app.add_typer(deploy, name="deploy")


@deploy.command("dir")
def deploy_dir(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; a bundle that is there is replaced.")],
    python: Annotated[
        bool, typer.Option("--python", help="Add the Python runtime, for machines that have no dcompile.")
    ] = False,
) -> None:
    """Strip BUNDLE to what the runtimes read, and tell the sizes."""
    from .exporters.deploy.folder import deploy_dir as write_dir

    done = write_dir(bundle, output, with_runtime=python)
    sizes = {"bundle": _megabytes(done.before_bytes), "deployed": _megabytes(done.after_bytes)}
    _lines(folder=output, **sizes, **({"runtime": _megabytes(done.runtime_bytes)} if python else {}))


@deploy.command("triton")
def deploy_triton(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    repository: Annotated[Path, typer.Argument(help="Model repository of a Triton Inference Server.")],
    name: Annotated[str, typer.Option(help="What clients call the model; deployed again, it gets a new version.")],
    instances: Annotated[int, typer.Option(min=1, help="Processes, on each GPU if there are any.")] = 1,
    max_batch: Annotated[
        int | None, typer.Option(help="Samples generated at once. (default: 8, or the bundle's largest)")
    ] = None,
    max_queue_delay_us: Annotated[
        int, typer.Option(min=0, help="How long a request waits for others to be merged with.")
    ] = 5000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of an engine, in each instance. (default: it decides)")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Numbers of the GPUs to run on: 0,1. (default: the CPU)")] = None,
) -> None:
    """Add BUNDLE to the model repository of a Triton Inference Server, with all that it needs to run there."""
    from .exporters.deploy.triton import deploy_triton as write_model
    from .exporters.deploy.triton_config import Serving

    serving = Serving(instances, max_batch, max_queue_delay_us, threads, _numbers("--gpus", gpus))
    done = write_model(bundle, repository, name, serving)
    batching = f"one request at a time: {done.alone}" if done.alone else "merges requests that wait at the same time"
    _lines(model=done.folder / str(done.version), size=_megabytes(done.size_bytes), batching=batching,
           next=f"tritonserver --model-repository={repository}")  # fmt: skip


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    """0,1 -> (0, 1)."""
    words = text.split(",") if text is not None else []
    if not all(word.strip().isdecimal() for word in words):
        raise RequestError(f"{option} {text!r}: needed whole numbers, as in 0,1")
    return tuple(map(int, words))


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _lines(**lines: object) -> None:
    """Names and values, one a line, as they are: no markup, no colours, no line breaks inside."""
    width = max(map(len, lines))
    for name, value in lines.items():
        out.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)


def _recipe(path: Path | None, **given: Any) -> Any:
    from .compiler.recipe import parse_recipe, read_recipe

    base = read_recipe(path).model_dump(exclude_none=True, exclude_unset=True) if path else {}
    given["shape"] = _shape(given["shape"])
    if given["passes"] is not None:
        given["passes"] = [given["passes"]]
    return parse_recipe(
        {**base, **{key: value for key, value in given.items() if value is not None}}, str(path or "command line")
    )


def _profiles(given: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """one=4 -> (4, 4, 4); many=1:8:16 -> (1, 8, 16)."""
    if not given:
        return None
    found = {}
    for text in given:
        name, _, sizes = text.partition("=")
        numbers = sizes.split(":")
        if not name or not all(number.isdigit() for number in numbers) or len(numbers) not in (1, 3):
            raise RequestError(f"--profile {text!r}: write name=batch, or name=least:usual:largest, as in many=1:8:16")
        found[name] = tuple(map(int, numbers * 3 if len(numbers) == 1 else numbers))
    return found


def _shape(text: str | None) -> tuple[int, ...] | None:
    from .compiler.ingest import parse_shape

    return parse_shape(text) if text else None


class _Time(ProgressColumn):
    """Seconds since the stage began, and about how many are left."""

    def render(self, task: Task) -> str:
        spent = task.finished_time if task.finished_time is not None else task.elapsed or 0.0
        left = task.time_remaining
        return f"{spent:.0f} s" + (f", about {left:.0f} s left" if left and not task.finished else "")


_COLUMNS = (
    SpinnerColumn(finished_text="✓"),
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=24),
    _Time(table_column=Column(no_wrap=True)),
    TextColumn("{task.fields[doing]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
)


class _Bars:
    """One line a stage: a bar with time left while it runs, a tick when it is done."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task: Any = None

    def stage(self, title: str) -> None:
        self.done()
        self.task = self.bars.add_task(title, total=None, doing="")

    def progress(self, fraction: float, text: str) -> None:
        if self.task is not None:
            self.bars.update(self.task, total=1.0, completed=fraction, doing=text)

    def done(self) -> None:
        if self.task is not None:
            self.bars.update(self.task, total=1.0, completed=1.0, doing="")
            self.bars.stop_task(self.task)


class _Silent:
    def stage(self, title: str) -> None: ...
    def progress(self, fraction: float, text: str) -> None: ...


class _Lines:
    """For logs: a line as each stage begins, with the seconds since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def stage(self, title: str) -> None:
        err.print(f"[{time.monotonic() - self.started:7.1f} s] {title}", markup=False, highlight=False)

    def progress(self, fraction: float, text: str) -> None: ...


@contextmanager
def _listener(quiet: bool) -> Iterator[Any]:
    if quiet:
        yield _Silent()
        return
    if not err.is_terminal:
        yield _Lines()
        return
    with Progress(*_COLUMNS, console=err) as bars:
        listener = _Bars(bars)
        yield listener
        listener.done()


def main() -> None:
    """Entry point. A first argument that is no command or option is a model: `dcompile model.pt --passes ...`."""
    try:
        app(_with_command(sys.argv[1:]), prog_name="dcompile")
    except DcompileError as error:
        err.print(f"[bold red]error:[/bold red] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        err.print(f"[bold red]error:[/bold red] {error.strerror or error}{where}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _with_command(arguments: list[str]) -> list[str]:
    """The arguments, with `build` before those that begin with a model or with an option of build."""
    names = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    names += [str(group.name) for group in app.registered_groups]
    if not arguments or arguments[0] in (*names, "-h", "--help", "--version"):
        return arguments
    meant = get_close_matches(arguments[0], names, n=1)
    if meant and not Path(arguments[0]).exists():
        raise RequestError(f"{arguments[0]}: no such command or model; did you mean {meant[0]!r}?")
    return ["build", *arguments]


def _plain(error: DcompileError) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
