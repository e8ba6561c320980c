"""How every question of the suite is asked: contenders in turns, their agreement and their memory.

A question is a file ``bench_*.py`` with a ``QUESTION`` and a test that calls ``ask()``; the suite's
conftest asks it of each problem, in each turn, of each contender. What else the machine does hits
all contenders alike, since they take turns; what is told are ratios within a turn (``summary.py``).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Work = Callable[[], Any]
# ours: what is asked about. peer: another's, with the same result. variant, other: ours and others'
# with another result, told beside them. floor: what the bytes or products take at least.
Kind = Literal["ours", "peer", "variant", "other", "floor"]


class NotHereError(Exception):
    """A contender does not take part; the text says why."""


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work.

    Attributes:
        make: Returns the work on a problem, or raises :class:`NotHereError`.
        kind: Whose it is, and whether its result must be that of the question's reference.
        package: What it imports.
        rounds: Calls in a turn, if not the problem's number.
    """

    make: Callable[[Any], Work]
    kind: Kind
    package: str = ""
    rounds: int | None = None

    def work(self, problem: Any) -> Work:
        """Return the work on a problem.

        Raises:
            NotHereError: Its package is not installed, or it cannot do this.
        """
        if self.package:
            try:
                importlib.import_module(self.package)
            except ImportError as error:
                raise NotHereError(f"{self.package} cannot be imported: {error}") from error
        return self.make(problem)


def returned(problem: Any, work: Work) -> list[Tensor]:
    """Return the tensors that a work returns: in a mapping, a sequence, or one."""
    found = work()
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [found[name] for name in sorted(found)]
    return list(found)


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        problems: Of each, by name, what makes it, and how many calls are in a turn.
        contenders: By name.
        reference: The contender whose result ours and the peers must have.
        base: The contender that all are divided by, beside the best peer.
        turns: How many.
        outcome: Runs a work, and returns what of its result is compared.
        tolerance: The most that a tensor may differ, ‖difference‖ ÷ ‖reference‖.
        once: Problems that are made once for all contenders, because of their size; there, results
            are not compared.
        before: What happens before each call, by problem.
    """

    problems: Mapping[str, tuple[Callable[[], Any], int]]
    contenders: Mapping[str, Contender]
    reference: str
    base: str
    turns: int = 5
    outcome: Callable[[Any, Work], Sequence[Tensor]] = returned
    tolerance: float = 1e-4
    once: tuple[str, ...] = ()
    before: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def ready(self, name: str) -> dict[str, Work | NotHereError]:
        """Return each contender's work on a problem, after one call, or why there is none.

        A peer with another result than the reference's does not take part.

        Raises:
            AssertionError: Ours has another result.
        """
        make, _ = self.problems[name]
        shared = self._new(make) if name in self.once else None
        expected = None if shared else self._outcome(make, self.contenders[self.reference])
        ready: dict[str, Work | NotHereError] = {}
        for label, contender in self.contenders.items():
            try:
                if expected is not None and contender.kind in ("ours", "peer"):
                    self._compare(contender.kind, self._outcome(make, contender), expected)
                work = contender.work(shared if name in self.once else self._new(make))
                work()
                ready[label] = work
            except NotHereError as error:
                ready[label] = error
        return ready

    def _new(self, make: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        return make()

    def _outcome(self, make: Callable[[], Any], contender: Contender) -> list[Tensor]:
        problem = self._new(make)
        return [each.clone() for each in self.outcome(problem, contender.work(problem))]

    def _compare(self, kind: Kind, found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
        for mine, right in zip(found, expected, strict=True):
            error = float((mine.double() - right.double()).norm() / right.double().norm())
            if not error <= self.tolerance:
                why = f"its result is another, by {error:.1e} of it"
                assert kind == "peer", why
                raise NotHereError(why)


def peak_bytes(work: Work) -> int | None:
    """Return by how much memory grows at most while a work runs; None where nobody counts it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the work is given what an earlier one has given back
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is of what follows
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(which: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status says nothing of {which}.")
