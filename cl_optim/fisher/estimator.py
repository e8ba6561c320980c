"""FisherEstimator: the empirical Fisher information of a loss, during ordinary training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from cl_optim._version import __version__
from cl_optim.fisher.observation import Observation
from cl_optim.importance.importance import Importance


class FisherEstimator:
    """Sums squared per-sample gradients of a loss while it is being trained on.

    .. code-block:: python

        fisher = FisherEstimator(model)
        for inputs, targets in batches:
            with fisher.observe(batch_size=len(inputs)):
                loss = cross_entropy(model(inputs), targets)
                loss.backward()
            optimizer.step()
        importance = fisher.finalize()

    This is the *empirical* Fisher: of the loss that is backpropagated, with the data's labels. It
    is exact per sample, in one backward pass: a sample is what the leading dimension of each
    layer's input counts, so that for inputs [N, T, features] it is a sequence, whose tokens'
    gradients add before the square. The parameters' ``grad`` is what it would be without.

    Observed are the parameters that require gradients when the estimator is made. They may be used
    by linear, embedding and layer_norm (as functions or modules), once in a forward pass; any other
    use is an error that names the parameter. Memory: one tensor per parameter for the sums, float32
    (float64 for float64 parameters), and a bounded chunk.

    Args:
        model: The model whose parameters are observed.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has no parameter that requires gradients, or a complex one.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        self._model = model
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self._trained().items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be of a real floating-point dtype, not "
                    f"{parameter.dtype}."
                )
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self._sums[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        if not self._sums:
            raise ValueError("model has no parameters that require gradients.")
        self._samples = 0
        self._tokens: int | None = None
        self._observing = False
        self._broken = False

    @contextmanager
    def observe(
        self,
        batch_size: int,
        loss_terms: float | None = None,
        loss_scale: float = 1.0,
        *,
        tokens: int | None = None,
    ) -> Iterator[None]:
        """Add one batch: goes around one forward pass and its backward pass.

        With gradient accumulation, each micro-batch gets an ``observe()`` of its own. Forward
        passes under ``no_grad`` are not observed. What got no gradient (an unused head) adds zero.
        After an error in the forward pass the sums are as before; one that comes when the backward
        pass has begun leaves them incomplete, and :meth:`finalize` then refuses.

        Args:
            batch_size: Number of samples N, the leading dimension of every layer's input.
            loss_terms: What the loss, a mean, was divided by. Default: ``batch_size``; 1 for a sum
                over samples; the number of loss tokens where it is a mean over tokens.
            loss_scale: What the loss was multiplied by: the scale of mixed-precision training,
                times 1/steps with gradient accumulation.
            tokens: Number of tokens that the loss counts. Default: every position of [N, T] inputs,
                or none where there are no sequences. Matters only to ``Importance.per_token()``.

        Raises:
            TypeError: An argument is not a number.
            ValueError: An argument is out of range; an input's leading dimension is not
                ``batch_size``; or the model's trained parameters are not what they were.
            NotImplementedError: A parameter is used in a way that is not supported.
            RuntimeError: No backward pass ran inside, or two did; or inside another ``observe()``.
        """
        for argument, value in (("batch_size", batch_size), ("tokens", tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{argument} must be an integer, not {type(value).__name__}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        if tokens is not None and tokens < 0:
            raise ValueError(f"tokens must be at least 0, not {tokens}.")
        terms = batch_size if loss_terms is None else loss_terms
        for argument, number in (("loss_terms", terms), ("loss_scale", loss_scale)):
            if not isinstance(number, (int, float)):
                raise TypeError(f"{argument} must be a number, not {type(number).__name__}.")
            if not 0 < number < math.inf:
                raise ValueError(f"{argument} must be positive and finite, not {number}.")
        with self._observe(batch_size, terms / loss_scale) as observation:
            yield
        self._count(batch_size, observation.tokens if tokens is None else tokens)

    def finalize(self) -> Importance:
        """Return the importance so far, as a copy: observing may go on.

        Raises:
            RuntimeError: Nothing was observed, or an ``observe()`` failed in its backward pass.
            ValueError: A sum is not finite.
        """
        return self._importance(estimator="FisherEstimator", labels="empirical")

    # --- what estimate_fisher uses, too -----------------------------------------------------------

    @contextmanager
    def _observe(
        self, batch_size: int, factor: float, *, own_pass: bool = False
    ) -> Iterator[Observation]:
        if self._observing:
            raise RuntimeError("observe() cannot be used inside another observe().")
        parameters = self._trained()
        self._check_unchanged(parameters)
        observation = Observation(parameters, self._sums, batch_size, factor, own_pass=own_pass)
        self._observing = True
        try:
            with observation:
                yield observation
            observation.check()
        except BaseException as error:
            self._broken |= observation.changed
            if isinstance(error, CheckpointError):
                raise NotImplementedError(
                    "activation checkpointing is not supported inside observe() yet: the "
                    "recomputed forward pass is not seen."
                ) from error
            raise
        finally:
            self._observing = False

    def _count(self, samples: int, tokens: int | None) -> None:
        """Count a batch that was observed to its end."""
        if self._samples == 0:
            self._tokens = tokens
        elif tokens is None or self._tokens is None:
            self._tokens = None
        else:
            self._tokens += tokens
        self._samples += samples

    def _non_finite(self) -> list[str]:
        """Names of the parameters whose sums hold a NaN or an infinity."""
        return [
            name
            for name, total in self._sums.items()
            # The sum is the faster look; it may also overflow where no entry does.
            if not (torch.isfinite(total.sum()) or torch.isfinite(total).all())
        ]

    def _importance(self, **metadata: Any) -> Importance:
        if self._broken:
            raise RuntimeError(
                "an observe() failed after its backward pass had begun, so that the sums hold a "
                "part of a batch; make a new FisherEstimator."
            )
        if self._samples == 0:
            raise RuntimeError("nothing was observed: finalize() needs at least one observe().")
        if names := self._non_finite():
            raise ValueError(
                f"the squared gradients of parameter {names[0]!r} are not finite ({len(names)} of "
                f"{len(self._sums)} parameters): an observed loss overflowed or was NaN."
            )
        sums = {name: total.clone() for name, total in self._sums.items()}
        common = {"sample": "sequence", **_provenance(self._model, self._trained())}
        return Importance(sums, self._samples, self._tokens, {**metadata, **common})

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    def _check_unchanged(self, parameters: dict[str, nn.Parameter]) -> None:
        """Refuse parameters other than those at the start; follow those that were moved."""
        shapes = {name: total.shape for name, total in self._sums.items()}
        for name in {**shapes, **parameters}:
            if name not in parameters or parameters[name].shape != shapes.get(name):
                raise ValueError(
                    f"parameter {name!r} was added, removed, frozen, unfrozen or reshaped after "
                    f"the FisherEstimator was made; make a new one."
                )
        for name, parameter in parameters.items():
            self._sums[name] = self._sums[name].to(parameter.device)


def _provenance(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """What made an importance: versions, time, and the model by names, shapes and dtypes."""
    return {
        "cl_optim": __version__,
        "torch": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": {
                name: {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}
                for name, p in parameters.items()
            },
        },
    }
