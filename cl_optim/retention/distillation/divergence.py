"""How far outputs are from what they were: KL(old ‖ new), streamed, and as an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.ops.formats import arithmetic_dtype
from cl_optim.ops.passes import eval_mode, unobserved
from cl_optim.retention.distillation.loss import distillation_loss
from cl_optim.retention.distillation.old_model import OldModel, old_model
from cl_optim.retention.distillation.stored import check_finite, top_k
from cl_optim.retention.guard.evaluation import Evaluation
from cl_optim.retention.interpolation.old_weights import Old

# Runs a model, or what stands for it, on a batch: returns logits [n, ..., V].
Forward = Callable[[Callable[..., Any], Any], Tensor]

_CHUNK = 4096
_TARGETS = ("labels", "old")  # of a batch, and no inputs: "old" are stored outputs


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


def old_outputs(
    model: nn.Module,
    old: OldModel | Old | None,
    batches: Collection[Any],
    *,
    name: str = "old outputs",
    forward: Forward | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
) -> Evaluation:
    """Make an evaluation of what a model said before, which needs neither labels nor old data.

    Its number is the cross-entropy of the old model's outputs under those of now, in nats per
    position: H(old) + KL(old ‖ new). At the start that is H(old), and the relative loss of it
    KL/H: on text that the old model wrote itself, the part of its bits that it has lost. So a
    budget can be given to :class:`~cl_optim.retention.RetentionGuard` and
    :func:`~cl_optim.retention.interpolate` where nothing of the old task is left.

    Args:
        model: As for :func:`divergence`, as are the others.
        old: What it was; it must stay that: an optimizer whose anchors it is must not consolidate
            in between.
        batches: Inputs, such as a list of ``self_written(...).sample(n)``; they are gone through at
            each evaluation.
        name: Of the evaluation.
        forward: Runs a model on a batch and returns logits.
        mask: Which positions of a batch count.

    Raises:
        ValueError: As for :func:`divergence`; or the old model is certain of everything, so that
            nothing can be lost relative to that.
        TypeError: ``batches`` can be gone through only once.

    Example:
        .. code-block:: python

            from cl_optim import retention

            opt.consolidate(importance)
            was = retention.OldModel(model, opt)
            kept = retention.old_outputs(model, was, list(new_loader))
            guard = RetentionGuard(model, opt, [kept], budget=0.05)
    """
    if not isinstance(batches, Collection):
        raise TypeError(
            f"batches must be a list, or what can be gone through again, not "
            f"{type(batches).__name__}: each evaluation goes through them."
        )
    was = old_model(model, old)
    entropy = _entropy(was, batches, forward or logits_of, mask)
    if not entropy > 0.0:
        raise ValueError(
            "the old model is certain of its outputs on all batches: losses are relative to their "
            "entropy; give batches on which it is not."
        )

    def measure(now: nn.Module) -> float:
        return entropy + divergence(now, was, batches, forward=forward, mask=mask)

    return Evaluation(name, measure, higher_is_better=False)


def _entropy(
    was: OldModel,
    batches: Iterable[Any],
    run: Forward,
    mask: Callable[[Any], Tensor | None] | None,
) -> float:
    """Return the mean entropy of the old outputs, in nats per position."""
    total, count = 0.0, 0
    for batch in batches:
        logits = run(was, batch)
        check_finite(logits, "the old model's logits")
        counted = mask_of(batch, logits) if mask is None else mask(batch)
        rows = logits.flatten(0, -2)
        if counted is not None:
            rows = rows[counted.to(rows.device).flatten() != 0]
        for part in torch.split(rows, _CHUNK):
            log_probs = torch.log_softmax(part.to(arithmetic_dtype(part)), -1)
            total += float(torch.special.entr(log_probs.exp()).double().sum())
        count += len(rows)
    if count == 0:
        raise ValueError("batches have no position that counts: give some inputs.")
    return total / count


def logits_of(model: Callable[..., Any], batch: Any) -> Tensor:
    """Run a model on a batch, and return its logits, [n, ..., V].

    Raises:
        TypeError: The output has none.
    """
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key not in _TARGETS})
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
