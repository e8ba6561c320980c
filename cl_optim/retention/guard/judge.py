"""What a guard measures, and what it makes of the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cl_optim.distributed import MeanRanks, Together, reshard
from cl_optim.ops.passes import eval_mode
from cl_optim.retention.checkpoint.random_state import rng_state, set_rng_state
from cl_optim.retention.guard.evaluation import Check, Evaluation, Measured
from cl_optim.retention.guard.quantize import Quantize, check_quantize, quantized


class Judge:
    """Measures the evaluations of a run, and says which old tasks are forgotten.

    Args:
        evaluations: As for :class:`~cl_optim.retention.RetentionGuard`, as are the others.
        useful: Old tasks whose forgetting is wanted.
        quantize: A format: everything is measured on a copy of the model in it, too.
        ranks: Of which processes the numbers are means.

    Attributes:
        names: Those of all evaluations.
        wanted: Those of useful tasks, quantized or not.

    Raises:
        ValueError: An argument is out of range, or two do not go together.
        ModuleNotFoundError: What quantizes is not installed.
    """

    def __init__(
        self,
        evaluations: Iterable[Evaluation],
        useful: Iterable[str],
        quantize: Quantize | torch.dtype | None,
        ranks: MeanRanks = None,
    ) -> None:
        self._together = Together(ranks)
        self._plain = _checked(evaluations)
        useful = _checked_useful(useful, self._plain)
        self._quantize = None if quantize is None else check_quantize(quantize)
        self._quantized = (
            []
            if self._quantize is None
            else [replace(one, name=self._quantized_name(one.name)) for one in self._plain]
        )
        self.wanted = {*useful, *map(self._quantized_name, useful if self._quantize else ())}
        self._all = [*self._plain, *self._quantized]
        self.names = {evaluation.name for evaluation in self._all}

    def _quantized_name(self, name: str) -> str:
        return f"{name} ({self._quantize})"

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return each evaluation's number, by name: its mean over all processes."""
        with self._together.agreeing():
            values = self._measure_here(model)
        return self._together.mean(values)

    def _measure_here(self, model: nn.Module) -> dict[str, float]:
        values = {}
        for evaluation in self._plain:
            with _evaluating(model):  # each: one may leave the model in training mode
                values[evaluation.name] = float(evaluation.measure(model))
        if self._quantize is not None:
            with _evaluating(model):
                copy = quantized(model, self._quantize)
            for evaluation in self._quantized:
                with _evaluating(copy):
                    values[evaluation.name] = float(evaluation.measure(copy))
        return values

    def baselines(
        self, values: Mapping[str, float], given: Mapping[str, float] | None
    ) -> dict[str, float]:
        """Return what losses are compared with: what was given, else what was measured.

        Raises:
            ValueError: What was given names no evaluation, or one is not finite, or it is zero and
                losses on its task are judged; or they are others in another process.
        """
        for name in given or ():
            if name not in values:
                raise ValueError(f"baselines has {name!r}, which is no evaluation's name.")
        baselines = {**values, **(given or {})}
        self._together.require_same(
            baselines, "baselines must be the same numbers in all processes."
        )
        for evaluation in self._all:
            value, guarded = baselines[evaluation.name], self._guards(evaluation)
            if not math.isfinite(value) or (guarded and value == 0.0):
                rule = "finite and not zero, since losses are relative to it"
                raise ValueError(
                    f"the baseline of evaluation {evaluation.name!r} must be "
                    f"{rule if guarded else 'finite'}; it is {value}."
                )
        return baselines

    def breached(self, measured: Iterable[Measured], threshold: float) -> tuple[str, ...]:
        """Name the guarded tasks that lost more than a threshold, and what is not finite."""
        return tuple(
            one.evaluation.name
            for one in measured
            if not math.isfinite(one.value)  # training diverged, whatever the task
            or (self._guards(one.evaluation) and one.loss > threshold)
        )

    def most_lost(self, measured: Iterable[Measured]) -> float:
        """Return the largest relative loss of a guarded task; −∞ where there is none."""
        losses = (one.loss for one in measured if self._guards(one.evaluation))
        return max(losses, default=-math.inf)

    @property
    def guards_any(self) -> bool:
        """Whether there is an old task whose forgetting is not wanted."""
        return any(map(self._guards, self._all))

    def of_weights(self) -> list[Evaluation]:
        """Return the evaluations of the model itself; those of useful tasks guard nothing."""
        return [
            replace(one, role="mixed") if one.name in self.wanted else one for one in self._plain
        ]

    def compare(
        self, values: Mapping[str, float], baselines: Mapping[str, float]
    ) -> tuple[Measured, ...]:
        """Compare what was measured with the baselines, both by an evaluation's name."""
        measured = []
        for evaluation in self._all:
            value, baseline = values[evaluation.name], baselines[evaluation.name]
            loss = evaluation.relative_loss(value, baseline)
            measured.append(Measured(evaluation, value, baseline, loss))
        return tuple(measured)

    def _guards(self, evaluation: Evaluation) -> bool:
        return evaluation.role == "old" and evaluation.name not in self.wanted

    def unpacked(self, check: Mapping[str, Any], baselines: Mapping[str, float]) -> Check:
        """Return the check that :func:`packed` made plain data of."""
        return Check(
            check["step"],
            self.compare(check["values"], baselines),
            tuple(check["breached"]),
            check["ewc_lambda"],
            check["action"],
            check["rolled_back_to"],
            check["stopped"],
        )


def packed(check: Check) -> dict[str, Any]:
    """Return a check as plain data."""
    return {
        "step": check.step,
        "values": {one.evaluation.name: one.value for one in check.measured},
        "breached": list(check.breached),
        "ewc_lambda": check.ewc_lambda,
        "action": check.action,
        "rolled_back_to": check.rolled_back_to,
        "stopped": check.stopped,
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and give back the random states."""
    random = rng_state()
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        set_rng_state(random)
        reshard(model)


def _checked(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    checked = list(evaluations)
    names = [evaluation.name for evaluation in checked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"evaluations must have names of their own; {twice!r} is there twice.")
    if not any(evaluation.role == "old" for evaluation in checked):
        raise ValueError("evaluations must have at least one with role 'old', to be guarded.")
    return checked


def _checked_useful(useful: Iterable[str], evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    old = [evaluation.name for evaluation in evaluations if evaluation.role == "old"]
    useful = (useful,) if isinstance(useful, str) else tuple(useful)
    for name in useful:
        if name not in old:
            raise ValueError(f"useful names {name!r}, which is none of the old tasks {old}.")
    return useful
