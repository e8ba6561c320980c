"""ASDL (Osawa et al. 2023, arXiv:2305.04684): empirical Fisher by hooks, diagonal or Kronecker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from factor_contenders import Factors, linear_maps
from fisher_contenders import Problem, Sums
from suite import NotHereError
from torch import nn


def fisher(problem: Problem) -> Callable[[], Sums]:
    """Return the diagonal."""
    if problem.targets.dim() > 1:
        raise NotHereError("ASDL squares the gradient of each token, and not that of a sequence")
    fill = _filling(problem, "diag", [])

    def work() -> Sums:
        fill()
        return {
            f"{name}.{kind}": getattr(module.fisher.diag, kind)
            for name, module in linear_maps(problem.model).items()
            for kind in ("weight", "bias")
        }

    return work


def factors(problem: Problem) -> Callable[[], Factors]:
    """Return the Kronecker factors of all linear maps."""
    # Of a table its rule makes a matrix of all rows by all rows.
    fill = _filling(problem, "kron", [nn.Embedding, nn.LayerNorm])

    def work() -> Factors:
        fill()
        modules = linear_maps(problem.model).items()
        return {name: (module.fisher.kron.A, module.fisher.kron.B) for name, module in modules}

    return work


def _filling(problem: Problem, shape: str, ignored: list[type]) -> Callable[[], Any]:
    """Return what gives each module its ``fisher``."""
    from asdl import FISHER_EMP, FisherConfig, get_fisher_maker

    config = FisherConfig(FISHER_EMP, [shape], data_size=1, ignore_modules=ignored)
    maker = get_fisher_maker(problem.model, config)
    logits = maker.setup_model_call(problem.model, problem.inputs).flatten(0, -2)
    maker.setup_loss_call(F.cross_entropy, logits, problem.targets.flatten(), reduction="sum")

    def fill() -> None:
        problem.model.zero_grad()
        maker.forward_and_backward()

    return fill
