"""Does EWC keep as much around other optimizers? ``python -m bench.retention optimizers``.

Permuted digits under EWCAdamW, and under EWC around AdamW, SGD, Muon and Adafactor. Where steps are
as long as the learning rate says, whatever the gradient, there is one strength. SGD's are as long
as the gradient, which the pull is then compared with: its strength is chosen like the learning
rates, on the validation split and with seeds of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from bench.retention import tables
from bench.retention.sweep import score
from cl_optim import EWC
from cl_optim.demo import metrics
from cl_optim.demo.experiments import EWC_KRONECKER, EWC_PROXIMAL, PERMUTED_DIGITS
from cl_optim.demo.methods import WEIGHT_DECAY, Learner, Method, Protected, Structure, exact_fisher
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import in_percent, number_table
from cl_optim.demo.scenarios import Split, Task
from cl_optim.demo.train import train

STRENGTH = 0.1
_SGD_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_EVERY = 10  # steps between pulls of Kronecker importance
SWEEP_SEEDS = 3

Inner = Literal["AdamW", "SGD", "Muon", "Adafactor"]


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon on matrices, which takes no others, and AdamW on the rest, as its users have it."""

    def __init__(self, params: Iterable[tuple[str, nn.Parameter]], lr: float) -> None:
        named = list(params)
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon([pair for pair in named if pair[1].dim() == 2], lr=lr),
            torch.optim.AdamW([pair for pair in named if pair[1].dim() != 2], lr=lr),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let both step; there are no closures."""
        for part in self._parts:
            part.step()


_MAKERS: dict[Inner, Callable[[Any, float], torch.optim.Optimizer]] = {
    "AdamW": lambda params, lr: torch.optim.AdamW(
        params, lr=lr, weight_decay=WEIGHT_DECAY, fused=True
    ),
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Muon": MuonAndAdamW,
    "Adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr),
}
_RATES: dict[Inner, tuple[float, ...]] = {
    "AdamW": (1e-3, 3.2e-3, 1e-2),
    "SGD": (1e-2, 3.2e-2, 1e-1),
    "Muon": (1e-3, 3.2e-3, 1e-2, 3.2e-2),
    "Adafactor": (1e-2, 3.2e-2, 1e-1),
}
_STRUCTURES: tuple[Structure, ...] = ("diagonal", "kronecker")


@dataclass(frozen=True)
class Wrapped(Method):
    """EWC around an optimizer.

    Attributes:
        inner: The optimizer.
        structure: Of the Fisher information; None: no protection.
        strength: λ without a unit.
    """

    inner: Inner = "AdamW"
    structure: Structure | None = "diagonal"
    strength: float = STRENGTH

    def learner(self, model: nn.Module) -> Learner:
        """Start training a model."""
        return WrappedLearner(model, self)


class WrappedLearner(Learner):
    """EWC, consolidated at the end of each task."""

    optimizer: EWC

    def __init__(self, model: nn.Module, method: Wrapped) -> None:
        inner = _MAKERS[method.inner](model.named_parameters(), method.lr)
        every = _EVERY if method.structure == "kronecker" else 1
        super().__init__(model, EWC(inner, strength=method.strength, every=every))
        self._structure = method.structure

    def end_task(self, train: Split) -> None:
        """Make the weights of now the anchor; add this task's importance to the earlier ones'."""
        if self._structure is not None:
            self.optimizer.consolidate(exact_fisher(self.model, train, self._structure))


@dataclass(frozen=True)
class Row:
    """What one optimizer reached.

    Attributes:
        label: Of the optimizer.
        structure: Of the Fisher information; None: no protection.
        lr: The rate that was chosen.
        strength: Likewise, where there is more than one.
        acc: ACC on the test split, by seed.
        learning_accuracy: Likewise.
    """

    label: str
    structure: Structure | None
    lr: float
    strength: float
    acc: tuple[float, ...]
    learning_accuracy: tuple[float, ...]


def candidates() -> list[list[Method]]:
    """Return for each row its method with every learning rate."""
    rows: list[list[Method]] = []
    for structure, base in zip(_STRUCTURES, (EWC_PROXIMAL, EWC_KRONECKER), strict=True):
        ours = replace(base, label="EWCAdamW", strength=STRENGTH)
        rows.append([replace(ours, lr=lr) for lr in _RATES["AdamW"]])
        rows += [
            [
                replace(_wrapped(inner, structure, lr), strength=strength)
                for lr in rates
                for strength in (_SGD_STRENGTHS if inner == "SGD" else (STRENGTH,))
            ]
            for inner, rates in _RATES.items()
        ]
    rows += [[_wrapped(inner, None, lr) for lr in rates] for inner, rates in _RATES.items()]
    return rows


def _wrapped(inner: Inner, structure: Structure | None, lr: float) -> Wrapped:
    label = inner if structure is None else f"EWC({inner})"
    return Wrapped(f"{inner.lower()}-{structure}", label, lr, inner=inner, structure=structure)


def measure(data: Task, seeds: int, on_run: Callable[[], object] = lambda: None) -> list[Row]:
    """Choose each row's learning rate, and train with it.

    Args:
        data: The digits.
        seeds: How many, from 0.
        on_run: Called after each candidate and each row.
    """
    found = []
    config = replace(PERMUTED_DIGITS.config, points=0)
    for methods in candidates():
        scores = []
        for method in methods:
            scores.append(score(method, PERMUTED_DIGITS, data, SWEEP_SEEDS))
            on_run()
        method = max(scores, key=lambda one: one.acc).method
        matrices = [
            train(method, PERMUTED_DIGITS.build(data, config.tasks, seed), config, seed).matrix
            for seed in range(seeds)
        ]
        on_run()
        assert isinstance(method, (Wrapped, Protected))
        found.append(
            Row(
                method.label, method.structure, method.lr, method.strength or 0.0,
                tuple(map(metrics.acc, matrices)), tuple(map(metrics.learning_accuracy, matrices)),
            )
        )  # fmt: skip
    return found


def render(rows: Sequence[Row], table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return a table and, for each structure, how far each optimizer is from EWCAdamW."""
    table = number_table(
        table_box, "Optimizer", "Fisher", "lr", "strength", "ACC", "learning accuracy",
        "− EWCAdamW",
    )  # fmt: skip
    ours = {row.structure: row for row in rows if row.label == "EWCAdamW"}
    for row in rows:
        beside = ours.get(row.structure)
        difference = "–"
        if beside is not None and beside is not row:
            pairs = zip(row.acc, beside.acc, strict=True)
            difference = in_percent(Interval.of([a - b for a, b in pairs]), signed=True)
        table.add_row(
            row.label, row.structure or "none", f"{row.lr:g}",
            "–" if row.structure is None else f"{row.strength:g}",
            in_percent(Interval.of(row.acc)), in_percent(Interval.of(row.learning_accuracy)),
            difference,
        )  # fmt: skip
    seeds = len(rows[0].acc)
    setting = (
        f"ACC on the test split of Permuted-Digits in per cent, mean over seeds 0 to {seeds - 1}, "
        f"± half of the 95 % interval, differences paired by seed. Strength {STRENGTH:g} but "
        f"around SGD, proximal, Kronecker pulls every {_EVERY} steps; learning rates, and SGD's "
        f"strength, by validation ACC with {SWEEP_SEEDS} other seeds. Muon is on matrices, with "
        "AdamW on biases."
    )
    return Group(Text(setting), Text(), table)


def write(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write ``optimizers.json`` and ``optimizers.md`` into an existing directory."""
    record = {"strength": STRENGTH, "rows": [asdict(row) for row in rows]}
    return tables.write(directory, "optimizers", record, render(rows, box.MARKDOWN))
