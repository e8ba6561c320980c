"""EWCAdamW's strength: λ without a unit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cl_optim import EWCAdamW, Importance, ImportanceLog

F64 = torch.float64


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def importance_of(model: nn.Module, scale: float = 1.0) -> Importance:
    return Importance({n: scale * torch.rand_like(p) for n, p in model.named_parameters()}, 1)


def test_lambda_is_what_the_formula_says_task_after_task():
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), strength=0.3)
    total, tasks = {n: torch.zeros_like(p, dtype=F64) for n, p in model.named_parameters()}, 0.0
    for decay in (1.0, 1.0, 0.5):
        importance = importance_of(model)
        optimizer.consolidate(importance, decay=decay)
        total = {n: decay * value + importance[n].double() for n, value in total.items()}
        tasks = decay * tasks + 1
        mean = torch.cat([value.flatten() for value in total.values()]).mean()
        square = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        expected = 0.3 * tasks / (mean * square.square().mean())
        (group,) = optimizer.param_groups
        assert group["ewc_lambda"] == pytest.approx(float(expected), rel=1e-5)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.5)


def test_it_has_no_unit():
    """Of a loss that is 1 000 times as large λF is the same, of weights 10 times as large λFθ²."""
    model = network()
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for param in larger.parameters():
            param.mul_(10.0)
    importance = importance_of(model)
    of_loss = Importance({n: 1e6 * value for n, value in importance.items()}, 1)
    found = []
    for net, one in ((model, importance), (model, of_loss), (larger, importance)):
        optimizer = EWCAdamW(net.named_parameters(), strength=0.1)
        optimizer.consolidate(one)
        found.append(optimizer.param_groups[0]["ewc_lambda"])
    assert found[1] == pytest.approx(found[0] / 1e6, rel=1e-5)
    assert found[2] == pytest.approx(found[0] / 100, rel=1e-5)


def test_a_log_counts_as_many_tasks_as_it_has(tmp_path):
    model = network()
    one, two = importance_of(model), importance_of(model)
    log = ImportanceLog(tmp_path)
    log.record("one", one)
    log.record("two", two)
    optimizer, other = (EWCAdamW(model.named_parameters(), strength=0.1) for _ in range(2))
    optimizer.consolidate(log)
    other.consolidate(one)
    other.consolidate(two)
    (group,), (expected,) = optimizer.param_groups, other.param_groups
    assert group["tasks"] == expected["tasks"] == 2.0
    assert group["ewc_lambda"] == pytest.approx(expected["ewc_lambda"], rel=1e-6)


def test_frozen_weights_take_no_part():
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), strength=0.1)
    optimizer.consolidate(importance_of(model))
    optimizer.freeze(fraction=0.5)
    with torch.no_grad():
        for one in optimizer.protected():
            one.param[one.frozen] = 1e3
    new = importance_of(model)
    optimizer.consolidate(new)
    free = [(o.importance[~o.frozen], o.anchor[~o.frozen]) for o in optimizer.protected()]
    mean, square = (torch.cat([pair[i].double() for pair in free]) for i in (0, 1))
    expected = 0.1 * 2 / (mean.mean() * square.square().mean())
    assert optimizer.param_groups[0]["ewc_lambda"] == pytest.approx(float(expected), rel=1e-5)


def test_it_survives_a_state_dict_and_is_optional():
    model = network()
    optimizer, other = (EWCAdamW(model.named_parameters(), strength=s) for s in (0.1, None))
    assert other.param_groups[0]["ewc_lambda"] == 1.0
    optimizer.consolidate(importance_of(model))
    other.load_state_dict(optimizer.state_dict())
    for key in ("strength", "tasks", "ewc_lambda"):
        assert other.param_groups[0][key] == optimizer.param_groups[0][key]
    plain = EWCAdamW(model.named_parameters(), ewc_lambda=3.0)
    plain.consolidate(importance_of(model))
    assert plain.param_groups[0]["ewc_lambda"] == 3.0


def test_an_importance_of_zero_protects_nothing():
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), strength=0.1)
    optimizer.consolidate({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    assert optimizer.param_groups[0]["ewc_lambda"] == 0.0


def test_weights_without_a_size_have_no_lambda_and_that_is_said():
    model = nn.Linear(2, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = EWCAdamW(model.named_parameters(), strength=0.1)
    with pytest.warns(UserWarning, match="strength makes λ 0"):
        optimizer.consolidate(importance_of(model))
    assert optimizer.param_groups[0]["ewc_lambda"] == 0.0
    EWCAdamW(model.named_parameters()).consolidate(importance_of(model))  # without: no warning
