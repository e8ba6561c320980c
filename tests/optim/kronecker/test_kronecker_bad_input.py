"""What EWCAdamW refuses of Kronecker importance: tables of bad input."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from bad_input import each_of
from kronecker_training import (
    OPTIONS,
    backward,
    factors_of,
    importance_of,
    network,
    protected,
    train,
)
from optimizer_cases import assert_refused

from cl_optim import EWCAdamW
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.optim.kronecker import pull


def unprotected(**options):
    return EWCAdamW(network().named_parameters(), **{**OPTIONS, **options})


def after(importance):
    """An optimizer that has consolidated this."""
    optimizer = unprotected()
    optimizer.consolidate(importance)
    return optimizer


def kronecker(seed=0, **of):
    return importance_of(network(), seed, **of)


def with_factors(name, layout):
    importance = kronecker()
    factors = {**importance.factors, name: factors_of(layout, 0)}
    return KroneckerImportance(factors, importance.unfactored, 10)


def without_bias():
    """One task whose matrix has no bias, which has a diagonal of its own."""
    importance = kronecker()
    factors = {**importance.factors, "2.weight": factors_of(Layout((4, 4)), 0)}
    return KroneckerImportance(factors, {**importance.unfactored, "2.bias": torch.ones(4)}, 10)


def without(*dropped):
    importance = kronecker()
    factors = {n: one for n, one in importance.factors.items() if n not in dropped}
    return KroneckerImportance(factors, importance.unfactored, 10)


def in_two_groups(**of_biases):
    named = dict(network().named_parameters())
    weights = [(n, p) for n, p in named.items() if p.dim() == 2]
    biases = [(n, p) for n, p in named.items() if p.dim() < 2]
    return EWCAdamW([{"params": weights}, {"params": biases, **of_biases}], **OPTIONS)


def lacking(name):
    params = [(n, p) for n, p in network().named_parameters() if n != name]
    return EWCAdamW(params, **OPTIONS)


MIXED = "diagonal .*decay=0 forgets the earlier ones"
CONSOLIDATE = [
    ("gradient", (lambda: unprotected(penalty="gradient"), kronecker, {}), ValueError,
     "penalty must be 'proximal' for parameter 0.weight, .* not 'gradient'"),
    ("decoupled", (lambda: unprotected(penalty="decoupled"), kronecker, {}), ValueError,
     "penalty must be 'proximal' .* or consolidate importance.diagonal"),
    ("differentiable", (lambda: unprotected(differentiable=True), kronecker, {}), ValueError,
     "differentiable must be False for parameter 0.weight"),
    ("exact", (unprotected, kronecker, {"anchors": "exact"}), ValueError,
     "anchors must be 'latest' with Kronecker importance"),
    ("exact, later", (lambda: after(kronecker()), lambda: None, {"anchors": "exact", "decay": 0.0}),
     ValueError, "anchors must be 'latest'"),
    ("after a diagonal", (lambda: after(dict(kronecker())), kronecker, {}), ValueError,
     "0.weight is diagonal for earlier tasks and Kronecker-factored for this one"),
    ("before a diagonal", (lambda: after(kronecker()), lambda: dict(kronecker()), {}), ValueError,
     f"0.weight is Kronecker-factored for earlier tasks and {MIXED}"),
    ("before L2-SP", (lambda: after(kronecker()), lambda: None, {"decay": 0.5}), ValueError, MIXED),
    ("after L2-SP", (lambda: after(None), kronecker, {}), ValueError, "do not add up"),
    ("a bias that leaves", (lambda: after(kronecker()), without_bias, {}), ValueError,
     "2.bias is Kronecker-factored"),
    ("a bias alone", (
        lambda: after(kronecker()), lambda: {**dict(without("2.weight", "0.weight", "3.weight",
        "4.weight")), "2.bias": torch.ones(4)}, {"strict": False, "decay": 0.0}), ValueError,
     "importance has something for parameter 2.bias and nothing for 2.weight"),
    ("shape", (unprotected, lambda: with_factors("4.weight", Layout((4, 3))), {}), ValueError,
     r"'4.weight' must have the parameter's shape \(3, 4\)"),
    ("shape, transposed", (
        unprotected, lambda: with_factors("2.weight", Layout((4, 2, 2), bias="2.bias")), {}),
     ValueError, r"'2.weight' must have the parameter's shape \(4, 4\)"),
    ("no such matrix", (lambda: lacking("4.weight"), kronecker, {}), ValueError,
     "names '4.weight', which this optimizer does not have"),
    ("no such bias", (lambda: lacking("2.bias"), kronecker, {"strict": False}), ValueError,
     "bias '2.bias' is in one matrix with '2.weight', and this optimizer does not have it"),
    ("nothing for a matrix", (unprotected, lambda: without("4.weight"), {}), ValueError,
     "nothing for parameter '4.weight'"),
    ("other blocks", (lambda: after(kronecker()), lambda: kronecker(block=3), {}), ValueError,
     "were made with different block="),
    ("lr of a bias", (lambda: in_two_groups(lr=1.0), kronecker, {}), ValueError,
     "lr must be the same for parameter 0.weight and its bias 0.bias, .* not 0.03 and 1.0"),
    ("ewc_lambda of a bias", (lambda: in_two_groups(ewc_lambda=1.0), kronecker, {}), ValueError,
     "ewc_lambda must be the same"),
    ("every of a bias", (lambda: in_two_groups(every=1), kronecker, {}), ValueError,
     "every must be the same .* not 10 and 1: set it in both groups"),
    ("penalty of a bias", (lambda: in_two_groups(penalty="gradient"), kronecker, {}), ValueError,
     "penalty must be 'proximal' for parameter 0.bias"),
]  # fmt: skip


@each_of(CONSOLIDATE)
def test_consolidate_refuses(given, error, message):
    make, importance, options = given
    optimizer, importance = make(), importance()
    assert_refused(optimizer, lambda: optimizer.consolidate(importance, **options), error, message)


@each_of(
    [
        (str(every), {"every": every}, ValueError, "^every must be a whole number of at least 1")
        for every in (0, -1, 1.5, True, None)
    ]
    + [("log8", {"basis_dtype": "log8"}, ValueError, "^basis_dtype must be one of")]
)
def test_a_group_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        unprotected(**given)
    optimizer = unprotected()
    group = {"params": [torch.nn.Parameter(torch.ones(2))], **given}
    assert_refused(optimizer, lambda: optimizer.add_param_group({**group}), error, message)


def training(**options):
    model = network()
    optimizer = protected(model, **options)
    train(model, optimizer.step, range(2))
    backward(model, 3)
    return optimizer


STEP = [
    (
        "gradient",
        {"penalty": "gradient"},
        ValueError,
        "penalty must be 'proximal' for parameter 0.",
    ),
    ("differentiable", {"differentiable": True}, ValueError, "differentiable must be False"),
    ("every", {"every": 0}, ValueError, "every must be a whole number"),
]


@each_of(STEP)
def test_a_step_is_refused(given, error, message):
    optimizer = training()
    ledger = copy.deepcopy(optimizer._pull.ledger.due)
    optimizer.param_groups[0].update(given)
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(error, match=message):
        optimizer.step()
    now = optimizer.param_groups[0]["params"]
    assert all(torch.equal(old, new) for old, new in zip(weights, now, strict=True))
    assert optimizer._pull.ledger.due == ledger


def test_captures_are_refused(monkeypatch):
    optimizer = training()
    ledger = copy.deepcopy(optimizer._pull.ledger.due)
    monkeypatch.setattr(pull, "is_capturing", lambda: True)
    for call in (optimizer.step, optimizer.settle):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            call()
        assert optimizer._pull.ledger.due == ledger


# --- saved states ---------------------------------------------------------------------------------


def state_of(name):
    return [n for n, _ in network().named_parameters()].index(name)


def change(key, new, name="0.weight"):
    def damage(state_dict):
        state = state_dict["state"][state_of(name)]
        if new is None:
            del state[key]
        else:
            state[key] = new(state[key].clone())

    return damage


def put(value, at=0):
    def changed(tensor):
        tensor.flatten()[at] = value
        return tensor

    return changed


def doubled(tensor):
    return tensor * 2


OTHERS, TRUNCATED = "^the state dict belongs to other parameters", "^the state dict is truncated"
DAMAGED = "^the state dict is damaged"
LOAD = [
    *(
        (f"no {key}", change(key, None), ValueError, f"{TRUNCATED}: .* 0.weight have no '{key}'")
        for key in ("matrix", "scale", "tails", "output_values", "input_values", "output_basis",
                    "input_basis")
    ),
    ("no importance", change("importance", None), ValueError, f"{TRUNCATED}: .* no 'importance'"),
    ("no anchor of a bias", change("anchor", None, "0.bias"), ValueError, "no 'anchor'"),
    ("a bias without", change("matrix", None, "0.bias"), ValueError, "0.weight have no 'bias'"),
    ("a bias of another", change("matrix", put(77), "0.bias"), ValueError, "have no 'bias'"),
    ("numbers", change("matrix", lambda t: t[:5]), ValueError, f"{OTHERS}: 'matrix'"),
    ("tails", change("tails", lambda t: t[:1]), ValueError, f"{OTHERS}: 'tails'"),
    ("basis", change("input_basis", lambda t: t[:, :-1]), ValueError, f"{OTHERS}: 'input_basis'"),
    ("basis of integers", change("input_basis", lambda t: t.long()), ValueError, DAMAGED),
    ("values", change("output_values", lambda t: t[:-1]), ValueError, f"{OTHERS}: 'output_val"),
    ("scale", change("scale", lambda t: t[:-1]), ValueError, f"{OTHERS}: 'scale'"),
    ("transposed scale", change("scale", lambda t: t.mT), ValueError, f"{OTHERS}: 'scale'"),
    ("stretched", change("output_basis", doubled), ValueError, "must be orthonormal, and are off"),
    ("NaN direction", change("output_basis", put(math.nan)), ValueError, "orthonormal"),
    ("NaN", change("scale", put(math.nan)), ValueError, "'scale' of parameter 0.weight must"),
    ("negative", change("scale", put(-1.0)), ValueError, "finite and at least 0"),
    ("negative value", change("input_values", put(-1.0)), ValueError, "'input_values' of param"),
    ("negative tail", change("tails", put(-1.0)), ValueError, DAMAGED),
    ("kept", change("matrix", put(1, 5)), ValueError, f"{DAMAGED}: 'output_basis' .* not 1"),
    ("no such tail", change("scale", put(1.0, -1)), ValueError, "directions that there are none"),
    ("penalty", lambda s: s["param_groups"][0].update(penalty="gradient"), ValueError,
     "penalty must be 'proximal' for parameter 0.weight"),
    ("every", lambda s: s["param_groups"][0].update(every=0), ValueError, "every must be a whole"),
]  # fmt: skip


@each_of(LOAD)
def test_load_state_dict_refuses(given, error, message):
    optimizer = training()
    saved = copy.deepcopy(optimizer.state_dict())
    given(saved)
    assert_refused(optimizer, lambda: optimizer.load_state_dict(saved), error, message)
    with pytest.raises(error, match=message):
        optimizer.check_state_dict(saved)


def test_what_bfloat16_rounds_is_loaded():
    """And what is further off than it rounds is not."""
    optimizer = training(basis_dtype="bfloat16")
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    saved["state"][0]["input_basis"] *= 1.1
    message = "must be orthonormal, and are off by 0.2"
    assert_refused(optimizer, lambda: optimizer.load_state_dict(saved), ValueError, message)
    saved["state"][0]["input_basis"] = (saved["state"][0]["input_basis"] / 1.1).float()
    assert_refused(
        optimizer, lambda: optimizer.load_state_dict(saved), ValueError, "must be orthonormal"
    )


def test_factors_are_checked_where_an_importance_is_made():
    one = factors_of(Layout((4, 4)), 0)
    stretched = replace(one, output=replace(one.output, basis=one.output.basis * 2))
    with pytest.raises(ValueError, match="must be orthonormal"):
        KroneckerImportance({"w": stretched}, {}, 1)
