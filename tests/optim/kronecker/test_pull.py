"""EWCAdamW under Kronecker importance, against torch's AdamW and the whole Fisher matrix."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from ewc_adamw_cases import reload
from kronecker_training import (
    OPTIONS,
    Dense,
    backward,
    bits,
    factors_of,
    importance_of,
    network,
    protected,
    train,
    weights,
)
from torch import nn

from cl_optim import GEM, EWCAdamW, ImportanceLog, estimate_fisher
from cl_optim.importance import watch
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.ops import kronecker_shrink as shrink
from cl_optim.optim.kronecker import ledger
from cl_optim.optim.kronecker import pull as pulling

F64 = torch.float64


def pair(dtype=F64, energy=0.9, block=2048, **options):
    """The same network twice, under the fused step and under the whole matrix."""
    model, twin = network(dtype), network(dtype)
    importance = importance_of(model, energy=energy, block=block)
    return model, protected(model, importance, **options), Dense(twin, importance, **options), twin


def assert_alike(model, twin, tolerance=1e-6):
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one - other).abs().max() <= tolerance, name


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("energy", [1.0, 0.8])
def test_the_whole_matrix(energy, every):
    model, optimizer, reference, twin = pair(energy=energy, every=every)
    start = weights(model)
    for seed in range(11):
        for one, stepped in ((model, optimizer), (twin, reference)):
            backward(one, seed)
            stepped.step()
        assert_alike(model, twin)
    assert any((p - old).abs().max() > 0.05 for p, old in zip(weights(model), start, strict=True))
    assert float(optimizer.penalty()) == pytest.approx(reference.penalty(), rel=1e-4)
    optimizer.settle()
    reference.settle()
    assert_alike(model, twin)
    free = network(F64)
    unprotected = torch.optim.AdamW(
        free.parameters(), **{k: OPTIONS[k] for k in ("lr", "betas", "eps", "weight_decay")}
    )
    train(free, unprotected.step, range(11))
    assert (free[0].weight - model[0].weight).abs().max() > 1e-2  # the pull shows


def test_blocks_and_schedules():
    model, optimizer, reference, twin = pair(block=3, every=4)
    for seed, lr in enumerate([1e-2, 3e-2, 0.0, 5e-2, 0.0, 0.0, 0.0, 0.0, 2e-2]):
        for one, stepped in ((model, optimizer), (twin, reference)):
            inner = getattr(stepped, "optimizer", stepped)
            inner.param_groups[0]["lr"] = lr
            backward(one, seed)
            stepped.step()
        assert_alike(model, twin)


@pytest.mark.parametrize(
    "skipped", [["2.weight"], ["2.bias"], ["2.weight", "2.bias", "4.weight"], ["1.weight"]]
)
def test_what_has_no_gradient(skipped):
    model, optimizer, reference, twin = pair(every=7)
    for seeds, without in ((range(2), ()), (range(2, 5), skipped), (range(5, 7), ())):
        train(model, optimizer.step, seeds, without)
        train(twin, reference.step, seeds, without)
    assert_alike(model, twin)
    # What takes no step at all between two pulls stays as it is.
    before = [model.get_parameter(name).clone() for name in skipped]
    train(model, optimizer.step, range(7, 14), skipped)
    train(twin, reference.step, range(7, 14), skipped)
    assert_alike(model, twin)
    for name, old in zip(skipped, before, strict=True):
        assert torch.equal(model.get_parameter(name), old)


def test_overflow_under_a_scaler():
    model, optimizer, reference, twin = pair(every=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(5):
        overflows = seed in (1, 3)
        scale = scaler.get_scale()
        for one in (model, twin):
            backward(one, seed)
        scaler.scale(torch.ones(()))  # makes its tensors
        for param in model.parameters():
            param.grad.mul_(scale)
        if overflows:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        reference.step(overflow=overflows)
    assert_alike(model, twin)
    assert not optimizer._pull.ledger.due


@pytest.mark.parametrize("every", [1, 4])
def test_sums_on_a_device(monkeypatch, every):
    """What the host does not know gives the same bits as what it knows."""
    known, unknown = network(), network()
    ours, other = protected(known, every=every), protected(unknown, every=every)
    train(known, ours.step, range(2))
    train(known, ours.step, range(2, 8), ["2.weight", "2.bias"])

    def on_device(*of):
        return torch.tensor(ledger.amount(*of), dtype=F64)

    monkeypatch.setattr(pulling, "amount", on_device)
    train(unknown, other.step, range(2))
    train(unknown, other.step, range(2, 8), ["2.weight", "2.bias"])
    assert bits(known) == bits(unknown)


def test_amounts():
    rate, fine, overflown = torch.tensor(0.5), torch.zeros(1), torch.ones(1)
    assert ledger.amount(3.0, 0.5, None, None) == ledger.amount(3.0, 0.5, None, fine) == 1.5
    assert ledger.amount(3.0, 0.5, None, overflown) == 0.0
    assert ledger.amount(3.0, 0.0, rate, None) == ledger.amount(3.0, 0.0, rate, fine) == 1.5
    assert ledger.amount(3.0, 0.0, rate, None).dtype == F64
    for given in (None, rate.to("meta")):
        amount = ledger.amount(3.0, 0.5, given, fine.to("meta"))
        assert (amount.shape, amount.dtype, amount.device.type) == ((), F64, "meta")


def test_lambda_that_changes_between_pulls():
    """Each step counts with the λ that it was taken with."""
    model, twin = network(), network()
    ours, other = protected(model, every=4), protected(twin, every=4, ewc_lambda=2.5)
    for seed, ewc_lambda in enumerate([1.0, 2.0, 3.0, 4.0]):
        for group in ours.param_groups:
            group["ewc_lambda"] = ewc_lambda
        # Their mean, for the matrices; what is diagonal pulls in each step.
        train(model, ours.step, [seed], ["1.weight", "1.bias"])
        train(twin, other.step, [seed], ["1.weight", "1.bias"])
    assert_alike(model, twin)


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}])
def test_importance_of_nothing_changes_no_bit(implementation):
    model, twin = network(), network()
    with torch.no_grad():
        for one in (model, twin):
            one[0].weight[0] = -0.0
    optimizer = protected(model, importance_of(model, scale=0.0), every=2, **implementation)
    plain = EWCAdamW(twin.named_parameters(), **OPTIONS, **implementation)
    train(model, optimizer.step, range(5), ["0.weight"])
    train(twin, plain.step, range(5), ["0.weight"])
    assert bits(model) == bits(twin)
    # Nor does a learning rate of 0, known or not.
    optimizer.consolidate(importance_of(model), decay=0.0)
    plain.consolidate({n: torch.zeros_like(p) for n, p in twin.named_parameters()})
    for group in (*optimizer.param_groups, *plain.param_groups):
        group["lr"] = 0.0
    train(model, optimizer.step, range(3), ["0.weight"])
    train(twin, plain.step, range(3), ["0.weight"])
    assert bits(model) == bits(twin)


def test_a_huge_pull_goes_to_the_anchor():
    model = network()
    start = weights(model)
    optimizer = protected(model, every=2, ewc_lambda=1e308)
    train(model, optimizer.step, range(2))
    for name, old in zip(("0.weight", "2.weight", "4.weight"), start[::4], strict=False):
        assert torch.isfinite(model.get_parameter(name)).all()
        assert (model.get_parameter(name) - old).abs().max() < 1e-5 or name == "2.weight"
    assert all(torch.isfinite(p).all() for p in model.parameters())


# --- layouts --------------------------------------------------------------------------------------


class Shapes(nn.Module):
    """A convolution, a transposed matrix, a table whose inputs are diagonal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(2, 3, 2)
        self.mlp = nn.Parameter(torch.randn(6, 4))
        self.mlp_bias = nn.Parameter(torch.randn(4))
        self.table = nn.Embedding(9, 3)


LAYOUTS = {
    "conv.weight": (Layout((3, 2, 2, 2), bias="conv.bias"), "bb"),
    "mlp": (Layout((6, 4), transposed=True, bias="mlp_bias"), "bb"),
    "table.weight": (Layout((9, 3), transposed=True), "bd"),
}


@pytest.mark.parametrize("energy", [1.0, 0.8])
def test_layouts(energy):
    model, twin = Shapes().double(), Shapes().double()
    factors = {
        name: factors_of(layout, seed, energy, kinds=kinds)
        for seed, (name, (layout, kinds)) in enumerate(LAYOUTS.items())
    }
    importance = KroneckerImportance(factors, {}, 10)
    optimizer, reference = protected(model, importance, every=3), Dense(twin, importance, every=3)
    for seed in range(6):
        for one, stepped in ((model, optimizer), (twin, reference)):
            generator = torch.Generator().manual_seed(seed)
            for param in one.parameters():
                param.grad = torch.randn(param.shape, generator=generator, dtype=F64)
            stepped.step()
    assert_alike(model, twin)


def test_a_bias_in_another_group():
    model, twin = network(F64), network(F64)
    importance = importance_of(model, energy=0.9)
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if p.dim() == 2]},
        {"params": [(n, p) for n, p in named.items() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = EWCAdamW(groups, **{**OPTIONS, "weight_decay": 0.0, "every": 3})
    optimizer.consolidate(importance)
    reference = Dense(twin, importance, every=3, weight_decay=0.0)
    train(model, optimizer.step, range(6))
    train(twin, reference.step, range(6))
    assert_alike(model, twin)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(
        ValueError, match=r"lr must be the same for parameter 0.weight and its bias"
    ):
        train(model, optimizer.step, [6])


# --- stacks ---------------------------------------------------------------------------------------


def test_matrices_of_equal_shape_are_stacked():
    model = network()
    optimizer = protected(model, importance_of(model, energy=0.8))
    stacks = optimizer._pull._looked(optimizer.param_groups, optimizer.state)
    assert sorted(len(stack.members) for stack in stacks) == [1, 1, 2]
    (both,) = (stack for stack in stacks if len(stack.members) == 2)
    storages = {m.state["scale"].untyped_storage().data_ptr() for m in both.members}
    assert len(storages) == 1
    fresh = copy.deepcopy(optimizer)  # whose are stacked anew
    stacks = fresh._pull._looked(fresh.param_groups, fresh.state)
    assert sorted(len(stack.members) for stack in stacks) == [1, 1, 2]


class Mixed(nn.Module):
    """Matrices of one size: [out, in], [in, out], and one column less with a bias in its place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(8, 6, bias=False)
        self.other_way = nn.Parameter(torch.randn(8, 6))
        self.biased = nn.Linear(7, 6)

    def forward(self, x):
        return self.plain(x) + x.tanh() @ self.other_way + self.biased(x[:, :7])


def test_matrices_of_one_size_that_lie_differently(monkeypatch):
    """The kernel of small ones pulls each as the general way does."""

    def pulled():
        model = Mixed()
        x, y = torch.randn(64, 8), torch.randint(6, (64,))
        importance = estimate_fisher(model, [(x, y)], structure="kronecker", progress=False)
        optimizer = EWCAdamW(
            model.named_parameters(),
            lr=1.0,
            weight_decay=0.0,
            penalty="proximal",
            ewc_lambda=1.0,
            every=1,
        )
        optimizer.consolidate(importance)
        for param in model.parameters():
            param.data.add_(torch.randn_like(param))
            param.grad = torch.zeros_like(param)
        before = [param.detach().clone() for param in model.parameters()]
        optimizer.step()
        return before, [param.detach() for param in model.parameters()]

    before, fused = pulled()
    monkeypatch.setattr(shrink, "fits", lambda *arguments: False)
    for was, found, expected in zip(before, fused, pulled()[1], strict=True):
        assert (expected - was).abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("then", ["step", "settle"])
def test_groups_that_are_taken_out(then):
    """Each matrix is pulled with the options of its own group, whatever that one's number is."""
    pulled = []
    for is_taken_out in (True, False):
        model = network(F64)
        first, second = nn.Parameter(torch.ones(3, dtype=F64)), [*model.parameters()]
        named = [*model.named_parameters()]
        groups = [{"params": [("alone", first)], "lr": 1.0}, {"params": named, "lr": 0.01}]
        optimizer = EWCAdamW(groups, penalty="proximal", ewc_lambda=3.0, every=3)
        optimizer.consolidate(importance_of(model), strict=False)
        for seed in range(5):  # two steps are due
            if seed == 4 and is_taken_out and then == "step":
                del optimizer.param_groups[0]
            backward(model, seed)
            optimizer.step()
        if is_taken_out and then == "settle":
            del optimizer.param_groups[0]
            group = optimizer.param_groups[0]
            group["params"] = list(group["params"])  # the same in another list
        optimizer.settle()
        pulled.append([param.detach().clone() for param in second])
    for one, other in zip(*pulled, strict=True):
        assert torch.equal(one, other)


def test_a_pickle_does_not_hold_a_stack_for_each_of_its_matrices():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12)))
    optimizer = protected(model)
    optimizer._pull.matrices(optimizer.param_groups, optimizer.state)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    size = sum(t.numel() * t.element_size() for t in [*tensors, *model.parameters()])
    assert len(pickle.dumps(optimizer)) < 1.5 * size


def test_stacks_in_pieces(monkeypatch):
    from cl_optim.optim.kronecker import stacks

    model, twin = network(), network()
    optimizer, other = protected(model, every=2), protected(twin, every=2)
    train(model, optimizer.step, range(4))
    monkeypatch.setattr(stacks, "_PIECE_CPU", 1)
    train(twin, other.step, range(4))
    assert_alike(model, twin)


# --- dtypes ---------------------------------------------------------------------------------------


def test_autocast_rounds_nothing():
    model, twin = network(), network()
    optimizer, other = protected(model, every=2), protected(twin, every=2)
    for seed in range(4):
        backward(model, seed)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        train(twin, other.step, [seed])
    assert bits(model) == bits(twin)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_bfloat16(rounding):
    model, twin = network(torch.bfloat16), network(torch.bfloat16).double()
    importance = importance_of(twin, energy=0.9)
    optimizer = protected(model, importance, every=3, rounding=rounding)
    reference = Dense(twin, importance, every=3)
    train(model, optimizer.step, range(6))
    # The same gradients, so that only the weights' rounding differs.
    other = network(torch.bfloat16)
    stepped = protected(other, importance, every=3, rounding=rounding)
    for seed in range(6):
        backward(other, seed)
        for param, exact in zip(other.parameters(), twin.parameters(), strict=True):
            exact.grad = param.grad.double()
        stepped.step()
        reference.step()
    assert bits(model) == bits(other)
    assert_alike(other, twin, tolerance=0.03)


def test_kahan_sums_pulls_that_are_below_the_last_place():
    """And rounded stochastically they move weights on average; to the nearest not at all."""
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        model = nn.Linear(64, 64, bias=False).bfloat16()
        with torch.no_grad():
            model.weight.fill_(1.0)
        layout = Layout((64, 64))
        importance = KroneckerImportance({"weight": factors_of(layout, 1)}, {}, 10)
        optimizer = protected(model, importance, every=1, rounding=rounding, lr=1e-7)
        with torch.no_grad():
            model.weight.fill_(2.0)
        for _ in range(50):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        state = optimizer.state[model.weight]
        total = model.weight.detach().double() + state.get("compensation", torch.zeros(())).double()
        moved[rounding] = 2.0 - total
    assert not moved["nearest"].any()
    exact = moved["kahan"]
    assert float(exact.norm()) > 0.0
    along = float((moved["stochastic"] * exact).sum() / exact.square().sum())
    assert along == pytest.approx(1.0, abs=0.15)


def test_float16():
    model, twin = network(), network(F64)
    importance = importance_of(model)
    half = network(torch.float16)
    stepped = protected(half, importance, every=2)
    reference = Dense(twin, importance, every=2)
    for seed in range(4):
        backward(twin, seed)
        for param, exact in zip(half.parameters(), twin.parameters(), strict=True):
            param.grad = exact.grad.half()
        stepped.step()
        reference.step()
    assert_alike(half, twin, tolerance=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_of(dtype):
    model, optimizer, reference, twin = pair(energy=0.9, every=2, basis_dtype=dtype)
    state = optimizer.state[model[0].weight]
    assert state["input_basis"].dtype == dtype
    assert state["scale"].dtype == state["input_values"].dtype == torch.float32
    train(model, optimizer.step, range(6))
    train(twin, reference.step, range(6))
    assert_alike(model, twin, 1e-6 if dtype == torch.float32 else 5e-3)
    optimizer.consolidate(importance_of(model, seed=1))  # and merge what bfloat16 rounded
    reload(optimizer, lambda: protected(network(F64), basis_dtype=dtype))


# --- beside the pull ------------------------------------------------------------------------------


def test_frozen_weights():
    model, optimizer, _, twin = pair(every=3, energy=0.9)
    masks = {n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters() if n != "4.weight"}
    reference = Dense(twin, importance_of(model, energy=0.9), masks, every=3)
    before = dict(model.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    optimizer.freeze(masks=masks)
    train(model, optimizer.step, range(7))
    train(twin, reference.step, range(7))
    assert_alike(model, twin)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name)[mask], before[name][mask])
        assert not torch.equal(model.get_parameter(name)[~mask], before[name][~mask])
    assert float(optimizer.penalty()) == pytest.approx(reference.penalty(), rel=1e-4)
    optimizer.unfreeze()
    train(model, optimizer.step, range(3))
    assert not torch.equal(model.get_parameter("0.weight"), before["0.weight"])


@pytest.mark.parametrize("importance_dtype", ["float32", "log8"])
def test_damping_is_the_diagonals(importance_dtype):
    """Adam's step is damped as by the diagonal alone; λ = 0, so that nothing is pulled."""
    model, twin = network(), network()
    importance = importance_of(model)
    options = {"importance_damping": 2.0, "ewc_lambda": 0.0, "importance_dtype": importance_dtype}
    optimizer = protected(model, importance, every=2, **options)
    other = protected(twin, dict(importance), **options)
    train(model, optimizer.step, range(4))
    train(twin, other.step, range(4))
    assert bits(model) == bits(twin)
    # It may be switched on and off, and the step does not pull by the diagonal then.
    for group in optimizer.param_groups:
        group["ewc_lambda"] = 1e6
    before = weights(model)
    optimizer._pull.ledger = ledger.Ledger()
    train(model, optimizer.step, [5])
    moved = [(p - old).abs().max() for p, old in zip(weights(model), before, strict=True)]
    assert moved[0] > 1e-4  # not held at the anchor
    optimizer.settle()


@pytest.mark.parametrize("around", [lambda optimizer: optimizer, GEM])
def test_a_watch_sees_the_penalty_that_is_pulled(tmp_path, around):
    model, optimizer, reference, twin = pair(every=3)
    train(model, optimizer.step, range(5))
    train(twin, reference.step, range(5))
    with ImportanceLog(tmp_path).watch(around(optimizer)) as watching:
        watching.write()
    ((entry,),) = watch.read(tmp_path / "training")
    total = sum(layer["penalty"] for layer in entry["layers"].values())
    assert total == pytest.approx(reference.penalty(), rel=1e-4)


def test_tracked_sums():
    model, optimizer, reference, twin = pair(every=3, energy=0.9, track_penalty=True)
    skipped = ["1.weight", "1.bias"]  # what is diagonal is summed by each step
    train(model, optimizer.step, range(2), skipped)
    assert float(optimizer.last_penalty) == 0.0
    train(twin, reference.step, range(2), skipped)
    reference.every = 100
    train(twin, reference.step, [2], skipped)
    expected = reference.penalty()
    drift = sum(float(reference.drift(name).square().sum()) for name in reference.factors)
    train(model, optimizer.step, [2], skipped)
    assert float(optimizer.last_penalty) == pytest.approx(expected, rel=1e-5)
    assert optimizer.last_drift.tolist() == [pytest.approx(math.sqrt(drift), rel=1e-5)]
    train(model, optimizer.step, [3], skipped)
    assert float(optimizer.last_penalty) == pytest.approx(expected, rel=1e-5)  # of the last pull
    optimizer.consolidate(importance_of(model, seed=1))
    assert float(optimizer.last_penalty) == 0.0


def test_suggest_lambda():
    """As hard as the task pushes, on average over drifts with random signs."""
    from kronecker_cases import dense

    model = network(F64)
    importance = importance_of(model, energy=0.8)
    optimizer = protected(model, importance)
    skipped = ["1.weight", "1.bias"]
    train(model, optimizer.step, range(2), skipped)
    found = optimizer.suggest_lambda(0.01)
    push = pull = 0.0
    for name, factors in importance.factors.items():
        names = [name] + ([factors.layout.bias] if factors.layout.bias else [])
        states = [optimizer.state[model.get_parameter(n)] for n in names]
        anchor = torch.cat([s["anchor"].flatten() for s in states])
        pull += float(dense(factors).square().sum() * anchor.square().mean())
        for state in states:
            first = state["exp_avg"] / (1 - OPTIONS["betas"][0] ** 2)
            second = state["exp_avg_sq"] / (1 - OPTIONS["betas"][1] ** 2)
            push += float((first / (second.sqrt() + OPTIONS["eps"])).square().sum())
    assert found == pytest.approx(math.sqrt(push) / (2 * 0.01 * math.sqrt(pull)), rel=1e-4)
    optimizer.freeze(1.0)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.suggest_lambda(0.01)


def test_inside_gem():
    model, twin = network(), network()
    optimizer, plain = GEM(protected(model, every=3)), protected(twin, every=3)
    train(model, optimizer.step, range(5))
    train(twin, plain.step, range(5))
    optimizer.settle()
    plain.settle()
    assert bits(model) == bits(twin)
    optimizer.remember("a", lambda: model(torch.ones(4, 5)).square().mean().backward())
    train(model, optimizer.step, range(2))
    assert optimizer.optimizer._pull.ledger.due
    saved = optimizer.state_dict()
    assert not optimizer.optimizer._pull.ledger.due
    optimizer.load_state_dict(saved)
