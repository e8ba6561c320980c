"""What a guard reports at the end: retained, learned, where it stopped, what to do next."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cl_optim.retention.guard.evaluation import Check, Measured
from cl_optim.retention.tables import as_lines, as_rich, cells

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 100
_TEXTS = (0, 1, 5)  # the columns that are no numbers


@dataclass(frozen=True)
class Report:
    """Printable, by ``print``, which needs no rich, and by rich.

    Attributes:
        check: The check of the present weights: the last one or, where that was rolled back, the
            one that training went back to.
        threshold: The relative loss that was too much.
        useful: Old tasks whose forgetting was wanted.
        stopped_at: The step of the check that stopped training; None if none did.
        back_at: The step that it, or the last check, went back to; None if it did not.
        lost: The number of checks in which a guarded task had lost more than the threshold.
        diverged: The number of those in which a number was not finite.
        recommendation: One sentence.
    """

    check: Check
    threshold: float
    useful: tuple[str, ...]
    stopped_at: int | None
    back_at: int | None
    lost: int
    diverged: int
    recommendation: str

    @classmethod
    def of(cls, history: Sequence[Check], threshold: float, useful: Collection[str]) -> Report:
        """Return the report of a guard's checks; at least one."""
        last = history[-1]
        ending = next((check for check in history if check.stopped), None)
        return cls(
            check=_present(history),
            threshold=threshold,
            useful=tuple(sorted(useful)),
            stopped_at=None if ending is None else ending.step,
            back_at=(ending or last).rolled_back_to,
            lost=sum(map(_has_lost, history)),
            diverged=sum(not check.is_finite for check in history),
            recommendation=_recommend(last),
        )

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        names, *rows = self._table()
        return Group(as_rich(names, rows, _TEXTS), self._outcome(), Text(self.recommendation))

    def __str__(self) -> str:
        names, *rows = self._table()
        first, *others = as_lines(names, rows, _TEXTS, gap="   ")
        rule = " " + "─" * (cells(first) + 2)
        lines = ["", f"  {first}".rstrip(), rule, *(f"  {line}".rstrip() for line in others), ""]
        for sentence in (self._outcome(), self.recommendation):
            lines += textwrap.wrap(sentence, _WIDTH, break_on_hyphens=False)
        return "\n".join(lines)

    def _table(self) -> list[tuple[str, ...]]:
        """Return the columns' names, then a row for each evaluation."""
        rows: list[tuple[str, ...]] = [
            ("task", "role", "start", f"step {self.check.step}", "retained", "")
        ]
        for one in self.check.measured:
            start, now = f"{one.baseline:.4g}", f"{one.value:.4g}"
            name, role = one.evaluation.name, one.evaluation.role
            rows.append((name, role, start, now, _retained(one), self._remark(one)))
        return rows

    def _remark(self, one: Measured) -> str:
        name = one.evaluation.name
        if not math.isfinite(one.value):
            return "diverged"
        if name in self.useful:
            return "forgetting wanted"
        if name in self.check.breached:
            return "forgotten"
        if one.evaluation.role == "new":
            return "learned" if one.loss < 0 else "not learned"
        return ""

    def _outcome(self) -> str:
        ending = "not stopped" if self.stopped_at is None else f"stopped at step {self.stopped_at}"
        back = "" if self.back_at is None else f", and back at step {self.back_at}"
        breaches = [f"more than {self.threshold:.0%} was lost in {_checks(self.lost)}"]
        if self.diverged:
            breaches.append(f"a number was not finite in {_checks(self.diverged)}")
        found = " and ".join(breaches)
        if (self.lost or self.diverged) and not back and not self.check.breached:
            found += f", but not in the last, at step {self.check.step}"
        return f"Training was {ending}{back}; {found}."


def _present(history: Sequence[Check]) -> Check:
    """Return the check of the weights that there are now, as near as there is one."""
    last = history[-1]
    if last.rolled_back_to is None:
        return last
    back = last.rolled_back_to
    good = (check for check in reversed(history) if not check.breached and check.step <= back)
    return next(good, last)


def _has_lost(check: Check) -> bool:
    """Return whether there was a breach by forgetting, not only by numbers that are not finite."""
    return any(
        math.isfinite(one.value) for one in check.measured if one.evaluation.name in check.breached
    )


def _checks(number: int) -> str:
    return "1 check" if number == 1 else f"{number or 'no'} checks"


def _retained(one: Measured) -> str:
    """Say what is left of the baseline; of a new task, what was gained on it."""
    if not math.isfinite(one.value):
        return "nothing: not finite"
    if one.baseline == 0.0:
        return f"{one.value:+.4g}, from 0"
    return f"{-one.loss:+.1%}" if one.evaluation.role == "new" else f"{1 - one.loss:.1%}"


def _recommend(last: Check) -> str:
    gains = [one.loss for one in last.measured if one.evaluation.role == "new"]
    if not last.is_finite:
        return "Recommendation: lower the learning rate and clip gradients: training diverged."
    if last.breached:
        names = ", ".join(last.breached)
        more = f" more: raise ewc_lambda above {last.ewc_lambda:g}," if last.ewc_lambda else ":"
        return (
            f"Recommendation: protect {names}{more} let the learning rate decay to 0, and give the "
            "guard a budget, which goes back towards the old weights at the end; where that is not "
            "enough, mix old samples into the batches or, without any, text that the model wrote "
            "itself (self_written, distillation_loss)."
        )
    if gains and min(gains) >= 0:
        return "Recommendation: train longer or protect less: nothing new has been learned."
    return (
        "Recommendation: keep these weights: no guarded task has lost more than allowed at step "
        f"{last.step}."
    )
