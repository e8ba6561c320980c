"""Kronecker factors of a batch's empirical Fisher: Σ aaᵀ and Σ ggᵀ of each linear map."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fisher_contenders import Problem
from torch import Tensor, nn

from cl_optim import FisherEstimator

# By module: the sums over inputs, without what a bias adds, and over gradients of outputs.
Factors = Mapping[str, tuple[Tensor, Tensor]]


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose factors all contenders make."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def ours(problem: Problem) -> Callable[[], FisherEstimator]:
    """What an observed batch adds, with the backward pass that it goes along with."""
    linear = {id(module.weight) for module in linear_maps(problem.model).values()}
    for p in problem.model.parameters():  # others have a diagonal, which nobody else makes
        p.requires_grad_(id(p) in linear)

    def work() -> FisherEstimator:
        fisher = FisherEstimator(problem.model, structure="kronecker", block=4096, verify=False)
        problem.model.zero_grad()
        with fisher.observe(len(problem.inputs), loss_terms=1):
            problem.losses(problem.model).sum().backward()
        return fisher

    return work


def factors(fisher: FisherEstimator) -> Factors:
    """Return what an estimator has summed."""
    return {
        one["name"].removesuffix(".weight"): (one["inputs"][0, 0], one["gradients"][0, 0])
        for one in fisher.state_dict()["kronecker"]["sums"]
    }


def scaled(found: Factors) -> list[Tensor]:
    """Return upper triangles ÷ traces: by what the sums are divided, each decides for itself."""
    upper = [factor.double().triu() for name in sorted(found) for factor in found[name]]
    return [factor / factor.trace() for factor in upper]
