"""What EWC refuses: a table of bad input for each of its methods; nothing changes."""

from __future__ import annotations

import copy
from math import inf, nan
from typing import Any

import pytest
import torch
from bad_input import Row, each_of, refused
from optimizer_cases import assert_refused
from torch import nn
from torch.optim import SGD, Adafactor, AdamW

from cl_optim import EWC, GEM, EWCAdamW, InputProjection


def params() -> list[tuple[str, nn.Parameter]]:
    return [("a", nn.Parameter(torch.ones(3, 2))), ("b", nn.Parameter(torch.ones(2)))]


IMPORTANCE = {"a": torch.ones(3, 2), "b": torch.ones(2)}


def protected(**options: Any) -> EWC:
    ewc = EWC(SGD(params(), lr=0.1), **options)
    ewc.consolidate(IMPORTANCE)
    return ewc


OPTIONS: list[Row] = [
    ("negative lambda", {"ewc_lambda": -1.0}, ValueError, "ewc_lambda must be finite"),
    ("NaN lambda", {"ewc_lambda": nan}, ValueError, "ewc_lambda must be finite and at least 0"),
    ("infinite lambda", {"ewc_lambda": inf}, ValueError, "ewc_lambda must be finite"),
    ("penalty", {"penalty": "none"}, ValueError, r"penalty must be one of \('gradient', "),
    ("importance", {"importance_dtype": "int8"}, ValueError, "importance_dtype must be one of"),
    ("anchor", {"anchor_dtype": torch.float16}, ValueError, "anchor_dtype must be one of"),
    ("basis", {"basis_dtype": "log8"}, ValueError, "basis_dtype must be one of"),
    ("strength", {"strength": -0.1}, ValueError, "strength must be finite and at least 0, or None"),
    ("rounding", {"rounding": "kahan"}, ValueError, r"rounding must be one of \('nearest', 'sto"),
    ("damping", {"importance_damping": nan}, ValueError, "importance_damping must be finite"),
    ("no steps", {"every": 0}, ValueError, "every must be"),
    ("half a step", {"every": 2.5}, ValueError, "every must be"),
    ("every, decoupled", {"every": 2, "penalty": "decoupled"}, ValueError, "every must be 1 with"),
    ("every, gradient", {"every": 2, "penalty": "gradient"}, ValueError, "every must be 1 with"),
]


@each_of(OPTIONS)
def test_options(given, error, message):
    optimizer = SGD(params(), lr=0.1)
    assert_refused(optimizer, lambda: EWC(optimizer, **given), error, message)
    ewc = protected()
    (key, value), *_ = given.items()
    if len(given) == 1:
        group = {"params": [nn.Parameter(torch.ones(1))], key: value}
        named = [("c", group["params"][0])]
        assert_refused(ewc, lambda: ewc.add_param_group({**group, "params": named}), error, message)
    for changed, option in given.items():
        ewc.param_groups[0][changed] = option
    for param in ewc.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    before = [p.detach().clone() for p in ewc.param_groups[0]["params"]]
    with refused(error, message):
        ewc.step()
    assert all(map(torch.equal, before, ewc.param_groups[0]["params"]))


def with_options(**options: Any) -> SGD:
    class Odd(SGD):
        pass

    odd = Odd(params(), lr=0.1)
    odd.defaults.update(options)
    for group in odd.param_groups:
        group.update(options)
    return odd


class CPUOffloadOptimizer(SGD):
    """By its name: torchao's needs a GPU."""


WRAPPED: list[Row] = [
    ("no optimizer", lambda: nn.Linear(2, 2), TypeError, "optimizer must be a torch.optim.Opti"),
    ("EWCAdamW", lambda: EWCAdamW(params()), ValueError, "must not be an EWCAdamW, nor around one"),
    ("EWC", lambda: EWC(SGD(params(), lr=0.1)), ValueError, "must not be an EWC, nor around one"),
    ("around one", lambda: GEM(EWCAdamW(params())), ValueError, "consolidate() that".replace(
        "()", r"\(\)")),
    ("copies", lambda: CPUOffloadOptimizer(params(), lr=0.1), ValueError, "CPUOffloadOptimizer: "),
    ("its own penalty", lambda: with_options(strength=1.0), ValueError, "an option 'strength' of"),
    ("differentiable", lambda: SGD(params(), lr=0.1, differentiable=True), ValueError,
     "must not be made with differentiable=True"),
    ("schedule-free", lambda: with_options(train_mode=True, weight_sum=0.0), ValueError,
     "penalty must be 'gradient' around a schedule-free optimizer"),
    ("no rate", lambda: with_options(lr=None), ValueError, "a group has no learning rate 'lr'"),
    ("complex", lambda: SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1),
     ValueError, "real floating-point dtype"),
]  # fmt: skip


@each_of(WRAPPED)
def test_optimizers_that_cannot_be_wrapped(given, error, message):
    optimizer = given()
    with refused(error, message) as caught:
        EWC(optimizer)
    assert str(caught.value).endswith(".")
    if isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, EWC | GEM):
        assert "anchor_dtype" not in optimizer.param_groups[0] or isinstance(optimizer, EWCAdamW)


def test_a_gradient_penalty_needs_no_learning_rate():
    for optimizer in (with_options(train_mode=True, weight_sum=0.0), Adafactor(params())):
        ewc = EWC(optimizer, penalty="gradient")
        ewc.consolidate(IMPORTANCE)
        for param in ewc.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        ewc.step()


CONSOLIDATED: list[Row] = [
    ("unknown", ({**IMPORTANCE, "c": torch.ones(1)}, {}), ValueError, "importance names 'c'"),
    ("missing", ({"a": torch.ones(3, 2)}, {}), ValueError, "importance has nothing for param"),
    ("shape", ({**IMPORTANCE, "b": torch.ones(3)}, {}), ValueError, "must have the parameter's sh"),
    ("negative", ({**IMPORTANCE, "b": -torch.ones(2)}, {}), ValueError, "finite and at least 0"),
    ("NaN", ({**IMPORTANCE, "b": torch.full((2,), nan)}, {}), ValueError, "finite and at least 0"),
    ("no mapping", ([1.0], {}), TypeError, "importance must be a mapping"),
    ("decay", (IMPORTANCE, {"decay": 2.0}), ValueError, "decay must be"),
    ("anchors", (IMPORTANCE, {"anchors": "mean"}), ValueError, "anchors must be one of"),
    ("moments", (IMPORTANCE, {"reset_state": True}), ValueError, "reset_state is not for an opt"),
]


@each_of(CONSOLIDATED)
def test_consolidate(given, error, message):
    ewc = protected()
    found, options = given
    assert_refused(ewc, lambda: ewc.consolidate(found, **options), error, message)


def test_freeze_needs_importance():
    with refused(RuntimeError, "freeze() needs importance".replace("()", r"\(\)")):
        EWC(SGD(params(), lr=0.1)).freeze()


def stepped(ewc: EWC) -> None:
    for group in ewc.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    ewc.step()


def add_inside(ewc: EWC) -> None:
    ewc.optimizer.add_param_group({"params": [("c", nn.Parameter(torch.ones(1)))]})


def load_inside(ewc: EWC) -> None:
    ewc.optimizer.load_state_dict(SGD(params(), lr=0.1).state_dict())


def replace_one(ewc: EWC) -> None:
    ewc.param_groups[0]["params"][1] = nn.Parameter(torch.ones(2))


def cast(ewc: EWC) -> None:
    for param in ewc.param_groups[0]["params"]:
        param.grad = None
        param.data = param.data.double()


BEHIND_ITS_BACK: list[Row] = [
    ("a group", add_inside, RuntimeError, "a group has no 'ewc_lambda': it was added or loaded"),
    ("a state", load_inside, RuntimeError, r"call add_param_group\(\) and load_state_dict\(\) of"),
    ("a parameter", replace_one, RuntimeError, "1 parameters that are protected are not the optim"),
    ("a dtype", cast, RuntimeError, "parameter a was cast to torch.float64 after its 'importance'"),
]


@each_of(BEHIND_ITS_BACK)
def test_what_is_done_behind_its_back(given, error, message):
    ewc = protected()
    stepped(ewc)
    given(ewc)
    before = [p.detach().clone() for g in ewc.param_groups for p in g["params"]]
    with refused(error, message):
        stepped(ewc)
    after = [p.detach() for g in ewc.param_groups for p in g["params"]]
    assert all(map(torch.equal, before, after))
    if given is cast:
        ewc.load_state_dict(ewc.state_dict())
        stepped(ewc)


def test_parameters_that_change_places_keep_their_protection():
    ewc, other = protected(ewc_lambda=50.0), protected(ewc_lambda=50.0)
    for one in (ewc, other):
        stepped(one)
        stepped(one)
    ewc.param_groups[0]["params"].reverse()
    for one in (ewc, other):
        stepped(one)
    pairs = zip(
        reversed(ewc.param_groups[0]["params"]), other.param_groups[0]["params"], strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_sparse_gradient_has_no_place_for_a_penalty():
    table = nn.Embedding(5, 2, sparse=True)
    for penalty in ("gradient", "proximal"):
        ewc = EWC(SGD(table.named_parameters(), lr=0.1), penalty=penalty)
        ewc.consolidate(None)
        ewc.zero_grad()
        table(torch.tensor([1, 3])).sum().backward()
        before = table.weight.detach().clone()
        if penalty == "gradient":
            with refused(RuntimeError, "gradient of parameter weight must be dense"):
                ewc.step()
            assert torch.equal(table.weight, before)
        else:
            ewc.step()
            assert not torch.equal(table.weight, before)


def without(*path: Any) -> Any:
    def damage(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return damage


def changed(value: Any, *path: Any) -> Any:
    def damage(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return damage


STATES: list[Row] = [
    ("no groups", without("ewc", "groups"), ValueError, "truncated: its 'ewc' has no 'groups'"),
    ("no state", without("ewc", "state"), ValueError, "truncated: its 'ewc' has no 'state'"),
    ("no option", without("ewc", "groups", 0, "every"), ValueError, "a group has no 'every'"),
    ("bad option", changed(-1, "ewc", "groups", 0, "ewc_lambda"), ValueError, "ewc_lambda must be"),
    ("fewer groups", changed([], "ewc", "groups"), ValueError, "has 0 groups, not 1"),
    ("no anchor", without("ewc", "state", 0, "anchor"), ValueError, "parameter a has no 'anchor'"),
    ("a shape", changed(torch.ones(5), "ewc", "state", 1, "anchor"), ValueError, "has shape"),
    ("a place", changed({}, "ewc", "state", 7), ValueError, "something for place 7 of 2"),
    ("other groups", changed([], "param_groups"), ValueError, "group"),
]


@each_of(STATES)
def test_state_dicts(given, error, message):
    ewc = protected()
    state_dict = copy.deepcopy(ewc.state_dict())
    given(state_dict)
    assert_refused(ewc, lambda: ewc.load_state_dict(state_dict), error, message)
    assert_refused(ewc, lambda: ewc.check_state_dict(state_dict), error, message)


def test_what_belongs_to_another_optimizer_says_so():
    ewc = EWC(AdamW(params()))
    for name in ("suggest_lambda", "last_penalty", "last_drift"):
        with pytest.raises(AttributeError, match=r"wrap a cl_optim\.EWCAdamW"):
            getattr(ewc, name)
    with pytest.raises(ValueError, match="must not be an InputProjection itself"):
        InputProjection(InputProjection(ewc))
