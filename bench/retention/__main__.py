"""The command line: ``python -m bench.retention``, from the checkout's root."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from bench.retention.avalanche import INNERS
from bench.retention.commands import (
    Choice,
    run,
    run_avalanche,
    run_budget,
    run_optimizers,
    run_published,
    run_strength,
    run_sweeps,
)
from bench.retention.pretrained.commands import run_pretrained
from bench.retention.pretrained.methods import METHODS, QUICK, Setting
from bench.retention.pretrained.runs import Place
from bench.retention.text.commands import run_text_demo
from bench.retention.text.corpora import english, from_file, python_code
from bench.retention.text.model import Sizes
from bench.retention.text.runs import FAMILIES
from bench.retention.van_de_ven.commands import run_van_de_ven
from bench.retention.van_de_ven.scenarios import NAMES, SPLITS, setting_of
from cl_optim.cli import Parser, train
from cl_optim.demo.arguments import MAX_SEEDS, MAX_TASKS, add_length, add_out, whole_number
from cl_optim.demo.commands import new_console

Command: TypeAlias = Callable[[Choice], object]

SCENARIOS = ("permuted", "split", "gem", "formats", "retention")
OUT = Path("runs/retention")
_RUN = (
    "Train every method of a scenario on one task after another; print what each remembers, and "
    "draw it. permuted and split: the demo's. gem: permuted digits with all variants of gradient "
    "memories, around AdamW and around SGD. formats: the same with importance, anchors and moments "
    "in fewer bytes. retention: split classes with replay and progressive networks, too."
)
_SWEEP = (
    "Choose the learning rates and λ of a scenario's methods on a validation split and seeds of "
    "its own; print the grids."
)
_PUBLISHED = (
    "Run the scenarios permuted and split, and print published figures beside the measured."
)
_SIZES = (
    ("width", 4096, "of the transformer, a multiple of 4"),
    ("layers", 64, "of the transformer"),
    ("context", 4096, "bytes in a window"),
    ("batch", 4096, "windows in a step"),
    ("old-steps", 10**6, "steps of learning OLD"),
    ("new-steps", 10**6, "steps of learning NEW"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its arguments; ``sys.argv`` if None.

    Returns:
        The exit code: 0, or 1 where training failed.

    Raises:
        SystemExit: With code 2, after a sentence on stderr, where an argument is wrong.
    """
    parser = Parser(
        prog="python -m bench.retention", description="Experiments beyond cl-optim demo."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command, help_, description in (
        ("run", run, "every method of a scenario, side by side", _RUN),
        ("sweep", run_sweeps, "choose learning rates and λ anew", _SWEEP),
        ("published", run_published, "measured figures beside published ones", _PUBLISHED),
    ):
        _add_choice(commands.add_parser(name, help=help_, description=description), command)
    _add_strength(commands.add_parser("strength", help="one strength on many networks"))
    _add_budget(commands.add_parser("budget", help="a forgetting budget on five pairs of tasks"))
    _add_optimizers(commands.add_parser("optimizers", help="EWC around other optimizers"))
    _add_avalanche(commands.add_parser("avalanche", help="Avalanche's EWC and GEM beside ours"))
    _add_van_de_ven(commands.add_parser("van-de-ven", help="van de Ven's EWC beside ours"))
    _add_text(commands.add_parser("text", help="two texts: English, then Python code"))
    _add_pretrained(commands.add_parser("pretrained", help="SmolLM2 learns German manual pages"))
    arguments = parser.parse_args(argv)
    chosen: Callable[[argparse.Namespace], int] = arguments.run
    return chosen(arguments)


def _add_choice(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add arguments that choose experiments; published figures are of two scenarios."""
    _add_data(parser)
    if command is run_published:
        whole = whole_number(2, MAX_SEEDS)
        parser.add_argument("--seeds", type=whole, metavar="N", help="runs per method")
        parser.set_defaults(scenarios=("permuted", "split"), tasks=None, epochs=None)
    else:
        parser.add_argument(
            "scenarios", choices=SCENARIOS, nargs="+", metavar="SCENARIO", help=", ".join(SCENARIOS)
        )
        add_length(parser, seeds="the scenario's number", epochs="the scenario's number")
    add_out(parser, OUT)
    parser.set_defaults(run=lambda arguments: _carry_out(parser, arguments, command))


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", choices=("digits", "fashion-mnist"), default="digits",
        help="scikit-learn's handwritten digits, or Fashion-MNIST (digits)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="the folder of Fashion-MNIST's gzipped IDX files (Debian's, else torchvision's)",
    )  # fmt: skip


def _carry_out(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, command: Command
) -> int:
    if arguments.data_dir is not None and arguments.data != "fashion-mnist":
        parser.error("--data-dir goes with --data fashion-mnist.")
    choice = Choice(
        scenarios=arguments.scenarios,
        data=arguments.data,
        folder=arguments.data_dir,
        tasks=arguments.tasks,
        epochs=arguments.epochs,
        seeds=arguments.seeds,
        out=arguments.out,
    )
    return train(parser, "this", arguments.out, lambda: command(choice))


def _add_strength(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train each form of protection with several strengths on networks of several widths, on "
        "ten tasks and on heads; print what each keeps."
    )
    _add_seeded(parser, run_strength, "runs per cell", 5)


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn a new task after an old one with a budget of what may be lost of it, for five pairs "
        "of tasks and three budgets; print what is lost, and how much of the budget was used."
    )
    _add_seeded(parser, run_budget, "runs of each budget", 3)


def _add_optimizers(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train permuted digits under EWCAdamW and under EWC around AdamW, SGD, Muon and Adafactor, "
        "with one strength; learning rates are chosen on the validation split."
    )
    _add_seeded(parser, run_optimizers, "runs of each row", 5)


def _add_seeded(
    parser: argparse.ArgumentParser, function: Callable[[int, Path], None], what: str, seeds: int
) -> None:
    whole = whole_number(2, MAX_SEEDS)
    parser.add_argument("--seeds", type=whole, default=seeds, metavar="N", help=f"{what} ({seeds})")
    _add_run(parser, lambda arguments: function(arguments.seeds, arguments.out))


def _add_run(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None]
) -> None:
    """Add the folder of results, and what is done with all arguments."""
    add_out(parser, OUT)

    def run_it(arguments: argparse.Namespace) -> int:
        return train(parser, "this", arguments.out, lambda: command(arguments))

    parser.set_defaults(run=run_it)


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Add where the images are."""
    parser.add_argument(
        "--data", choices=("fashion-mnist", "mnist"), default="fashion-mnist",
        help="what the files in DIR are: fashion-mnist or mnist (fashion-mnist)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="the folder of the four IDX files (Debian's, of Fashion-MNIST)",
    )  # fmt: skip


def _add_avalanche(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn permuted and split Fashion-MNIST (digits, where it is not found) or MNIST in "
        "Avalanche's own loop, with its plugins for EWC and GEM and with ours; print what each "
        "keeps, in which time. Runs that are done are not done again. make bench-avalanche brings "
        "Avalanche."
    )
    _add_images(parser)
    parser.add_argument(
        "--optimizers", nargs="+", choices=INNERS, default=list(INNERS), metavar="OPTIMIZER",
        help=f"{', '.join(INNERS)} (all)",
    )  # fmt: skip
    whole = whole_number(2, MAX_SEEDS)
    parser.add_argument("--seeds", type=whole, default=5, metavar="N", help="runs of each row (5)")

    def command(arguments: argparse.Namespace) -> None:
        data = arguments.data, arguments.data_dir
        run_avalanche(arguments.seeds, *data, arguments.optimizers, arguments.out)

    _add_run(parser, command)


def _add_van_de_ven(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn ten classes in contexts of two, as in three types of incremental learning (van de "
        "Ven et al. 2022), with their EWC, with ours and with what is simpler; print what each "
        "keeps, in which time. On Fashion-MNIST (digits, where it is not found), or on MNIST. Runs "
        "that are done are not done again."
    )
    _add_images(parser)
    parser.add_argument(
        "--scenarios", nargs="+", choices=NAMES, default=list(SPLITS), metavar="SCENARIO",
        help=f"{', '.join(NAMES)} ({' '.join(SPLITS)}); permuted takes hours",
    )  # fmt: skip
    whole = whole_number
    for name, (low, high), what in (
        ("iterations", (1, 10**6), "per context (published: 2000; permuted: 5000)"),
        ("fisher-samples", (1, 10**6), "of each context for the Fisher information (1000)"),
        ("contexts", (2, MAX_TASKS), "that follow each other (5; permuted: 10)"),
    ):
        parser.add_argument(f"--{name}", type=whole(low, high), metavar="N", help=what)
    parser.add_argument(
        "--seeds", type=whole(2, MAX_SEEDS), default=5, metavar="N", help="runs of each row (5)"
    )

    def command(arguments: argparse.Namespace) -> None:
        length = arguments.iterations, arguments.fisher_samples, arguments.contexts
        settings = {name: setting_of(name, *length) for name in arguments.scenarios}
        data = arguments.data, arguments.data_dir
        run_van_de_ven(settings, arguments.seeds, *data, arguments.out)

    _add_run(parser, command)


def _add_pretrained(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "SmolLM2-135M learns German manual pages by many methods: what each keeps of English "
        "prose, Python code and what nothing that protects it ever sees, and what that costs. Runs "
        "that are done are not done again. make bench-pretrained brings the model and the texts."
    )
    parser.add_argument(
        "--texts", type=Path, default=Path(".venv/texts"), metavar="DIR",
        help="where Debian's manpages-de, debian-faq and fortunes are unpacked (.venv/texts)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a toy in place of SmolLM2")
    whole = whole_number
    parser.add_argument("--seeds", type=whole(1, MAX_SEEDS), default=1, metavar="N", help="(1)")
    parser.add_argument(
        "--processes", type=whole(0, 256), default=2, metavar="P",
        help="runs at the same time; 0: all in this process (2)",
    )  # fmt: skip
    known = {method.label: method for method in METHODS}
    parser.add_argument(
        "--methods", nargs="+", choices=known, default=list(known), metavar="METHOD",
        help="beside AdamW (all)",
    )  # fmt: skip

    def command(arguments: argparse.Namespace) -> None:
        setting = QUICK if arguments.quick else Setting()
        place = Place(arguments.out / setting.base, arguments.texts)
        methods = [known[label] for label in arguments.methods]
        seeds, processes, out = arguments.seeds, arguments.processes, arguments.out
        run_pretrained(place, setting, seeds, processes, methods, out, new_console())

    _add_run(parser, command)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A byte-level transformer learns English (CPython's help texts), then Python code (the "
        "standard library), or any two files: with AdamW, EWC, GEM, replay, text that the old "
        "model wrote, LwF, and EWC with some of them. "
        "What each keeps of the first text, and what that costs on the second."
    )
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD", help="the text to keep")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="the text to learn")
    whole = whole_number
    parser.add_argument("--seeds", type=whole(1, MAX_SEEDS), default=3, metavar="N", help="(3)")
    parser.add_argument(
        "--processes", type=whole(1, 256), default=2, metavar="P",
        help="runs at the same time, each with one thread (2)",
    )  # fmt: skip
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY",
        help=f"of methods, beside AdamW: {'; '.join(FAMILIES)} (all)",
    )  # fmt: skip
    add_out(parser, OUT)
    for name, high, help_ in _SIZES:
        parser.add_argument(f"--{name}", type=whole(1, high), metavar="N", help=help_)
    parser.set_defaults(run=lambda arguments: _text(parser, arguments))


def _text(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if (arguments.old is None) != (arguments.new is None):
        parser.error("give both texts, OLD and NEW, or none.")
    names = (name.replace("-", "_") for name, *_ in _SIZES)
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sizes = replace(Sizes(), **given)
    if sizes.width % sizes.heads:
        parser.error(f"--width must be a multiple of {sizes.heads}, not {sizes.width}.")

    def run_on_texts() -> None:
        if arguments.old is None:
            old, new = english(), python_code()
        else:
            old, new = from_file(arguments.old), from_file(arguments.new)
        seeds, processes, out = arguments.seeds, arguments.processes, arguments.out
        families = arguments.families
        run_text_demo(old, new, sizes, seeds, processes, families, out, new_console())

    return train(parser, "this", arguments.out, run_on_texts)


if __name__ == "__main__":
    sys.exit(main())
