"""The demo: what it measures, what it trains on, and how its settings are chosen."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from paths import ROOT
from scipy import stats
from torch import nn

from bench.retention import __main__ as retention
from bench.retention import sweep
from bench.retention.experiments import EXPERIMENTS, GEM_DIGITS
from bench.retention.grids import GRIDS, Grid, sweep_seeds
from bench.retention.sweep import Score
from cl_optim import ImportanceLog, cli
from cl_optim.demo import experiments, metrics, scenarios
from cl_optim.demo.experiments import PERMUTED_DIGITS, SPLIT_DIGITS, Experiment
from cl_optim.demo.machine import sentence
from cl_optim.demo.methods import MEMORY_SAMPLES, Learner, Method, Protected, Remembering
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import Results
from cl_optim.demo.scenarios import Split, Task
from cl_optim.demo.train import Config, DivergedError, Run, per_step, train
from cl_optim.importance.report.data import report_data

RESULTS = ROOT / "bench" / "results"
TINY = Config(tasks=2, epochs=1, hidden=32, batch_size=64)
TINY_EXPERIMENT = replace(PERMUTED_DIGITS, config=TINY)
PERMUTED = {method.key: method for method in PERMUTED_DIGITS.methods}
GEM = {method.key: method for method in GEM_DIGITS.methods}
SPLIT = {method.key: method for method in SPLIT_DIGITS.methods}


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
        runs = [fake_run(PERMUTED["ewc-gradient"], seed, acc) for seed, acc in enumerate(ewc)]
        runs += [fake_run(PERMUTED["adamw"], seed, acc) for seed, acc in enumerate(adamw)]
        shuffled = Results(TINY_EXPERIMENT, tuple(runs[i] for i in (4, 0, 5, 2, 3, 1)))
        difference = shuffled.paired(PERMUTED["ewc-gradient"], PERMUTED["adamw"], metrics.acc)
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
        config = replace(TINY, points=3)
        run = train(PERMUTED["ewc-proximal"], scenarios.permuted(data, 2, 0), config, seed=0)
        assert run.backend == "cpu"
        assert run.matrix.shape == (2, 2)
        assert run.curve_steps.tolist() == [6, 12, 18, 24, 30, 36]
        assert np.isnan(run.curves[:, 1]).tolist() == [True] * 3 + [False] * 3
        assert 0 < run.optimizer_seconds < run.step_seconds

    def test_what_every_tenth_step_does_is_in_the_time_of_a_step(self):
        assert per_step([2.0, 1.0]) == 1.5
        assert per_step(3 * ([1.0] * 9 + [11.0]) + [100.0] * 9) == 2.0

    def test_joint_training_sees_all_tasks(self, data):
        spy = Spy("spy", "spy", 1e-3, joint=True)
        run = train(spy, scenarios.permuted(data, 2, 0), TINY, seed=0)
        assert run.matrix.shape == (1, 2)
        assert sum(len(x) for x in spy.seen[4:]) == 2 * 1140
        assert not np.isnan(run.curves).any()

    def test_consolidation(self, data):
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        ewc = PERMUTED["ewc-gradient"].learner(model)
        l2_sp = PERMUTED["l2-sp"].learner(model)
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
        config = Config(tasks=3, epochs=5, hidden=256, points=0)
        scenario = scenarios.permuted(data, 3, seed=0)
        adamw, ewc = (
            train(method, scenario, config, seed=0).matrix
            for method in (
                replace(PERMUTED["adamw"], lr=PERMUTED["ewc-gradient"].lr),
                PERMUTED["ewc-gradient"],
            )
        )
        assert metrics.acc(ewc) > metrics.acc(adamw) + 0.1
        assert metrics.learning_accuracy(ewc) > 0.85

    def test_divergence_is_an_error_that_names_the_method(self, data):
        method = replace(PERMUTED["ewc-decoupled"], ewc_lambda=1e9)
        with pytest.raises(DivergedError, match="EWC, decoupled diverged while learning task 2"):
            train(method, scenarios.permuted(data, 2, 0), TINY, seed=0)


class TestGEM:
    @pytest.mark.parametrize("key", ["gem-1", "gem-10", "gem-once", "a-gem-10", "sgd-gem-1"])
    def test_rows_are_gradients_on_kept_samples(self, data, key):
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        method = GEM[key]
        learner = method.learner(model)
        base = torch.optim.SGD if key.startswith("sgd") else torch.optim.AdamW
        assert isinstance(learner.optimizer.optimizer, base)
        tasks = [task.train for task in scenarios.permuted(data, 2, seed=0).tasks]
        expected = []
        for train_split in tasks:
            x, y = (tensor[:MEMORY_SAMPLES] for tensor in train_split)
            loss = nn.functional.cross_entropy(model(x), y)
            expected.append(torch.autograd.grad(loss, model[0].weight)[0])
            learner.end_task(train_split)
        rows = learner.optimizer.state_dict()["gem"]["rows"][0]
        if method.average:
            torch.testing.assert_close(rows[0], (expected[0] + expected[1]) / 2)
        else:
            torch.testing.assert_close(rows, torch.stack(expected))
        saved = learner.optimizer.state_dict()["gem"]
        assert [memory["name"] for memory in saved["memories"]] == ["task 1", "task 2"]
        assert {memory["refresh_every"] for memory in saved["memories"]} == {method.refresh_every}

    def test_kept_samples_are_of_every_class(self, data):
        assert torch.bincount(data.train.y[:MEMORY_SAMPLES], minlength=10).min() >= 5

    def test_it_remembers(self, data):
        config = Config(tasks=3, epochs=5, hidden=256, points=0)
        scenario = scenarios.permuted(data, 3, seed=0)
        for base, key in (("adamw", "gem-10"), ("sgd", "sgd-gem-10")):
            method = GEM[key]
            plain, gem = (
                train(each, scenario, config, seed=0).matrix
                for each in (replace(GEM[base], lr=method.lr), method)
            )
            assert metrics.acc(gem) > metrics.acc(plain) + 0.1
            assert metrics.learning_accuracy(gem) > 0.85

    def test_conflicts_are_counted(self, data):
        scenario = scenarios.permuted(data, 3, seed=0)
        counted = []

        @dataclass(frozen=True)
        class Counting(Remembering):
            def learner(self, model: nn.Module) -> Learner:
                learner = super().learner(model)
                optimizer = learner.optimizer
                optimizer.register_step_post_hook(
                    lambda *args: counted.append(
                        [cosine < 0 for cosine in optimizer.conflicts().tolist()]
                        if optimizer.memories
                        else []
                    )
                )
                return learner

        config = replace(TINY, tasks=3)
        method = Counting("gem", "GEM", 1e-3, refresh_every=10)
        conflicts = train(method, scenario, config, seed=0).conflicts
        steps = len(counted) // 3
        assert conflicts.shape == (3, 4)
        for task in range(3):
            of_task = np.array(counted[task * steps : (task + 1) * steps]).reshape(steps, task)
            if task:
                assert conflicts[task, 0] == pytest.approx(of_task.any(axis=1).mean())
            assert conflicts[task, 1 : 1 + task] == pytest.approx(of_task.mean(axis=0))
            assert np.isnan(conflicts[task, 1 + task :]).all()
        assert 0 < conflicts[2, 0] < 1

        average = train(replace(method, average=True), scenario, config, seed=0).conflicts
        assert (~np.isnan(average)).sum(axis=1).tolist() == [0, 1, 1]
        assert train(GEM["adamw"], scenario, config, seed=0).conflicts.shape == (0, 0)


class TestSplit:
    def test_every_class_has_one_task(self, data):
        scenario = scenarios.split(data, 5, seed=3)
        assert (scenario.classes, scenario.heads) == (2, 5)
        for part in ("train", "validation", "test"):
            whole = getattr(data, part)
            pieces = [getattr(task, part) for task in scenario.tasks]
            assert sum(len(piece.x) for piece in pieces) == len(whole.x)
            rows = {row.numpy().tobytes(): label.item() for row, label in zip(*whole, strict=True)}
            seen = []
            for piece in pieces:
                groups: dict[int, set[int]] = {0: set(), 1: set()}
                for row, label in zip(*piece, strict=True):
                    groups[label.item()].add(rows[row.numpy().tobytes()])
                assert [len(group) for group in groups.values()] == [1, 1]
                seen += [*groups[0], *groups[1]]
            assert sorted(seen) == list(range(10))

    def test_the_seed_deals_the_classes(self, data):
        first, again, other = (scenarios.split(data, 5, seed).tasks[0].test for seed in (1, 1, 2))
        assert torch.equal(first.x, again.x)
        assert not torch.equal(first.x[:20], other.x[:20])

    def test_curves_of_tasks_of_any_length_have_a_mean(self, data):
        config = replace(TINY, points=9)  # more than the steps of a task
        for key in ("adamw", "joint"):
            for seed in (0, 1):
                scenario = scenarios.split(data, 5, seed)
                run = train(SPLIT[key], scenario, config, seed)
                assert run.curves.shape == (45, 5)
                assert (np.diff(run.curve_steps) >= 0).all()

    def test_uneven_tasks(self, data):
        with pytest.raises(
            scenarios.DataError, match="10 classes cannot be split into 3 equal tasks"
        ):
            scenarios.split(data, 3, seed=0)

    def test_heads_of_other_tasks_do_not_move(self, data):
        scenario = scenarios.split(data, 5, seed=0)
        scenario = replace(scenario, tasks=scenario.tasks[:2])
        heads = []

        @dataclass(frozen=True)
        class HeadSpy(Method):
            def learner(self, model: nn.Module) -> Learner:
                heads.extend(model.heads)
                heads.append(model.heads[2].weight.detach().clone())
                return super().learner(model)

        train(HeadSpy("spy", "spy", 1e-2), scenario, TINY, seed=0)
        assert torch.equal(heads[2].weight, heads[-1])
        assert heads[0].weight.abs().max() != heads[1].weight.abs().max()

    @pytest.mark.parametrize("key", ["ewc-gradient", "ewc-exact"])
    def test_consolidation_is_of_the_head_in_use(self, data, key):
        scenario = scenarios.split(data, 5, seed=0)
        models = []

        @dataclass(frozen=True)
        class ModelSpy(Protected):
            def learner(self, model: nn.Module) -> Learner:
                learner = super().learner(model)
                models.append((model, learner.optimizer))
                return learner

        method = SPLIT[key]
        spy = ModelSpy(**{**vars(method)})
        train(spy, replace(scenario, tasks=scenario.tasks[:2]), TINY, seed=0)
        ((model, optimizer),) = models
        used = [optimizer.state[head.weight]["importance"].max().item() for head in model.heads]
        assert [value > 0 for value in used] == [True, True, False, False, False]
        assert optimizer.state[model.hidden.weight]["importance"].max() > 0

    def test_joint_training_uses_every_head(self, data):
        scenario = scenarios.split(data, 5, seed=0)
        run = train(SPLIT["joint"], scenario, replace(TINY, epochs=8), seed=0)
        assert run.matrix.shape == (1, 5)
        assert (run.matrix > 0.8).all()


class TestSweep:
    def test_highest_acc_among_those_that_learn(self):
        def scored(method: Method, lr: float, acc: float, learning: float) -> Score:
            return Score(replace(method, lr=lr), acc, learning)

        nan = math.nan
        scores = [
            scored(PERMUTED["adamw"], 1e-4, 0.65, 0.85),
            scored(PERMUTED["adamw"], 1e-3, 0.60, 0.92),
            scored(PERMUTED["adamw"], 1e-2, 0.50, 0.96),
            scored(PERMUTED["ewc-gradient"], 1e-3, 0.80, 0.92),
            scored(PERMUTED["ewc-gradient"], 1e-2, 0.90, 0.90),
            scored(PERMUTED["ewc-decoupled"], 1e-3, nan, nan),
            scored(PERMUTED["ewc-decoupled"], 1e-2, 0.55, 0.95),
            scored(PERMUTED["l2-sp"], 1e-2, 0.99, 0.50),
            scored(PERMUTED["joint"], 1e-2, 0.95, nan),
            scored(PERMUTED["joint"], 1e-1, nan, nan),
        ]
        chosen = sweep.choose(scores, 0.05)
        assert {key: method.lr for key, method in chosen.items()} == {
            "adamw": 1e-3,
            "adamw-slow": 1e-4,
            "ewc-gradient": 1e-3,
            "ewc-decoupled": 1e-2,
            "joint": 1e-2,
        }

    def test_score_is_of_the_validation_split_alone(self, data):
        def score(data: Task) -> float:
            return sweep.score(PERMUTED["adamw"], TINY_EXPERIMENT, data, seeds=1).acc

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
        sweep.score(PERMUTED["adamw"], TINY_EXPERIMENT, data, seeds=3)
        assert seeds == [1000, 1001, 1002]

    def test_divergence_is_a_score(self, data):
        method = replace(PERMUTED["ewc-decoupled"], ewc_lambda=1e9)
        assert math.isnan(sweep.score(method, TINY_EXPERIMENT, data, seeds=1).acc)

    def test_edges_are_noted(self):
        grids = GRIDS[PERMUTED_DIGITS.key]
        grid = next(grid for grid in grids if grid.method.key == "l2-sp")
        method = replace(PERMUTED["l2-sp"], lr=grid.lrs[0], ewc_lambda=grid.lambdas[-1])
        assert sweep.at_edge(method, grids) == ["lr", "λ"]
        method = replace(method, lr=grid.lrs[1], ewc_lambda=grid.lambdas[1])
        assert sweep.at_edge(method, grids) == []

    @pytest.mark.parametrize(
        "experiment",
        [e for data in EXPERIMENTS.values() for e in data if e.key in GRIDS],
        ids=lambda experiment: experiment.key,
    )
    def test_the_settings_in_the_code_are_those_that_the_sweep_chose(self, experiment: Experiment):
        record = json.loads((RESULTS / f"sweep-{experiment.key}.json").read_text())
        kinds = {method.key: type(method) for method in experiment.methods}
        scores = [
            Score(
                kinds[score["method"]["key"]](**score["method"]),
                *(math.nan if score[k] is None else score[k] for k in ("acc", "learning_accuracy")),
            )
            for score in record["scores"]
        ]
        assert {s.method for s in scores} == {
            m for g in GRIDS[experiment.key] for m in g.candidates()
        }
        assert len(record["seeds"]) == sweep_seeds(experiment)
        chosen = sweep.choose(scores, experiment.learning_loss)
        assert set(chosen.values()) == set(experiment.methods)


class TestCommands:
    def test_demo(self, tmp_path, capsys):
        arguments = ["demo", "--scenario", "permuted", "--seeds", "2", "--tasks", "2"]
        arguments += ["--epochs", "1", "--out", str(tmp_path / "new" / "folder")]
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        written = tmp_path / "new" / "folder"
        assert (written / "permuted-digits.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((written / "permuted-digits.json").read_text())
        markdown = (written / "permuted-digits.md").read_text()
        assert record["config"]["epochs"] == 1
        assert record["machine"]["torch"] == torch.__version__
        assert markdown.splitlines()[-1] == sentence(record["machine"])
        assert markdown.splitlines()[-1].startswith("On a machine with 1 thread: ")
        assert len(record["runs"]) == 2 * len(PERMUTED)
        for method in PERMUTED_DIGITS.methods:
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
        assert "Split-Digits" not in text
        assert "ACC(EWC, gradient) − ACC(AdamW) = " in text
        assert "paired over 2 seeds" in text

    def test_demo_leaves_a_log_and_its_report(self, tmp_path, capsys, monkeypatch):
        methods = tuple(m for m in PERMUTED_DIGITS.methods if m.key in ("adamw", "ewc-gradient"))
        tiny = replace(PERMUTED_DIGITS, methods=methods, config=TINY)
        monkeypatch.setattr(experiments, "EXPERIMENTS", [tiny])
        arguments = ["demo", "--scenario", "permuted", "--seeds", "1", "--tasks", "3"]
        arguments += ["--out", str(tmp_path)]
        for _ in range(2):  # the second in place of the first
            assert cli.main(arguments) == 0
            log = ImportanceLog(tmp_path / "permuted-digits-log", mode="r")
            assert log.tasks == ["task 1", "task 2", "task 3"]
        record = log["task 2"]
        assert record.metadata["labels"] == "exact"
        assert set(record.anchors()) == set(record.model) == set(record.importance())
        assert record.whole.mean > 0
        data = report_data(log)
        (run,) = data["training"]
        assert run["steps"] == sorted(run["steps"])
        assert min(run["drift"]) > 0
        page = (tmp_path / "permuted-digits-importance.html").read_text()
        assert json.dumps(data["mean"], separators=(",", ":")) in page
        assert "permuted-digits-importance.html" in capsys.readouterr().out

        (log.path / "manifest.jsonl").unlink()
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "is not an importance log" in capsys.readouterr().err
        assert (log.path / "records").is_dir()  # nothing of somebody else's is replaced

    def test_demo_of_gem(self, tmp_path, capsys, monkeypatch):
        methods = tuple(GEM[key] for key in ("adamw", "gem-10", "a-gem-10"))
        tiny = replace(GEM_DIGITS, methods=methods, config=TINY)
        monkeypatch.setitem(EXPERIMENTS, "digits", (PERMUTED_DIGITS, tiny))
        arguments = ["run", "gem", "--seeds", "1", "--tasks", "3"]
        assert retention.main([*arguments, "--out", str(tmp_path)]) == 0
        assert not list(tmp_path.glob("permuted*"))
        text = capsys.readouterr().out
        record = json.loads((tmp_path / "gem-permuted-digits.json").read_text())
        adamw, gem, _ = (run["conflicts"] for run in record["runs"])
        assert adamw == []
        table = text[text.index("Steps in conflict") :].splitlines()
        rows = [line.split() for line in table if line.startswith((" AdamW", " GEM", " A-GEM"))]
        assert [row[:3] for row in rows] == [["GEM", "every", "10"], ["A-GEM", "every", "10"]]
        shares = [(gem[1][0] + gem[2][0]) / 2, (gem[1][1] + gem[2][1]) / 2, gem[2][2]]
        assert rows[0][3:] == [f"{100 * share:.1f}" for share in shares]
        assert len(rows[1]) == 4  # a single row, so no column of a task
        assert "ACC(GEM every 10) − ACC(AdamW) = " in text

    def test_sweep(self, tmp_path, capsys, monkeypatch):
        grids = (
            Grid(PERMUTED["adamw"], (1e-3, 1e-2)),
            Grid(PERMUTED["ewc-gradient"], (1e-2,), (1.0, 1e7)),
        )
        monkeypatch.setitem(GRIDS, TINY_EXPERIMENT.key, grids)
        monkeypatch.setitem(EXPERIMENTS, "digits", (TINY_EXPERIMENT,))
        arguments = ["sweep", "permuted", "--seeds", "1", "--tasks", "2", "--epochs", "1"]
        assert retention.main([*arguments, "--out", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        record = json.loads((tmp_path / "sweep-permuted-digits.json").read_text())
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
        assert "λ = 1e+07" in (tmp_path / "sweep-permuted-digits.md").read_text()
