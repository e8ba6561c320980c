"""What the tests of the Fisher observe, and what they are compared with.

That is a float64 loop over single samples: plain autograd on a float64 copy of the model, which
shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_optim.fisher import FisherEstimator
from cl_optim.importance import Importance

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CLASSES = 5


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 9), nn.LayerNorm(9), nn.Dropout(dropout), nn.ReLU(inplace=True),
        nn.Linear(9, CLASSES),
    )  # fmt: skip


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the network above, and their classes."""
    return [(torch.randn(size, 7), torch.randint(0, CLASSES, (size,))) for _ in range(count)]


def attached(model: nn.Module, **arguments: object) -> tuple[FisherEstimator, torch.optim.SGD]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer, **arguments)
    return fisher, optimizer


class Uses(nn.Module):
    """A linear layer, so that inputs require gradients, and some use of other parameters."""

    def __init__(self, use, *parameters: nn.Parameter, **modules: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.p = nn.ParameterList(parameters)
        for name, module in modules.items():
            self.add_module(name, module)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x))


def randn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """One loss per sample, of outputs of any shape."""
    return model(x).tanh().flatten(1).sum(1)


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


def assert_sums(importance: Importance, expected: Mapping[str, Tensor], tolerance: float) -> None:
    errors = relative_errors(importance.sums, expected)
    assert max(errors.values()) <= tolerance, errors


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of the sum over tokens."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum") / len(logits)


def decayed(parts: Iterable[Mapping[str, Tensor]], decay: float = 1.0) -> dict[str, Tensor]:
    """Σ_k decay^(K−k+1) part_k: each step decays what it and the earlier ones have summed."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {name: decay * (total.get(name, 0.0) + value) for name, value in part.items()}
    return total


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


def relative_errors(sums: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each tensor's norm, floored at 1e-6 of the largest one."""
    assert set(sums) == set(expected)
    norms = {name: value.norm() for name, value in expected.items()}
    floor = 1e-6 * max(norms.values())
    assert floor > 0
    return {
        name: float((value.double() - expected[name]).norm() / max(norms[name], floor))
        for name, value in sums.items()
    }


def largest_error(sums: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(relative_errors(sums, expected).values())


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
