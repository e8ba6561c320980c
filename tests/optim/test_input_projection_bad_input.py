"""What InputProjection refuses: a table of bad input for each of its methods; nothing changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
from bad_input import Row, each_of, refused
from optimizer_cases import assert_refused
from projection_cases import factors, importance, rows
from torch import nn
from torch.optim import SGD, AdamW

from cl_optim import GEM, EWCAdamW, Importance, ImportanceLog, InputProjection
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.optim.settling import settle_before


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


INPUTS = {"0.weight": rows(6, 30, 3, seed=1), "2.weight": rows(5, 30, 2, seed=2)}


def with_side(**changes: Any) -> KroneckerImportance:
    """An importance that is damaged after it was checked."""
    found = importance(make_model(), INPUTS)
    one = found.factors["0.weight"]
    damaged = replace(one, input=replace(one.input, **changes))
    found._factors["0.weight"] = damaged
    return found


def one_of(layout: Layout, x: torch.Tensor, **more: Any) -> KroneckerImportance:
    return KroneckerImportance({"0.weight": factors(layout, x, **more)}, {}, samples=1)


OPTIONS: list[Row] = [
    ("negative strength", {"strength": -1.0}, ValueError, "strength must be finite and at least 0"),
    ("NaN strength", {"strength": nan}, ValueError, "strength must be finite and at least 0"),
    ("infinite strength", {"strength": inf}, ValueError, "strength must be .*, not inf"),
    ("mode", {"mode": "firm"}, ValueError, r"mode must be one of \('soft', 'hard'\), not 'firm'"),
    ("no energy", {"energy": 0.0}, ValueError, r"energy must be in \(0, 1\], not 0\.0"),
    ("energy", {"energy": 1.1}, ValueError, "energy must be in"),
    ("NaN energy", {"energy": nan}, ValueError, "energy must be in"),
    ("every", {"every": 0}, ValueError, "every must be a whole number of at least 1, not 0"),
    ("broken every", {"every": 1.5}, ValueError, "every must be a whole number"),
]


@each_of(OPTIONS)
def test_an_option_is_refused(given, error, message):
    with refused(error, message):
        InputProjection(SGD(make_model().parameters()), **given)


OPTIMIZER: list[Row] = [
    ("parameters", lambda params: params, TypeError, r"must be a torch\.optim\.Optimizer"),
    (
        "InputProjection", lambda params: InputProjection(SGD(params)), ValueError,
        "must not be an InputProjection itself: consolidate",
    ),
    (
        "GEM between", lambda params: GEM(InputProjection(SGD(params))), ValueError,
        "must not be an InputProjection itself",
    ),
    (
        "differentiable", lambda params: AdamW(params, differentiable=True), ValueError,
        "must not be made with differentiable=True",
    ),
]  # fmt: skip


@each_of(OPTIMIZER)
def test_an_optimizer_is_refused(given, error, message):
    optimizer = given([*make_model().parameters()])
    with refused(error, message):
        InputProjection(optimizer)


def test_a_gem_refuses_what_it_refuses_within():
    model = make_model()
    lbfgs = InputProjection(torch.optim.LBFGS(model.parameters()))
    with refused(ValueError, "must not be LBFGS"):
        GEM(lbfgs)
    inside = InputProjection(GEM(SGD(model.parameters())))
    with refused(ValueError, "must not be a GEM itself"):
        GEM(inside)


def test_a_differentiable_group_is_refused():
    model = make_model()
    optimizer = InputProjection(AdamW(model[0].parameters()))
    with refused(ValueError, "differentiable=True"):
        optimizer.add_param_group({"params": [*model[2].parameters()], "differentiable": True})
    assert len(optimizer.param_groups) == 1


CONSOLIDATE: list[Row] = [
    (
        "a diagonal importance",
        {"importance": Importance({"0.weight": torch.ones(5, 6)}, samples=1)},
        TypeError,
        r"not Importance: make it with estimate_fisher\(\.\.\., structure=\"kronecker\"\)",
    ),
    ("a dict", {"importance": {"0.weight": torch.ones(5, 6)}}, TypeError, "structure="),
    ("None", {"importance": None}, TypeError, "structure="),
    (
        "no factors",
        {"importance": KroneckerImportance({}, {"0.weight": torch.ones(5, 6)}, samples=1)},
        ValueError,
        "must have Kronecker factors, and has none",
    ),
    (
        "another model",
        {"importance": KroneckerImportance(
            {"fc.weight": factors(Layout((5, 6)), rows(6, 9, 3, 1, False))}, {}, samples=1)},
        ValueError,
        r"factors of 'fc\.weight', which this optimizer does not have",
    ),
    (
        "another shape",
        {"importance": one_of(Layout((5, 4)), rows(4, 9, 3, 1, False))},
        ValueError,
        r"'0\.weight' are of another model: its shape is \(5, 6\) here and was \(5, 4\)",
    ),
    (
        "another task's matrix",
        {"importance": one_of(Layout((5, 6)), rows(6, 9, 3, 1, False))},
        ValueError,
        "are of another matrix than those of the tasks before: .* decay=0",
    ),
    (
        "other blocks",
        {"importance": one_of(Layout((5, 6), False, "0.bias"), INPUTS["0.weight"], block=3)},
        ValueError,
        "have 3 blocks, and those of the tasks before 1: estimate all with the same block=",
    ),
    (
        "NaN", {"importance": with_side(values=torch.full((4,), nan))}, ValueError,
        "eigenvalues of '0.weight' must be finite",
    ),
    ("a NaN tail", {"importance": with_side(tail=nan)}, ValueError, "tail of .* must be finite"),
    (
        "not orthonormal",
        {"importance": with_side(basis=torch.ones(1, 7, 4))}, ValueError, "must be orthonormal",
    ),
    ("decay", {"decay": 1.5}, ValueError, r"decay must be in \[0, 1\]"),
    ("NaN decay", {"decay": nan}, ValueError, "decay must be in"),
    ("anchors", {"anchors": "latest"}, TypeError, "anchors= is for a wrapped .* SGD has none"),
    ("inner", {"inner": None}, TypeError, "inner= is for a wrapped .* wrap a cl_optim.EWCAdamW"),
    (
        "a model without its parameters", {"model": make_model()}, ValueError,
        "model must hold the optimizer's parameters",
    ),
]  # fmt: skip


@each_of(CONSOLIDATE)
def test_consolidate_refuses(given, error, message):
    model = make_model()
    optimizer = InputProjection(SGD(model.named_parameters(), lr=0.1))
    optimizer.consolidate(importance(model, INPUTS))
    arguments = {"importance": importance(model, INPUTS), **given}
    assert_refused(optimizer, lambda: optimizer.consolidate(**arguments), error, message)


def test_an_optimizer_without_names_is_refused():
    model = make_model()
    optimizer = InputProjection(SGD(model.parameters()))
    given = importance(model, INPUTS)
    message = r"made without parameter names: .* or pass model=model to consolidate\(\)"
    assert_refused(optimizer, lambda: optimizer.consolidate(given), ValueError, message)
    optimizer.consolidate(given, model=model)
    with refused(ValueError, message):
        InputProjection(SGD(model.parameters()), given)


def test_more_energy_than_the_importance_has_is_refused():
    model = nn.Linear(8, 4)
    x = rows(8, 40, 8, seed=1)
    given = KroneckerImportance(
        {"weight": factors(Layout((4, 8), False, "bias"), x, energy=0.5)}, {}, samples=1
    )
    optimizer = InputProjection(SGD(model.named_parameters()), mode="hard", energy=0.9)
    message = r"energy=0\.9 is more than the share .* 0\.\d+: estimate it with energy=0\.9 or more"
    assert_refused(optimizer, lambda: optimizer.consolidate(given), ValueError, message)


def test_a_log_of_diagonals_is_refused(tmp_path):
    model = make_model()
    log = ImportanceLog(tmp_path)
    log.record("a", Importance({"0.weight": torch.ones(5, 6)}, samples=1))
    optimizer = InputProjection(SGD(model.named_parameters()))
    assert_refused(optimizer, lambda: optimizer.consolidate(log), TypeError, "structure=")


def test_what_an_inner_optimizer_refuses_leaves_the_inputs():
    model = make_model()
    optimizer = InputProjection(EWCAdamW(model.named_parameters()))
    given = importance(model, INPUTS)
    ones = {"0.weight": torch.ones(5, 6)}
    message = "importance has nothing for parameter"
    assert_refused(optimizer, lambda: optimizer.consolidate(given, inner=ones), ValueError, message)
    assert not optimizer._subspaces()


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda given: given._factors.update(gone=given._factors["2.weight"]), 2),
        (lambda given: given._factors.update({"2.weight": given._factors["0.weight"]}), 1),
    ],
    ids=["unknown", "resized"],
)
def test_what_does_not_fit_is_left_out_where_it_may_be(change, left, caplog):
    model = make_model()
    optimizer = InputProjection(SGD(model.named_parameters()))
    given = importance(model, INPUTS)
    change(given)
    with refused(ValueError, "strict=False ignores them"):
        optimizer.consolidate(given)
    optimizer.consolidate(given, strict=False)
    assert len(optimizer._subspaces()) == left
    assert "Left out with strict=False: factors of" in caplog.text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_is_refused(dtype):
    weight = nn.Parameter(torch.zeros(5, 6).to(dtype))
    optimizer = InputProjection(SGD([("0.weight", weight)]))
    given = one_of(Layout((5, 6)), rows(6, 9, 3, 1, False))
    with refused(ValueError, "'0.weight' must be of float32, float64, bfloat16, float16"):
        optimizer.consolidate(given)


def test_a_parameter_of_another_shape_is_refused():
    model = make_model()
    optimizer = InputProjection(SGD(model.named_parameters()), importance(model, INPUTS))
    model[0].weight.data = torch.zeros(5, 7)
    with refused(RuntimeError, r"a parameter of shape \(5, 6\) has shape \(5, 7\) now"):
        optimizer.step()


KEY = "input_projection"
LOAD_STATE_DICT: list[Row] = [
    ("state", lambda s: s.pop("state"), ValueError, "has no 'state'"),
    ("params", lambda s: s["param_groups"][0]["params"].pop(), ValueError, "other parameters"),
    ("options", lambda s: s[KEY].pop("options"), ValueError, f"its '{KEY}' has no 'options'"),
    ("matrices", lambda s: s[KEY].pop("matrices"), ValueError, "has no 'matrices'"),
    ("no mode", lambda s: s[KEY]["options"].pop("mode"), ValueError, "options have no 'mode'"),
    ("mode", lambda s: s[KEY]["options"].update(mode="?"), ValueError, "mode must be one of"),
    ("every", lambda s: s[KEY]["options"].update(every=0), ValueError, "every must be"),
    ("due", lambda s: s[KEY].update(due=-1), ValueError, "'due' must be a whole number"),
    ("old", lambda s: s[KEY]["old"].pop(0), ValueError, "its 'old' lacks weights of .* '0.weight'"),
    (
        "basis", lambda s: s[KEY]["matrices"][1].pop("basis"), ValueError,
        "has no 'basis' of matrix 1",
    ),
    (
        "weight", lambda s: s[KEY]["matrices"][1].update(weight=9), ValueError,
        "other parameters: of '2.weight', there is no parameter 9",
    ),
    (
        "shape", lambda s: s[KEY]["matrices"][1].update(weight=0), ValueError,
        r"other parameters: of '2.weight', its shape is \(5, 6\)",
    ),
    (
        "bias", lambda s: s[KEY]["matrices"][1].update(bias=1), ValueError,
        "other parameters: of '2.weight', its bias has shape",
    ),
    (
        "values", lambda s: s[KEY]["matrices"][0].update(values=torch.ones(3)), ValueError,
        "input directions of the Kronecker factors of '0.weight' must be",
    ),
    (
        "NaN", lambda s: s[KEY]["matrices"][0]["values"].fill_(nan), ValueError,
        "eigenvalues of '0.weight' must be finite",
    ),
    (
        "directions", lambda s: s[KEY]["matrices"][0]["basis"].mul_(2), ValueError,
        "must be orthonormal",
    ),
]  # fmt: skip


@each_of(LOAD_STATE_DICT)
def test_a_damaged_state_dict_is_refused_and_changes_nothing(given, error, message):
    model = make_model()
    optimizer = InputProjection(SGD(model.named_parameters(), lr=0.1), every=3)
    optimizer.consolidate(importance(model, INPUTS))
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    damaged = copy.deepcopy(optimizer.state_dict())
    given(damaged)
    optimizer.step()
    assert_refused(optimizer, lambda: optimizer.load_state_dict(damaged), error, message)
    assert_refused(optimizer, lambda: optimizer.check_state_dict(damaged), error, message)
    optimizer.step()


SETTLE_BEFORE: list[Row] = [
    ("an optimizer", (SGD, nn.Linear(2, 2)), TypeError, r"have a settle\(\), and SGD has none"),
    (
        "a GEM of one", (lambda p: GEM(SGD(p)), nn.Linear(2, 2)), TypeError,
        "GEM has none: give a cl_optim.InputProjection",
    ),
    (
        "no module", (lambda p: InputProjection(SGD(p)), torch.relu), TypeError,
        r"model must be a torch\.nn\.Module",
    ),
]  # fmt: skip


@each_of(SETTLE_BEFORE)
def test_settle_before_refuses(given, error, message):
    make, model = given
    optimizer = make([*make_model().parameters()])
    with refused(error, message):
        settle_before(optimizer, model)


def test_what_a_wrapped_optimizer_does_not_have():
    optimizer = InputProjection(SGD(make_model().parameters()))
    for name in ("freeze", "unfreeze", "penalty", "protected", "suggest_lambda", "last_penalty"):
        assert not hasattr(optimizer, name)
        with refused(AttributeError, f"^'{name}' is the wrapped optimizer's, and SGD has none"):
            getattr(optimizer, name)
