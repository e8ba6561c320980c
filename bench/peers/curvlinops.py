"""curvlinops (Dangel et al. 2025, arXiv:2501.19183): K-FAC's factors of the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable

from factor_contenders import Factors, linear_maps
from fisher_contenders import Problem
from torch import Tensor, nn


class Flat(nn.Module):
    """Whose logits have the classes where cross entropy has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).movedim(-1, 1)


def factors(problem: Problem) -> Callable[[], Factors]:
    """Return the factors of all linear maps, the loss being a sum over samples and tokens."""
    from curvlinops import KFACLinearOperator

    model, modules = Flat(problem.model), linear_maps(problem.model)
    params = [module.weight for module in modules.values()]
    terms = problem.targets[0].numel()

    def work() -> Factors:
        operator = KFACLinearOperator(
            model, nn.CrossEntropyLoss(reduction="sum"), params,
            [(problem.inputs, problem.targets)], check_deterministic=False,
            fisher_type="empirical", num_per_example_loss_terms=terms,
            num_data=len(problem.inputs),
        )  # fmt: skip
        operator.compute_kronecker_factors()
        inputs, gradients = operator._input_covariances, operator._gradient_covariances
        return {name: (inputs[f"model.{name}"], gradients[f"model.{name}"]) for name in modules}

    return work
