"""Which tensors are watched: parameters, and what is made of parameters alone.

In training each has a stand-in, which takes its place where it is used: what reaches the tensor,
but not its stand-in, is a gradient of a use that was not seen. In a pass of its own, nothing may
reach the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cl_optim.fisher import nested
from cl_optim.fisher.observe.calls import Call
from cl_optim.fisher.observe.refusals import RefusedError
from cl_optim.fisher.observe.sources import Pullback, Pullbacks, Source, itself, within
from cl_optim.fisher.observe.squares import Squares
from cl_optim.fisher.per_sample.views import FunctionOf, Geometry


class Watched:
    """The tensors that are watched in one batch.

    Args:
        parameters: By name.
        squares: Hears of their gradients.
    """

    def __init__(self, parameters: Mapping[str, Tensor], squares: Squares) -> None:
        self._parameters, self._squares = parameters, squares
        self._points = Points(parameters)
        self._sources: dict[int, Source] = {}
        for name, parameter in parameters.items():
            self.watch(name, parameter)
        self._stand_ins: dict[str, Tensor] = {}
        self._derived: Any = WeakIdKeyDictionary()  # views of parameters, and functions of them
        self._derived_stand_ins: Any = WeakIdKeyDictionary()

    def watch(self, name: str, parameter: Tensor) -> None:
        """Watch a parameter, or what takes its place."""
        self._sources[id(parameter)] = Source(
            {name: itself},
            int(parameter.storage_offset()),
            functools.partial(self._points.__getitem__, name),
            direct=True,
        )

    def clear(self) -> None:
        """Let go of all tensors."""
        self._sources, self._stand_ins = {}, {}
        self._derived.clear()
        self._derived_stand_ins.clear()

    def find(self, arguments: Iterable[Any]) -> dict[int, Source]:
        """Return what the watched tensors among the arguments are, by id.

        It runs at each call of a function.
        """
        found = {}
        for value in arguments:
            if isinstance(value, Tensor):
                source = self._sources.get(id(value))
                if source is None and len(self._derived):
                    source = self._derived.get(value)
                if source is not None:
                    found[id(value)] = source
            elif isinstance(value, (tuple, list)):
                found |= self.find(value)
            elif isinstance(value, Mapping):
                found |= self.find(value.values())
        return found

    def with_stand_ins(self, call: Call) -> Call:
        """Put something in each one's place whose gradient is only that of uses seen here."""
        stand_ins = {
            id(tensor): self._stand_in(source.name)
            if (source := call.found[id(tensor)]).direct
            else self.derived_stand_in(tensor)
            for tensor in call.watched()
        }
        found = {id(stand_ins[key]): source for key, source in call.found.items()}
        return call.replaced(stand_ins)._replace(found=found)

    def _stand_in(self, name: str) -> Tensor:
        if name not in self._stand_ins:
            parameter = self._parameters[name]
            if self._squares.own_pass:
                stand_in = parameter.detach().requires_grad_()
            else:
                stand_in = parameter.view_as(parameter)
            self._squares.hear_stand_in(name, stand_in)
            self._stand_ins[name] = stand_in
            # A cast that changes nothing returns it.
            self._sources[id(stand_in)] = self._sources[id(parameter)]
        return self._stand_ins[name]

    def derived_stand_in(self, tensor: Tensor) -> Tensor:
        """Return the same for a tensor that was made of parameters; see :meth:`derive`."""
        return self._derived_stand_ins.get(tensor, tensor)  # type: ignore[no-any-return]

    def derive(self, tensor: Tensor, source: Source) -> None:
        """Watch a tensor that was made of parameters."""
        if not tensor.requires_grad:
            return
        self._derived[tensor] = source
        stand_in = None
        if not self._squares.own_pass:
            stand_in = tensor.view_as(tensor)
            self._derived[stand_in] = source
            self._derived_stand_ins[tensor] = stand_in
        self._squares.hear_derived(source, tensor, stand_in)

    def derive_views(self, call: Call, tensor: Tensor, views: Sequence[Tensor]) -> bool:
        """Watch views of a tensor, if it is laid out so that its sums can be viewed likewise."""
        source = call.found[id(tensor)]
        shape, pullbacks = source.base or (tuple(tensor.shape), source.pullbacks)
        if not _share_storage(tensor, views) or (
            source.base is None and not tensor.is_contiguous()
        ):
            return False
        start = source.start if source.base else int(tensor.storage_offset())
        geometries = [
            Geometry(tuple(view.shape), view.stride(), int(view.storage_offset()) - start)
            for view in views
        ]
        if not all(geometry.is_injective() for geometry in geometries):
            return False
        for i, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
            made = replace(
                source,
                pullbacks=within(pullbacks, geometry, shape),
                start=start,
                remake=_part_of(call.remake, i),
                base=(shape, pullbacks),
                direct=False,
            )
            self.derive(view, made)
        return True

    def watch_function(self, call: Call, refused: RefusedError) -> tuple[Any] | None:
        """Watch what is made of parameters alone in their place; return None if it is not.

        What else takes part may be data, too, if that needs no gradient. Then the result is no
        parameter, and will not be used as one: its gradient is then that of a use that is not seen.
        """
        others = call.others()
        if any(t.requires_grad for t in others) or call.changes_in_place():
            return None
        names = tuple(call.names())
        doubts = [source.doubt for source in call.found.values() if source.doubt is not None]
        doubt = next(iter(doubts), refused.error if others else None)

        def watch(made: Tensor) -> Tensor:
            if not made.requires_grad:
                return made
            if self._squares.own_pass:
                linked = made.detach().requires_grad_()
            else:
                stand_ins = [self._stand_in(name) for name in names]
                points = [self._points[name] for name in names]
                linked = Link.apply(lambda: made, points, *stand_ins)
            pullbacks = self._points.pullbacks(made, names)
            start = int(linked.storage_offset())
            self.derive(linked, Source(pullbacks, start, lambda: made, doubt=doubt))
            return linked

        return (nested.map_tensors(watch, call.remake()),)


class Points:
    """Leaves of graphs of functions of parameters, made when they are needed.

    Weights that are normalised, concatenated, products of others are made once more of points: the
    parameters' values without their history. What comes out has a graph of its own, which stays
    when autograd frees that of the model: through it each sample's gradient is pulled back.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._points: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._points:
            self._points[name] = self._parameters[name].detach().requires_grad_()
        return self._points[name]

    def pullbacks(self, made: Tensor, names: tuple[str, ...]) -> Pullbacks:
        """Return those through the graph of ``made`` to each of the parameters."""
        return {name: self._pullback(made, name) for name in names}

    def _pullback(self, made: Tensor, name: str) -> Pullback:
        point = self[name]
        version = point._version

        def back(grad: Tensor) -> Tensor:
            if point._version != version:
                raise RuntimeError(
                    f"parameter {name!r} was changed in place between the forward and the backward "
                    f"pass; change it after the backward pass."
                )
            return _gradients(made, [point], grad)[0]

        return lambda grads: FunctionOf(grads, back, point.shape)


def _gradients(made: Tensor, points: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Pull a gradient of what was made back to the points; zero where it does not depend on one."""
    found = torch.autograd.grad(
        made, points, grad.to(made.dtype), retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(point) if one is None else one
        for point, one in zip(points, found, strict=True)
    ]


class Link(torch.autograd.Function):
    """What was made of the points, as if it had been made of the parameters."""

    @staticmethod
    def forward(ctx: Any, made: Callable[[], Tensor], points: list[Tensor], *_: Tensor) -> Tensor:
        """Return what was made."""
        ctx.made, ctx.points = made, points
        return made().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Pull the gradient back to the parameters."""
        return None, None, *_gradients(ctx.made(), ctx.points, grad)


def leads_to(results: Iterable[Tensor], call: Call) -> bool:
    """Return whether the graph of the results reaches a watched argument."""
    watched = call.watched()
    visited = {tensor.grad_fn for tensor in call.others()}
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


def _share_storage(tensor: Tensor, results: Iterable[Tensor]) -> bool:
    """Return whether all results are views of ``tensor``."""
    storage = tensor.untyped_storage().data_ptr()
    return all(
        result.untyped_storage().data_ptr() == storage and result.dtype == tensor.dtype
        for result in results
    )


def _part_of(make: Callable[[], Any], index: int) -> Callable[[], Tensor]:
    """Return what makes one of the tensors that a function returns."""
    return lambda: list(nested.tensors(make()))[index]
