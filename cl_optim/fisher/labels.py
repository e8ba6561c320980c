"""Which labels the Fisher information is taken with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Labels: TypeAlias = Literal["exact", "sample", "predicted", "empirical"]
LABELS: tuple[str, ...] = get_args(Labels)

# A target with this value is left out, as in torch.nn.functional.cross_entropy.
IGNORED = -100
# "exact" makes one backward pass per class.
MAX_EXACT_CLASSES = 100


def seeds(
    labels: Labels,
    log_p: Tensor,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield, for each backward pass, the gradient of its loss with respect to ``log_p``.

    The loss is −log p(y) summed over samples and tokens. For ``"exact"``, the loss of class c is
    weighted per sample by √p_c, so that the squares of its gradient are weighted by p_c.

    Args:
        labels: ``"exact"`` (log_p [N, C] only), ``"sample"``, ``"predicted"`` or ``"empirical"``.
        log_p: Log-probabilities [N, C] or [N, T, C].
        targets: int64 classes [N] or [N, T] for ``"empirical"``. For all others only those with
            value −100 are of interest: they have no loss.
        generator: Draws the labels of ``"sample"``; they are drawn on its device.
    """
    log_p = log_p.detach()
    if labels == "exact":
        for c in range(log_p.shape[-1]):
            seed = torch.zeros_like(log_p)
            seed[:, c] = -(0.5 * log_p[:, c]).exp()
            yield seed
        return
    counted = None if targets is None else targets != IGNORED
    if labels == "empirical":
        assert targets is not None
        chosen = targets.clamp_min(0)
    elif labels == "predicted":
        chosen = log_p.argmax(-1)
    else:
        p = log_p.exp().flatten(0, -2)
        if generator is not None:
            p = p.to(generator.device)
        drawn = torch.multinomial(p, 1, generator=generator)
        chosen = drawn.to(log_p.device).view(log_p.shape[:-1])
    seed = torch.zeros_like(log_p).scatter_(-1, chosen.unsqueeze(-1), -1.0)
    yield seed if counted is None else seed * counted.unsqueeze(-1)
