"""What is differentiated: with which labels, and the gradients of the losses they give."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

Labels: TypeAlias = Literal["auto", "exact", "sample", "predicted", "empirical"]
Kind: TypeAlias = Literal["fisher", "mas", "logits_reversal"]
Loss: TypeAlias = Literal["auto", "cross_entropy", "causal_lm"]
LABELS: tuple[str, ...] = get_args(Labels)

# A target with this value is left out, as in torch.nn.functional.cross_entropy.
IGNORED = -100
# "exact" makes one backward pass per class.
MAX_EXACT_CLASSES = 100
# Rows of logits whose labels are drawn at once: drawing takes two more copies of them.
_DRAWN_AT_ONCE = 512

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What is differentiated."""

    labels: Labels | None
    per_sample_loss: Callable[[nn.Module, Any], Tensor] | None = None
    loss: Loss = "auto"
    kind: Kind = "fisher"
    generator: torch.Generator | None = None
    by_probability: bool = False

    def decided(self, logits: Tensor) -> Objective:
        """Return the same, with the labels that ``"auto"`` means for these logits."""
        if self.labels != "auto":
            return self
        if has_exact(logits):
            return replace(self, labels="exact")
        many = "of sequences" if logits.dim() == 3 else f"of {logits.shape[-1]} classes"
        _log_once(
            f"labels='auto' is labels='sample' for logits {many}: labels are drawn from the model, "
            f"since labels='exact' is for [N, C] with at most {MAX_EXACT_CLASSES} classes."
        )
        return replace(self, labels="sample")

    def seeds(self, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """Yield the losses' gradients with respect to the logits, one for each backward pass."""
        if self.labels is None:
            yield _norm_seed(logits, targets)
        else:
            yield from _seeds(
                self.labels,
                logits,
                targets,
                self.generator,
                reverse=self.kind == "logits_reversal",
                by_probability=self.by_probability,
            )


@functools.cache
def _log_once(sentence: str) -> None:
    _LOGGER.warning(sentence)


def has_exact(logits: Tensor) -> bool:
    """Return whether the expectation over all labels of these logits is taken."""
    return logits.dim() == 2 and logits.shape[-1] <= MAX_EXACT_CLASSES


def _seeds(
    labels: Labels,
    logits: Tensor,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    reverse: bool = False,
    by_probability: bool = False,
) -> Iterator[Tensor]:
    """Yield, for each backward pass, the gradient of its loss with respect to the logits.

    The loss is −log p(y) summed over samples and tokens; its gradient is p − e_y. For ``"exact"``,
    that of class c is weighted per sample by √p_c, so that the squares of what follows from it are
    weighted by p_c.

    Args:
        labels: ``"exact"`` (logits [N, C] only), ``"sample"``, ``"predicted"`` or ``"empirical"``;
            which of them ``"auto"`` is, has been decided.
        logits: [N, C] or [N, T, C].
        targets: int64 classes [N] or [N, T] for ``"empirical"``. For all others only those with
            value −100 are of interest: they have no loss.
        generator: Draws the labels of ``"sample"``; they are drawn on its device.
        reverse: Take −logits as the logits.
        by_probability: Weight the squares by p(y).
    """
    logits = logits.detach()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = (-wide if reverse else wide).softmax(-1)
    if labels == "exact":
        for c in range(p.shape[-1]):
            weight = p[:, c : c + 1].sqrt()
            seed = p * weight
            seed[:, c : c + 1] -= weight
            yield seed.to(logits.dtype)
        return
    if labels == "empirical":
        assert targets is not None
        chosen = targets.clamp_min(0).unsqueeze(-1)
    elif labels == "predicted":
        chosen = logits.argmax(-1, keepdim=True)
    else:
        chosen = _draw(p, generator)
    root = p.gather(-1, chosen).sqrt() if by_probability else None
    seed = p.scatter_add_(-1, chosen, p.new_full((), -1.0).expand(chosen.shape))
    if root is not None:
        seed.mul_(root)
    if targets is not None:
        seed.mul_((targets != IGNORED).unsqueeze(-1))
    yield (seed.neg_() if reverse else seed).to(logits.dtype)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a class for each row of p [..., C]: [..., 1]."""
    rows = p.flatten(0, -2)
    drawn = [
        torch.multinomial(
            part if generator is None else part.to(generator.device), 1, generator=generator
        ).to(p.device)
        for part in torch.split(rows, _DRAWN_AT_ONCE)
    ]
    return torch.cat(drawn).view(*p.shape[:-1], 1)


def _norm_seed(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Return the gradient of Σ ‖logits‖² over samples and tokens without target −100."""
    seed = 2 * logits.detach()
    return seed if targets is None else seed * (targets != IGNORED).unsqueeze(-1)
