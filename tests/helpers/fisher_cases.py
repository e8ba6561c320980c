"""What the tests of the Fisher are compared with: a float64 loop over single samples.

It is plain autograd on a float64 copy of the model and shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_optim.importance import Importance

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def oracle(model: nn.Module, inputs: Tensor, weighted_labels) -> dict[str, Tensor]:
    """Σ_n Σ_k w_nk (∂/∂θ Σ_t −log p(y_nkt))²; weighted_labels(n, logits) yields (w, y)."""
    model = copy.deepcopy(model).double().eval()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(inputs)):
        x = inputs[n : n + 1]
        logits = model(x.double() if x.is_floating_point() else x)[0]
        for weight, y in weighted_labels(n, logits.detach()):
            loss = F.cross_entropy(logits, y, reduction="sum", ignore_index=-100)
            grads = torch.autograd.grad(
                loss, list(named.values()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(named, grads, strict=True):
                if g is not None:
                    sums[name] += weight * g**2
    return sums


def data_labels(targets: Tensor):
    return lambda n, logits: [(1.0, targets[n])]


def all_labels(n: int, logits: Tensor):
    return [(p, torch.tensor(c)) for c, p in enumerate(logits.softmax(-1))]


def predicted_labels(n: int, logits: Tensor):
    return [(1.0, logits.argmax(-1))]


def assert_sums(importance: Importance, expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative error of each tensor's norm, floored at 1e-6 of the largest one."""
    assert set(importance.sums) == set(expected)
    norms = {name: value.norm() for name, value in expected.items()}
    floor = 1e-6 * max(norms.values())
    assert floor > 0
    for name, value in importance.sums.items():
        error = (value.double() - expected[name]).norm() / max(norms[name], floor)
        assert error <= tolerance, (name, float(error))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of the sum over tokens."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum") / len(logits)


def loop(
    model: nn.Module, losses: Callable[[nn.Module, int], Tensor], samples: int, double: bool = True
) -> dict[str, Tensor]:
    """Σ_n (∂ℓ_n/∂θ)² in float64, where ``losses(model, n)`` is the loss of sample n alone.

    With ``double=False`` the gradients are those of the model as it is, in its own precision.
    """
    if double:
        model = copy.deepcopy(model).double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for n in range(samples):
        grads = torch.autograd.grad(losses(model, n), list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            if g is not None:
                sums[name] += g.double() ** 2
    return sums


def largest_error(sums: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative error of a tensor's norm, floored at 1e-6 of the largest one."""
    assert set(sums) == set(expected)
    norms = {name: value.norm() for name, value in expected.items()}
    floor = 1e-6 * max(norms.values())
    assert floor > 0
    errors = {
        name: float((value.double() - expected[name]).norm() / max(norms[name], floor))
        for name, value in sums.items()
    }
    return max(errors.values())


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        assert not any(name in str(func) for name in waits), func
        return func(*args, **(kwargs or {}))


class Opaque(torch.autograd.Function):
    """x · w, whose parameter w no function of torch is seen to use."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).flatten(0, -2).sum(0)
