"""How far training went, and how well that predicts what is forgotten."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bench.retention.drift import NAMES, Drift, predictions


def test_each_measure_is_what_its_formula_says():
    torch.manual_seed(0)
    model, was = nn.Linear(3, 5), nn.Linear(3, 5)
    old = was.state_dict()
    fisher = {name: torch.rand_like(value) for name, value in old.items()}
    new_inputs, own_inputs = torch.randn(2, 4, 3), torch.randn(3, 2, 3)
    drift = Drift.of(model, old, fisher, new_inputs, own_inputs)
    delta = {name: param.detach() - old[name] for name, param in model.named_parameters()}

    def kl(x):
        p, q = (torch.log_softmax(one(x).double(), -1) for one in (was, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert drift.new_kl == pytest.approx(kl(new_inputs), rel=1e-4)
    assert drift.own_kl == pytest.approx(kl(own_inputs), rel=1e-4)
    flat = torch.cat([value.flatten() for value in delta.values()]).double()
    assert drift.distance == pytest.approx(flat.norm().item(), rel=1e-6)
    assert drift.absolute == pytest.approx(flat.abs().sum().item(), rel=1e-6)
    weights = torch.cat([fisher[name].flatten() for name in delta]).double()
    assert drift.penalty == pytest.approx((weights * flat**2).sum().item(), rel=1e-6)


def test_r_squared_is_one_minus_the_part_that_a_line_leaves():
    draw = np.random.default_rng(0)
    forgotten = draw.normal(size=30)
    drifts = [
        Drift(2.0 * f + 1.0, f + noise, -f, math.exp(3 * f), 7.0)
        for f, noise in zip(forgotten, draw.normal(size=30), strict=True)
    ]
    found = {one.measure: one for one in predictions(drifts, forgotten.tolist())}
    assert list(found) == list(NAMES)
    assert found["new_kl"].r_squared == pytest.approx(1.0)
    assert (found["distance"].r_squared, found["distance"].rank) == pytest.approx((1.0, -1.0))
    assert found["absolute"].rank == pytest.approx(1.0)
    own = [drift.own_kl for drift in drifts]
    left = forgotten - np.polyval(np.polyfit(own, forgotten, 1), own)
    expected = 1.0 - left.var() / forgotten.var()
    assert found["own_kl"].r_squared == pytest.approx(expected)
    assert 0.0 < expected < 0.9
    assert math.isnan(found["penalty"].r_squared)  # never varies
    alike = predictions([replace(drift, penalty=1.0) for drift in drifts], [0.5] * 30)
    assert all(math.isnan(one.r_squared) for one in alike)
