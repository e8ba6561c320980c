"""What processes say of one importance, and what one process that has all samples does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_optim import FisherEstimator
from cl_optim.distributed import whole


def everything(importance: Any) -> dict[str, Tensor]:
    """Return all of each value, in float32."""
    return {name: whole(value).float() for name, value in importance.items()}


def told(importance: Any) -> dict[str, Any]:
    """Return what a process sends to the tests."""
    return {
        "F": everything(importance),
        "samples": importance.samples,
        "parts": [name for name, value in importance.items() if isinstance(value, DTensor)],
        **{key: importance.metadata.get(key) for key in ("ranks", "rank")},
    }


def observed_by_two(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Any]:
    """Observe batches, the last one in another estimator, which goes on from a state.

    Args:
        model: Is trained.
        batches: One after another.
        loss: Of a batch, whose first tensor has the samples.
    """
    fisher = FisherEstimator(model)
    for step, batch in enumerate(batches):
        if step == len(batches) - 1:
            state = fisher.state_dict()
            fisher = FisherEstimator(model)
            fisher.load_state_dict(state)
        with fisher.observe(len(batch[0])):
            loss(batch).backward()
    return told(fisher.finalize())


def same(
    found: dict[str, Any], expected: dict[str, Any], ranks: int | None, tolerance: float = 1e-6
) -> None:
    """Require the same importance, relative to each tensor's maximum, of so many processes."""
    assert found["samples"] == expected["samples"]
    assert (found["ranks"], found["rank"]) == (ranks, None)
    assert found["F"].keys() == expected["F"].keys()
    for name, value in expected["F"].items():
        error = (found["F"][name] - value).abs().max() / value.abs().max()
        assert error <= tolerance, (name, error)


def all_said(said: list[list[str]], index: int, pattern: str) -> None:
    """Require that each process was refused in these words."""
    for one in said:
        assert re.search(pattern, one[index], re.DOTALL), one[index]
