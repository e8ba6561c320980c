"""The parts of a run, and whether what was saved fits them: told before anything is changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from cl_optim.ops.checks import check_groups


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read; the message says why."""


@runtime_checkable
class Stateful(Protocol):
    """A part of a run: a model, optimizer, scheduler, scaler, stream of data."""

    def state_dict(self) -> Any:
        """Return all that the part needs to go on from here."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on from there."""


@runtime_checkable
class _Checked(Protocol):
    def check_state_dict(self, state_dict: Any, /) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse it."""


def check_part(name: str, part: Stateful, saved: Any) -> None:
    """Refuse a saved state of which it can be seen that a part would refuse it.

    Args:
        name: The part's.
        part: A part of the run.
        saved: Its state in a checkpoint.

    Raises:
        CheckpointError: It is of another kind, or of a part of another size.
    """
    if isinstance(part, (nn.Module, torch.optim.Optimizer)) and not isinstance(saved, Mapping):
        raise CheckpointError(f"the checkpoint's {name!r} is not a {type(part).__name__}'s state.")
    if isinstance(part, nn.Module):
        _check_module(name, part, saved)
        return
    try:
        if isinstance(part, torch.optim.Optimizer):
            check_groups(saved, part.param_groups)
        if isinstance(part, _Checked):
            part.check_state_dict(saved)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's {name!r} does not fit: {error}") from None


def _check_module(name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compare before loading: load_state_dict copies what fits before it complains."""
    own = module.state_dict()
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())[0]
        raise CheckpointError(f"the checkpoint belongs to another {name}: {odd!r} is in one only.")
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.shape != saved[key].shape:
            raise CheckpointError(
                f"the checkpoint belongs to another {name}: {key!r} has shape "
                f"{tuple(saved[key].shape)} there, {tuple(value.shape)} here."
            )


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if ``set_rng_state`` would refuse the state."""
    kind, keys, *rest = state["numpy"]
    numpy_state = (kind, keys.numpy().astype(np.uint32), *rest)
    attempts: dict[str, Callable[[], object]] = {
        "python": lambda: random.Random().setstate(state["python"]),
        "numpy": lambda: np.random.RandomState().set_state(numpy_state),
        "torch": lambda: torch.Generator().set_state(state["torch"]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's random state of {name} does not fit this version of it: "
                f"{error}; nothing has been restored."
            ) from None
    if len(state["cuda"]) > torch.cuda.device_count():
        raise CheckpointError(
            f"the checkpoint has random states of {len(state['cuda'])} GPUs, here there are "
            f"{torch.cuda.device_count()}: restore it where there are as many, or load what you "
            "need of torch.load(path, weights_only=True)['parts']."
        )
