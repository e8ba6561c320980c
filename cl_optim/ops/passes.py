"""Passes through a model that do not train it: in eval mode, and counted by no estimator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_unobserved: ContextVar[bool] = ContextVar("cl_optim_unobserved", default=False)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards each module's own flag is what it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def unobserved() -> Iterator[None]:
    """Let no estimator of importance count what runs inside, such as GEM's old samples."""
    token = _unobserved.set(True)
    try:
        yield
    finally:
        _unobserved.reset(token)


def is_unobserved() -> bool:
    """Return whether this runs inside :func:`unobserved`."""
    return _unobserved.get()
