"""What becomes of a step that is invalid: it is left out, on the device where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cl_optim.distributed import is_dtensor
from cl_optim.optim.wrapper import innermost

# Of these only the fused ones leave out a step on the device.
_TORCH_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
INVALID = (
    "NaN or Inf in the gradient or in a memory row, or a problem without a solution: the step was "
    "skipped (on_invalid='raise')."
)


class InvalidSteps:
    """Leaves out invalid steps of another optimizer, and says so where that is wanted."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def take_step(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[], object],
        invalid: bool | Tensor,
        on_invalid: str,
    ) -> bool:
        """Let the optimizer step, unless the step is invalid.

        Args:
            optimizer: The optimizer.
            step: Takes its step.
            invalid: A 0-dim bool on a device that is not to be waited for, or the number itself.
            on_invalid: ``"skip"``, ``"raw"`` (take it all the same) or ``"raise"``.

        Returns:
            Whether it is known already to be an error, an ``INVALID``; else the next
            `raise_pending` finds out.
        """
        if on_invalid == "raw":
            step()
        elif isinstance(invalid, Tensor) and _skips_on_device(optimizer):
            with _found_inf(optimizer, invalid):
                step()
            if on_invalid == "raise":
                self._pending = _to_host(invalid)
        elif invalid:
            return on_invalid == "raise"
        else:
            step()
        return False

    def raise_pending(self) -> None:
        """Raise RuntimeError where the step before was an error."""
        if self._pending is not None:
            invalid, event = self._pending
            self._pending = None
            event.synchronize()  # of the step before: long done
            if invalid.item():
                raise RuntimeError(INVALID)


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether it leaves out a step by itself that its ``found_inf`` calls invalid."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer = innermost(optimizer)
    if isinstance(optimizer, _TORCH_FUSED) and not all(
        group["fused"] for group in optimizer.param_groups
    ):
        return False  # a state dict that was loaded has changed it
    if isinstance(optimizer, _TORCH_FUSED) and any(
        is_dtensor(param) for group in optimizer.param_groups for param in group["params"]
    ):
        return False  # theirs would have to be a DTensor
    if not isinstance(optimizer, torch.optim.SGD):
        return True
    # A first step that torch's SGD leaves out leaves uninitialised memory as momentum.
    return all(
        group["momentum"] == 0
        or param.grad is None
        or optimizer.state.get(param, {}).get("momentum_buffer") is not None
        for group in optimizer.param_groups
        for param in group["params"]
    )


@contextmanager
def _found_inf(optimizer: torch.optim.Optimizer, invalid: Tensor) -> Iterator[None]:
    """Tell the optimizer whether to leave out its step, as GradScaler does."""
    inner: Any = optimizer
    inner.grad_scale = None
    inner.found_inf = invalid.float()
    try:
        yield
    finally:
        del inner.grad_scale, inner.found_inf


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Return a copy that is there once the event is."""
    copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(flag.device))
    return copy, event
