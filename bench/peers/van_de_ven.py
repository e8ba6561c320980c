"""EWC as van de Ven, Tuytelaars & Tolias (2022, doi:10.1038/s42256-022-00568-3) write it."""

from __future__ import annotations

from collections.abc import Callable

from contenders import LAMBDA, Problem


def penalty(problem: Problem) -> Callable[[], None]:
    """Return a step of AdamW with λ/2 Σ F(θ − θ*)² in the loss, by autograd, a term a tensor."""
    optimizer = problem.adamw
    terms = list(zip(problem.params, *problem.protection, strict=True))

    def step() -> None:
        losses = [(fisher * (p - mean) ** 2).sum() for p, fisher, mean in terms]
        (2 * LAMBDA * (0.5 * sum(losses))).backward()
        optimizer.step()

    return step
