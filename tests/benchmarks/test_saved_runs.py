"""Runs are done once: of the same setting, versions and processor, and never half-written."""

from __future__ import annotations

import json

import pytest
import torch

from bench.retention import saved_runs
from bench.retention.saved_runs import Run, from_record, once
from bench.retention.van_de_ven import runs as van_de_ven
from cl_optim.demo.scenarios import Split, Task

RUNS = [Run(((0.5, 0.25), (0.125, 1.0)), 2.0, 1.5, 7), van_de_ven.Run(((1.0,),), 1.0, 0.5, 3, 0.25)]


@pytest.mark.parametrize("run", RUNS, ids=["a run", "with ends of contexts"])
def test_a_run_that_is_there_is_read(tmp_path, run):
    path = tmp_path / "run.json"
    assert once(path, type(run), {"data": "digits"}, lambda: run) == run
    assert once(path, type(run), {"data": "digits"}, lambda: pytest.fail("done again")) == run


@pytest.mark.parametrize("change", ["setting", "versions", "processor"])
def test_a_run_of_something_else_is_done_anew(tmp_path, monkeypatch, change):
    path, setting = tmp_path / "run.json", {"data": "digits", "epochs": 1}
    once(path, Run, setting, lambda: RUNS[0])
    if change == "versions":
        monkeypatch.setattr(saved_runs, "versions", lambda: {"torch": "another"})
    elif change == "processor":
        monkeypatch.setattr(saved_runs, "processor", lambda: "another")
    else:
        setting = {**setting, "epochs": 2}
    other = Run(((0.75,),), 1.0, 1.0, 1)
    assert once(path, Run, setting, lambda: other) == other
    assert json.loads(path.read_text())["matrix"] == [[0.75]]


def test_what_fails_leaves_no_file(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "run.json", Run, {}, fail)
    assert not [*tmp_path.iterdir()]


def test_derived_values_of_a_record_are_left_out():
    record = {"matrix": [[0.5]], "seconds": 1, "cpu_seconds": 1, "state_bytes": 0, "acc": 0.5}
    assert from_record(Run, record) == Run(((0.5,),), 1, 1, 0)


def test_other_files_of_the_same_name_are_other_data():
    parts = [Split(torch.zeros(count, 2), torch.zeros(count)) for count in (5, 3, 2)]
    more = Split(torch.zeros(6, 2), torch.zeros(6))
    told = saved_runs.about(("MNIST", Task(*parts)))
    assert told == {"data": "MNIST", "samples": [5, 3, 2]}
    assert told != saved_runs.about(("MNIST", Task(more, *parts[1:])))
