"""Arguments of commands that train: the demo's, and those of ``bench.retention``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

MAX_SEEDS = 1000  # a sweep's seeds begin there
MAX_TASKS = 50


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return what makes a number of an argument, and refuses one outside of the range."""

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


def add_length(parser: argparse.ArgumentParser, *, seeds: str, epochs: str) -> None:
    """Add arguments for how long is trained; the texts say what holds without them."""
    whole = whole_number
    parser.add_argument(
        "--seeds", type=whole(1, MAX_SEEDS), metavar="N", help=f"runs per method ({seeds})"
    )
    parser.add_argument("--tasks", type=whole(2, MAX_TASKS), metavar="T", help="tasks (5)")
    parser.add_argument(
        "--epochs", type=whole(1, 1000), metavar="E", help=f"epochs per task ({epochs})"
    )


def add_out(parser: argparse.ArgumentParser, default: Path) -> None:
    """Add the argument for the folder that a command writes into."""
    parser.add_argument(
        "--out", type=Path, default=default, metavar="DIR",
        help=f"where the tables, the pictures and the JSON go ({default})",
    )  # fmt: skip
