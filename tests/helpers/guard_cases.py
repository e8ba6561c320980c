"""Guards of small networks, with evaluations whose numbers are given; a run as bytes."""

from __future__ import annotations

import torch
from torch import nn

from cl_optim import EWCAdamW
from cl_optim.retention import Evaluation, RetentionGuard


class Script:
    """A measure that reads its numbers from a list, the last one for ever."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, model):
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def scripted(*values, name="old", role="old", higher=True):
    return Evaluation(name, Script(*values), role=role, higher_is_better=higher)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return model, EWCAdamW(model.named_parameters(), lr=0.1, ewc_lambda=2.0)


def guard_of(*evaluations, **options):
    model, optimizer = network()
    return RetentionGuard(model, optimizer, evaluations, every=1, **options)


def started(*evaluations, **options):
    guard = guard_of(*evaluations, **options)
    guard.start()
    return guard


def flatten(value):
    if isinstance(value, dict):
        return [item for key in value for item in [key, *flatten(value[key])]]
    if isinstance(value, (list, tuple)):
        return [item for element in value for item in flatten(element)]
    if isinstance(value, torch.Tensor):
        return [value.dtype, tuple(value.shape), value.detach().numpy().tobytes()]
    return [value]
