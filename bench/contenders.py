"""One optimizer step in several ways: ours, torch's, and torch's with a penalty of its own.

Every contender does all that its method needs per step, gradients being there already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cl_optim import EWC, EWCAdamW

LAMBDA = 0.5


def gpt2_shapes(embeddings: bool = False) -> list[tuple[int, ...]]:
    """GPT-2's 12 layers: 144 tensors, 85 M parameters; 149 and 163 M with an untied head."""
    d = 768
    layer: list[tuple[int, ...]] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    layer += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    around: list[tuple[int, ...]] = [(50304, d), (1024, d), (d,), (d,), (50304, d)]
    return layer * 12 + (around if embeddings else [])


class Problem:
    """Parameters and gradients on a device."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.params = [
            torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype) * 0.02) for s in shapes
        ]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.grads = [p.grad for p in self.params]

    @cached_property
    def protection(self) -> tuple[list[Tensor], list[Tensor]]:
        """Importances and anchors, such that a penalty is as large as the gradients."""
        importances = [torch.rand_like(p, requires_grad=False) for p in self.params]
        return importances, [p.detach() + torch.randn_like(p.detach()) * 1e-3 for p in self.params]

    @cached_property
    def adamw(self) -> torch.optim.Optimizer:
        """One for all who share the problem: its moments take as much memory as two models."""
        return torch.optim.AdamW(self.params, fused=True)

    def consolidate(self, optimizer: EWC | EWCAdamW) -> None:
        """Protect the anchors by the importances, and be where the weights are."""
        weights = [p.detach().clone() for p in self.params]
        importances, anchors = self.protection
        with torch.no_grad():
            self._move_to(anchors)
            with warnings.catch_warnings():  # about rounded anchors
                warnings.simplefilter("ignore")
                optimizer.consolidate({str(i): f for i, f in enumerate(importances)})
            self._move_to(weights)

    def _move_to(self, values: list[Tensor]) -> None:
        for param, value in zip(self.params, values, strict=True):  # DTensors know no foreach
            param.copy_(value)


def adamw(problem: Problem) -> Callable[[], None]:
    """No protection at all."""
    return problem.adamw.step


def ewc(**options: Any) -> Callable[[Problem], Callable[[], None]]:
    def make(problem: Problem) -> Callable[[], None]:
        named = [(str(i), p) for i, p in enumerate(problem.params)]
        optimizer = EWCAdamW(named, ewc_lambda=LAMBDA, **{"fused": True, **options})
        problem.consolidate(optimizer)
        return optimizer.step

    return make


def around_adamw(**options: Any) -> Callable[[Problem], Callable[[], None]]:
    """The pull beside torch's own step."""

    def make(problem: Problem) -> Callable[[], None]:
        named = [(str(i), p) for i, p in enumerate(problem.params)]
        optimizer = EWC(torch.optim.AdamW(named, fused=True), ewc_lambda=LAMBDA, **options)
        problem.consolidate(optimizer)
        return optimizer.step

    return make


def autograd_penalty(problem: Problem) -> Callable[[], None]:
    """The term added to the loss, as the libraries do it."""
    optimizer = problem.adamw
    importances, anchors = problem.protection

    def step() -> None:
        terms = [
            (f * (p - a).square()).sum()
            for p, f, a in zip(problem.params, importances, anchors, strict=True)
        ]
        (LAMBDA * torch.stack(terms).sum()).backward()
        optimizer.step()

    return step


def foreach_penalty(problem: Problem) -> Callable[[], None]:
    """The penalty's gradient by hand: two passes over the tensors and one temporary."""
    return foreach_step(problem, problem.adamw)


def compilable_foreach(problem: Problem) -> Callable[[], None]:
    """The same with torch's AdamW, for torch.compile to make one program of."""
    lr = torch.tensor(1e-3, device=problem.params[0].device)  # a number would compile anew
    # torch takes `capturable` on accelerators only.
    on_gpu = lr.is_cuda
    optimizer = torch.optim.AdamW(problem.params, lr=lr, foreach=on_gpu, capturable=on_gpu)
    return foreach_step(problem, optimizer)


def foreach_step(problem: Problem, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a step of any optimizer after the penalty's gradient was added by hand."""
    importances, anchors = problem.protection

    @torch.no_grad()
    def step() -> None:
        drift = torch._foreach_sub(problem.params, anchors)
        torch._foreach_addcmul_(problem.grads, drift, importances, value=2 * LAMBDA)
        optimizer.step()

    return step


def memory_floor(problem: Problem) -> Callable[[], None]:
    """36 bytes per parameter read or written in one simple pass, in place as in a step."""
    numel = sum(p.numel() for p in problem.params)
    values = torch.zeros(numel * 9 // 2, device=problem.params[0].device)
    return lambda: values.neg_()


def memory_copy(problem: Problem) -> Callable[[], None]:
    """As many bytes from one place to another; a processor reads what it is about to overwrite."""
    numel = sum(p.numel() for p in problem.params)
    source, target = (torch.zeros(numel * 9 // 8, device=problem.params[0].device) for _ in "rw")

    def step() -> None:
        for _ in range(4):  # a quarter at a time: all contenders are in memory together
            target.copy_(source)

    return step


# Options of EWCAdamW, for float32 parameters.
PROTECTED: dict[str, dict[str, Any]] = {
    "EWCAdamW gradient": {"penalty": "gradient"},
    "EWCAdamW decoupled": {"penalty": "decoupled"},
    "EWCAdamW proximal": {"penalty": "proximal"},
    "EWCAdamW tracked": {"track_penalty": True},
    "EWCAdamW log8": {"importance_dtype": "log8"},
    "EWCAdamW log8, bf16 anchors": {"importance_dtype": "log8", "anchor_dtype": "bfloat16"},
    "EWCAdamW log8, 8-bit moments": {"importance_dtype": "log8", "state_dtype": "8bit"},
}

# For bfloat16 parameters, whose moments are bfloat16 in torch's AdamW.
BFLOAT16_PROTECTED: dict[str, dict[str, Any]] = {
    "EWCAdamW bf16 moments": {"state_dtype": "bfloat16", "importance_dtype": "log8"},
    "EWCAdamW 8-bit moments": {"state_dtype": "8bit", "importance_dtype": "log8"},
    "EWCAdamW bf16 moments, Kahan": {
        "state_dtype": "bfloat16",
        "importance_dtype": "log8",
        "rounding": "kahan",
    },
}

CONTENDERS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    "AdamW fused": adamw,
    **{name: ewc(**options) for name, options in PROTECTED.items()},
    "EWC(AdamW fused) proximal": around_adamw(),
    "AdamW fused + autograd penalty": autograd_penalty,
    "AdamW fused + foreach penalty": foreach_penalty,
    "36 B per parameter in place": memory_floor,
    "36 B per parameter copied": memory_copy,
}

BFLOAT16_CONTENDERS: dict[str, Callable[[Problem], Callable[[], None]]] = {
    "AdamW fused": adamw,
    **{name: ewc(**options) for name, options in BFLOAT16_PROTECTED.items()},
}
