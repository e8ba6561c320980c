"""Old outputs that are kept beside samples: the largest log-probabilities of each position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.ops.checks import check_whole
from cl_optim.ops.formats import arithmetic_dtype

K = 64  # 384 bytes of a position


class TopK(NamedTuple):
    """The k largest log-probabilities of each position; all others count as one further class.

    It is a part of a batch like any other: a ReplayBuffer keeps it beside its samples.

    Attributes:
        log_probs: [n, ..., k], descending, float16 unless the logits were float64.
        indices: Whose they are, [n, ..., k], int32.
        vocabulary: The number of classes, [n], int32: every sample knows it.
    """

    log_probs: Tensor
    indices: Tensor
    vocabulary: Tensor


def top_k(logits: Tensor, k: int = K) -> TopK:
    """Return what is worth keeping of logits: 6·k bytes for each position.

    Args:
        logits: [n, ..., V].
        k: How many; V if there are fewer.

    Raises:
        ValueError: ``k`` is below 1, there is no dimension of samples, or logits are not finite.
    """
    check_whole("k", k)
    if logits.dim() < 2:
        raise ValueError(f"logits must have the shape [n, ..., V], not {list(logits.shape)}.")
    check_finite(logits, "logits")
    wide = logits.detach().to(arithmetic_dtype(logits))
    values, indices = torch.log_softmax(wide, -1).topk(min(k, logits.shape[-1]), -1)
    if logits.dtype != torch.float64:
        values = values.to(torch.float16)
    vocabulary = torch.full((len(logits),), logits.shape[-1], dtype=torch.int32)
    return TopK(values, indices.to(torch.int32), vocabulary.to(logits.device))


def as_top_k(stored: object) -> TopK | None:
    """Return stored outputs, which a buffer may have made a tuple of; None: it is something else.

    Raises:
        ValueError: It was stored, and is not what :func:`top_k` makes.
    """
    if isinstance(stored, Mapping) and set(stored) == set(TopK._fields):
        stored = tuple(stored[field] for field in TopK._fields)
    if not (isinstance(stored, tuple) and len(stored) == 3):
        return None
    if not all(isinstance(part, Tensor) for part in stored):
        return None
    found = TopK(*stored)
    if found.log_probs.shape != found.indices.shape or found.vocabulary.dim() != 1:
        raise ValueError(
            "stored outputs must be log_probs and indices [n, ..., k] and vocabulary [n], as "
            "retention.top_k() makes them."
        )
    return found


def check_vocabulary(stored: TopK, classes: int) -> None:
    """Refuse outputs of another vocabulary.

    Raises:
        ValueError: It is another.
    """
    others = stored.vocabulary[stored.vocabulary != classes]
    if len(others):
        raise ValueError(
            f"stored outputs are of {int(others[0])} classes, and the model has {classes}: store "
            "them anew, with this model's tokenizer and vocabulary."
        )
    if bool(((stored.indices < 0) | (stored.indices >= classes)).any()):
        raise ValueError("stored outputs have indices beyond their vocabulary: store them anew.")


def check_finite(logits: Tensor, name: str) -> None:
    """Refuse NaN and +∞; −∞ is a probability of 0.

    Raises:
        ValueError: There are some.
    """
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise ValueError(f"{name} must not be NaN or +∞: the model's weights or inputs are not.")
