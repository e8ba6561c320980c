"""The demo's replay and progressive networks, their table, and the published figures beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench.retention import __main__ as retention
from bench.retention import published
from bench.retention.experiments import EXPERIMENTS, RETENTION_DIGITS
from bench.retention.retention_table import fwt
from cl_optim.demo import metrics, scenarios
from cl_optim.demo.experiments import PERMUTED_DIGITS, SPLIT_DIGITS
from cl_optim.demo.train import Config, network, train

METHODS = {method.key: method for method in RETENTION_DIGITS.methods}
TINY = Config(tasks=5, epochs=2, hidden=32, batch_size=64, points=1)


@pytest.fixture(scope="module")
def scenario():
    return scenarios.split(scenarios.digits(), 5, seed=0)


def test_forward_transfer_by_hand():
    r = np.array([[0.9, 0.6, 0.2], [0.8, 0.8, 0.7], [0.7, 0.7, 0.9]])
    assert fwt(r, np.array([0.1, 0.5, 0.4])) == pytest.approx((0.1 + 0.3) / 2)
    assert fwt(r[:1, :1], np.array([0.5])) == 0


def test_what_a_run_records(scenario):
    run = train(METHODS["adamw"], scenario, TINY, seed=0)
    model = network(scenario, TINY.hidden, 0)
    untrained = []
    for model.task, task in enumerate(scenario.tasks):
        untrained.append((model(task.test.x).argmax(1) == task.test.y).double().mean().item())
    assert run.initial.tolist() == untrained
    assert run.parameters == 64 * 32 + 32 + 5 * (32 * 2 + 2)
    assert run.seconds > 5 * run.step_seconds


def test_replayed_samples_are_answered_by_their_own_head(scenario):
    method = replace(METHODS["replay"], samples=4)
    learner = method.learner(network(scenario, 32, 0))
    for learner.model.task in (0, 1):
        learner.end_task(scenario.tasks[learner.model.task].train)
    learner.model.task = 2
    assert len(learner.buffer) == 8
    x, y = (tensor[:8] for tensor in scenario.tasks[2].train)
    found = learner.loss(x, y)
    assert learner.model.task == 2
    losses = F.cross_entropy(learner.model(x), y, reduction="sum")
    for learner.model.task in (0, 1):  # 8 of 8: each kept sample once
        x, y = (tensor[:4] for tensor in scenario.tasks[learner.model.task].train)
        losses = losses + F.cross_entropy(learner.model(x), y, reduction="sum")
    torch.testing.assert_close(found, losses / 16)


def test_gem_remembers_with_the_head_of_the_task(scenario):
    learner = METHODS["gem-10"].learner(network(scenario, 32, 0))
    learner.model.task = 1
    learner.end_task(scenario.tasks[1].train)
    learner.model.task = 3
    learner.optimizer.zero_grad()
    learner.loss(*scenario.tasks[3].train).backward()
    learner.optimizer.step()
    assert learner.model.task == 3
    rows = learner.optimizer.state_dict()["gem"]["rows"]
    names = [name for name, _ in learner.model.named_parameters()]
    used = {name for name, row in zip(names, rows.values(), strict=True) if row.abs().max() > 0}
    assert used == {"hidden.weight", "hidden.bias", "heads.1.weight", "heads.1.bias"}


def test_progressive_does_not_forget(scenario):
    run = train(METHODS["progressive"], scenario, TINY, seed=0)
    for task in range(5):
        assert (run.matrix[task:, task] == run.matrix[task, task]).all()
    assert metrics.bwt(run.matrix) == 0
    column = 64 * 32 + 32 + 32 * 2 + 2
    laterals = sum(k * 32 * 32 + 32 + 32 * 2 + k for k in range(1, 5))
    assert run.parameters == 5 * column + laterals


def test_replay_remembers():
    config = Config(tasks=3, epochs=5, hidden=256, points=0)
    permuted = scenarios.permuted(scenarios.digits(), 3, seed=0)
    plain, replay = (
        train(replace(method, lr=1e-3), permuted, config, seed=0).matrix
        for method in (METHODS["adamw"], replace(METHODS["replay"], samples=128))
    )
    assert metrics.acc(replay) > metrics.acc(plain) + 0.1
    assert metrics.learning_accuracy(replay) > 0.85


def test_command_and_table(tmp_path, capsys, monkeypatch):
    methods = tuple(METHODS[k] for k in ("adamw", "gem-10", "replay", "ewc-replay", "progressive"))
    tiny = replace(RETENTION_DIGITS, methods=methods, config=TINY)
    monkeypatch.setitem(EXPERIMENTS, "digits", (tiny,))
    arguments = ["run", "retention", "--seeds", "2"]
    assert retention.main([*arguments, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "retention-split-digits.json").read_text())
    for method in methods:
        runs = [run for run in record["runs"] if run["method"]["key"] == method.key]
        row = next(line for line in text.splitlines() if line.startswith(f" {method.label}  "))
        transfer = np.mean([fwt(np.array(r["matrix"]), np.array(r["initial"])) for r in runs])
        assert f" {100 * transfer:+.1f} ± " in row
        assert f" {runs[0]['parameters']:,} " in row
    assert "GEM keeps 16 samples" in " ".join(text.split())


def test_bench_prints_published_beside_measured(tmp_path, capsys, monkeypatch):
    methods = tuple(m for m in SPLIT_DIGITS.methods if m.key in ("adamw", "ewc-gradient"))
    tiny = replace(SPLIT_DIGITS, methods=methods, config=TINY)
    permuted = replace(PERMUTED_DIGITS, methods=methods, config=replace(TINY, epochs=1))
    monkeypatch.setitem(EXPERIMENTS, "digits", (tiny, permuted))
    assert retention.main(["published", "--seeds", "2", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "split-digits.json").read_text())
    for method, figure in zip(methods, ("85.41 ± .88", "99.12 ± .16"), strict=True):
        accs = [r["metrics"]["acc"] for r in record["runs"] if r["method"]["key"] == method.key]
        measured = f" {100 * np.mean(accs):.2f} ± "
        written = (tmp_path / "published-digits.md").read_text()
        for shown in (text, written):
            assert any(measured in line and figure in line for line in shown.splitlines())
    assert "arXiv:2502.11756v1, results, Split MNIST" in written
    assert written.splitlines()[-1].startswith("On a machine with 1 thread: ")
    assert {p.scenario for p in published.PUBLISHED} == {"split", "permuted"}
