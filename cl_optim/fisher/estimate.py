"""estimate_fisher: the Fisher information of a model on some data, in a pass of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.fisher import nested
from cl_optim.fisher.estimator import FisherEstimator
from cl_optim.fisher.labels import IGNORED, LABELS, MAX_EXACT_CLASSES, Labels, seeds
from cl_optim.fisher.observation import Observation
from cl_optim.importance.importance import Importance


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = "exact",
    max_samples: int | None = 500,
    per_sample_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Importance:
    r"""Compute the diagonal of the Fisher information of ``model`` on ``batches``.

    :math:`F_i = \frac1N \sum_n E_y\left[(∂ \log p(y | x_n) / ∂θ_i)^2\right]`, exactly per sample.
    What y is, is ``labels``:

    ``"exact"``
        The expectation over the model's own p(y | x): one backward pass per class, at most 100.
    ``"sample"``
        One label per sample (or token) drawn from the model: unbiased for ``"exact"``.
    ``"predicted"``
        The most probable label.
    ``"empirical"``
        The data's label.

    ``model(inputs)`` must return logits: [N, C], or [N, T, C] for sequences. There, a sample is a
    sequence: its loss is the sum over tokens of −log p, its gradient is squared whole.

    The model runs in eval mode and is left as it was: training flags, ``grad``, buffers. On the
    first batch it is checked that no sample's loss depends on another sample. See
    :class:`FisherEstimator` for the layers that are supported.

    Args:
        model: The model; observed are its parameters that require gradients.
        batches: Yields ``(inputs, targets)``, or inputs alone where ``labels`` needs no targets.
            Inputs are what ``model`` takes: a tensor, or tensors in a tuple, list or mapping, with
            the samples along their leading dimension. Targets are classes, [N] or [N, T], aligned
            with the logits. What has target −100 is left out in every mode, and not counted.
            Batches are moved to the model's device.
        labels: As above.
        max_samples: Stop after exactly so many samples; ``None``: take all.
        per_sample_loss: ``per_sample_loss(model, batch)`` returns losses [N] for a whole batch, in
            place of −log p; for ``labels="empirical"`` only.
        generator: Draws the labels of ``"sample"``.
        progress: Show a progress bar. Default: if the standard error stream is a terminal.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range; ``batches`` is empty; logits, targets or losses
            have a wrong shape or value; a loss or gradient is not finite; samples are not
            independent.
        NotImplementedError: A parameter is used in a way that is not supported.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756, on how much
        the choice between these matters.
    """
    _check_arguments(batches, labels, max_samples, per_sample_loss)
    fisher = FisherEstimator(model)
    device = next(model.parameters()).device
    batch_count = 0
    with _evaluating(model), _progress_bar(progress, max_samples) as advance, torch.enable_grad():
        for batch in batches:
            where = f"batch {batch_count}"
            batch_count += 1
            batch = nested.map_tensors(lambda tensor: tensor.to(device), batch)
            left = None if max_samples is None else max_samples - fisher._samples
            if per_sample_loss is None:
                samples = _add_labelled(fisher, batch, labels, left, generator, where)
            else:
                samples = _add_losses(fisher, batch, per_sample_loss, left, where)
            if names := fisher._non_finite():
                raise ValueError(
                    f"the gradient of parameter {names[0]!r} is not finite in {where}."
                )
            advance(samples)
            if fisher._samples == max_samples:
                break
    if fisher._samples == 0:
        raise ValueError("batches has no samples.")
    return fisher._importance(
        estimator="estimate_fisher",
        labels=labels,
        loss="per_sample_loss" if per_sample_loss is not None else "-log p",
        max_samples=max_samples,
        batches=batch_count,
    )


def _add_labelled(
    fisher: FisherEstimator,
    batch: Any,
    labels: Labels,
    limit: int | None,
    generator: torch.Generator | None,
    where: str,
) -> int:
    """Add at most ``limit`` samples of a batch, with the loss −log p(y); return how many."""
    inputs, targets = _split(batch, labels, where)
    samples = _leading(inputs, where)
    kept = torch.arange(samples)
    if targets is not None and targets.dim() > 0 and len(targets) == samples:
        counted = (targets != IGNORED).unsqueeze(-1).flatten(1).any(1)
        kept = counted.nonzero().squeeze(1)
    inputs, targets = _take((inputs, targets), kept[:limit], samples)
    samples = len(kept[:limit])
    if samples == 0:
        return 0
    with fisher._observe(samples, factor=1.0, own_pass=True) as observation:
        logits = fisher._model(inputs)
        _check_logits(logits, samples, labels, where)
        if labels == "empirical":
            _check_targets(targets, logits, where)
        elif targets is not None and targets.shape != logits.shape[:-1]:
            targets = None
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        _check_losses(log_p, targets if labels == "empirical" else None, where)
        if fisher._samples == 0:
            _check_independence(observation, logits, where)
        for seed in seeds(labels, log_p, targets, generator):
            observation.backward(log_p, seed, retain_graph=labels == "exact")
    tokens = observation.tokens
    if logits.dim() == 3:
        positions = logits[..., 0].numel()
        tokens = positions if targets is None else int((targets != IGNORED).sum())
    fisher._count(samples, tokens)
    return samples


def _add_losses(
    fisher: FisherEstimator,
    batch: Any,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    limit: int | None,
    where: str,
) -> int:
    """Add at most ``limit`` samples of a batch, with the user's loss; return how many."""
    samples = _leading(batch, where)
    batch = _take(batch, torch.arange(samples)[:limit], samples)
    samples = samples if limit is None else min(samples, limit)
    if samples == 0:
        return 0
    with fisher._observe(samples, factor=1.0, own_pass=True) as observation:
        losses = per_sample_loss(fisher._model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (samples,):
            raise ValueError(
                f"per_sample_loss must return one loss per sample, shape [{samples}], but returned "
                f"{_kind(losses)} in {where}."
            )
        if not torch.isfinite(losses).all():
            raise ValueError(f"per_sample_loss returned a loss that is not finite in {where}.")
        if fisher._samples == 0:
            _check_independence(observation, losses, where)
        observation.backward(losses, torch.ones_like(losses), retain_graph=False)
    fisher._count(samples, observation.tokens)
    return samples


# --- batches --------------------------------------------------------------------------------------


def _split(batch: Any, labels: Labels, where: str) -> tuple[Any, Tensor | None]:
    """Inputs, and targets if they can be class indices."""
    targets: object = None
    inputs = batch
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ValueError(f"{where} must be (inputs, targets), but has {len(batch)} parts.")
        inputs, targets = batch if len(batch) == 2 else (batch[0], None)
    integers = isinstance(targets, Tensor) and targets.dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
    if labels == "empirical" and not integers:
        raise ValueError(
            f"labels='empirical' needs (inputs, targets) with integer class targets, but the "
            f"targets of {where} are {_kind(targets)}."
        )
    # int64, since −100 is no uint8
    return inputs, targets.long() if isinstance(targets, Tensor) and integers else None


def _leading(value: Any, where: str) -> int:
    """The number of samples: the leading dimension of the first tensor."""
    first = next(nested.tensors(value), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"{where} must have a tensor whose leading dimension runs over samples.")
    return len(first)


def _take(value: Any, rows: Tensor, samples: int) -> Any:
    """Those rows of all tensors that have ``samples`` rows."""
    if len(rows) == samples:
        return value
    return nested.map_tensors(
        lambda tensor: tensor[rows] if tensor.dim() > 0 and len(tensor) == samples else tensor,
        value,
    )


# --- checks ---------------------------------------------------------------------------------------


def _check_arguments(
    batches: object, labels: object, max_samples: object, per_sample_loss: object
) -> None:
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, not {_kind(batches)}.")
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}, not {labels!r}.")
    if max_samples is not None:
        if not isinstance(max_samples, int) or isinstance(max_samples, bool):
            raise TypeError(f"max_samples must be an integer or None, not {_kind(max_samples)}.")
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, or None, not {max_samples}.")
    if per_sample_loss is not None and labels != "empirical":
        raise ValueError(f"per_sample_loss needs labels='empirical', not {labels!r}.")


def _check_logits(logits: object, samples: int, labels: Labels, where: str) -> None:
    if (
        not isinstance(logits, Tensor)
        or not logits.is_floating_point()
        or logits.dim() not in (2, 3)
        or len(logits) != samples
    ):
        raise ValueError(
            f"model(inputs) must return floating-point logits [{samples}, C] or [{samples}, T, C], "
            f"but returned {_kind(logits)} in {where}."
        )
    if labels == "exact" and (logits.dim() == 3 or logits.shape[-1] > MAX_EXACT_CLASSES):
        raise ValueError(
            f"labels='exact' is for logits [N, C] with at most {MAX_EXACT_CLASSES} classes, not "
            f"{list(logits.shape)}; use labels='sample'."
        )


def _check_targets(targets: Tensor | None, logits: Tensor, where: str) -> None:
    classes = logits.shape[-1]
    if targets is None or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have shape {list(logits.shape[:-1])}, as the logits without their "
            f"classes, not {_kind(targets)}, in {where}."
        )
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != IGNORED)]
    if len(wrong):
        raise ValueError(
            f"targets must be in [0, {classes}) or {IGNORED}, but there is {int(wrong[0])} in "
            f"{where}."
        )


def _check_losses(log_p: Tensor, targets: Tensor | None, where: str) -> None:
    """Refuse a NaN anywhere, and a target with probability 0 (elsewhere p = 0 may be meant)."""
    finite = not bool(torch.isnan(log_p).any())
    if targets is not None:
        chosen = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        finite &= bool(torch.isfinite(chosen[targets != IGNORED]).all())
    if not finite:
        raise ValueError(f"the loss is not finite in {where}.")


def _check_independence(observation: Observation, outputs: Tensor, where: str) -> None:
    if not outputs.requires_grad:
        raise ValueError(f"the loss does not depend on any trained parameter in {where}.")
    if names := observation.find_coupled(outputs):
        raise ValueError(
            f"samples are not independent in {where}: the first sample's loss reaches other rows "
            f"of what parameter {names[0]!r} met. The leading dimension of each layer's input must "
            f"run over samples, not over positions, and no sample may depend on another."
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


# --- around the pass ------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module's own flag is what it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def _progress_bar(shown: bool | None, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar, or does nothing where none is shown."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda samples: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Fisher"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Fisher", total=total)
        yield lambda samples: bar.advance(task, samples)
        bar.update(task, total=bar.tasks[0].completed)  # there may be fewer than max_samples
