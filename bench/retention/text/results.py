"""What is kept of the old text, and what it costs on the new one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.retention.text.model import Sizes
from bench.retention.text.runs import ADAMW, FRACTIONS, METHODS, Method, Run
from cl_optim.demo.metrics import Interval


@dataclass(frozen=True)
class Before:
    """A model before it learns the new text: its seed and bits per byte on both."""

    seed: int
    old_bpb: float
    new_bpb: float


@dataclass(frozen=True)
class Results:
    """All runs of the demo.

    Attributes:
        old: The old text's name.
        new: The new one's.
        sizes: Of model and training.
        before: By seed.
        runs: Every method with every seed.
        guard: The report of the guarded run, printed.
        seconds: The whole demo took.
    """

    old: str
    new: str
    sizes: Sizes
    before: tuple[Before, ...]
    runs: tuple[Run, ...]
    guard: str
    seconds: float

    def of(self, method: Method) -> list[Run]:
        """Return a method's runs, by seed."""
        return sorted((r for r in self.runs if r.method == method), key=lambda run: run.seed)

    def old_bpb(self, method: Method) -> Interval:
        """Return bits per byte on the old text."""
        return Interval.of([run.old_bpb for run in self.of(method)])

    def new_bpb(self, method: Method) -> Interval:
        """Return bits per byte on the new text."""
        return Interval.of([run.new_bpb for run in self.of(method)])

    def kept(self, method: Method) -> Interval:
        """Return (bpb_AdamW − bpb_method) / (bpb_AdamW − bpb_before) on the old text.

        NaN where AdamW forgot nothing.
        """
        return Interval.of(self._kept(method))

    def cost(self, method: Method) -> Interval:
        """Return bpb_method / bpb_AdamW − 1 on the new text."""
        return Interval.of(self._cost(method))

    def verdict(self, fraction: float) -> tuple[Interval, Interval, bool]:
        """Compare EWC + replay with replay alone at a fraction: more kept, more cost, who wins.

        It wins where it keeps more, by a paired 95 % interval above 0, and costs no more on the new
        text than replay alone: an interval that is not above 0.
        """
        alone, both = (
            next(m for m in METHODS if m.replay == fraction and (m.ewc_lambda is None) is bare)
            for bare in (True, False)
        )
        kept = Interval.of(_differences(self._kept(both), self._kept(alone)))
        cost = Interval.of(_differences(self._cost(both), self._cost(alone)))
        wins = kept.mean - kept.half_width > 0 and not cost.mean - cost.half_width > 0
        return kept, cost, wins

    @property
    def verdicts(self) -> list[str]:
        """Return a sentence for each fraction, and the recommendation."""
        if not self.forgotten:
            return [f"AdamW did not forget {self.old} with every seed: there is nothing to keep."]
        if len(self.before) == 1:
            return ["One seed does not tell whether EWC + replay beats replay alone."]
        sentences, won = [], []
        for fraction in FRACTIONS:
            kept, cost, wins = self.verdict(fraction)
            won += [f"{fraction:.0%}"] if wins else []
            sentences.append(
                f"At {fraction:.0%}, EWC + replay {'beats' if wins else 'does not beat'} replay "
                f"alone: it keeps {100 * kept.mean:+.1f} ± {100 * kept.half_width:.1f} points of "
                f"{self.old} more and costs {100 * cost.mean:+.2f} ± {100 * cost.half_width:.2f} "
                f"points more on {self.new}."
            )
        advice = (
            f"EWC + replay is recommended here at {', '.join(won)} only."
            if won
            else "EWC + replay is not recommended here over replay alone."
        )
        return [*sentences, advice]

    @property
    def forgotten(self) -> bool:
        """Say whether AdamW forgot something of the old text with each seed."""
        pairs = zip(self.of(ADAMW), self.before, strict=True)
        return all(run.old_bpb > before.old_bpb for run, before in pairs)

    def _kept(self, method: Method) -> list[float]:
        if not self.forgotten:
            return [math.nan] * len(self.before)
        return [
            (adamw.old_bpb - run.old_bpb) / (adamw.old_bpb - before.old_bpb)
            for adamw, run, before in zip(self.of(ADAMW), self.of(method), self.before, strict=True)
        ]

    def _cost(self, method: Method) -> list[float]:
        pairs = zip(self.of(method), self.of(ADAMW), strict=True)
        return [run.new_bpb / adamw.new_bpb - 1 for run, adamw in pairs]


def _differences(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]
