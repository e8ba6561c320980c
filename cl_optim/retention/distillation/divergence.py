"""How far a model's outputs are from what they were: KL(old ‖ new), streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.ops.passes import eval_mode, unobserved
from cl_optim.retention.distillation.loss import distillation_loss
from cl_optim.retention.distillation.old_model import OldModel, old_model
from cl_optim.retention.distillation.stored import check_finite, top_k
from cl_optim.retention.interpolation.old_weights import Old

# Runs a model, or what stands for it, on a batch: returns logits [n, ..., V].
Forward = Callable[[Callable[..., Any], Any], Tensor]

_CHUNK = 4096


def divergence(
    model: nn.Module,
    old: OldModel | Old | None,
    batches: Iterable[Any],
    *,
    top: int | None = None,
    forward: Forward | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
) -> float:
    """Return the mean of KL(old ‖ new) over all positions, in nats: how much a model has changed.

    It needs no labels and no old data: on the new task's inputs it predicts how much is forgotten
    elsewhere, where the distance between weights does not.

    Args:
        model: The model of now; in eval mode meanwhile.
        old: What it was, as for :class:`OldModel`; None: without its adapters.
        batches: Inputs: tensors, tuples that begin with one, or mappings of arguments, whose
            ``attention_mask`` says what counts.
        top: Compare only the so many most probable classes of the old model, and the rest as one:
            a lower bound that needs no second logits in memory.
        forward: Runs a model on a batch and returns logits; None: by the kinds above.
        mask: Which positions of a batch count; None: by the attention mask, if there is one.

    Raises:
        ValueError: No position counts, or outputs are NaN; or as for :class:`OldModel`.

    References:
        Shenfeld et al. 2025, arXiv:2509.04259 (RL's Razor).
    """
    was, run = old_model(model, old), forward or logits_of
    total, count = 0.0, 0
    with torch.no_grad(), eval_mode(model), unobserved():
        for batch in batches:
            before = run(was, batch)
            check_finite(before, "the old model's logits")
            kept = before if top is None else top_k(before, top)
            del before
            logits = run(model, batch)
            check_finite(logits, "the model's logits")
            counted = mask_of(batch, logits) if mask is None else mask(batch)
            each = distillation_loss(logits, kept, counted, reduction="none", chunk=_CHUNK)
            total += float(each.double().sum())
            count += each.numel() if counted is None else int((counted != 0).sum())
    if count == 0:
        raise ValueError("batches have no position that counts: give some inputs.")
    return total / count


def logits_of(model: Callable[..., Any], batch: Any) -> Tensor:
    """Run a model on a batch, and return its logits, [n, ..., V].

    Raises:
        TypeError: The output has none.
    """
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returns {type(output).__name__}, which has no logits: give a forward= that "
            "returns them."
        )
    return logits


def mask_of(batch: Any, logits: Tensor) -> Tensor | None:
    """Return a batch's attention mask, where it is one of the logits' positions."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]
    return mask if fits else None
