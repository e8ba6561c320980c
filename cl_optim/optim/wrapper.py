"""What makes an optimizer around another one a torch.optim.Optimizer itself."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from cl_optim.optim.ewc_adamw import EWCAdamW
from cl_optim.optim.state import in_order

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Wrapped optimizers whose step is a part of a wrapper's just now, by id.
_inside: set[int] = set()


class Forwarded(Generic[_P, _R]):
    """A method of the wrapped optimizer, under its name; an AttributeError where it has none.

    A descriptor, so that ``hasattr`` is right and types and documentation are the method's.
    """

    def __init__(self, method: Callable[Concatenate[Any, _P], _R]) -> None:
        self._name = method.__name__
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, wrapper: None, owner: type[Wrapper]) -> Forwarded[_P, _R]: ...

    @overload
    def __get__(self, wrapper: Wrapper, owner: type[Wrapper]) -> Callable[_P, _R]: ...

    def __get__(self, wrapper: Wrapper | None, owner: type[Wrapper]) -> Any:
        return self if wrapper is None else wrapper._forwarded(self._name)


def passed_on(name: str) -> property:
    """Make an attribute that is the wrapped optimizer's."""
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
        lambda self: delattr(self.optimizer, name),
    )


class Wrapper(torch.optim.Optimizer):
    """An optimizer with the groups, state and defaults of the one that it wraps, and own hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._start_hooks()

    def _start_hooks(self) -> None:
        """Do what torch's __init__ does, but for groups and state, which are another's here."""
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # A load rebinds these, so they are looked up each time.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Return the wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    # --- what protects ----------------------------------------------------------------------------

    freeze = Forwarded(EWCAdamW.freeze)
    unfreeze = Forwarded(EWCAdamW.unfreeze)
    penalty = Forwarded(EWCAdamW.penalty)
    matrix_penalties = Forwarded(EWCAdamW.matrix_penalties)
    protected = Forwarded(EWCAdamW.protected)
    suggest_lambda = Forwarded(EWCAdamW.suggest_lambda)

    @property
    def last_penalty(self) -> Tensor:
        """Return :attr:`cl_optim.EWCAdamW.last_penalty` of the wrapped optimizer."""
        penalty: Tensor = self._forwarded("last_penalty")
        return penalty

    @property
    def last_drift(self) -> Tensor:
        """Return :attr:`cl_optim.EWCAdamW.last_drift` of the wrapped optimizer."""
        drift: Tensor = self._forwarded("last_drift")
        return drift

    # --- hooks of state dicts, as torch calls them ------------------------------------------------

    def _before_saving(self) -> None:
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)

    def _saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict as its hooks leave it."""
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def _before_loading(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a state dict as its hooks leave it."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def _after_loading(self) -> None:
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _saved_places(self, state_dict: Mapping[str, Any]) -> list[int]:
        """Return for each parameter its place among those of the state dict."""
        groups = state_dict["param_groups"]
        if isinstance(innermost(self), EWCAdamW):  # it matches them by name
            groups = in_order(dict(state_dict), self.param_groups)["param_groups"]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        places = {index: place for place, index in enumerate(saved)}
        return [places[index] for group in groups for index in group["params"]]

    def _forwarded(self, name: str) -> Any:
        try:
            return getattr(self.optimizer, name)
        except AttributeError as error:
            raise AttributeError(
                f"{name!r} is the wrapped optimizer's, and {type(self.optimizer).__name__} has "
                "none: wrap a cl_optim.EWCAdamW."
            ) from error


def layers(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer and what it wraps, from the outside to the inside."""
    yield optimizer
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.optimizer
        yield optimizer


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that takes the step."""
    return [*layers(optimizer)][-1]


class _Once:
    """A global step hook that is not called again for a part of a wrapper's step."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        return None if id(optimizer) in _inside else self._hook(optimizer, *args)


@contextmanager
def inside_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let a wrapped optimizer's step call its own hooks only: global ones are the wrapper's."""
    hooks: Any
    for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        for key, hook in hooks.items():
            if not isinstance(hook, _Once):
                hooks[key] = _Once(hook)
    _inside.add(id(optimizer))
    try:
        yield
    finally:
        _inside.discard(id(optimizer))
