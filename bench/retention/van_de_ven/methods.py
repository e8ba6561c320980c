"""Van de Ven's EWC as he defines it, ours, and what costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.retention.van_de_ven.scenarios import NAMES, Name, Network, Setting
from cl_optim import EWCAdamW, estimate_fisher
from cl_optim.optim.settling import settle

_FISHER_BATCH = 128  # of ours: its sums do not depend on it


class Learner:
    """A network in training by Adam, with nothing against forgetting; methods build on it.

    Args:
        model: What is trained.
        setting: What all methods have in common.
        value: What is chosen for the method: λ, a strength, a learning rate, a part of the way.
    """

    def __init__(self, model: Network, setting: Setting, value: float) -> None:
        self.model = model
        self.setting = setting
        self.value = value
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.setting.lr, fused=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.model(x), y)

    def end(self, context: int, x: Tensor) -> None:
        """Do what is to be done when a context of these inputs has been learned."""

    def is_last(self, context: int) -> bool:
        """Say whether no context follows, which importance would be needed for."""
        return context + 1 == self.setting.contexts

    def kept(self) -> Any:
        """Return tensors that are kept beside the optimizer's state, in any containers."""
        return ()


class SmallRate(Learner):
    """Adam with a smaller learning rate."""

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.value, fused=True)


class Interpolation(Learner):
    """Adam; after each context the weights go a part of the way back to those before it.

    A head of its own, which that context is the first to train, stays as it is.
    """

    def __init__(self, model: Network, setting: Setting, value: float) -> None:
        super().__init__(model, setting, value)
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def end(self, context: int, x: Tensor) -> None:
        """Go back."""
        own_head = f"heads.{context}." if len(self.model.heads) > 1 else "none"
        for name, param in self.model.named_parameters():
            if name in self._before and not name.startswith(own_head):
                param.lerp_(self._before[name], self.value)
            self._before[name] = param.clone()

    def kept(self) -> Any:
        """Return the weights before the context."""
        return self._before


class TheirEWC(Learner):
    """EWC as van de Ven et al. define it: ½ λ Σ_k Σ_i F_ki (θ_i − θ*_ki)², k over the contexts."""

    def __init__(self, model: Network, setting: Setting, value: float) -> None:
        super().__init__(model, setting, value)
        self.terms: list[tuple[list[Tensor], list[Tensor]]] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch, and the penalty."""
        own = super().loss(x, y)
        return own + self.value * self.penalty() if self.terms else own

    def penalty(self) -> Tensor:
        """Return the sum of one quadratic for each earlier context, without λ."""
        params = [*self.model.parameters()]
        each = [
            (weights * (param - anchor) ** 2).sum()
            for fisher, anchors in self.terms
            for weights, param, anchor in zip(fisher, params, anchors, strict=True)
        ]
        return 0.5 * torch.stack(each).sum()

    def end(self, context: int, x: Tensor) -> None:
        """Keep the Fisher information and the weights of this context."""
        if self.is_last(context):
            return
        fisher = fisher_by_definition(self.model, x[: self.setting.fisher_samples])
        self.terms.append((fisher, [param.detach().clone() for param in self.model.parameters()]))

    def kept(self) -> Any:
        """Return all terms."""
        return self.terms


def fisher_by_definition(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the Fisher information's diagonal, one sample and one class after another.

    F_i = 1/N Σ_n Σ_c p(c | x_n) (∂ log p(c | x_n) / ∂θ_i)², c over the model's outputs.
    """
    params = [*model.parameters()]
    sums = [torch.zeros_like(param) for param in params]
    for sample in torch.split(x, 1):
        log_p = F.log_softmax(model(sample)[0], dim=0)
        for of_class, p in zip(log_p, log_p.detach().exp(), strict=True):
            gradients = torch.autograd.grad(of_class, params, retain_graph=True, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:  # of other contexts' heads
                    total.addcmul_(gradient, gradient, value=p.item())
    return [total / len(x) for total in sums]


class DiagonalEWC(Learner):
    """EWCAdamW with the diagonal, whose penalty's gradient is Adam's, as in a loss."""

    structure: Literal["diagonal", "kronecker"] = "diagonal"
    penalty: Literal["gradient", "proximal"] = "gradient"
    optimizer: EWCAdamW

    def _optimizer(self) -> EWCAdamW:
        return EWCAdamW(
            self.model.named_parameters(), lr=self.setting.lr, weight_decay=0.0,
            strength=self.value, penalty=self.penalty,
        )  # fmt: skip

    def end(self, context: int, x: Tensor) -> None:
        """Estimate the Fisher information and consolidate."""
        settle(self.optimizer)
        if self.is_last(context):
            return
        x = x[: self.setting.fisher_samples]
        fisher = estimate_fisher(
            self.model, torch.split(x, _FISHER_BATCH), labels="exact", max_samples=len(x),
            structure=self.structure, progress=False,
        )  # fmt: skip
        self.optimizer.consolidate(fisher)


class KroneckerEWC(DiagonalEWC):
    """EWCAdamW with Kronecker importance."""

    structure = "kronecker"
    penalty = "proximal"


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        key: Of its files.
        label: Of its rows.
        learner: How it trains.
        chosen: What is chosen for it.
        candidates: By scenario; none where nothing is chosen.
        joint: All contexts at once, as many iterations: the upper bound.
    """

    key: str
    label: str
    learner: type[Learner]
    chosen: str = ""
    candidates: Mapping[Name, tuple[float, ...]] | None = None
    joint: bool = False

    def values(self, name: Name) -> tuple[float, ...]:
        """Return the candidates of a scenario."""
        return (0.0,) if self.candidates is None else self.candidates[name]


def _alike(*values: float) -> dict[Name, tuple[float, ...]]:
    """Return the same candidates for all scenarios."""
    return dict.fromkeys(NAMES, values)


def _wide(task: int, domain: int, class_: int, permuted_: int) -> dict[Name, tuple[float, ...]]:
    """Return powers of a hundred from these powers of ten on; of ten for the permuted."""
    lowest: dict[Name, int] = {
        "task": task, "domain": domain, "class": class_, "permuted": permuted_
    }  # fmt: skip

    def powers(name: Name, low: int) -> tuple[float, ...]:
        step = 1 if name == "permuted" else 2
        return tuple(float(f"1e{low + step * i}") for i in range(4))

    return {name: powers(name, low) for name, low in lowest.items()}


NONE = Method("none", "Fine-tuning", Learner)
JOINT = Method("joint", "Joint training", Learner, joint=True)
SMALL_RATE = Method(
    "small-rate", "A smaller rate", SmallRate, "lr", _alike(1e-4, 3e-5, 1e-5, 3e-6)
)  # fmt: skip
INTERPOLATION = Method(
    "interpolation", "Part of the way back", Interpolation, "part",
    _alike(0.3, 0.6, 0.8, 0.9) | {"permuted": (0.1, 0.3, 0.6, 0.8)},
)  # fmt: skip
# λ as published for MNIST is among them: 1e5, 1e10, 1e9 and 100.
THEIRS = Method("their-ewc", "van de Ven's EWC", TheirEWC, "λ", _wide(3, 4, 5, 0))
DIAGONAL = Method(
    "ewc-diagonal", "cl_optim: EWC, diagonal", DiagonalEWC, "strength", _wide(-4, -2, -4, -7)
)
KRONECKER = Method(
    "ewc-kronecker", "cl_optim: EWC, Kronecker", KroneckerEWC, "strength",
    _alike(1e-2, 1e-1, 1.0, 10.0) | {
        "task": (1e-3, 1e-2, 1e-1, 1.0), "permuted": (1e-4, 1e-3, 1e-2, 1e-1),
    },
)  # fmt: skip
METHODS = (NONE, SMALL_RATE, INTERPOLATION, THEIRS, DIAGONAL, KRONECKER, JOINT)
OURS = (DIAGONAL, KRONECKER)
