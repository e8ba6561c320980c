"""KL(old ‖ new) of outputs: whole logits, the largest that were stored, or made chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cl_optim.ops.formats import arithmetic_dtype
from cl_optim.retention.distillation.stored import TopK, as_top_k, check_vocabulary

Reduction = Literal["token", "sequence", "sum", "none"]


_CHUNK = 1024  # positions whose logits are made at once of hidden states


class Hidden(NamedTuple):
    """What a model's last layer makes logits of: ``states @ weight.T + bias``, and nothing more.

    A model that scales its logits, or caps them, needs them themselves: what follows its last layer
    would be left out.

    Attributes:
        states: [n, ..., d].
        weight: The last layer's, [V, d].
        bias: [V]; None: none.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None


def distillation_loss(
    logits: Tensor | Hidden,
    old: Tensor | TopK | Hidden,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    r"""Return KL(old ‖ new) = Σ_v p(v) log(p(v)/q(v)) in nats, the mean over positions.

    Of stored outputs all classes that are not among the k count as one: that is a lower bound of
    the divergence, exact where k is the vocabulary.

    Where a vocabulary is large, logits of all positions are most of a step's memory. In their place
    give the hidden states before the last layer (:class:`Hidden`): then there are never more than
    the logits of one chunk, of either model, forwards or backwards.

    Args:
        logits: The model's, [n, ..., V], or the hidden states that they are made of.
        old: The old model's logits, of the same shape, or what :func:`top_k` made of them, or its
            hidden states. No gradient goes into it.
        mask: Which positions count, [n, ...] as logits without V, of bool or numbers that are 0 or
            not: an attention mask. None: all.
        reduction: ``"token"``: the mean over positions; ``"sequence"``: the mean over samples of
            each one's mean; ``"sum"``; ``"none"``: [n, ...], 0 where nothing counts. Of nothing a
            mean is 0.
        temperature: T: of logits/T, times T² (Hinton); 1 for stored outputs.
        chunk: Positions whose probabilities are in memory at once; None: all, or 1024 where hidden
            states are given. Gradients are the same; each chunk is computed a second time for them.

    Returns:
        0-dim and differentiable, float32, or float64 for such logits.

    Raises:
        ValueError: Shapes, vocabularies or an option do not fit.
        TypeError: ``old`` is something else.

    References:
        Hinton et al. 2015, arXiv:1503.02531; Li & Hoiem 2016, arXiv:1606.09282 (LwF); Buzzega et
        al. 2020, arXiv:2004.07211 (DER, with the squared difference of logits in place of KL).
    """
    stored = None if isinstance(old, (Tensor, Hidden)) else as_top_k(old)
    if stored is None and not isinstance(old, (Tensor, Hidden)):
        raise TypeError(
            "old must be logits, what retention.top_k() makes, or retention.Hidden, not "
            f"{type(old).__name__}."
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, not {reduction!r}.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, not {temperature}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, or None, not {chunk}.")
    new = _Logits(logits, "logits")
    parts = [new.rows]
    before: _Logits | None = None
    if stored is None:
        assert isinstance(old, (Tensor, Hidden))
        before = _Logits(old, "old")
        if before.shape != new.shape:
            raise ValueError(
                f"old has shape {before.shape} and logits {new.shape}: both must be of the same "
                "inputs and the same vocabulary."
            )
        parts.append(before.rows.detach())
    else:
        if temperature != 1.0:
            raise ValueError("temperature must be 1 for stored outputs, which are probabilities.")
        if list(stored.indices.shape[:-1]) != new.shape[:-1]:
            raise ValueError(
                f"stored outputs are of positions {list(stored.indices.shape[:-1])} and logits of "
                f"{new.shape[:-1]}: store them for the same, uncut inputs."
            )
        check_vocabulary(stored, new.shape[-1])
        parts += [stored.log_probs.flatten(0, -2), stored.indices.flatten(0, -2)]
    counted = _counted(mask, torch.Size(new.shape[:-1]), new.rows.device)
    if chunk is None and any(isinstance(one, Hidden) for one in (logits, old)):
        chunk = _CHUNK
    each = _by_chunks(partial(_divergence, temperature, new, before), parts, chunk)
    each = each.view(new.shape[:-1])
    if counted is not None:
        each = torch.where(counted, each, 0.0)
    return _reduced(each, counted, reduction)


class _Logits:
    """Logits that are there, or are made of rows of hidden states when they are needed.

    Attributes:
        rows: [positions, V], or hidden states [positions, d].
        shape: Of the logits.
    """

    def __init__(self, given: Tensor | Hidden, name: str) -> None:
        self._layer = given[1:] if isinstance(given, Hidden) else None
        states = given.states if isinstance(given, Hidden) else given
        if states.dim() < 2:
            what = f"{name} must have the shape [n, ..., V]"
            raise ValueError(f"{what}, not {list(states.shape)}.")
        self.shape = list(states.shape)
        if isinstance(given, Hidden):
            weight, bias = given.weight, given.bias
            if weight.dim() != 2 or weight.shape[1] != states.shape[-1]:
                raise ValueError(
                    f"the weight of {name} must be [V, {states.shape[-1]}], as its states are of "
                    f"{states.shape[-1]} units, not {list(weight.shape)}."
                )
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"the bias of {name} must be [{len(weight)}], not {list(bias.shape)}."
                )
            self.shape[-1] = len(weight)
        self.rows = states.flatten(0, -2)

    def of(self, rows: Tensor) -> Tensor:
        """Return the logits of some rows."""
        return rows if self._layer is None else F.linear(rows, *self._layer)


def _by_chunks(divergence: Callable[..., Tensor], parts: list[Tensor], chunk: int | None) -> Tensor:
    if chunk is None or chunk >= len(parts[0]):
        return divergence(*parts)
    found = [
        checkpoint(divergence, *of_chunk, use_reentrant=False)
        for of_chunk in zip(*(torch.split(part, chunk) for part in parts), strict=True)
    ]
    return torch.cat(found)


def _divergence(
    temperature: float, new: _Logits, before: _Logits | None, rows: Tensor, *old: Tensor
) -> Tensor:
    """Return KL(old ‖ new) of each row, [rows]."""
    logits = new.of(rows)
    dtype = arithmetic_dtype(logits)
    now = torch.log_softmax(logits.to(dtype) / temperature, -1)
    if before is not None:
        with torch.no_grad():
            was = before.of(old[0]).to(logits.device, dtype)
            was = torch.log_softmax(was / temperature, -1)
    else:
        was, indices = old[0].to(logits.device, dtype), old[1].to(logits.device).long()
        now = now.gather(-1, indices)
        if indices.shape[-1] < logits.shape[-1]:
            was, now = _with_rest(was), _with_rest(now)
    # Where p is 0 it costs nothing, whatever q is.
    terms = torch.where(was == -torch.inf, 0.0, was.exp() * (was - now))
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
