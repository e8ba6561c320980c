"""Watching an optimizer: penalty, drift and importance of each layer, and TensorBoard."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from bad_input import each_of, refused
from damage import flip
from log_cases import make_log
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from cl_optim import GEM, EWCAdamW, ImportanceLog
from cl_optim.importance import watch
from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import write_json
from cl_optim.importance.report.pictures import write_png
from cl_optim.importance.watch import read


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def importance_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.rand(param.shape) for name, param in model.named_parameters()}


def take_steps(model: nn.Module, opt: EWCAdamW, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        opt.step()


def test_entries_hold_penalty_drift_and_quantiles(tmp_path):
    model = network()
    opt = EWCAdamW(
        [
            {"params": list(model[0].named_parameters(prefix="0")), "ewc_lambda": 3.0},
            {"params": list(model[1].named_parameters(prefix="1")), "ewc_lambda": 0.5},
        ],
        lr=0.05,
    )
    importance = importance_for(model)
    log = ImportanceLog(tmp_path)
    with log.watch(opt, every=4):
        take_steps(model, opt, 4)  # nothing is protected yet
        opt.consolidate(importance)
        anchors = {name: param.detach().clone() for name, param in model.named_parameters()}
        take_steps(model, opt, 9)
        take_steps(model, opt, 3)
    expected = opt.penalty().item()
    params = {name: param.detach().clone() for name, param in model.named_parameters()}
    take_steps(model, opt, 8)  # no longer watched

    (entries,) = watch.read(tmp_path / "training")
    assert [entry["step"] for entry in entries] == [8, 12, 16]
    values = entries[-1]["layers"]
    assert list(values) == ["0", "1"]
    assert sum(v["penalty"] for v in values.values()) == pytest.approx(expected, rel=1e-5)
    for layer, factor in (("0", 3.0), ("1", 0.5)):
        names = [f"{layer}.weight", f"{layer}.bias"]
        deltas = [(params[name] - anchors[name]).double() for name in names]
        penalty = factor * sum(
            (importance[n].double() * d**2).sum() for n, d in zip(names, deltas, strict=True)
        )
        drift = torch.cat([delta.reshape(-1) for delta in deltas]).norm()
        assert values[layer]["penalty"] == pytest.approx(penalty.item(), rel=1e-5)
        assert values[layer]["drift"] == pytest.approx(drift.item(), rel=1e-5)
        every = torch.cat([importance[name].reshape(-1) for name in names])
        expected = torch.quantile(every, torch.tensor(watch.QUANTILES), interpolation="nearest")
        torch.testing.assert_close(torch.tensor(values[layer]["quantiles"]), expected)


def test_frozen_weights_are_not_in_the_penalty(tmp_path):
    one = SimpleNamespace(
        name="a.weight",
        param=torch.tensor([1.0, 2.0, 3.0]),
        importance=torch.tensor([1.0, 10.0, 100.0]),
        frozen=torch.tensor([False, True, False]),
        anchor=torch.zeros(3, dtype=torch.bfloat16),
        ewc_lambda=0.5,
    )
    optimizer = SimpleNamespace(
        protected=lambda: iter([one]),
        matrix_penalties=dict,
        param_groups=[{"param_names": ["a.weight"]}],
        register_step_post_hook=lambda hook: SimpleNamespace(remove=int),
    )
    watching = ImportanceLog(tmp_path).watch(optimizer)
    watching.write()
    ((entry,),) = watch.read(tmp_path / "training")
    assert entry["layers"]["a"]["penalty"] == 0.5 * (1 + 100 * 9)
    assert entry["layers"]["a"]["drift"] == pytest.approx(14**0.5)
    watching.close()


def test_half_an_entry_is_left_out(tmp_path):
    model = network()
    opt = EWCAdamW(model.named_parameters())
    opt.consolidate(None)
    log = ImportanceLog(tmp_path)
    with log.watch(opt, every=1):
        take_steps(model, opt, 3)
    (file,) = (tmp_path / "training").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert [entry["step"] for entry in watch.read(tmp_path / "training")[0]] == [1, 2]
    flip(file, 100)
    with pytest.warns(UserWarning, match=r"^line 1 of .*jsonl is damaged and left out"):
        assert [entry["step"] for entry in watch.read(tmp_path / "training")[0]] == [2]


def test_steps_between_entries_touch_no_tensor(tmp_path, monkeypatch):
    model = network()
    opt = EWCAdamW(model.named_parameters())
    opt.consolidate(None)
    asked: list[int] = []
    original = opt.protected
    monkeypatch.setattr(opt, "protected", lambda: asked.append(1) or original())
    with ImportanceLog(tmp_path).watch(opt, every=10):
        asked.clear()
        take_steps(model, opt, 9)
        assert asked == []
        take_steps(model, opt, 1)
        assert asked == [1]


def test_divergence_is_watched(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = EWCAdamW(model.named_parameters(), lr=0.1)
    optimizer.consolidate(None)
    log = ImportanceLog(tmp_path)
    log.record("a", {name: torch.ones_like(p) for name, p in model.named_parameters()})
    with log.watch(optimizer, every=1):
        for grad in (1.0, math.nan):
            for param in model[0].parameters():
                param.grad = torch.full_like(param, grad)
            optimizer.step()
    first, last = read(tmp_path / "training")[0]
    assert first["layers"]["0"]["drift"] is not None
    assert last["layers"]["0"]["penalty"] is None
    assert last["layers"]["0"]["drift"] is None
    assert last["layers"]["1"]["drift"] == 0.0
    data = report_data(log)
    (run,) = data["training"]
    assert run["drift"][1] is None
    assert run["layers"][0]["name"] == "0"
    write_png(data, tmp_path)
    write_json(data, tmp_path / "x.json")
    log.report(tmp_path / "x.html")
    writer = SimpleNamespace(add_scalar=lambda tag, value, step: tags.setdefault(tag, value))
    tags: dict[str, float] = {}
    log.to_tensorboard(writer)
    assert "training/penalty" in tags


def test_a_full_disk_ends_the_watching_not_the_training(tmp_path, monkeypatch):
    weight = nn.Parameter(torch.ones(2))
    optimizer = EWCAdamW([("a.weight", weight)])
    optimizer.consolidate(None)
    with ImportanceLog(tmp_path).watch(optimizer, every=1) as watching:
        full = open("/dev/full", "ab")  # noqa: SIM115
        watching._file.close()
        watching._file = full
        weight.grad = torch.ones(2)
        with pytest.warns(UserWarning, match="watching ends at step 1: .* No space left on device"):
            optimizer.step()
        optimizer.step()
    assert (weight < 1).all()


def test_the_optimizer_inside_another_is_watched(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    optimizer = GEM(EWCAdamW([("a.weight", weight)]))
    optimizer.consolidate(None)
    with ImportanceLog(tmp_path).watch(optimizer, every=1):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert len(read(tmp_path / "training")[0]) == 1


BAD = [
    *((f"every={every}", (nn.Module.named_parameters, every),
       ValueError, r"^every must be a whole number of at least 1") for every in (0, -1, 2.5, True)),
    ("an optimizer without names", (nn.Module.parameters, 100),
     ValueError, r"^watch needs an optimizer that was made from model"),
]  # fmt: skip


@each_of(BAD)
def test_a_bad_watch_is_refused_and_hooks_nothing(tmp_path, given, error, message):
    parameters, every = given
    model = network()
    optimizer = EWCAdamW(parameters(model))
    optimizer.consolidate(None)
    with refused(error, message):
        ImportanceLog(tmp_path).watch(optimizer, every=every)
    assert not (tmp_path / "training").exists()
    take_steps(model, optimizer, 1)


def test_tensorboard(tmp_path):
    model = network()
    opt = EWCAdamW(model.named_parameters(), lr=0.1)
    opt.consolidate(None)
    log = make_log(tmp_path / "log")
    for _ in range(2):
        with log.watch(opt, every=5):
            take_steps(model, opt, 10)
    with SummaryWriter(tmp_path / "board") as writer:
        log.to_tensorboard(writer)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    means = events.Scalars("importance/mean/a")
    assert [event.step for event in means] == [1, 2]
    expected = [log[task].layers["a"].mean for task in log.tasks]
    assert [event.value for event in means] == pytest.approx(expected)
    penalties = events.Scalars("training/penalty")
    assert [event.step for event in penalties] == [5, 10, 15, 20]  # the second watch goes on
    assert penalties[-1].value == pytest.approx(opt.penalty().item(), rel=1e-5)
    assert len(events.Scalars("training/drift/0")) == 4
