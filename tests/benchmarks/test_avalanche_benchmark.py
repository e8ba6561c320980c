"""The benchmark beside Avalanche: what all methods share, what is chosen, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import avalanche_cases
import numpy as np
import pytest
import torch
from rich import box

from bench.retention import __main__ as retention
from bench.retention import avalanche as benchmark
from bench.retention import commands
from bench.retention.avalanche import (
    METHODS,
    NAIVE,
    OUR_DIAGONAL,
    OUR_GEM,
    OUR_KRONECKER,
    PAIRS,
    THEIR_EWC,
    THEIR_GEM,
    Results,
    Run,
    Setting,
)
from bench.retention.training import tensor_bytes
from cl_optim.demo.report import write_markdown
from cl_optim.demo.scenarios import digits

SMALL = Setting(tasks=2, samples=64, held_out=50, hidden=8, epochs=1, batch=8, patterns=8)


def few(method: benchmark.Method) -> benchmark.Method:
    """With two candidates only."""
    return replace(method, strengths={key: some[:2] for key, some in method.strengths.items()})


def run(acc: float, seconds: float) -> Run:
    return Run(((acc + 0.1, 0.1), (acc, acc)), 2 * seconds, seconds, 10**6)


def results_of(accs: dict[str, tuple[float, float]], seconds: dict[str, float]) -> Results:
    key = ("permuted", "AdamW")
    return Results(
        "digits", SMALL, {(*key, one): 1.0 for one in accs}, {(*key, one): {} for one in accs},
        {(*key, one): [run(acc, seconds[one]) for acc in some] for one, some in accs.items()},
    )  # fmt: skip


def test_every_method_has_as_many_candidates():
    for kind, count in (("ewc", 7), ("gem", 2)):
        of_kind = [method for method in METHODS if method.kind == kind]
        assert {len(some) for m in of_kind for some in m.strengths.values()} == {count}
    assert {one.library for one, _ in PAIRS} == {benchmark.OURS}
    assert {one.key for _, one in PAIRS} == {THEIR_EWC.key, THEIR_GEM.key}


@pytest.mark.parametrize("name", benchmark.SCENARIOS)
def test_samples_are_drawn_from_the_seed(name):
    one, again, other = (benchmark.scenario_of(name, digits(), SMALL, seed) for seed in (0, 0, 1))
    assert torch.equal(one.tasks[1].train.x, again.tasks[1].train.x)
    assert not torch.equal(one.tasks[0].train.y, other.tasks[0].train.y)
    sizes = [len(task.train.y) for task in one.tasks]
    assert sum(sizes) == 2 * SMALL.samples
    if name == "permuted":
        assert torch.equal(one.tasks[0].train.y, one.tasks[1].train.y)
        assert sizes[0] == SMALL.samples


def test_bytes_are_counted_once():
    big = torch.zeros(100)
    assert tensor_bytes({"a": [big, big[:10]], "b": (torch.zeros(5),), "c": "no"}) == 420


@pytest.mark.parametrize("name", benchmark.SCENARIOS)
@pytest.mark.parametrize("inner", benchmark.INNERS)
def test_methods_begin_alike_and_differ_after_the_first_task(name, inner):
    """With no penalty yet the first task is learned as by the plain strategy."""
    scenario = benchmark.scenario_of(name, digits(), SMALL, 0)
    runs = [
        benchmark.train(scenario, method, method.strengths[inner][-1], inner, SMALL, 0, "test")
        for method in (NAIVE, OUR_DIAGONAL, OUR_KRONECKER, OUR_GEM)
    ]
    naive, *ours = runs
    for one in ours:
        assert one.matrix[0] == pytest.approx(naive.matrix[0], abs=0.021)  # a sample, by rounding
        assert one.state_bytes > naive.state_bytes
        assert one.cpu_seconds > 0
    assert naive.state_bytes < 1000  # step counts at most
    if name == "split":
        assert naive.matrix[0][1] == 0.2  # of five classes, before it has a head


def test_a_run_that_is_there_is_not_done_again(tmp_path, monkeypatch):
    methods = [NAIVE, few(OUR_DIAGONAL)]
    data = ("digits", digits())
    told: list[str] = []

    def measure(setting: Setting) -> Results:
        return benchmark.measure(
            tmp_path, data, setting, 2, 1, ("SGD",), methods, on_run=told.append
        )

    first = measure(SMALL)
    assert len(told) == 2 * (2 + 2 + 2)
    key = ("split", "SGD", OUR_DIAGONAL.key)
    assert first.chosen[key] in first.scores[key]
    assert first.scores[key][first.chosen[key]] == max(first.scores[key].values())
    monkeypatch.setattr(benchmark, "train", None)
    assert measure(SMALL) == first
    with pytest.raises(TypeError):  # it would train
        measure(replace(SMALL, epochs=2))


def test_differences_are_paired(tmp_path):
    accs = {
        NAIVE.key: (0.5, 0.6), THEIR_EWC.key: (0.6, 0.7), OUR_DIAGONAL.key: (0.62, 0.72),
        OUR_KRONECKER.key: (0.8, 0.9),
    }  # fmt: skip
    seconds = {NAIVE.key: 1.0, THEIR_EWC.key: 3.0, OUR_DIAGONAL.key: 2.0, OUR_KRONECKER.key: 2.5}
    path = tmp_path / "table.md"
    write_markdown(benchmark.render(results_of(accs, seconds), box.MARKDOWN), path, width=400)
    rows = {
        cells[1]: cells[2:-1]
        for line in path.read_text().splitlines()
        if line.startswith("|")
        for cells in [[cell.strip() for cell in line.split("|")]]
    }
    pair = rows[f"{OUR_DIAGONAL.label} − {THEIR_EWC.label}"]
    assert pair == ["+2.0 ± 0.0", "+0.0 ± 0.0", "0.67 ± 0.00", "0.67 ± 0.00", "1.00, 2.00"]
    assert rows[f"{OUR_KRONECKER.label} − {THEIR_EWC.label}"][0] == "+20.0 ± 0.0"
    assert rows[NAIVE.label][1].startswith("55.0 ± ")
    assert rows[NAIVE.label][4:] == ["2.00 ± 0.00", "1.00 ± 0.00", "1.00"]


def test_the_command_writes_what_was_run(tmp_path, monkeypatch, capsys):
    """All methods where Avalanche is; ours, in what stands in for it."""
    methods = [few(m) for m in METHODS if avalanche_cases.IS_REAL or m.library != "Avalanche"]
    monkeypatch.setattr(benchmark, "METHODS", tuple(methods))
    monkeypatch.setattr(benchmark, "Setting", lambda: SMALL)
    monkeypatch.setattr(commands, "load", lambda name, folder: ("digits", digits()))
    arguments = ["avalanche", "--seeds", "2", "--optimizers", "AdamW", "--out", str(tmp_path)]
    assert retention.main(arguments) == 0
    assert "Kronecker" in capsys.readouterr().out
    record = json.loads((tmp_path / "avalanche.json").read_text())
    assert record["setting"]["samples"] == SMALL.samples
    assert len(record["rows"]) == 2 * len(methods)
    for row in record["rows"]:
        assert [len(one["matrix"]) for one in row["runs"]] == [2, 2]
        for one in row["runs"]:
            assert one["acc"] == pytest.approx(np.mean(one["matrix"][-1]))
    lines = (tmp_path / "avalanche.md").read_text().splitlines()
    assert sum(line.startswith("| cl_optim: EWC, Kronecker") for line in lines) >= 2
    assert record["machine"]["threads"] == 1, "of the runs, not of what came before"
    assert lines[-1].startswith("On a machine with 1 thread: ")
