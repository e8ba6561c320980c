"""What a batch's loss was multiplied and divided by, as far as it can be seen from outside."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from cl_optim.distributed import whole

# Of a gradient's norm, what may be rounding; and how far a factor may be from a whole number.
_TOLERANCE = 1e-2
# Rows of logits that are looked at.
_ROWS = 1024


def calling_scaler() -> torch.amp.GradScaler | None:
    """Return the GradScaler whose ``step()`` this runs in, if there is one that is enabled.

    It tells only fused optimizers of itself, and of its scale only if that is left to them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler: torch.amp.GradScaler = frame.f_locals["self"]
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class CrossEntropy:
    """Logits whose gradient is c·(softmax − one-hot) in each row that is not zero.

    Attributes:
        coefficient: c, 0-dim float32: 1/N for a mean over N rows, 1 for a sum.
        residual: Norm of what of the gradient is something else, relative to its own.
        valid: Number of rows that are not zero.
        rows: Number of rows.
        classes: Their length.
    """

    coefficient: Tensor
    residual: Tensor
    valid: Tensor
    rows: int
    classes: int

    def has_factor(self, factor: float) -> bool:
        """Say whether it is certain that c is this. Waits for the device."""
        is_seen = float(self.residual) <= _TOLERANCE and int(self.valid) * (self.classes - 1) >= 2
        return is_seen and _close(float(self.coefficient), factor)

    def contradiction(self, terms: float, scale: float, samples: int | None) -> str | None:
        """Say what is wrong with "divided by ``terms``, multiplied by ``scale``", if it is certain.

        A loss may be weighted, so that only two factors say something: those of a sum, and of a
        mean over the rows that have a target. Waits for the device.

        Args:
            terms: As claimed.
            scale: As claimed.
            samples: N, if a mean over N samples was claimed; each sample's loss may then be a mean
                over rows itself, as many for each.
        """
        valid, residual = int(self.valid), float(self.residual)
        # NaN, where the loss overflowed, says nothing.
        if not residual <= _TOLERANCE or valid * (self.classes - 1) < 2:
            return None
        coefficient = float(self.coefficient) / scale
        if _close(coefficient, 1.0):
            if _close(terms, 1.0):
                return None
            return f"is a sum, not divided by {terms:g}: pass loss_terms=1"
        if not _close(coefficient * valid, 1.0) or _close(terms, valid):
            return None
        if samples is not None and valid == self.rows and valid % samples == 0:
            return None
        return (
            f"is a mean over {valid} targets, not divided by {terms:g}: pass loss_terms='tokens' "
            f"where that counts them (attached), or their number as loss_terms"
        )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _TOLERANCE * abs(b)


def watch(output: Tensor, found: list[CrossEntropy]) -> None:
    """Add what cross entropy makes of a tensor in its backward pass to ``found``.

    A hook of its node is left, not of the tensor, which is the user's. One that has been changed in
    place by then says nothing.
    """
    node, number, version = output.grad_fn, output.output_nr, output._version
    logits = output.detach()

    def hook(grads: Sequence[Tensor | None]) -> None:
        grad = grads[number]
        if grad is not None and logits._version == version:
            found.extend(_find_cross_entropy(whole(logits), whole(grad)))

    if node is not None:
        node.register_prehook(hook)


def _find_cross_entropy(logits: Tensor, grad: Tensor) -> list[CrossEntropy]:
    """Measure what cross entropy may have made of logits, [..., C] or [N, C, ...]; on the device.

    Args:
        logits: Floating point, of at least two dimensions; else there is nothing to find.
        grad: Their gradient.
    """
    if logits.dim() < 2 or not logits.is_floating_point() or logits.numel() == 0:
        return []
    found = []
    for dim in dict.fromkeys((logits.dim() - 1, 1)):
        classes = logits.shape[dim]
        values, grads = (t.movedim(dim, -1).reshape(-1, classes) for t in (logits, grad))
        valid = (grads != 0).any(1).sum()
        step = max(1, len(grads) // _ROWS)
        values, grads = values[::step].float(), grads[::step].float()
        target = grads.argmin(1, keepdim=True)
        shape = values.softmax(1)
        shape = shape.scatter_add(1, target, -torch.ones_like(shape[:, :1]))
        shape = shape * (grads != 0).any(1, keepdim=True)
        coefficient = (grads * shape).sum() / shape.square().sum()
        residual = (grads - coefficient * shape).norm() / grads.norm()
        found.append(CrossEntropy(coefficient, residual, valid, logits.numel() // classes, classes))
    return found
