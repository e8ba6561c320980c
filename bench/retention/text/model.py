"""A small transformer over bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BYTES = 256


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        width: Of the transformer.
        layers: Of the transformer.
        heads: Of each layer.
        context: Bytes in a window.
        batch: Windows in a step.
        old_steps: Steps of learning the old text.
        new_steps: Steps of learning the new text.
        kept: Windows of the old text that replay and GEM may keep.
        held_out: Windows of each text that are measured on.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 96
    batch: int = 16
    old_steps: int = 1200
    new_steps: int = 400
    kept: int = 512
    held_out: int = 150


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mix and transform [N, T, width]."""
        n, t, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        mixed_up: Tensor = x + self.mlp(self.norm_2(x))
        return mixed_up


class ByteTransformer(nn.Module):
    """Predicts the next byte."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_BYTES, sizes.width)
        self.places = nn.Parameter(torch.zeros(sizes.context, sizes.width))
        self.blocks = nn.Sequential(*(Block(sizes.width, sizes.heads) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, _BYTES)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the byte after each, [N, T, 256]."""
        hidden = self.bytes(x) + self.places[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return mean nats per byte of windows [N, T + 1]."""
    return cross_entropy(model(windows[:, :-1]), windows)


def cross_entropy(logits: Tensor, windows: Tensor) -> Tensor:
    """Return mean nats per byte of windows [N, T + 1], given the logits of all but the last."""
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Return mean bits per byte of held-out windows."""
    parts = [loss(model, part).item() * len(part) for part in torch.split(windows, 64)]
    return sum(parts) / len(windows) / math.log(2)
