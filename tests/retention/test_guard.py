"""The guard: when it acts, what it does, and what it leaves alone."""

from __future__ import annotations

import csv
import io
import json
import math
import random

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from guard_cases import flatten, guard_of, network, scripted, started
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cl_optim import GEM, EWCAdamW, estimate_fisher
from cl_optim.demo.scenarios import digits, permuted
from cl_optim.retention import (
    CheckpointError,
    CheckpointWarning,
    CSVLogger,
    DataStream,
    Evaluation,
    LambdaController,
    RetentionGuard,
    RetentionWarning,
    RichLogger,
    TensorBoardLogger,
)
from cl_optim.retention.checkpoint.random_state import rng_state


def train(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("higher", "baseline", "good", "bad"),
    [(True, 0.8, 0.721, 0.719), (False, 2.0, 2.199, 2.201), (True, -2.0, -2.199, -2.201)],
)
def test_a_breach_is_a_relative_loss_above_the_threshold(higher, baseline, good, bad):
    guard = started(scripted(baseline, good, bad, higher=higher))
    assert guard.step() is False
    assert guard.step() is True
    assert [check.breached for check in guard.history] == [(), (), ("old",)]
    assert guard.history[2].measured[0].loss == pytest.approx(abs(bad - baseline) / abs(baseline))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["old", "new", "mixed"])
def test_a_number_that_is_not_finite_is_a_breach_whatever_its_role(value, role):
    guard = started(scripted(1.0), scripted(1.0, value, name="other", role=role))
    assert guard.step()
    assert guard.history[-1].breached == ("other",)
    assert "lower the learning rate" in str(guard.report())


def test_only_old_tasks_are_guarded_and_not_those_whose_forgetting_is_wanted():
    guard = started(
        scripted(1.0),
        scripted(1.0, 0.1, name="stale facts"),
        scripted(1.0, 0.1, name="new", role="new"),
        scripted(1.0, 0.1, name="mixed", role="mixed"),
        useful=["stale facts"],
    )
    assert not guard.step()
    assert "forgetting wanted" in str(guard.report())


def test_it_evaluates_every_so_many_steps_and_stays_stopped():
    model, optimizer = network()
    guard = RetentionGuard(model, optimizer, [scripted(1.0, 1.0, 0.5, 1.0)], every=3)
    guard.start()
    assert [guard.step() for _ in range(8)] == [False] * 5 + [True] * 3
    assert [check.step for check in guard.history] == [0, 3, 6]


def test_evaluating_changes_neither_modes_nor_random_numbers_nor_gradients():
    model, optimizer = network()
    model[1].eval()
    modes = []

    def measure(model):
        modes.extend([model.training, torch.is_grad_enabled()])
        return 1.0 + 0 * (torch.rand(()).item() + random.random() + float(np.random.rand()))  # noqa: NPY002

    guard = RetentionGuard(model, optimizer, [Evaluation("old", measure)], every=1)
    before = flatten(rng_state())
    guard.start()
    guard.step()
    assert flatten(rng_state()) == before
    assert modes == [False, False] * 2
    assert [m.training for m in model] == [True, False, True]


def test_no_evaluation_sees_what_another_left_behind():
    """Many evaluations end with ``model.train()``."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    seen = []

    def careless(model):
        seen.append((model.training, torch.is_grad_enabled()))
        model(torch.randn(5, 3) + 5)
        model.train()
        torch.set_grad_enabled(True)
        return 1.0

    before = flatten(model.state_dict())
    evaluations = [Evaluation("a", careless), Evaluation("b", careless)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    RetentionGuard(model, optimizer, evaluations, quantize="int8").start()
    assert seen == [(False, False)] * 4
    assert flatten(model.state_dict()) == before
    assert model.training
    assert torch.is_grad_enabled()


def test_a_new_task_may_begin_at_zero():
    guard = started(scripted(1.0), scripted(0.0, 0.0, 0.5, name="new", role="new"))
    guard.step()
    guard.step()
    assert [check.measured[1].loss for check in guard.history] == [0.0, 0.0, -math.inf]
    assert "+0.5, from 0" in str(guard.report())
    assert "keep these weights" in str(guard.report())


def test_warn_goes_on():
    guard = started(scripted(1.0, 0.5), on_breach="warn")
    for _ in range(2):
        with pytest.warns(RetentionWarning, match=r"old lost 50.0% of its baseline"):
            assert not guard.step()


def test_rollback_restores_every_bit_and_stops(tmp_path):
    model, optimizer = network()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.arange(20))
    stream = DataStream(DataLoader(data, 3, shuffle=True, generator=generator))
    batches = iter(stream)
    guard = RetentionGuard(
        model, optimizer, [scripted(1.0, 1.0, 0.95, 0.2)], every=2, on_breach="rollback",
        folder=tmp_path, scheduler=scheduler, data=stream,
    )  # fmt: skip
    optimizer.consolidate(None)
    guard.start()
    bits, following = [], []
    for _ in range(6):
        following.append(next(batches)[0].tolist())
        train(model, optimizer)
        scheduler.step()
        stopped = guard.step()
        parts = (model, optimizer, scheduler, stream)
        bits.append(flatten([*(p.state_dict() for p in parts), rng_state()]))
    assert stopped
    assert guard.steps == 4
    assert bits[5] == bits[3]  # where the last good checkpoint was taken
    assert bits[4] != bits[3]
    assert next(batches)[0].tolist() == following[4]
    assert all(p.grad is None for p in model.parameters())
    report = str(guard.report())
    assert "Training was stopped at step 6, and back at step 4" in report


def test_rollback_falls_back_where_the_newest_checkpoint_is_corrupt(tmp_path):
    guard = started(scripted(1.0, 1.0, 0.2), on_breach="rollback", folder=tmp_path)
    start = flatten(guard.model.state_dict())
    train(guard.model, guard.optimizer)
    guard.step()
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    train(guard.model, guard.optimizer)
    with pytest.warns(CheckpointWarning, match="the one before it"):
        assert guard.step()
    assert flatten(guard.model.state_dict()) == start
    assert guard.steps == 0


def test_rollback_with_more_protection_goes_on(tmp_path):
    guard = started(
        scripted(1.0, 0.5, 0.5, 0.99), on_breach=("rollback", "raise_lambda"), folder=tmp_path,
        raise_by=4.0, limit=10.0,
    )  # fmt: skip
    start = flatten(guard.model.state_dict())
    seen = []
    for _ in range(2):
        train(guard.model, guard.optimizer)
        assert not guard.step()
        assert flatten(guard.model.state_dict()) == start
        seen.append(guard.optimizer.param_groups[0]["ewc_lambda"])
    assert seen == [8.0, 20.0]  # ×4, and then the limit of ×10: roll-back does not undo it
    assert guard.steps == 0


def test_lambda_is_raised_to_its_limit_then_training_stops_and_it_relaxes_when_safe():
    guard = started(
        scripted(1.0, 0.8, 0.92, 0.97, 1.0, 1.0, 0.5, 0.5, 0.5), on_breach="raise_lambda",
        raise_by=4.0, limit=8.0,
    )  # fmt: skip
    group = guard.optimizer.param_groups[0]
    lambdas = []
    while not guard.step():
        lambdas.append(group["ewc_lambda"])
    assert lambdas == [8.0, 8.0, 4.0, 2.0, 2.0, 8.0, 16.0]
    assert "λ is at its limit" in guard.history[-1].action


def test_the_controller_keeps_the_ratio_of_groups_and_its_state():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = EWCAdamW(
        [{"params": params[:1], "ewc_lambda": 1.0}, {"params": params[1:], "ewc_lambda": 5.0}]
    )
    controller = LambdaController(optimizer, raise_by=2.0)
    controller.raise_lambda()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [2.0, 10.0]
    other = LambdaController(optimizer, raise_by=2.0)
    other.load_state_dict(controller.state_dict())
    other.raise_lambda()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [4.0, 20.0]


def test_the_controller_takes_over_what_the_user_sets():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = EWCAdamW(params[:1], ewc_lambda=1.0)
    controller = LambdaController(optimizer, raise_by=4.0)
    optimizer.param_groups[0]["ewc_lambda"] = 50.0
    controller.relax()
    assert optimizer.param_groups[0]["ewc_lambda"] == 50.0
    controller.raise_lambda()
    optimizer.param_groups[0]["ewc_lambda"] = 80.0
    controller.relax()
    assert optimizer.param_groups[0]["ewc_lambda"] == 40.0
    controller.relax()
    controller.relax()
    assert optimizer.param_groups[0]["ewc_lambda"] == 20.0
    optimizer.param_groups[0]["ewc_lambda"] = 50.0
    optimizer.add_param_group({"params": params[1:], "ewc_lambda": 3.0})
    controller.raise_lambda()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [200.0, 12.0]
    controller.relax()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [100.0, 6.0]


def test_a_group_added_while_lambda_is_raised_brings_its_present_lambda():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = EWCAdamW(params[:1], ewc_lambda=1.0)
    controller = LambdaController(optimizer, raise_by=4.0)
    controller.raise_lambda()
    optimizer.add_param_group({"params": params[1:], "ewc_lambda": 6.0})
    controller.state_dict()  # looking must change nothing
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [4.0, 6.0]
    controller.raise_lambda()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [16.0, 24.0]
    controller.relax()
    controller.relax()
    assert [g["ewc_lambda"] for g in optimizer.param_groups] == [4.0, 6.0]


def test_a_roll_back_keeps_the_lambda_that_the_user_set(tmp_path):
    guard = started(
        scripted(1.0, 0.5), on_breach=("rollback", "raise_lambda"), folder=tmp_path, raise_by=3.0
    )
    guard.optimizer.param_groups[0]["ewc_lambda"] = 10.0
    guard.step()
    assert guard.optimizer.param_groups[0]["ewc_lambda"] == 30.0


def test_a_guard_that_has_not_started_can_be_loaded(tmp_path):
    new = guard_of(scripted(1.0), folder=tmp_path)
    new.continue_from(guard_of(scripted(1.0), scripted(1.0, name="b")).state_dict())
    new.start()
    assert new.baselines == {"old": 1.0}


def test_another_optimizers_checkpoint_changes_nothing(tmp_path):
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    RetentionGuard(model, sgd, [scripted(1.0)], folder=tmp_path).start()
    other = nn.Linear(2, 2)
    before = flatten(other.state_dict())
    for optimizer in (EWCAdamW(other.parameters()), GEM(EWCAdamW(other.parameters()))):
        with pytest.raises(CheckpointError, match="'optimizer' does not fit: the state dict is"):
            RetentionGuard(other, optimizer, [scripted(1.0)], folder=tmp_path).resume()
    assert flatten(other.state_dict()) == before


def test_resume_with_other_evaluations_or_groups_changes_nothing(tmp_path):
    guard_of(scripted(1.0), folder=tmp_path).start()
    other = guard_of(scripted(1.0), scripted(1.0, name="b"), folder=tmp_path)
    train(other.model, other.optimizer)
    before = flatten(other.model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"evaluations \['old'\], this one has \['b', 'old'\]"
    ):
        other.resume()
    with pytest.raises(ValueError, match="the saved guard has the evaluations"):
        other.load_state_dict({"baselines": {"old": 1.0}})
    model, _ = network()
    two = EWCAdamW([{"params": [p]} for p in model.parameters()])
    with pytest.raises(CheckpointError, match=r"its groups have \[4\] parameters, this .*1, 1, 1"):
        RetentionGuard(other.model, two, [scripted(1.0)], folder=tmp_path).resume()
    assert flatten(other.model.state_dict()) == before


def test_inside_a_trainer_the_checkpoints_of_an_abandoned_run_are_gone(tmp_path):
    options = {"on_breach": "rollback", "folder": tmp_path}
    guard = started(scripted(1.0), **options)
    guard.step()
    saved = guard.state_dict()
    for _ in range(3):
        train(guard.model, guard.optimizer)
        guard.step()
    again = guard_of(scripted(0.5), **options)
    again.continue_from(saved)
    train(again.model, again.optimizer)
    assert again.step()
    assert "rolled back to step 1" in again.history[-1].action
    assert flatten(again.model.state_dict()) == flatten(network()[0].state_dict())
    # Where the folder was lost, there is something to go back to from now on.
    elsewhere = guard_of(scripted(0.5), on_breach="rollback", folder=tmp_path / "new")
    elsewhere.continue_from(saved)
    assert elsewhere.step()
    assert "rolled back to step 1" in elsewhere.history[-1].action


def test_resume_in_a_new_process_goes_on_with_baselines_history_and_lambda(tmp_path):
    def make(*values):
        return guard_of(
            scripted(*values), on_breach=("rollback", "raise_lambda"), folder=tmp_path, raise_by=2.0
        )

    guard = make(1.0, 0.5, 0.95, 0.93)
    guard.start()
    guard.step()
    guard.step()
    train(guard.model, guard.optimizer)
    guard.step()
    new = make(0.95)
    assert new.resume() == 2
    assert new.steps == 2
    assert new.baselines == {"old": 1.0}
    assert [c.action for c in new.history] == [c.action for c in guard.history]
    assert new.history[1].breached == ("old",)
    assert new.optimizer.param_groups[0]["ewc_lambda"] == guard.history[-1].ewc_lambda
    assert flatten(new.model.state_dict()) == flatten(guard.model.state_dict())
    assert not new.step()
    assert new.history[-1].measured[0].baseline == 1.0


def test_a_new_run_does_not_begin_in_the_folder_of_an_old_one(tmp_path):
    guard_of(scripted(1.0), folder=tmp_path).start()
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run: resume\(\)"):
        guard_of(scripted(1.0), folder=tmp_path).start()


def test_gem_keeps_its_memories_through_a_roll_back(tmp_path):
    model, inner = network()
    optimizer = GEM(inner)
    x = torch.randn(4, 3)
    optimizer.remember("a", lambda: model(x).square().sum().backward())
    guard = RetentionGuard(
        model, optimizer, [scripted(1.0, 0.5, 1.0)], every=1, folder=tmp_path,
        on_breach=("rollback", "raise_lambda"),
    )  # fmt: skip
    guard.start()
    for _ in range(3):
        train(model, optimizer)
        assert not guard.step()
    assert len(optimizer.conflicts()) == 1
    guard.resume()
    train(model, optimizer)
    assert len(optimizer.conflicts()) == 1


def make(**options):
    """Return a call that makes a guard of one evaluation with these options."""
    return lambda _: guard_of(scripted(1.0), **options)


def plain(**options):
    """Return a call that starts a guard of what has neither λ nor layers that are quantized."""
    model = nn.Sequential(nn.Conv1d(2, 2, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    return lambda _: RetentionGuard(model, optimizer, [scripted(1.0)], **options).start()


BAD = [
    ("threshold 0", make(threshold=0.0),
     ValueError, "threshold must be between 0 and 1, both excluded, not 0.0"),
    *((f"threshold {bad}", make(threshold=bad), ValueError, "threshold must be between 0 and 1")
      for bad in (1.0, math.nan)),
    ("every 0", lambda _: RetentionGuard(*network(), [scripted(1.0)], every=0),
     ValueError, "every must be a whole number of at least 1, not 0"),
    ("an action", make(on_breach="panic"), ValueError, "on_breach must be one of .* not 'panic'"),
    ("two actions", make(on_breach=("warn", "stop")), ValueError, "on_breach must be one of"),
    ("roll-back without folder", make(on_breach="rollback"), ValueError, "needs a folder"),
    ("useful", make(useful=["x"]),
     ValueError, "useful names 'x', which is none of the old tasks"),
    ("quantize", make(quantize="int3"), ValueError, "quantize must be one of .* not 'int3'"),
    ("nothing to quantize", plain(quantize="int8"),
     ValueError, r"quantizes nn\.Linear layers; Sequential has none"),
    ("no λ to raise", plain(on_breach="raise_lambda"),
     ValueError, "ewc_lambda is above 0, such as EWCAdamW, not AdamW"),
    ("raise_by 1", make(on_breach="raise_lambda", raise_by=1.0),
     ValueError, "raise_by must be above 1"),
    ("limit 0.5", make(on_breach="raise_lambda", limit=0.5),
     ValueError, "limit must be at least 1"),
    ("data without state", lambda folder: guard_of(scripted(1.0), folder=folder, data=[1, 2]),
     TypeError, "part 'data' of a checkpoint must have state_dict"),
    ("extra", lambda folder: guard_of(scripted(1.0), folder=folder, extra={"model": nn.ReLU()}),
     ValueError, "extra must not have the name 'model'"),
    ("an evaluation twice", lambda _: guard_of(scripted(1.0), scripted(1.0)),
     ValueError, "'old' is there twice"),
    ("no old task", lambda _: guard_of(scripted(1.0, role="new")),
     ValueError, "at least one with role 'old'"),
    ("a role", lambda _: scripted(1.0, role="x"),
     ValueError, r"role of evaluation 'old' must be one of .* 'x'"),
    ("no name", lambda _: scripted(1.0, name=""),
     ValueError, "name of an evaluation must not be empty"),
    ("start() with a baseline", lambda _: guard_of(scripted(1.0)).start(baselines={"x": 1.0}),
     ValueError, "baselines has 'x', which is no evaluation"),
    ("resume() without folder", lambda _: guard_of(scripted(1.0)).resume(),
     ValueError, "needs a guard with a folder"),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, given, error, message):
    with refused(error, message):
        given(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_baseline_that_is_no_measure_starts_nothing(tmp_path, value):
    guard = guard_of(scripted(value), folder=tmp_path)
    with refused(ValueError, "baseline of evaluation 'old' must be finite and not"):
        guard.start()
    assert list(tmp_path.iterdir()) == []
    with refused(RuntimeError, r"call start\(\), or resume\(\), first"):
        guard.step()


def test_given_baselines_count():
    guard = guard_of(scripted(1.0, 0.95))
    guard.start(baselines={"old": 2.0})
    assert guard.step()


def test_checks_are_logged_to_csv_tensorboard_and_the_terminal(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    text = io.StringIO()
    with SummaryWriter(tmp_path / "tb") as writer:
        guard = guard_of(
            scripted(1.0, 0.95, 0.5),
            scripted(3.0, 2.0, 1.0, name="new", role="new", higher=False),
            loggers=[
                CSVLogger(tmp_path / "logs" / "guard.csv"),
                TensorBoardLogger(writer),
                RichLogger(Console(file=text, width=100)),
            ],
        )
        guard.start()
        while not guard.step():
            pass
    with open(tmp_path / "logs" / "guard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["evaluation"], float(r["value"])) for r in rows] == [
        ("0", "old", 1.0), ("0", "new", 3.0), ("1", "old", 0.95), ("1", "new", 2.0),
        ("2", "old", 0.5), ("2", "new", 1.0),
    ]  # fmt: skip
    assert "training stopped" in rows[-1]["action"]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [e.value for e in events.Scalars("retention/old")] == pytest.approx([1.0, 0.95, 0.5])
    assert [e.step for e in events.Scalars("retention_loss/new")] == [0, 1, 2]
    assert "step 2: old 0.5 (-50.0%), new 1 (+66.7%)" in text.getvalue()


def test_a_cell_of_the_csv_is_no_formula(tmp_path):
    """As OWASP has it: what a spreadsheet would run gets an apostrophe; numbers stay numbers."""
    guard = started(
        scripted(-1.0, -1.5, name='=HYPERLINK("//x")'), loggers=[CSVLogger(tmp_path / "guard.csv")]
    )
    guard.step()
    with open(tmp_path / "guard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["evaluation"] for row in rows] == ['\'=HYPERLINK("//x")'] * 2
    assert [row["value"] for row in rows] == ["-1.0", "-1.5"]


def test_the_report_says_what_is_retained_what_was_learned_and_one_recommendation():
    guard = started(scripted(0.9, 0.45), scripted(4.0, 1.0, name="code", role="new", higher=False))
    guard.step()
    report = str(guard.report())
    assert "50.0%" in report
    assert "forgotten" in report
    assert "+75.0%" in report
    assert "learned" in report
    assert "Training was stopped at step 1; more than 10% was lost in 1 check." in report
    assert report.count("Recommendation") == 1
    advice = " ".join(report.partition("Recommendation: ")[2].split())
    assert advice.startswith("protect old more: raise ewc_lambda above 2, let the learning rate")
    assert "budget" in advice
    assert "self_written" in advice
    guard = guard_of(scripted(0.9, 0.45))
    guard.optimizer.param_groups[0]["ewc_lambda"] = 0.0
    guard.start()
    guard.step()
    assert "protect old: let the learning rate" in " ".join(str(guard.report()).split())


def outcome_and_recommendation(guard):
    lines = str(guard.report()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Training was"))
    outcome, _, recommendation = " ".join(lines[start:]).partition(" Recommendation: ")
    return outcome, recommendation


@pytest.mark.parametrize(
    ("values", "options", "outcome", "recommendation", "shown"),
    [
        (
            (1.0, 0.95, 0.93), {},
            "not stopped; more than 10% was lost in no checks.",
            "keep these weights: no guarded task has lost more than allowed at step 2.", 2,
        ),
        (
            (1.0, 0.5, 0.4, 0.95), {"on_breach": "warn"},
            "not stopped; more than 10% was lost in 2 checks, but not in the last, at step 3.",
            "keep these weights: no guarded task has lost more than allowed at step 3.", 3,
        ),
        (
            (1.0, 0.95, 0.4), {"on_breach": "warn"},
            "not stopped; more than 10% was lost in 1 check.", "protect old more", 2,
        ),
        (
            (1.0, 0.95, 0.4), {"on_breach": "stop"},
            "stopped at step 2; more than 10% was lost in 1 check.", "protect old more", 2,
        ),
        (
            (1.0, 0.5, 0.95), {"on_breach": "raise_lambda"},
            "not stopped; more than 10% was lost in 1 check, but not in the last, at step 2.",
            "keep these weights", 2,
        ),
        (
            (1.0, 0.95, 0.4), {"on_breach": "rollback"},
            "stopped at step 2, and back at step 1; more than 10% was lost in 1 check.",
            "protect old more", 1,
        ),
        (
            (1.0, 0.95, 0.4), {"on_breach": ("rollback", "raise_lambda")},
            "not stopped, and back at step 1; more than 10% was lost in 1 check.",
            "protect old more", 1,
        ),
        (
            (1.0, 0.4, 0.95), {"on_breach": ("rollback", "raise_lambda")},
            "not stopped; more than 10% was lost in 1 check, but not in the last, at step 1.",
            "keep these weights: no guarded task has lost more than allowed at step 1.", 1,
        ),
        (
            (1.0, 0.4, math.nan), {"on_breach": "warn"},
            "not stopped; more than 10% was lost in 1 check "
            "and a number was not finite in 1 check.",
            "lower the learning rate", 2,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["old", "old, rolled back"])  # a name decides nothing
@pytest.mark.filterwarnings("ignore::cl_optim.retention.RetentionWarning")
def test_the_report_has_one_verdict(
    tmp_path, values, options, outcome, recommendation, shown, name
):
    guard = started(scripted(*values, name=name), folder=tmp_path, **options)
    for _ in values[1:]:
        guard.step()
    found, advice = outcome_and_recommendation(guard)
    assert found == f"Training was {outcome}"
    assert advice.startswith(recommendation.replace("protect old", f"protect {name}"))
    assert guard.report().check.step == shown
    again = guard_of(scripted(1.0, name=name), **{**options, "folder": tmp_path / "other"})
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert str(again.report()) == str(guard.report())


def test_the_report_is_of_the_checkpoint_that_training_went_back_to(tmp_path):
    guard = started(scripted(1.0, 0.97, 0.2, 0.98), on_breach="rollback", folder=tmp_path)
    guard.step()
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(CheckpointWarning):
        guard.step()
    assert guard.report().check.step == guard.steps == 0
    assert "stopped at step 2, and back at step 0" in str(guard.report())
    guard.check()  # of the weights that went back: it stopped nothing
    assert guard.report().stopped_at == 2


def test_a_history_that_does_not_say_what_was_rolled_back_is_refused():
    guard = started(scripted(1.0))
    state = guard.state_dict()
    del state["history"][0]["rolled_back_to"]
    with pytest.raises(ValueError, match="is of an earlier version of cl_optim"):
        guard_of(scripted(1.0)).load_state_dict(state)


def test_the_report_takes_names_as_they_are():
    guard = started(scripted(1.0, 0.5, name="QA [en]"), scripted(1.0, 0.5, name="[/b]"))
    guard.step()
    text = str(guard.report())
    assert "QA [en]" in text
    assert "protect QA [en], [/b]" in text


def test_the_reports_columns_stand_below_each_other():
    """A wide character takes two cells, a combining one none."""
    extra = {"old": 0, "中文": 2, "e\u0301te\u0301": -2}  # cells beyond the characters
    guard = started(*(scripted(1.0, 0.5, name=name) for name in extra))
    guard.step()
    _, header, _, *rows = str(guard.report()).splitlines()[: len(extra) + 3]
    for name, row in zip(extra, rows, strict=True):
        assert row.index(" old ", 1 + len(name)) + extra[name] == header.index(" role ")


def accuracy(task):
    def measure(model):
        x, y = task.test
        return (model(x).argmax(1) == y).double().mean().item()

    return measure


def test_a_run_that_forgets_digits_is_stopped_within_one_evaluation_of_ten_percent(tmp_path):
    """Real data: a network that knows one permutation of the digits learns another."""
    scenario = permuted(digits(), 2, seed=0)
    first, second = scenario.tasks
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def loader(task, seed):
        data, generator = TensorDataset(*task.train), torch.Generator().manual_seed(seed)
        return DataLoader(data, 32, shuffle=True, generator=generator)

    def learn(optimizer, x, y):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    optimizer = EWCAdamW(model.named_parameters(), lr=1e-3)
    for x, y in DataStream(loader(first, 0), epochs=10):
        learn(optimizer, x, y)
    fisher = estimate_fisher(model, torch.split(first.train.x, 128), progress=False)
    known = accuracy(first)(model)
    assert known > 0.9
    curve = []

    def watched(model):
        curve.append(accuracy(first)(model))
        return curve[-1]

    start = {key: value.clone() for key, value in model.state_dict().items()}
    stopped_at = {}
    for ewc_lambda in (0.0, 100.0):
        model.load_state_dict(start)
        optimizer = EWCAdamW(model.named_parameters(), lr=1e-3, ewc_lambda=ewc_lambda)
        optimizer.consolidate(fisher)
        evaluations = [
            Evaluation("first", watched),
            Evaluation("second", accuracy(second), role="new"),
        ]
        guard = RetentionGuard(
            model, optimizer, evaluations, every=10, on_breach="rollback",
            folder=tmp_path / str(ewc_lambda),
        )  # fmt: skip
        guard.start()
        curve.clear()
        every_step = []
        for x, y in DataStream(loader(second, 1), epochs=20):
            learn(optimizer, x, y)
            every_step.append(accuracy(first)(model))
            if guard.step():
                break
        crossing = next((k for k, a in enumerate(every_step, 1) if a < 0.9 * known), None)
        stopped_at[ewc_lambda] = len(every_step) if guard.stopped else None
        if guard.stopped:
            assert crossing is not None
            assert len(every_step) - crossing < 2 * guard.every  # it may recover for a moment
            assert all(value >= 0.9 * known for value in curve[:-1])
            assert curve[-1] < 0.9 * known
            assert accuracy(first)(model) >= 0.9 * known  # rolled back
    assert stopped_at[0.0] is not None
    protected = stopped_at[100.0]
    assert protected is None or protected > stopped_at[0.0]


@pytest.mark.parametrize("quantize", ["int8", torch.int8])
def test_a_quantized_copy_is_measured_beside_the_model(quantize):
    from torchao.quantization import Int8Tensor

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = EWCAdamW(model.named_parameters(), lr=1e-2)
    x = torch.randn(50, 64)
    target = model(x).detach() + 1.0
    seen = []

    def measure(model):
        seen.append(type(model[0].weight.data))
        return float((model(x) - target).square().mean())

    guard = RetentionGuard(
        model, optimizer, [Evaluation("old", measure, higher_is_better=False)], every=1,
        quantize=quantize, useful=["old"],
    )  # fmt: skip
    before = flatten(model.state_dict())
    check = guard.start()
    assert flatten(model.state_dict()) == before
    assert seen == [torch.Tensor, Int8Tensor]
    exact, quantized = check.measured
    assert quantized.evaluation.name == "old (int8)"
    assert exact.value == pytest.approx(1.0)
    assert quantized.value != exact.value
    assert quantized.value == pytest.approx(exact.value, rel=0.05)
    with torch.no_grad():
        model[2].bias.sub_(5.0)
    assert not guard.step()  # its forgetting is wanted, quantized, too
    assert guard.history[-1].measured[1].loss > 0.1


def test_a_start_whose_checkpoint_fails_is_no_start(tmp_path):
    model, optimizer = network()
    optimizer.state_dict = lambda: {"odd": object}
    guard = RetentionGuard(model, optimizer, [scripted(1.0)], folder=tmp_path)
    with pytest.raises(CheckpointError, match="has another object"):
        guard.start()
    assert guard.history == []
    with pytest.raises(RuntimeError, match="no baselines"):
        guard.step()
