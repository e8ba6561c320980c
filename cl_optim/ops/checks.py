"""Checks of what users give, in one sentence each, and the words that refusals share.

Every room may import it, and it imports nothing of the package.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def check_whole(
    name: str, value: object, least: int = 1, most: int | None = None, note: str = ""
) -> None:
    """Refuse what is no whole number from ``least`` on, up to ``most`` if that is given.

    Args:
        name: The argument's.
        value: The argument.
        least: The smallest that may be.
        most: The largest that may be.
        note: What else may be, or what the bounds are: ``", or None"``.

    Raises:
        ValueError: It is another.
    """
    end = math.inf if most is None else most
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= end:
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}{note}, not {value!r}.")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no positive and finite number.

    Raises:
        TypeError: It is no number.
        ValueError: It is another number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}.")


def check_fraction(name: str, value: float) -> None:
    """Refuse what is not in [0, 1].

    Raises:
        ValueError: It is not.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], not {value}.")


def check_groups(state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state dict of an optimizer with other parameters.

    Args:
        state_dict: The saved one.
        param_groups: The optimizer's.

    Raises:
        ValueError: It lacks something, or its groups have other numbers of parameters.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict is truncated: it has no {key!r}.")
    saved = [len(group.get("params", ())) for group in state_dict["param_groups"]]
    here = [len(group["params"]) for group in param_groups]
    if saved != here:
        raise ValueError(
            f"the state dict belongs to other parameters: its groups have {saved} parameters, "
            f"this optimizer's have {here}."
        )


def require(module: str, extra: str, purpose: str) -> None:
    """Refuse what needs a package that is not installed.

    Args:
        module: The package's name in Python.
        extra: Of this package, the extra that has it.
        purpose: What needs it, as the sentence's subject.

    Raises:
        ModuleNotFoundError: It is not installed; the sentence says how it is.
    """
    if importlib.util.find_spec(module) is None:
        sentence = f'{purpose} needs {module}: pip install "cl-optim[{extra}]"'
        raise ModuleNotFoundError(sentence, name=module)


def listed(items: Sequence[object], most: int = 3, show: Callable[[object], str] = repr) -> str:
    """Return the first items as a part of a sentence, and how many more there are."""
    shown = ", ".join(map(show, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def dtype_name(value: Any) -> Any:
    """Return the name of a dtype, ``"float32"``; whatever else it is, as it is."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
