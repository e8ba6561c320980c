"""What a batch of data means: inputs, targets, and which of it are samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_optim.fisher import nested
from cl_optim.fisher.language import (
    computes_loss,
    decodes_labels,
    next_token_targets,
    with_labels,
)
from cl_optim.fisher.objective import IGNORED, MAX_EXACT_CLASSES, Labels, has_exact

# How far rounding may take a model's own loss from ours; a shift moves it by more.
_SAME_LOSS, _SAME_LOSS_COARSE = 1e-3, 2e-2

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Batch:
    """A batch for a model that returns logits.

    Attributes:
        inputs: What the model takes.
        named: Whether ``inputs`` is a mapping whose entries are arguments.
        targets: int64 classes aligned with the logits; ``None`` where there are none.
    """

    inputs: Any
    named: bool
    targets: Tensor | None

    def logits(self, model: nn.Module) -> object:
        """Return what the model makes of it; of an output of transformers, its logits."""
        output = model(**self.inputs) if self.named else model(self.inputs)
        return getattr(output, "logits", output)

    def padding(self, logits: Tensor) -> Tensor | None:
        """Return targets that leave out what a mask calls padding: a decoder's, if there is one."""
        if not self.named:
            return None
        decodes = any(name.startswith("decoder_") for name in self.inputs)
        mask = self.inputs.get("decoder_attention_mask" if decodes else "attention_mask")
        if logits.dim() != 3 or not isinstance(mask, Tensor) or mask.shape != logits.shape[:-1]:
            return None
        return torch.where(mask == 0, IGNORED, 0).to(logits.device)

    def counted(self, samples: int) -> Tensor:
        """Return the samples that have a target that is not ignored."""
        targets = self.targets
        if targets is None or targets.dim() == 0 or len(targets) != samples:
            return torch.arange(samples, device="cpu")
        return (targets != IGNORED).unsqueeze(-1).flatten(1).any(1).nonzero().squeeze(1)

    def take(self, rows: Tensor, samples: int) -> Batch:
        """Take those samples of it."""
        inputs, targets = take((self.inputs, self.targets), rows, samples)
        return Batch(inputs, self.named, targets)


def read(batch: Any, model: nn.Module, labels: Labels | None, causal: bool, where: str) -> Batch:
    """Take a batch apart: ``(inputs, targets)``, ``{"input_ids": …, "labels": …}`` or inputs."""
    targets: object = None
    inputs = batch
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ValueError(f"{where} must be (inputs, targets), but has {len(batch)} parts.")
        inputs, targets = batch if len(batch) == 2 else (batch[0], None)
    named = isinstance(inputs, Mapping) and _are_arguments(inputs, model)
    if named and targets is None and "labels" in inputs:
        targets = inputs["labels"]
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if isinstance(targets, Tensor) and targets.dim() == 2 and decodes_labels(model):
        if not named:
            raise ValueError(
                f"the decoder of an encoder-decoder is given the labels, shifted by one, but "
                f"{where} does not name its inputs; make it a mapping, {{'input_ids': …, "
                f"'labels': …}}."
            )
        given = with_labels(model, inputs, targets)
        if _are_arguments(given, model):  # what wraps it may do that itself
            inputs = given
    if labels is not None and isinstance(targets, Tensor) and targets.is_floating_point():
        _check_soft(targets, where)
    integers = isinstance(targets, Tensor) and targets.dtype in _INTEGERS
    aligned = targets.long() if isinstance(targets, Tensor) and integers else None
    if causal:
        tokens = inputs.get("input_ids") if named else inputs
        mask = inputs.get("attention_mask") if named else None
        aligned = next_token_targets(aligned, tokens if isinstance(tokens, Tensor) else None, mask)
    if labels == "empirical" and aligned is None:
        raise ValueError(
            f"labels='empirical' needs (inputs, targets) with integer class targets, but the "
            f"targets of {where} are {kind(targets)}."
        )
    return Batch(inputs, named, aligned)


def _are_arguments(inputs: Mapping[Any, Any], model: nn.Module) -> bool:
    """Return whether the keys name parameters of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return all(isinstance(key, str) for key in inputs)
    return bool(inputs) and all(key in parameters for key in inputs)


def leading(value: Any, where: str) -> int:
    """Return the number of samples: the leading dimension of the first tensor."""
    first = next(nested.tensors(value), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"{where} must have a tensor whose leading dimension runs over samples.")
    return len(first)


def take(value: Any, rows: Tensor, samples: int) -> Any:
    """Take those rows of all tensors that have ``samples`` rows."""
    if len(rows) == samples:
        return value
    return nested.map_tensors(
        lambda tensor: (
            tensor[rows.to(tensor.device)]
            if tensor.dim() > 0 and len(tensor) == samples
            else tensor
        ),
        value,
    )


def check_logits(logits: object, samples: int, labels: Labels | None, where: str) -> Tensor:
    """Refuse what is no logits [N, C] or [N, T, C], or too large for ``labels``."""
    if (
        not isinstance(logits, Tensor)
        or not logits.is_floating_point()
        or logits.dim() not in (2, 3)
        or len(logits) != samples
    ):
        raise ValueError(
            f"model(inputs) must return floating-point logits [{samples}, C] or [{samples}, T, C], "
            f"but returned {kind(logits)} in {where}; for a model with other outputs, pass "
            f"per_sample_loss with labels='empirical'."
        )
    if labels is not None and logits.shape[-1] < 2:
        raise ValueError(
            f"model(inputs) must return logits of two classes at least, but returned "
            f"{kind(logits)} in {where}, of which a softmax is constant: for a binary loss or a "
            f"regression pass per_sample_loss with labels='empirical'."
        )
    if labels == "exact" and not has_exact(logits):
        raise ValueError(
            f"labels='exact' is for logits [N, C] with at most {MAX_EXACT_CLASSES} classes, not "
            f"{list(logits.shape)}; use labels='sample'."
        )
    return logits


def _check_soft(targets: Tensor, where: str) -> None:
    """Refuse floating-point targets that are no probabilities of classes: of another loss."""
    wide = targets.detach().float()
    if targets.dim() < 2 and bool((wide == wide.round()).all()):
        raise ValueError(
            f"the targets of {where} are {kind(targets)}, and classes are integers: give "
            f"targets.long()."
        )
    sums = [wide.sum(dim) for dim in {1, targets.dim() - 1} if 0 < dim < targets.dim()]
    is_soft = any(bool(((s - 1.0).abs() < 1e-2).logical_or(s == 0.0).all()) for s in sums)
    if not is_soft or bool((wide < 0.0).any()):
        raise ValueError(
            f"the targets of {where} are {kind(targets)}, which are neither classes nor their "
            f"probabilities, so that the loss is none of a softmax: pass the loss of its samples "
            f"as per_sample_loss, with labels='empirical'."
        )


def check_shape(targets: Tensor | None, logits: Tensor, where: str) -> Tensor:
    """Refuse targets that are not aligned with the logits."""
    if targets is None or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have shape {list(logits.shape[:-1])}, as the logits without their "
            f"classes, not {kind(targets)}, in {where}: bring classes to the last dimension, or "
            f"pass per_sample_loss with labels='empirical'."
        )
    return targets


def check_targets(targets: Tensor | None, logits: Tensor, where: str) -> None:
    """Refuse targets that are not aligned with the logits, or no class of theirs."""
    classes = logits.shape[-1]
    targets = check_shape(targets, logits, where)
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != IGNORED)]
    if len(wrong):
        raise ValueError(
            f"targets must be in [0, {classes}) or {IGNORED}, but there is {int(wrong[0])} in "
            f"{where}."
        )


def check_losses(logits: Tensor, targets: Tensor | None, where: str) -> None:
    """Refuse a NaN anywhere, and a target whose logit is −∞ (elsewhere that may be meant)."""
    logits = logits.detach()
    finite = not bool(torch.isnan(logits).any() | torch.isposinf(logits).any())
    if targets is not None:
        chosen = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        finite &= bool(torch.isfinite(chosen[targets != IGNORED]).all())
    if not finite:
        raise ValueError(
            f"the loss is not finite in {where}; leave its sample out, or compute in a wider dtype."
        )


@torch.no_grad()
def check_own_loss(batch: Batch, model: nn.Module, causal: bool, where: str) -> None:
    """Refuse a model of transformers whose own loss of these labels is not the mean of −log p.

    Nothing is said of models that compute no loss, nor of logits that targets are not aligned with.
    """
    targets = batch.targets
    if not batch.named or targets is None or targets.dim() != 2 or not computes_loss(model):
        return
    labels = targets
    if causal:  # as the model takes them
        labels = torch.full_like(targets, IGNORED)
        labels[:, 1:] = targets[:, :-1]
    inputs = {**batch.inputs, "labels": labels}
    if not _are_arguments(inputs, model) or not (targets != IGNORED).any():
        return
    output = model(**inputs)
    loss, logits = (getattr(output, name, None) for name in ("loss", "logits"))
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
        return
    if loss.dim() > 0 or logits.shape[:-1] != targets.shape:
        return
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own, ours = float(loss), float(F.cross_entropy(wide.flatten(0, 1), targets.flatten()))
    tolerance = _SAME_LOSS if logits.dtype.itemsize >= 4 else _SAME_LOSS_COARSE
    if abs(own - ours) > tolerance * max(abs(own), abs(ours)):
        name = "causal_lm" if causal else "cross_entropy"
        raise ValueError(
            f"in {where}, the loss that the model computes of its labels is {own:.4g}, but the "
            f"mean of −log p with loss={name!r} is {ours:.4g}: this is the Fisher information of "
            f"another loss; if it is meant, say loss={name!r}, else pass the losses of its samples "
            f"as per_sample_loss, with labels='empirical'."
        )


def kind(value: object) -> str:
    """Describe a value in a few words, for an error."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
