"""The command line: ``normwise reproduce``, ``train``, ``compare``, ``inspect`` and more, without logic."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

__all__ = ["main"]

if TYPE_CHECKING:
    from normwise.lab.engine.execution import Progress

try:
    import typer
except ImportError:  # the library works without the packages of the command line
    print("normwise: the command line needs the extra 'lab': pip install normwise[lab]", file=sys.stderr)  # noqa: T201
    sys.exit(2)

# Listed here, as importing the claims takes seconds.
CLAIMS = (
    "constant-regularizer",
    "under-fitting",
    "effective-learning-rate",
    "generalization",
    "global-minimum",
    "instability",
    "initialization",
    "coefficient",
    "equilibrium",
    "shrink",
    "migration",
    "what-to-decay",
    "no-tuning",
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Weight decay for normalised networks: the paper's claims as commands.",
)


def main() -> None:
    """Run the command line.

    Exit code 1 means that results differ and nothing else; 2 means failure, and one line says why. SIGTERM is
    handled as Ctrl-C.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # None if it was closed from the start
                sys.stdout.flush()
    except SystemExit as end:
        cause = end.__context__
        if end.code == 1 and isinstance(cause, OSError):  # typer and rich end so if their output is closed
            _fail(cause)
            raise SystemExit(2) from end
        raise
    except OSError as error:
        _fail(error)
        raise SystemExit(2) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(*, stopped: str = "stopped") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command that ends in one line and an exit code, whatever happens.

    Typer would turn an interrupt and a broken pipe into its own exit codes before ``main`` sees them.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            try:
                function(**arguments)
            except typer.Exit:
                raise
            except Exception as error:
                _fail(error)
                raise typer.Exit(2) from error
            except KeyboardInterrupt as error:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the end
                _fail(error, stopped)
                raise typer.Exit(130) from error

        return app.command()(run)

    return register


def _fail(error: BaseException, line: str = "") -> None:
    """Say in one line why a command ends. What it has not printed yet is dropped if it cannot be printed."""
    _drop_output()
    if isinstance(error, BrokenPipeError):  # the reader, such as head, has enough
        line = "the output was closed before its end"
    elif isinstance(error, OSError):
        line = f"{error.filename or 'the output or a file'}: {error.strerror or error}"
    elif not isinstance(error, (ValueError, KeyboardInterrupt)):  # a fault of ours
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        line = f"{type(error).__name__}: {error} ({place}); please report this"
    with suppress(OSError):  # nobody may be reading stderr either
        _say(line or str(error))


def _drop_output() -> None:
    """Send what cannot be printed to nowhere; else the flush at exit would fail again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import normwise

        print(normwise.__version__)  # noqa: T201
        raise typer.Exit


@_command(stopped="stopped; the same command goes on from here")
def reproduce(
    claims: Annotated[
        list[str] | None, typer.Argument(metavar="[CLAIM …]", help=f"Default: all. {', '.join(CLAIMS)}.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="fashion-mnist or digits; large and paper: cifar10, cifar100, imagefolder:DIR."),
    ] = "fashion-mnist",
    budget: Annotated[
        str,
        typer.Option(
            help="quick (ten minutes on two cores), full (two hours), large (half a day; ResNet-20), paper."
        ),
    ] = "quick",
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N|A-B", help="Number of seeds, or first and last. Default: set by the budget."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Parallel runs. Default: one per core, or per worker.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler; its workers do the runs.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="A results.json to compare with, or its folder. Exit code 1: they differ."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="For large and paper: auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    precision: Annotated[str, typer.Option(help="For large and paper: float32 or bf16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for runs, results.json and report.html.")] = Path("runs"),
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="For large and paper: measure a few steps, say what it would take."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
) -> None:
    """Test claims of the paper on real data; write runs, results.json and report.html.

    The same command resumes a job that was stopped, and does not repeat finished runs. docs/reproducing.md
    explains budgets, clusters and comparisons.
    """
    if dry_run:
        from normwise.lab.dry_run import dry_run as foresee

        found = foresee(
            claims or [],
            data=data,
            budget=budget,
            seeds=seeds,
            device=device,
            precision=precision,
            announce=_say,
        )
        print(json.dumps(found, indent=1, ensure_ascii=False))  # noqa: T201
        return
    from normwise.lab.reproduce import reproduce as carry_out

    with _progress() as progress:
        results = carry_out(
            claims or [],
            out=out,
            data=data,
            budget=budget,
            seeds=seeds,
            jobs=jobs,
            offline=offline,
            cluster=cluster,
            device=device,
            precision=precision,
            reference=compare,
            announce=_say,
            progress=progress,
        )
    _print_results(results, out, as_json)
    if "comparison" in results and not results["comparison"]["agrees"]:
        raise typer.Exit(1)


@_command(stopped="stopped; the same command goes on from the last checkpoint")
def train(
    data: Annotated[
        str, typer.Option(help="fashion-mnist, digits, cifar10, cifar100 or imagefolder:DIR.")
    ] = "fashion-mnist",
    network: Annotated[
        str, typer.Option(help="As resnet20, resnet50, vgg16; a wrong one lists all.")
    ] = "resnet20",
    member: Annotated[
        str, typer.Option(help="weight_norm, centered_weight_norm, weight_standardization or plain.")
    ] = "weight_norm",
    batch_norm: Annotated[bool, typer.Option(help="A batch norm after each convolution.")] = True,
    rule: Annotated[
        str,
        typer.Option(
            help="none; l2, the recipe; l2-filters; aws, with nothing tuned; aws-tuned; epsilon, shifted L2."
        ),
    ] = "aws",
    coefficient: Annotated[float, typer.Option(help="λ of l2, l2-filters, aws-tuned and epsilon.")] = 5e-4,
    weight_decay: Annotated[
        float, typer.Option(help="L2 of the linear layers under the last four rules.")
    ] = 5e-4,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 200,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="cosine or steps (times 0.1 at --drops).")] = "cosine",
    drops: Annotated[str, typer.Option(metavar="EPOCH,…", help="Epochs at which the rate falls.")] = "",
    augment: Annotated[bool, typer.Option(help="Random crops and flips.")] = True,
    image_size: Annotated[int, typer.Option(help="Pixels per side of pictures from a folder.")] = 224,
    train_size: Annotated[int, typer.Option(help="Training images. 0: all.")] = 0,
    validation_size: Annotated[int, typer.Option(help="Training images to hold out.")] = 0,
    evaluate_every: Annotated[
        int, typer.Option(metavar="EPOCHS", help="Epochs between evaluations on held-out images.")
    ] = 1,
    init_scale: Annotated[float, typer.Option(help="Factor on the initial filters.")] = 1.0,
    width: Annotated[int, typer.Option(help="Channels of the first stage. 0: as published.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bf16.")] = "float32",
    channels_last: Annotated[bool, typer.Option(help="Channels last in memory.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that decode pictures.")] = 0,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time between checkpoints.")
    ] = 300.0,
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("trained"),
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few steps, say what it would take, and end.")
    ] = False,
) -> None:
    """Train a network of the paper under a decay rule on any device; print its summary as JSON.

    The same command resumes a training that was stopped, from its last checkpoint. Under torchrun the
    processes share each batch. docs/training.md explains the options.
    """
    from normwise.lab.runs.devices import Execution
    from normwise.lab.runs.network import NetworkRun
    from normwise.lab.train import train_from

    if drops and not all(part.strip().isdecimal() for part in drops.split(",")):
        raise ValueError(f"--drops {drops} is not possible: give epochs, such as 30,60,90")
    run = NetworkRun(
        data=data,
        fingerprint="",
        network=network,
        member=member,
        batch_norm=batch_norm,
        width=width,
        rule=rule,
        coefficient=coefficient,
        weight_decay=weight_decay,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        drops=tuple(int(part) for part in drops.split(",")) if drops else (),
        epochs=epochs,
        batch_size=batch,
        augment=augment,
        image_size=image_size,
        train_size=train_size,
        validation_size=validation_size,
        init_scale=init_scale,
        evaluate_every=evaluate_every,
        precision=precision,
        seed=seed,
    )
    execution = Execution(device, channels_last, compiled, workers, checkpoint_every)
    summary = train_from(run, out=out, execution=execution, offline=offline, dry_run=dry_run, announce=_say)
    if summary is not None:
        print(json.dumps(summary, indent=1, ensure_ascii=False))  # noqa: T201


@_command(stopped="stopped; the same command goes on from here")
def compare(
    setup: Annotated[
        str,
        typer.Argument(metavar="PACKAGE.MODULE:SETUP", help="A function that returns (model, data, loss)."),
    ],
    rules: Annotated[str, typer.Option(metavar="RULE,…", help="aws, and l2, none or both.")] = "l2,aws,none",
    seeds: Annotated[str, typer.Option(metavar="N|A-B", help="Number of seeds, or first and last.")] = "3",
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    jobs: Annotated[int, typer.Option(help="Parallel runs.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for runs, results.json and report.html.")] = Path(
        "compared"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")] = False,
) -> None:
    """Compare decay rules on your own network and data, by three claims of the paper.

    The same command resumes a job that was stopped. docs/training.md has an example.
    """
    from normwise.lab.compare import compare as carry_out

    with _progress() as progress:
        results = carry_out(
            setup,
            out=out,
            rules=rules.split(","),
            seeds=seeds,
            optimizer=optimizer,
            lr=lr,
            jobs=jobs,
            device=device,
            announce=_say,
            progress=progress,
        )
    _print_results(results, out, as_json)


@_command()
def report(
    results: Annotated[
        Path, typer.Argument(metavar="PATH", help="The --out of a normwise reproduce, or its results.json.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and figures/. Default: that of the results.")
    ] = None,
) -> None:
    """Rebuild report.html and figures/ from the results.json of a normwise reproduce."""
    from normwise.lab.reproduce import rebuild_report

    print(rebuild_report(results, out))  # noqa: T201


@_command()
def inspect(
    factory: Annotated[
        str | None,
        typer.Argument(
            metavar="[PACKAGE.MODULE:FACTORY]", help="A function without arguments, a class or a model."
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="SHAPE[:dtype]", help="Random input, such as 8x3x32x32 or 4x16:int64."
        ),
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="A safetensors file: one batch, by argument names.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="PACKAGE.MODULE:FUNCTION", help="A function that returns batches.")
    ] = None,
    transformers: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="A model type of transformers, or a config.json, instead of a factory."
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="A function (model, batch) -> outputs. Default: the model.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON that Plan.load reads.")] = False,
) -> None:
    """Show which weights of a model are scale-invariant, what decay does to each, and a plan."""
    from normwise.inspection.inspect import inspect as look_into

    inspection = look_into(
        factory, shapes=shapes or (), batch=batch, batches=batches, transformers=transformers, forward=forward
    )
    if html is not None:
        from normwise.inspection.html_page import write_page

        _say(f"page: {write_page(inspection, html)}")
    if as_json:
        print(inspection.to_json(), end="")  # noqa: T201
    else:
        from normwise.inspection.terminal import show

        show(inspection)


@_command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a nw.trackers.JSONL.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page instead.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the present state as JSON and end.")] = False,
) -> None:
    """Show what a nw.Monitor logs: findings with remedies, and norms and rotations of layers.

    On a terminal the table is kept up to date until the job ends; in a pipe each row is a line.
    """
    from normwise.monitor.watch import watch as show

    show(folder, html=html, once=once, as_json=as_json)


def _say(line: str) -> None:
    print(f"normwise: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)  # noqa: T201


def _print_results(results: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=1, ensure_ascii=False))  # noqa: T201
        return
    _print_verdicts(results)
    if "comparison" in results:
        _print_comparison(results["comparison"])
    _say(f"report: {out / 'report.html'}")


def _print_verdicts(results: dict[str, Any]) -> None:
    """Print a line for each claim: its sign, its name, and what was found."""
    from rich.table import Table
    from rich.text import Text

    from normwise.lab.claims.conditions import SIGNS

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, min_width=1)
    table.add_column(no_wrap=True, min_width=max(map(len, CLAIMS)))
    table.add_column(no_wrap=True, overflow="ellipsis")
    colours = {"reproduced": "green", "partly": "yellow", "undecided": "cyan", "not reproduced": "red"}
    for name, claim in sorted(results["claims"].items(), key=lambda item: item[1]["order"]):
        sign = f"[{colours[claim['verdict']]}]{SIGNS[claim['verdict']]}[/]"
        table.add_row(sign, name, Text(claim["headline"] or claim["answer"]))
    _print(table, ", ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items()))


def _print_comparison(comparison: dict[str, Any]) -> None:
    from rich.table import Table

    from normwise.lab.report.reference_comparison import lines

    table = Table("claim", "here", "reference", "compared", "outside 95 %", "")
    for name, claim in comparison["claims"].items():
        verdict = claim["verdict"]
        end = "[green]agrees[/]" if claim["agrees"] else "[red]differs[/]"
        numbers = (str(claim["compared"]), str(claim["outside"]))
        table.add_row(name, verdict["here"], verdict["reference"], *numbers, end)
    _print(table, *lines(comparison))


def _print(*parts: Any) -> None:
    """Print tables and lines. Rich itself would end the process if the output were closed."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=not isinstance(part, str), highlight=False)
    sys.stdout.write(capture.get())


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show how many runs are done and the time left: a bar on a terminal, otherwise a line now and then."""
    if not sys.stderr.isatty():
        with _lines() as line:
            yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    left_now = _Smoothed()

    class DoneAndLeft(ProgressColumn):
        """The runs that are done and the time left, which falls while a run of hours is in progress."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.completed:.0f}/{task.total or 0:.0f}, {_duration(left_now())} left")

    with Bar(
        TextColumn("runs"), BarColumn(), DoneAndLeft(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("runs", total=None, visible=False)

        def show(done: int, total: int, left: float) -> None:
            left_now.follow(left)
            bar.update(task, completed=done, total=total, visible=total > 0)

        yield show


@contextmanager
def _lines(every: float = 20.0, silence: float = 600.0) -> Iterator[Progress]:
    """Print a line at most ``every`` seconds, and one after ``silence`` seconds in which no run has ended."""
    left_now = _Smoothed()
    said = ""
    last = -every
    end = threading.Event()

    def line(done: int, total: int, left: float) -> None:
        nonlocal last, said
        now = time.monotonic()
        left_now.follow(left)
        said = f"{done} of {total} runs" if done < total else ""
        if done == 0:
            last = now
            to_do = f"{total} runs to do, {_duration(left_now())} left"
            _say(to_do if total else "all runs are done already")
        elif now - last >= every or done == total:
            last = now
            _say(f"{done} of {total} runs, {_duration(left_now())} left")

    def repeat() -> None:
        nonlocal last
        while not end.wait(min(silence, 1.0)):
            if said and time.monotonic() - last >= silence:
                last = time.monotonic()
                _say(f"{said}, {_duration(left_now())} left")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield line
    finally:
        end.set()
        thread.join()


class _Smoothed:
    """A time left that falls as time passes and follows estimates without jumps.

    What was said last, less the time since, moves by ``share`` of the way towards each new estimate.
    """

    def __init__(self, share: float = 0.1) -> None:
        self._share = share
        self._said: float | None = None
        self._then = 0.0

    def __call__(self) -> float:
        """Return the seconds left."""
        return 0.0 if self._said is None else max(0.0, self._said - (time.monotonic() - self._then))

    def follow(self, left: float) -> None:
        """Take a new estimate into account."""
        expected = left if self._said is None else self()
        self._said, self._then = expected + self._share * (left - expected), time.monotonic()


def _duration(seconds: float) -> str:
    """Return a time in words: to the minute above two minutes, to a tenth of an hour above two hours."""
    if seconds > 7200:
        return f"about {seconds / 3600:.1f} h"
    return f"about {seconds / 60:.0f} min" if seconds > 120 else f"about {seconds:.0f} s"
