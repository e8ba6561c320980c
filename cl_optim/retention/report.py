"""What a guard reports at the end: retained, learned, where it stopped, what to do next."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cl_optim.retention.evaluation import Check, Measured

_WIDTH = 100


@dataclass(frozen=True)
class Report:
    """Printable, by ``print`` and by rich.

    Attributes:
        check: The check that it speaks of: the last without a breach that training went back to,
            or the last one.
        threshold: The relative loss that was too much.
        useful: Old tasks whose forgetting was wanted.
        stopped_at: The step of the check that stopped training; None if none did.
        breaches: Checks with a breach.
        recommendation: One sentence.
    """

    check: Check
    threshold: float
    useful: tuple[str, ...]
    stopped_at: int | None
    breaches: int
    recommendation: str

    @classmethod
    def of(
        cls, history: Sequence[Check], threshold: float, useful: Collection[str], stopped: bool
    ) -> Report:
        """The report of a guard's checks; at least one."""
        last = history[-1]
        shown = last
        if "rolled back" in last.action:
            shown = next((c for c in reversed(history) if not c.breached), last)
        breaches = sum(bool(check.breached) for check in history)
        return cls(
            check=shown,
            threshold=threshold,
            useful=tuple(sorted(useful)),
            stopped_at=last.step if stopped else None,
            breaches=breaches,
            recommendation=_recommend(last),
        )

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("task", "role", "start", f"step {self.check.step}", "retained", ""):
            table.add_column(name, justify="left" if name in ("task", "role", "") else "right")
        for one in self.check.measured:
            table.add_row(
                Text(one.evaluation.name),  # not markup
                one.evaluation.role,
                f"{one.baseline:.4g}",
                f"{one.value:.4g}",
                _retained(one),
                self._remark(one),
            )
        return Group(table, self._outcome(), Text(self.recommendation))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=_WIDTH, highlight=False).print(self)
        return text.getvalue().rstrip()

    def _remark(self, one: Measured) -> str:
        name = one.evaluation.name
        if name in self.useful:
            return "forgetting wanted"
        if name in self.check.breached:
            return "forgotten"
        if one.evaluation.role == "new":
            return "learned" if one.loss < 0 else "not learned"
        return ""

    def _outcome(self) -> str:
        checks = "check" if self.breaches == 1 else "checks"
        breaches = f"more than {self.threshold:.0%} was lost in {self.breaches} {checks}"
        if self.stopped_at is None:
            return f"Training was not stopped; {breaches}."
        back = f", and back at step {self.check.step}" if self.check.step < self.stopped_at else ""
        return f"Training was stopped at step {self.stopped_at}{back}; {breaches}."


def _retained(one: Measured) -> str:
    """What is left of the baseline; of a new task, what was gained on it."""
    if not math.isfinite(one.value):
        return "nothing: not finite"
    if one.baseline == 0.0:
        return f"{one.value:+.4g}, from 0"
    return f"{-one.loss:+.1%}" if one.evaluation.role == "new" else f"{1 - one.loss:.1%}"


def _recommend(last: Check) -> str:
    gains = [one.loss for one in last.measured if one.evaluation.role == "new"]
    if not all(math.isfinite(one.value) for one in last.measured):
        return "Recommendation: lower the learning rate and clip gradients: training diverged."
    if last.breached:
        names = ", ".join(last.breached)
        if not last.ewc_lambda:
            return (
                f"Recommendation: protect {names}: mix old samples into the batches, or train with "
                "EWCAdamW and consolidate() before the new task."
            )
        return (
            f"Recommendation: protect {names} more: raise ewc_lambda above {last.ewc_lambda:g}, or "
            "mix old samples into the batches."
        )
    if gains and min(gains) >= 0:
        return "Recommendation: train longer or protect less: nothing new has been learned."
    return "Recommendation: keep these weights; no guarded task has lost more than allowed."
