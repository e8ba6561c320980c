"""KL(old ‖ new) of outputs: whole logits, or the largest that were stored."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cl_optim.ops.formats import arithmetic_dtype
from cl_optim.retention.distillation.stored import TopK, as_top_k, check_vocabulary

Reduction = Literal["token", "sequence", "sum", "none"]


def distillation_loss(
    logits: Tensor,
    old: Tensor | TopK,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    r"""Return KL(old ‖ new) = Σ_v p(v) log(p(v)/q(v)) in nats, the mean over positions.

    Of stored outputs all classes that are not among the k count as one: that is a lower bound of
    the divergence, exact where k is the vocabulary.

    Args:
        logits: The model's, [n, ..., V].
        old: The old model's logits, of the same shape, or what :func:`top_k` made of them. No
            gradient goes into it.
        mask: Which positions count, [n, ...] as logits without V, of bool or numbers that are 0 or
            not: an attention mask. None: all.
        reduction: ``"token"``: the mean over positions; ``"sequence"``: the mean over samples of
            each one's mean; ``"sum"``; ``"none"``: [n, ...], 0 where nothing counts. Of nothing a
            mean is 0.
        temperature: T: of logits/T, times T² (Hinton); 1 for stored outputs.
        chunk: Positions whose probabilities are in memory at once; None: all. Gradients are the
            same; each chunk is computed a second time for them.

    Returns:
        0-dim and differentiable, float32, or float64 for such logits.

    Raises:
        ValueError: Shapes, vocabularies or an option do not fit.
        TypeError: ``old`` is something else.

    References:
        Hinton et al. 2015, arXiv:1503.02531; Li & Hoiem 2016, arXiv:1606.09282 (LwF); Buzzega et
        al. 2020, arXiv:2004.07211 (DER, with the squared difference of logits in place of KL).
    """
    stored = None if isinstance(old, Tensor) else as_top_k(old)
    if stored is None and not isinstance(old, Tensor):
        raise TypeError(
            f"old must be logits or what retention.top_k() makes, not {type(old).__name__}."
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, not {reduction!r}.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, not {temperature}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None, not {chunk}.")
    positions, classes = logits.shape[:-1], logits.shape[-1]
    if logits.dim() < 2:
        raise ValueError(f"logits must have the shape [n, ..., V], not {list(logits.shape)}.")
    parts: tuple[Tensor, ...]
    if stored is None:
        assert isinstance(old, Tensor)
        if old.shape != logits.shape:
            raise ValueError(
                f"old has shape {list(old.shape)} and logits {list(logits.shape)}: both must be of "
                "the same inputs and the same vocabulary."
            )
        parts = (old.detach().flatten(0, -2),)
    else:
        if temperature != 1.0:
            raise ValueError("temperature must be 1 for stored outputs, which are probabilities.")
        if stored.indices.shape[:-1] != positions:
            raise ValueError(
                f"stored outputs are of positions {list(stored.indices.shape[:-1])} and logits of "
                f"{list(positions)}: store them for the same, uncut inputs."
            )
        check_vocabulary(stored, classes)
        parts = (stored.log_probs.flatten(0, -2), stored.indices.flatten(0, -2))
    counted = _counted(mask, positions, logits.device)
    each = _by_chunks(logits.flatten(0, -2), parts, temperature, chunk).view(positions)
    if counted is not None:
        each = torch.where(counted, each, 0.0)
    return _reduced(each, counted, reduction)


def _by_chunks(
    logits: Tensor, parts: tuple[Tensor, ...], temperature: float, chunk: int | None
) -> Tensor:
    if chunk is None or chunk >= len(logits):
        return _divergence(temperature, logits, *parts)
    found = [
        checkpoint(_divergence, temperature, *of_chunk, use_reentrant=False)
        for of_chunk in zip(*(torch.split(part, chunk) for part in (logits, *parts)), strict=True)
    ]
    return torch.cat(found)


def _divergence(temperature: float, logits: Tensor, *old: Tensor) -> Tensor:
    """Return KL(old ‖ new) of each row, [rows]."""
    dtype = arithmetic_dtype(logits)
    new = torch.log_softmax(logits.to(dtype) / temperature, -1)
    if len(old) == 1:
        before = torch.log_softmax(old[0].to(logits.device, dtype) / temperature, -1)
    else:
        before, indices = old[0].to(logits.device, dtype), old[1].to(logits.device).long()
        new = new.gather(-1, indices)
        if indices.shape[-1] < logits.shape[-1]:
            before, new = _with_rest(before), _with_rest(new)
    # Where p is 0 it costs nothing, whatever q is.
    terms = torch.where(before == -torch.inf, 0.0, before.exp() * (before - new))
    return temperature**2 * terms.sum(-1)


def _with_rest(log_probs: Tensor) -> Tensor:
    """Append the log of what remains to 1; what was rounded may sum to a little more."""
    total = torch.logsumexp(log_probs, -1, keepdim=True)
    least = torch.finfo(log_probs.dtype).eps
    return torch.cat([log_probs, torch.log((-torch.expm1(total)).clamp_min(least))], -1)


def _counted(mask: Tensor | None, positions: torch.Size, device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != positions:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, and the logits are of positions {list(positions)}."
        )
    return mask.to(device) != 0


def _reduced(each: Tensor, counted: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    if counted is None:
        counted = torch.ones_like(each, dtype=torch.bool)
    if reduction == "token":
        return each.sum() / counted.sum().clamp_min(1)
    of_samples = counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()
    sums = each.flatten(1).sum(1) if each.dim() > 1 else each
    return (sums / of_samples.clamp_min(1)).sum() / (of_samples > 0).sum().clamp_min(1)
