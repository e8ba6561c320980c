"""FisherEstimator: the empirical Fisher information of a loss, during ordinary training."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from cl_optim._version import __version__
from cl_optim.fisher import nested
from cl_optim.fisher.alignment import not_samples
from cl_optim.fisher.check import Check
from cl_optim.fisher.language import loss_tokens
from cl_optim.fisher.loss_scale import CrossEntropy, calling_scaler, watch
from cl_optim.fisher.observation import Observation, in_backward
from cl_optim.fisher.refusals import Policy
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.taps import Graph
from cl_optim.importance.importance import Importance
from cl_optim.importance.unobserved import is_unobserved
from cl_optim.ops.capture import is_capturing

Verify: TypeAlias = Literal["first"] | bool
Number: TypeAlias = int | float | Tensor
# Cross entropy as it was found, what its loss is said to be divided by, and N if that is said to be
# the number of samples.
Claim: TypeAlias = tuple[CrossEntropy, Number, int | None]
LossTerms: TypeAlias = (
    Literal["samples", "tokens"] | Number | Callable[[tuple[Any, ...], dict[str, Any]], Number]
)


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
    layer's input counts (or, in a packed batch, one run of tokens), so that for inputs
    [N, T, features] it is a sequence, whose tokens' gradients add before the square. The
    parameters' ``grad`` is what it would be without, up to rounding.

    Where the training loop should stay as it is, :meth:`attach` observes it from the outside:

    .. code-block:: python

        fisher = FisherEstimator(model, during_training=True, decay=0.999)
        fisher.attach(optimizer)
        train(model, optimizer, batches)
        importance = fisher.finalize()

    Observed are the parameters that require gradients when the estimator is made, where they are
    used by linear (also ``@`` and addmm), embedding, conv1d to conv3d, layer, RMS, group and (eval
    mode) batch norm, multi-head attention, or added to or multiplied with what the samples give;
    several times, tied, through views, and inside activation checkpointing, too. Any other use is
    an error that names the parameter; :func:`cl_optim.register_fisher_rule` teaches a new one.
    Memory: one tensor per parameter for the sums, float32 (float64 for float64 parameters), and a
    bounded chunk.

    On a GPU, gradients of rows of a table that is looked up (an embedding), and of the rows of one
    sample where samples are packed or routed to experts, are added atomically, in any order: sums
    differ in rounding from run to run, unless ``torch.use_deterministic_algorithms(True)``.

    Args:
        model: The model whose parameters are observed.
        unsupported: What happens to a parameter that is used in an unsupported way: ``"error"``,
            or ``"skip"``, which leaves it out and lists it in the importance's metadata.
        verify: Check that the gradients put together from what was captured are the parameters'
            gradients: in the ``"first"`` batch, in each (``True``) or not at all. It finds uses
            that were missed and wrong rules. And, where a parameter is used for the first time,
            that the rows of what it meets are the samples: two more forward passes of the model
            itself, in eval mode, without a backward pass, in which reversed samples must reverse
            them. It finds experts that get as many rows as there are samples, and sequences as
            long as the batch whose positions come first. It cannot be made of packed batches, or
            where the model's first tensor does not begin with the samples, and does not tell
            samples from positions where the model does not, either; :func:`estimate_fisher` has the
            losses of single samples, and finds these, too. Waits for the device.
        during_training: Allow :meth:`attach`.
        decay: What remains of sums and counts after each optimizer step
            (:meth:`apply_decay`), in (0, 1].

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has no parameter that requires gradients, or a complex one; or an argument
            is not one of its values.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unsupported: Literal["error", "skip"] = "error",
        verify: Verify = "first",
        during_training: bool = False,
        decay: float = 1.0,
    ) -> None:
        check_model(model)
        if unsupported not in ("error", "skip"):
            raise ValueError(
                f"unsupported must be 'error' or 'skip', not {unsupported!r}; random signs need "
                f"the losses of single samples: use estimate_fisher(..., unsupported='sign')."
            )
        check_verify(verify)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], not {decay}.")
        self._model = model
        self._verify = verify
        self._during_training = during_training
        self._decay = decay
        self._policy = Policy(unsupported)
        self._totals = Totals(model)
        self._known_rows: set[str] = set()  # parameters whose inputs' rows are known to be samples
        self._observing: Observation | None = None
        self._attached: _Attachment | None = None

    @contextmanager
    def observe(
        self,
        batch_size: int | None = None,
        loss_terms: Number | None = None,
        loss_scale: Number = 1.0,
        *,
        tokens: int | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Add one batch: goes around one forward pass and its backward pass.

        With gradient accumulation, each micro-batch gets an ``observe()`` of its own. Several
        forward passes over the same samples, whose losses are added up before one backward pass,
        belong into one. Forward passes under ``no_grad`` are not observed. What got no gradient (an
        unused head) adds zero. After an error in the forward pass the sums are as before; one that
        comes when the backward pass has begun leaves them incomplete, and :meth:`finalize` then
        refuses.

        Args:
            batch_size: Number of samples N, the leading dimension of every layer's input. (Layers
                that see [N·T, features] are understood where another tensor shows T.)
            loss_terms: What the loss, a mean, was divided by. Default: ``batch_size``; 1 for a sum
                over samples; the number of loss tokens where it is a mean over tokens. A number or
                a tensor of one element.
            loss_scale: What the loss was multiplied by: the scale of mixed-precision training,
                times 1/steps with gradient accumulation. A number or a tensor of one element.
            tokens: Number of tokens that the loss counts. Default: every position of [N, T] inputs,
                or none where there are no sequences. Matters only to ``Importance.per_token()``.
            cu_seqlens: For a packed batch, whose inputs are [1, ΣT, ...] or [ΣT, ...]: the N + 1
                offsets where sequences begin and the last one ends. Best a list or on the CPU: it
                is needed there. Attention and positions must keep the sequences apart themselves.

        Raises:
            TypeError: An argument is not a number.
            ValueError: An argument is out of range; an input's leading dimension is not
                ``batch_size``; or the model's trained parameters are not what they were.
            NotImplementedError: A parameter is used in a way that is not supported.
            RuntimeError: No backward pass ran inside, or two did; or inside another ``observe()``,
                or while a CUDA graph is captured; or the self-check failed; or ``loss_terms`` was
                left out, and the gradient of the logits shows that cross entropy was not a mean
                over samples.
        """
        samples = _samples(batch_size, cu_seqlens)
        if tokens is not None:
            check_integer("tokens", tokens, 0)
        terms = samples.count if loss_terms is None else loss_terms
        for argument, number in (("loss_terms", terms), ("loss_scale", loss_scale)):
            _check_number(argument, number)
        if self._observing is not None or self._attached is not None:
            raise RuntimeError("observe() cannot be used inside another observe(), or attached.")
        factor = terms / loss_scale
        observation = self._begin(samples, lambda: self._totals.begin(factor))
        self._observing = observation

        found: list[CrossEntropy] = []

        def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled() or in_backward() or is_unobserved():
                return
            self._check_rows(observation, args, kwargs)
            if loss_terms is None and observation.is_checked():
                for tensor in nested.tensors(output):
                    watch(tensor, found)

        hook = self._model.register_forward_hook(_Hook(check), with_kwargs=True)
        try:
            with eagerly(), observation:
                yield
            observation.finish()
            _refuse_contradiction([(each, terms, samples.count) for each in found], loss_scale)
        except CheckpointError as error:
            self._totals.broken |= observation.changed
            raise NotImplementedError(
                "a function inside an activation checkpoint uses parameters in a way that cannot "
                "be seen when it runs again in the backward pass: checkpoint a module, not a "
                "function that uses parameters itself."
            ) from error
        except BaseException:
            self._totals.broken |= observation.changed
            raise
        finally:
            self._observing = None
            hook.remove()
            observation.close()
        self._totals.count(samples.count, samples.tokens if tokens is None else tokens)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        loss_terms: LossTerms = "samples",
        accumulation_steps: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Attached:
        """Observe training from the outside, until :meth:`detach`.

        Each forward pass of the model in training mode whose backward pass comes is a batch; each
        step of the optimizer decays what has been summed. Evaluation, in eval mode or under
        ``no_grad``, forward passes without a backward pass, gradients of inputs alone and the
        closures of GEM's memories are not observed. Call the model itself, once per batch: what the
        loop does with its submodules, or with two forward passes in one backward pass, needs
        :meth:`observe`. A compiled model is run uncompiled meanwhile; the estimator is made of what
        ``torch.compile`` returned.

        What the loss was multiplied with is found where it can be, and what contradicts the
        arguments is refused. Until the first step, batches are kept in a second tensor per
        parameter, so that none of a wrong scale is added. A GradScaler is known by its ``step()``.
        Accumulated gradients do not say if the losses were divided by the number of micro-batches:
        that needs ``accumulation_steps``. That cross entropy is a sum, or a mean over fewer targets
        than ``loss_terms`` says, is seen in the gradient of the logits that the model returns; of
        other losses that are sums, ``loss_terms`` must say it. (``verify=False`` looks at none.)

        Args:
            optimizer: Its steps are the ones that count.
            loss_terms: What the loss is divided by. ``"samples"``: it is a mean over the leading
                dimension of the model's first tensor. ``"tokens"``: over the tokens whose
                ``labels`` are not −100 (of a causal language model, without the first position), as
                the losses in transformers are; all tokens, if the model is not given ``labels``. A
                number, e.g. 1 for a sum; or a function of the model's ``args`` and ``kwargs`` that
                returns one, or a tensor of one element.
            accumulation_steps: What the loss is divided by besides, for gradient accumulation: 1
                if gradients accumulate and it is not. Default: there is one batch per step, or the
                model is given ``num_items_in_batch`` as by transformers' Trainer, with
                ``loss_terms="tokens"``: that divides by the tokens of all micro-batches at once.
            scaler: The GradScaler that scales the loss. Default: the one whose ``step()`` takes the
                first step. A batch whose gradients overflow is dropped whole, on the device, and
                counted in the metadata, at the price of a second tensor per parameter.

        Returns:
            A handle; its ``remove()``, or leaving it as a context, is :meth:`detach`.

        Raises:
            ValueError: The estimator was not made with ``during_training=True``, or an argument is
                out of range.
            RuntimeError: It is attached already. Later, from the model: an input's rows are not the
                samples, or a CUDA graph is being captured. From ``backward()``: two forward passes
                are in it, or it is the second through one. From ``optimizer.step()``: no batch was
                observed since the last step, or what its loss was multiplied with is not known.
        """
        if not self._during_training:
            raise ValueError(
                "attach() needs an estimator for it: FisherEstimator(model, during_training=True)."
            )
        if self._attached is not None or self._observing is not None:
            raise RuntimeError("the estimator is attached already, or inside observe().")
        if accumulation_steps is not None:
            check_integer("accumulation_steps", accumulation_steps, 1)
        if isinstance(loss_terms, str) and loss_terms not in ("samples", "tokens"):
            raise ValueError(
                f"loss_terms must be 'samples', 'tokens', a number or a function, not "
                f"{loss_terms!r}."
            )
        if not isinstance(loss_terms, str) and not callable(loss_terms):
            _check_number("loss_terms", loss_terms)
        self._attached = _Attachment(self, optimizer, loss_terms, accumulation_steps, scaler)
        return self._attached.handle

    def detach(self) -> None:
        """End what :meth:`attach` began. Nothing happens if it was not called."""
        if self._attached is not None:
            attached, self._attached = self._attached, None
            attached.remove()

    def apply_decay(self) -> None:
        """Decay what has been summed: call it once per optimizer step (:meth:`attach` does)."""
        self._totals.decay(self._decay)

    def finalize(self) -> Importance:
        """Return the importance so far, as a copy: observing may go on.

        Raises:
            RuntimeError: Nothing was observed, or an ``observe()`` failed in its backward pass.
            ValueError: A sum is not finite.
        """
        if self._attached is not None:
            self._attached.settle()
        metadata: dict[str, Any] = {"estimator": "FisherEstimator", "labels": "empirical"}
        if self._during_training:
            metadata |= {"during_training": True, "decay": self._decay}
        return self._totals.importance(self._model, self._policy, **metadata)

    def state_dict(self) -> dict[str, Any]:
        """What was observed so far, between two batches: for a checkpoint.

        The sums are the estimator's own tensors, as in torch's state dicts.

        Raises:
            RuntimeError: Inside ``observe()``, or one failed in its backward pass.
        """
        if self._observing is not None:
            raise RuntimeError("inside observe() there is no state: half a batch may be summed.")
        if self._attached is not None:
            self._attached.settle()
        return {
            **self._totals.state_dict(),
            "left": dict(self._policy.left),
            "shared": dict(self._policy.shared),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, for the same model.

        Raises:
            ValueError: It is of other parameters. Nothing has been changed then.
            RuntimeError: Inside ``observe()``.
        """
        self.check_state_dict(state_dict)
        if self._observing is not None:
            raise RuntimeError("a state cannot be loaded inside observe().")
        self._totals.load_state_dict(state_dict)
        if self._attached is not None:
            self._attached.restart()
        self._policy.left = dict(state_dict["left"])
        self._policy.shared = dict(state_dict["shared"])

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError if the state is of other parameters."""
        own, sums = self._totals.sums, state_dict["sums"]
        for name in {**own, **sums}:
            if name not in own or name not in sums or own[name].shape != sums[name].shape:
                raise ValueError(
                    f"the state must be of the same parameters; {name!r} is not in both, or has "
                    "another shape."
                )

    def _begin(self, samples: Samples, begin: Callable[[], Mapping[str, Tensor]]) -> Observation:
        """Start a batch; ``begin`` is called when its backward pass comes."""
        if is_capturing():
            raise RuntimeError(
                "a batch cannot be observed while a CUDA graph is being captured: samples are "
                "counted in Python, once and not at each replay. Observe batches that run without "
                "a graph, or detach() before the capture."
            )
        totals = self._totals
        parameters = totals.check_unchanged(self._model)
        checked = self._verify is True or (self._verify == "first" and totals.seen() == 0)
        observation = Observation(
            parameters,
            totals.sums,
            samples,
            self._policy,
            check=Check() if checked else None,
            begin=begin,
        )
        observation.open()
        return observation

    def _check_rows(self, observation: Observation, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse parameters that meet, for the first time, rows that are not the samples."""
        samples, used = observation.samples, observation.used()
        first = next((t for t in nested.tensors((args, kwargs)) if t.dim() > 0), None)
        if samples.offsets is not None or first is None or len(first) != samples.count:
            return  # there is nothing to reverse
        if not self._verify or samples.count < 2:
            return
        if self._verify != "first" or not used <= self._known_rows:
            observation.paused = True
            wrong = not_samples(self._model, args, kwargs, samples.count, self._unsummed)
            observation.paused = False
            observation.refuse_rows(wrong)
            self._known_rows |= used

    def _unsummed(self, samples: Samples) -> Observation:
        """Make an observation of a forward pass alone."""
        policy = Policy(self._policy.mode, dict(self._policy.left), dict(self._policy.shared))
        return Observation(trained(self._model), self._totals.sums, samples, policy)


class _Batches:
    """What has been summed, and of how many samples; kept in the units of the last batch's loss.

    A loss is usually a mean, perhaps scaled. Its squared gradients are summed as they come and the
    whole multiplied when the factor changes, since a product with each gradient would cost more.
    """

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums = sums
        self.empty()

    def empty(self) -> None:
        """Forget all batches."""
        with torch.no_grad():
            for total in self.sums.values():
                total.zero_()
        self.batches = 0
        self.samples: Number = 0
        self.tokens: Number | None = None
        self.unit: Number | None = None  # what the sums are to be multiplied by

    def begin(self, factor: Number) -> Mapping[str, Tensor]:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        self.use(factor * factor)
        return self.sums

    def use(self, unit: Number) -> None:
        """Keep the sums in that unit."""
        if self.unit is not None and (
            isinstance(unit, Tensor) or isinstance(self.unit, Tensor) or unit != self.unit
        ):
            _scale(list(self.sums.values()), self.unit / unit)
        self.unit = unit

    def finite(self) -> Tensor:
        """Whether all sums are finite."""
        device = next(iter(self.sums.values())).device
        each = [total.isfinite().all().to(device) for total in self.sums.values()]
        return torch.stack(each).all()

    def count(self, samples: Number, tokens: Number | None, batches: int = 1) -> None:
        """Count batches that were observed to their end."""
        if self.batches == 0:
            self.tokens = tokens
        elif tokens is None or self.tokens is None:
            self.tokens = None
        else:
            self.tokens = self.tokens + tokens
        self.batches += batches
        self.samples = self.samples + samples


class Totals(_Batches):
    """The sums of an estimator.

    Attributes:
        staged: Batches that are not yet known to be finite, or what their loss was divided by.
        dropping: Whether what is staged and not finite is dropped, and counted.
    """

    def __init__(self, model: nn.Module) -> None:
        sums: dict[str, Tensor] = {}
        for name, parameter in trained(model).items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be of a real floating-point dtype, not "
                    f"{parameter.dtype}."
                )
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            sums[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        if not sums:
            raise ValueError("model has no parameters that require gradients.")
        super().__init__(sums)
        self.broken = False
        self.staged: _Batches | None = None
        self.dropping = False
        self._dropped: Number = 0

    def state_dict(self) -> dict[str, Any]:
        """All but what is being observed."""
        self._check_whole()
        return {
            "sums": dict(self.sums),
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "unit": self.unit,
            "dropped": self._dropped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, in the tensors that there are."""
        with torch.no_grad():
            for name, total in self.sums.items():
                total.copy_(state_dict["sums"][name])
        if self.staged is not None:
            self.staged.empty()
        self.broken = False
        self.batches = state_dict["batches"]
        device = next(iter(self.sums.values())).device
        counts: list[Any] = [
            value.to(device, copy=True) if isinstance(value, Tensor) else value
            for value in map(state_dict.get, ("samples", "tokens", "unit", "dropped"))
        ]
        self.samples, self.tokens, self.unit, self._dropped = counts

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError(
                "an observe() failed after its backward pass had begun, so that the sums hold a "
                "part of a batch; make a new FisherEstimator."
            )

    def stage(self) -> None:
        """From now on, keep batches apart until :meth:`commit`."""
        if self.staged is None:
            self.staged = _Batches({name: torch.zeros_like(t) for name, t in self.sums.items()})

    def unstage(self) -> None:
        """From now on, add batches as they come."""
        self.staged = None

    def seen(self) -> int:
        """The number of batches that were observed to their end."""
        return self.batches + (0 if self.staged is None else self.staged.batches)

    def begin(self, factor: Number) -> Mapping[str, Tensor]:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        return super().begin(factor) if self.staged is None else self.staged.begin(factor)

    def count(self, samples: Number, tokens: Number | None, batches: int = 1) -> None:
        """Count batches that were observed to their end."""
        if self.staged is None:
            super().count(samples, tokens, batches)
        else:
            self.staged.count(samples, tokens, batches)

    def discard(self) -> None:
        """Forget the batches that are staged; where there is no stage, the sums hold them."""
        if self.staged is None:
            self.broken = True
        else:
            self.staged.empty()

    def commit(self, scale: Number = 1.0) -> None:
        """Add what is staged, whose loss was multiplied by ``scale`` besides."""
        staged = self.staged
        if staged is None or staged.batches == 0:
            return
        assert staged.unit is not None
        self.use(staged.unit / (scale * scale))
        finite = staged.finite() if self.dropping else None
        with torch.no_grad():
            for total, value in zip(self.sums.values(), staged.sums.values(), strict=True):
                total += value if finite is None else torch.where(finite.to(value.device), value, 0)
        kept: Number = 1 if finite is None else finite.double()
        self._dropped = self._dropped + staged.samples * (1 - kept)
        tokens = None if staged.tokens is None else staged.tokens * kept
        super().count(staged.samples * kept, tokens, staged.batches)
        staged.empty()

    def decay(self, decay: float) -> None:
        """Multiply sums and counts; the sums together with the next change of units."""
        if decay == 1.0:
            return
        self.unit = None if self.unit is None else self.unit * decay
        self.samples = self.samples * decay
        self.tokens = None if self.tokens is None else self.tokens * decay

    def overflowed(self) -> bool:
        """Whether some sum is not finite. Waits for the device once."""
        device = next(iter(self.sums.values())).device
        wholes = torch.stack([total.sum().float().to(device) for total in self.sums.values()])
        return not bool(wholes.isfinite().all())

    def non_finite(self) -> list[str]:
        """Names of the parameters whose sums hold a NaN or an infinity."""
        return [
            name
            for name, total in self.sums.items()
            # The sum is the faster look; it may also overflow where no entry does.
            if not (torch.isfinite(total.sum()) or torch.isfinite(total).all())
        ]

    def importance(self, model: nn.Module, policy: Policy, **metadata: Any) -> Importance:
        """Return a copy of the sums as an importance."""
        self._check_whole()
        if self.batches == 0:
            raise RuntimeError("nothing was observed: finalize() needs at least one observe().")
        skipped = policy.left if policy.mode == "skip" else {}
        if names := [name for name in self.non_finite() if name not in skipped]:
            raise ValueError(
                f"the squared gradients of parameter {names[0]!r} are not finite ({len(names)} of "
                f"{len(self.sums)} parameters): an observed loss overflowed or was NaN."
            )
        if float(self.samples) == 0.0:
            raise ValueError("every batch overflowed and was dropped; nothing was observed.")
        unit = 1.0 if self.unit is None else self.unit
        sums = {k: total * unit for k, total in self.sums.items() if k not in skipped}
        tokens = None if self.tokens is None else _plain(self.tokens)
        if skipped:
            metadata["skipped"] = dict(skipped)
        if self.dropping:
            metadata["dropped_samples"] = _plain(self._dropped)
        common = {"sample": "sequence", **provenance(model, trained(model))}
        return Importance(sums, _plain(self.samples), tokens, {**metadata, **common})

    def check_unchanged(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Refuse parameters other than those at the start; follow those that were moved."""
        parameters = trained(model)
        shapes = {name: total.shape for name, total in self.sums.items()}
        for name in {**shapes, **parameters}:
            if name not in parameters or parameters[name].shape != shapes.get(name):
                raise ValueError(
                    f"parameter {name!r} was added, removed, frozen, unfrozen or reshaped after "
                    f"the FisherEstimator was made; make a new one."
                )
        for name, parameter in parameters.items():
            self.sums[name] = self.sums[name].to(parameter.device)
            if self.staged is not None:
                self.staged.sums[name] = self.staged.sums[name].to(parameter.device)
        return parameters


@dataclass(eq=False)
class _Batch:
    """A forward pass that an attached estimator has seen, until its backward pass is over.

    Attributes:
        observation: Of it.
        terms: What its loss, a mean, is divided by.
        whole: Whether that counts all micro-batches of a step.
        found: Cross entropy in the gradients of what the model returned.
        reached: Whether a backward pass has come to it.
        complete: Whether a backward pass through it has ended, without an error.
    """

    observation: Observation
    terms: Number
    whole: bool = False
    found: list[CrossEntropy] = field(default_factory=list)
    reached: bool = False
    complete: bool = False


class _Attachment:
    """What :meth:`FisherEstimator.attach` hangs on a model and an optimizer."""

    def __init__(
        self,
        estimator: FisherEstimator,
        optimizer: torch.optim.Optimizer,
        loss_terms: LossTerms,
        accumulation_steps: int | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._estimator = estimator
        self._loss_terms = loss_terms
        self._accumulation_steps = accumulation_steps
        self._scaler = scaler
        self._scaler_state: object = None
        self._totals = totals = estimator._totals
        totals.stage()
        totals.dropping |= scaler is not None
        self._proven = False  # whether a step has shown what the loss is multiplied with
        self._read = False  # whether batches were added before
        self._undivided = 0  # since the last step, of which it is not known what divided their loss
        self._claims: list[Claim] = []
        self._open: list[_Batch] = []
        self._entered: list[_Batch | None] = []
        self._eager: AbstractContextManager[object] = nullcontext()
        self._batches = totals.seen()
        self._refuse_tracing = torch.compiler.disable(_refuse_tracing)  # type: ignore[no-untyped-call]
        self._model = model = estimator._model
        # A model that was compiled in place would be traced with its hooks.
        self._compiled, model._compiled_call_impl = model._compiled_call_impl, None
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
            optimizer.register_step_pre_hook(self._stepping),
            optimizer.register_step_post_hook(self._stepped),
        ]
        self.handle = Attached(estimator)

    def remove(self) -> None:
        """Remove all hooks; a batch whose backward pass has run is counted."""
        for hook in self._hooks:
            hook.remove()
        self._model._compiled_call_impl = self._compiled
        try:
            self.settle()
        finally:
            self._close_all()
            self._totals.unstage()

    # --- forward and backward passes ----------------------------------------------------------

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a batch with the model's forward pass."""
        if torch.compiler.is_dynamo_compiling():
            self._refuse_tracing()
        observed = module.training and torch.is_grad_enabled() and not is_unobserved()
        if in_backward() or not observed:
            if not in_backward():
                self.finish()  # what was begun before does not see these passes
            self._entered.append(None)
            return
        self.finish()
        first = next((t for t in nested.tensors((args, kwargs)) if t.dim() > 0), None)
        if first is None:
            raise ValueError("the model was called without a tensor that has samples.")
        samples = Samples(len(first))
        for tensor in nested.tensors((args, kwargs)):
            samples.see(tensor.shape)
        batch = self._claim(module, len(first), args, kwargs, samples)
        self._open.append(batch)
        self._eager = eagerly()
        self._eager.__enter__()
        batch.observation.enter()
        self._entered.append(batch)

    def _claim(
        self, model: nn.Module, count: int, args: Any, kwargs: dict[str, Any], samples: Samples
    ) -> _Batch:
        """Make a batch of what its loss is said to be divided by."""
        loss_terms, whole = self._loss_terms, False
        terms: Number
        if callable(loss_terms) and not isinstance(loss_terms, Tensor):
            terms = loss_terms(args, kwargs)
        elif not isinstance(loss_terms, str):
            terms = loss_terms
        elif loss_terms == "samples":
            terms = count
        else:
            terms = loss_tokens(model, args, kwargs)
            whole = kwargs.get("num_items_in_batch") is not None
            if whole and (self._accumulation_steps or 1) > 1:
                raise ValueError(
                    f"the model is given num_items_in_batch, which counts the tokens of all "
                    f"micro-batches, so that its loss is not divided by accumulation_steps = "
                    f"{self._accumulation_steps} besides: leave accumulation_steps out of attach()."
                )
        observation = self._estimator._begin(samples, lambda: self._begin(batch))
        batch = _Batch(observation, terms, whole)
        return batch

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        batch = self._entered.pop() if self._entered else None
        if batch is None:
            return
        observation = batch.observation
        observation.leave()
        try:
            if output is not None or sys.exc_info()[1] is None:  # the forward pass did not fail
                self._estimator._check_rows(observation, args, kwargs)
        except BaseException:
            self._open.remove(batch)
            observation.close()
            raise
        finally:
            self._eager.__exit__(None, None, None)
        observation.expect_backward()
        graph = observation.release()
        for tensor in nested.tensors(output):
            if tensor.grad_fn is not None:
                # Until its backward pass comes here, what is recomputed is of another one.
                observation.active = False
                tensor.grad_fn.register_prehook(self._output_hook(batch, graph))
                checked = observation.is_checked() or not self._proven
                if checked and self._estimator._verify and isinstance(self._loss_terms, str):
                    watch(tensor, batch.found)

    def _output_hook(
        self, batch: _Batch, graph: Graph
    ) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(grads: Sequence[Tensor | None], graph: Graph = graph) -> None:
            if not batch.observation.closed:
                self._reach(batch)

        return hook

    def _reach(self, batch: _Batch) -> None:
        """Take note of whose backward pass runs."""
        for other in [other for other in self._open if other is not batch and other.reached]:
            if not other.complete:
                self._finish(other)
                self._open.remove(batch)
                batch.observation.close()
                raise RuntimeError(
                    "two forward passes of the model are in one backward pass, and whether row n "
                    "of both is one sample cannot be told: attached, give each a backward pass of "
                    "its own; where it is one sample, use observe(batch_size=...) around all."
                )
            self._finish(other)
        if not batch.reached:
            batch.reached = batch.observation.active = True
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: setattr(batch, "complete", True))

    def _begin(self, batch: _Batch) -> Mapping[str, Tensor]:
        """Begin to sum, in a backward pass, what is multiplied by this batch's factor."""
        self._reach(batch)
        state = getattr(self._scaler, "_per_optimizer_states", None)
        parameters = trained(self._model).values()
        if state is not self._scaler_state or all(p.grad is None for p in parameters):
            self._scaler_state = state
            self._undivided = 0  # a step was left out, or this is the first batch after one
            self._claims.clear()
        scale: Number = 1.0 if batch.whole else 1.0 / (self._accumulation_steps or 1)
        if self._scaler is not None:
            scale = self._scale() * scale
        return self._totals.begin(batch.terms / scale)

    def _scale(self) -> Tensor:
        assert self._scaler is not None
        device = next(iter(self._totals.sums.values())).device
        return self._scaler.scale(torch.ones((), device=device))

    def finish(self) -> None:
        """End the batch whose backward pass has run, if there is one."""
        for batch in list(self._open):
            if batch.reached or not batch.observation.is_alive():
                self._finish(batch)

    def _finish(self, batch: _Batch) -> None:
        """End a batch; if its backward pass was for something else, or was none, leave it out."""
        observation = batch.observation
        if not observation.changed and observation.is_alive():
            batch.reached = batch.complete = observation.active = False
            return  # that of the parameters may come yet
        self._open.remove(batch)
        try:
            if observation.changed and (observation.failed or not batch.complete):
                self._drop()  # an error has ended it, which the loop has caught
            elif observation.changed:
                observation.finish()
                self._count(batch)
        except BaseException:
            self._drop()
            raise
        finally:
            observation.close()

    def _count(self, batch: _Batch) -> None:
        samples = batch.observation.samples
        self._totals.count(samples.count, samples.tokens)
        self._undivided += not batch.whole
        mean_over = samples.count if self._loss_terms == "samples" else None
        self._claims += [(found, batch.terms, mean_over) for found in batch.found]
        if self._proven:
            self._totals.commit()

    def _drop(self) -> None:
        """Forget the batches since the last step; where the sums hold some, they are broken."""
        self._totals.discard()
        self._totals.broken |= self._read
        self._undivided = 0
        self._claims.clear()

    def _close_all(self) -> None:
        for batch in self._open:
            batch.observation.close()
        self._open.clear()

    def restart(self) -> None:
        """Drop the batch that was begun: the sums have been set to others."""
        self._close_all()
        self._undivided = 0
        self._claims.clear()
        self._batches = self._totals.seen()

    # --- steps --------------------------------------------------------------------------------

    def _stepping(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.finish()
        scaler = calling_scaler() if self._scaler is None else None
        if scaler is not None and (self._proven or self._read):
            self._totals.broken = True
            raise RuntimeError(
                "a GradScaler takes this step, but batches were added without its scale: pass it "
                "to attach(optimizer, scaler=...)."
            )
        self._judge(scaler)
        self._undivided = 0
        self._proven |= self._totals.seen() > self._batches
        if self._proven and self._scaler is None:
            self._totals.unstage()

    def _judge(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Add what is staged, if what its losses were multiplied with is known."""
        try:
            if self._undivided > 1 and self._accumulation_steps is None:
                raise RuntimeError(
                    f"{self._undivided} backward passes came before this step, and whether their "
                    f"losses were divided by that, for gradient accumulation, cannot be told: pass "
                    f"accumulation_steps={self._undivided} to attach() if they were, "
                    f"accumulation_steps=1 if not."
                )
            scale: Number = 1.0
            if scaler is not None:
                self._scaler, self._totals.dropping = scaler, True
                scale = self._scale()
            self._check_claims()
        except RuntimeError:
            self._drop()
            raise
        self._totals.commit(scale)

    def _check_claims(self) -> None:
        """Compare what is claimed of the loss with what was found of it. Waits for the device."""
        claims, self._claims = self._claims, []
        if not claims:
            return
        scale = 1.0 if self._scaler is None else self._scale()
        _refuse_contradiction(claims, scale / (self._accumulation_steps or 1))

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.finish()  # of a closure that the step has called
        totals = self._totals
        if totals.seen() == self._batches:
            raise RuntimeError(
                "the optimizer took a step, but no batch was observed before it: call the model "
                "itself, which the FisherEstimator was made of (of a compiled one: what "
                "torch.compile returned), in training mode, or use observe() instead of attach()."
            )
        if not self._proven:
            self._undivided = 0
            self._judge()
            self._proven = True
            totals.unstage()
        self._batches = totals.seen()
        self._estimator.apply_decay()

    def settle(self) -> None:
        """Add what has been observed so far."""
        self.finish()
        if not self._proven and self._totals.seen() > self._batches:
            self._judge()
            self._read = True


def _refuse_contradiction(claims: Iterable[Claim], scale: Number) -> None:
    """Refuse a loss that is not divided by what it is said to be, if it is certain."""
    for found, terms, samples in claims:
        if wrong := found.contradiction(float(terms), float(scale), samples):
            raise RuntimeError(f"the loss that was backpropagated {wrong}.")


def _refuse_tracing() -> None:
    raise RuntimeError(
        "a model that was compiled after attach(), or around the one that the FisherEstimator has, "
        "cannot be observed: make the FisherEstimator of what torch.compile returned."
    )


class _Hook:
    """A hook of a model that a copy of the model, or a file of it, has without effect."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Attached:
    """What :meth:`FisherEstimator.attach` returns: ends it, by hand or as a context."""

    def __init__(self, estimator: FisherEstimator) -> None:
        self._estimator = estimator

    def remove(self) -> None:
        """Detach the estimator."""
        self._estimator.detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def eagerly() -> AbstractContextManager[object]:
    """Run compiled modules uncompiled: the compiler would trace the interception, too."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def provenance(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
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


def check_model(model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")


def check_verify(verify: object) -> None:
    """Refuse other values of ``verify``."""
    if verify not in ("first", True, False):
        raise ValueError(f"verify must be 'first', True or False, not {verify!r}.")


def check_integer(argument: str, value: object, least: int) -> None:
    """Refuse what is no integer, or below ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, not {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, not {value}.")


def _check_number(argument: str, value: object) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return  # its value would have to be waited for
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number, not {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, not {value}.")


def _samples(batch_size: int | None, cu_seqlens: Tensor | Sequence[int] | None) -> Samples:
    if cu_seqlens is None:
        if batch_size is None:
            raise TypeError("observe() needs batch_size, or cu_seqlens for a packed batch.")
        check_integer("batch_size", batch_size, 1)
        return Samples(batch_size)
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if len(offsets) < 2 or offsets[0] != 0 or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens must be increasing offsets from 0 to the number of tokens, not {offsets}."
        )
    if batch_size not in (None, len(offsets) - 1):
        raise ValueError(
            f"batch_size is {batch_size}, but cu_seqlens has offsets of {len(offsets) - 1} samples."
        )
    return Samples(len(offsets) - 1, offsets)


def _scale(tensors: list[Tensor], factor: Number) -> None:
    """Multiply all tensors in place."""
    with torch.no_grad():
        if isinstance(factor, Tensor):
            for tensor in tensors:
                tensor.mul_(factor.to(tensor.device))
        else:
            torch._foreach_mul_(tensors, factor)


def _plain(number: Number) -> int | float:
    """A number that JSON holds; whole ones as integers."""
    value = float(number)
    return int(value) if value == int(value) else value
