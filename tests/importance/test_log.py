"""The importance log: what it keeps, and how it refuses."""

from __future__ import annotations

import builtins
import errno
import functools
import json
import logging
import math
import os
import pathlib
import resource
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from damage import flip
from log_cases import assert_is, importance_of, make_log, weights
from safetensors.torch import save_file
from torch import nn

from cl_optim import EWCAdamW, Importance, ImportanceLog
from cl_optim.importance import codecs, shards
from cl_optim.importance.checksums import sealed, unsealed
from cl_optim.importance.codecs import NAMES
from cl_optim.importance.errors import DamagedError, LockedError, LogError
from cl_optim.importance.manifest import FILE, SEAL, VERSION, locked
from cl_optim.importance.names import compare_names
from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import write_csv, write_json
from cl_optim.importance.report.html import write_html


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except the lock, which says who wrote last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# --- what it keeps --------------------------------------------------------------------------------


def test_records_come_back_as_they_were(tmp_path):
    make_log(tmp_path / "log", 3)
    for mode in ("a", "r"):
        log = ImportanceLog(str(tmp_path / "log"), mode)
        assert log.tasks == ["task 0", "task 1", "task 2"]
        assert len(log) == 3
        assert "task 1" in log
        assert repr(log) == f"ImportanceLog({str(tmp_path / 'log')!r}: 3 tasks)"
        for task in range(3):
            loaded = log.load(f"task {task}")
            assert loaded.metadata["task"] == f"task {task}"
            assert_is(loaded, importance_of(task))


@pytest.mark.parametrize("name", codecs.NAMES)
def test_each_codec_comes_back(tmp_path, name):
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0), codec=name)
    log.record("half", importance_of(0), codec=codecs.codec("topk", fraction=0.5))
    assert ImportanceLog(tmp_path)["half"].codec.options() == {"fraction": 0.5}
    how = codecs.codec(name)
    encode = how.encoder(importance_of(0).sums)
    for key, value in importance_of(0).sums.items():
        expected = how.decode(encode(value), value.shape)
        assert torch.equal(ImportanceLog(tmp_path).load("task").sums[key], expected)


def test_any_mapping_and_dtype(tmp_path):
    tied = torch.rand(4, 6)
    values = {
        "tied": tied,
        "again": tied,
        "view": tied.t(),
        "bfloat16": torch.rand(5).bfloat16(),
        "float64": torch.rand(5, dtype=torch.float64),
        "whole": torch.tensor(3),
    }
    log = ImportanceLog(tmp_path)
    log.record("task", values)
    loaded = log.load("task")
    assert loaded.samples == 1
    for name, value in values.items():
        assert torch.equal(loaded[name], value.float()), name


@pytest.mark.parametrize("task", ["a/b", "../up", "x" * 300, "Ünïcode\n\u2028", "\ud800", ".", "0"])
def test_a_task_may_have_any_name(tmp_path, task):
    log = make_log(tmp_path / "log", 1)
    log.record(task, importance_of(1))
    assert ImportanceLog(tmp_path / "log").tasks == ["task 0", task]
    assert_is(ImportanceLog(tmp_path / "log").load(task), importance_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_parameters_may_have_any_name(tmp_path):
    values = {name: torch.rand(3) for name in ("a/b", "0/a", "x" * 300, "__metadata__", "")}
    log = ImportanceLog(tmp_path)
    log.record("task", values)
    for name, value in values.items():
        assert torch.equal(log.load("task")[name], value)


def test_anchors_and_frozen_weights(tmp_path):
    log = ImportanceLog(tmp_path)
    frozen = importance_of(0).top(0.1)
    anchors = {**weights(0), "bfloat16": torch.rand(3).bfloat16(), "whole": torch.arange(4)}
    log.record("task", importance_of(0), anchors=anchors, frozen=frozen)
    log.record("bare", importance_of(0))
    record = ImportanceLog(tmp_path)["task"]
    for found, expected in ((record.anchors(), anchors), (record.frozen(), frozen)):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
        with pytest.raises(KeyError):
            found["other"]
    assert log["bare"].anchors() is None
    assert log["bare"].frozen() is None
    assert log["task"].nbytes > log["bare"].nbytes > 0


def test_anchors_in_a_checkpoint(tmp_path):
    log = ImportanceLog(tmp_path / "log")
    checkpoint = tmp_path / "model.safetensors"
    save_file(weights(0), checkpoint)
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"anything")
    log.record("task", importance_of(0), anchors=checkpoint)
    log.record("pickled", importance_of(0), anchors=str(pickle))
    found = log["task"].anchors()
    assert all(torch.equal(found[name], value) for name, value in weights(0).items())
    with pytest.raises(LogError, match=r"model.pt, which is not safetensors: load it with the"):
        log["pickled"].anchors()
    flip(checkpoint, -1)
    with pytest.raises(DamagedError, match=r"of task 'task', .*model.safetensors, have changed"):
        log["task"].anchors()
    log.record("no safetensors", importance_of(0), anchors=checkpoint.rename(tmp_path / "b"))
    (tmp_path / "b").rename(checkpoint).write_bytes(b"neither")
    log.record("neither", importance_of(0), anchors=checkpoint)
    with pytest.raises(LogError, match=r"of task 'neither' are .* not a safetensors file"):
        log["neither"].anchors()
    checkpoint.unlink()
    with pytest.raises(LogError, match="are gone"):
        log["task"].anchors()


def test_a_record_knows_the_model_and_its_statistics(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).bfloat16())
    values = {name: torch.rand(param.shape) for name, param in model.named_parameters()}
    log = ImportanceLog(tmp_path)
    log.record("task", values, model=model)
    record = ImportanceLog(tmp_path)["task"]
    assert record.model["1.weight"] == [[2, 4], "bfloat16"]
    assert list(record.model) == list(values)
    assert record.layers == log.load("task").per_layer()
    assert record.whole.weights == sum(value.numel() for value in values.values())
    log.record("means", importance_of(0))
    assert log["means"].layers == log.load("means").per_layer()


def test_a_shard_has_at_most_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "write", functools.partial(shards.write, limit=1000))
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0), anchors=weights(0))
    files = list(tmp_path.rglob("importance-*.safetensors"))
    assert len(files) > 2
    # Beside the tensors a file has a header.
    assert all(path.stat().st_size <= 1000 + 8 + 400 for path in files)
    assert_is(ImportanceLog(tmp_path).load("task"), importance_of(0))
    assert log["task"].layers == importance_of(0).per_layer()
    found = ImportanceLog(tmp_path)["task"].anchors()
    assert all(torch.equal(found[name], value) for name, value in weights(0).items())


def test_no_more_than_a_shard_is_in_memory(tmp_path):
    """When a tensor is made, those of earlier shards are gone."""
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def tensors():
        for number in range(20):
            alive.append(sum(ref() is not None for ref in made))
            memory = np.full(100, number, dtype=np.float32)
            made.append(weakref.ref(memory))
            tensor = torch.from_numpy(memory)
            del memory
            yield f"t{number}", tensor
            del tensor

    table = shards.write(tmp_path, "importance", tensors(), limit=1600)
    assert [len(shard["tensors"]) for shard in table] == [4] * 5
    assert max(alive) == 4


def test_tensors_are_read_when_asked_for(tmp_path, monkeypatch):
    make_log(tmp_path, 1)
    read: list[str] = []
    original = shards.Reader.read

    def counting(self, key, what):
        read.append(key)
        return original(self, key, what)

    monkeypatch.setattr(shards.Reader, "read", counting)
    loaded = ImportanceLog(tmp_path).load("task 0")
    assert len(loaded) == 4
    assert "a.weight" in loaded
    assert "4 parameters" in repr(loaded)
    sums = loaded.sums
    assert read == []
    assert sums["a.weight"].shape == (20, 30)
    loaded["a.bias"]
    assert read == ["values/a.weight", "values/a.bias"]


# --- what it is for -------------------------------------------------------------------------------


def test_merge_is_what_the_optimizer_protects(tmp_path):
    model = nn.Linear(5, 4)
    log = ImportanceLog(tmp_path)
    one_by_one, at_once = (EWCAdamW(model.named_parameters()) for _ in range(2))
    for task in range(3):
        values = {name: torch.rand(param.shape) for name, param in model.named_parameters()}
        log.record(f"task {task}", values)
        one_by_one.consolidate(values, decay=0.5)
    at_once.consolidate(log.merge(decay=0.5))
    for param in model.parameters():
        torch.testing.assert_close(
            at_once.state[param]["importance"], one_by_one.state[param]["importance"]
        )
    assert [source["task"] for source in log.merge().metadata["merged"]] == log.tasks

    at_once.consolidate(log, decay=0.0)
    for name, param in model.named_parameters():
        expected = sum(log.load(task)[name] for task in log.tasks)
        torch.testing.assert_close(at_once.state[param]["importance"], expected)


def test_what_the_tasks_froze_is_frozen_again(tmp_path):
    model = nn.Linear(5, 4)
    log = ImportanceLog(tmp_path)
    assert log.frozen() == {}
    expected = {
        name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()
    }
    for task in ("one", "two", "three"):
        optimizer = EWCAdamW(model.named_parameters())
        values = {name: torch.rand(param.shape) for name, param in model.named_parameters()}
        optimizer.consolidate(values)
        if task != "two":
            optimizer.freeze(0.2)
        frozen = {protected.name: protected.frozen for protected in optimizer.protected()}
        log.record(task, values, frozen=frozen)
        expected = {name: expected[name] | mask for name, mask in frozen.items()}
    found = ImportanceLog(tmp_path).frozen()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    resumed = EWCAdamW(model.named_parameters())
    resumed.consolidate(log)
    for protected in resumed.protected():
        assert torch.equal(protected.frozen, expected[protected.name])
    log.forget("one")
    log.forget("three")
    assert not any(mask.any() for mask in log.frozen().values())


def test_frozen_weights_of_a_model_that_has_grown(tmp_path):
    log = ImportanceLog(tmp_path)
    frozen = {name: torch.tensor([True, False]) for name in ("same", "gone", "grown")}
    log.record("one", {name: torch.ones(2) for name in frozen}, frozen=frozen)
    params = {"same": torch.ones(2), "grown": torch.ones(3), "new": torch.ones(2)}
    optimizer = EWCAdamW([(name, nn.Parameter(value)) for name, value in params.items()])
    optimizer.consolidate(log, strict=False)
    found = {protected.name: protected.frozen.tolist() for protected in optimizer.protected()}
    assert found == {"same": [True, False]}

    log.record("two", {"same": torch.ones(3)}, frozen={"same": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"^'same' cannot be frozen: .* are \(2,\) and \(3,\)"):
        log.frozen()


def test_a_head_that_grows_between_tasks(tmp_path, caplog):
    log = ImportanceLog(tmp_path)
    masks = [torch.tensor([True, False]), torch.tensor([False, True, False])]
    for task, mask in zip("ab", masks, strict=True):
        head = torch.full((len(mask),), 2.0)
        log.record(task, {"body": torch.ones(4), "head": head}, frozen={"head": mask})
    weights = {"body": torch.ones(4), "head": torch.ones(3)}
    optimizer = EWCAdamW([(name, nn.Parameter(value)) for name, value in weights.items()])
    for call in (log.merge, lambda: optimizer.consolidate(log)):
        with pytest.raises(ValueError, match=r"'head' cannot be merged: its shapes are \(2,\) and"):
            call()
    with pytest.raises(ValueError, match=r"'head' cannot be frozen: its shapes are"):
        log.frozen()
    with caplog.at_level("WARNING"):
        optimizer.consolidate(log, strict=False)
    assert "new shapes of 'head'" in caplog.text
    found = {one.name: one for one in optimizer.protected()}
    assert found["body"].importance.tolist() == [2.0] * 4
    assert found["head"].importance.tolist() == [2.0] * 3
    assert found["head"].frozen.tolist() == [False, True, False]
    data = report_data(log)
    # Of the top 5 % of each task, one weight of its own head.
    assert data["overlap"]["jaccard"][0][1] == 0
    assert 0 < data["overlap"]["fisher"][0][1] < 1
    log.report(tmp_path / "report.html")


def test_wrapped_and_bare_names_are_one(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = nn.DataParallel(model)
    log = ImportanceLog(tmp_path)
    for number, module in enumerate((wrapped, model, torch.compile(model))):
        params = dict(module.named_parameters())
        frozen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in params.items()}
        log.record(
            f"task {number}",
            {name: torch.ones_like(p) for name, p in params.items()},
            model=module,
            anchors=params,
            frozen=frozen,
        )
        record = log[f"task {number}"]
        for names in (record.importance(), record.anchors(), record.frozen(), record.model):
            assert list(names) == ["0.weight", "0.bias"]
    optimizer = EWCAdamW(wrapped.named_parameters())
    optimizer.consolidate(log)
    assert all((one.importance == 3).all() for one in optimizer.protected())
    one, other = ({f"{wrapper}a": torch.rand(3)} for wrapper in ("module.", ""))
    first = Importance(one, 1)
    assert list(first.merge(other)) == ["module.a"]
    assert first.overlap({"a": one["module.a"]}) == {"jaccard": 1.0, "cosine": 1.0, "fisher": 1.0}
    # Two that are one without wrappers stay what they are.
    log.record("two", {"module.a": torch.ones(1), "a": torch.ones(1)})
    assert set(log.load("two")) == {"module.a", "a"}


def test_a_negative_zero_is_a_zero(tmp_path):
    """It comes from relu, clamp and negation, and has a sign, which marks frozen weights."""
    values = torch.tensor([-0.0, 1.0, 0.0, 2.0])
    importance = Importance({"a": values}, 1)
    assert importance.top(0.5)["a"].tolist() == [False, True, False, True]
    assert importance.top(0.75)["a"].tolist() == [True, True, False, True]
    assert importance.quantile(0.25) == 0
    log = ImportanceLog(tmp_path)
    for codec in NAMES:
        log.record(codec, {"a": values}, codec=codec)
        assert log[codec].whole.zeros == 2
        optimizer = EWCAdamW([("a", nn.Parameter(torch.ones(4)))])
        optimizer.consolidate(log.merge([codec]))
        (protected,) = optimizer.protected()
        assert not protected.frozen.any()
        assert not protected.importance.signbit().any()


def test_a_recorded_task_has_its_new_name(tmp_path):
    log = ImportanceLog(tmp_path)
    log.record("old", importance_of(0))
    log.record("new", log.load("old"))
    assert log.load("new").metadata["task"] == "new"
    assert [source["task"] for source in log.merge().metadata["merged"]] == ["old", "new"]
    assert list(log.merge("new")) == list(log.load("new"))
    alone = Importance({"a": torch.ones(1)}, 1).merge(other := {"b": torch.ones(1)})
    alone["b"].zero_()
    alone.sums["b"].zero_()
    assert other["b"] == 1


@pytest.mark.parametrize("codec", NAMES)
def test_the_largest_numbers_stay_finite(tmp_path, codec):
    log = ImportanceLog(tmp_path)
    largest = torch.finfo(torch.float32).max
    log.record("a", {"a": torch.tensor([[largest, largest], [largest, 0.0]])}, codec=codec)
    assert log.load("a")["a"].isfinite().all()


def test_forget(tmp_path):
    log = make_log(tmp_path, 3)
    log.forget("task 1")
    for reader in (log, ImportanceLog(tmp_path, "r")):
        assert reader.tasks == ["task 0", "task 2"]
        assert reader.forgotten == ["task 1"]
        expected = importance_of(0)["a.bias"] + importance_of(2)["a.bias"]
        torch.testing.assert_close(reader.merge()["a.bias"], expected)
        with pytest.raises(LogError, match=r"^there is no task 'task 1' in the log, which has"):
            reader.load("task 1")
    with pytest.raises(LogError, match="there is no task 'task 1'"):
        log.forget("task 1")
    log.record("task 1", importance_of(7))  # learned again
    assert ImportanceLog(tmp_path).tasks == ["task 0", "task 2", "task 1"]
    assert_is(log.load("task 1"), importance_of(7))
    assert log.forgotten == []
    chosen = log.merge(["task 1", "task 0"], decay=0.5)["a.bias"]
    torch.testing.assert_close(
        chosen, 0.5 * importance_of(7)["a.bias"] + importance_of(0)["a.bias"]
    )


def test_a_model_that_has_changed_since(tmp_path, caplog):
    before = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    log = ImportanceLog(tmp_path)
    values = {name: torch.rand(param.shape) for name, param in before.named_parameters()}
    log.record("task", values, model=before)

    after = nn.ModuleDict({"0": nn.Linear(3, 4), "head": nn.Linear(4, 9)})
    wrapped = nn.ModuleDict({"module": after})
    opt = EWCAdamW(wrapped.named_parameters())
    with pytest.raises(ValueError, match=r"names '1.weight', '1.bias', which this optimizer does"):
        opt.consolidate(log)
    with caplog.at_level(logging.WARNING, "cl_optim"):
        opt.consolidate(log, strict=False)
    assert caplog.messages == [
        "Consolidated with strict=False: 2 parameters match; 2 are new: 'module.head.weight', "
        "'module.head.bias'; 2 have vanished: '1.weight', '1.bias'."
    ]
    torch.testing.assert_close(opt.state[after["0"].weight]["importance"], values["0.weight"])
    assert "importance" not in opt.state[after["head"].weight]
    match = compare_names(log.merge(), dict(wrapped.named_parameters()))
    assert match.matching == ["module.0.weight", "module.0.bias"]
    assert match.new == ["module.head.weight", "module.head.bias"]
    assert match.vanished == ["1.weight", "1.bias"]


def test_a_head_that_has_grown_since(tmp_path, caplog):
    log = ImportanceLog(tmp_path)
    log.record("task", {"body.weight": torch.ones(4, 3), "head.weight": torch.ones(2, 4)})
    model = nn.ModuleDict(
        {"body": nn.Linear(3, 4, bias=False), "head": nn.Linear(4, 9, bias=False)}
    )
    opt = EWCAdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"'head.weight' must have the parameter's shape"):
        opt.consolidate(log)
    with caplog.at_level(logging.WARNING, "cl_optim"):
        opt.consolidate(log, strict=False)
    assert caplog.messages == [
        "Consolidated with strict=False: 2 parameters match; 1 have another shape: 'head.weight'."
    ]
    assert [protected.name for protected in opt.protected()] == ["body.weight"]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        (sealed({"format": "cl_optim.ImportanceLog", "version": VERSION + 1, "cl_optim": "9.1"}),
         LogError, r"written in format 2 by cl_optim 9.1; this version reads format 1: upgrade"),
        (sealed({"format": "other"}), LogError, "is not the manifest of an importance log"),
        (b"{}\n", DamagedError, "the first line of .* is damaged"),
        (b"", DamagedError, "the first line of .* is damaged"),
        (b"\xff\xfe\n\n", DamagedError, "the first line of .* is damaged"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read(tmp_path, first, error, message):
    make_log(tmp_path)
    rest = (tmp_path / FILE).read_bytes().split(b"\n", 1)[1]
    (tmp_path / FILE).write_bytes(first + rest if first else b"")
    before = contents(tmp_path)
    for mode in ("a", "r"):
        with pytest.raises(error, match=message):
            ImportanceLog(tmp_path, mode)
    assert contents(tmp_path) == before


def record(**arguments):
    """Return a call that records importance under a new name, but for these arguments."""
    return lambda log, _: log.record(**{"task": "new", "importance": importance_of(5), **arguments})


def of(*values, **options):
    """Return a call that records these values as the importance of 'a'."""
    return record(importance={"a": torch.tensor(values, **options)})


BAD = [
    ("a mode", lambda _, folder: ImportanceLog(folder / "log", "w"),
     ValueError, r"^mode must be 'a' or 'r', not 'w'"),
    *((f"a folder of others, {mode}", lambda _, folder, mode=mode: ImportanceLog(folder, mode),
       LogError, r"is not an importance log: it has no manifest.jsonl") for mode in "ar"),
    ("a file as folder", lambda _, folder: ImportanceLog(folder / "notes.txt"),
     LogError, r"notes.txt' is a file, not a folder"),
    ("a folder in a file", lambda _, folder: ImportanceLog(folder / "notes.txt" / "below"),
     NotADirectoryError, "a log cannot be made in"),
    ("no folder to read", lambda _, folder: ImportanceLog(folder / "none", "r"),
     FileNotFoundError, "is not a folder"),
    ("an empty name", record(task=""), ValueError, "^task must be a name, not ''"),
    ("a number as name", record(task=3), ValueError, "^task must be a name, not 3"),
    ("a name twice", record(task="task 0"),
     LogError, "^task 'task 0' is in the log already: forget it first"),
    ("no parameter", record(importance={}),
     ValueError, "^importance must have at least one parameter"),
    ("a float", record(importance={"a": 1.0}),
     TypeError, r"^importance\['a'\] must be a real tensor"),
    ("a number as parameter", record(importance={3: torch.ones(2)}),
     TypeError, r"^importance\[3\] must be"),
    ("complex", of(1.0, dtype=torch.complex64), TypeError, r"^importance\['a'\] must be a real"),
    ("nan", of(1.0, math.nan),
     ValueError, "^the importance of 'a' must be finite and at least 0; it reaches from nan"),
    ("inf", of(1.0, math.inf),
     ValueError, "^the importance of 'a' must be finite.* from 1.0 to inf"),
    ("negative", of(1.0, -1.0),
     ValueError, "^the importance of 'a' must be finite.* from -1.0 to 1.0"),
    ("beyond float32", of(1e200, dtype=torch.float64),
     ValueError, "^the importance of 'a' must be finite.* to 1e[+]200"),
    *((f"a mean beyond float32, {codec}",
       record(importance=Importance({"a": torch.tensor([3e38])}, 0.5), codec=codec),
       ValueError, "must be finite") for codec in NAMES),
    ("of another model", record(importance={"a": torch.ones(2)}, model=nn.Linear(2, 2)),
     ValueError, "^the importance of 'a' is of no parameter of the model"),
    ("of another shape", record(importance={"bias": torch.ones(3)}, model=nn.Linear(2, 2)),
     ValueError, r"^the importance of 'bias' must have the parameter's shape \(2,\), not \(3,"),
    ("frozen: floats", record(frozen={"a": torch.ones(2)}),
     TypeError, r"^frozen\['a'\] must be a bool tensor"),
    ("frozen: another name", record(frozen={"a": torch.ones(2, dtype=torch.bool)}),
     ValueError, r"^frozen names 'a', which has no importance"),
    ("frozen: another shape", record(frozen={"a.bias": torch.ones(2, dtype=torch.bool)}),
     ValueError, r"^frozen\['a.bias'\] must have the importance's shape \(20,\), not \(2,\)"),
    ("anchors: a number", record(anchors={"a": 1}),
     TypeError, r"^anchors\['a'\] must be a tensor"),
    ("anchors: no checkpoint", record(anchors="none.safetensors"),
     FileNotFoundError, "anchors: there is no checkpoint"),
    ("a codec", record(codec="gzip"), ValueError, "^codec must be one of .* not 'gzip'"),
    ("merge() with decay -1", lambda log, _: log.merge(decay=-1),
     ValueError, r"^decay must be in \[0, 1\]"),
    ("merge() of no tasks", lambda _, folder: ImportanceLog(folder / "empty", "r").merge(),
     LogError, r"^there is no task to merge"),
    *((f"{name} of a log opened to read",
       lambda _, folder, call=call: call(ImportanceLog(folder / "log", "r")),
       LogError, "was opened with mode='r': only to read")
      for name, call in {
          "record()": lambda log: log.record("new", importance_of(5)),
          "forget()": lambda log: log.forget("task 0"),
          "watch()": lambda log: log.watch(EWCAdamW(nn.Linear(2, 2).named_parameters())),
      }.items()),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, given, error, message):
    log, _ = make_log(tmp_path / "log"), ImportanceLog(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with refused(error, message):
        given(log, tmp_path)
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "log", "notes.txt"]
    assert log.tasks == ["task 0", "task 1"]


def test_two_writers(tmp_path):
    log = make_log(tmp_path)
    before = contents(tmp_path)
    with locked(tmp_path):
        for call in (lambda: log.record("new", importance_of(5)), lambda: log.forget("task 0")):
            with pytest.raises(LockedError, match=rf"by another writer \(process {os.getpid()}\)"):
                call()
        assert_is(ImportanceLog(tmp_path).load("task 1"), importance_of(1))  # readers go on
    assert contents(tmp_path) == before
    other = ImportanceLog(tmp_path)
    log.record("mine", importance_of(5))
    other.record("theirs", importance_of(6))  # it sees what has been added meanwhile
    assert other.tasks == ["task 0", "task 1", "mine", "theirs"]
    with pytest.raises(LogError, match="'theirs' is in the log already"):
        log.record("theirs", importance_of(7))


# --- a disk that fails ----------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Files above 2000 bytes fail, as they do on a full disk: in the write itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_log_as_it_was(tmp_path, request):
    log = make_log(tmp_path)
    before = contents(tmp_path)
    request.getfixturevalue("small_files")
    with pytest.raises(
        OSError, match=r"task 'new' cannot be recorded in .*File too large.*; the log is as it was"
    ):
        log.record("new", importance_of(5))
    assert contents(tmp_path) == before
    assert ImportanceLog(tmp_path).tasks == ["task 0", "task 1"]


@pytest.mark.parametrize("write", [write_html, write_json, write_csv])
def test_an_export_that_fails_leaves_the_old_one(tmp_path, request, write):
    data = report_data(make_log(tmp_path / "log", tasks=12))
    path = tmp_path / "export"
    path.write_text("the old one")
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match="export' cannot be written: File too large"):
        write(data, path)
    assert path.read_text() == "the old one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "log"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir", "open"])
def test_a_disk_that_is_full_at_any_moment(tmp_path, monkeypatch, call):
    """Each call that can run out of space does so in turn."""
    log = make_log(tmp_path)
    before = contents(tmp_path)
    messages: list[str] = []
    for survived in range(100):
        with monkeypatch.context() as patch:
            calls = failing(patch, call, survived)
            try:
                log.record("new", importance_of(5))
            except OSError as error:
                messages.append(str(error))
            else:
                assert calls() <= survived
                break
        assert contents(tmp_path) == before
        assert log.tasks == ImportanceLog(tmp_path).tasks == ["task 0", "task 1"]
    assert all("No space left on device; the log is as it was" in text for text in messages)
    assert len(messages) >= {"fsync": 6, "rename": 1, "replace": 1, "mkdir": 2, "open": 5}[call]
    assert_is(ImportanceLog(tmp_path).load("new"), importance_of(5))


def failing(patch: pytest.MonkeyPatch, name: str, survived: int) -> Callable[[], int]:
    """Let the calls of one kind after so many fail with ENOSPC; returns how many there were."""
    count = 0
    owner = builtins if name == "open" else os
    original = getattr(owner, name)

    def limited(*args, **kwargs):
        nonlocal count
        reading = name == "open" and (len(args) < 2 or args[1] in ("r", "rb"))
        count += not reading
        if count > survived and not reading:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    patch.setattr(owner, name, limited)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # of Python 3.10, which holds os's own
    if hasattr(accessor, name):
        patch.setattr(accessor, name, staticmethod(limited))
    return lambda: count


def test_a_folder_that_may_only_be_read():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_log(folder / "log")
        (folder / "log" / "records" / "00009-x.partial").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.warns(UserWarning, match=r"an unfinished record was found.*00009-x"):
                log = ImportanceLog(folder / "log")
            assert_is(log.load("task 1"), importance_of(1))
            with pytest.raises(OSError, match=r"'new' cannot be recorded in .* Permission denied"):
                log.record("new", importance_of(5))
            with pytest.raises(PermissionError, match="a log cannot be made in"):
                ImportanceLog(folder / "new")
        finally:
            if root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o755)


def test_a_log_of_an_earlier_version(tmp_path):
    """Its lines have no numbers and it has no seal; what is added has both."""
    log = make_log(tmp_path, 1)
    with open(tmp_path / FILE, "rb") as file:
        entries = [unsealed(line) for line in file]
    for entry in entries:
        entry.pop("line", None)
        entry.pop("seal" if "format" in entry else "line", None)
    (tmp_path / FILE).write_bytes(b"".join(sealed(entry) for entry in entries))
    (tmp_path / SEAL).unlink()
    log = ImportanceLog(tmp_path)
    assert log.tasks == ["task 0"]
    log.record("task 1", importance_of(1))
    log.forget("task 0")
    assert ImportanceLog(tmp_path).tasks == ["task 1"]
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:-1]))
    with pytest.warns(UserWarning, match=r"^line 4 of .* is gone"):
        ImportanceLog(tmp_path)


def test_the_manifest_is_readable_text(tmp_path):
    make_log(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    entries = [json.loads(line.split(" ", 1)[1]) for line in lines]
    assert [entry.get("task") for entry in entries] == [None, "task 0", "task 1"]
