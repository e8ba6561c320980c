"""The command line: ``cl-optim``, or ``python -m cl_optim.cli``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

import cl_optim
from cl_optim.ops import library

if TYPE_CHECKING:
    from cl_optim.demo.report import Results

_DEMO_EXTRA = ("matplotlib", "rich", "scipy", "sklearn")
_MAX_SEEDS = 1000  # the sweep's seeds begin there


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its arguments; ``sys.argv`` if None.

    Returns:
        The exit code: 0, or 1 where training failed.

    Raises:
        SystemExit: With code 2, after a sentence on stderr, where an argument is wrong.
    """
    parser = _Parser(prog="cl-optim", description=cl_optim.__doc__)
    parser.add_argument("--version", action="version", version=f"cl-optim {cl_optim.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="forgetting, and what prevents it, on real data"))
    _add_report(commands.add_parser("report", help="what an importance log says"))
    _add_bench(commands.add_parser("bench", help="measured figures beside published ones"))
    _add_diagnose(commands.add_parser("diagnose", help="how far new training data are from old"))
    _add_info(commands.add_parser("info", help="versions and compiled kernels"))
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


# --- cl-optim demo --------------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn tasks one after another with AdamW, L2-SP, EWC and GEM; print what each method "
        "remembers, and draw it. Permuted: each task shuffles the pixels in its own way. Split: "
        "each task has classes and a head of its own. GEM: the permuted digits with all variants "
        "of gradient memories, around AdamW and around SGD, in two minutes more. Formats: the same "
        "with importance, anchors and moments in fewer bytes. Retention: split classes with replay "
        "and progressive networks, too."
    )
    whole = _whole_number
    parser.add_argument(
        "--scenario", choices=("permuted", "split", "both", "gem", "formats", "retention"),
        default="both",
        help="which tasks (both), all variants of GEM, of formats, or all kinds of protection",
    )  # fmt: skip
    parser.add_argument(
        "--data", choices=("digits", "fashion-mnist"), default="digits",
        help="scikit-learn's handwritten digits, or Fashion-MNIST (digits)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="the folder of Fashion-MNIST's gzipped IDX files (Debian's, else torchvision's)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=whole(1, _MAX_SEEDS), metavar="N", help="runs per method (5, split: 20)"
    )
    parser.add_argument("--tasks", type=whole(2, 50), metavar="T", help="tasks (5)")
    parser.add_argument(
        "--epochs", type=whole(1, 1000), metavar="E", help="epochs per task (10; Fashion-MNIST: 1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR",
        help="where the tables, the pictures and the JSON go (runs/demo)",
    )  # fmt: skip
    parser.add_argument(
        "--sweep", action="store_true",
        help="choose learning rates and λ anew, on a validation split and seeds of its own",
    )  # fmt: skip
    parser.set_defaults(run=lambda arguments: _demo(parser, arguments))
    more = parser.add_subparsers(metavar="text")
    _add_text_demo(more.add_parser("text", help="two texts instead: English, then Python code"))


def _demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from cl_optim.demo.train import DivergedError

    try:
        _run_experiments(parser, arguments)
    except DivergedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _run_experiments(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> list[Results]:
    """Run or sweep what the arguments choose; results are of runs only."""
    _require_demo_extra(parser)
    if arguments.data_dir is not None and arguments.data != "fashion-mnist":
        parser.error("--data-dir goes with --data fashion-mnist.")
    _make_writable(parser, arguments.out)

    from rich.console import Console

    from cl_optim.demo import report
    from cl_optim.demo.commands import run_demo, run_sweep
    from cl_optim.demo.experiments import EXPERIMENTS
    from cl_optim.demo.fashion_mnist import fashion_mnist
    from cl_optim.demo.scenarios import DataError, digits
    from cl_optim.importance.errors import LogError

    console = Console()
    if not console.is_terminal:
        console.width = report.WIDTH
    config = {
        name: value
        for name in ("tasks", "epochs")
        if (value := getattr(arguments, name)) is not None
    }
    try:
        data = digits() if arguments.data == "digits" else fashion_mnist(arguments.data_dir)
        both = arguments.scenario == "both"
        scenarios = ("permuted", "split") if both else (arguments.scenario,)
        experiments = [
            replace(experiment, config=replace(experiment.config, **config))
            for experiment in EXPERIMENTS
            if experiment.data == arguments.data and experiment.scenario in scenarios
        ]
        if not experiments:
            parser.error(f"there is no scenario {arguments.scenario} for --data {arguments.data}.")
        if arguments.sweep and not all(experiment.grids for experiment in experiments):
            parser.error(f"scenario {arguments.scenario} has no sweep: its settings are another's.")
        for experiment in experiments:  # before any training
            experiment.build(data, experiment.config.tasks, 0)
        results = []
        for experiment in experiments:
            if arguments.sweep:
                seeds = arguments.seeds or experiment.sweep_seeds
                run_sweep(experiment, data, seeds, arguments.out, console)
            else:
                seeds = arguments.seeds or experiment.seeds
                results.append(run_demo(experiment, data, seeds, arguments.out, console))
    except (DataError, LogError) as error:
        parser.error(str(error))
    return results


def _require_demo_extra(parser: argparse.ArgumentParser) -> None:
    missing = [name for name in _DEMO_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"the demo needs {', '.join(missing)}: pip install 'cl-optim[demo]'.")


def _make_writable(parser: argparse.ArgumentParser, directory: Path) -> None:
    """Find out before the training, not after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        parser.error(f"cannot write into --out {directory}: {error.strerror}.")


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text!r}."
            )
        return value

    return parse


# --- cl-optim report ------------------------------------------------------------------------------


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print which weights mattered for which task, from a log that ImportanceLog keeps; or "
        "write it as one self-contained page, as pictures, JSON or CSV."
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the log's folder")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the page (HTML)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write those of layers and tasks")
    parser.set_defaults(run=lambda arguments: _report(parser, arguments))


def _report(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.png is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib: pip install 'cl-optim[demo]'.")
    from cl_optim.importance.report.data import report_data
    from cl_optim.importance.report.figures import write_csv, write_json

    try:
        with _warnings_as_sentences(parser.prog):
            data = report_data(cl_optim.ImportanceLog(arguments.path, mode="r"))
        written = []
        if arguments.out is not None:
            from cl_optim.importance.report.html import write_html

            write_html(data, arguments.out)
            written.append(arguments.out)
        if arguments.png is not None:
            from cl_optim.importance.report.pictures import write_png

            arguments.png.mkdir(parents=True, exist_ok=True)
            written += write_png(data, arguments.png)
        for write, path in ((write_json, arguments.json), (write_csv, arguments.csv)):
            if path is not None:
                write(data, path)
                written.append(path)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if written:
        print("Written: " + ", ".join(map(str, written)))
    else:
        from rich.console import Console

        from cl_optim.importance.report.text import render_text

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # names that the terminal cannot show
        console = Console(emoji=False)
        if not console.is_terminal:
            console.width = 120
        console.print(render_text(data))
    return 0


@contextlib.contextmanager
def _warnings_as_sentences(prog: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for remark in remarks:
                print(f"{prog}: warning: {remark.message}", file=sys.stderr)


# --- cl-optim demo text ---------------------------------------------------------------------------


def _add_text_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A byte-level transformer learns English (CPython's help texts), then Python code (the "
        "standard library), or any two files: with AdamW, EWC, GEM, replay, and EWC with replay. "
        "What each keeps of the first text, and what that costs on the second."
    )
    whole = _whole_number
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD", help="the text to keep")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="the text to learn")
    parser.add_argument("--seeds", type=whole(1, _MAX_SEEDS), default=3, metavar="N", help="(3)")
    parser.add_argument(
        "--processes", type=whole(1, 256), default=2, metavar="P",
        help="runs at the same time, each with one thread (2)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo-text"), metavar="DIR",
        help="where the tables, the picture and the JSON go (runs/demo-text)",
    )  # fmt: skip
    for name, high, help_ in (
        ("width", 4096, "of the transformer, a multiple of 4"),
        ("layers", 64, "of the transformer"),
        ("context", 4096, "bytes in a window"),
        ("batch", 4096, "windows in a step"),
        ("old-steps", 10**6, "steps of learning OLD"),
        ("new-steps", 10**6, "steps of learning NEW"),
    ):
        parser.add_argument(f"--{name}", type=whole(1, high), metavar="N", help=help_)
    parser.set_defaults(run=lambda arguments: _text_demo(parser, arguments))


def _text_demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _require_demo_extra(parser)
    if (arguments.old is None) != (arguments.new is None):
        parser.error("give both texts, OLD and NEW, or none.")

    from rich.console import Console

    from cl_optim.demo import report
    from cl_optim.demo.scenarios import DataError
    from cl_optim.demo.text.commands import run_text_demo
    from cl_optim.demo.text.corpora import english, from_file, python_code
    from cl_optim.demo.text.model import Sizes
    from cl_optim.demo.train import DivergedError

    console = Console()
    if not console.is_terminal:
        console.width = report.WIDTH
    names = ("width", "layers", "context", "batch", "old_steps", "new_steps")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sizes = replace(Sizes(), **given)
    if sizes.width % sizes.heads:
        parser.error(f"--width must be a multiple of {sizes.heads}, not {sizes.width}.")
    _make_writable(parser, arguments.out)
    try:
        if arguments.old is None:
            old, new = english(), python_code()
        else:
            old, new = from_file(arguments.old), from_file(arguments.new)
        run_text_demo(old, new, sizes, arguments.seeds, arguments.processes, arguments.out, console)
    except DataError as error:
        parser.error(str(error))
    except DivergedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


# --- cl-optim bench -------------------------------------------------------------------------------


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = "Rerun the demo and print published figures beside the measured ones."
    suites = parser.add_subparsers(metavar="SUITE", required=True)
    suite = suites.add_parser("retention", help="accuracy on split classes and permuted pixels")
    suite.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="Fashion-MNIST's gzipped IDX files; without it, scikit-learn's digits",
    )  # fmt: skip
    suite.add_argument(
        "--seeds", type=_whole_number(2, _MAX_SEEDS), metavar="N", help="runs per method"
    )
    suite.add_argument(
        "--out", type=Path, default=Path("runs/bench"), metavar="DIR",
        help="where the tables, the pictures and the JSON go (runs/bench)",
    )  # fmt: skip
    suite.set_defaults(
        tasks=None, epochs=None, sweep=False, scenario="both",
        run=lambda arguments: _bench_retention(suite, arguments),
    )  # fmt: skip


def _bench_retention(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console

    from cl_optim.demo import published, report
    from cl_optim.demo.train import DivergedError

    arguments.data = "digits" if arguments.data_dir is None else "fashion-mnist"
    try:
        results = _run_experiments(parser, arguments)
    except DivergedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    console = Console()
    if not console.is_terminal:
        console.width = report.WIDTH
    console.print(published.table(results))
    path = arguments.out / f"published-{arguments.data}.md"
    report.write_markdown(published.table(results, box.MARKDOWN), path, width=400)
    print(f"Written: {path}")
    return 0


# --- cl-optim diagnose ----------------------------------------------------------------------------


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare new training data with old: divergence of token distributions, overlap of "
        "vocabularies, contradicting answers, drift of classes; the risk of forgetting and what to "
        "do. Files are UTF-8 text, or .jsonl with 'text', 'prompt' and 'answer', or 'text' and "
        "'label'. Files of any size, in bounded memory."
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="what the model knows")
    parser.add_argument("new", type=Path, metavar="NEW", help="what it is to learn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda arguments: _diagnose(parser, arguments))


def _diagnose(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from cl_optim.retention import diagnose, read_corpus

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def stream(path: Path) -> Iterator[object]:
            bar = progress.add_task(path.name, total=path.stat().st_size if path.is_file() else 0)
            yield from read_corpus(path, lambda read: progress.update(bar, completed=read))

        try:
            diagnosis = diagnose(stream(arguments.old), stream(arguments.new))
        except (OSError, ValueError) as error:
            progress.stop()
            parser.error(str(error))
    if arguments.json:
        print(json.dumps(diagnosis.to_json(), ensure_ascii=False, indent=2))
    else:
        Console().print(diagnosis, soft_wrap=True)
    return 0


# --- cl-optim info --------------------------------------------------------------------------------


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print versions, and which compiled kernels there are, or why not."
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    print(f"cl-optim {cl_optim.__version__}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    print(f"Python {platform.python_version()} on {platform.machine()}")
    for name, backend in library.backends().items():
        print(f"{name} kernels: {'yes' if backend.available else f'no. {backend.reason}'}")
        for key, value in backend.info.items():
            print(f"  {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
