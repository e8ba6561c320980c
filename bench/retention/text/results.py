"""What is kept of the old text, and what it costs on the new one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.retention.drift import Drift
from bench.retention.text.model import Sizes
from bench.retention.text.runs import (
    ADAMW,
    ALPHAS,
    BASE,
    DIAGONAL,
    EWC_REPLAY,
    KRONECKER,
    KRONECKER_REPLAY,
    OWN,
    OWN_KRONECKER,
    REPLAY,
    Method,
    Run,
)
from cl_optim.demo.metrics import Interval

COSTS = (0.01, 0.02)
COMPARED = tuple(
    (replace(first, decay=True), replace(second, decay=True))
    for first, second in (
        (DIAGONAL, ADAMW),
        (KRONECKER, ADAMW),
        (KRONECKER, DIAGONAL),
        (EWC_REPLAY, REPLAY),
        (KRONECKER_REPLAY, REPLAY),
        (OWN, ADAMW),
        (OWN, DIAGONAL),
        (OWN, REPLAY),
        (OWN_KRONECKER, OWN),
    )
)


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
        runs: The methods, AdamW among them, with every seed.
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

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Results:
        """Return what JSON holds of them."""
        runs = tuple(
            Run(
                Method(**run["method"]), run["seed"], tuple(run["old"]), tuple(run["new"]),
                Drift(**run["drift"]),
            )
            for run in record["runs"]
        )  # fmt: skip
        before = tuple(Before(**one) for one in record["before"])
        same = {name: record[name] for name in ("old", "new", "guard", "seconds")}
        return cls(sizes=Sizes(**record["sizes"]), before=before, runs=runs, **same)

    @property
    def base(self) -> list[Method]:
        """The methods that were run, with a constant learning rate."""
        return [method for method in BASE if self.of(method)]

    def of(self, method: Method) -> list[Run]:
        """Return a method's runs, by seed."""
        return sorted((r for r in self.runs if r.method == method), key=lambda run: run.seed)

    def kept(self, method: Method) -> Interval:
        """Return (bpb_AdamW − bpb_method) / (bpb_AdamW − bpb_before) on the old text, at the end.

        AdamW's learning rate is constant there. NaN where it forgot nothing.
        """
        return Interval.of([kept[0] for kept in self.kept_along(method)])

    def cost(self, method: Method) -> Interval:
        """Return bpb_method / bpb_AdamW − 1 on the new text, at the end."""
        return Interval.of([cost[0] for cost in self.cost_along(method)])

    def kept_at(self, method: Method, cost: float) -> Interval:
        """Return the most that is kept on the way to the old weights, at no more than that cost.

        NaN where a seed's curve costs more everywhere.
        """
        return Interval.of(self._kept_at(method, cost))

    def more_kept(self, first: Method, second: Method, cost: float) -> Interval:
        """Return how much more the first keeps than the second at a cost, paired by seed."""
        pairs = zip(self._kept_at(first, cost), self._kept_at(second, cost), strict=True)
        return Interval.of([a - b for a, b in pairs])

    @property
    def verdicts(self) -> list[str]:
        """Return a sentence for each comparison that the benchmark is for."""
        if not self.forgotten:
            return [f"AdamW did not forget {self.old} with every seed: there is nothing to keep."]
        if len(self.before) == 1:
            return ["One seed does not tell which method keeps more."]
        sentences = []
        for first, second in COMPARED:
            if not (self.of(first) and self.of(second)):
                continue
            for cost in COSTS:
                more = self.more_kept(first, second, cost)
                if math.isnan(more.mean):
                    continue
                sign = more.mean - more.half_width > 0, more.mean + more.half_width < 0
                how = {(True, False): "more", (False, True): "less"}.get(
                    sign, "neither more nor less"
                )
                sentences.append(
                    f"With decay and interpolation, at a cost of {cost:.0%}, {first.label} keeps "
                    f"{how} than {second.label}: {100 * more.mean:+.1f} ± "
                    f"{100 * more.half_width:.1f} points of {self.old}."
                )
        return sentences

    @property
    def forgotten(self) -> bool:
        """Say whether AdamW forgot something of the old text with each seed."""
        pairs = zip(self.of(ADAMW), self.before, strict=True)
        return all(run.old[0] > before.old_bpb for run, before in pairs)

    @property
    def bits_lost(self) -> list[float]:
        """Return the bits per byte of the old text that each run's end has lost."""
        before = {one.seed: one.old_bpb for one in self.before}
        return [run.old[0] - before[run.seed] for run in self.runs]

    def kept_along(self, method: Method) -> list[list[float]]:
        """Return what each seed keeps at each of `ALPHAS`."""
        if not self.forgotten:
            return [[math.nan] * len(ALPHAS)] * len(self.before)
        return [
            [(adamw.old[0] - old) / (adamw.old[0] - before.old_bpb) for old in run.old]
            for adamw, run, before in zip(self.of(ADAMW), self.of(method), self.before, strict=True)
        ]

    def cost_along(self, method: Method) -> list[list[float]]:
        """Return what each seed costs at each of `ALPHAS`."""
        pairs = zip(self.of(method), self.of(ADAMW), strict=True)
        return [[new / adamw.new[0] - 1 for new in run.new] for run, adamw in pairs]

    def _kept_at(self, method: Method, cost: float) -> list[float]:
        curves = zip(self.kept_along(method), self.cost_along(method), strict=True)
        return [most_kept(kept, costs, cost) for kept, costs in curves]


def most_kept(kept: Sequence[float], costs: Sequence[float], limit: float) -> float:
    """Return the most that is kept on a line through points, where it costs at most so much."""
    found = [k for k, cost in zip(kept, costs, strict=True) if cost <= limit]
    for (k, c), (next_k, next_c) in itertools.pairwise(zip(kept, costs, strict=True)):
        if (c - limit) * (next_c - limit) < 0:
            found.append(k + (next_k - k) * (limit - c) / (next_c - c))
    return max(found, default=math.nan)
