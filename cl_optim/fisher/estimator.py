"""FisherEstimator: the empirical Fisher information of a loss, during ordinary training."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from cl_optim._version import __version__
from cl_optim.fisher import nested
from cl_optim.fisher.check import Check
from cl_optim.fisher.language import loss_tokens
from cl_optim.fisher.observation import Observation, in_backward
from cl_optim.fisher.refusals import Policy
from cl_optim.fisher.samples import Samples
from cl_optim.importance.importance import Importance
from cl_optim.importance.unobserved import is_unobserved

Verify: TypeAlias = Literal["first"] | bool
Number: TypeAlias = int | float | Tensor
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
    layer's input counts, so that for inputs [N, T, features] it is a sequence, whose tokens'
    gradients add before the square. The parameters' ``grad`` is what it would be without, up to
    rounding.

    Where the training loop should stay as it is, :meth:`attach` observes it from the outside:

    .. code-block:: python

        fisher = FisherEstimator(model, during_training=True, decay=0.999)
        fisher.attach(optimizer)
        ...                                             # train
        importance = fisher.finalize()

    Observed are the parameters that require gradients when the estimator is made, where they are
    used by linear (also ``@`` and addmm), embedding, conv1d to conv3d, layer, RMS, group and (eval
    mode) batch norm, multi-head attention, or added to or multiplied with what the samples give;
    several times, tied, through views, and inside activation checkpointing, too. Any other use is
    an error that names the parameter; :func:`cl_optim.register_fisher_rule` teaches a new one.
    Memory: one tensor per parameter for the sums, float32 (float64 for float64 parameters), and a
    bounded chunk.

    Args:
        model: The model whose parameters are observed.
        sample: What a sample is: ``"sequence"``, everything under one index of the leading
            dimension (or, in a packed batch, one run of tokens). There is no other choice yet.
        unsupported: What happens to a parameter that is used in an unsupported way: ``"error"``,
            or ``"skip"``, which leaves it out and lists it in the importance's metadata.
        verify: Check that the gradients put together from what was captured are the parameters'
            gradients: in the ``"first"`` batch, in each (``True``) or not at all. It finds uses
            that were missed and wrong rules. A wrong sample axis it does not find, since sums over
            it come out the same; :func:`estimate_fisher` has the losses of single samples and
            checks that, too. Waits for the device.
        during_training: Allow :meth:`attach`.
        decay: What remains of sums and counts after each optimizer step (:meth:`step`), in (0, 1].

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
        sample: Literal["sequence"] = "sequence",
        unsupported: Literal["error", "skip", "sign"] = "error",
        *,
        verify: Verify = "first",
        during_training: bool = False,
        decay: float = 1.0,
    ) -> None:
        check_model(model)
        if sample != "sequence":
            raise ValueError(f"sample must be 'sequence', not {sample!r}.")
        if unsupported == "sign":
            raise ValueError(
                "unsupported='sign' needs the losses of single samples: use "
                "estimate_fisher(..., unsupported='sign'), or 'skip' here."
            )
        if unsupported not in ("error", "skip"):
            raise ValueError(f"unsupported must be 'error' or 'skip', not {unsupported!r}.")
        check_verify(verify)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], not {decay}.")
        self._model = model
        self._verify = verify
        self._during_training = during_training
        self._decay = decay
        self._policy = Policy(unsupported)
        self._totals = Totals(model)
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
            RuntimeError: No backward pass ran inside, or two did; or inside another ``observe()``;
                or the self-check failed.
        """
        samples = _samples(batch_size, cu_seqlens)
        if tokens is not None:
            check_integer("tokens", tokens, 0)
        terms = samples.count if loss_terms is None else loss_terms
        for argument, number in (("loss_terms", terms), ("loss_scale", loss_scale)):
            _check_number(argument, number)
        if self._observing is not None or self._attached is not None:
            raise RuntimeError("observe() cannot be used inside another observe(), or attached.")
        observation = self._begin(samples, terms / loss_scale)
        self._observing = observation
        try:
            with eagerly(), observation:
                yield
            observation.finish()
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
            observation.close()
        self._totals.count(samples.count, samples.tokens if tokens is None else tokens)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        loss_terms: LossTerms = "samples",
        accumulation_steps: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Attached:
        """Observe training from the outside, until :meth:`detach`.

        Each forward pass of the model in training mode begins a batch, which its backward pass
        ends; each step of the optimizer decays what has been summed. Evaluation, in eval mode or
        under ``no_grad``, and the closures of GEM's memories are not observed. Call the model
        itself, once per batch: what the loop does with its submodules, or with two forward passes
        before one backward pass, needs :meth:`observe`. A compiled model is run uncompiled
        meanwhile; the estimator is made of what ``torch.compile`` returned.

        Args:
            optimizer: Its steps are the ones that count.
            loss_terms: What the loss is divided by. ``"samples"``: it is a mean over the leading
                dimension of the model's first tensor. ``"tokens"``: over the tokens whose
                ``labels`` are not −100 (of a causal language model, without the first position), as
                the losses in transformers are; all tokens, if the model is not given ``labels``. A
                number, e.g. 1 for a sum; or a function of the model's ``args`` and ``kwargs`` that
                returns one, or a tensor of one element.
            accumulation_steps: What the loss is divided by besides, for gradient accumulation.
            scaler: The GradScaler that scales the loss. A batch whose gradients overflow is then
                dropped whole, on the device, and counted in the metadata, at the price of a second
                tensor per parameter.

        Returns:
            A handle; its ``remove()``, or leaving it as a context, is :meth:`detach`.

        Raises:
            ValueError: The estimator was not made with ``during_training=True``, or an argument is
                out of range.
            RuntimeError: It is attached already. Later, from ``optimizer.step()``: no batch was
                observed since the last step, or a batch cannot be told from another.
        """
        if not self._during_training:
            raise ValueError(
                "attach() needs an estimator for it: FisherEstimator(model, during_training=True)."
            )
        if self._attached is not None or self._observing is not None:
            raise RuntimeError("the estimator is attached already, or inside observe().")
        check_integer("accumulation_steps", accumulation_steps, 1)
        if isinstance(loss_terms, str) and loss_terms not in ("samples", "tokens"):
            raise ValueError(
                f"loss_terms must be 'samples', 'tokens', a number or a function, not "
                f"{loss_terms!r}."
            )
        if not isinstance(loss_terms, str) and not callable(loss_terms):
            _check_number("loss_terms", loss_terms)
        if scaler is not None:
            self._totals.stage()
        self._attached = _Attachment(self, optimizer, loss_terms, accumulation_steps, scaler)
        return self._attached.handle

    def detach(self) -> None:
        """End what :meth:`attach` began. Nothing happens if it was not called."""
        if self._attached is not None:
            attached, self._attached = self._attached, None
            attached.remove()

    def step(self) -> None:
        """Decay what has been summed: call it once per optimizer step (:meth:`attach` does)."""
        self._totals.decay(self._decay)

    def finalize(self) -> Importance:
        """Return the importance so far, as a copy: observing may go on.

        Raises:
            RuntimeError: Nothing was observed, or an ``observe()`` failed in its backward pass.
            ValueError: A sum is not finite.
        """
        if self._attached is not None:
            self._attached.finish()
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
            self._attached.finish()
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

    def _begin(self, samples: Samples, factor: Number) -> Observation:
        """Start a batch whose gradients are ``1/factor`` of what is to be summed."""
        totals = self._totals
        parameters = totals.check_unchanged(self._model)
        checked = self._verify is True or (self._verify == "first" and totals.batches == 0)
        sums = totals.begin(factor)
        check = Check() if checked else None
        observation = Observation(parameters, sums, samples, self._policy, check=check)
        observation.open()
        return observation


class Totals:
    """What has been summed, and of how many samples; kept in the units of the last batch's loss.

    A loss is usually a mean, perhaps scaled. Its squared gradients are summed as they come and the
    whole multiplied when the factor changes, since a product with each gradient would cost more.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        for name, parameter in trained(model).items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be of a real floating-point dtype, not "
                    f"{parameter.dtype}."
                )
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self.sums[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        if not self.sums:
            raise ValueError("model has no parameters that require gradients.")
        self.batches = 0
        self.broken = False
        self.samples: Number = 0
        self.tokens: Number | None = None
        self._unit: Number | None = None  # what the sums are to be multiplied by
        self._staged: dict[str, Tensor] | None = None  # one batch, until it is known to be finite
        self._staged_unit: Number = 1.0
        self._dropped: Number = 0

    def state_dict(self) -> dict[str, Any]:
        """All but what is being observed."""
        self._check_whole()
        return {
            "sums": dict(self.sums),
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "unit": self._unit,
            "dropped": self._dropped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, in the tensors that there are."""
        with torch.no_grad():
            for name, total in self.sums.items():
                total.copy_(state_dict["sums"][name])
            for value in (self._staged or {}).values():
                value.zero_()
        self.broken = False
        self.batches = state_dict["batches"]
        device = next(iter(self.sums.values())).device
        counts: list[Any] = [
            value.to(device, copy=True) if isinstance(value, Tensor) else value
            for value in map(state_dict.get, ("samples", "tokens", "unit", "dropped"))
        ]
        self.samples, self.tokens, self._unit, self._dropped = counts

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError(
                "an observe() failed after its backward pass had begun, so that the sums hold a "
                "part of a batch; make a new FisherEstimator."
            )

    def stage(self) -> None:
        """From now on, add a batch only when it is known to be finite."""
        if self._staged is None:
            self._staged = {name: torch.zeros_like(total) for name, total in self.sums.items()}

    def begin(self, factor: Number) -> Mapping[str, Tensor]:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        unit = factor * factor
        if self._staged is not None:
            self._staged_unit = unit
            return self._staged
        if self._unit is not None and (
            isinstance(unit, Tensor) or isinstance(self._unit, Tensor) or unit != self._unit
        ):
            _scale(list(self.sums.values()), self._unit / unit)
        self._unit = unit
        return self.sums

    def count(self, samples: int, tokens: int | None) -> None:
        """Count a batch that was observed to its end."""
        self.batches += 1
        if self._staged is None:
            self._count(samples, tokens)
            return
        staged = self._staged.values()
        device = next(iter(staged)).device
        finite = torch.stack([value.isfinite().all().to(device) for value in staged]).all()
        unit = 1.0 if self._unit is None else self._unit
        with torch.no_grad():
            for total, value in zip(self.sums.values(), staged, strict=True):
                scaled = value * (self._staged_unit / unit)
                total += torch.where(finite.to(value.device), scaled, 0.0)
                value.zero_()
        self._unit = unit
        kept = finite.double()
        self._dropped = self._dropped + samples * (1 - kept)
        self._count(samples * kept, None if tokens is None else tokens * kept)

    def _count(self, samples: Number, tokens: Number | None) -> None:
        if self.batches == 1:
            self.tokens = tokens
        elif tokens is None or self.tokens is None:
            self.tokens = None
        else:
            self.tokens = self.tokens + tokens
        self.samples = self.samples + samples

    def decay(self, decay: float) -> None:
        """Multiply sums and counts; the sums together with the next change of units."""
        if decay == 1.0:
            return
        self._unit = None if self._unit is None else self._unit * decay
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
        unit = 1.0 if self._unit is None else self._unit
        sums = {k: total * unit for k, total in self.sums.items() if k not in skipped}
        tokens = None if self.tokens is None else _plain(self.tokens)
        if skipped:
            metadata["skipped"] = dict(skipped)
        if self._staged is not None:
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
            if self._staged is not None:
                self._staged[name] = self._staged[name].to(parameter.device)
        return parameters


class _Attachment:
    """What :meth:`FisherEstimator.attach` hangs on a model and an optimizer."""

    def __init__(
        self,
        estimator: FisherEstimator,
        optimizer: torch.optim.Optimizer,
        loss_terms: LossTerms,
        accumulation_steps: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._estimator = estimator
        self._loss_terms = loss_terms
        self._accumulation_steps = accumulation_steps
        self._scaler = scaler
        self._open: list[Observation] = []
        self._entered: list[Observation | None] = []
        self._eager: AbstractContextManager[object] = nullcontext()
        self._batches = estimator._totals.batches
        self._refuse_tracing = torch.compiler.disable(_refuse_tracing)  # type: ignore[no-untyped-call]
        self._model = model = estimator._model
        # A model that was compiled in place would be traced with its hooks.
        self._compiled, model._compiled_call_impl = model._compiled_call_impl, None
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self._after), always_call=True),
            optimizer.register_step_post_hook(self._stepped),
        ]
        self.handle = Attached(estimator)

    def remove(self) -> None:
        """Remove all hooks; a batch whose backward pass has run is counted."""
        for hook in self._hooks:
            hook.remove()
        self._model._compiled_call_impl = self._compiled
        self.finish()
        for batch in self._open:
            batch.close()
        self._open.clear()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a batch with the model's forward pass."""
        if torch.compiler.is_dynamo_compiling():
            self._refuse_tracing()
        if is_unobserved():
            self.finish()  # what was begun before does not see these passes
            self._entered.append(None)
            return
        if not (module.training and torch.is_grad_enabled()) or in_backward():
            self._entered.append(None)
            return
        self.finish()
        first = next((t for t in nested.tensors((args, kwargs)) if t.dim() > 0), None)
        if first is None:
            raise ValueError("the model was called without a tensor that has samples.")
        samples = Samples(len(first))
        for tensor in nested.tensors((args, kwargs)):
            samples.see(tensor.shape)
        terms = self._terms(module, len(first), args, kwargs)
        scale: Number = 1.0 / self._accumulation_steps
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=first.device)) * scale
        observation = self._estimator._begin(samples, terms / scale)
        self._open.append(observation)
        self._eager = eagerly()
        self._eager.__enter__()
        observation.enter()
        self._entered.append(observation)

    def _terms(self, model: nn.Module, count: int, args: Any, kwargs: dict[str, Any]) -> Number:
        if callable(self._loss_terms) and not isinstance(self._loss_terms, Tensor):
            return self._loss_terms(args, kwargs)
        if self._loss_terms == "samples":
            return count
        if self._loss_terms == "tokens":
            return loss_tokens(model, args, kwargs)
        return self._loss_terms

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        observation = self._entered.pop() if self._entered else None
        if observation is not None:
            observation.leave()
            observation.expect_backward()
            self._eager.__exit__(None, None, None)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.finish()
        totals = self._estimator._totals
        if totals.batches == self._batches:
            raise RuntimeError(
                "the optimizer took a step, but no batch was observed before it: call the model "
                "itself, which the FisherEstimator was made of (of a compiled one: what "
                "torch.compile returned), in training mode, or use observe() instead of attach()."
            )
        self._batches = totals.batches
        self._estimator.step()

    def restart(self) -> None:
        """Drop the batch that was begun: the sums have been set to others."""
        for batch in self._open:
            batch.close()
        self._open.clear()
        self._batches = self._estimator._totals.batches

    def finish(self) -> None:
        """End the batch whose backward pass has run, if there is one."""
        begun = [batch for batch in self._open if batch.changed]
        if not begun:
            # A forward pass without a backward pass was an evaluation, unless that is yet to come.
            for batch in self._open[:-1]:
                batch.close()
            self._open = self._open[-1:]
            return
        self._open, batches = [], self._open
        totals = self._estimator._totals
        try:
            if len(begun) > 1:
                raise RuntimeError(
                    "two forward passes were followed by backward passes of both; attached, each "
                    "forward pass needs its backward pass before the next (or use observe())."
                )
            begun[0].finish()
        except BaseException:
            totals.broken = True
            raise
        finally:
            for batch in batches:
                batch.close()
        samples = begun[0].samples
        totals.count(samples.count, samples.tokens)


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
