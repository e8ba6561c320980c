"""The demo: what it measures, what it trains on, and how its settings are chosen."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cl_optim import cli
from cl_optim.demo import methods, metrics, scenarios, sweep
from cl_optim.demo.methods import METHODS, Learner, Method, Protected
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import Split, Task
from cl_optim.demo.sweep import Grid, Score
from cl_optim.demo.train import Config, DivergedError, Run, train

SWEEP_RECORD = Path(__file__).parent.parent / "docs" / "sweep.json"
TINY = Config(tasks=2, epochs=1, hidden=32, batch_size=64)


@pytest.fixture(scope="module")
def data() -> Task:
    return scenarios.digits()


class TestMetrics:
    R = np.array(
        [
            [0.90, 0.10, 0.20],
            [0.95, 0.80, 0.30],
            [0.70, 0.50, 0.60],
        ]
    )

    def test_by_hand(self):
        assert metrics.acc(self.R) == pytest.approx((0.7 + 0.5 + 0.6) / 3)
        assert metrics.bwt(self.R) == pytest.approx((-0.2 - 0.3) / 2)
        assert metrics.forgetting(self.R) == pytest.approx((0.25 + 0.3) / 2)
        assert metrics.learning_accuracy(self.R) == pytest.approx((0.9 + 0.8 + 0.6) / 3)

    def test_a_single_task_cannot_be_forgotten(self):
        r = np.array([[0.8]])
        assert metrics.bwt(r) == metrics.forgetting(r) == 0.0
        assert metrics.acc(r) == metrics.learning_accuracy(r) == 0.8

    def test_later_gain_is_positive_transfer_and_negative_forgetting(self):
        r = np.array([[0.5, 0.1], [0.7, 0.9]])
        assert metrics.bwt(r) == pytest.approx(0.2)
        assert metrics.forgetting(r) == pytest.approx(-0.2)

    def test_interval_is_scipys(self):
        values = [0.3, 0.5, 0.45, 0.7]
        interval = Interval.of(values)
        low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
        assert interval.mean - interval.half_width == pytest.approx(low)
        assert interval.mean + interval.half_width == pytest.approx(high)

    def test_interval_of_one_value_has_no_width(self):
        interval = Interval.of([0.4])
        assert interval.mean == 0.4
        assert math.isnan(interval.half_width)

    def test_paired_difference_is_scipys(self):
        ewc, adamw = [0.8, 0.9, 0.7], [0.6, 0.75, 0.4]
        runs = [fake_run(methods.EWC_GRADIENT, seed, acc) for seed, acc in enumerate(ewc)]
        runs += [fake_run(methods.ADAMW, seed, acc) for seed, acc in enumerate(adamw)]
        shuffled = Results("test", TINY, tuple(runs[i] for i in (4, 0, 5, 2, 3, 1)))
        difference = shuffled.paired(methods.EWC_GRADIENT, methods.ADAMW, metrics.acc)
        low, high = stats.ttest_rel(ewc, adamw).confidence_interval(0.95)
        assert difference.mean - difference.half_width == pytest.approx(low)
        assert difference.mean + difference.half_width == pytest.approx(high)


def fake_run(method: Method, seed: int, acc: float) -> Run:
    return Run(method, seed, np.array([[acc]]), np.array([]), np.array([]), 1.0, 1.0, 1.0, "cpu")


class TestData:
    def test_the_three_sets_are_a_partition(self, data):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        whole = Counter((label, row.tobytes()) for label, row in zip(y, x, strict=True))
        parts = Counter(
            (label.item(), (16 * row.double()).numpy().tobytes())
            for split in (data.train, data.validation, data.test)
            for row, label in zip(*split, strict=True)
        )
        assert len(whole) == len(x)  # no image twice, so none can be in two sets
        assert parts == whole

    def test_every_set_has_every_class_in_proportion(self, data):
        for split in (data.train, data.validation, data.test):
            shares = torch.bincount(split.y, minlength=10) / len(split.y)
            assert shares.sub(0.1).abs().max() < 0.01

    def test_permutations(self):
        pixels = torch.arange(64.0).repeat(2, 1)
        split = Split(pixels, torch.tensor([0, 9]))
        tasks = scenarios.permuted(Task(split, split, split), 3, seed=5).tasks
        assert torch.equal(tasks[0].train.x, pixels)
        for task in tasks[1:]:
            assert torch.equal(task.train.x.sort(dim=1).values, pixels)
            assert torch.equal(task.train.x[0], task.train.x[1])
            assert torch.equal(task.train.x, task.validation.x)
            assert torch.equal(task.train.x, task.test.x)
        assert not torch.equal(tasks[1].train.x, tasks[2].train.x)

    def test_permutations_are_fixed_by_the_seed(self, data):
        first, again, other = (scenarios.permuted(data, 2, seed).tasks[1] for seed in (5, 5, 6))
        assert torch.equal(first.test.x, again.test.x)
        assert not torch.equal(first.test.x, other.test.x)


@dataclass(frozen=True)
class Spy(Method):
    """AdamW that keeps what the network saw."""

    seen: list[torch.Tensor] = field(default_factory=list, compare=False)

    def learner(self, model: nn.Module) -> Learner:
        self.seen.extend(param.detach().clone() for param in model.parameters())
        model.register_forward_pre_hook(
            lambda module, args: self.seen.append(args[0]) if torch.is_grad_enabled() else None
        )
        return super().learner(model)


class TestTraining:
    def test_methods_with_one_seed_are_paired(self, data):
        scenario = scenarios.permuted(data, 2, seed=0)
        spies = [Spy("spy", "spy", lr) for lr in (1e-3, 1e-2, 1e-3)]
        for spy, seed in zip(spies, (0, 0, 1), strict=True):
            train(spy, scenario, TINY, seed)
        first, paired, other = (spy.seen for spy in spies)
        assert len(first) == 4 + 2 * math.ceil(1140 / 64)
        assert all(torch.equal(a, b) for a, b in zip(first, paired, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    def test_run_record(self, data):
        config = replace(TINY, evaluate_every=10)
        run = train(methods.EWC_PROXIMAL, scenarios.permuted(data, 2, 0), config, seed=0)
        assert run.backend == "cpu"
        assert run.matrix.shape == (2, 2)
        assert run.curve_steps.tolist() == [10, 20, 30]
        assert np.isnan(run.curves[:, 1]).tolist() == [True, False, False]  # task 2 begins at 18
        assert 0 < run.optimizer_seconds < run.step_seconds

    def test_joint_training_sees_all_tasks(self, data):
        spy = Spy("spy", "spy", 1e-3, joint=True)
        run = train(spy, scenarios.permuted(data, 2, 0), TINY, seed=0)
        assert run.matrix.shape == (1, 2)
        assert sum(len(x) for x in spy.seen[4:]) == 2 * 1140
        assert not np.isnan(run.curves).any()

    def test_consolidation(self, data):
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        ewc = methods.EWC_GRADIENT.learner(model)
        l2_sp = methods.L2_SP.learner(model)
        weight = model[0].weight
        ewc.end_task(data.train)
        once = ewc.optimizer.state[weight]["importance"].clone()
        ewc.end_task(data.train)
        torch.testing.assert_close(ewc.optimizer.state[weight]["importance"], 2 * once)
        for _ in range(2):
            l2_sp.end_task(data.train)
        assert (l2_sp.optimizer.state[weight]["importance"] == 1).all()
        assert once.max() > 0
        for learner in (ewc, l2_sp):
            assert torch.equal(learner.optimizer.state[weight]["anchor"], weight)

    def test_ewc_remembers(self, data):
        config = Config(tasks=3, epochs=5, hidden=256, evaluate_every=None)
        scenario = scenarios.permuted(data, 3, seed=0)
        adamw, ewc = (
            train(method, scenario, config, seed=0).matrix
            for method in (replace(methods.ADAMW, lr=methods.EWC_GRADIENT.lr), methods.EWC_GRADIENT)
        )
        assert metrics.acc(ewc) > metrics.acc(adamw) + 0.1
        assert metrics.learning_accuracy(ewc) > 0.85

    def test_divergence_is_an_error_that_names_the_method(self, data):
        method = replace(methods.EWC_DECOUPLED, ewc_lambda=1e9)
        with pytest.raises(DivergedError, match="EWC, decoupled diverged while learning task 2"):
            train(method, scenarios.permuted(data, 2, 0), TINY, seed=0)


class TestSweep:
    def test_highest_acc_among_those_that_learn(self):
        def scored(method: Method, lr: float, acc: float, learning: float) -> Score:
            return Score(replace(method, lr=lr), acc, learning)

        nan = math.nan
        scores = [
            scored(methods.ADAMW, 1e-4, 0.65, 0.85),
            scored(methods.ADAMW, 1e-3, 0.60, 0.92),
            scored(methods.ADAMW, 1e-2, 0.50, 0.96),
            scored(methods.EWC_GRADIENT, 1e-3, 0.80, 0.92),
            scored(methods.EWC_GRADIENT, 1e-2, 0.90, 0.90),
            scored(methods.EWC_DECOUPLED, 1e-3, nan, nan),
            scored(methods.EWC_DECOUPLED, 1e-2, 0.55, 0.95),
            scored(methods.L2_SP, 1e-2, 0.99, 0.50),
            scored(methods.JOINT, 1e-2, 0.95, nan),
            scored(methods.JOINT, 1e-1, nan, nan),
        ]
        chosen = sweep.choose(scores)
        assert {key: method.lr for key, method in chosen.items()} == {
            "adamw": 1e-3,
            "adamw-slow": 1e-4,
            "ewc-gradient": 1e-3,
            "ewc-decoupled": 1e-2,
            "joint": 1e-2,
        }

    def test_score_is_of_the_validation_split_alone(self, data):
        def score(data: Task) -> float:
            return sweep.score(methods.ADAMW, data, TINY, seeds=1).acc

        test = Split(data.test.x, data.test.y.roll(1))
        validation = Split(data.validation.x, data.validation.y.roll(1))
        reference = score(data)
        assert score(replace(data, test=test)) == reference
        assert score(replace(data, validation=validation)) != reference

    def test_seeds_are_its_own(self, data, monkeypatch):
        seeds = []
        monkeypatch.setattr(
            sweep,
            "train",
            lambda method, scenario, config, seed, held_out: (
                seeds.append(seed) or fake_run(method, seed, 0.5)
            ),
        )
        sweep.score(methods.ADAMW, data, TINY, seeds=3)
        assert seeds == [1000, 1001, 1002]

    def test_divergence_is_a_score(self, data):
        method = replace(methods.EWC_DECOUPLED, ewc_lambda=1e9)
        assert math.isnan(sweep.score(method, data, TINY, seeds=1).acc)

    def test_edges_are_noted(self):
        grid = next(grid for grid in sweep.GRIDS if grid.method.key == "l2-sp")
        method = replace(methods.L2_SP, lr=grid.lrs[0], ewc_lambda=grid.lambdas[-1])
        assert sweep.at_edge(method) == ["lr", "λ"]
        assert sweep.at_edge(replace(method, lr=grid.lrs[1], ewc_lambda=grid.lambdas[1])) == []

    def test_the_settings_in_the_code_are_those_that_the_sweep_chose(self):
        record = json.loads(SWEEP_RECORD.read_text())
        kinds = {method.key: type(method) for method in METHODS}
        scores = [
            Score(
                kinds[score["method"]["key"]](**score["method"]),
                *(math.nan if score[k] is None else score[k] for k in ("acc", "learning_accuracy")),
            )
            for score in record["scores"]
        ]
        assert {s.method for s in scores} == {m for g in sweep.GRIDS for m in g.candidates()}
        assert set(sweep.choose(scores).values()) == set(METHODS)


class TestCommands:
    def test_demo(self, tmp_path, capsys):
        arguments = ["demo", "--seeds", "2", "--tasks", "2", "--epochs", "1"]
        assert cli.main([*arguments, "--out", str(tmp_path / "new" / "folder")]) == 0
        text = capsys.readouterr().out
        written = tmp_path / "new" / "folder"
        assert (written / "demo.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((written / "demo.json").read_text())
        markdown = (written / "demo.md").read_text()
        assert record["config"]["epochs"] == 1
        assert record["versions"]["torch"] == torch.__version__
        assert len(record["runs"]) == 2 * len(METHODS)
        for method in METHODS:
            runs = [run for run in record["runs"] if run["method"]["key"] == method.key]
            assert [run["seed"] for run in runs] == [0, 1]
            accs = [np.mean(run["matrix"][-1]) for run in runs]
            assert [run["metrics"]["acc"] for run in runs] == pytest.approx(accs)
            row = next(line for line in text.splitlines() if line.startswith(f" {method.label}  "))
            assert f" {100 * np.mean(accs):.1f} ± " in row
            assert f"| {method.label} " in markdown
            assert {run["backend"] for run in runs} == {
                "cpu" if isinstance(method, Protected) else "torch"
            }
        assert "ran on the compiled extension cl_optim._C" in text
        assert "ACC(EWC, gradient) − ACC(AdamW) = " in text
        assert "paired over 2 seeds" in text

    def test_sweep(self, tmp_path, capsys, monkeypatch):
        grids = [Grid(methods.ADAMW, (1e-3, 1e-2)), Grid(methods.EWC_GRADIENT, (1e-2,), (1.0, 1e7))]
        monkeypatch.setattr(sweep, "GRIDS", grids)
        arguments = ["demo", "--sweep", "--seeds", "1", "--tasks", "2", "--epochs", "1"]
        assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        record = json.loads((tmp_path / "sweep.json").read_text())
        assert record["seeds"] == [1000]
        assert [(s["method"]["lr"], s["method"].get("ewc_lambda")) for s in record["scores"]] == [
            (1e-3, None),
            (1e-2, None),
            (1e-2, 1.0),
            (1e-2, 1e7),
        ]
        assert record["chosen"]["ewc-gradient"]["ewc_lambda"] == 1.0
        assert "λ at the edge of the grid" in text
        assert "no candidate learns well enough" in text
        assert "λ = 1e+07" in (tmp_path / "sweep.md").read_text()
