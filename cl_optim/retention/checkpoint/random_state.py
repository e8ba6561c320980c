"""The states of the global random number generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cl_optim.retention.checkpoint.errors import CheckpointError


def rng_state() -> dict[str, Any]:
    """Return the states of the generators of Python, of numpy, and of torch on each device.

    Only numbers, strings, tuples and tensors, which ``torch.load(weights_only=True)`` reads.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if started else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if :func:`set_rng_state` would refuse the state."""
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
