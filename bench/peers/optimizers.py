"""Other packages' Adam, with the penalty's gradient added by hand before its step."""

from __future__ import annotations

from collections.abc import Callable

from contenders import Problem, foreach_step


def bitsandbytes(problem: Problem) -> Callable[[], None]:
    """Return a step of AdamW8bit (Dettmers et al. 2022, arXiv:2110.02861)."""
    from bitsandbytes.optim import AdamW8bit

    return foreach_step(problem, AdamW8bit(problem.params, lr=1e-3))


def optimi(problem: Problem) -> Callable[[], None]:
    """Return a step of optimi's AdamW, whose passes are foreach on a CPU."""
    from optimi import AdamW

    return foreach_step(problem, AdamW(problem.params, lr=1e-3, weight_decay=1e-2))


def schedulefree(problem: Problem) -> Callable[[], None]:
    """Return a step of AdamWScheduleFree (Defazio et al. 2024, arXiv:2405.15682)."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(problem.params, lr=1e-3, weight_decay=1e-2)
    optimizer.train()
    return foreach_step(problem, optimizer)
