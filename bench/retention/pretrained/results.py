"""What is kept of each old domain, what that costs on the new one, and who wins."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.retention.drift import Drift
from bench.retention.pretrained.methods import ADAMW, Method, Setting
from bench.retention.pretrained.runs import PROBES, Place, domains
from bench.retention.text.results import most_kept
from cl_optim.demo.metrics import Interval

COSTS = (0.0, 0.01, 0.02)


@dataclass(frozen=True)
class Run:
    """One run, as its file has it.

    Attributes:
        method: How it learned.
        seed: Of the windows.
        rate: The learning rate.
        points: What was measured, by α, which is among it.
        drift: How far it went.
        seconds: Of a step, the median.
        gib: The most memory.
    """

    method: Method
    seed: int
    rate: float
    points: tuple[dict[str, float], ...]
    drift: Drift
    seconds: float
    gib: float

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Run:
        """Return what JSON holds of one."""
        return cls(
            Method(**record["method"]), record["seed"], record["rate"], tuple(record["points"]),
            Drift(**record["drift"]), record["seconds"], record["gib"],
        )  # fmt: skip

    @property
    def end(self) -> dict[str, float]:
        """Return what was measured at the end."""
        return max(self.points, key=lambda point: point["alpha"])


@dataclass(frozen=True)
class Results:
    """All runs of a setting.

    Attributes:
        setting: Of model and training.
        new: The new domain's name.
        old: The names of the domains that replay has some of.
        unseen: The name of the one that nothing that protects ever sees.
        before: What was measured of the base model, by seed.
        runs: By method and seed.
        device: Where they ran.
    """

    setting: Setting
    new: str
    old: tuple[str, ...]
    unseen: str
    before: dict[int, dict[str, float]]
    runs: tuple[Run, ...]
    device: str

    @classmethod
    def read(cls, place: Place, setting: Setting, methods: Sequence[Method], seeds: int) -> Results:
        """Read the files of all these runs."""
        texts = domains(place.texts)
        records = [
            json.loads(place.run(method, seed).read_text())
            for method in methods
            for seed in range(seeds)
        ]
        runs = tuple(map(Run.from_record, records))
        before = {
            seed: json.loads(place.before(seed).read_text())["measured"] for seed in range(seeds)
        }
        old = tuple(domain.name for domain in texts.old)
        devices = ", ".join(sorted({one["device"] for one in records}))
        return cls(setting, texts.new.name, old, texts.unseen.name, before, runs, devices)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Results:
        """Return what :meth:`record` has made JSON of."""
        setting: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in record["setting"].items()
        }
        before = {int(seed): measured for seed, measured in record["before"].items()}
        runs = tuple(map(Run.from_record, record["runs"]))
        return cls(
            Setting(**setting), record["new"], tuple(record["old"]), record["unseen"], before, runs,
            record["device"],
        )  # fmt: skip

    @property
    def known(self) -> tuple[str, ...]:
        """Return the names of all domains that the base model knows."""
        return (*self.old, self.unseen)

    @property
    def methods(self) -> list[Method]:
        """Return the methods, in the order of the runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, method: Method) -> list[Run]:
        """Return a method's runs, by seed."""
        return sorted((r for r in self.runs if r.method == method), key=lambda run: run.seed)

    def cost(self, method: Method) -> Interval:
        """Return nats_method / nats_AdamW − 1 on the new domain, at the end."""
        return Interval.of([
            self._cost(run.end, adamw) for run, adamw in self._paired(method)
        ])  # fmt: skip

    def lost(self, method: Method, domain: str) -> Interval:
        """Return the nats per token of a domain that a method has lost, at the end."""
        return Interval.of([
            run.end[domain] - self.before[run.seed][domain] for run in self.of(method)
        ])  # fmt: skip

    def probes(self, method: Method) -> Interval:
        """Return the part of the probes that is answered, at the end."""
        return Interval.of([run.end[PROBES] for run in self.of(method)])

    def kept(self, method: Method) -> Interval:
        """Return the part of what AdamW forgets that a method keeps, at the end.

        Of the sum over all domains that the base model knows; NaN where AdamW forgets nothing.
        """
        return Interval.of([self._kept(run.end, adamw) for run, adamw in self._paired(method)])

    def kept_at(self, method: Method, cost: float) -> Interval:
        """Return the most that is kept on the way back to the old weights, at no more cost.

        NaN where a seed's curve costs more everywhere.
        """
        found = []
        for run, adamw in self._paired(method):
            points = sorted(run.points, key=lambda point: -point["alpha"])
            kept = [self._kept(point, adamw) for point in points]
            costs = [self._cost(point, adamw) for point in points]
            found.append(most_kept(kept, costs, cost))
        return Interval.of(found)

    @property
    def nats_lost(self) -> list[float]:
        """Return what each run has lost at its end, the mean over all domains it knew."""
        return [
            sum(run.end[one] - self.before[run.seed][one] for one in self.known) / len(self.known)
            for run in self.runs
        ]

    @property
    def sentences(self) -> list[str]:
        """Return who wins."""
        if not all(self._forgotten(run) > 0.0 for run in self.of(ADAMW)):
            return ["AdamW did not forget: there is nothing to keep."]
        said = []
        for cost in COSTS:
            at = f"at no more cost than AdamW's, plus {cost:.0%}" if cost else "at AdamW's cost"
            for needs, what in ((False, "without old data"), (True, "with old data")):
                found = {
                    method: self.kept_at(method, cost).mean
                    for method in self.methods
                    if method.needs_old_data == needs
                }
                ranked = sorted(
                    (one for one in found.items() if not math.isnan(one[1])), key=lambda i: -i[1]
                )
                if ranked:
                    best = "; ".join(
                        f"{method.label} {100 * kept:.0f} %" for method, kept in ranked[:3]
                    )
                    said.append(f"Most kept on the way back {at}, {what}: {best}.")
        return said

    def record(self) -> dict[str, Any]:
        """Return what JSON holds of them."""
        return {**asdict(self), "sentences": self.sentences}

    def _paired(self, method: Method) -> list[tuple[Run, Run]]:
        return list(zip(self.of(method), self.of(ADAMW), strict=True))

    def _cost(self, point: dict[str, float], adamw: Run) -> float:
        return point[self.new] / adamw.end[self.new] - 1.0

    def _kept(self, point: dict[str, float], adamw: Run) -> float:
        forgotten = self._forgotten(adamw)
        if not forgotten > 0.0:
            return math.nan
        return sum(adamw.end[name] - point[name] for name in self.known) / forgotten

    def _forgotten(self, run: Run) -> float:
        return sum(run.end[name] - self.before[run.seed][name] for name in self.known)
