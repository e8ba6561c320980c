"""Where a guard writes what it measures: CSV, TensorBoard, the terminal."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cl_optim.importance.report.figures import csv_cell
from cl_optim.ops.checks import require
from cl_optim.retention.guard.evaluation import Check

if TYPE_CHECKING:
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

_COLUMNS = ("step", "evaluation", "role", "value", "baseline", "loss", "ewc_lambda", "action")


class Logger(Protocol):
    """Takes each check of a guard."""

    def log(self, check: Check) -> None:
        """Write a check."""


class CSVLogger:
    """Appends a line for each evaluation to a CSV file, whose first line names the columns.

    Args:
        path: The file; its folder is created.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, check: Check) -> None:
        """Append a check."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(_COLUMNS)
            for one in check.measured:
                writer.writerow(
                    (
                        check.step,
                        csv_cell(one.evaluation.name),
                        csv_cell(one.evaluation.role),
                        one.value,
                        one.baseline,
                        one.loss,
                        "" if check.ewc_lambda is None else check.ewc_lambda,
                        csv_cell(check.action),
                    )
                )


class TensorBoardLogger:
    """Writes each evaluation, its relative loss and λ as scalars.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``; it is the caller's to close.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def log(self, check: Check) -> None:
        """Write a check."""
        for one in check.measured:
            name = one.evaluation.name
            self.writer.add_scalar(f"retention/{name}", one.value, check.step)
            if math.isfinite(one.loss):
                self.writer.add_scalar(f"retention_loss/{name}", one.loss, check.step)
        if check.ewc_lambda is not None:
            self.writer.add_scalar("retention/ewc_lambda", check.ewc_lambda, check.step)
        if check.action:
            self.writer.add_text("retention/action", check.action, check.step)
        self.writer.flush()


class RichLogger:
    """Prints a line for each check.

    Args:
        console: Where; the terminal if None.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """

    def __init__(self, console: Console | None = None) -> None:
        require("rich", "cli", "RichLogger")
        from rich.console import Console

        self.console = console or Console()

    def log(self, check: Check) -> None:
        """Print a check."""
        parts = [
            f"{one.evaluation.name} {one.value:.4g}"
            + (f" ({-one.loss:+.1%})" if one.baseline else "")
            for one in check.measured
        ]
        line = f"step {check.step}: " + ", ".join(parts)
        style = "bold red" if check.breached else None
        self.console.print(line, style=style, markup=False, highlight=False)
        if check.action:
            self.console.print(f"  {check.action}", style=style, markup=False, highlight=False)
