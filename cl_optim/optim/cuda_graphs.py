"""Steps that are captured in a CUDA graph: what would be lost in replays is refused or said."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_optim.ops.warn import warn
from cl_optim.optim.groups import name_of
from cl_optim.optim.launch import Step
from cl_optim.optim.options import lr_stays_tensor
from cl_optim.optim.state import has_moments
from cl_optim.optim.tracking import Sums


def check_capture(step: Step, sums: Sums) -> None:
    """Refuse a step that the CUDA graph which is being captured would not replay."""
    for group in step.groups:
        for param in group["params"]:
            if param.grad is not None:
                _check_param(group, param, step.state.get(param, {}), sums)
    for number, group in enumerate(step.groups):
        # A scheduler leaves the rate that it began with.
        is_scheduled = isinstance(group["lr"], Tensor) or "initial_lr" in group
        if is_scheduled and not lr_stays_tensor(group):
            warn(
                f"the learning rate of group {number} is on the host: the CUDA graph that is "
                "being captured keeps the one of now, whatever a scheduler does. To change it "
                "between replays, make the optimizer with a tensor on the GPU, "
                "lr=torch.tensor(1e-3, device='cuda')."
            )


def _check_param(group: dict[str, Any], param: Tensor, state: dict[str, Any], sums: Sums) -> None:
    if not param.is_cuda:
        raise RuntimeError(
            f"parameter {name_of(group, param)} is on {param.device}, and the CUDA graph that is "
            "being captured would not update it in replays: give it an optimizer whose steps are "
            "outside of the graph."
        )
    tracked = group["track_penalty"] and "importance" in state
    begun = not tracked or Sums.key(group, param.device) in sums
    if not begun or not has_moments(state, param, group):
        raise RuntimeError(
            f"the state of parameter {name_of(group, param)} would begin inside the CUDA graph "
            "that is being captured, and anew at each replay: take one step before the capture, "
            "as in the usual warm-up on a side stream."
        )


def warn_of_captured(what: str) -> None:
    """Say that a graph goes on with what it was captured with."""
    warn(
        f"a step was captured in a CUDA graph before this {what}: its replays would go on with the "
        "tensors of then, whose memory others may have by now. Capture the step anew."
    )
