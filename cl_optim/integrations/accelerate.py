"""The guard in a loop that Accelerate prepared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from cl_optim.retention import Evaluation, RetentionGuard


def retention_guard(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    evaluations: Iterable[Evaluation],
    **options: Any,
) -> RetentionGuard:
    """Make a guard of what ``accelerator.prepare`` returned, in the accelerator's checkpoints.

    ``accelerator.save_state()`` and ``load_state()`` then hold its baselines and history, too:
    after a load, do not call ``start()``. In the loop, count optimizer steps only:
    ``if accelerator.sync_gradients and guard.step(): break``; after it, ``guard.finish()`` where
    there is a budget.

    Args:
        accelerator: Has prepared model and optimizer.
        model: As prepared.
        optimizer: As prepared.
        evaluations: As for the guard; they are given the bare model.
        **options: The guard's.
    """
    guard = RetentionGuard(
        accelerator.unwrap_model(model),
        unwrapped(optimizer),
        evaluations,
        **options,
    )
    accelerator.register_for_checkpointing(_Saved(guard))
    return guard


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return what Accelerate has wrapped; GEM is around an optimizer, too, and stays."""
    if not isinstance(optimizer, AcceleratedOptimizer):
        return optimizer
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


class _Saved:
    """The guard in the accelerator's checkpoints, in which all else is restored before it."""

    def __init__(self, guard: RetentionGuard) -> None:
        self.state_dict = guard.state_dict
        self.load_state_dict = guard.continue_from
