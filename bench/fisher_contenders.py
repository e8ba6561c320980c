"""The empirical Fisher of one batch in several ways; each returns Σ_n g_n² by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_optim import FisherEstimator, estimate_fisher

Sums = Mapping[str, Tensor]
Contender = Callable[["Problem"], Callable[[], Sums | None]]


@dataclass
class Problem:
    """A model with a batch of data."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def losses(self, model: nn.Module | Callable[..., Tensor]) -> Tensor:
        """One loss per sample: the sum over its tokens."""
        logits = model(self.inputs)
        losses = F.cross_entropy(logits.flatten(0, -2), self.targets.flatten(), reduction="none")
        return losses.view(len(logits), -1).sum(1)


class Attention(nn.Module):
    """Causal attention out of plain Linears, which every contender supports."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """GPT-2's shape, with a head of its own."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


def mlp() -> Problem:
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return Problem(model, torch.randn(256, 64), torch.randint(0, 10, (256,)))


def small_cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return Problem(model, torch.randn(500, 1, 8, 8), torch.randint(0, 10, (500,)))


def cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return Problem(model, torch.randn(128, 3, 16, 16), torch.randint(0, 10, (128,)))


def transformer(width: int, length: int) -> Problem:
    model = Transformer(layers=4, width=width, heads=4, vocabulary=1000, length=64)
    tokens = torch.randint(0, 1000, (16, length + 1))
    return Problem(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "MLP 64-256-256-10, 256 samples": mlp,
    "CNN 2 k, 500 samples of 1x8x8": small_cnn,
    "CNN 57 k, 128 samples of 3x16x16": cnn,
    "Transformer 1.1 M, 16 sequences of 64": partial(transformer, 128, 64),
    "Transformer 3.7 M, 16 sequences of 32": partial(transformer, 256, 32),
}


def plain(problem: Problem) -> Callable[[], None]:
    """Forward and backward alone: the floor."""

    def step() -> None:
        problem.model.zero_grad()
        problem.losses(problem.model).mean().backward()

    return step


def ours(problem: Problem) -> Callable[[], Sums]:
    """A pass of its own, with all that estimate_fisher does around it but the self-check."""
    batch = [(problem.inputs, problem.targets)]

    def step() -> Sums:
        return estimate_fisher(
            problem.model, batch, "empirical", None, verify=False, progress=False
        ).sums

    return step


def piggyback(problem: Problem) -> Callable[[], None]:
    """The Fisher and the gradients of ordinary training together."""
    fisher = FisherEstimator(problem.model, verify=False)

    def step() -> None:
        problem.model.zero_grad()
        with fisher.observe(len(problem.inputs)):
            problem.losses(problem.model).mean().backward()

    return step


def loop(problem: Problem) -> Callable[[], Sums]:
    """Batches of one, as every published EWC does that is exact."""
    sums = {name: torch.zeros_like(p) for name, p in problem.model.named_parameters()}

    def step() -> Sums:
        for total in sums.values():
            total.zero_()
        for n in range(len(problem.inputs)):
            problem.model.zero_grad()
            one = Problem(problem.model, problem.inputs[n : n + 1], problem.targets[n : n + 1])
            one.losses(problem.model).sum().backward()
            for name, p in problem.model.named_parameters():
                sums[name].addcmul_(p.grad, p.grad)
        return sums

    return step


def vmap(problem: Problem) -> Callable[[], Sums]:
    """torch.func: all per-sample gradients at once, then their squares."""
    named = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        call = torch.func.functional_call
        one = Problem(problem.model, x.unsqueeze(0), y.unsqueeze(0))
        return one.losses(lambda inputs: call(problem.model, parameters, (inputs,))).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> Sums:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no batching rule
            found = grads(named, problem.inputs, problem.targets)
        return {name: g.square_().sum(0) for name, g in found.items()}

    return step


CONTENDERS: dict[str, Contender] = {
    "forward + backward": plain,
    "cl_optim, a pass of its own": ours,
    "cl_optim, during training": piggyback,
    "loop of batch size 1": loop,
    "torch.func.vmap(grad)": vmap,
}
