"""EWC around any optimizer: EWCAdamW's numbers around AdamW, the formulas around others."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from kronecker_training import backward, network, weights
from kronecker_training import importance_of as kronecker_importance
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import cl_optim
from cl_optim import EWC, GEM, EWCAdamW, InputProjection
from cl_optim.ops import ewc_adamw
from cl_optim.ops.ewc_adamw_arguments import Hyperparameters, State
from cl_optim.retention import Evaluation, OldModel, RetentionGuard, interpolate

SHAPES = ((300,), (17, 33), (1,), (64, 70))
NAMES = tuple(f"p{i}" for i in range(len(SHAPES)))


class PlainAdamW(torch.optim.Optimizer):
    """AdamW by EWCAdamW's own kernel, so that what is left of a difference is the pull's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.zeros(())
                    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
                    state["m"], state["v"] = (torch.zeros_like(param, dtype=wide) for _ in range(2))
                lists = State([state["m"]], [state["v"]], [], [], [], [], [state["step"]])
                hyper = Hyperparameters(group["lr"], 0.9, 0.999, 1e-8, 1e-2)
                ewc_adamw.fused([param], [param.grad], lists, hyper)


def named(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]
    return [(name, nn.Parameter(value)) for name, value in zip(NAMES, values, strict=True)]


def importance(seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=draw) * 100
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }


def set_gradients(params: list[tuple[str, nn.Parameter]], step: int, size: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(1000 + step)
    for _, param in params:
        param.grad = (size * torch.randn(param.shape, generator=draw)).to(param.dtype)


def values(params: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [param.detach().clone() for _, param in params]


def ulps(ones: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, in units of the last place of weights, of 1/2 for smaller ones."""
    eps = torch.finfo(ones[0].dtype).eps

    def units(a: Tensor, b: Tensor) -> float:
        size = a.double().abs().clamp(min=0.5).log2().floor().exp2()
        return float(((a.double() - b.double()).abs() / size).max()) / eps

    return max(map(units, ones, others))


# --- the same as EWCAdamW -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"importance_dtype": "log8"}, {"anchor_dtype": "bfloat16"}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:anchor_dtype rounds")
def test_around_adamw_it_is_ewc_adamw_bit_for_bit(dtype, options):
    if dtype == torch.float64 and options:
        options = {}  # which has one format
    ours, theirs = named(dtype), named(dtype)
    one = EWCAdamW(ours, lr=1e-2, ewc_lambda=0.3, penalty="proximal", **options)
    other = EWC(PlainAdamW(theirs, 1e-2), ewc_lambda=0.3, **options)
    for optimizer in (one, other):
        optimizer.consolidate(importance())
    for step in range(200):
        for optimizer, params in ((one, ours), (other, theirs)):
            set_gradients(params, step)
            optimizer.step()
    assert all(map(torch.equal, values(ours), values(theirs)))
    assert float(one.penalty()) == float(other.penalty()) > 0.0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
def test_around_torchs_adamw_each_step_is_within_units_of_the_last_place(dtype, penalty):
    ours, theirs = named(dtype), named(dtype)
    one = EWCAdamW(ours, lr=1e-2, ewc_lambda=0.3, penalty=penalty)
    fused = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    other = EWC(fused, ewc_lambda=0.3, penalty=penalty)
    for optimizer in (one, other):
        optimizer.consolidate(importance())
    begun = values(ours)
    for step in range(200):
        for optimizer, params in ((one, ours), (other, theirs)):
            set_gradients(params, step)
            optimizer.step()
        # Their moments are rounded differently; in 16 bits the weight is, too, before the pull.
        assert ulps(values(ours), values(theirs)) <= 3
        with torch.no_grad():
            for (_, to), value in zip(theirs, values(ours), strict=True):
                to.copy_(value)
    assert ulps(values(ours), begun) > 30


@pytest.mark.parametrize("every", [1, 3])
def test_kronecker_importance_is_ewc_adamws(every):
    models = network(), network()
    one = EWCAdamW(
        models[0].named_parameters(), lr=1e-2, ewc_lambda=0.5, penalty="proximal", every=every
    )
    other = EWC(PlainAdamW(models[1].named_parameters(), 1e-2), ewc_lambda=0.5, every=every)
    for optimizer, model in zip((one, other), models, strict=True):
        optimizer.consolidate(kronecker_importance(model))
    for step in range(10):
        for optimizer, model in zip((one, other), models, strict=True):
            set_gradients(list(model.named_parameters()), step)
            optimizer.step()
    for optimizer in (one, other):
        optimizer.settle()
    in_matrices = one.matrix_penalties()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        if a in in_matrices or every == 1:  # others are pulled every third step, too, here
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    theirs = other.matrix_penalties()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        if a in in_matrices:
            torch.testing.assert_close(in_matrices[a], theirs[b], rtol=1e-5, atol=1e-9)


# --- as the formulas, around others ---------------------------------------------------------------

MAKERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def by_hand(before: Tensor, after: Tensor, anchor: Tensor, f: Tensor, c: float, penalty: str):
    if penalty == "decoupled":
        return after - c * f * (before - anchor)
    return anchor + (after - anchor) / (1 + c * f)


@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
@pytest.mark.parametrize("name", [*MAKERS, "Muon"])
def test_around_others_it_is_the_formula_in_float64(name, penalty):
    dtype = torch.float64

    def made():
        params = named(dtype)
        if name == "Muon":
            params = [pair for pair in params if pair[1].dim() == 2]
            return params, torch.optim.Muon(params, lr=1e-2)
        return params, MAKERS[name](params)

    params, optimizer = made()
    bare_params, bare = made()
    ewc = EWC(optimizer, ewc_lambda=0.3, penalty=penalty)
    f = {key: value.double() for key, value in importance().items() if key in dict(params)}
    ewc.consolidate(f)
    anchors = values(params)
    for step in range(30):
        set_gradients(params, step)
        set_gradients(bare_params, step)
        before = values(bare_params)
        if penalty == "gradient":
            for (key, param), anchor in zip(bare_params, anchors, strict=True):
                param.grad += 2 * 0.3 * f[key] * (param.detach() - anchor)
        bare.step()
        lr = bare.param_groups[0]["lr"]
        if penalty != "gradient":
            with torch.no_grad():
                for (key, param), old, anchor in zip(bare_params, before, anchors, strict=True):
                    pulled = by_hand(old, param, anchor, f[key], 2 * lr * 0.3, penalty)
                    param.copy_(pulled)
        ewc.step()
        for a, b in zip(values(params), values(bare_params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_every_some_steps_the_pull_is_that_of_all_of_them():
    params, bare_params = named(torch.float64), named(torch.float64)
    ewc = EWC(torch.optim.SGD(params, lr=0.1), ewc_lambda=0.3, every=4)
    bare = torch.optim.SGD(bare_params, lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (ewc, bare)]
    ewc.consolidate(importance())
    anchors, f = values(params), importance()
    due = [0.0] * len(SHAPES)

    def pull() -> None:
        with torch.no_grad():
            for i, ((key, param), anchor) in enumerate(zip(bare_params, anchors, strict=True)):
                param.copy_(anchor + (param - anchor) / (1 + 2 * 0.3 * due[i] * f[key].double()))
                due[i] = 0.0

    for step in range(11):
        set_gradients(params, step)
        set_gradients(bare_params, step)
        if step % 3 == 0:  # a parameter that is not used
            params[1][1].grad = bare_params[1][1].grad = None
        ewc.step()
        lr = bare.param_groups[0]["lr"]
        bare.step()
        for i, (_, param) in enumerate(bare_params):
            due[i] += lr * (param.grad is not None)
        if (step + 1) % 4 == 0:
            pull()
        for a, b in zip(values(params), values(bare_params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        for schedule in schedules:
            schedule.step()
    pull()
    ewc.settle()
    for a, b in zip(values(params), values(bare_params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ewc.settle()  # of which nothing is left
    for a, b in zip(values(params), values(bare_params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_due_is_taken_when_every_becomes_1():
    ours, theirs = named(), named()
    one, other = (EWC(torch.optim.SGD(p, lr=0.1), ewc_lambda=0.3, every=4) for p in (ours, theirs))
    for optimizer, params in ((one, ours), (other, theirs)):
        optimizer.consolidate(importance())
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
    other.settle()
    for optimizer in (one, other):
        optimizer.param_groups[0]["every"] = 1
    for optimizer, params in ((one, ours), (other, theirs)):
        for _, param in params:
            param.grad = torch.zeros_like(param)  # so that the order of pull and step is the same
        optimizer.step()
    assert all(map(torch.equal, values(ours), values(theirs)))


def test_the_wrapped_step_runs_in_the_callers_gradient_mode():
    class Naive(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()  # which differentiates
            with torch.no_grad():
                super().step()
            return loss

    params = named()
    ewc = EWC(Naive(params, lr=0.1))
    ewc.consolidate(importance())

    def closure():
        ewc.zero_grad()
        loss = sum(p.square().sum() for _, p in params)
        loss.backward()
        return loss

    assert ewc.step(closure).requires_grad


def test_a_closure_that_evaluates_the_model_takes_no_pull_amid_a_step():
    ends = []
    for in_eval in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        x, y = torch.randn(8, 4), torch.randn(8, 3)
        ewc = EWC(torch.optim.LBFGS(model.named_parameters(), max_iter=4), ewc_lambda=0.3, every=3)
        ewc.consolidate(None)
        hooks = ewc.settle_before(model)

        def closure(ewc=ewc, model=model, in_eval=in_eval, x=x, y=y):
            ewc.zero_grad()
            loss = (model.train(not in_eval)(x) - y).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            ewc.step(closure)
        hooks.remove()
        ewc.settle()
        ends.append(weights(model))
    assert all(map(torch.equal, *ends))


def test_gradients_that_the_step_lets_go_of_count_as_moved():
    class Forgets(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad()

    for every in (1, 2):
        ours, theirs = named(), named()
        pair = [
            EWC(make(params, lr=0.1), every=every)
            for make, params in ((Forgets, ours), (torch.optim.SGD, theirs))
        ]
        for optimizer in pair:
            optimizer.consolidate(importance())
        for step in range(4):
            for optimizer, params in zip(pair, (ours, theirs), strict=True):
                set_gradients(params, step)
                optimizer.step()
        assert all(map(torch.equal, values(ours), values(theirs)))


def test_before_it_is_consolidated_and_without_gradients_it_is_the_bare_optimizer():
    ours, theirs = named(), named()
    ewc, bare = EWC(torch.optim.Adam(ours, lr=0.1)), torch.optim.Adam(theirs, lr=0.1)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ewc.step()
        bare.step()
    assert all(map(torch.equal, values(ours), values(theirs)))
    ewc.consolidate(importance())
    set_gradients(ours, 5)
    ewc.step()
    moved = values(ours)
    ewc.zero_grad()
    ewc.step()  # nothing has a gradient: nothing is pulled
    assert all(map(torch.equal, values(ours), moved))


@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
def test_damping_shortens_the_steps_of_important_weights(penalty):
    params, bare_params = named(torch.float64), named(torch.float64)
    ewc = EWC(
        torch.optim.SGD(params, lr=0.1), ewc_lambda=0.02, penalty=penalty, importance_damping=0.7
    )
    bare = torch.optim.SGD(bare_params, lr=0.1)
    f = {name: value.double() for name, value in importance().items()}
    ewc.consolidate(f)
    anchors = values(params)
    mean = torch.cat([value.flatten() for value in f.values()]).mean()
    for step in range(5):
        set_gradients(params, step)
        set_gradients(bare_params, step)
        before = values(bare_params)
        if penalty == "gradient":
            for (key, param), anchor in zip(bare_params, anchors, strict=True):
                param.grad += 2 * 0.02 * f[key] * (param.detach() - anchor)
        bare.step()
        with torch.no_grad():
            for (key, param), old, anchor in zip(bare_params, before, anchors, strict=True):
                damped = old + (param - old) / (1 + 0.7 * f[key] / mean)
                if penalty != "gradient":
                    damped = by_hand(old, damped, anchor, f[key], 2 * 0.1 * 0.02, penalty)
                param.copy_(damped)
        ewc.step()
        for a, b in zip(values(params), values(bare_params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["proximal", "gradient"])
def test_steps_that_are_alike_are_taken_by_a_plan(penalty, monkeypatch):
    params = named()
    ewc = EWC(torch.optim.SGD(params, lr=1e-2), ewc_lambda=0.1, penalty=penalty)
    ewc.consolidate(importance())
    taken = []
    monkeypatch.setattr(
        "cl_optim.ops.ewc_pull.fused",
        lambda *given, function=cl_optim.ops.ewc_pull.fused: (taken.append(0), function(*given)),
    )
    reference = named()
    bare = EWC(torch.optim.SGD(reference, lr=1e-2), ewc_lambda=0.1, penalty=penalty)
    bare.consolidate(importance())
    for step in range(6):
        for optimizer, of in ((ewc, params), (bare, reference)):
            set_gradients(of, step)
            if optimizer is bare:
                bare._pulling.forget()
            optimizer.step()
    assert len(taken) == 6 + 2
    assert all(map(torch.equal, values(params), values(reference)))
    params[0][1].grad = None  # another set of parameters
    ewc.step()
    assert len(taken) == 6 + 3
    with torch.no_grad():
        params[1][1].data = params[1][1].data.t().contiguous().t()  # another order in memory
    set_gradients(params, 7)
    before = len(taken)
    for _ in range(2):
        ewc.step()
    assert len(taken) > before


# --- frozen weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
@pytest.mark.parametrize("every", [1, 3])
def test_frozen_weights_keep_their_bits(penalty, every):
    if penalty != "proximal" and every > 1:
        every = 1
    params = named()
    ewc = EWC(torch.optim.SGD(params, lr=0.1), penalty=penalty, ewc_lambda=0.01, every=every)
    ewc.consolidate(importance())
    set_gradients(params, 0)
    ewc.step()  # so that frozen weights are not at their anchors
    count = ewc.freeze(0.2)
    assert count == round(0.2 * sum(param.numel() for _, param in params))
    masks = {one.param: one.frozen for one in ewc.protected()}
    before = values(params)
    for step in range(4):
        set_gradients(params, step)
        ewc.step()
    ewc.settle()
    for (_, param), old in zip(params, before, strict=True):
        assert torch.equal(param[masks[param]], old[masks[param]])
        assert not torch.equal(param[~masks[param]], old[~masks[param]]) or param.numel() == 1
    ewc.unfreeze()
    set_gradients(params, 9)
    ewc.step()
    assert any(not torch.equal(p[masks[p]], old[masks[p]]) for (_, p), old in
               zip(params, before, strict=True))  # fmt: skip


# --- what is around a step ------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_scales_and_skips(penalty, fused):
    ours, theirs = named(), named()
    made = [
        EWC(torch.optim.AdamW(params, lr=1e-2, fused=fused), ewc_lambda=0.1, penalty=penalty)
        for params in (ours, theirs)
    ]
    for optimizer in made:
        optimizer.consolidate(importance())
    scaled, plain = made
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(5):
        set_gradients(ours, step, 1024.0)
        set_gradients(theirs, step)
        if step == 3:
            ours[0][1].grad[0] = torch.inf
            before = values(ours)
        scaler.scale(torch.zeros(()))
        scaler.step(scaled)
        scaler.update(1024.0)
        if step == 3:
            assert all(map(torch.equal, values(ours), before))
        else:
            plain.step()
            for a, b in zip(values(ours), values(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def quadratic(params, target):
    return sum(((p - t) ** 2).sum() for (_, p), t in zip(params, target, strict=True))


@pytest.mark.parametrize("penalty", ["gradient", "proximal"])
def test_closures_evaluate_task_and_penalty(penalty):
    params, target = named(torch.float64), values(named(torch.float64, seed=5))
    anchors, f = values(params), {key: one.double() for key, one in importance().items()}
    inner = torch.optim.LBFGS(params, lr=1.0, max_iter=50, line_search_fn="strong_wolfe")
    ewc = EWC(inner, ewc_lambda=0.02, penalty=penalty)
    ewc.consolidate(f)

    def closure():
        ewc.zero_grad()
        loss = quadratic(params, target)
        loss.backward()
        return loss

    first = ewc.step(closure)
    expected = sum(float(((a - t) ** 2).sum()) for a, t in zip(anchors, target, strict=True))
    assert float(first.detach()) == pytest.approx(expected)  # the loss, without a penalty
    if penalty == "gradient":  # at the minimum of both
        for _ in range(3):
            ewc.step(closure)
        for (key, p), a, t in zip(params, anchors, target, strict=True):
            least = (t + 0.02 * f[key] * a) / (1 + 0.02 * f[key])
            torch.testing.assert_close(p.detach(), least, rtol=1e-4, atol=1e-5)


def test_groups_schedulers_and_hooks_are_the_wrapped_optimizers():
    params = named()
    inner = torch.optim.SGD([
        {"params": params[:2], "lr": 0.1, "ewc_lambda": 5.0},
        {"params": params[2:], "lr": 0.2},
    ])  # fmt: skip
    ewc = EWC(inner, ewc_lambda=2.0)
    assert [g["ewc_lambda"] for g in ewc.param_groups] == [5.0, 2.0]
    assert ewc.param_groups is inner.param_groups
    assert ewc.state is inner.state
    new = nn.Parameter(torch.ones(3))
    ewc.add_param_group({"params": [("new", new)], "lr": 0.3, "every": 2})
    assert [g["every"] for g in ewc.param_groups] == [1, 1, 2]
    schedule = torch.optim.lr_scheduler.StepLR(ewc, 1, 0.5)
    calls = []
    ewc.register_step_post_hook(lambda *_: calls.append("own"))
    inner.register_step_post_hook(lambda *_: calls.append("inner"))
    handle = register_optimizer_step_post_hook(lambda o, *_: calls.append(o))
    try:
        set_gradients(params, 0)
        ewc.step()
    finally:
        handle.remove()
    assert calls == ["inner", "own", ewc] or calls == ["inner", ewc, "own"]
    schedule.step()
    assert [g["lr"] for g in ewc.param_groups] == [0.05, 0.1, 0.15]
    ewc.consolidate({**importance(), "new": torch.ones(3)})
    assert float(ewc.penalty()) == 0.0
    assert "ewc_lambda=2.0" in repr(ewc)


def test_a_learning_rate_may_be_a_tensor():
    ours, theirs = named(), named()
    one = EWC(torch.optim.AdamW(ours, lr=torch.tensor(1e-2), fused=True), ewc_lambda=0.3)
    other = EWC(torch.optim.AdamW(theirs, lr=1e-2, fused=True), ewc_lambda=0.3)
    for optimizer in (one, other):
        optimizer.consolidate(importance())
    for step in range(5):
        for optimizer, params in ((one, ours), (other, theirs)):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_strength_makes_lambda_as_for_ewc_adamw():
    ours, theirs = named(), named()
    one, other = EWCAdamW(ours, strength=0.1), EWC(torch.optim.SGD(theirs, lr=0.1), strength=0.1)
    for optimizer in (one, other):
        optimizer.consolidate(importance())
    assert one.param_groups[0]["ewc_lambda"] == other.param_groups[0]["ewc_lambda"] > 0.0
    for optimizer in (one, other):
        optimizer.consolidate(None, decay=0.0)
    assert one.param_groups[0]["ewc_lambda"] == other.param_groups[0]["ewc_lambda"] > 0.0


# --- state ----------------------------------------------------------------------------------------


def trained(every: int = 1, steps: int = 5, **options: Any):
    params = named()
    ewc = EWC(torch.optim.AdamW(params, lr=1e-2), ewc_lambda=0.3, every=every, **options)
    ewc.consolidate(importance())
    for step in range(steps):
        set_gradients(params, step)
        ewc.step()
    return params, ewc


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("importance_dtype", ["float32", "log8"])
def test_a_run_goes_on_bit_for_bit_after_a_state_dict(every, importance_dtype):
    params, ewc = trained(every, importance_dtype=importance_dtype)
    ewc.freeze(0.1)
    buffer = io.BytesIO()
    torch.save(ewc.state_dict(), buffer)
    state_dict = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert set(state_dict) == {"state", "param_groups", "ewc"}
    assert "ewc_lambda" not in state_dict["param_groups"][0]
    bare = torch.optim.AdamW(named(), lr=1.0)
    bare.load_state_dict({k: v for k, v in state_dict.items() if k != "ewc"})
    assert bare.param_groups[0]["lr"] == 1e-2

    resumed = named()
    with torch.no_grad():
        for (_, to), value in zip(resumed, values(params), strict=True):
            to.copy_(value)
    other = EWC(torch.optim.AdamW(resumed, lr=1.0), ewc_lambda=9.0, penalty="decoupled")
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["ewc_lambda"] == 0.3
    for step in range(5, 12):
        for optimizer, of in ((ewc, params), (other, resumed)):
            set_gradients(of, step)
            optimizer.step()
    for optimizer in (ewc, other):
        optimizer.settle()
    assert all(map(torch.equal, values(params), values(resumed)))
    assert float(ewc.penalty()) == float(other.penalty())


def test_a_protection_that_a_checkpoint_has_lost_is_missed():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        ewc = EWC(torch.optim.AdamW(model.named_parameters(), lr=0.1))
        model(torch.ones(1, 3)).sum().backward()
        ewc.step()
        return model, ewc

    model, ewc = made()
    unprotected = get_optimizer_state_dict(model, ewc)
    ewc.consolidate(None)
    lost = get_optimizer_state_dict(model, ewc)
    other_model, other = made()
    set_optimizer_state_dict(other_model, other, unprotected)
    with pytest.raises(ValueError, match=r"protected weights and has no 'ewc'.*itself\.$"):
        set_optimizer_state_dict(other_model, other, lost)
    other.load_state_dict(ewc.state_dict())
    assert len(list(other.protected())) == 2


def test_a_bare_optimizers_state_dict_leaves_the_protection():
    params, ewc = trained()
    bare = torch.optim.AdamW(named(), lr=0.5)
    penalty = float(ewc.penalty())
    ewc.load_state_dict(bare.state_dict())
    assert ewc.param_groups[0]["lr"] == 0.5
    assert float(ewc.penalty()) == penalty > 0.0
    set_gradients(params, 0)
    ewc.step()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_go_on_alike(make):
    params, ewc = trained(3)
    other = make(ewc)
    copies = [(name, p) for name, p in zip(NAMES, other.param_groups[0]["params"], strict=True)]
    assert all(map(torch.equal, values(params), values(copies)))
    for step in range(7):
        for optimizer, of in ((ewc, params), (other, copies)):
            set_gradients(of, step)
            optimizer.step()
    assert all(map(torch.equal, values(params), values(copies)))
    assert float(ewc.penalty()) == float(other.penalty()) > 0.0


# --- with the others ------------------------------------------------------------------------------


def test_gem_around_and_inside():
    for around in (True, False):
        params = named()
        sgd = torch.optim.SGD(params, lr=0.1)
        if around:
            ewc = EWC(sgd, ewc_lambda=0.3)
            outer = gem = GEM(ewc)
        else:
            gem = GEM(sgd)
            outer = ewc = EWC(gem, ewc_lambda=0.3)
        memory = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for _, p in params
        ]

        def closure(params=params, memory=memory):
            sum((p * m).sum() for (_, p), m in zip(params, memory, strict=True)).backward()

        gem.remember("A", closure, refresh_every=1)
        outer.consolidate(importance())
        anchors, before = values(params), values(params)
        for (_, param), m in zip(params, memory, strict=True):
            param.grad = -m + torch.randn(m.shape, generator=torch.Generator().manual_seed(4))
        gradient = torch.cat([p.grad.flatten() for _, p in params]).double()
        row = torch.cat([m.flatten() for m in memory]).double()
        outer.step()
        projected = gradient - (gradient @ row) / (row @ row) * row
        stepped = torch.cat([b.flatten() for b in before]).double() - 0.1 * projected
        star = torch.cat([a.flatten() for a in anchors]).double()
        f = torch.cat([importance()[name].flatten() for name in NAMES]).double()
        expected = star + (stepped - star) / (1 + 2 * 0.1 * 0.3 * f)
        found = torch.cat([p.detach().flatten() for _, p in params]).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_input_projection_around_and_inside():
    for around in (True, False):
        model = network()
        sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
        found = kronecker_importance(network())
        if around:
            ewc = EWC(sgd, ewc_lambda=0.01)
            outer: Any = InputProjection(ewc, strength=5.0)
            outer.consolidate(found, inner=found.diagonal())
        else:
            inner = InputProjection(sgd, strength=5.0)
            outer = ewc = EWC(inner, ewc_lambda=0.01)
            inner.consolidate(found)
            ewc.consolidate(found.diagonal())
        frozen = ewc.freeze(0.1)
        before = weights(model)
        masks = {one.param: one.frozen for one in ewc.protected()}
        for step in range(3):
            backward(model, step)
            outer.step()
        outer.settle()
        assert frozen > 0
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param[masks[param]], old[masks[param]])
        assert float(ewc.penalty()) > 0.0


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_what_an_input_projection_has_due_is_projected_before_a_pull(structure):
    """Every 3 steps it projects; a pull after each 2 would else write what it has not looked at."""
    ends = []
    for every in (3, 1):
        model = network()
        found = kronecker_importance(model)
        inner = InputProjection(torch.optim.SGD(model.named_parameters(), lr=0.1), every=every)
        ewc = EWC(inner, ewc_lambda=0.3, every=2)
        inner.consolidate(found)
        ewc.consolidate(found if structure == "kronecker" else found.diagonal())
        for step in range(8):
            set_gradients(list(model.named_parameters()), step)
            ewc.step()  # a warning of weights that were written would be an error
        ewc.settle()
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):  # linear: due or not, all displacements are projected
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_in_the_backward_pass():
    """One optimizer for each parameter, whose gradient is let go of at once."""
    model, whole = network(), network()
    found = kronecker_importance(network()).diagonal()
    kinds = (
        lambda name, p: EWCAdamW([(name, p)], lr=1e-2, penalty="proximal", ewc_lambda=0.3),
        lambda name, p: EWC(torch.optim.AdamW([(name, p)], lr=1e-2), ewc_lambda=0.3),
    )
    for make in kinds:
        model, whole = network(), network()
        optimizers = {}
        for name, param in model.named_parameters():
            optimizers[param] = make(name, param)
            optimizers[param].consolidate({name: found[name]})

            def hook(param, optimizers=optimizers):
                optimizers[param].step()
                optimizers[param].zero_grad()

            param.register_post_accumulate_grad_hook(hook)
        one = EWCAdamW(whole.named_parameters(), lr=1e-2, penalty="proximal", ewc_lambda=0.3)
        one.consolidate(found)
        for step in range(5):
            backward(model, step)
            assert all(param.grad is None for param in model.parameters())
            backward(whole, step)
            one.step()
        for a, b in zip(weights(model), weights(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_guard_keeps_its_budget_and_finds_the_anchors():
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, old_y, new_y = torch.randn(64, 6), torch.randn(64, 3), torch.randn(64, 3)
    ewc = EWC(torch.optim.SGD(model.named_parameters(), lr=0.05), ewc_lambda=0.1)

    def loss(y):
        return (model(x) - y).square().mean()

    for _ in range(200):
        ewc.zero_grad()
        loss(old_y).backward()
        ewc.step()
    ewc.consolidate(None)
    was = copy.deepcopy(model)
    old = Evaluation("old", lambda m: float((m(x) - old_y).square().mean().detach()),
                     higher_is_better=False)  # fmt: skip
    guard = RetentionGuard(model, ewc, [old], budget=0.05, every=5)
    guard.start()
    lambdas = set()
    for _ in range(60):
        ewc.zero_grad()
        loss(new_y).backward()
        ewc.step()
        guard.step()
        lambdas.add(ewc.param_groups[0]["ewc_lambda"])
    assert len(lambdas) > 3  # it steers
    guard.finish()
    assert guard.history[-1].measured[0].loss <= 0.05
    assert torch.equal(OldModel(model, ewc)(x), was(x))
    interpolate(model, ewc, alpha=0.0)
    assert torch.equal(model.weight, was.weight)


# --- on a GPU -------------------------------------------------------------------------------------


def test_steps_that_a_graph_would_not_repeat_are_refused(monkeypatch):
    params = named()
    ewc = EWC(torch.optim.SGD(params, lr=0.1), every=2)
    frozen = EWC(torch.optim.SGD(named(seed=1), lr=0.1))
    for one in (ewc, frozen):
        one.consolidate(importance())
    frozen.freeze(0.1)
    monkeypatch.setattr("cl_optim.optim.ewc.is_capturing", lambda: True)
    for one in (ewc, frozen):
        with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*\.$"):
            one.step()
    plain = EWC(torch.optim.SGD(params, lr=0.1))
    plain.consolidate(importance())
    set_gradients(params, 0)
    plain.step()
    with pytest.warns(UserWarning, match="graph"):
        plain.consolidate(importance())


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", ["proximal", "decoupled", "gradient"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_gpu_computes_the_same(penalty, every, tensor):
    if penalty != "proximal":
        every = 1
    ours = named()
    theirs = [(name, nn.Parameter(p.detach().cuda())) for name, p in named()]
    found = []
    for params, device in ((ours, "cpu"), (theirs, "cuda")):
        lr = torch.tensor(1e-2, device=device) if tensor else 1e-2
        inner = torch.optim.AdamW(params, lr=lr, fused=True)
        ewc = EWC(inner, ewc_lambda=0.3, penalty=penalty, every=every, importance_dtype="log8")
        ewc.consolidate(importance())
        for step in range(7):
            set_gradients(ours, step)
            for (_, param), (_, source) in zip(params, ours, strict=True):
                param.grad = source.grad.to(device, copy=True)
            ewc.step()
        ewc.settle()
        found.append([value.cpu() for value in values(params)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph():
    both = [[(name, nn.Parameter(p.detach().cuda())) for name, p in named()] for _ in range(2)]
    made = []
    for params in both:
        inner = torch.optim.AdamW(params, lr=torch.tensor(1e-2, device="cuda"), capturable=True)
        made.append(EWC(inner, ewc_lambda=0.3))
        made[-1].consolidate(importance())
        for _, param in params:
            param.grad = torch.ones_like(param)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made[0].step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made[0].step()
    made[1].step()
    for _ in range(3):
        graph.replay()
        made[1].step()
    for a, b in zip(values(both[0]), values(both[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- optimizers of other packages -----------------------------------------------------------------


def made_by_others() -> dict[str, Any]:
    import bitsandbytes
    import optimi
    import schedulefree
    import torchao.optim as ao

    def free(params):
        optimizer = schedulefree.AdamWScheduleFree(params, lr=1e-2)
        optimizer.train()
        return optimizer

    return {
        "bitsandbytes.AdamW8bit": (lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2), "proximal"),
        "torchao.AdamW8bit": (lambda p: ao.AdamW8bit(p, lr=1e-2), "proximal"),
        "torchao.AdamW4bit": (lambda p: ao.AdamW4bit(p, lr=1e-2), "proximal"),
        "optimi.StableAdamW": (lambda p: optimi.StableAdamW(p, lr=1e-2, triton=False), "proximal"),
        "schedulefree.AdamWScheduleFree": (free, "gradient"),
    }


OTHERS = (
    "bitsandbytes.AdamW8bit",
    "torchao.AdamW8bit",
    "torchao.AdamW4bit",
    "optimi.StableAdamW",
    "schedulefree.AdamWScheduleFree",
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore")  # their own
def test_around_optimizers_of_other_packages(name):
    make, penalty = made_by_others()[name]
    moved = []
    for ewc_lambda in (0.0, 1e3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64))
        ewc = EWC(make(list(model.parameters())), ewc_lambda=ewc_lambda, penalty=penalty)
        ewc.consolidate(None, model=model)
        before = weights(model)
        for _ in range(10):
            ewc.zero_grad()
            model(torch.randn(16, 128)).square().mean().backward()
            ewc.step()
        ewc.load_state_dict(ewc.state_dict())
        ewc.zero_grad()
        model(torch.randn(16, 128)).square().mean().backward()
        ewc.step()
        pairs = zip(weights(model), before, strict=True)
        moved.append(max(float((a - b).abs().max()) for a, b in pairs))
    assert moved[1] < 0.05 * moved[0]


# --- what another one had -------------------------------------------------------------------------


def test_an_ewc_around_what_was_in_one_has_its_own_options():
    inner = torch.optim.SGD(named(), lr=0.1)
    EWC(inner, ewc_lambda=1.0, strength=0.1)
    again = EWC(inner, ewc_lambda=100.0, penalty="gradient")
    found = {key: again.param_groups[0][key] for key in ("ewc_lambda", "penalty", "strength")}
    assert found == {"ewc_lambda": 100.0, "penalty": "gradient", "strength": None}


def test_options_of_single_groups_that_are_replaced_are_said():
    params = named()
    inner = torch.optim.SGD([{"params": params[:1], "ewc_lambda": 5.0}, {"params": params[1:]}])
    assert EWC(inner, ewc_lambda=1.0).param_groups[0]["ewc_lambda"] == 5.0
    with pytest.warns(UserWarning, match="has been in an EWC before.* to the groups again"):
        again = EWC(inner, ewc_lambda=2.0)
    assert [group["ewc_lambda"] for group in again.param_groups] == [2.0, 2.0]


def test_protection_is_not_lost_between_an_ewc_and_an_ewcadamw():
    ewc = EWC(torch.optim.AdamW(named()))
    whole = EWCAdamW(named(), penalty="proximal")
    for optimizer in (ewc, whole):
        optimizer.consolidate(importance())
    saved = ewc.state_dict()
    lost = {key: value for key, value in saved.items() if key != "ewc"}
    EWCAdamW(named()).load_state_dict(EWC(torch.optim.AdamW(named())).state_dict())  # has none
    for state_dict in (saved, lost):
        with pytest.raises(ValueError, match=r"an EWC around AdamW.* consolidate\(\) anew"):
            whole.load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"is an EWCAdamW's.* into a cl_optim\.EWCAdamW"):
        ewc.load_state_dict(whole.state_dict())
    for optimizer in (ewc, whole):
        assert len(list(optimizer.protected())) == len(NAMES)


def test_a_model_that_is_copied_first_has_what_is_due():
    model, ewc = nn.Linear(4, 4), None
    ewc = EWC(torch.optim.SGD(model.named_parameters(), lr=0.1), ewc_lambda=5.0, every=4)
    ewc.consolidate(None)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        ewc.step()
    before = weights(model)
    for copied, other in (
        copy.deepcopy((model, ewc)), pickle.loads(pickle.dumps((model, ewc)))
    ):  # fmt: skip
        assert all(map(torch.equal, weights(model), before)), "a copy changes nothing"
        other.settle()
        assert not torch.equal(copied.weight, model.weight)
        twin = copy.deepcopy((model, ewc))
        twin[1].settle()
        assert all(map(torch.equal, weights(copied), weights(twin[0])))


@pytest.mark.parametrize("what", ["damping", "freeze"])
def test_displacements_inside_are_projected_where_weights_are_written(what, recwarn):
    """As with a projection in each step, but for what is damped between two."""
    found = []
    for every in (1, 3):
        model = network(torch.float32)
        factors = kronecker_importance(model)
        damping = 0.5 if what == "damping" else 0.0
        inner = InputProjection(torch.optim.SGD(model.named_parameters(), lr=0.5), every=every)
        ewc = EWC(inner, ewc_lambda=0.0, importance_damping=damping)
        inner.consolidate(factors)
        ewc.consolidate({name: torch.ones_like(p) for name, p in model.named_parameters()})
        if what == "freeze":
            ewc.freeze(masks={"0.weight": torch.eye(*model[0].weight.shape, dtype=torch.bool)})
        for seed in range(3):
            backward(model, seed)
            ewc.step()
        ewc.settle()
        found.append(weights(model))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not [w for w in recwarn if "written between" in str(w.message)]


def test_rounding_may_be_chosen_later():
    params, ewc = trained(1)
    ewc.param_groups[0]["rounding"] = "stochastic"
    set_gradients(params, 3)
    ewc.step()
    assert all(value.isfinite().all() for value in values(params))


def test_what_is_due_follows_its_group():
    found = []
    for is_taken_out in (True, False):
        params = named()
        groups = [{"params": params[:1], "ewc_lambda": 9.0}, {"params": params[1:]}]
        ewc = EWC(torch.optim.SGD(groups, lr=0.1), ewc_lambda=0.3, every=4)
        ewc.consolidate(importance())
        for step in range(2):
            set_gradients(params, step)
            ewc.step()
        if is_taken_out:
            del ewc.param_groups[0]
            del ewc._protection[params[0][1]]
        ewc.settle()
        found.append(values(params[1:]))
    assert all(map(torch.equal, *found))


def test_a_bare_optimizers_state_dict_may_have_an_ewcs_options():
    params, ewc = named(), None
    inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    ewc = EWC(inner)
    set_gradients(params, 0)
    ewc.step()
    ewc.load_state_dict(inner.state_dict())
    group = {**ewc.param_groups[0], "params": [nn.Parameter(torch.ones(2))], "ewc_lambda": 7.0}
    group.pop("param_names", None)
    other = EWC(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    other.add_param_group(group)
    assert other.param_groups[1]["ewc_lambda"] == 7.0


def test_a_copy_of_an_earlier_version_has_nothing_due():
    _, ewc = trained(1)
    state = {key: value for key, value in ewc.__getstate__().items() if key != "ledgers"}
    other = EWC.__new__(EWC)
    other.__setstate__(state)
    other.settle()
    assert float(other.penalty()) == float(ewc.penalty())
