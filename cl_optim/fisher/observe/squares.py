"""The backward pass: output gradients become squares of per-sample gradients, which are summed.

The gradient that goes on to earlier layers is left to autograd; what a tap sees of it makes both
the per-sample squares and the parameters' own gradients. That no use was missed is seen in the
gradients that autograd gives the parameters: all must be those of uses that were seen.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cl_optim.distributed import here, like
from cl_optim.fisher.kronecker.sums import Matrices
from cl_optim.fisher.kronecker.used import Used, used
from cl_optim.fisher.observe.gathered import Gathered
from cl_optim.fisher.observe.refusals import FREEZE, Policy, RefusedError, listed, remedy, unseen
from cl_optim.fisher.observe.self_check import SelfCheck
from cl_optim.fisher.observe.sources import Pending, Source, names_of
from cl_optim.fisher.per_sample.base import Dense, PerSample
from cl_optim.fisher.per_sample.combine import combine
from cl_optim.fisher.rules.registry import UnsupportedUseError, wide


class Into(NamedTuple):
    """What a batch is added to.

    Attributes:
        squares: For each parameter, where Σ_n g_n² is added.
        matrices: Takes what it has a place for before the squares do.
    """

    squares: Mapping[str, Tensor]
    matrices: Matrices | None = None


class Squares:
    """Sums squared per-sample gradients of one batch.

    Args:
        parameters: The watched parameters by name; all require gradients.
        into: What they are added to.
        policy: What is done with unsupported parameters; is told of those that are found.
        packed: Whether the batch's samples follow one another in one dimension.
        own_pass: The backward passes compute no gradients of parameters; several through one
            forward pass are allowed, with :meth:`settle` after each, and their squares add.
        magnitudes: Add Σ_n |g_n| instead.
        check: Is told of Σ_n w_n g_n of each parameter, and of the gradients they receive.
        weights: w_n, 1 by default.
        begin: Called before the first square is added; returns what takes the place of ``into``.

    Attributes:
        active: Whether the backward pass that runs may be this one's: not, where another forward
            pass is being differentiated.
        capturing: Whether a backward pass adds to the sums.
        changed: Whether anything was added to the sums.
        check: As given, until its end.
        closed: Whether the batch has ended.
        failed: Whether a backward pass ended in an error here.
        makes_gradients: Whether the parameters' own gradients are made here, too, or by autograd.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        into: Into,
        policy: Policy,
        *,
        packed: bool = False,
        own_pass: bool = False,
        magnitudes: bool = False,
        check: SelfCheck | None = None,
        weights: Tensor | None = None,
        begin: Callable[[], Into] | None = None,
    ) -> None:
        self._parameters = parameters
        self._into = into
        self._policy = policy
        self._remedy = remedy(own_pass, magnitudes, packed)
        self.own_pass = own_pass
        self._magnitudes = magnitudes
        self.check = check
        self._weights = weights
        self._begin = begin
        # In training, the batch that is checked leaves the parameters' gradients to autograd.
        self.makes_gradients = check is None and not own_pass
        self._nodes: dict[str, Any] = {}
        self._hooks: list[RemovableHandle] = []
        self._seen_grads: dict[str | int, Tensor] = {}
        self._unseen: list[str] = []
        self._doubt: Exception | None = None
        # How often each parameter was used outside a backward pass: recomputation does not count.
        # What was used once is squared as soon as its gradient comes, else all uses are waited for.
        self._uses: Counter[str] = Counter()
        self._waiting: dict[str, list[Used]] = {}
        self._again = False  # whether a backward pass through this forward pass has ended
        # A backward pass through several devices runs in a thread for each. Not held while others
        # of autograd's threads may be needed.
        self._lock = threading.Lock()
        self._late: set[str] = set()  # of which it is not known how many uses there are
        self._squared: set[str] = set()
        self.active = True
        self.capturing = True
        self.changed = False
        self.closed = False
        self.failed = False

    # --- what the forward pass tells --------------------------------------------------------------

    def count(self, sources: Iterable[Source]) -> None:
        """Count a use of each of these in the forward pass."""
        self._uses.update(name for source in sources for name in source.names)

    @property
    def counts_rows(self) -> bool:
        """Whether it matters which rows are padding."""
        return self._into.matrices is not None

    def used(self) -> set[str]:
        """Return the parameters that the forward pass used."""
        return set(self._uses)

    def refuse_late_use(self, names: Iterable[str]) -> None:
        """Refuse a use in a forward pass that comes after a backward pass."""
        for name in names:
            if name in self._squared and not self.own_pass:
                raise NotImplementedError(
                    f"parameter {name!r} is used again after its gradient was squared; each "
                    f"forward pass with a backward pass of its own needs an observe() of its own."
                )

    def leave_out(self, refused: RefusedError) -> None:
        """Do with parameters that are used in an unsupported way what the policy says."""
        self._policy.leave_out(refused, self._remedy, restart=self.own_pass)

    def hear_parameters(self) -> None:
        """Begin to hear of the gradients of parameters."""
        for name in self._parameters:
            self.hear_parameter(name)

    def hear_parameter(self, name: str) -> None:
        """Begin to hear of the gradients of a parameter, or of what takes its place now."""
        self._hear(name, self._parameters[name])

    def hear_stand_in(self, name: str, stand_in: Tensor) -> None:
        """Hear of the gradient of what stands in a parameter's place where its uses are seen."""
        if self.own_pass:
            self._hear(name, stand_in)
        else:
            self._record(name, stand_in)
        # A view's grad_fn is made anew where its base is changed in place.
        self._nodes[name] = stand_in.grad_fn

    def hear_derived(self, source: Source, tensor: Tensor, stand_in: Tensor | None) -> None:
        """Hear of the gradients of a tensor that was made of parameters, and of its stand-in."""
        key = len(self._hooks)
        if stand_in is not None:
            self._record(key, stand_in)
        hook = _weakly(self._receive_derived, key, source.names, source.doubt)
        self._hooks.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    def _hear(self, name: str, tensor: Tensor) -> None:
        hook = _weakly(self._receive, name)
        self._hooks.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    def _record(self, key: str | int, stand_in: Tensor) -> None:
        record = functools.partial(self._seen_grads.__setitem__, key)
        stand_in.register_hook(record)  # type: ignore[no-untyped-call]

    # --- gradients --------------------------------------------------------------------------------

    def capture(
        self, pending: Pending, grad_output: Tensor, saved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Add the squares of what a call's output gradient says of its parameters.

        Returns:
            For each of the call's tensors the gradient of Σ_n ℓ_n, where it is made here.
        """
        nothing: list[Tensor | None] = [None] * len(pending.sources)
        names = names_of(source for source in pending.sources if source is not None)
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"the backward pass that reached {listed(names)} has create_graph=True: squared "
                f"gradients cannot be differentiated again; leave it out."
            )
        if not self.own_pass and not self._are_wanted(names):
            return nothing  # it is for the gradients of inputs alone
        if self.closed:
            raise RuntimeError(
                f"the backward pass reached {listed(names)} after the observe() of its forward "
                f"pass had ended, or, attached, after its batch had: run both inside, once, and "
                f"before the next batch and optimizer.step()."
            )
        if not self.capturing:
            return nothing
        if not self.own_pass and (pending.done or not self._squared.isdisjoint(names)):
            self.failed = True
            raise RuntimeError(
                f"a second backward pass reached {listed(names)} in one observe(); add the losses "
                f"and run backward once: the square of a sum is not the sum of squares."
            )
        pending.done = True
        with self._lock:
            if self._begin is not None:
                begin, self._begin = self._begin, None
                self._into = begin()
        try:
            # Backward may be called under autocast, which would round the factors once more.
            with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
                return self._make(pending, names, grad_output, saved)
        except BaseException:
            self.failed = True
            raise

    def _make(
        self,
        pending: Pending,
        names: Sequence[str],
        grad_output: Tensor,
        saved: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Add the squares, and make the tensors' gradients."""
        try:
            gradients = pending.gradients(pending.samples, grad_output, *saved)
        except UnsupportedUseError as error:
            raise NotImplementedError(f"{error} ({listed(names)}); {FREEZE}") from None
        if self.check is not None:
            for name in names:
                self.check.lower(name, grad_output)
        each: list[tuple[Source, PerSample] | None] = [
            None
            if source is None or grad is None
            else (source, grad if isinstance(grad, PerSample) else Dense(grad))
            for source, grad in zip(pending.sources, gradients, strict=True)
        ]
        uses = self._uses_of([one for one in each if one is not None], pending)
        made: list[Tensor | None] = []
        for one in each:
            grad = None if one is None else self._add(*one, next(uses), pending)
            if one is not None and grad is not None and one[0].direct:
                grad = like(self._parameters[one[0].name], grad)
            made.append(grad)
        return made

    def _uses_of(
        self, each: Sequence[tuple[Source, PerSample]], pending: Pending
    ) -> Iterator[dict[str, Used]]:
        """Yield, for each of a call's tensors, how the parameters that it is made of are used."""
        pulled = [
            {
                name: pullback(grads)
                for name, pullback in source.pullbacks.items()
                if name not in self._policy.left
            }
            for source, grads in each
        ]
        if self._into.matrices is None:
            return iter([{name: Used(one) for name, one in uses.items()} for uses in pulled])
        return iter(used(pulled, pending.kept, isinstance(pending.samples, Gathered)))

    def _are_wanted(self, names: Iterable[str]) -> bool:
        """Return whether the backward pass that runs computes gradients of these parameters."""
        nodes = [node for name in names if (node := self._nodes.get(name)) is not None]
        return not nodes or any(torch._C._will_engine_execute_node(node) for node in nodes)

    def _add(
        self, source: Source, grads: PerSample, uses: Mapping[str, Used], pending: Pending
    ) -> Tensor | None:
        """Square one use's gradients, or wait for the parameters' other uses.

        Returns:
            Σ_n g_n of the tensor that was used, where it is made here.
        """
        if source.direct and self._is_only_use(source.name):
            self.changed = True
            return self._square(source.name, [uses[source.name]], summed=True)
        for name, use in uses.items():
            counted = source.direct and self._uses[name] > 0
            self._wait(name, use, late=pending.recomputed and not counted)
        if not self.makes_gradients:
            return None
        return grads.sum(wide(self._parameters[source.name]))

    def _is_only_use(self, name: str) -> bool:
        known = self._uses[name] == 1 and name not in self._late
        return known and self.makes_gradients and name not in self._policy.left

    def _wait(self, name: str, use: Used, late: bool) -> None:
        """Square what was gathered of a parameter when its last use has come."""
        self.changed = True
        if late:
            self._late.add(name)  # the uses of views cannot be counted without gradients
        with self._lock:
            waiting = self._waiting.setdefault(name, [])
            waiting.append(use)
            if len(waiting) < self._uses[name] or name in self._late:
                return
            del self._waiting[name]
        self._square(name, waiting)

    def _square(self, name: str, uses: Sequence[Used], summed: bool = False) -> Tensor | None:
        """Add the squares of a parameter's gradients, or what takes their place.

        Returns:
            Σ_n g_n, if ``summed``.
        """
        grads, dtype = combine([use.grads for use in uses]), wide(self._parameters[name])
        matrices, total = self._into.matrices, None
        before: Tensor | float = 0.0
        if matrices is not None and matrices.add(name, uses, self._again):
            total = grads.sum(dtype) if summed else None
            sums = None
            if self.check is not None:
                sums = torch.zeros(grads.shape, dtype=dtype, device=self._parameters[name].device)
                grads.add_squares_(sums)
        else:
            sums = self._into.squares[name]
            total = torch.zeros_like(sums) if summed else None
            if self.check is not None:
                before = sums.sum(dtype=torch.float64)
            if self._magnitudes:
                grads.add_magnitudes_(sums)
            else:
                grads.add_squares_(sums, total)
        self._squared.add(name)
        if self.check is not None and sums is not None:
            added = sums.sum(dtype=torch.float64) - before
            if self._magnitudes:  # Σ|g| ≤ √(number of terms · Σg²)
                added = added.square() / max(1, grads.samples * sums.numel())
            size = added.clamp_min(0).sqrt()
            self.check.capture(name, grads.sum(dtype, self._weights), size)
        return total

    def _receive(self, name: str, grad: Tensor | None) -> None:
        """Compare a parameter's gradient, of all uses, with that of the uses that were seen."""
        if grad is None or not self.active or name in self._policy.left:
            return
        if self.own_pass:
            if self.capturing:
                self.leave_out(RefusedError(unseen([name]), [name]))
            return
        seen = self._seen_grads.pop(name, None)
        # A sum over several uses is a new tensor: it is not formed in place of one that is held.
        if seen is None or here(seen).data_ptr() != here(grad).data_ptr():
            self._unseen.append(name)
        if self.check is not None:
            self.check.receive(name, here(grad, self._parameters[name]))

    def _receive_derived(
        self, key: int, names: Sequence[str], doubt: Exception | None, grad: Tensor
    ) -> None:
        """Compare the gradient of a tensor that was made of parameters with its stand-in's."""
        seen = self._seen_grads.pop(key, None)
        if not self._policy.left.keys().isdisjoint(names):
            return
        if self.own_pass:
            if self.capturing:
                self.leave_out(RefusedError(doubt or unseen(names), names))
        elif seen is None or seen.data_ptr() != grad.data_ptr():
            self._unseen.extend(names)
            self._doubt = self._doubt or doubt

    # --- the end ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """End a backward pass: square what waited for uses that had no gradient."""
        with torch.no_grad():
            for name, uses in self._waiting.items():
                self._square(name, uses)
        self._waiting.clear()
        self._late.clear()
        self._again = True
        if self.own_pass:
            self._squared.clear()

    def end_check(self) -> dict[str, float]:
        """Check no further; return the parameters that failed, and by how much of their size."""
        wrong = {} if self.check is None else self.check.finish()
        self.check = None
        return wrong

    def finish(self) -> None:
        """End the batch, and check that nothing was missed.

        Raises:
            NotImplementedError: A parameter got a gradient from a use that was not seen.
            RuntimeError: There was no backward pass, or what was captured is not what autograd
                computed.
        """
        self.settle()
        if self._unseen:
            self.leave_out(RefusedError(self._doubt or unseen(self._unseen), self._unseen))
        if not self.changed:
            raise RuntimeError(
                "no gradient reached a watched parameter inside observe(): run the forward and "
                "the backward pass inside."
            )
        if wrong := self.end_check():
            name, error = max(wrong.items(), key=lambda item: item[1])
            raise RuntimeError(
                f"the self-check failed: what was captured of parameter {name!r} differs from its "
                f"gradient by {error:.1g} of its size ({len(wrong)} parameters differ). A use was "
                f"missed or counted twice, or the rule of a function is wrong (verify=False turns "
                f"the check off)."
            )

    def close(self) -> None:
        """Let go of all tensors, and refuse gradients that still come."""
        self.closed = True
        self.check = None
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen_grads, self._nodes, self._waiting = [], {}, {}, {}


def _weakly(method: Callable[..., None], *args: Any) -> Callable[[Tensor], None]:
    """Make a tensor's hook that does not keep the method's object.

    The graph holds tensors where Python's collector does not see it: what was dropped before its
    end would stay.
    """
    reference = weakref.WeakMethod(method)

    def hook(grad: Tensor) -> None:
        here = reference()
        if here is not None:
            here(*args, grad)

    return hook
