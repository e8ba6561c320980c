"""Watches parameters being used in a forward pass.

A parameter is met where a torch function receives it, not where a module holds it: functional
calls, fused heads and reused modules are seen alike, and what is not understood can be refused.

The gradient that goes on to earlier layers is left to autograd: the function is called with its
parameters detached, and its output passes through a tap, which sees the output gradient on the way
back and hands it to :class:`Squares`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.hooks import RemovableHandle

from cl_optim.distributed import is_dtensor, whole
from cl_optim.fisher import nested
from cl_optim.fisher.kronecker.padding import Kept, kept_rows
from cl_optim.fisher.observe.calls import Call
from cl_optim.fisher.observe.gathered import Tracker
from cl_optim.fisher.observe.lookups import Lookups
from cl_optim.fisher.observe.parts import (
    ATTENTION,
    in_all,
    refuse_context_parallelism,
    use_in_parts,
)
from cl_optim.fisher.observe.refusals import (
    Policy,
    RefusedError,
    no_rule,
    not_supported,
    unknown_rows,
)
from cl_optim.fisher.observe.sources import Pending, Source, names_of, scaled, then
from cl_optim.fisher.observe.squares import Squares
from cl_optim.fisher.observe.taps import Taps, in_backward
from cl_optim.fisher.observe.watched import Watched, leads_to
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.views import FunctionOf, as_experts
from cl_optim.fisher.rules.einsum import einsum
from cl_optim.fisher.rules.elementwise import (
    each_row,
    expand_gradient,
    features_after_broadcast,
    promoted,
)
from cl_optim.fisher.rules.families import (
    BATCHED,
    CASTS,
    ELEMENTWISE,
    EXPANSIONS,
    IN_PLACE,
    LOWERED,
    PRODUCTS,
    RESHAPES,
    TRANSPOSES,
    UNARY,
    VIEWS,
)
from cl_optim.fisher.rules.matrices import batched
from cl_optim.fisher.rules.normalisation import refuse_batch_statistics
from cl_optim.fisher.rules.registry import (
    RULES,
    TAKEN_APART,
    Gradients,
    UnsupportedUseError,
    Use,
)
from cl_optim.fisher.rules.tables import is_choice_of_matrices, is_lookup, lookup
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.spread import Watch

_BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}


class Observation(TorchFunctionMode):
    """One batch: its forward pass, or several of the same samples.

    Args:
        parameters: The watched parameters by name; all require gradients. What takes the place of
            one is put in its place here.
        samples: Where the batch's samples are.
        policy: What is done with unsupported parameters.
        squares: Sums what the backward pass brings.

    Attributes:
        closed: Whether the observation has ended.
        kept: Which rows of the forward pass that runs are no padding; see :meth:`call_with`.
        paused: Whether what is called is not of this batch.
        samples: As given.
        squares: As given.
        watch: Tells it of what takes the place of parameters, until its end.
        taps: Those that were left in the graph.
        witness: Is told of parameters, by name, and the input that they meet, with the number of
            its feature dimensions.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        samples: Samples,
        policy: Policy,
        squares: Squares,
    ) -> None:
        super().__init__()
        self.samples, self._policy, self.squares = samples, policy, squares
        self.taps = Taps(squares, next(iter(parameters.values())).device)
        self._parameters = parameters
        self._watched = watched = Watched(parameters, squares)
        self._tracker = Tracker(samples, lambda tensor: bool(watched.find([tensor])))
        self._lookups = Lookups(parameters, watched, samples, self._tracker, policy.shared)
        self._module_hooks: list[RemovableHandle] = []
        self.closed = False
        self.kept: Kept = {}
        self.paused = False
        self.watch: Watch | None = None
        self.witness: Callable[[list[str], Tensor, int], None] | None = None

    # --- beginning and end ------------------------------------------------------------------------

    def close(self) -> None:
        """End it: let go of all tensors, and refuse gradients that still come."""
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks = []
        if self.watch is not None:
            self.watch.remove()
        self.closed = True
        self.squares.close()
        self._watched.clear()
        self._lookups.undecided.clear()
        self._tracker.clear()

    def meet(self, name: str, parameter: Tensor) -> None:
        """Watch what takes a parameter's place in this forward pass: all of it."""
        if not self.closed and self._parameters[name] is not parameter:
            self._parameters[name] = parameter
            self._watched.watch(name, parameter)
            self.squares.hear_parameter(name)

    def call_with(self, model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Learn which rows are padding from what the model is called with."""
        if self.squares.counts_rows:
            self.kept = kept_rows(model, args, kwargs)

    def is_entered(self) -> bool:
        """Return whether this mode is on. It is not in a backward pass that was begun under it."""
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        return any(mode is self for mode in stack)

    def enter(self) -> None:
        """Put this mode on top of the others."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Take this mode off."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def expect_backward(self) -> None:
        """Enter this mode in modules that activation checkpointing runs in the backward pass.

        There it is off otherwise: calls of backward are torch functions, which run without it.
        """
        if self._module_hooks:
            return
        entered = threading.local()  # the backward pass may run in other threads
        itself = weakref.ref(self)  # the hooks are global, and must not keep it alive

        def before(module: torch.nn.Module, args: Any) -> None:
            here = itself()
            if here is None or here.closed or not here.squares.active:
                return
            if in_backward() and not here.is_entered():
                here.enter()
                entered.modules = [*getattr(entered, "modules", []), module]

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            here = itself()
            modules = getattr(entered, "modules", [])
            if here is not None and modules and modules[-1] is module and here.is_entered():
                entered.modules = modules[:-1]
                here.leave()

        self._module_hooks = [
            register_module_forward_pre_hook(before),
            register_module_forward_hook(after, always_call=True),
        ]
        for hook in self._module_hooks:
            weakref.finalize(self, hook.remove).atexit = False

    # --- each call of a function ------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, and tap its output if a watched parameter is among its arguments."""
        kwargs = kwargs or {}
        if self.closed or self.paused:
            return func(*args, **kwargs)
        if self.squares.check is not None:
            self.squares.check.see(nested.tensors((args, kwargs)))
        result = self._handle(func, args, kwargs)
        if func not in TAKEN_APART:
            self._tracker.follow(func, args, kwargs, result)
        return result

    def _handle(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is F.batch_norm:
            refuse_batch_statistics(self.samples.offsets is not None, *args, **kwargs)
        if func in _BACKWARD:
            self.expect_backward()
            return func(*args, **kwargs)
        if func is ATTENTION:
            refuse_context_parallelism(nested.tensors((args, kwargs)))
        found = self._watched.find((args, kwargs))
        if self._lookups.undecided and found and not _reads_a_property(func):
            args, kwargs = self._lookups.decide(func, args, kwargs)
            found = self._watched.find((args, kwargs))
        if func in RESHAPES and args and isinstance(args[0], Tensor):
            self.samples.see(args[0].shape)  # what samples and tokens are flattened from
        if not found or _reads_a_property(func):
            return func(*args, **kwargs)
        apart = lookup if is_lookup(func, args) else TAKEN_APART.get(func)
        if apart is not None:
            try:
                with self:
                    return apart(*args, **kwargs)
            except UnsupportedUseError as error:
                names = names_of(found.values())
                self.squares.leave_out(RefusedError(not_supported(names, func, error), names))
                return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            # Reentrant checkpointing runs it again in the backward pass.
            if func in RULES or func in ELEMENTWISE or func in EXPANSIONS or func in PRODUCTS:
                self._count(found.values())
            if func in RULES and self.witness is not None:
                use = RULES[func](*args, **kwargs)
                self._witness(found.values(), use.input, use.features)
            return func(*args, **kwargs)
        call = Call(func, args, kwargs, found)
        if self._policy.left:
            call = self._without_left_out(call)
            if not call.found:
                return call.run()
        return self._call(self._watched.with_stand_ins(call))

    def _without_left_out(self, call: Call) -> Call:
        """Take out what is left out, and what is used together with it in one tensor."""
        left = {
            k: s for k, s in call.found.items() if not self._policy.left.keys().isdisjoint(s.names)
        }
        for source in left.values():
            known = [name for name in source.names if name in self._policy.left]
            others = [name for name in source.names if name not in self._policy.left]
            if others:
                error = NotImplementedError(self._policy.left[known[0]])
                self.squares.leave_out(RefusedError(error, others))
        if self.squares.own_pass and self._policy.mode == "skip":  # it gets no gradient
            call = call.replaced({id(t): t.detach() for t in call.tensors() if id(t) in left})
        found = {key: source for key, source in call.found.items() if key not in left}
        return call._replace(found=found)

    def _call(self, call: Call) -> Any:
        """Call a function with watched tensors, in the way that it uses them."""
        func, found = call.func, call.found
        in_parts = any(map(is_dtensor, call.watched()))
        try:
            if call.changes_in_place() and call.args and id(call.args[0]) in found:
                if not found[id(call.args[0])].direct:
                    raise UnsupportedUseError("it is changed in place")
                return call.run()  # refused by torch, but for initialisation
            if in_parts:
                return self._in_parts(call)
            if func is F.scaled_dot_product_attention:
                return self._attention_with_bias(call)
            if func is F.embedding:
                by_sample = functools.partial(self._by_rule, call)
                if (shared := self._lookups.share(call, by_sample)) is not None:
                    return shared
            if func in BATCHED and (product := self._batched(call)) is not None:
                return product
            if func is torch.functional.einsum and call.others():
                with self:
                    return einsum(*call.args, is_weight=lambda tensor: id(tensor) in found)
            if func in RULES:
                return self._by_rule(call)
            if func in ELEMENTWISE and call.others():
                return self._elementwise(call)
            if func in EXPANSIONS and (expanded := self._expansion(call)) is not None:
                return expanded
            return self._without_rule(call)
        except UnsupportedUseError as error:
            names = call.names()
            unsupported = not_supported(names, func, error)
            refused = RefusedError(unsupported, names, of_data=bool(call.others()))
        except RefusedError as error:
            refused = error
        can_watch = not (refused.of_data or in_parts)
        if can_watch and (made := self._watched.watch_function(call, refused)):
            return made[0]
        self.squares.leave_out(refused)
        return call.run()

    # --- functions that have a rule ---------------------------------------------------------------

    def _in_parts(self, call: Call) -> Any:
        """Call a function of DTensors, of whose gradients each process has its part."""
        if call.is_of_the_tensor():
            return call.run()
        if call.func is F.embedding:
            self._lookups.require_samples(call)
        if call.func in RULES:
            return self._by_rule(call)
        if call.func in ELEMENTWISE and call.others():
            return self._elementwise(call)
        raise no_rule(call.names(), call.func)

    def _by_rule(self, call: Call) -> Tensor:
        call = _as_autocast_would(call)
        use = RULES[call.func](*call.args, **call.kwargs)
        sources = tuple(call.found.get(id(parameter)) for parameter in use.parameters)
        missed = [source for source in call.found.values() if source not in sources]
        if missed:
            raise no_rule(names_of(missed), call.func)
        return self._apply(call, use_in_parts(call, use), sources)

    def _batched(self, call: Call) -> Tensor | None:
        """Multiply a matrix for each expert, or for each row, with rows of known samples."""
        call = _as_autocast_would(call)
        factors = call.tensors()
        if len(call.found) != 1 or [factor.dim() for factor in factors] != [3, 3]:
            return None
        transposed = id(factors[0]) in call.found
        weight, input = factors if transposed else factors[::-1]
        source = call.found[id(weight)]
        known = self._tracker.of([input])
        if known is None and source.each_row and self.samples.holds(input.shape, 2):
            rows = 1  # one matrix for each row
        elif (
            known is None
            or known[0] is None
            or known[0].dim() > 2
            or (transposed and known[0].dim() > 1)
        ):
            error = ValueError(unknown_rows(list(input.shape), source.name))
            raise RefusedError(error, [source.name])
        else:
            rows = known[0].dim()
        return self._apply(call, batched(input, weight, transposed, rows), (source,))

    def _apply(self, call: Call, use: Use, sources: tuple[Source | None, ...]) -> Tensor:
        """Call a function as a rule describes it, and tap its output."""
        shape = use.input.shape
        samples = self._samples_of([use.input], shape, use.features, call.names()[0], by_rule=True)
        self._witness(call.found.values(), use.input, use.features)
        pending = self._pending(use.gradients, sources, samples)
        if self.squares.own_pass or self.squares.makes_gradients:
            call = call.replaced(
                {
                    id(tensor): tensor.detach()
                    for tensor in use.parameters
                    if tensor is not None and id(tensor) in call.found
                }
            )
        output = call.run()
        self.samples.see(output.shape)
        return self.taps.tap(output, use, pending)

    # --- functions that broadcast -----------------------------------------------------------------

    def _elementwise(self, call: Call) -> Any:
        """Expand parameters to the shape of the result; autograd does the rest."""
        tensors, found = call.tensors(), call.found
        if id(tensors[0]) in found and call.func in IN_PLACE:
            raise UnsupportedUseError("it is changed in place")
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
        expanded = {
            id(tensor): self._expand(tensor, found[id(tensor)], shape, tensors)
            for tensor in call.watched()
        }
        result = call.replaced(expanded).run()
        self.samples.see(result.shape)
        for tensor in call.watched():
            features = features_after_broadcast(tensor.shape, shape)
            self._witness([found[id(tensor)]], result, features, made_of=tensors)
        if any(tensor.dim() == 0 for tensor in tensors):
            # A scalar takes part in type promotion less than what it was expanded to.
            result = result.to(promoted(tensors))
        return result

    def _expand(
        self,
        tensor: Tensor,
        source: Source,
        shape: Sequence[int],
        beside: Sequence[Tensor] = (),
    ) -> Tensor:
        features = features_after_broadcast(tensor.shape, shape)
        rows = [other for other in beside if other.shape == torch.Size(shape)]
        gradients: Callable[..., Gradients]
        if tensor.shape == torch.Size(shape) and tensor.dim() == 2 and self._tracker.of(rows):
            gradients, features = each_row, 1
        else:
            gradients = functools.partial(expand_gradient, shape=tuple(tensor.shape))
        gradients = in_all(tensor, gradients)
        samples = self._samples_of(rows, shape, features, source.name)
        return self.taps.expand(tensor, shape, self._pending(gradients, (source,), samples))

    def _attention_with_bias(self, call: Call) -> Any:
        """Expand a bias of the scores to the scores' shape."""
        bound = call.bound("query", "key", "value", "attn_mask")
        mask, query, key = bound.get("attn_mask"), bound["query"], bound["key"]
        if mask is None or call.found.keys() != {id(mask)}:
            return self._without_rule(call)
        shape = (*query.shape[:-1], key.shape[-2])
        return call.replaced({id(mask): self._expand(mask, call.found[id(mask)], shape)}).run()

    def _expansion(self, call: Call) -> Tensor | None:
        """Make one copy of a parameter for each sample; return None where it is something else."""
        (source,) = call.found.values()
        tensor = call.watched()[0]
        shape = call.run().shape
        own = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
        copies = all(a in (1, b) for a, b in zip(own, shape, strict=True))
        features = features_after_broadcast(tensor.shape, shape)
        if not copies or own[0] != 1 or not self.samples.holds(shape, features):
            return None
        expanded = self._expand(tensor, source, shape)
        return expanded if call.func.__name__.startswith("expand") else expanded.clone()

    # --- functions of parameters alone ------------------------------------------------------------

    def _without_rule(self, call: Call) -> Any:
        """Call a function; what it makes of one parameter alone may be watched in its place."""
        func, found = call.func, call.found
        if is_choice_of_matrices(func, call.args) and id(call.args[0]) in found:
            return self._chosen(call)
        if not (func in UNARY or func in VIEWS or call.is_of_the_tensor()):
            refused = no_rule(call.names(), func)
            if made := self._watched.watch_function(call, refused):
                return made[0]
        target = call.args[0] if call.changes_in_place() and call.args else None
        before = getattr(target, "grad_fn", None)
        result = call.run()
        results = list(nested.tensors(result))
        # As x[mask] = parameter does, which returns nothing.
        if not results and getattr(target, "grad_fn", None) is not before:
            raise no_rule(call.names(), func)
        if not any(t.requires_grad and id(t) not in found for t in results):
            return result
        if len(found) == 1:
            (source,) = found.values()
            tensor = call.watched()[0]
            if self._watched.derive_views(call, tensor, results):
                self._lookups.decide_views(call, tensor, results)
                return result
            alone = func in CASTS or not call.others()
            if func in UNARY and alone and result.shape == tensor.shape:
                pullbacks = source.pullbacks
                if func not in CASTS:
                    pullbacks = scaled(pullbacks, call.slope(tensor))
                start = int(result.storage_offset())
                self._watched.derive(
                    result, Source(pullbacks, start, call.remake, doubt=source.doubt)
                )
                return result
        if leads_to(results, call):
            raise no_rule(call.names(), func)
        return result

    def _chosen(self, call: Call) -> Tensor:
        """Choose, of the matrices of several experts, one for each row."""
        matrices, indices = call.args
        source, experts, matrices_shape = call.found[id(matrices)], len(matrices), matrices.shape
        chosen: Tensor = call.run()

        def step(inner: PerSample) -> PerSample:
            of = indices.long() % experts
            if (products := as_experts(inner)) is not None:
                return products.of(of, experts)

            def pullback(grad: Tensor) -> Tensor:
                return grad.new_zeros(experts, *grad.shape[1:]).index_add_(0, of, grad)

            return FunctionOf(inner, pullback, matrices_shape)

        pullbacks = then(source.pullbacks, step)
        start = int(chosen.storage_offset())
        self._watched.derive(
            chosen, Source(pullbacks, start, call.remake, doubt=source.doubt, each_row=True)
        )
        return chosen

    # --- samples, and uses of them ----------------------------------------------------------------

    def _samples_of(
        self,
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        features: int,
        name: str,
        by_rule: bool = False,
    ) -> Samples:
        samples = self._tracker.samples_of(tensors, shape, features, name, by_rule)
        if samples is self.samples:
            self._lookups.check_table()
        return samples

    def _pending(
        self,
        gradients: Callable[..., Gradients],
        sources: tuple[Source | None, ...],
        samples: Samples,
    ) -> Pending:
        recomputed = in_backward()
        if not recomputed:
            used = [source for source in sources if source is not None]
            self.squares.refuse_late_use(names_of(used))
            self.squares.count(used)
        return Pending(gradients, sources, recomputed, samples, self.taps.graph, self.kept)

    def _count(self, sources: Iterable[Source]) -> None:
        if not in_backward():
            self.squares.count(sources)

    def _witness(
        self,
        sources: Iterable[Source],
        input: Tensor,
        features: int,
        made_of: Iterable[Tensor] = (),
    ) -> None:
        """Tell of what parameters meet, unless it is known which samples its rows are of."""
        if (
            self.witness is not None
            and self._tracker.of((input, *made_of)) is None
            and self.samples.holds(input.shape, features)
        ):
            self.witness(names_of(sources), whole(input), features)


def _reads_a_property(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__", "__delete__") and func not in TRANSPOSES


def _as_autocast_would(call: Call) -> Call:
    """Round inputs as autocast is going to, so that the rounded ones are kept, and only those."""
    if call.func not in LOWERED:
        return call
    tensors = call.tensors()
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    return call.replaced(
        {
            id(tensor): tensor.to(dtype)
            for tensor in call.others()
            if tensor.is_floating_point() and tensor.dtype != torch.float64
        }
    )
