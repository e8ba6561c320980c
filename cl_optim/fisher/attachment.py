"""Training that is observed from the outside: hooks of a model and of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from cl_optim.distributed import place
from cl_optim.fisher import nested
from cl_optim.fisher.checks import Number
from cl_optim.fisher.language import loss_tokens
from cl_optim.fisher.loss_scale import CrossEntropy, calling_scaler, watch
from cl_optim.fisher.model import eagerly, trained
from cl_optim.fisher.observe.observation import Observation
from cl_optim.fisher.observe.sources import Graph
from cl_optim.fisher.observe.squares import Into
from cl_optim.fisher.observe.taps import in_backward
from cl_optim.fisher.observer import Observer
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.totals import Totals
from cl_optim.ops.passes import is_unobserved

# Cross entropy as it was found, what its loss is said to be divided by, and N if that is said to be
# the number of samples.
Claim: TypeAlias = tuple[CrossEntropy, Number, int | None]
LossTerms: TypeAlias = (
    Literal["samples", "tokens"] | Number | Callable[[tuple[Any, ...], dict[str, Any]], Number]
)


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


class Attachment:
    """What :meth:`FisherEstimator.attach` hangs on a model and an optimizer.

    Args:
        model: Each of its forward passes in training mode is a batch.
        optimizer: Its steps are the ones that count.
        observer: Begins the observation of each batch.
        totals: What batches are added to.
        loss_terms: What the loss is divided by.
        accumulation_steps: What it is divided by besides; ``None`` if that was not said.
        scaler: What it is multiplied by; ``None`` if that was not said.
        every: The batches of every so many steps are observed, from the first on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        observer: Observer,
        totals: Totals,
        loss_terms: LossTerms,
        accumulation_steps: int | None,
        scaler: torch.amp.GradScaler | None,
        every: int = 1,
    ) -> None:
        self._every, self._steps = every, 0
        self._model, self._observer, self._totals = model, observer, totals
        self._loss_terms = loss_terms
        self._accumulation_steps = accumulation_steps
        self._scaler = scaler
        self._scaler_state: object = None
        totals.stage()
        totals.dropping |= scaler is not None
        self._proven = False  # whether a step has shown what the loss is multiplied with
        self._read = False  # whether batches were added before
        self._undivided = 0  # since the last step, of which it is not known what divided their loss
        self._claims: list[Claim] = []
        # Of losses that are divided by the tokens of all processes: what they are multiplied by.
        self._wholes: list[_Batch] = []
        self._spread: int | None = None
        self._open: list[_Batch] = []
        self._entered: list[_Batch | None] = []
        self._eager: AbstractContextManager[object] = nullcontext()
        self._batches = totals.seen()
        self._refuse_tracing = torch.compiler.disable(_refuse_tracing)  # type: ignore[no-untyped-call]
        # A model that was compiled in place would be traced with its hooks.
        self._compiled, model._compiled_call_impl = model._compiled_call_impl, None
        self._hooks = [
            model.register_forward_pre_hook(Hook(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(Hook(self._after), with_kwargs=True, always_call=True),
            optimizer.register_step_pre_hook(self._stepping),
            optimizer.register_step_post_hook(self._stepped),
        ]

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
        observed = observed and self._is_turn()
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
        batch.observation.call_with(self._model, args, kwargs)
        batch.observation.enter()
        self._entered.append(batch)

    def _is_turn(self) -> bool:
        """Tell whether the batches of the step that comes are observed."""
        return self._steps % self._every == 0

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
        observation = self._observer.begin(samples, lambda: self._begin(batch))
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
                self._observer.check_rows(observation, args, kwargs)
        except BaseException:
            self._open.remove(batch)
            observation.close()
            raise
        finally:
            self._eager.__exit__(None, None, None)
        observation.expect_backward()
        graph = observation.taps.release()
        for tensor in nested.tensors(output):
            if tensor.grad_fn is not None:
                # Until its backward pass comes here, what is recomputed is of another one.
                observation.squares.active = False
                tensor.grad_fn.register_prehook(self._output_hook(batch, graph))
                checked = observation.squares.check is not None or not self._proven
                if checked and self._observer.verify and isinstance(self._loss_terms, str):
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
            batch.reached = batch.observation.squares.active = True
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: setattr(batch, "complete", True))

    def _begin(self, batch: _Batch) -> Into:
        """Begin to sum, in a backward pass, what is multiplied by this batch's factor."""
        self._reach(batch)
        state = getattr(self._scaler, "_per_optimizer_states", None)
        parameters = trained(self._model).values()
        # Gradients that processes have not exchanged yet are where fully_shard keeps them.
        is_first = all(p.grad is None for p in parameters) and not self._totals.are_open()
        if is_first or state is not self._scaler_state:
            self._scaler_state = state
            self._undivided = 0  # a step was left out, or this is the first batch after one
            self._claims.clear()
        scale: Number = 1.0 if batch.whole else 1.0 / (self._accumulation_steps or 1)
        if batch.whole and self._spread is not None:
            scale *= self._spread
        if self._scaler is not None:
            scale = self._scale() * scale
        return self._totals.begin(batch.terms / scale)

    def _scale(self) -> Tensor:
        assert self._scaler is not None
        return self._scaler.scale(torch.ones((), device=self._totals.device))

    def finish(self) -> None:
        """End the batch whose backward pass has run, if there is one."""
        for batch in list(self._open):
            if batch.reached or not batch.observation.taps.is_alive():
                self._finish(batch)

    def _finish(self, batch: _Batch) -> None:
        """End a batch; if its backward pass was for something else, or was none, leave it out."""
        observation = batch.observation
        squares = observation.squares
        if not squares.changed and observation.taps.is_alive():
            batch.reached = batch.complete = squares.active = False
            return  # that of the parameters may come yet
        self._open.remove(batch)
        try:
            if squares.changed and (squares.failed or not batch.complete):
                self._drop()  # an error has ended it, which the loop has caught
            elif squares.changed:
                squares.finish()
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
        if batch.whole and self._spread is None and place() is not None:
            self._wholes.append(batch)
        if self._proven:
            self._totals.commit()

    def _drop(self) -> None:
        """Forget the batches since the last step; where the sums hold some, they are broken."""
        self._totals.discard()
        self._totals.broken |= self._read
        self._undivided = 0
        self._claims.clear()
        self._wholes.clear()

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
            if self._wholes:
                self._spread = self._find_spread()
                scale = scale * self._spread
                self._wholes.clear()
            self._check_claims()
        except RuntimeError:
            self._drop()
            raise
        self._totals.commit(scale)

    def _find_spread(self) -> int:
        """Return what losses over all processes' tokens were multiplied by: 1, or their number.

        So transformers' Trainer has it with ``average_tokens_across_devices``, outside the model:
        what the processes average is then the mean over all tokens.
        """
        here = place()
        assert here is not None
        scale = 1.0 if self._scaler is None else float(self._scale())
        for batch in self._wholes:
            for found in batch.found:
                for factor in (1, here[1]):
                    if found.has_factor(factor * scale / float(batch.terms)):
                        return factor
        raise RuntimeError(
            f"the model is given num_items_in_batch in one of {here[1]} processes, and whether its "
            "loss is multiplied by their number afterwards, as transformers' Trainer does with "
            "average_tokens_across_devices=True, cannot be seen: set that to False, or make the "
            "estimator with verify='first' where the loss is a plain cross entropy."
        )

    def _check_claims(self) -> None:
        """Compare what is claimed of the loss with what was found of it. Waits for the device."""
        claims, self._claims = self._claims, []
        if not claims:
            return
        scale = 1.0 if self._scaler is None else self._scale()
        spread = self._spread or 1
        refuse_contradiction(claims, scale * spread / (self._accumulation_steps or 1))

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.finish()  # of a closure that the step has called
        totals = self._totals
        if totals.seen() == self._batches and self._is_turn():
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
        self._steps += 1
        totals.apply_decay()

    def settle(self) -> None:
        """Add what has been observed so far."""
        self.finish()
        if not self._proven and self._totals.seen() > self._batches:
            self._judge()
            self._read = True


def refuse_contradiction(claims: Iterable[Claim], scale: Number) -> None:
    """Refuse a loss that is not divided by what it is said to be, if it is certain."""
    for found, terms, samples in claims:
        if wrong := found.contradiction(float(terms), float(scale), samples):
            raise RuntimeError(f"the loss that was backpropagated {wrong}.")


def _refuse_tracing() -> None:
    raise RuntimeError(
        "a model that was compiled after attach(), or around the one that the FisherEstimator has, "
        "cannot be observed: make the FisherEstimator of what torch.compile returned."
    )


class Hook:
    """A hook of a model that a copy of the model, or a file of it, has without effect."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        """Call the method, if this is no copy."""
        if self._method is not None:
            self._method(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Attached:
    """What :meth:`FisherEstimator.attach` returns: ends it, by hand or as a context."""

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach = detach

    def remove(self) -> None:
        """Detach the estimator."""
        self._detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
