"""The command line: ``cl-optim``, or ``python -m cl_optim.cli``.

Reads arguments, refuses wrong ones, and hands them on: what a command does is in its own room.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import cl_optim
from cl_optim.demo.arguments import add_length, add_out
from cl_optim.ops import library


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its arguments; ``sys.argv`` if None.

    Returns:
        The exit code: 0; 1 where training failed, or a log cannot be read; 3 where a model forgot
        more than its budget.

    Raises:
        SystemExit: With code 2, after a sentence on stderr, where an argument is wrong.
    """
    parser = Parser(prog="cl-optim", description=cl_optim.__doc__)
    parser.add_argument("--version", action="version", version=f"cl-optim {cl_optim.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="forgetting, and what prevents it, on real data"))
    _add_report(commands.add_parser("report", help="what an importance log says"))
    _add_diagnose(commands.add_parser("diagnose", help="how far new training data are from old"))
    _add_check(commands.add_parser("check", help="how much a tuned language model forgot"))
    _add_info(commands.add_parser("info", help="versions and compiled kernels"))
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _require_demo(parser: argparse.ArgumentParser, what: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{what} needs {', '.join(missing)}: pip install 'cl-optim[demo]'.")


def _require_rich(parser: argparse.ArgumentParser, what: str) -> None:
    if importlib.util.find_spec("rich") is None:
        parser.error(f'{what} needs rich: pip install "cl-optim[cli]"')


# --- cl-optim demo ---


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn tasks one after another with AdamW, L2-SP, EWC and GEM; print what each method "
        "remembers, and draw it. Permuted: each task shuffles the pixels of scikit-learn's "
        "handwritten digits in its own way. Split: each task has classes and a head of its own."
    )
    parser.add_argument(
        "--scenario", choices=("permuted", "split", "both"), default="both",
        help="which tasks (both)",
    )  # fmt: skip
    add_length(parser, seeds="5, split: 20", epochs="10, split: 30")
    add_out(parser, Path("runs/demo"))
    parser.set_defaults(run=lambda arguments: _demo(parser, arguments))


def _demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    def run() -> None:
        from cl_optim.demo.commands import demo

        demo(arguments.scenario, arguments.tasks, arguments.epochs, arguments.seeds, arguments.out)

    return train(parser, "the demo", arguments.out, run)


def train(parser: argparse.ArgumentParser, what: str, out: Path, run: Callable[[], object]) -> int:
    """Run what trains and writes into a folder; say in one sentence why it cannot.

    Args:
        parser: Of the command.
        what: Its name in the sentence.
        out: The folder; it is created.
        run: Imports what it needs: what is missing is found out before.

    Returns:
        The exit code: 1 where training diverged.
    """
    _require_demo(parser, what, "matplotlib", "rich", "scipy", "sklearn")
    try:  # before the training, not after it
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        parser.error(f"cannot write into --out {out}: {error.strerror}.")

    from cl_optim.demo.scenarios import DataError
    from cl_optim.demo.train import DivergedError
    from cl_optim.importance.errors import LogError

    try:
        run()
    except (DataError, LogError) as error:
        parser.error(str(error))
    except DivergedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


# --- cl-optim report ---


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
    exports = (arguments.out, arguments.png, arguments.json, arguments.csv)
    if arguments.png is not None:
        _require_demo(parser, "--png", "matplotlib")
    elif not any(exports):
        _require_rich(parser, "printing a report")
    from cl_optim.importance.report import command
    from cl_optim.importance.report.data import report_data

    try:
        with _warnings_as_sentences(parser.prog):
            data = report_data(cl_optim.ImportanceLog(arguments.path, mode="r"))
        written = command.write(data, *exports)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if written:
        print("Written: " + ", ".join(map(str, written)))
    else:
        command.show(data)
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


# --- cl-optim diagnose ---


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
    if not arguments.json:
        _require_rich(parser, "printing a diagnosis")
    from cl_optim.retention.diagnosis.command import diagnose_files, show

    try:
        diagnosis = diagnose_files(arguments.old, arguments.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps(diagnosis.to_json(), ensure_ascii=False, indent=2))
    else:
        show(diagnosis)
    return 0


# --- cl-optim check ---


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a language model and what fine-tuning made of it on texts of what it should still "
        "know: bits per byte, accuracy of the next token, KL to the base. Exits with 2 where more "
        "is lost than --budget allows."
    )
    parser.add_argument("base", metavar="BASE", help="a folder of transformers', or a hub's name")
    parser.add_argument("tuned", metavar="TUNED", help="likewise; or an adapter of peft")
    parser.add_argument(
        "--texts", type=Path, nargs="+", required=True, metavar="FILE",
        help="UTF-8 text, or .jsonl with 'text', or 'prompt' and 'answer'",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="PART",
        help="the part of the base's bits per byte that may come on top: 0.05",
    )  # fmt: skip
    parser.add_argument(
        "--length", type=int, default=512, metavar="TOKENS", help="of a window (512)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda arguments: _check(parser, arguments))


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("transformers") is None:
        parser.error("checking models needs transformers: pip install transformers")
    if not arguments.json:
        _require_rich(parser, "printing a comparison")
    from cl_optim.retention.forgetting.command import check_models, show

    try:
        found = check_models(
            arguments.base, arguments.tuned, arguments.texts, arguments.budget, arguments.length
        )
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    if arguments.json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        show(found)
    return 3 if found.breached else 0


# --- cl-optim info ---


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
