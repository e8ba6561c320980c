"""Opacus (Yousefpour et al. 2021, arXiv:2109.12298): per-sample gradients by module hooks."""

from __future__ import annotations

from collections.abc import Callable

from fisher_contenders import Problem, Sums


def fisher(problem: Problem) -> Callable[[], Sums]:
    """Return the squares of all per-sample gradients, summed."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(problem.model, loss_reduction="sum")

    def work() -> Sums:
        wrapped.zero_grad()
        problem.losses(wrapped).sum().backward()
        return {
            name.removeprefix("_module."): p.grad_sample.square().sum(0)
            for name, p in wrapped.named_parameters()
        }

    return work
