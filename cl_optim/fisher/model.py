"""What the Fisher asks of a model, and the states that it is put in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from cl_optim._version import __version__
from cl_optim.ops.checks import dtype_name
from cl_optim.ops.passes import eval_mode


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def provenance(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Say what made an importance: versions, time, and the model by names, shapes and dtypes."""
    return {
        "cl_optim": __version__,
        "torch": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": {
                name: {"shape": list(p.shape), "dtype": dtype_name(p.dtype)}
                for name, p in parameters.items()
            },
        },
    }


def eagerly() -> AbstractContextManager[object]:
    """Run compiled modules uncompiled: the compiler would trace the interception, too."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, without gradients; then restore each module's own flag."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in grads:
            parameter.grad = None
        with eval_mode(model):
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
