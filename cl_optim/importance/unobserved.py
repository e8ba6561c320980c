"""Passes through a model that do not train it on the task at hand, such as GEM's of old samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_unobserved: ContextVar[bool] = ContextVar("cl_optim_unobserved", default=False)


@contextmanager
def unobserved() -> Iterator[None]:
    """Let no estimator of importance count what runs inside."""
    token = _unobserved.set(True)
    try:
        yield
    finally:
        _unobserved.reset(token)


def is_unobserved() -> bool:
    """Whether this runs inside :func:`unobserved`."""
    return _unobserved.get()
