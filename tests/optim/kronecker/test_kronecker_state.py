"""Kronecker importance in an optimizer's state: saved, copied, merged, settled."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from ewc_adamw_cases import reload
from kronecker_training import (
    OPTIONS,
    bits,
    importance_of,
    network,
    protected,
    train,
    weights,
)
from torch import nn

from cl_optim import GEM, EWCAdamW, ImportanceLog, estimate_fisher
from cl_optim.importance.kronecker.side import ENERGY
from cl_optim.optim.kronecker.matrices import KEYS
from cl_optim.optim.settling import settle
from cl_optim.retention import CheckpointError, Checkpoints, Evaluation, RetentionGuard

FIRST, THEN = range(5), range(5, 12)  # of which the first end between two pulls


def begun(**options):
    model = network()
    optimizer = protected(model, importance_of(model, energy=0.9), every=3, **options)
    train(model, optimizer.step, FIRST)
    assert optimizer._pull.ledger.steps == {0: 2}
    return model, optimizer


def is_due(optimizer):
    return bool(optimizer._pull.ledger.due)


# --- state dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_resumed_bit_for_bit(basis_dtype):
    model, optimizer = begun(basis_dtype=basis_dtype, importance_dtype="log8")
    before = weights(model)
    saved = optimizer.state_dict()
    assert not is_due(optimizer)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    fresh = network()
    fresh.load_state_dict(model.state_dict())

    def unprotected():
        return EWCAdamW(fresh.named_parameters(), **OPTIONS)

    resumed = reload(optimizer, unprotected)
    assert resumed.param_groups[0]["basis_dtype"] == basis_dtype
    assert resumed.state[fresh[0].weight]["importance"].dtype == torch.uint8
    for key in KEYS:
        assert torch.equal(saved["state"][0][key], resumed.state[fresh[0].weight][key])
    train(model, optimizer.step, THEN)
    train(fresh, resumed.step, THEN)
    assert bits(model) == bits(fresh)
    assert resumed._pull.ledger.steps == optimizer._pull.ledger.steps == {0: 1}


def test_a_load_discards_what_is_due():
    model, optimizer = begun()
    saved, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer.step, THEN[:2])
    assert is_due(optimizer)
    model.load_state_dict(values)
    optimizer.load_state_dict(saved)
    assert not is_due(optimizer)
    before = bits(model)
    optimizer.settle()
    assert bits(model) == before


def test_parameters_in_another_order():
    """A weight and its bias find each other, whatever comes between them."""
    model, optimizer = begun()
    fresh = network()

    def backwards():
        fresh.load_state_dict(model.state_dict())
        return EWCAdamW(list(fresh.named_parameters())[::-1], **OPTIONS)

    resumed = reload(optimizer, backwards)
    train(model, optimizer.step, THEN)
    train(fresh, resumed.step, THEN)
    torch.testing.assert_close(weights(fresh), weights(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copied_in_between_two_pulls(how):
    model, optimizer = begun()
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert other._pull.ledger.steps == {0: 2}
    before = bits(model)
    train(twin, other.step, THEN)
    assert bits(model) == before
    train(model, optimizer.step, THEN)
    assert bits(model) == bits(twin)


def test_a_pickle_of_an_earlier_version():
    optimizer = EWCAdamW(network().named_parameters(), every=4)
    state = optimizer.__getstate__()
    state.pop("ledger")
    for options in (state["defaults"], *state["param_groups"]):
        for key in ("every", "basis_dtype"):
            del options[key]
    fresh = EWCAdamW.__new__(EWCAdamW)
    fresh.__setstate__(state)
    for options in (fresh.defaults, fresh.param_groups[0]):
        assert (options["every"], options["basis_dtype"]) == (10, "float32")
    fresh.settle()


def test_distributed_checkpoints_flatten_it():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, optimizer = begun()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert not is_due(optimizer)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    resumed = protected(fresh, importance_of(fresh, energy=0.9))
    set_optimizer_state_dict(fresh, resumed, saved)
    train(model, optimizer.step, THEN)
    train(fresh, resumed.step, THEN)
    assert bits(model) == bits(fresh)


def test_a_group_that_is_added_later():
    model, optimizer = begun()
    more = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("more", more)]})
    more.grad = torch.ones(3)
    train(model, optimizer.step, THEN)
    assert torch.isfinite(more).all()
    assert not is_due(optimizer) or 1 not in optimizer._pull.ledger.due


def test_state_that_is_cleared():
    model, optimizer = begun()
    optimizer.state.clear()
    train(model, optimizer.step, THEN)
    before = bits(model)
    optimizer.settle()
    assert bits(model) == before


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_two_tasks(basis_dtype):
    model, optimizer = begun(basis_dtype=basis_dtype)
    first, second = (importance_of(model, seed, energy=0.9) for seed in (0, 1))
    optimizer.consolidate(second, decay=0.5)
    assert not is_due(optimizer)
    found = {m.params[0]: m.factors() for m in matrices(optimizer)}
    for name, one in first.factors.items():
        expected = one.merged(second.factors[name], 0.5, ENERGY, name)
        state = found[model.get_parameter(name)]
        tolerance = 1e-5 if basis_dtype == "float32" else 2e-2
        for ours, wanted in zip(
            (state.output, state.input), (expected.output, expected.input), strict=True
        ):
            difference = ours.matrix() - wanted.matrix()
            assert difference.abs().max() <= tolerance * wanted.matrix().abs().max()
        assert state.trace() == pytest.approx(expected.trace(), rel=tolerance)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        assert torch.equal(state["anchor"], param)
        torch.testing.assert_close(state["importance"], 0.5 * first[name] + second[name])
    sizes = state_size(optimizer)
    for seed in range(2, 5):
        train(model, optimizer.step, range(2))
        optimizer.consolidate(importance_of(model, seed, energy=0.9))
    assert state_size(optimizer) <= 1.5 * sizes


def matrices(optimizer):
    return optimizer._pull.matrices(optimizer.param_groups, optimizer.state)


def state_size(optimizer):
    return sum(t.numel() for state in optimizer.state.values() for t in state.values())


def test_a_task_without_importance_for_a_matrix():
    model, optimizer = begun()
    second = importance_of(model, 1)
    factors = {name: one for name, one in second.factors.items() if name != "2.weight"}
    before = optimizer.state[model[2].weight]["scale"].clone()
    partial = type(second)(factors, second.unfactored, 10)
    optimizer.consolidate(partial, decay=0.5, strict=False)
    state = optimizer.state[model[2].weight]
    rows, columns = before.shape
    scale = state["scale"]
    kept = torch.cat([scale[: rows - 1], scale[-1:]])
    kept = torch.cat([kept[:, : columns - 1], kept[:, -1:]], 1)
    torch.testing.assert_close(kept, 0.5 * before)
    train(model, optimizer.step, THEN)


def test_what_is_forgotten():
    """decay=0 goes from one kind to the other, and leaves nothing of the first."""
    model, optimizer = begun()
    optimizer.consolidate(dict(importance_of(model, 1)), decay=0.0)
    assert not any(key in state for state in optimizer.state.values() for key in KEYS)
    assert optimizer._pull.roles(optimizer.param_groups, optimizer.state) == {}
    train(model, optimizer.step, THEN)
    assert not is_due(optimizer)
    optimizer.consolidate(importance_of(model, 1), decay=0.0)
    assert len(matrices(optimizer)) == 4
    optimizer.consolidate(None, decay=0.0)
    assert not matrices(optimizer)


def test_moments_begin_anew():
    model, optimizer = begun(rounding="stochastic")
    optimizer.consolidate(importance_of(model, 1), reset_state=True)
    assert "step" not in optimizer.state[model[0].weight]
    train(model, optimizer.step, THEN)


def test_a_log(tmp_path):
    model = network()
    log = ImportanceLog(tmp_path)
    tasks = [importance_of(model, seed, energy=0.9) for seed in (0, 1)]
    for number, task in enumerate(tasks):
        log.record(str(number), task)
    optimizer = protected(model, log)
    (one,) = (m for m in matrices(optimizer) if m.params[0] is model[0].weight)
    expected = tasks[0].merge(tasks[1]).factors["0.weight"]
    assert one.factors().trace() == pytest.approx(expected.trace(), rel=1e-5)
    with log.watch(optimizer, every=1):
        train(model, optimizer.step, FIRST)


def test_wrapped_names():
    model = network()
    wrapped = nn.DataParallel(model)
    optimizer = EWCAdamW(wrapped.named_parameters(), **OPTIONS)
    optimizer.consolidate(importance_of(model))
    assert len(matrices(optimizer)) == 4


def test_a_bias_that_cannot_move():
    model = network()
    model[2].bias.requires_grad_(False)
    optimizer = protected(model, every=2)
    before = model[2].bias.clone()
    train(model, optimizer.step, range(4))
    assert torch.equal(model[2].bias, before)


# --- settling -------------------------------------------------------------------------------------


def settled_copy(model, optimizer):
    twin, other = copy.deepcopy((model, optimizer))
    other.settle()
    return twin


def test_freezing_settles():
    model, optimizer = begun()
    expected = bits(settled_copy(model, optimizer))
    optimizer.freeze(0.3)
    assert bits(model) == expected
    train(model, optimizer.step, THEN[:2])
    expected = bits(settled_copy(model, optimizer))
    optimizer.unfreeze()
    assert bits(model) == expected
    assert not is_due(optimizer)


def test_settling_twice_changes_nothing():
    model, optimizer = begun()
    optimizer.settle()
    before = bits(model)
    optimizer.settle()
    assert bits(model) == before


def test_penalty_does_not_settle():
    model, optimizer = begun()
    before = bits(model)
    optimizer.penalty()
    optimizer.suggest_lambda()
    list(optimizer.protected())
    assert bits(model) == before
    assert is_due(optimizer)


def test_before_evaluation_and_saving():
    model, optimizer = begun()
    handle = optimizer.settle_before(model)
    expected = settled_copy(model, optimizer)
    model(torch.ones(1, 5))  # in training mode
    assert is_due(optimizer)
    copy.deepcopy(model).eval()(torch.ones(1, 5))
    assert is_due(optimizer)
    torch.testing.assert_close(model.eval()(torch.ones(1, 5)), expected(torch.ones(1, 5)))
    assert not is_due(optimizer)
    train(model, optimizer.step, THEN[:1])
    expected = settled_copy(model, optimizer).state_dict()
    torch.testing.assert_close(model.state_dict(), expected)
    assert not is_due(optimizer)
    handle.remove()
    train(model, optimizer.step, THEN[:1])
    model.state_dict()
    assert is_due(optimizer)


@pytest.mark.parametrize("around", [lambda o: o, GEM], ids=["EWCAdamW", "GEM"])
def test_the_guard(tmp_path, around):
    model = network()
    inner = protected(model, every=100)
    optimizer = around(inner)
    due = []
    evaluation = Evaluation("old", lambda _: due.append(is_due(inner)) or 1.0)
    guard = RetentionGuard(model, optimizer, [evaluation], every=3, folder=tmp_path)
    guard.start()
    for seed in range(4):
        train(model, optimizer.step, [seed])
        guard.step()
    assert due == [False, False]
    assert is_due(inner)
    checkpoint = guard._checkpoints
    saved = torch.load(checkpoint.path(3), weights_only=True)["parts"]["model"]
    # The steps since are given up, and nothing of theirs is due.
    guard.resume()
    assert not is_due(inner)
    torch.testing.assert_close(dict(model.state_dict()), dict(saved))


def test_a_checkpoint_is_of_settled_weights(tmp_path):
    model, optimizer = begun()
    expected = settled_copy(model, optimizer).state_dict()
    checkpoints = Checkpoints(tmp_path, {"model": model, "optimizer": optimizer})
    checkpoints.save(1)
    saved = torch.load(checkpoints.path(1), weights_only=True)["parts"]["model"]
    torch.testing.assert_close(dict(saved), dict(expected))
    train(model, optimizer.step, THEN[:2])
    before = settled_copy(model, optimizer).state_dict()
    refusing = Checkpoints(tmp_path, {**checkpoints.parts, "last": Refusing()})
    refusing.save(2)
    with pytest.raises(CheckpointError, match="refuses its state"):
        refusing.restore()
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


class Refusing:
    """A part that comes last, when the others have been loaded."""

    def __init__(self):
        self.loads = 0

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        self.loads += 1
        if self.loads == 1:
            raise ValueError("not now")


def test_settle_through_wrappers():
    model, optimizer = begun()

    class Around:
        pass

    outer, middle = Around(), Around()
    outer.optimizer, middle.optimizer = middle, GEM(optimizer)
    settle(outer)
    assert not is_due(optimizer)
    settle(torch.optim.SGD(model.parameters()))
    settle(GEM(torch.optim.SGD(model.parameters())))
    settle(object())


def test_what_is_in_a_matrix_steps_unprotected():
    """But for what is damped or frozen; what has no factors is pulled by each step."""
    model = network()
    optimizer = protected(model)

    def roles():
        train(model, optimizer.step, [0])
        return {
            id(param): (batch.role, batch.hyper(optimizer._next_step()).ewc_lambda)
            for batch in optimizer._launch._batches
            for param in batch.params
        }

    free = {id(p): n for n, p in model.named_parameters() if not n.startswith("1.")}
    found = roles()
    assert {found.pop(one) for one in free} == {("plain", 0.7)}
    assert set(found.values()) == {("protected", 0.7)}
    optimizer.freeze(masks={"0.bias": torch.ones(4).bool()})
    assert [free[one] for one, role in roles().items() if role == ("held", 0.0)] == ["0.bias"]
    for group in optimizer.param_groups:
        group["importance_damping"] = 1.0
    found = roles()
    assert {found[one] for one in free} == {("held", 0.0)}


# --- heads of other tasks -------------------------------------------------------------------------


class Heads(nn.Module):
    """One hidden layer, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(5, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.hidden(x)))


def test_what_a_task_does_not_use_keeps_what_it_has(tmp_path):
    model, x = Heads(), torch.randn(20, 5)
    optimizer = protected(model, importance_of_task(model, x, 0))
    importances = [importance_of_task(model, x, task) for task in (0, 1)]
    assert "heads.1.weight" in importances[0].unfactored
    keys = [key for key in KEYS if key != "matrix"]
    before = {key: optimizer.state[model.heads[0].weight][key].clone() for key in keys}
    optimizer.consolidate(importances[1])
    for key, value in before.items():
        torch.testing.assert_close(optimizer.state[model.heads[0].weight][key], value)
    assert "scale" in optimizer.state[model.heads[1].weight]
    # All at once, from a log, it is the same.
    log = ImportanceLog(tmp_path)
    for task, importance in enumerate(importances):
        log.record(str(task), importance)
    other = EWCAdamW(model.named_parameters(), **OPTIONS)
    other.consolidate(log)
    for param in model.parameters():
        for key in ("importance", "scale", "tails"):
            if key in optimizer.state[param]:
                torch.testing.assert_close(other.state[param][key], optimizer.state[param][key])


def importance_of_task(model, x, task):
    model.task = task
    return estimate_fisher(model, [x], "exact", structure="kronecker", energy=0.99)
