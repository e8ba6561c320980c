"""An ImportanceLog that keeps Kronecker factors, and its reports."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from bad_input import each_of, refused
from damage import flip
from kronecker_cases import factors_of, importance_of
from rich.console import Console
from torch import nn

from cl_optim import Importance, ImportanceLog, KroneckerImportance
from cl_optim.importance import codecs, shards
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.importance.kronecker.importance import check_factors
from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import write_csv, write_json
from cl_optim.importance.report.html import render_html
from cl_optim.importance.report.text import render_text


@pytest.fixture
def log(tmp_path) -> ImportanceLog:
    """Two tasks with factors."""
    log = ImportanceLog(tmp_path / "log")
    for task in range(2):
        log.record(f"task {task}", importance_of(task))
    return log


def assert_same(found, expected):
    assert type(found) is KroneckerImportance
    assert list(found) == list(expected)
    assert (found.samples, found.tokens) == (expected.samples, expected.tokens)
    for weight, one in expected.factors.items():
        other = found.factors[weight]
        assert other.layout == one.layout
        assert torch.equal(other.scale, one.scale)
        for here, there in ((other.output, one.output), (other.input, one.input)):
            assert (here.tail, here.kept) == (there.tail, there.kept)
            assert torch.equal(here.values, there.values)
            assert here.basis is there.basis is None or torch.equal(here.basis, there.basis)
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_records_come_back_as_they_were(log):
    again = ImportanceLog(log.path, "r")
    for task in range(2):
        found = again.load(f"task {task}")
        assert_same(found, importance_of(task))
        assert found.metadata == {"labels": "sample", "task": f"task {task}"}
        record = again[f"task {task}"]
        assert record.effective_ranks == importance_of(task).effective_ranks()
        assert record.layers == importance_of(task).per_layer()
        assert record.nbytes > sum(4 * one.scale.numel() for one in found.factors.values())


def test_names_are_those_of_the_bare_model(tmp_path):
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0, "module._orig_mod."))
    assert_same(log.load("task"), importance_of(0))
    assert list(log["task"].effective_ranks) == list(importance_of(0).factors)


def test_bfloat16_is_orthonormal_again(tmp_path):
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0), codec="bfloat16")
    exact, found = importance_of(0), log.load("task")
    for weight, one in found.factors.items():
        check_factors(one, weight)
        assert one.scale.dtype == torch.float32
        torch.testing.assert_close(one.scale, exact.factors[weight].scale, rtol=2**-8, atol=0)
    for name, value in exact.items():
        limit = 0.02 * float(value.max())
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=limit)


def test_what_is_recorded_can_be_lazy(log, tmp_path):
    other = ImportanceLog(tmp_path / "other")
    other.record("copy", log.load("task 1"))
    assert_same(other.load("copy"), importance_of(1))


def test_merge(log):
    merged = log.merge(decay=0.5)
    assert type(merged) is KroneckerImportance
    assert_same(merged, importance_of(0).merge(importance_of(1), 0.5))
    assert [source["task"] for source in merged.metadata["merged"]] == ["task 0", "task 1"]
    assert type(log.merge(["task 1"])) is KroneckerImportance


def test_records_with_and_without_factors_are_read_and_not_merged(log):
    log.record("diagonal", importance_of(2).diagonal())
    assert type(log.load("diagonal")) is Importance
    assert log["diagonal"].effective_ranks == {}
    assert_same(log.load("task 0"), importance_of(0))
    with refused(ValueError, r"^a diagonal and a Kronecker-factored .* its \.diagonal\(\), or"):
        log.merge()
    data = report_data(log)
    assert len(data["tasks"]) == 3
    assert "fc" in render_html(data)


def test_statistics_read_no_tensor(log, monkeypatch):
    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(shards.Reader, "read", read)
    again = ImportanceLog(log.path, "r")
    record = again["task 0"]
    assert record.layers["fc"].weights == 40
    assert record.effective_ranks["fc.weight"][1] > 1
    found = again.load("task 0")
    assert "fc.bias" in found
    assert found.shapes["fc.bias"] == (5,)
    assert repr(found)


def test_recording_makes_each_diagonal_once(tmp_path, monkeypatch):
    made = []
    for name in ("diagonal", "bias_diagonal"):
        original = getattr(Factors, name)
        monkeypatch.setattr(
            Factors, name, lambda self, of=original, n=name: made.append(n) or of(self)
        )
    ImportanceLog(tmp_path).record("task", importance_of(0))
    assert sorted(made) == ["bias_diagonal"] * 2 + ["diagonal"] * 4


@pytest.mark.parametrize("part", ["scale/fc.weight", "input.basis/conv.weight"])
def test_a_damaged_tensor_is_named(log, part):
    record = next((log.path / "records").glob("00001-*"))
    (shard,) = record.glob("kronecker-*")
    content = shard.read_bytes()
    weight = part.split("/")[1]
    one = importance_of(0).factors[weight]
    tensor = one.scale if part.startswith("scale") else one.input.basis
    place = content.find(tensor.numpy().tobytes())
    assert place > 0
    flip(shard, place)
    loaded = ImportanceLog(log.path, "r").load("task 0")
    with refused(
        DamagedError, rf"^the Kronecker factors of '{weight}' of task 'task 0' is damaged"
    ):
        _ = loaded[weight]
    assert torch.equal(loaded["mlp.weight"], importance_of(0)["mlp.weight"])


# --- reports --------------------------------------------------------------------------------------


def test_the_report_has_the_effective_ranks(log, tmp_path):
    log.record("diagonal", importance_of(2).diagonal())
    data = report_data(log)
    layers = [layer["name"] for layer in data["layers"]]
    row = data["ranks"][layers.index("fc")]
    expected = importance_of(0).effective_ranks()["fc.weight"]
    assert row[0] == [{"weight": "fc.weight", "output": expected[0], "input": expected[1]}]
    assert row[2] == []
    assert data["ranks"][layers.index("norm")][0] == []
    write_json(data, tmp_path / "r.json")
    write_csv(data, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        rows = {(one["layer"], one["task"]): one for one in csv.DictReader(file)}
    assert float(rows["fc", "task 0"]["output_rank"]) == expected[0]
    assert float(rows["fc", "task 0"]["input_rank"]) == expected[1]
    assert rows["norm", "task 0"]["output_rank"] == rows["fc", "diagonal"]["input_rank"] == ""
    text = io.StringIO()
    Console(file=text, width=160).print(render_text(data))
    assert "effective rank" in text.getvalue()
    last = importance_of(1).effective_ranks()["fc.weight"]  # the last that has factors
    assert f"{last[0]:.1f} × {last[1]:.1f}" in text.getvalue()
    assert "effective rank" in render_html(data)


def test_a_report_without_factors_has_no_ranks(tmp_path):
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0).diagonal())
    data = report_data(log)
    assert data["ranks"] is None
    text = io.StringIO()
    Console(file=text, width=160).print(render_text(data))
    assert "effective rank" not in text.getvalue()


def test_the_reports_merged_top_is_that_of_the_diagonals(log):
    data = report_data(log)
    merged = importance_of(0).diagonal().merge(importance_of(1).diagonal())
    layers = [layer["name"] for layer in data["layers"]]
    for part in data["frozen"]:
        mask = merged.top(part["fraction"])["mlp.weight"]
        assert part["layers"][layers.index("mlp")] == float(mask.double().mean())


def test_tensorboard_has_the_ranks(log):
    added = {}
    writer = type("Writer", (), {"add_scalar": lambda _, *of: added.update({of[::2]: of[1]})})()
    log.to_tensorboard(writer)
    output, input = importance_of(1).effective_ranks()["fc.weight"]
    assert added["importance/rank/output/fc.weight", 2] == output
    assert added["importance/rank/input/fc.weight", 2] == input


# --- bad input ------------------------------------------------------------------------------------


def damaged() -> KroneckerImportance:
    importance = importance_of(0)
    importance.factors["fc.weight"].scale.neg_()
    return importance


def huge() -> KroneckerImportance:
    one = factors_of(Layout((3, 3)))
    one.scale.fill_(3e38)
    return KroneckerImportance({"w": one}, {}, 1)


BAD = [
    *((f"codec {name}", lambda log, name=name: log.record("task", importance_of(0), codec=name),
       ValueError, rf"^codec must be one of \('float32', 'bfloat16'\) .* not '{name}': or")
      for name in codecs.NAMES[2:]),
    ("factors changed since", lambda log: log.record("task", damaged()),
     ValueError, r"^the scale of 'fc.weight' must be finite and at least 0"),
    ("a model of another shape", lambda log: log.record("task", huge(), nn.Linear(2, 2)),
     ValueError, r"^the importance of 'w' is of no parameter of the model"),
    ("a mask of another shape",
     lambda log: log.record("task", importance_of(0), frozen={"fc.bias": torch.ones(2).bool()}),
     ValueError, r"^frozen\['fc.bias'\] must have the importance's shape \(5,\)"),
    ("nothing", lambda log: log.record("task", KroneckerImportance({}, {}, 1)),
     ValueError, "^importance must have at least one parameter"),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence_and_leaves_the_log(log, given, error, message):
    before = sorted(path.name for path in (log.path / "records").iterdir())
    with refused(error, message):
        given(log)
    assert sorted(path.name for path in (log.path / "records").iterdir()) == before
    assert log.tasks == ["task 0", "task 1"]
