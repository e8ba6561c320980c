"""Corrections that are due: applied before anybody looks at the weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

_unsettled: ContextVar[bool] = ContextVar("cl_optim_unsettled", default=False)


@contextmanager
def unsettled() -> Iterator[None]:
    """Let the hooks of :func:`settle_before` do nothing: other weights are looked at inside."""
    token = _unsettled.set(True)
    try:
        yield
    finally:
        _unsettled.reset(token)


class Settles(Protocol):
    """An optimizer that applies something every few steps only, and at once when it is told to."""

    def settle(self) -> None:
        """Apply what is due."""


def settle(optimizer: Any) -> None:
    """Settle an optimizer, or the first one that can be of those that it is around.

    Args:
        optimizer: Any; one that cannot be settled, and what is no optimizer, stays as it is.
    """
    inner = optimizer
    while not hasattr(inner, "settle") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if hasattr(inner, "settle"):
        inner.settle()


class Settling:
    """The hooks of :func:`settle_before`; ``remove()`` takes them off."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles
        self.is_on = True

    def remove(self) -> None:
        """Let the model be looked at as it is."""
        self.is_on = False
        for handle in self._handles:
            handle.remove()


def settle_before(optimizer: Settles, model: torch.nn.Module) -> Settling:
    """Settle an optimizer whenever its model is evaluated, saved or loaded into.

    That is before a forward pass in eval mode, ``model.state_dict()`` and
    ``model.load_state_dict()``. Copies of the model, by ``copy.deepcopy`` or ``pickle``, do not
    settle anything, and the model does not keep the optimizer alive.

    Args:
        optimizer: What has a ``settle()``.
        model: The bare model or what is around it: what is called, and what is saved. Call
            ``fully_shard`` before.

    Returns:
        What removes the hooks by its ``remove()``.

    Raises:
        TypeError: The optimizer has no ``settle()``, or ``model`` is no module.
    """
    if not callable(getattr(optimizer, "settle", None)):
        raise TypeError(
            f"optimizer must have a settle(), and {type(optimizer).__name__} has none: give a "
            "cl_optim.InputProjection, or what is around one."
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    settle = _Settle(optimizer)
    handles = [
        # Before fully_shard gathers weights, if that was called before.
        model.register_forward_pre_hook(settle.before_evaluation, prepend=True),
        model.register_state_dict_pre_hook(settle),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(settle.before_loading),  # type: ignore[no-untyped-call]
    ]
    return Settling(handles)


class _Settle:
    """A hook that settles an optimizer as long as there is one; its copies do nothing."""

    def __init__(self, optimizer: Settles | None = None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, *of: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and not _unsettled.get():
            optimizer.settle()

    def before_loading(self, *of: Any) -> None:
        """Settle, unless what is due is of the weights that come."""
        layer: Any = self._optimizer()
        while layer is not None:
            if getattr(layer, "awaits_weights", False):
                return
            layer = getattr(layer, "optimizer", None)
        self()

    def before_evaluation(self, module: torch.nn.Module, *of: Any) -> None:
        """Settle unless the module is being trained."""
        if not module.training:
            self()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Settle, ()
