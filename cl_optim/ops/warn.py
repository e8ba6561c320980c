"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings

# What may lie between that line and ours: decorators, hooks, the loops of trainers.
_BETWEEN = {
    "accelerate",
    "cl_optim",
    "contextlib",
    "lightning",
    "pytorch_lightning",
    "torch",
    "transformers",
}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the innermost line outside this package, torch and the trainers around it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
