"""What this process has of an optimizer's parameters: all of them, but of DTensors a part.

What is computed weight by weight is computed on parts, each process its own, so that it needs no
communication: the step, above all. Sums over weights are sums over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from torch import Tensor

from cl_optim.distributed import (
    ALONE,
    Together,
    here,
    is_counted,
    is_dtensor,
    like,
    mesh_of,
    offset_of,
)
from cl_optim.optim.groups import are_of

Groups: TypeAlias = "list[dict[str, Any]]"
State: TypeAlias = "MutableMapping[Tensor, dict[str, Any]]"


_NONE: State = {}  # of an optimizer that keeps nothing by parameter


class _Parts(dict[Tensor, dict[str, Any]]):
    """The state of parameters by their parts; it begins where the parameters' begins."""

    def __init__(self, params: Mapping[Tensor, Tensor], state: State) -> None:
        super().__init__({part: state[p] for part, p in params.items() if p in state})
        self._params = params
        self._state = state

    def __missing__(self, part: Tensor) -> dict[str, Any]:
        self[part] = self._state[self._params[part]]
        return self[part]

    def is_of(self, state: State) -> bool:
        """Tell if these are the dicts that a state has now."""
        return (
            state is self._state
            and len(state) == len(self)
            and all(state.get(self._params[part]) is one for part, one in self.items())
        )


class Shards:
    """An optimizer's groups and state, by the parts of its parameters that are in this process.

    Where no parameter is a DTensor they are the optimizer's own.

    Attributes:
        groups: The groups, with parts in place of parameters.
        state: What is kept of each part.
        together: The processes that the parameters are spread over.
    """

    def __init__(self) -> None:
        self.groups: Groups = []
        self.state: State = {}
        self.together = ALONE
        self._seen: list[list[Tensor]] = []
        self._parts: dict[Tensor, tuple[Tensor, Tensor]] = {}  # and what each is an alias of
        self._params: dict[Tensor, Tensor] = {}
        self._replicas: set[Tensor] = set()
        self.any = False

    def look(self, groups: Groups, state: State = _NONE) -> Shards:
        """Follow the optimizer, whose parameters, options and state may be others now."""
        if not are_of(groups, self._seen):
            self._look_anew(groups)
        return self.follow(groups, state)

    def follow(self, groups: Groups, state: State) -> Shards:
        """Do what :meth:`look` does where no parameter is exchanged for a DTensor: in less time."""
        if self.any and not are_of(groups, self._seen):
            self._look_anew(groups)
        if not self.any:
            self.groups, self.state = groups, state
            return self
        if any(_alias(param) is not alias for param, (_, alias) in self._parts.items()):
            self._look_anew(groups)
        if not (isinstance(self.state, _Parts) and self.state.is_of(state)):
            self.state = _Parts(self._params, state)
        for own, group in zip(self.groups, groups, strict=True):
            params = own["params"]
            own.clear()
            own.update(group)
            own["params"] = params
        return self

    def _look_anew(self, groups: Groups) -> None:
        self._seen = [list(group["params"]) for group in groups]
        params = [param for seen in self._seen for param in seen]
        self.any = any(map(is_dtensor, params))
        mesh = mesh_of(params) if self.any else None
        self.together = Together(mesh=mesh) if self.any else ALONE
        known = self._parts
        self._parts, self._params, self._replicas, self.state = {}, {}, set(), {}
        if not self.any:
            return
        for param in params:
            part, alias = param, _alias(param)
            if alias is not param:
                part = _part(alias, known.get(param)).requires_grad_(param.requires_grad)
            self._parts[param] = part, alias
            self._params[part] = param
            if not is_counted(param, mesh):
                self._replicas.add(part)
        self.groups = [{**g, "params": [self.part(p) for p in g["params"]]} for g in groups]

    # --- of one parameter -------------------------------------------------------------------------

    def part(self, param: Tensor) -> Tensor:
        """Return the part of a parameter that is here."""
        return self._parts[param][0] if self.any else param

    def param(self, part: Tensor) -> Tensor:
        """Return the parameter whose part this is."""
        return self._params[part] if self.any else part

    def size(self, part: Tensor) -> int:
        """Return how many weights a part's parameter has."""
        return self.param(part).numel()

    def place(self, part: Tensor) -> tuple[int, ...]:
        """Return where in its parameter a part begins: replicas are at one place."""
        return offset_of(self.param(part))

    def counts(self, part: Tensor) -> bool:
        """Tell whether a sum over processes takes this process's part, and no replica of it."""
        return part not in self._replicas

    # --- all of them ------------------------------------------------------------------------------

    def params(self) -> list[Tensor]:
        """Return the parts of the parameters with elements, in the optimizer's order."""
        params = [p for group in self.groups for p in group["params"]]
        return [p for p in params if (self.size(p) if self.any else p.numel())]

    def whole(self) -> list[Tensor]:
        """Return the parameters whose parts these are."""
        return [self._params[part] for part in self.params()] if self.any else self.params()

    def sizes(self) -> list[int]:
        """Return how many parameters with elements each group has."""
        return [sum(self.size(p) > 0 for p in group["params"]) for group in self.groups]

    def of_params(self, values: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return by parts what there is for parameters, of which it is the part that is here."""
        return {self.part(param): here(value, param) for param, value in values.items()}

    # --- gradients --------------------------------------------------------------------------------

    @contextmanager
    def with_grads(self) -> Iterator[None]:
        """Give parts the gradients of their parameters, for a while."""
        if not self.any:
            yield
            return
        for param, (part, _) in self._parts.items():
            if part is not param:
                part.grad = None if param.grad is None else _grad_here(param)
        try:
            yield
        finally:
            for param, (part, _) in self._parts.items():
                if part is not param:
                    part.grad = None


def _part(alias: Tensor, known: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return what stands for a parameter's part: the same tensor wherever its memory moves."""
    part = None if known is None else known[0]
    if part is None or (part.shape, part.dtype, part.device) != (
        alias.shape, alias.dtype, alias.device
    ):  # fmt: skip
        return alias.detach()
    part.data = alias.detach()
    return part


def _grad_here(param: Tensor) -> Tensor:
    """Return the part of a DTensor's gradient that is where the parameter's is.

    A gradient that is elsewhere, such as one that is still to be summed, is brought there first.
    """
    grad: Any = param.grad
    if not is_dtensor(grad) or grad.placements != cast(Any, param).placements:
        param.grad = grad = like(param, here(grad, param))
    local: Tensor = grad._local_tensor
    return local


def _alias(param: Tensor) -> Tensor:
    """Return the tensor that holds a parameter's part."""
    return cast(Any, param)._local_tensor if is_dtensor(param) else param
