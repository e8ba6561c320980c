"""Watches parameters being used in a forward pass, and squares their gradients in the backward.

A parameter is met where a torch function receives it, not where a module holds it: functional
calls, fused heads and reused modules are seen alike, and what is not understood can be refused.

The gradient that goes on to earlier layers is left to autograd: the function is called with its
parameters detached, and its output passes through a :class:`Tap`, the identity, which sees the
output gradient on the way back and makes both the per-sample squares and the parameters' own
gradients of it.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
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
from torch.utils.weak import WeakIdKeyDictionary

from cl_optim.fisher import nested
from cl_optim.fisher.check import Check
from cl_optim.fisher.functions import (
    Link,
    Points,
    changes_in_place,
    is_of_the_tensor,
    part_of,
    remake,
    remaking,
)
from cl_optim.fisher.gathered import Gathered, Tracker
from cl_optim.fisher.per_sample.base import Dense, PerSample
from cl_optim.fisher.per_sample.combine import combine
from cl_optim.fisher.per_sample.tables import Entries
from cl_optim.fisher.per_sample.views import FunctionOf, Geometry, as_experts
from cl_optim.fisher.refusals import (
    FREEZE,
    Policy,
    RefusedError,
    RestartError,
    listed,
    names_of,
    no_rule,
    not_supported,
    not_the_samples,
    remedy,
    unknown_rows,
    unseen,
)
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
from cl_optim.fisher.rules.registry import RULES, TAKEN_APART, UnsupportedUseError, Use
from cl_optim.fisher.rules.tables import (
    check_embedding,
    is_choice_of_matrices,
    is_lookup,
    lookup,
    table_gradients,
)
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.sources import (
    Source,
    itself,
    scaled,
    share_storage,
    slope_of,
    then,
    within,
)
from cl_optim.fisher.taps import Call, Expand, Graph, Tap


class Undecided:
    """Something looked up once, and how to look it up for each sample instead."""

    def __init__(self, name: str, make: Callable[[], Tensor]) -> None:
        self.name, self._make = name, make
        self._made: Tensor | None = None

    def by_sample(self) -> Tensor:
        """Look it up, the first time."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def then(self, view: Callable[[Tensor], Tensor]) -> Undecided:
        """A view of it."""
        return Undecided(self.name, lambda: view(self.by_sample()))


class Observation(TorchFunctionMode):
    """One batch: its forward pass, or several of the same samples, and the backward.

    Args:
        parameters: The watched parameters by name; all require gradients.
        sums: For each of them, where Σ_n g_n² is added.
        samples: Where the batch's samples are.
        policy: What is done with unsupported parameters; is told of those that are found.
        own_pass: The backward passes compute no gradients of parameters; several through one
            forward pass are allowed, with :meth:`settle` after each, and their squares add.
        magnitudes: Add Σ_n |g_n| instead.
        check: Is told of Σ_n w_n g_n of each parameter, and of the gradients they receive.
        weights: w_n, 1 by default.
        begin: Called before the first square is added; returns what takes the place of ``sums``.

    Attributes:
        active: Whether the backward pass that runs may be this one's: not, where another forward
            pass is being differentiated.
        changed: Whether anything was added to the sums.
        closed: Whether the observation has ended.
        capturing: Whether a backward pass adds to the sums.
        failed: Whether a backward pass ended in an error here.
        paused: Whether what is called is not of this batch.
        witness: Is told of parameters, by name, and the input that they meet, with the number of
            its feature dimensions.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        samples: Samples,
        policy: Policy,
        *,
        own_pass: bool = False,
        magnitudes: bool = False,
        check: Check | None = None,
        weights: Tensor | None = None,
        begin: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._begin = begin
        self._sums = sums
        self.samples = samples
        self._policy = policy
        self._own_pass = own_pass
        self._magnitudes = magnitudes
        self._check = check
        self._weights = weights
        # In training, the batch that is checked leaves the parameters' gradients to autograd.
        self._makes = check is None and not own_pass
        # Without gradients of parameters, this is what makes the graph reach back to each use.
        device = next(iter(parameters.values())).device
        self._anchor = torch.empty(0, device=device, requires_grad=True) if own_pass else None
        self._points = Points(parameters)
        self._sources = {
            id(parameter): Source(
                {name: itself},
                int(parameter.storage_offset()),
                functools.partial(self._points.__getitem__, name),
                direct=True,
            )
            for name, parameter in parameters.items()
        }
        self._stand_ins: dict[str, Tensor] = {}
        self._nodes: dict[str, Any] = {}
        self._derived: Any = WeakIdKeyDictionary()  # views of parameters, and functions of them
        self._derived_stand_ins: Any = WeakIdKeyDictionary()
        self._hooks: list[RemovableHandle] = []
        self._module_hooks: list[RemovableHandle] = []
        self._seen_grads: dict[str | int, Tensor] = {}
        self._unseen: list[str] = []
        self._doubt: Exception | None = None
        # How often each parameter was used outside a backward pass: recomputation does not count.
        # What was used once is squared as soon as its gradient comes, else all uses are waited for.
        self._uses: Counter[str] = Counter()
        self._waiting: dict[str, list[PerSample]] = {}
        # A backward pass through several devices runs in a thread for each. Not held while others
        # of autograd's threads may be needed.
        self._lock = threading.Lock()
        self._late: set[str] = set()  # of which it is not known how many uses there are
        self._squared: set[str] = set()
        # A table looked up with one index per sample, if there is one: the indices may be positions
        # if sequences are as long as the batch.
        self._table: str | None = None
        # What was looked up with [N, T] or [T, T] indices, of tokens or of relative positions.
        self._undecided: Any = WeakIdKeyDictionary()
        self._rows = Tracker(samples, lambda tensor: bool(self._find([tensor])))
        self._graph: Graph | None = Graph()
        self._graph_seen = weakref.ref(self._graph)
        self.active = True
        self.capturing = True
        self.changed = False
        self.closed = False
        self.failed = False
        self.paused = False
        self.witness: Callable[[list[str], Tensor, int], None] | None = None

    # --- beginning and end ------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to hear of the gradients of parameters."""
        for name, parameter in self._parameters.items():
            self._hear(name, parameter)

    def close(self) -> None:
        """End it: let go of all tensors, and refuse gradients that still come."""
        for hook in (*self._hooks, *self._module_hooks):
            hook.remove()
        self.closed = True
        self._check = None
        self._hooks, self._module_hooks = [], []
        self._seen_grads, self._stand_ins, self._nodes, self._waiting = {}, {}, {}, {}
        self._sources = {}
        self._derived.clear()
        self._derived_stand_ins.clear()
        self._undecided.clear()
        self._rows.clear()

    def release(self) -> Graph:
        """Let the graph alone keep this alive, and what else holds what is returned."""
        assert self._graph is not None
        graph, self._graph = self._graph, None
        return graph

    def used(self) -> set[str]:
        """The parameters that the forward pass used."""
        return set(self._uses)

    def refuse_rows(self, names: Sequence[str]) -> None:
        """Leave out parameters that meet inputs whose rows are not the samples."""
        known = [name for name in names if name not in self._policy.left]
        if known:
            self._leave_out(RefusedError(not_the_samples(known), known))

    def is_checked(self) -> bool:
        """Whether this batch checks itself."""
        return self._check is not None

    def is_alive(self) -> bool:
        """Whether a backward pass may still come."""
        return self._graph_seen() is not None

    def is_entered(self) -> bool:
        """Whether this mode is on. Inside a backward pass that was begun under it, it is not."""
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
            if here is None or here.closed or not here.active:
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

    def _hear(self, name: str, tensor: Tensor) -> None:
        hook = _weakly(self._receive, name)
        self._hooks.append(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    # --- forward ----------------------------------------------------------------------------------

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
        if self._check is not None:
            self._check.see(nested.tensors((args, kwargs)))
        result = self._handle(func, args, kwargs)
        if func not in TAKEN_APART:
            self._rows.follow(func, args, kwargs, result)
        return result

    def _handle(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is F.batch_norm:
            refuse_batch_statistics(self.samples.offsets is not None, *args, **kwargs)
        if func in _BACKWARD:
            self.expect_backward()
            return func(*args, **kwargs)
        found = self._find((args, kwargs))
        if self._undecided and found and not _reads_a_property(func):
            args, kwargs = self._decide(func, args, kwargs)
            found = self._find((args, kwargs))
        if func in RESHAPES and args and isinstance(args[0], Tensor):
            self.samples.see(args[0].shape)  # what samples and tokens are flattened from
        if not found or _reads_a_property(func):
            return func(*args, **kwargs)
        decomposed = lookup if found and is_lookup(func, args) else TAKEN_APART.get(func)
        if decomposed is not None:
            try:
                with self:
                    return decomposed(*args, **kwargs)
            except UnsupportedUseError as error:
                names = names_of(found.values())
                self._leave_out(RefusedError(not_supported(found, func, error), names))
                return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            # Reentrant checkpointing runs it again in the backward pass.
            if func in RULES or func in ELEMENTWISE or func in EXPANSIONS or func in PRODUCTS:
                self._count(found.values())
            if func in RULES and self.witness is not None:
                use = RULES[func](*args, **kwargs)
                self._witness(found.values(), use.input, use.features)
            return func(*args, **kwargs)
        left = {k: s for k, s in found.items() if not self._policy.left.keys().isdisjoint(s.names)}
        if left:
            self._leave_out_whole(left.values())
            args, kwargs = self._without(args, kwargs, left)
            found = {key: s for key, s in found.items() if key not in left}
            if not found:
                return func(*args, **kwargs)
        return self._call(func, *self._with_stand_ins(args, kwargs, found))

    def _find(self, arguments: Iterable[Any]) -> dict[int, Source]:
        """The watched tensors among the arguments, by id. It runs at each call of a function."""
        found = {}
        for value in arguments:
            if isinstance(value, Tensor):
                source = self._sources.get(id(value))
                if source is None and len(self._derived):
                    source = self._derived.get(value)
                if source is not None:
                    found[id(value)] = source
            elif isinstance(value, (tuple, list)):
                found |= self._find(value)
            elif isinstance(value, Mapping):
                found |= self._find(value.values())
        return found

    def _without(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], left: Mapping[int, Source]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What is skipped in a pass of its own gets no gradient."""
        if not self._own_pass or self._policy.mode != "skip":
            return args, kwargs
        return nested.map_tensors(  # type: ignore[no-any-return]
            lambda tensor: tensor.detach() if id(tensor) in left else tensor, (args, kwargs)
        )

    def _with_stand_ins(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], found: Mapping[int, Source]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[int, Source]]:
        """Put something in each parameter's place whose gradient is only that of uses seen here."""
        stand_ins = {
            id(tensor): self._stand_in(source.name)
            if source.direct
            else self._derived_stand_in(tensor)
            for tensor in nested.tensors((args, kwargs))
            if (source := found.get(id(tensor))) is not None
        }
        args, kwargs = nested.replace(args, stand_ins), nested.replace(kwargs, stand_ins)
        return args, kwargs, {id(stand_ins[key]): source for key, source in found.items()}

    def _stand_in(self, name: str) -> Tensor:
        if name not in self._stand_ins:
            parameter = self._parameters[name]
            if self._own_pass:
                stand_in = parameter.detach().requires_grad_()
                self._hear(name, stand_in)
            else:
                stand_in = parameter.view_as(parameter)
                record = functools.partial(self._seen_grads.__setitem__, name)
                stand_in.register_hook(record)  # type: ignore[no-untyped-call]
            self._stand_ins[name] = stand_in
            # A view's grad_fn is made anew where its base is changed in place.
            self._nodes[name] = stand_in.grad_fn
            # A cast that changes nothing returns it.
            self._sources[id(stand_in)] = self._sources[id(parameter)]
        return self._stand_ins[name]

    def _derived_stand_in(self, tensor: Tensor) -> Tensor:
        """The same for a tensor that was made of parameters; see :meth:`_derive`."""
        return self._derived_stand_ins.get(tensor, tensor)  # type: ignore[no-any-return]

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> Any:
        """Call ``func`` with watched tensors, in the way that it uses them."""
        try:
            if changes_in_place(func, kwargs) and args and id(args[0]) in found:
                if not found[id(args[0])].direct:
                    raise UnsupportedUseError("it is changed in place")
                return func(*args, **kwargs)  # refused by torch, but for initialisation
            if func is F.scaled_dot_product_attention:
                return self._attention_with_bias(func, args, kwargs, found)
            if func is F.embedding and (shared := self._shared_lookup(func, args, kwargs, found)):
                return shared[0]
            if func in BATCHED and (product := self._batched(func, args, kwargs, found)):
                return product[0]
            if func is torch.functional.einsum and _meets_others(args, kwargs, found):
                with self:
                    return einsum(*args, is_weight=lambda tensor: id(tensor) in found)
            if func in RULES:
                return self._by_rule(func, args, kwargs, found)
            if func in ELEMENTWISE and _meets_others(args, kwargs, found):
                return self._elementwise(func, args, kwargs, found)
            if func in EXPANSIONS and (expanded := self._expansion(func, args, kwargs, found)):
                return expanded[0]
            return self._without_rule(func, args, kwargs, found)
        except UnsupportedUseError as error:
            names = names_of(found.values())
            meets = _meets_others(args, kwargs, found)
            refused = RefusedError(not_supported(found, func, error), names, of_data=meets)
        except RefusedError as error:
            refused = error
        if not refused.of_data and (made := self._function(func, args, kwargs, found, refused)):
            return made[0]
        self._leave_out(refused)
        return func(*args, **kwargs)

    def _leave_out(self, refused: RefusedError) -> None:
        """Do with parameters that are used in an unsupported way what the policy says."""
        if self._policy.mode == "error":
            help_ = remedy(self._own_pass, self._magnitudes, self.samples.offsets is not None)
            raise type(refused.error)(f"{refused}; {help_}") from None
        for name in refused.names:
            self._policy.left[name] = str(refused.error)
        if self._own_pass:
            raise RestartError from None

    def _leave_out_whole(self, left: Iterable[Source]) -> None:
        """Leave out what is used together with parameters that are left out, in one tensor."""
        for source in left:
            known = [name for name in source.names if name in self._policy.left]
            others = [name for name in source.names if name not in self._policy.left]
            if others:
                error = NotImplementedError(self._policy.left[known[0]])
                self._leave_out(RefusedError(error, others))

    def _by_rule(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> Tensor:
        args, kwargs = _as_autocast_would(func, args, kwargs, found)
        use = RULES[func](*args, **kwargs)
        sources = tuple(found.get(id(parameter)) for parameter in use.parameters)
        missed = [source for source in found.values() if source not in sources]
        if missed:
            raise no_rule(names_of(missed), func)
        return self._apply(func, args, kwargs, found, use, sources)

    def _batched(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> tuple[Tensor] | None:
        """A matrix for each expert, or for each row, times rows of known samples."""
        args, kwargs = _as_autocast_would(func, args, kwargs, found)
        factors = list(nested.tensors((args, kwargs)))
        if len(found) != 1 or [factor.dim() for factor in factors] != [3, 3]:
            return None
        transposed = id(factors[0]) in found
        weight, input = factors if transposed else factors[::-1]
        source = found[id(weight)]
        known = self._rows.of(iter([input]))
        if known is None and source.each_row and self.samples.holds(input.shape, 2):
            rows = 1  # one matrix for each row
        elif (
            known is None
            or known[0] is None
            or known[0].dim() > 2
            or (transposed and known[0].dim() > 1)
        ):
            raise RefusedError(
                ValueError(unknown_rows(list(input.shape), source.name)), [source.name]
            )
        else:
            rows = known[0].dim()
        use = batched(input, weight, transposed, rows)
        return (self._apply(func, args, kwargs, found, use, (source,)),)

    def _apply(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
        use: Use,
        sources: tuple[Source | None, ...],
    ) -> Tensor:
        """Call ``func``, and tap its output."""
        name = names_of(found.values())[0]
        shape = use.input.shape
        samples = self._samples_of([use.input], shape, use.features, name, by_rule=True)
        self._witness(found.values(), use.input, use.features)
        call = self._new_call(use.gradients, sources, samples)
        if not self._own_pass and not self._makes:
            plain_args, plain_kwargs = args, kwargs  # autograd makes the parameters' gradients
        else:
            watched = {
                id(tensor): tensor.detach()
                for tensor in use.parameters
                if tensor is not None and id(tensor) in found
            }
            plain_args, plain_kwargs = (nested.replace(part, watched) for part in (args, kwargs))
        output = func(*plain_args, **plain_kwargs)
        self.samples.see(output.shape)
        tensors = use.parameters if self._makes else ()
        # Detached, so that the tap is not a second path back to them; autograd still notices if
        # they are changed in place before backward.
        saved = (None if tensor is None else tensor.detach() for tensor in use.saved)
        tapped: Tensor = Tap.apply(output, self._anchor, self, call, len(tensors), *tensors, *saved)
        return tapped

    def _elementwise(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> Any:
        """Expand parameters to the shape of the result; autograd does the rest."""
        tensors = list(nested.tensors((args, kwargs)))
        if id(tensors[0]) in found and func in IN_PLACE:
            raise UnsupportedUseError("it is changed in place")
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
        expanded = {
            id(tensor): self._expand(tensor, found[id(tensor)], shape, tensors)
            for tensor in tensors
            if id(tensor) in found
        }
        new_args, new_kwargs = (nested.replace(part, expanded) for part in (args, kwargs))
        result = func(*new_args, **new_kwargs)
        self.samples.see(result.shape)
        for tensor in tensors:
            if id(tensor) in found:
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
        if tensor.shape == torch.Size(shape) and tensor.dim() == 2 and self._rows.of(iter(rows)):
            gradients, features = each_row, 1
        else:
            gradients = functools.partial(expand_gradient, shape=tuple(tensor.shape))
        samples = self._samples_of(rows, shape, features, source.name)
        call = self._new_call(gradients, (source,), samples)
        given = tensor.detach() if self._own_pass else tensor
        expanded: Tensor = Expand.apply(given, self._anchor, self, call, tuple(shape))
        return expanded

    def _attention_with_bias(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> Any:
        """A bias of the scores is expanded to the scores' shape."""
        names = ("query", "key", "value", "attn_mask")
        bound = dict(zip(names, args, strict=False)) | kwargs
        mask, query, key = bound.get("attn_mask"), bound["query"], bound["key"]
        if mask is None or found.keys() != {id(mask)}:
            return self._without_rule(func, args, kwargs, found)
        shape = (*query.shape[:-1], key.shape[-2])
        expanded = {id(mask): self._expand(mask, found[id(mask)], shape)}
        return func(*nested.replace(args, expanded), **nested.replace(kwargs, expanded))

    def _expansion(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> tuple[Tensor] | None:
        """One copy of a parameter for each sample; None where it is something else."""
        ((key, source),) = found.items()
        tensor = next(t for t in nested.tensors((args, kwargs)) if id(t) == key)
        shape = func(*args, **kwargs).shape
        own = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
        copies = all(a in (1, b) for a, b in zip(own, shape, strict=True))
        features = features_after_broadcast(tensor.shape, shape)
        if not copies or own[0] != 1 or not self.samples.holds(shape, features):
            return None
        expanded = self._expand(tensor, source, shape)
        return (expanded if func.__name__.startswith("expand") else expanded.clone(),)

    def _shared_lookup(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> tuple[Tensor] | None:
        """A table looked up once for all samples, as for positions; None if for each sample."""
        bound = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
        indices, table = bound["input"], bound["weight"]
        source = found.get(id(table))
        if source is None:
            return None
        shape, count = indices.shape, self.samples.count
        if self._rows.of(iter([indices])) is not None:
            return None
        shared = not self.samples.holds(shape, 0)
        known = self._policy.shared.get(source.name)
        unsure = (
            self.samples.offsets is None
            and count > 1
            and not shared
            and _may_be_positions(shape, count)
        )
        if not unsure:
            self._policy.shared[source.name] = shared
        elif known is not None and (len(shape) > 1 or shape[0] == count):
            shared = known
        elif len(shape) == 1 and shape[0] == count:
            self._table = source.name
        else:
            shared = True  # unless it is used in another way: see _decide
        if not shared:
            return None
        options = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "padding_idx")}
        check_embedding(*args[3:4], **{k: v for k, v in options.items() if k != "norm_type"})
        looked_up = func(*args, **kwargs)
        padding = bound.get("padding_idx")

        length, width = table.shape
        dtype = self._sums[source.name].dtype

        def step(inner: PerSample) -> PerSample:
            if isinstance(inner, Entries) and indices.dim() == 1 and padding is None:
                return inner.of(indices.long(), length)
            grads = inner.dense(0, count, dtype).reshape(count, -1, width)
            each = indices.reshape(1, -1).expand(count, -1)
            return table_gradients(Samples(count), each, grads, length, padding)

        make = remaking(func, args, kwargs, found)
        start = int(looked_up.storage_offset())
        pulls = then(source.pulls, step)
        self._derive(looked_up, Source(pulls, start, make, doubt=source.doubt))
        if unsure and known is None:
            by_sample = functools.partial(self._by_rule, func, args, kwargs, found)
            self._leave_undecided(looked_up, Undecided(source.name, by_sample))
        return (looked_up,)

    def _leave_undecided(self, tensor: Tensor, how: Undecided) -> None:
        for one in (tensor, self._derived_stand_in(tensor)):
            self._undecided[one] = how

    def _decide(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What is used as activations are was looked up for each sample.

        The samples of [N, T] tokens lead, and stay where they are. Of [T, T] relative positions the
        dimensions are first moved behind others: see :meth:`_decide_view`.
        """
        if func in VIEWS or getattr(func, "__name__", "") in _METADATA:
            return args, kwargs
        by_sample = {}
        for tensor in nested.tensors((args, kwargs)):
            if (how := self._undecided.get(tensor)) is not None:
                self._policy.shared[how.name] = False
                by_sample[id(tensor)] = how.by_sample()
        return nested.replace(args, by_sample), nested.replace(kwargs, by_sample)

    def _decide_view(
        self, tensor: Tensor, views: Sequence[Tensor], make: Callable[[Tensor], Any]
    ) -> None:
        """A view that moves the first dimension shows that it is not that of the samples."""
        how = self._undecided.get(tensor)
        if how is None:
            return
        if any(_moves_the_first_dimension(tensor, view) for view in views):
            self._policy.shared[how.name] = True
            for other in [one for one, way in self._undecided.items() if way.name == how.name]:
                del self._undecided[other]
            return
        for i, view in enumerate(views):
            self._leave_undecided(
                view, how.then(lambda made, i=i: list(nested.tensors(make(made)))[i])
            )

    def _without_rule(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: dict[int, Source],
    ) -> Any:
        """Call ``func``; what it makes of one parameter alone may be watched in its place."""
        if is_choice_of_matrices(func, args) and id(args[0]) in found:
            return self._chosen(func, args, found)
        if not (func in UNARY or func in VIEWS or is_of_the_tensor(func)):
            refused = no_rule(names_of(found.values()), func)
            if made := self._function(func, args, kwargs, found, refused):
                return made[0]
        result = func(*args, **kwargs)
        results = list(nested.tensors(result))
        if not any(t.requires_grad and id(t) not in found for t in results):
            return result
        if len(found) == 1:
            ((key, source),) = found.items()
            tensor = next(t for t in nested.tensors((args, kwargs)) if id(t) == key)
            make = remaking(func, args, kwargs, found)
            if share_storage(tensor, results) and self._derive_views(tensor, source, results, make):
                self._decide_view(
                    tensor, results, functools.partial(_call_of, func, args, kwargs, tensor)
                )
                return result
            alone = func in CASTS or not _meets_others(args, kwargs, found)
            if func in UNARY and alone and result.shape == tensor.shape:
                pulls = source.pulls
                if func not in CASTS:
                    pulls = scaled(pulls, slope_of(func, args, kwargs, tensor))
                start = int(result.storage_offset())
                self._derive(result, Source(pulls, start, make, doubt=source.doubt))
                return result
        if self._leads_to(results, args, kwargs, found):
            raise no_rule(names_of(found.values()), func)
        return result

    def _chosen(
        self, func: Callable[..., Any], args: tuple[Any, ...], found: dict[int, Source]
    ) -> Tensor:
        """Of the matrices of several experts, one for each row."""
        matrices, indices = args
        source, experts, matrices_shape = found[id(matrices)], len(matrices), matrices.shape
        chosen: Tensor = func(*args)

        def step(inner: PerSample) -> PerSample:
            of = indices.long() % experts
            if (products := as_experts(inner)) is not None:
                return products.of(of, experts)

            def pull(grad: Tensor) -> Tensor:
                return grad.new_zeros(experts, *grad.shape[1:]).index_add_(0, of, grad)

            return FunctionOf(inner, pull, matrices_shape)

        make = remaking(func, args, {}, found)
        pulls = then(source.pulls, step)
        start = int(chosen.storage_offset())
        self._derive(chosen, Source(pulls, start, make, doubt=source.doubt, each_row=True))
        return chosen

    def _function(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: Mapping[int, Source],
        refused: RefusedError,
    ) -> tuple[Any] | None:
        """What ``func`` makes of parameters alone, watched in their place; None if it does not.

        What else takes part may be data, too, if that needs no gradient. Then the result is no
        parameter, and will not be used as one: see :meth:`_receive_derived`.
        """
        others = [t for t in nested.tensors((args, kwargs)) if id(t) not in found]
        if any(t.requires_grad for t in others) or changes_in_place(func, kwargs):
            return None
        names = tuple(names_of(found.values()))
        doubts = [source.doubt for source in found.values() if source.doubt is not None]
        doubt = next(iter(doubts), refused.error if others else None)

        def watch(made: Tensor) -> Tensor:
            if not made.requires_grad:
                return made
            if self._own_pass:
                linked = made.detach().requires_grad_()
            else:
                stand_ins = [self._stand_in(name) for name in names]
                points = [self._points[name] for name in names]
                linked = Link.apply(lambda: made, points, *stand_ins)
            pulls = self._points.pulls(made, names)
            start = int(linked.storage_offset())
            self._derive(linked, Source(pulls, start, lambda: made, doubt=doubt))
            return linked

        return (nested.map_tensors(watch, remake(func, args, kwargs, found)),)

    def _derive(self, tensor: Tensor, source: Source) -> None:
        """Watch a tensor that was made of parameters.

        In training it, too, has a stand-in: what reaches the tensor, but not its stand-in, is a
        gradient of a use that was not seen. In a pass of its own, nothing may reach it.
        """
        if not tensor.requires_grad:
            return
        self._derived[tensor] = source
        key = len(self._hooks)
        receive = _weakly(self._receive_derived, key, source.names, source.doubt)
        if not self._own_pass:
            stand_in = tensor.view_as(tensor)
            record = functools.partial(self._seen_grads.__setitem__, key)
            stand_in.register_hook(record)  # type: ignore[no-untyped-call]
            self._derived[stand_in] = source
            self._derived_stand_ins[tensor] = stand_in
        self._hooks.append(tensor.register_hook(receive))  # type: ignore[no-untyped-call]

    def _derive_views(
        self,
        tensor: Tensor,
        source: Source,
        views: Sequence[Tensor],
        make: Callable[[], Any],
    ) -> bool:
        """Watch views of a tensor, if it is laid out so that its sums can be viewed likewise."""
        shape, pulls = source.base or (tuple(tensor.shape), source.pulls)
        if source.base is None and not tensor.is_contiguous():
            return False
        start = source.start if source.base else int(tensor.storage_offset())
        geometries = [
            Geometry(tuple(view.shape), view.stride(), int(view.storage_offset()) - start)
            for view in views
        ]
        if not all(geometry.is_injective() for geometry in geometries):
            return False
        whole = (shape, pulls)
        for i, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
            pulled = within(pulls, geometry, shape)
            made = part_of(make, i)
            self._derive(
                view,
                replace(source, pulls=pulled, start=start, remake=made, base=whole, direct=False),
            )
        return True

    def _leads_to(
        self,
        results: Iterable[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: Mapping[int, Source],
    ) -> bool:
        """Whether the graph of the results reaches a watched argument."""
        watched = [t for t in nested.tensors((args, kwargs)) if id(t) in found]
        visited = {t.grad_fn for t in nested.tensors((args, kwargs)) if id(t) not in found}
        goals = {t.grad_fn for t in watched if t.grad_fn is not None}
        leaves = {id(t) for t in watched}
        nodes = [t.grad_fn for t in results]
        while nodes:
            node = nodes.pop()
            if node is None or node in visited:
                continue
            # Only the node that accumulates a leaf's gradient has this attribute.
            if node in goals or id(getattr(node, "variable", None)) in leaves:
                return True
            visited.add(node)
            nodes.extend(following for following, _ in node.next_functions)
        return any(id(t) in leaves for t in results)

    def _new_call(
        self,
        gradients: Callable[..., Sequence[PerSample | Tensor | None]],
        sources: tuple[Source | None, ...],
        samples: Samples,
    ) -> Call:
        used = [source for source in sources if source is not None]
        for name in names_of(used):
            if name in self._squared and not self._own_pass and not in_backward():
                raise NotImplementedError(
                    f"parameter {name!r} is used again after its gradient was squared; each "
                    f"forward pass with a backward pass of its own needs an observe() of its own."
                )
        self._count(used)
        return Call(gradients, sources, self._makes, in_backward(), samples, graph=self._graph)

    def _count(self, sources: Iterable[Source]) -> None:
        if not in_backward():
            self._uses.update(name for source in sources for name in source.names)

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
            and self._rows.of(iter((input, *made_of))) is None
            and self.samples.holds(input.shape, features)
        ):
            self.witness(names_of(sources), input, features)

    def _samples_of(
        self,
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        features: int,
        name: str,
        by_rule: bool = False,
    ) -> Samples:
        """Where the samples are in something of that shape, which was made of those tensors."""
        known = self._rows.of(iter(tensors))
        if known is None:
            self._check_samples(shape, features, name, by_rule)
            return self.samples
        (sample,) = known
        if sample is None or sample.dim() > len(shape) - features:
            raise RefusedError(ValueError(unknown_rows(list(shape), name)), [name], of_data=True)
        return Gathered(self.samples.count, sample)

    def _check_samples(
        self, shape: Sequence[int], features: int, name: str, by_rule: bool = False
    ) -> None:
        leading = shape[: len(shape) - features]
        if not leading:
            raise RefusedError(
                ValueError(
                    f"parameter {name!r} met an input of shape {list(shape)}, which has no "
                    f"dimension for samples: it must begin with batch_size = "
                    f"{self.samples.count} samples"
                ),
                [name],
                of_data=by_rule,
            )
        if not self.samples.holds(shape, features):
            error = ValueError(self._where_samples_are_not(list(shape), name))
            packed = self.samples.offsets is not None
            raise RefusedError(error, [name], of_data=packed or leading[0] != 1)
        self.samples.record(shape, features)
        self.samples.see(shape)
        self.check_table()

    def _where_samples_are_not(self, shape: list[int], name: str) -> str:
        if self.samples.offsets is not None:
            return (
                f"parameter {name!r} met an input of shape {shape}, which does not begin with the "
                f"{self.samples.offsets[-1]} tokens that cu_seqlens counts"
            )
        return (
            f"parameter {name!r} met an input of shape {shape}, whose leading dimension is "
            f"{shape[0]}, but batch_size is {self.samples.count}: the leading dimension must run "
            f"over the samples (rows of unknown samples, as some mixtures of experts make them, "
            f"are not supported)"
        )

    def check_table(self) -> None:
        """Refuse a lookup that cannot be told to be of samples or of positions."""
        if self._table is not None and self.samples.count in self.samples.lengths:
            raise ValueError(
                f"parameter {self._table!r} met {self.samples.count} indices, which may be "
                f"samples or positions, since sequences are as long as batch_size; use another "
                f"batch size."
            )

    # --- backward ---------------------------------------------------------------------------------

    def capture(
        self, call: Call, grad_output: Tensor, saved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Add the squares of what a call's output gradient says of its parameters.

        Returns:
            For each of the call's tensors the gradient of Σ_n ℓ_n, where it is made here.
        """
        nothing: list[Tensor | None] = [None] * len(call.sources)
        names = names_of(source for source in call.sources if source is not None)
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"the backward pass that reached {listed(names)} has create_graph=True: squared "
                f"gradients cannot be differentiated again; leave it out."
            )
        if not self._own_pass and not self._are_wanted(names):
            return nothing  # it is for the gradients of inputs alone
        if self.closed:
            raise RuntimeError(
                f"the backward pass reached {listed(names)} after the observe() of its forward "
                f"pass had ended, or, attached, after its batch had: run both inside, once, and "
                f"before the next batch and optimizer.step()."
            )
        if not self.capturing:
            return nothing
        if not self._own_pass and (call.done or not self._squared.isdisjoint(names)):
            self.failed = True
            raise RuntimeError(
                f"a second backward pass reached {listed(names)} in one observe(); add the losses "
                f"and run backward once: the square of a sum is not the sum of squares."
            )
        call.done = True
        with self._lock:
            if self._begin is not None:
                begin, self._begin = self._begin, None
                self._sums = begin()
        try:
            # Backward may be called under autocast, which would round the factors once more.
            with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
                return self._make(call, names, grad_output, saved)
        except BaseException:
            self.failed = True
            raise

    def _make(
        self, call: Call, names: Sequence[str], grad_output: Tensor, saved: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Add the squares, and make the tensors' gradients."""
        try:
            gradients = call.gradients(call.samples, grad_output, *saved)
        except UnsupportedUseError as error:
            raise NotImplementedError(f"{error} ({listed(names)}); {FREEZE}") from None
        if self._check is not None:
            for name in names:
                self._check.lower(name, grad_output)
        return [
            None if source is None or grad is None else self._add(source, grad, call)
            for source, grad in zip(call.sources, gradients, strict=True)
        ]

    def _are_wanted(self, names: Iterable[str]) -> bool:
        """Whether the backward pass that runs computes gradients of these parameters."""
        nodes = [node for name in names if (node := self._nodes.get(name)) is not None]
        return not nodes or any(torch._C._will_engine_execute_node(node) for node in nodes)

    def _add(self, source: Source, grad: PerSample | Tensor, call: Call) -> Tensor | None:
        """Square one use's gradients, or wait for the parameters' other uses.

        Returns:
            Σ_n g_n of the tensor that was used, where it is made here.
        """
        use = grad if isinstance(grad, PerSample) else Dense(grad)
        if source.direct and self._is_only_use(source.name, call):
            name = source.name
            sums = self._sums[name]
            total = torch.zeros(use.shape, dtype=sums.dtype, device=sums.device)
            self.changed = True
            self._square(name, use, total)
            return total
        for name, pull in source.pulls.items():
            if name not in self._policy.left:
                counted = source.direct and self._uses[name] > 0
                self._wait(name, pull(use), late=call.recomputed and not counted)
        return use.sum(self._sums[source.name].dtype) if call.made else None

    def _is_only_use(self, name: str, call: Call) -> bool:
        known = self._uses[name] == 1 and name not in self._late
        return known and call.made and name not in self._policy.left

    def _wait(self, name: str, use: PerSample, late: bool) -> None:
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
        self._square(name, combine(waiting))

    def _square(self, name: str, grads: PerSample, total: Tensor | None = None) -> None:
        sums = self._sums[name]
        before = 0.0 if self._check is None else sums.sum(dtype=torch.float64)
        if self._magnitudes:
            grads.add_magnitudes_(sums)
        else:
            grads.add_squares_(sums, total)
        self._squared.add(name)
        if self._check is not None:
            added = sums.sum(dtype=torch.float64) - before
            if self._magnitudes:  # Σ|g| ≤ √(number of terms · Σg²)
                added = added.square() / max(1, grads.samples * sums.numel())
            size = added.clamp_min(0).sqrt()
            self._check.capture(name, grads.sum(sums.dtype, self._weights), size)

    def _receive(self, name: str, grad: Tensor | None) -> None:
        """A parameter's gradient, of all uses: compare with that of the uses that were seen."""
        if grad is None or not self.active or name in self._policy.left:
            return
        if self._own_pass:
            if self.capturing:
                self._leave_out(RefusedError(unseen([name]), [name]))
            return
        seen = self._seen_grads.pop(name, None)
        # A sum over several uses is a new tensor: it is not formed in place of one that is held.
        if seen is None or seen.data_ptr() != grad.data_ptr():
            self._unseen.append(name)
        if self._check is not None:
            self._check.receive(name, grad)

    def _receive_derived(
        self, key: int, names: Sequence[str], doubt: Exception | None, grad: Tensor
    ) -> None:
        """A gradient of a tensor that was made of parameters: that of its stand-in, or unseen."""
        seen = self._seen_grads.pop(key, None)
        if not self._policy.left.keys().isdisjoint(names):
            return
        if self._own_pass:
            if self.capturing:
                self._leave_out(RefusedError(doubt or unseen(names), names))
        elif seen is None or seen.data_ptr() != grad.data_ptr():
            self._unseen.extend(names)
            self._doubt = self._doubt or doubt

    def settle(self) -> None:
        """End a backward pass: square what waited for uses that had no gradient."""
        with torch.no_grad():
            for name, uses in self._waiting.items():
                self._square(name, combine(uses))
        self._waiting.clear()
        self._late.clear()
        if self._own_pass:
            self._squared.clear()

    def end_check(self) -> dict[str, float]:
        """Check no further; return the parameters that failed, and by how much of their size."""
        wrong = {} if self._check is None else self._check.finish()
        self._check = None
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
            self._leave_out(RefusedError(self._doubt or unseen(self._unseen), self._unseen))
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


# --- functions that are treated in a way of their own ---------------------------------------------

_BACKWARD = {Tensor.backward, torch.autograd.backward, torch.autograd.grad}
# Methods that tell what a tensor is like, and use none of its values.
_METADATA = {"dim", "size", "numel", "stride", "__len__", "is_floating_point", "is_contiguous"} | {
    "ndimension", "nelement", "element_size", "storage_offset", "data_ptr", "get_device",
}  # fmt: skip


def _weakly(method: Callable[..., None], *args: Any) -> Callable[[Tensor], None]:
    """Make a tensor's hook that does not keep the method's object.

    The graph holds tensors where Python's collector does not see it: what was dropped before its
    end would stay, with its global hooks.
    """
    reference = weakref.WeakMethod(method)

    def hook(grad: Tensor) -> None:
        here = reference()
        if here is not None:
            here(*args, grad)

    return hook


def _moves_the_first_dimension(tensor: Tensor, view: Tensor) -> bool:
    """Whether the first dimension of a tensor does not come first any more in a view of it."""
    if view.dim() == 0 or view.shape[0] == 1:
        return True
    kept = view.shape[0] == tensor.shape[0] and view.stride(0) == tensor.stride(0)
    regrouped = view.numel() == tensor.numel() and view.is_contiguous()
    # [N, T, ...] as [T, N, ...], as nn.MultiheadAttention has it, tells nothing yet.
    swapped = view.dim() > 1 and view.stride() == tensor.transpose(0, 1).stride()
    return not (kept or regrouped or swapped)


def _may_be_positions(indices: Sequence[int], count: int) -> bool:
    """Whether indices of that shape may be [T] or [T, T], perhaps flattened, and not samples'."""
    if len(indices) > 1:
        return indices[0] == indices[1]
    return indices[0] == count or math.isqrt(indices[0]) ** 2 == indices[0]


def _call_of(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    old: Tensor,
    new: Tensor,
) -> Any:
    """Call ``func`` with ``new`` in place of ``old``."""
    other = {id(old): new}
    return func(*nested.replace(args, other), **nested.replace(kwargs, other))


def _reads_a_property(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__", "__delete__") and func not in TRANSPOSES


def in_backward() -> bool:
    """Whether this runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _as_autocast_would(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Mapping[int, Source],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Round inputs as autocast is going to, so that the rounded ones are kept, and only those."""
    if func not in LOWERED:
        return args, kwargs
    tensors = list(nested.tensors((args, kwargs)))
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return args, kwargs
    dtype = torch.get_autocast_dtype(device)
    lowered = {
        id(tensor): tensor.to(dtype)
        for tensor in tensors
        if tensor.is_floating_point() and tensor.dtype != torch.float64 and id(tensor) not in found
    }
    return nested.replace(args, lowered), nested.replace(kwargs, lowered)


def _meets_others(
    args: tuple[Any, ...], kwargs: dict[str, Any], found: Mapping[int, Source]
) -> bool:
    """Whether a tensor that is not watched is among the arguments."""
    return any(id(tensor) not in found for tensor in nested.tensors((args, kwargs)))
