"""Launch plans: taken where steps are alike, and nothing stale is ever used."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, Problem, make_params
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cl_optim import GEM, EWCAdamW
from cl_optim.ops import ewc_adamw_plan as ops

SHAPES = [(5, 7), (300,), (), (0,), (4, 3, 2)]
IMPLEMENTATIONS = [{"fused": True}, {"foreach": True}]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each planned launch: how many parameters took part."""
    launches: list[int] = []
    take_step = ops.take_step

    def recorded(calls: Sequence[ops.Call]) -> bool:
        taken = take_step(calls)
        if taken:
            launches.extend(len(call.plan.params) for call in calls if call.plan.params)
        return taken

    monkeypatch.setattr(ops, "take_step", recorded)
    return launches


class Pair:
    """The same training twice: fused, with plans, and by the reference."""

    def __init__(self, device: str = "cpu", **options: Any) -> None:
        start = Problem.of(make_params(SHAPES, torch.float32))
        self.sides = []
        self.step_number = 0
        for implementation in ({"fused": True}, {"foreach": True}):
            problem = start.copy(torch.float32, device)
            named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
            groups = [{"params": named[:3]}, {"params": named[3:], "lr": 1e-3}]
            optimizer = EWCAdamW(groups, **{**OFF_DEFAULT, **implementation, **options})
            optimizer.consolidate({f"p{i}": f for i, f in enumerate(problem.importances)})
            self.sides.append((problem, optimizer))
        self.fused = self.sides[0][1]

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            for problem, optimizer in self.sides:
                problem.set_gradients(self.step_number, torch.float32)
                optimizer.step()
            self.step_number += 1
        self.check()

    def check(self) -> None:
        for p, q in zip(self.sides[0][0].params, self.sides[1][0].params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            for key, value in self.sides[1][1].state[q].items():
                ours = self.fused.state[p][key]
                torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)

    def both(self, change: Callable[[EWCAdamW, list[Tensor]], None]) -> None:
        with torch.no_grad():
            for problem, optimizer in self.sides:
                change(optimizer, problem.params)


def test_from_the_third_step_on(planned, device):
    pair = Pair(device)
    pair.step(2)
    assert planned == []
    pair.step(2)
    assert planned == [3, 2, 3, 2]


def test_every_gradient_is_read_again(planned):
    """New memory, another dtype, another layout, none: each step."""
    weights = [torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2)]
    optimizer = EWCAdamW(weights, lr=0.1, fused=True)

    def step(*grads: Tensor | None) -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        before = [w.detach().clone() for w in weights]
        optimizer.step()
        for weight, grad, old in zip(weights, grads, before, strict=True):
            assert torch.equal(weight, old) == (grad is None)

    for _ in range(4):
        step(torch.ones(6, 4), torch.ones(6, 4))
    assert len(planned) == 2
    step(torch.ones(6, 4), torch.ones(4, 6).t())  # copied: taken, but not by the plan
    assert len(planned) == 2
    for _ in range(3):
        step(torch.ones(6, 4), None)
    assert len(planned) == 3
    step(None, None)
    step(torch.ones(6, 4), torch.ones(6, 4))
    assert [int(optimizer.state[w]["step"]) for w in weights] == [9, 6]

    with torch.no_grad():  # the parameters become bfloat16 in place, and so do their gradients
        for weight in weights:
            weight.data = weight.data.bfloat16()
    for _ in range(4):
        step(torch.ones(6, 4).bfloat16(), torch.ones(6, 4).bfloat16())
    assert weights[0].dtype == torch.bfloat16
    assert len(planned) == 6


def test_gradients_in_the_same_buffer_with_another_offset():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = EWCAdamW([weight], lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, fused=True)
    buffer = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    for step in range(6):
        weight.grad = buffer[4 * (step % 2) :][:4]
        optimizer.step()
        assert (weight == (-1.0 if step % 2 == 0 else 0.0)).all()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "importance", "anchor", "step"])
@pytest.mark.parametrize("how", ["other memory", "other tensor"])
def test_state_that_is_replaced(key, how, planned):
    pair = Pair()
    pair.step(3)

    def change(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        state = optimizer.state[params[1]]
        if how == "other memory":
            state[key].data = state[key].data * 2 + 1
        else:
            state[key] = state[key] * 2 + 1

    pair.both(change)
    pair.step(4)
    assert len(planned) >= 4


def test_state_that_is_removed_or_begun_anew():
    pair = Pair()
    pair.step(3)
    pair.both(lambda optimizer, params: optimizer.state[params[0]].clear())
    pair.step(3)

    def replace(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        optimizer.state[params[1]] = dict(optimizer.state[params[1]])

    pair.both(replace)
    pair.step(3)

    def forget(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        optimizer.state = defaultdict(dict)

    pair.both(forget)
    pair.step(3)
    assert "importance" not in pair.fused.state[pair.sides[0][0].params[0]]


def test_parameters_in_other_memory(planned):
    pair = Pair()
    pair.step(4)

    def move(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        for param in params:
            param.data = param.data.clone()

    pair.both(move)
    before = len(planned)
    pair.step(2)
    assert len(planned) == before + 4  # its address is read anew: the plan goes on


def test_a_parameter_in_the_place_of_another():
    pair = Pair()
    pair.step(3)

    def exchange(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        group = optimizer.param_groups[0]["params"]
        group[0], group[1] = group[1], group[0]

    pair.both(exchange)
    pair.step(3)


def test_groups_that_come_and_go():
    pair = Pair()
    pair.step(3)
    new = [torch.nn.Parameter(torch.ones(3)) for _ in pair.sides]
    for (problem, optimizer), param in zip(pair.sides, new, strict=True):
        optimizer.add_param_group({"params": [("new", param)]})
        problem.params.append(param)
    pair.step(4)
    assert (new[0] != 1).all()
    for problem, optimizer in pair.sides:
        optimizer.param_groups.pop()
        problem.params.pop()
    stopped = new[0].detach().clone()
    pair.step(3)
    assert torch.equal(new[0], stopped)


def test_hyperparameters_are_read_in_each_step(planned):
    pair = Pair()
    pair.step(3)
    for name, value in {
        "lr": 0.5,
        "betas": (0.5, 0.6),
        "weight_decay": 0.3,
        "ewc_lambda": 9.0,
        "penalty": "proximal",
        "importance_damping": 2.0,
        "maximize": True,
        "eps": 1e-3,
    }.items():
        for _, optimizer in pair.sides:
            optimizer.param_groups[0][name] = value
        pair.step()
    assert len(planned) == 2 + 16
    for _, optimizer in pair.sides:
        optimizer.param_groups[0]["amsgrad"] = True
    pair.step(4)
    pair.fused.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be finite"):
        pair.fused.step()


def test_rounding_that_is_switched_on(planned):
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = EWCAdamW([weight], lr=1e-4, weight_decay=0.0, fused=True)
    for number in range(60):
        if number == 5:
            assert planned
            optimizer.param_groups[0]["rounding"] = "kahan"
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert "compensation" in optimizer.state[weight]
    assert (weight < 1).all()


def test_consolidating_and_freezing_in_mid_training():
    pair = Pair(importance_dtype="log8")
    pair.step(4)
    for number in range(2):
        for problem, optimizer in pair.sides:
            torch.manual_seed(number)
            optimizer.consolidate(
                {f"p{i}": torch.rand(p.shape) for i, p in enumerate(problem.params)}
            )
            optimizer.freeze(0.1 * (number + 1))
        pair.step(4)
    for _, optimizer in pair.sides:
        optimizer.unfreeze()
    pair.step(4)


def test_a_loaded_state_dict_and_copies(planned):
    pair = Pair()
    pair.step(4)
    saved = copy.deepcopy(pair.fused.state_dict())
    pair.step(2)
    twin = copy.deepcopy(pair.fused)
    assert twin.param_groups[0]["params"][0] is not pair.fused.param_groups[0]["params"][0]
    twin.step()
    pair.check()  # it has moved the copies only
    for _, optimizer in pair.sides:
        optimizer.load_state_dict({**copy.deepcopy(saved), "param_groups": [
            {**group, "fused": here["fused"], "foreach": here["foreach"]}
            for group, here in zip(saved["param_groups"], optimizer.param_groups, strict=True)
        ]})  # fmt: skip
    pair.step(4)


def test_a_sparse_gradient_changes_nothing():
    pair = Pair()
    pair.step(4)
    param = pair.fused.param_groups[1]["params"][1]
    pair.sides[0][0].set_gradients(0, torch.float32)
    before = [p.detach().clone() for p in pair.sides[0][0].params]
    param.grad = param.grad.to_sparse()
    with pytest.raises(RuntimeError, match="the gradient of parameter p4 must be dense"):
        pair.fused.step()
    for p, old in zip(pair.sides[0][0].params, before, strict=True):
        assert torch.equal(p, old)


def test_an_idle_group_is_watched(planned):
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = EWCAdamW([{"params": weights[:1]}, {"params": weights[1:]}], fused=True)
    for _ in range(4):
        weights[0].grad = torch.ones(3)
        optimizer.step()
    assert planned == [1, 1]
    weights[1].grad = torch.ones(3)
    optimizer.step()
    assert (weights[1] != 1).all()


def test_strange_layouts_are_not_planned(planned):
    weight = torch.nn.Parameter(torch.ones(6, 4)[:, ::2])
    optimizer = EWCAdamW([weight], fused=True)
    for _ in range(4):
        weight.grad = torch.ones(6, 2)
        optimizer.step()
    assert planned == []
    assert (weight < 1).all()


def test_transposed_and_channels_last_parameters_are(planned):
    weights = [
        torch.nn.Parameter(torch.ones(6, 4).t()),
        torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.ones(1, 5)),
    ]
    optimizer = EWCAdamW(weights, fused=True)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert planned == [3, 3]


def test_gem_projects_in_planned_steps(planned):
    results = []
    for implementation in ({"fused": True}, {"foreach": True}):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        old = torch.randn(32, 6), torch.randn(32, 2)
        optimizer = GEM(EWCAdamW(model.named_parameters(), lr=1e-2, **implementation))

        def closure(model=model, old=old) -> None:
            (model(old[0]) - old[1]).square().mean().backward()

        optimizer.remember("old", closure)
        for step in range(8):
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) + 3 * x[:, :2]).square().mean().backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert len(planned) >= 5
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_parameters_versions_advance(planned):
    pair = Pair()
    pair.step(4)
    param = pair.sides[0][0].params[1]
    saved = (param * param).sum()  # saves it for the backward pass
    pair.sides[0][0].set_gradients(0, torch.float32)
    pair.fused.step()
    assert planned[-1] == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_memory_is_kept_while_it_is_needed(planned):
    """Nothing but the plan holds the state's old tensors when they are dropped."""
    pair = Pair()
    pair.step(4)
    for _, optimizer in pair.sides:
        for state in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(state[key])
    torch.empty(100_000).fill_(torch.nan)
    pair.step(3)


# --- what a plan cannot read as it lies -----------------------------------------------------------


def negated(tensor: Tensor) -> Tensor:
    """The same numbers, as a view of their opposites that torch negates when it reads them."""
    lazy = torch._neg_view((-tensor).contiguous(memory_format=torch.preserve_format))
    assert lazy.is_neg()
    assert torch.equal(lazy, tensor)
    return lazy


def test_where_torch_keeps_the_negative_bit_is_known(planned):
    """Else there would be no plans: slower, and nothing else would tell."""
    for shape in ((), (1,), (3, 2), (2, 1, 3, 1, 2)):
        weight = nn.Parameter(torch.ones(shape))
        optimizer = EWCAdamW([weight], fused=True)
        for _ in range(3):
            weight.grad = torch.ones(shape)
            optimizer.step()
    assert planned == [1] * 4


def test_six_dimensions_are_not_planned(planned):
    weight = nn.Parameter(torch.ones(1, 2, 1, 2, 1, 2))
    optimizer = EWCAdamW([weight], fused=True)
    for _ in range(4):
        weight.grad = negated(torch.ones_like(weight))
        optimizer.step()
    assert planned == []
    assert (weight < 1).all()


def test_a_gradient_through_a_conjugate_descends(planned):
    """Autograd leaves a gradient that is lazily negated."""
    sides = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [EWCAdamW(sides[:1], lr=0.1, fused=True), EWCAdamW(sides[1:], lr=0.1)]
    optimizers[1].param_groups[0]["foreach"] = True
    for _ in range(12):
        for p, optimizer in zip(sides, optimizers, strict=True):
            optimizer.zero_grad()
            z = torch.complex(torch.zeros(1), p)
            (z.conj() + 2j).abs().square().sum().backward()
            assert p.grad.is_neg()
            optimizer.step()
    assert sides[0] > 1.5  # the loss is (2 - p)²
    torch.testing.assert_close(*sides)
    assert planned == []
    for _ in range(3):
        sides[0].grad = sides[0].grad.resolve_neg()
        optimizers[0].step()
    assert len(planned) >= 1


@pytest.mark.parametrize("shape", [(1,), (300,), (5, 7)])
def test_negated_gradients_of_planned_steps(shape, planned):
    sides = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = [
        EWCAdamW([p], lr=0.1, **how) for p, how in zip(sides, IMPLEMENTATIONS, strict=True)
    ]
    for step in range(6):
        grad = torch.full(shape, 1.0 + step)
        for p, optimizer in zip(sides, optimizers, strict=True):
            p.grad = negated(grad) if step > 3 else grad
            optimizer.step()
    assert planned == [1, 1]
    torch.testing.assert_close(*sides)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("key", ["importance", "anchor"])
def test_negated_protection(key, in_place, planned):
    pair = Pair()
    pair.step(3)
    before = len(planned)

    def change(optimizer: EWCAdamW, params: list[Tensor]) -> None:
        state = optimizer.state[params[1]]
        if in_place and optimizer is pair.fused:  # the same object, at the same address
            opposite = state[key]
            opposite.neg_()
            opposite.data = torch._neg_view(opposite.data)
            assert opposite.is_neg()
        else:
            state[key] = negated(state[key])

    pair.both(change)
    pair.step(3)
    # In the group of the other parameters there is nothing, but a step is planned as a whole.
    assert len(planned) == before


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_negated_state_is_refused(key, in_place):
    pair = Pair()
    pair.step(4)
    problem, optimizer = pair.sides[0]
    state = optimizer.state[problem.params[1]]
    if in_place:
        state[key].data = torch._neg_view(state[key].data)
    else:
        state[key] = negated(state[key])
    problem.set_gradients(9, torch.float32)
    unchanged(optimizer, problem.params, rf"{key}s\[1\] is written and must not be lazily negated")
    state[key] = state[key].resolve_neg()
    optimizer.step()


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_negated_parameter_is_refused(implementation):
    weight = nn.Parameter(torch.ones(3))
    optimizer = EWCAdamW([weight], **implementation)
    for _ in range(4):
        weight.grad = torch.ones(3)
        optimizer.step()
    with torch.no_grad():
        weight.data = torch._neg_view(weight.data)  # at the same address
    unchanged(optimizer, [weight], r"params\[0\] is written and must not be lazily negated")


def unchanged(optimizer: EWCAdamW, params: list[Tensor], message: str, **rows: Any) -> None:
    """The step is a ValueError and changes nothing."""
    everything = [
        *params,
        *(t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)),
    ]
    before = [t.detach().clone() for t in everything]
    with pytest.raises(ValueError, match=message):
        optimizer.step_projected(**rows) if rows else optimizer.step()
    for tensor, old in zip(everything, before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "importance", "anchor"])
def test_state_transposed_in_place(key, planned):
    """At the same address, by the same object: only the strides tell."""
    sides = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(6, 6))
        optimizer = EWCAdamW([("w", weight)], **{**OFF_DEFAULT, **implementation})
        optimizer.consolidate({"w": torch.rand(6, 6)})
        for step in range(8):
            if step == 4:
                optimizer.state[weight][key].t_()
            weight.grad = torch.randn(6, 6)
            optimizer.step()
        sides.append(weight)
    torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-6)
    assert planned == [1, 1]


@pytest.mark.parametrize("key", ["exp_avg", "importance"])
def test_state_of_another_dtype_at_the_same_address(key):
    weight = nn.Parameter(torch.ones(300))
    optimizer = EWCAdamW([("w", weight)], fused=True)
    optimizer.consolidate(None)
    for _ in range(4):
        weight.grad = torch.ones(300)
        optimizer.step()
    state = optimizer.state[weight]
    address = state[key].data_ptr()
    state[key].data = state[key].data.view(torch.float16)[:300]
    assert state[key].data_ptr() == address
    with pytest.raises(RuntimeError, match=key):
        optimizer.step()
    state[key].data = state[key].data.view(torch.bfloat16)  # now the dtype is one that there is
    expected = copy.deepcopy(optimizer)
    expected.param_groups[0].update(fused=False, foreach=True)
    if key == "importance":
        optimizer.step()
        expected_weight = expected.param_groups[0]["params"][0]
        expected_weight.grad = torch.ones(300)
        expected.step()
        torch.testing.assert_close(weight, expected_weight)


BAD_ROWS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Any, Any]], str]] = {
    "few numbers": (lambda rows, v: (rows, v[:1]), "one for each row"),
    "float32 numbers": (lambda rows, v: (rows, v.float()), "contiguous float64"),
    "numbers with gaps": (lambda rows, v: (rows, v.repeat(2)[::2]), "contiguous float64"),
    "no numbers": (lambda rows, v: (rows, None), "one for each row"),
    "two dimensions": (lambda rows, v: (rows, v[None]), "one for each row"),
    "float64 rows": (lambda rows, v: (rows.double(), v), "may be float64 only where"),
    "integer rows": (lambda rows, v: (rows.byte(), v), "must be float32, float64"),
    "other device": (lambda rows, v: (rows.to("meta"), v), "must be on the device of"),
    "fewer columns": (lambda rows, v: (rows[:, :4], v), "shape and strides"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_planned_projection_checks_as_the_operator_does(case, planned):
    weight = nn.Parameter(torch.ones(5))
    optimizer = EWCAdamW([weight], fused=True)
    rows, v = torch.ones(2, 5), torch.tensor([0.5, 0.25], dtype=torch.float64)
    weight.grad = torch.ones(5)
    for _ in range(4):
        optimizer.step_projected({weight: rows}, {weight: v})
    assert planned == [1, 1]
    change, message = BAD_ROWS[case]
    bad_rows, bad_v = change(rows, v)
    coefficients = {} if bad_v is None else {weight: bad_v}
    unchanged(optimizer, [weight], message, memories={weight: bad_rows}, coefficients=coefficients)
    assert planned == [1, 1]


@pytest.mark.parametrize("which", ["rows", "numbers"])
def test_a_planned_projection_stays_on_one_device(which, device, planned):
    weight = nn.Parameter(torch.ones(5, device=device))
    optimizer = EWCAdamW([weight], fused=True)
    rows = torch.ones(2, 5, device=device)
    v = torch.tensor([0.5, 0.25], dtype=torch.float64, device=device)
    weight.grad = torch.ones_like(weight)
    for _ in range(4):
        optimizer.step_projected({weight: rows}, {weight: v})
    assert planned == [1, 1]
    elsewhere = "meta" if device == "cpu" else "cpu"
    if which == "rows":
        rows = rows.to(elsewhere)
    else:
        v = v.to(elsewhere)
    message = r"memories\[0\] and coefficients\[0\] must be on the device of params\[0\]"
    unchanged(optimizer, [weight], message, memories={weight: rows}, coefficients={weight: v})
    assert planned == [1, 1]


def test_negated_rows_and_numbers(planned):
    sides = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [EWCAdamW([p], **how) for p, how in zip(sides, IMPLEMENTATIONS, strict=True)]
    for step in range(8):
        for p, optimizer in zip(sides, optimizers, strict=True):
            rows, v = torch.arange(10.0).view(2, 5), torch.tensor([0.5, -0.25]).double()
            p.grad = torch.ones(5)
            if step > 3:
                rows, v = (negated(rows), v) if step % 2 else (rows, negated(v))
            optimizer.step_projected({p: rows}, {p: v})
    torch.testing.assert_close(*sides)
    assert planned == [1, 1]


def test_subclasses_that_do_what_they_like_are_not_planned(planned):
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    class Named(nn.Parameter):
        pass

    for make, count in ((lambda t: t.as_subclass(Loud).requires_grad_(), 0), (Named, 2)):
        weight = make(torch.ones(3))
        optimizer = EWCAdamW([weight], fused=True)
        planned.clear()
        for _ in range(4):
            weight.grad = torch.ones(3)
            optimizer.step()
        assert len(planned) == count
        assert (weight < 1).all()


def test_gradients_that_nobody_else_holds_are_kept(planned):
    """A class that makes a gradient whenever it is asked for it."""
    made: list[tuple[weakref.ref[Tensor], Tensor]] = []
    lost: list[bool] = []

    class Lazy(nn.Parameter):
        @property
        def grad(self):
            lost.extend(gradient() is None for gradient, of in made if of is not self)
            gradient = torch.ones(3)
            made.append((weakref.ref(gradient), self))
            return gradient

    weights = [Lazy(torch.ones(3)) for _ in range(3)]
    optimizer = EWCAdamW(weights, fused=True)
    for step in range(5):
        made.clear()
        lost.clear()
        optimizer.step()
        if step == 4:
            assert len(made) == 3
            assert not any(lost)
    assert len(planned) >= 2
    for weight in weights:
        assert (weight < 1).all()


# --- memory that another thread drops -------------------------------------------------------------


def freed_amid_a_step(how: str, planned: list[int]) -> bool | None:
    """Drop memory of a planned step while its kernels run: whether it was freed at once.

    Returns:
        None where the step was over before the other thread had its turn.
    """
    weight = nn.Parameter(torch.zeros(2**23))
    optimizer = EWCAdamW([weight], fused=True)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert planned[-1:] == [1]  # only a planned step keeps what another thread drops
    state = optimizer.state[weight]
    dropped: dict[str, Callable[[], Tensor]] = {
        "grad = None": lambda: weight.grad,
        "grad.data =": lambda: weight.grad,
        "data =": lambda: weight.data,
        "state.data =": lambda: state["exp_avg"],
    }
    storage = StorageWeakRef(dropped[how]().untyped_storage())
    count = int(state["step"])
    other = torch.zeros(1)
    stepping, freed_early = True, None

    def drop() -> None:
        nonlocal freed_early
        while stepping and state["step"].item() == count:  # the kernels begin with it
            pass
        if how == "grad = None":
            weight.grad = None
        elif how == "grad.data =":
            weight.grad.data = other
        elif how == "data =":
            weight.data = other
        else:
            state["exp_avg"].data = other
        if stepping:
            freed_early = storage.expired()

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        optimizer.step()
    finally:
        stepping = False
        thread.join()
    assert len(planned) == 2
    assert storage.expired()
    return freed_early


@pytest.mark.parametrize("how", ["grad = None", "grad.data =", "data =", "state.data ="])
def test_memory_is_kept_until_the_step_is_over(how, planned):
    """What another thread drops amid the kernels is freed when they are done with it."""
    for _ in range(100):  # on a busy machine the other thread may come too late
        planned.clear()
        freed_early = freed_amid_a_step(how, planned)
        if freed_early is not None:
            break
    assert freed_early is False


def test_a_short_step_is_not_interrupted(planned):
    """No other thread runs between the look at the tensors and the step's end."""
    weights = [nn.Parameter(torch.zeros(64)) for _ in range(50)]
    optimizer = EWCAdamW(weights, fused=True)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for weight in weights:
                weight.grad = torch.ones(64)
                weight.data = weight.data

    thread = threading.Thread(target=churn)
    interval = sys.getswitchinterval()
    for weight in weights:
        weight.grad = torch.ones(64)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(300):
            optimizer.step()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert len(planned) > 200
    assert all(weight.isfinite().all() and (weight < 0).all() for weight in weights)


def test_the_gradients_of_a_step_are_not_kept(planned):
    weight = nn.Parameter(torch.zeros(2**20))
    optimizer = EWCAdamW([weight], fused=True)
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    storages = [StorageWeakRef(t.untyped_storage()) for t in (weight.grad, weight.data)]
    weight.grad = None
    weight.data = torch.zeros(1)
    assert all(storage.expired() for storage in storages)
    assert gc.isenabled()
