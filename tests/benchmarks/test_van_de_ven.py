"""The benchmark beside van de Ven's EWC: its formulas, the scenarios, and what it writes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from idx_files import write_idx
from rich import box
from torch import nn

from bench.retention import __main__ as retention
from bench.retention import fashion_mnist
from bench.retention.training import flushed_denormals
from bench.retention.van_de_ven import report, runs
from bench.retention.van_de_ven.methods import (
    DIAGONAL,
    INTERPOLATION,
    JOINT,
    KRONECKER,
    METHODS,
    NONE,
    SMALL_RATE,
    THEIRS,
    Interpolation,
    TheirEWC,
    fisher_by_definition,
)
from bench.retention.van_de_ven.runs import Results, Run, batches
from bench.retention.van_de_ven.scenarios import (
    NAMES,
    SPLITS,
    Network,
    Setting,
    scenario_of,
    setting_of,
)
from cl_optim import EWCAdamW, estimate_fisher
from cl_optim.demo.machine import sentence
from cl_optim.demo.report import write_markdown
from cl_optim.demo.scenarios import DataError, digits

SMALL = Setting(hidden=8, batch=16, iterations=6, fisher_samples=10)


@pytest.fixture(scope="module")
def data():
    return digits()


def network(scenario, hidden=4, seed=0) -> Network:
    torch.manual_seed(seed)
    return Network(scenario, hidden).double()


def test_denormals_are_flushed_for_a_while():
    """Adam's moments of a black pixel cost no more than others."""
    small = torch.full((64,), 1e-38)
    with flushed_denormals():
        assert not (small / 8).any()
    assert (small / 8).all()


def test_a_processor_that_cannot_flush_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: False)
    with pytest.raises(RuntimeError, match=r"for 0, .*: measure on one that can"):
        flushed_denormals().__enter__()


# --- van de Ven's EWC -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task", "class"])
def test_their_fisher_is_the_expectation_over_classes(name, data):
    """By the covariance of the scores: differences of log-probabilities, no squares of autograd."""
    scenario = scenario_of(name, data, 5, 0)
    model = network(scenario)
    model.context, model.outputs = 1, scenario.classes if name == "task" else 4
    x = scenario.tasks[1].train.x[:3].double()
    found = fisher_by_definition(model, x)
    step = 1e-5
    for param, fisher in zip(model.parameters(), found, strict=True):
        for i in range(0, param.numel(), max(1, param.numel() // 7)):
            flat = param.data.view(-1)
            kept = flat[i].item()
            log_p = []
            for moved in (kept + step, kept - step):
                flat[i] = moved
                log_p.append(model(x).log_softmax(1))
            flat[i] = kept
            slopes = (log_p[0] - log_p[1]) / (2 * step)
            expected = (model(x).softmax(1) * slopes**2).sum(1).mean()
            assert fisher.view(-1)[i].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12)
    own = [fisher.abs().sum() > 0 for fisher in found[4:]]
    assert own == ([False, False, True, True, *[False] * 6] if name == "task" else [True, True])


@pytest.mark.parametrize("name", SPLITS)
def test_our_fisher_is_theirs(name, data):
    scenario = scenario_of(name, data, 5, 0)
    model = network(scenario)
    model.context = 2
    x = scenario.tasks[2].train.x[:20].double()
    ours = estimate_fisher(model, torch.split(x, 7), labels="exact", progress=False)
    theirs = fisher_by_definition(model, x)
    for (key, _), fisher in zip(model.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(ours[key].double(), fisher, rtol=1e-5, atol=1e-9)


def test_their_penalty_is_one_quadratic_for_each_context(data):
    scenario = scenario_of("domain", data, 5, 0)
    model = network(scenario)
    learner = TheirEWC(model, SMALL, 3.0)
    x, y = scenario.tasks[2].train
    x = x.double()
    assert learner.loss(x, y) == nn.functional.cross_entropy(model(x), y)
    kept = []
    for context in range(2):
        inputs = scenario.tasks[context].train.x.double()
        learner.end(context, inputs)
        fisher = fisher_by_definition(model, inputs[: SMALL.fisher_samples])
        kept.append((fisher, [param.detach().clone() for param in model.parameters()]))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
    by_hand = sum(
        0.5 * f.item() * (p.item() - a.item()) ** 2
        for fisher, anchors in kept
        for fs, ps, others in zip(fisher, model.parameters(), anchors, strict=True)
        for f, p, a in zip(fs.flatten(), ps.flatten(), others.flatten(), strict=True)
    )
    assert by_hand > 0
    assert learner.penalty().item() == pytest.approx(by_hand, rel=1e-12)
    plain = nn.functional.cross_entropy(model(x), y)
    assert learner.loss(x, y).item() == pytest.approx(plain.item() + 3.0 * by_hand, rel=1e-12)


def test_ours_with_exact_anchors_takes_the_steps_of_theirs(data):
    """EWCAdamW's λ multiplies F (θ − θ*)² without ½: half of theirs is the same loss."""
    scenario = scenario_of("domain", data, 5, 0)
    model = network(scenario)
    other = copy.deepcopy(model)
    theirs = TheirEWC(model, replace(SMALL, fisher_samples=40), 50.0)
    ours = EWCAdamW(
        other.named_parameters(), lr=SMALL.lr, weight_decay=0.0, ewc_lambda=25.0, penalty="gradient"
    )
    for context, task in enumerate(scenario.tasks[:3]):
        x, y = task.train.x.double(), task.train.y
        for _ in range(10):
            runs.take_step(theirs.optimizer, theirs.loss(x, y))
            runs.take_step(ours, nn.functional.cross_entropy(other(x), y))
        theirs.end(context, x)
        fisher = estimate_fisher(other, torch.split(x[:40], 16), labels="exact", progress=False)
        ours.consolidate(fisher, anchors="exact")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- the protocol ---------------------------------------------------------------------------------


def test_settings_are_the_published_ones():
    for name in SPLITS:
        assert setting_of(name) == Setting(5, 400, 1e-3, 128, 2000, 1000)
    assert setting_of("permuted") == Setting(10, 1000, 1e-4, 128, 5000, 1000)
    assert setting_of("permuted", 7, 8, 3) == Setting(3, 1000, 1e-4, 128, 7, 8)


@pytest.mark.parametrize("name", SPLITS)
def test_scenarios_have_the_same_samples_and_labels_of_their_own(name, data):
    scenario, of_tasks = scenario_of(name, data, 5, 3), scenario_of("task", data, 5, 3)
    expected = {"task": (2, 5), "domain": (2, 1), "class": (10, 1)}
    assert (scenario.classes, scenario.heads) == expected[name]
    for number, (one, other) in enumerate(zip(scenario.tasks, of_tasks.tasks, strict=True)):
        first = 2 * number if name == "class" else 0
        for part, same in zip(
            (one.train, one.validation, one.test),
            (other.train, other.validation, other.test),
            strict=True,
        ):
            assert torch.equal(part.x, same.x)
            assert torch.equal(part.y, same.y + first)
            assert part.y.unique().tolist() == [first, first + 1]
    assert sum(len(task.train.y) for task in scenario.tasks) == len(data.train.y)
    another = scenario_of(name, data, 5, 4)
    assert not torch.equal(another.tasks[0].train.x[:50], scenario.tasks[0].train.x[:50])


def test_a_network_tells_what_its_scenario_asks_for(data):
    scenario = scenario_of("task", data, 5, 0)
    model, x = network(scenario), data.train.x[:6].double()
    each = []
    for context in range(5):
        model.context = context
        each.append(model(x))
    model.context = torch.tensor([4, 0, 0, 3, 2, 1])
    mixed = torch.stack([each[c][i] for i, c in enumerate(model.context.tolist())])
    torch.testing.assert_close(model(x), mixed)
    of_all = network(scenario_of("class", data, 5, 0))
    of_all.outputs = 4
    assert of_all(x).shape == (6, 4)


def test_batches_are_whole_and_of_one_order_after_another():
    stream = torch.Generator().manual_seed(0)
    rows = list(islice(batches(10, 4, stream), 4))
    assert [len(some) for some in rows] == [4] * 4
    for first, second in (rows[:2], rows[2:]):
        assert len({*first.tolist(), *second.tolist()}) == 8
    assert sorted(next(batches(3, 4, stream)).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["task", "domain"])
def test_interpolation_goes_back_but_for_a_head_of_its_own(name, data):
    model = network(scenario_of(name, data, 5, 0))
    learner = Interpolation(model, SMALL, 0.25)
    before = [param.detach().clone() for param in model.parameters()]
    learner.end(0, data.train.x)  # the first context: nothing to go back to
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    learner.end(1, data.train.x)
    for (key, param), old in zip(model.named_parameters(), before, strict=True):
        moved = 1.0 if name == "task" and key.startswith("heads.1.") else 0.75
        torch.testing.assert_close(param.detach(), old + moved)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_methods_begin_alike_and_differ_after_the_first_context(name, data):
    scenario = scenario_of(name, data, 5, 0)
    made = {
        method.key: runs.train(name, scenario, method, method.values(name)[-1], SMALL, 0, "test")
        for method in METHODS
    }
    none = made[NONE.key]
    assert none.state_bytes == 0
    for method in (INTERPOLATION, THEIRS, DIAGONAL, KRONECKER):
        run = made[method.key]
        assert np.shape(run.matrix) == (5, 5)
        # The first context is learned without a penalty: alike, but for rounding.
        assert run.matrix[0] == pytest.approx(none.matrix[0], abs=0.03)
        assert run.state_bytes > 0
        assert run.cpu_seconds >= run.end_cpu_seconds >= 0
    assert np.shape(made[JOINT.key].matrix) == (1, 5)
    weights = 4 * sum(param.numel() for param in Network(scenario, SMALL.hidden).parameters())
    assert made[THEIRS.key].state_bytes == 4 * 2 * weights  # of all contexts but the last
    assert made[DIAGONAL.key].state_bytes == pytest.approx(2 * weights, abs=100)
    if name == "class":  # what has not been seen cannot be told
        assert np.triu(none.r, 1).max() == 0


def test_joint_training_learns_all_contexts(data):
    setting = replace(SMALL, hidden=32, lr=0.01, iterations=40)
    for name in SPLITS:
        scenario = scenario_of(name, data, 5, 0)
        run = runs.train(name, scenario, JOINT, 0.0, setting, 0, "test")
        assert np.mean(run.matrix[-1]) > 0.85


def test_a_run_that_is_there_is_not_done_again(tmp_path, data, monkeypatch):
    methods = [NONE, SMALL_RATE, THEIRS, DIAGONAL, JOINT]
    told: list[str] = []

    def measure(setting: Setting) -> Results:
        return runs.measure(
            tmp_path, ("digits", data), {"domain": setting}, 2, 1, methods, on_run=told.append
        )

    first = measure(SMALL)
    assert len(told) == 3 * 4 + 5 * 2
    for method in (SMALL_RATE, THEIRS, DIAGONAL):
        key = ("domain", method.key)
        assert first.scores[key][first.chosen[key]] == max(first.scores[key].values())
    monkeypatch.setattr(runs, "train", None)
    assert measure(SMALL) == first
    with pytest.raises(TypeError):  # it would train
        measure(replace(SMALL, iterations=7))


def test_every_method_has_as_many_candidates():
    assert runs.count_runs(SPLITS, 5, 1) == 3 * (7 * 5 + 5 * 4)
    for name in NAMES:
        counts = {len(method.values(name)) for method in METHODS if method.candidates}
        assert counts == {4}


# --- the report -----------------------------------------------------------------------------------


def run_of(acc: float, seconds: float) -> Run:
    return Run(((acc + 0.1, 0.1), (acc, acc)), 2 * seconds, seconds, 10**6, 0.5)


def results_of(accs: dict[str, tuple[float, float]]) -> Results:
    return Results(
        "digits", {"domain": replace(SMALL, contexts=2)},
        {("domain", key): 1.0 for key in accs}, {("domain", key): {} for key in accs},
        {
            ("domain", key): [run_of(acc, 1.0 + (key == THEIRS.key)) for acc in some]
            for key, some in accs.items()
        },
    )  # fmt: skip


ACCS = {
    NONE.key: (0.4, 0.5), THEIRS.key: (0.5, 0.59), DIAGONAL.key: (0.3, 0.61),
    KRONECKER.key: (0.8, 0.9), JOINT.key: (0.9, 1.0),
}  # fmt: skip


def test_findings_are_computed(tmp_path):
    results = results_of(ACCS)
    told = [report.verdict(results, "domain", one) for one in (THEIRS, DIAGONAL, KRONECKER)]
    assert told == ["helps in part", "shows no certain gain", "helps"]
    slightly = results_of({**ACCS, KRONECKER.key: (0.42, 0.52)})
    assert report.verdict(slightly, "domain", KRONECKER) == "hardly helps"
    path = tmp_path / "table.md"
    write_markdown(report.render(results, box.MARKDOWN), path, width=400)
    text = path.read_text()
    rows = [
        [cell.strip() for cell in line.split("|")][1:-1]
        for line in text.splitlines()
        if line.startswith("| cl_optim: EWC, Kronecker")
    ]
    assert rows[0][2].startswith("85.0 ± ")
    assert rows[1][1:] == ["+40.0 ± 0.0", "80", "+30.5 ± 6.4", "+0.0 ± 0.0", "0.50 ± 0.00"]
    assert "van de Ven's EWC helps in part (19 %)" in " ".join(text.split())
    assert "iterations each (published: 2000)" in " ".join(text.split())
    assert "fine-tuning 85.41 ± .88, online EWC 99.12 ± .16" in " ".join(text.split())


def test_what_is_written_is_read(tmp_path):
    results = results_of(ACCS)
    json_path, page = report.write(results, tmp_path)
    record = json.loads(json_path.read_text())
    assert runs.from_record(record) == results
    assert record["machine"]["torch"] == torch.__version__
    assert page.read_text().splitlines()[-1] == sentence(record["machine"])
    by_method = {row["method"]: row["runs"][0] for row in record["rows"]}
    assert by_method[KRONECKER.key]["acc"] == pytest.approx(0.8)
    assert by_method[KRONECKER.key]["forgetting"] == pytest.approx(0.1)


def test_the_command_writes_what_was_run(tmp_path, data, monkeypatch, capsys):
    """With two candidates for each method."""
    few = [
        replace(method, candidates=method.candidates and {"class": method.candidates["class"][:2]})
        for method in METHODS
    ]
    monkeypatch.setattr(runs, "METHODS", tuple(few))
    monkeypatch.setattr(fashion_mnist, "load", lambda name, folder: ("digits", data))
    arguments = ["van-de-ven", "--seeds", "2", "--iterations", "3", "--fisher-samples", "4"]
    assert retention.main([*arguments, "--scenarios", "class", "--out", str(tmp_path)]) == 0
    assert "Class-incremental: 5 contexts, 3 iterations each" in capsys.readouterr().out
    record = json.loads((tmp_path / "van-de-ven.json").read_text())
    assert record["settings"]["class"]["iterations"] == 3
    assert [row["method"] for row in record["rows"]] == [method.key for method in few]
    for row in record["rows"]:
        for one in row["runs"]:
            assert one["acc"] == pytest.approx(np.mean(one["matrix"][-1]))
            assert ("forgetting" in one) == (row["method"] != JOINT.key)
    assert (tmp_path / "van-de-ven.md").read_text().startswith("digits, the protocol of")
    assert len([*(tmp_path / "van-de-ven").glob("*.json")]) == runs.count_runs(["class"], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenarios", "instance"], r"invalid choice: 'instance'"),
        (["--iterations", "0"], r"must be a whole number from 1 to 1000000, not '0'"),
        (["--seeds", "1"], r"must be a whole number from 2 to 1000, not '1'"),
        (["--data", "mnist"], r"MNIST's four IDX files are needed: name their folder"),
        (["--data", "mnist", "--data-dir", "nowhere"], r"nowhere/train-images-idx3-ubyte.gz does"),
        (["--contexts", "3"], r"10 classes cannot be split into 3 equal tasks"),
    ],
    ids=["scenario", "iterations", "seeds", "mnist", "folder", "contexts"],
)
def test_wrong_arguments_are_told(tmp_path, data, monkeypatch, capsys, arguments, message):
    if "--contexts" in arguments:
        monkeypatch.setattr(fashion_mnist, "load", lambda name, folder: ("digits", data))
    with pytest.raises(SystemExit) as error:
        retention.main(["van-de-ven", *arguments, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_mnist_is_read_from_its_own_files(tmp_path):
    numbers = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = numbers.integers(0, 256, (count, 2, 2))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    name, task = fashion_mnist.load("mnist", tmp_path)
    assert (name, len(task.train.y), len(task.test.y)) == ("MNIST", 50, 20)
    with pytest.raises(DataError, match=r"does not exist"):
        fashion_mnist.load("fashion-mnist", tmp_path / "nowhere")
