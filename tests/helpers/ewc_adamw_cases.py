"""The test matrix of the EWC-AdamW step: settings, sets of tensors and a runner for two sides."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim import EWCAdamW

# No hyperparameter at its default.
OFF_DEFAULT: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.85, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.05,
    "ewc_lambda": 0.7,
}
PENALTIES = ("gradient", "decoupled", "proximal")


@dataclass(frozen=True)
class Setting:
    """One configuration of the optimizer."""

    penalty: str
    amsgrad: bool = False
    maximize: bool = False
    options: dict[str, Any] = field(default_factory=lambda: OFF_DEFAULT)

    def __str__(self) -> str:
        flags = [name for name in ("amsgrad", "maximize") if getattr(self, name)]
        return "-".join([self.penalty, *flags])

    def arguments(self) -> dict[str, Any]:
        return {
            **self.options,
            "penalty": self.penalty,
            "amsgrad": self.amsgrad,
            "maximize": self.maximize,
        }


SETTINGS = [
    Setting(penalty, amsgrad, maximize)
    for penalty in PENALTIES
    for amsgrad, maximize in ((False, False), (True, False), (False, True), (True, True))
]


def make_params(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, *, transposed: bool = False
) -> list[Tensor]:
    """Parameters of the given shapes; transposed ones are dense in another order of dimensions."""
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape in shapes:
        if transposed and len(shape) == 2:
            value = torch.randn(shape[::-1], generator=generator).to(dtype).t()
            assert value.numel() < 2 or not value.is_contiguous()
        else:
            value = torch.randn(shape, generator=generator).to(dtype)
        params.append(torch.nn.Parameter(value))
    return params


@dataclass
class Problem:
    """Weights, importance, anchors and a gradient for each step, the same for all dtypes."""

    params: list[Tensor]
    importances: list[Tensor]
    anchors: list[Tensor]

    @classmethod
    def of(cls, params: list[Tensor]) -> Problem:
        generator = torch.Generator().manual_seed(2)
        importances, anchors = [], []
        for p in params:
            # Spread over decades, as a Fisher is, with exact zeros.
            f = 10 ** (3 * torch.randn(p.shape, generator=generator) - 2).clamp(-6, 2)
            f[torch.rand(p.shape, generator=generator) < 0.1] = 0.0
            importances.append(f)
            anchors.append((p.detach() + torch.randn(p.shape, generator=generator)).to(p.dtype))
        return cls(params, importances, anchors)

    def copy(self, dtype: torch.dtype, device: str = "cpu") -> Problem:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Problem(
            [torch.nn.Parameter(p.detach().clone().to(device, dtype)) for p in self.params],
            [f.clone().to(device, wide) for f in self.importances],
            [a.clone().to(device, dtype) for a in self.anchors],
        )

    def set_gradients(self, step: int, dtype: torch.dtype) -> None:
        """Gradients that depend on the step only; `dtype` is what all sides can represent."""
        generator = torch.Generator().manual_seed(100 + step)
        for p in self.params:
            scale = 10 ** (torch.rand((), generator=generator) * 4 - 3)
            grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
            p.grad = torch.empty_like(p).copy_(grad)


def protect(optimizer: EWCAdamW, problem: Problem) -> None:
    """Consolidate at the anchors, then put the weights back."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    values = [p.detach().clone() for p in problem.params]
    with torch.no_grad():
        for p, anchor in zip(problem.params, problem.anchors, strict=True):
            p.copy_(anchor)
    optimizer.consolidate(dict(zip(names, problem.importances, strict=True)))
    with torch.no_grad():
        for p, value in zip(problem.params, values, strict=True):
            p.copy_(value)


def make_optimizer(problem: Problem, setting: Setting, **implementation: bool) -> EWCAdamW:
    named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
    optimizer = EWCAdamW(named, **setting.arguments(), **implementation)
    protect(optimizer, problem)
    return optimizer


def reload(optimizer: EWCAdamW, make: Callable[[], EWCAdamW]) -> EWCAdamW:
    """The optimizer's state in a fresh optimizer, by way of a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """The distance of two 16-bit float tensors in units of the last place."""

    def ordered(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(a) - ordered(b)).abs()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def importance_like(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
