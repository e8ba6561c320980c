"""EWCAdamW under Kronecker importance, and the same training with the whole Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from kronecker_cases import by_block, dense, gram
from torch import Tensor, nn

from cl_optim import EWCAdamW
from cl_optim.importance.kronecker.factors import Factors, Layout, Term, from_sums
from cl_optim.importance.kronecker.importance import KroneckerImportance

OPTIONS: dict[str, Any] = {
    "lr": 3e-2,
    "betas": (0.85, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.05,
    "ewc_lambda": 0.7,
    "penalty": "proximal",
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear maps, the second without a bias, and a norm, whose importance is diagonal."""
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3, False)
    )
    return layers.to(dtype)


def factors_of(
    layout: Layout, seed: int, energy: float = 1.0, block: int = 2048, kinds: str = "bb"
) -> Factors:
    """Factors of random rows; ``kinds`` of outputs and inputs: by block, or the diagonal."""
    sums = [gram(40, size, seed + at) for at, size in enumerate((layout.outputs, layout.inputs))]
    outputs, inputs = (
        by_block(one, block) if kind == "b" else one.diagonal().clone()
        for one, kind in zip(sums, kinds, strict=True)
    )
    return from_sums(layout, [Term(inputs, outputs, 40)], 10, block, energy, "w")


def importance_of(
    model: nn.Module, seed: int = 0, energy: float = 1.0, block: int = 2048, scale: float = 1.0
) -> KroneckerImportance:
    """Kronecker importance of a model's linear maps; the diagonal of what else it has."""
    factors, sums = {}, {}
    generator = torch.Generator().manual_seed(seed)
    names = dict(model.named_parameters())
    for number, (name, param) in enumerate(names.items()):
        if param.dim() == 2:
            bias = name.replace("weight", "bias")
            layout = Layout(tuple(param.shape), bias=bias if bias in names else None)
            one = factors_of(layout, 100 * seed + 10 * number, energy, block)
            factors[name] = one.scaled(scale)
    in_matrices = {*factors, *(one.layout.bias for one in factors.values())}
    for name, param in names.items():
        if name not in in_matrices:
            sums[name] = torch.rand(param.shape, generator=generator) * 10 * scale
    return KroneckerImportance(factors, sums, 10)


# --- the whole matrix -----------------------------------------------------------------------------


class Dense:
    """torch's AdamW, and a proximal step of the whole Fisher matrix every so many steps.

    Args:
        model: What is trained; its weights now are the anchor.
        importance: Its importance.
        frozen: Masks, by name, of weights that do not move.
        **options: EWCAdamW's; the damping is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: KroneckerImportance,
        frozen: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        options = {**OPTIONS, **options}
        self.every, self.ewc_lambda = options.get("every", 10), options["ewc_lambda"]
        adamw = {key: options[key] for key in ("lr", "betas", "eps", "weight_decay")}
        self.optimizer = torch.optim.AdamW(model.parameters(), **adamw)
        self.params = dict(model.named_parameters())
        self.anchors = {name: p.detach().clone() for name, p in self.params.items()}
        self.factors, self.diagonal = importance.factors, importance
        self.frozen = dict(frozen or {})
        self.due: dict[str, float] = {}
        self.moved: dict[str, set[str]] = {}
        self.steps = 0

    def members(self, name: str) -> list[str]:
        bias = self.factors[name].layout.bias
        return [name] if bias is None else [name, bias]

    @torch.no_grad()
    def step(self, overflow: bool = False) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        before = {name: p.detach().clone() for name, p in self.params.items()}
        if not overflow:
            self.optimizer.step()
        for name, mask in self.frozen.items():
            self.params[name].copy_(torch.where(mask, before[name], self.params[name]))
        in_matrices = {member for name in self.factors for member in self.members(name)}
        for name, param in self.params.items():
            if name not in in_matrices and param.grad is not None and not overflow:
                c = 2 * lr * self.ewc_lambda * self.diagonal[name].double()
                anchor = self.anchors[name]
                param.copy_((anchor + (param - anchor) / (1 + c)).to(param.dtype))
        for name in self.factors:
            with_grad = {n for n in self.members(name) if self.params[n].grad is not None}
            if with_grad and not overflow:
                self.due[name] = self.due.get(name, 0.0) + lr * self.ewc_lambda
            self.moved.setdefault(name, set()).update(with_grad)
        self.steps += 1
        if self.steps % self.every == 0:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        for name, due in self.due.items():
            shrunk = self._proximal(name, due)
            for member, value in shrunk.items():
                param, frozen = self.params[member], self.frozen.get(member)
                if member in self.moved[name]:
                    value = value.to(param.dtype)
                    param.copy_(value if frozen is None else torch.where(frozen, param, value))
        self.due, self.moved = {}, {}

    def drift(self, name: str) -> Tensor:
        """Δ of a matrix, [out, in] float64; frozen weights have none."""
        parts = []
        for member in self.members(name):
            part = self.params[member].detach().double() - self.anchors[member].double()
            parts.append(part.masked_fill(self.frozen.get(member, torch.tensor(False)), 0.0))
        return self.factors[name].layout.matrix(*parts, *[None] * (2 - len(parts)))

    def _proximal(self, name: str, due: float) -> dict[str, Tensor]:
        delta = self.drift(name)
        fisher = dense(self.factors[name])
        eye = torch.eye(len(fisher), dtype=torch.float64)
        moved = torch.linalg.solve(eye + 2 * due * fisher, delta.flatten()) - delta.flatten()
        parts = self.factors[name].layout.parameters(moved.view_as(delta))
        return {
            member: self.params[member].detach().double() + part
            for member, part in zip(self.members(name), parts, strict=False)
        }

    def penalty(self) -> float:
        """λ Δᵀ F Δ, the diagonal of what is in no matrix included."""
        total = 0.0
        for name, factors in self.factors.items():
            delta = self.drift(name).flatten()
            total += float(delta @ dense(factors) @ delta)
        for name in self.params.keys() - {m for n in self.factors for m in self.members(n)}:
            square = (self.params[name].detach().double() - self.anchors[name].double()).square()
            total += float((self.diagonal[name].double() * square).sum())
        return self.ewc_lambda * total


# --- training -------------------------------------------------------------------------------------


def protected(
    model: nn.Module, importance: Mapping[str, Tensor] | None = None, **options: Any
) -> EWCAdamW:
    optimizer = EWCAdamW(model.named_parameters(), **{**OPTIONS, **options})
    optimizer.consolidate(importance_of(model) if importance is None else importance)
    return optimizer


def backward(model: nn.Module, seed: int, skipped: Sequence[str] = ()) -> None:
    """Give the model gradients that depend on the seed; parameters that are skipped have none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().mean().backward()
    for name, param in model.named_parameters():
        if name in skipped:
            param.grad = None


def train(
    model: nn.Module, step: Callable[[], object], seeds: Sequence[int], skipped: Sequence[str] = ()
) -> None:
    for seed in seeds:
        backward(model, seed, skipped)
        step()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def bits(model: nn.Module) -> list[list[int]]:
    """The weights' bits."""
    return [p.detach().flatten().view(torch.uint8).tolist() for p in model.parameters()]
