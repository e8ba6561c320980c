"""BackPACK (Dangel et al. 2020, arXiv:1912.10985): Σ g² of samples, by extended modules."""

from __future__ import annotations

from collections.abc import Callable

from fisher_contenders import Problem, Sums
from suite import NotHereError
from torch import nn


def fisher(problem: Problem) -> Callable[[], Sums]:
    """Return SumGradSquared, which never holds a gradient for each sample."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if not isinstance(problem.model, nn.Sequential):
        raise NotHereError("BackPACK's sums are of modules in a row, and attention is none")
    model, loss = extend(problem.model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def work() -> Sums:
        model.zero_grad()
        with backpack(SumGradSquared()):
            loss(model(problem.inputs), problem.targets).backward()
        return {name: p.sum_grad_squared for name, p in model.named_parameters()}

    return work
