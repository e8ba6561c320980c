"""A guard with a budget: λ while training, interpolation at its end, and no old data at all."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from bad_input import Row, each_of, refused
from guard_cases import flatten, guard_of, network, scripted, started
from torch import nn
from torch.nn import functional as F
from trainer_cases import tiny_gpt2

from cl_optim import GEM, EWCAdamW
from cl_optim.retention import (
    Evaluation,
    LambdaController,
    OldModel,
    RetentionGuard,
    divergence,
    interpolate,
    old_outputs,
    self_written,
)
from cl_optim.retention.guard.guard import largest_lambda


def moved_from(model: nn.Module) -> Evaluation:
    """1 plus the distance from the weights of now: lost is the distance itself."""
    old = [p.detach().clone() for p in model.parameters()]

    def measure(model: nn.Module) -> float:
        pairs = zip(model.parameters(), old, strict=True)
        return 1.0 + float(sum((p.detach() - was).square().sum() for p, was in pairs)) ** 0.5

    return Evaluation("old", measure, higher_is_better=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, guard: RetentionGuard) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        x = torch.randn(5, 3, generator=generator)
        (model(x) - 3.0).square().mean().backward()
        optimizer.step()
        guard.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- while training -------------------------------------------------------------------------------


def test_steering():
    _, optimizer = network()
    controller = LambdaController(optimizer, raise_by=4.0, limit=8.0)
    factors = []
    for used in (2.0, 9.0, 1.0, 0.75, 0.0, -3.0, *[0.0] * 9):
        controller.steer(used)
        factors.append(controller.factor)
    assert factors[:6] == pytest.approx([4.0, 8.0, 8.0, 8.0 / 2**0.5, 4.0 / 2**0.5, 2**0.5])
    assert factors[-1] == 1 / 8
    assert largest_lambda(optimizer) == 2.0 / 8
    optimizer.param_groups[0]["ewc_lambda"] = 5.0  # the user's, from now on
    controller.steer(2.0)
    assert largest_lambda(optimizer) == pytest.approx(20.0)


def test_lambda_follows_what_is_used():
    guard = started(scripted(1.0, 0.9, 0.975, 1.0, 0.94), budget=0.05)
    assert guard.threshold == 0.05
    assert [guard.step() for _ in range(4)] == [False] * 4
    found = [check.ewc_lambda for check in guard.history]
    assert found == pytest.approx([2.0, 2.0, 6.0, 6.0 / 3**0.5, 2.0])
    assert largest_lambda(guard.optimizer) == pytest.approx(2.0 * 3**0.2)
    assert [bool(check.breached) for check in guard.history] == [False, True, False, False, True]
    assert guard.history[1].action == "λ is 6 now."


def test_the_worst_old_task_steers_and_one_whose_forgetting_is_wanted_does_not():
    guard = started(
        scripted(1.0, 0.99), scripted(1.0, 0.9, name="b"), scripted(1.0, 0.0, name="stale"),
        budget=0.1, useful=["stale"],
    )  # fmt: skip
    guard.step()
    assert largest_lambda(guard.optimizer) == pytest.approx(2.0)  # b has used all of it


def test_numbers_that_are_not_finite_stop_it():
    guard = started(scripted(1.0, math.nan), budget=0.05)
    assert guard.step()
    assert "not finite" in str(guard.report())
    assert largest_lambda(guard.optimizer) == 2.0


def test_it_goes_on_in_a_new_process(tmp_path):
    guard = started(scripted(1.0, 0.8), budget=0.05, folder=tmp_path)
    for _ in range(3):
        guard.step()
    assert largest_lambda(guard.optimizer) == pytest.approx(54.0)
    saved = json.loads(json.dumps(guard.state_dict()))
    model, optimizer = network()
    other = RetentionGuard(model, optimizer, [scripted(0.8)], budget=0.05, every=1)
    other.load_state_dict(saved)
    optimizer.load_state_dict(guard.optimizer.state_dict())
    other.step()
    assert largest_lambda(optimizer) == pytest.approx(162.0)
    assert other._controller.factor == pytest.approx(81.0)


# --- at the end -----------------------------------------------------------------------------------


def run(folder=None, *, old=None, anchors=False, optimizer_of=None, **options):
    """A run that forgets more than its budget: the guard, and the weights it began with."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    optimizer = (optimizer_of or torch.optim.AdamW)(model.named_parameters(), lr=0.05)
    if anchors:
        optimizer.consolidate({n: torch.full_like(p, 1e-6) for n, p in model.named_parameters()})
    before = weights(model)
    given = {name: p.detach().clone() for name, p in model.named_parameters()} if old else None
    guard = RetentionGuard(
        model, optimizer, [moved_from(model)], every=4, folder=folder, old=given, **options
    )
    guard.start()
    train(model, optimizer, guard)
    return guard, before


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("where", ["memory", "folder", "given", "anchors", "around anchors"])
def test_what_is_lost_fits_the_budget_and_uses_it(tmp_path, where, budget):
    around = {
        "anchors": EWCAdamW,
        "around anchors": lambda p, lr: GEM(EWCAdamW(p, lr=lr)),
    }
    guard, before = run(
        tmp_path if where == "folder" else None,
        old=where == "given",
        anchors="anchors" in where,
        optimizer_of=around.get(where),
        budget=budget,
    )
    after = weights(guard.model)
    assert (after - before).norm() > 3 * budget
    curve = guard.finish()
    lost = float((weights(guard.model) - before).norm())
    assert 0.5 * budget < lost <= budget + 1e-6
    torch.testing.assert_close(weights(guard.model), torch.lerp(before, after, curve.alpha))
    last = guard.history[-1]
    assert last.measured[0].loss == pytest.approx(lost, rel=1e-4)
    assert not last.breached
    assert re.fullmatch(r"went back to α = 0\.\d+ of the way from the old weights\.", last.action)
    copy = tmp_path / "old-weights.safetensors"
    assert copy.is_file() == (where == "folder")


def test_what_fits_stays_as_it_is():
    guard, _ = run(budget=0.999)
    guard.model.load_state_dict({k: v * 0.99 for k, v in guard.model.state_dict().items()})
    before = flatten(guard.model.state_dict())
    guard._judge._plain[0] = scripted(1.0, 0.9)
    assert guard.finish().alpha == 1.0
    assert flatten(guard.model.state_dict()) == before
    assert guard.history[-1].action == ""


def test_on_end_takes_the_threshold_and_leaves_actions_as_they_are():
    guard, before = run(threshold=0.3, on_end="interpolate")
    assert guard.stopped
    guard.finish()
    assert 0.15 < float((weights(guard.model) - before).norm()) <= 0.3 + 1e-6


def test_without_either_nothing_is_done():
    guard = started(scripted(1.0))
    before = flatten(guard.model.state_dict())
    assert guard.finish() is None
    assert flatten(guard.model.state_dict()) == before
    assert len(guard.history) == 1


def test_the_copy_is_found_in_a_new_process(tmp_path):
    guard, before = run(tmp_path, budget=0.05)
    trained = guard.model
    model = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    other = RetentionGuard(
        model, optimizer, guard._judge._plain, budget=0.05, every=4, folder=tmp_path
    )
    other.resume()
    other.finish()
    assert 0.025 < float((weights(model) - before).norm()) <= 0.05 + 1e-6

    lost = RetentionGuard(trained, optimizer, guard._judge._plain, budget=0.05, every=4)
    lost.load_state_dict(guard.state_dict())
    with refused(ValueError, "not known in this process: give them as old="):
        lost.finish()


def test_anchors_that_come_in_between_are_not_the_old_weights(tmp_path):
    guard, before = run(tmp_path, budget=0.05, optimizer_of=EWCAdamW)
    guard.optimizer.consolidate({n: torch.ones_like(p) for n, p in guard.model.named_parameters()})
    guard.finish()
    assert float((weights(guard.model) - before).norm()) <= 0.05 + 1e-6


def test_anchors_that_are_not_the_weights_at_the_start_are_not_taken():
    """Exact ones of two tasks are not, nor those from before some training."""
    guard, before = run(budget=0.05, anchors=True, optimizer_of=EWCAdamW)
    guard._judge._plain[0] = moved_from(guard.model)
    guard.start()  # from the weights that it has trained to
    begin = weights(guard.model)
    assert (begin - before).norm() > 0.1
    train(guard.model, guard.optimizer, guard)
    guard.finish()
    assert float((weights(guard.model) - begin).norm()) <= 0.05 + 1e-6


def test_a_budget_is_of_the_baselines_that_were_given():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.04)
    loss = Evaluation("loss", lambda m: float(m.weight), higher_is_better=False)
    guard = RetentionGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), [loss], budget=0.05)
    guard.start(baselines={"loss": 1.0})
    nn.init.constant_(model.weight, 1.08)
    curve = guard.finish()
    assert curve.alpha == pytest.approx(0.25, abs=0.02)
    assert 1.045 < float(model.weight.detach()) <= 1.05 + 1e-6
    assert not guard.history[-1].breached


def test_anchors_are_known_in_whatever_order_they_are_added_up():
    guard, _ = run(budget=0.05, anchors=True, optimizer_of=EWCAdamW)
    saved = json.loads(json.dumps(guard.state_dict()))
    again = RetentionGuard(guard.model, guard.optimizer, guard._judge._plain, budget=0.05, every=4)
    again.load_state_dict(saved)
    again._way_back.anchors = [total * (1 + 1e-14) for total in again._way_back.anchors]
    assert again.finish() is not None


def test_a_model_with_running_statistics_begins_at_a_copy_of_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(32, 3))
    optimizer = EWCAdamW(model.named_parameters(), lr=0.05)
    optimizer.consolidate(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(20, 3)

    def distance(model):
        was = torch.func.functional_call(copy.deepcopy(model).eval(), before, (x,))
        return 1.0 + float((model(x) - was).norm())

    old = Evaluation("old", distance, higher_is_better=False)
    guard = RetentionGuard(model, optimizer, [old], budget=1e-6)
    guard.start()
    for _ in range(5):
        optimizer.zero_grad()
        model.train()(10 + torch.randn(32, 3)).square().mean().backward()
        optimizer.step()
        guard.step()
    with pytest.warns(UserWarning, match="batch norms are interpolated"):
        curve = guard.finish()
    assert curve.alpha == 0.0
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, before[name]), name


def test_a_consolidation_in_between_is_refused(tmp_path):
    guard, _ = run(budget=0.05, anchors=True, optimizer_of=EWCAdamW)
    saved = json.loads(json.dumps(guard.state_dict()))
    guard.optimizer.consolidate({n: torch.ones_like(p) for n, p in guard.model.named_parameters()})
    before = flatten(guard.model.state_dict())
    again = RetentionGuard(guard.model, guard.optimizer, guard._judge._plain, budget=0.05, every=4)
    again.load_state_dict(saved)
    for one in (guard, again):
        with refused(ValueError, "anchors are not those that the run began with.* as old="):
            one.finish()
    assert flatten(guard.model.state_dict()) == before


def test_adapters_that_did_not_begin_at_0_are_refused_before_training():
    model = nn.Sequential(nn.Linear(3, 2))
    model.lora_A = nn.Parameter(torch.ones(1, 3))
    model.lora_B = nn.Parameter(torch.ones(2, 1))
    guard = RetentionGuard(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [scripted(1.0)], budget=0.1
    )
    with refused(ValueError, "did not begin at 0"):
        guard.start()


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, math.nan])
def test_a_budget_is_between_0_and_1(budget):
    with refused(ValueError, "budget must be between 0 and 1, both excluded"):
        guard_of(scripted(1.0), budget=budget)


REFUSED: list[Row] = [
    ("an action", {"budget": 0.1, "on_breach": "stop"}, ValueError, "left out beside a budget"),
    ("on_end", {"on_end": "x"}, ValueError, "on_end must be 'interpolate' or None, not 'x'"),
    ("old alone", {"old": {}}, ValueError, "old is for on_end='interpolate' or a budget"),
    ("useful", {"budget": 0.1, "useful": ["old"]}, ValueError, "there is nothing to keep"),
    ("old of others", {"budget": 0.1, "old": {"x": torch.ones(1)}}, ValueError, "the model lacks"),
    ("a kind", {"budget": 0.1, "old": 3}, TypeError, "old must be a state dict"),
]


@each_of(REFUSED)
def test_options_are_refused(given, error, message):
    with refused(error, message):
        guard_of(scripted(1.0), **given)


# --- without old data -----------------------------------------------------------------------------


def classifier() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5))


def test_old_outputs_are_the_cross_entropy_of_what_was_said():
    model = classifier()
    was, batches = copy.deepcopy(model), [torch.randn(6, 4), (torch.randn(3, 4), "labels")]
    kept = old_outputs(model, was, batches)
    with torch.no_grad():
        inputs = torch.cat([batches[0], batches[1][0]]).double()
        p = torch.softmax(was.double()(inputs), -1)
        was.float()
        entropy = float(-(p * p.log()).sum(-1).mean())
        assert kept.measure(model) == pytest.approx(entropy, rel=1e-5)
        model[2].weight += 0.5 * torch.randn(5, 16)
        expected = float(F.cross_entropy(model.double()(inputs), p))
        model.float()
    assert kept.measure(model) == pytest.approx(expected, rel=1e-5)
    assert kept.role == "old"
    loss = kept.relative_loss(kept.measure(model), entropy)
    assert loss == pytest.approx(divergence(model, was, batches) / entropy, rel=1e-4)


def test_a_mask_counts_in_both_parts():
    model = classifier()
    was, x = copy.deepcopy(model), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = old_outputs(model, was, [x], mask=lambda _: mask)
    alone = old_outputs(model, was, [x[mask != 0]])
    with torch.no_grad():
        model[2].bias += torch.arange(5.0)
    assert kept.measure(model) == pytest.approx(alone.measure(model), rel=1e-5)


def test_a_budget_without_old_data():
    model = classifier()
    optimizer = EWCAdamW(model.named_parameters(), lr=0.02, ewc_lambda=1e-3)
    optimizer.consolidate({name: torch.rand_like(p) for name, p in model.named_parameters()})
    batches = [torch.randn(64, 4)]
    was = OldModel(model, optimizer)
    kept = old_outputs(model, was, batches, name="said")
    guard = RetentionGuard(model, optimizer, [kept], budget=0.05, every=5)
    start = guard.start()
    for seed in range(40):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x.sum(-1) > 0).long()).backward()
        optimizer.step()
        guard.step()
    forgot = guard.check().measured[0].loss
    assert forgot > 0.05
    assert largest_lambda(optimizer) > 1e-3
    curve = guard.finish()
    assert 0 < curve.alpha < 1
    entropy = start.measured[0].value
    assert 0.025 < divergence(model, was, batches) / entropy <= 0.05
    assert interpolate(model, optimizer, evaluate=kept, budget=0.05).alpha == 1.0


def test_self_written_batches_with_stored_outputs_beside_them():
    model = tiny_gpt2(dropout=0.0)
    own = self_written(model, 8, 6, start=0, top=4, progress=False)
    was, batch = copy.deepcopy(model), own.sample(4)
    kept = old_outputs(model, was, [batch])
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
        p, q = (torch.log_softmax(one(batch["input_ids"]).logits, -1) for one in (was, model))
    expected = -(p.exp() * q).sum(-1).mean()
    assert kept.measure(model) == pytest.approx(float(expected), rel=1e-4)


def test_old_outputs_refuse():
    model = classifier()
    was = copy.deepcopy(model)
    with refused(TypeError, "batches must be a list, or what can be gone through again"):
        old_outputs(model, was, iter([torch.ones(1, 4)]))
    with refused(ValueError, "no position that counts"):
        old_outputs(model, was, [])
    with torch.no_grad():
        was[2].weight.zero_()
        was[2].bias.copy_(torch.tensor([1e4, 0, 0, 0, 0]))
    with refused(ValueError, "certain of its outputs on all batches"):
        old_outputs(model, was, [torch.ones(1, 4)])
    with torch.no_grad():
        was[2].bias.fill_(math.nan)
    with refused(ValueError, "old model's logits must not be NaN"):
        old_outputs(model, was, [torch.ones(1, 4)])
