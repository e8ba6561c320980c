"""What is damaged is named and never returned."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from damage import flip, flipped
from log_cases import assert_is, importance_of, make_log, opened, weights

from cl_optim import ImportanceLog
from cl_optim.importance.errors import DamagedError, LogError
from cl_optim.importance.manifest import FILE, SEAL


@pytest.mark.parametrize("codec", ["float32", "log8", "topk"])
def test_a_flipped_bit_of_a_shard_is_always_detected(tmp_path, codec):
    """Over 500 trials, a fifth of them in headers; every other tensor is still returned, right."""
    log = ImportanceLog(tmp_path)
    log.record("task", importance_of(0), codec=codec, anchors=weights(0))
    expected = dict(log.load("task").sums)
    (shard,) = tmp_path.rglob("importance-*.safetensors")
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    size = shard.stat().st_size
    chance = random.Random(0)
    trials = 170
    for trial in range(trials):
        place = chance.randrange(header) if trial % 5 == 0 else chance.randrange(size)
        mask = 1 << chance.randrange(8)
        flip(shard, place, mask)
        loaded = ImportanceLog(tmp_path).load("task")
        damaged = []
        for name, value in expected.items():
            try:
                found = loaded[name] * loaded.samples
            except DamagedError as error:
                damaged.append(name)
                assert_names(error, name)
            else:
                torch.testing.assert_close(found, value)
        assert len(damaged) == (len(expected) if place < header else 1), (place, mask)
        flip(shard, place, mask)
    assert_same(ImportanceLog(tmp_path), expected)


def assert_names(error: DamagedError, name: str) -> None:
    assert f"the importance of {name!r} of task 'task' is damaged in " in str(error)


def assert_same(log: ImportanceLog, expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(log.load("task").sums[name], value) for name, value in expected.items())


def test_a_flipped_bit_of_a_record_table_is_always_detected(tmp_path):
    make_log(tmp_path)
    (table,) = (tmp_path / "records").glob("00002-*/record.json")
    chance = random.Random(0)
    for _ in range(200):
        place, mask = chance.randrange(table.stat().st_size), 1 << chance.randrange(8)
        flip(table, place, mask)
        log = ImportanceLog(tmp_path)
        with pytest.raises(DamagedError, match=r"record.json is damaged: its checksum"):
            log.load("task 1")
        assert_is(log.load("task 0"), importance_of(0))
        flip(table, place, mask)
    assert_is(log.load("task 1"), importance_of(1))


def test_a_flipped_bit_of_the_manifest_is_always_detected(tmp_path):
    make_log(tmp_path, 4)
    manifest = tmp_path / FILE
    lines = manifest.read_bytes().splitlines(keepends=True)
    first, second, third = len(lines[0]), sum(map(len, lines[:2])), sum(map(len, lines[:3]))
    chance = random.Random(0)
    for _ in range(100):
        place, mask = chance.randrange(first, third - 1), 1 << chance.randrange(8)
        flip(manifest, place, mask)
        # A flipped line end makes one damaged line of two.
        with pytest.warns(UserWarning, match=r"line \d of .* is damaged: a record that it lists"):
            log = ImportanceLog(tmp_path)
        lost = {0, 1} if place == second - 1 else {0} if place < second else {1}
        assert log.tasks == [f"task {number}" for number in range(4) if number not in lost]
        for number in set(range(4)) - lost:
            assert_is(log.load(f"task {number}"), importance_of(number))
        flip(manifest, place, mask)
    # Nothing was set aside, because of damage, that the undamaged manifest lists.
    assert ImportanceLog(tmp_path).tasks == [f"task {number}" for number in range(4)]
    for place in range(first):
        flip(manifest, place, 4)
        with pytest.raises(LogError, match=r"the first line of .*manifest.jsonl is damaged"):
            ImportanceLog(tmp_path)
        flip(manifest, place, 4)


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_manifest_cut_between_lines_is_noticed(tmp_path, kept, mode):
    """Else a task that was forgotten would be protected again, without a word."""
    log = make_log(tmp_path, 3)
    log.forget("task 0")
    seal = (tmp_path / SEAL).read_bytes()
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:kept]))
    for _ in range(2):
        log, remarks = opened(tmp_path, mode)
        assert log.tasks == [f"task {number}" for number in range(kept - 1)]
        assert remarks == [
            f"line {number} of {tmp_path / FILE} is gone: a record that it lists is left out, a "
            "task that it forgets is protected again."
            for number in range(kept + 1, 6)
        ]
    if mode == "a":  # what is added does not cover it
        log.record("new", importance_of(5))
        assert opened(tmp_path, "r")[1] == remarks
    (tmp_path / FILE).write_bytes(b"".join(lines))
    (tmp_path / SEAL).write_bytes(seal)
    log, remarks = opened(tmp_path, mode)
    assert log.tasks == ["task 1", "task 2"]
    assert not any("is gone" in remark for remark in remarks)
    for number in (1, 2):  # nothing was set aside that the whole manifest lists
        assert_is(log.load(f"task {number}"), importance_of(number))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], lines[3]],
        lambda lines: [lines[0], lines[1], lines[1], lines[3]],
    ],
)
def test_lines_taken_out_swapped_or_repeated_are_noticed(tmp_path, change):
    make_log(tmp_path, 3)
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(change(lines)))
    with pytest.warns(UserWarning, match=r"^line \d of .* is gone"):
        ImportanceLog(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"anything", b"\xff\n"])
def test_a_seal_that_is_gone_or_damaged(tmp_path, content):
    make_log(tmp_path)
    if content is None:
        (tmp_path / SEAL).unlink()
    else:
        (tmp_path / SEAL).write_bytes(content)
    with pytest.warns(UserWarning, match=r"^.*manifest.seal is gone or damaged: whether lines"):
        log = ImportanceLog(tmp_path)
    assert log.tasks == ["task 0", "task 1"]
    log.forget("task 1")
    assert ImportanceLog(tmp_path).tasks == ["task 0"]


def test_any_byte_of_a_log_and_any_cut(tmp_path):
    """What is loaded is what was recorded, and what is not is named, by the log's own error."""
    values = {"a": torch.rand(3), "b": torch.rand(2)}
    log = ImportanceLog(tmp_path / "log")
    for task in ("one", "two"):
        log.record(task, values, anchors=values, frozen={"a": torch.tensor([True, False, True])})
    log.forget("two")
    chance = random.Random(0)
    files = [path for path in sorted(log.path.rglob("*")) if path.is_file()]
    assert len(files) == 3 + 2 * 4
    for path in files[:7]:  # those of the second record are like those of the first
        content = path.read_bytes()
        cuts = [content[:length] for length in range(len(content))]
        for place in range(len(content)):
            cuts.append(flipped(content, place, 1 << chance.randrange(8)))
        for damaged in cuts:
            path.write_bytes(damaged)
            named = loaded_or_named(log.path, values)
            is_completed = path.name == FILE and damaged[: len(content) - 1] == content[:-1]
            assert named or is_completed or path.name == "lock", damaged
        path.write_bytes(content)
    assert loaded_or_named(log.path, values) == []


def loaded_or_named(path: Path, values: dict[str, torch.Tensor]) -> list[str]:
    """Load all that can be loaded, bit for bit; returns the errors and warnings."""
    try:
        log, remarks = opened(path, "r")
    except LogError as error:
        remarks = [str(error)]
    else:
        assert log.tasks in (["one"], ["one", "two"], ["two"], [])
        assert log.tasks == ["one"] or remarks
        for task in log.tasks:
            try:
                record = log[task]
                for found in (record.importance(), record.anchors()):
                    assert all(torch.equal(found[name], value) for name, value in values.items())
                assert record.frozen()["a"].tolist() == [True, False, True]
            except LogError as error:
                remarks.append(str(error))
    assert all(str(path) in remark for remark in remarks), remarks
    return remarks


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"the file has .* bytes, not"),
        (lambda path: path.write_bytes(b""), "the file has 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "the file has"),
        (lambda path: path.unlink(), "the file is gone"),
    ],
)
def test_a_truncated_or_missing_file(tmp_path, damage, reason):
    log = make_log(tmp_path)
    log.record("new", importance_of(3), anchors=weights(3), frozen=importance_of(3).top(0.5))
    for kind, what in (("importance", "importance"), ("anchors", "anchor"), ("frozen", "frozen ")):
        (shard,) = (tmp_path / "records").glob(f"00003-*/{kind}-00001.safetensors")
        damage(shard)
        record = ImportanceLog(tmp_path)["new"]
        with pytest.raises(DamagedError, match=rf"^the {what}.*'a.bias' of task 'new' .*{reason}"):
            getattr(record, kind)()["a.bias"]
    with pytest.raises(DamagedError):
        ImportanceLog(tmp_path).merge()
    assert_is(log.load("task 1"), importance_of(1))


def test_a_file_truncated_after_its_first_use(tmp_path):
    """Its pages are mapped: reading one that is gone would end the process."""
    log = ImportanceLog(tmp_path)
    log.record("a", {name: torch.rand(5000) for name in "xyz"})
    importance = log.load("a")
    assert importance["x"].shape == (5000,)
    (shard,) = (tmp_path / "records").rglob("*.safetensors")
    os.truncate(shard, 1000)
    with pytest.raises(DamagedError, match=r"the importance of 'z' .* the file has 1,000 bytes"):
        importance["z"]


def test_a_missing_record(tmp_path):
    log = make_log(tmp_path)
    (table,) = (tmp_path / "records").glob("00001-*/record.json")
    table.unlink()
    with pytest.raises(DamagedError, match=r"record.json cannot be read: No such file"):
        log.load("task 0")
    assert_is(log.load("task 1"), importance_of(1))


def test_swapped_shards_are_detected(tmp_path):
    """Two whole files of one size in each other's place."""
    log = make_log(tmp_path)
    one, two = sorted(tmp_path.rglob("importance-*.safetensors"))
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    assert len(one_bytes) == len(two_bytes)
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    for task in log.tasks:
        with pytest.raises(DamagedError, match="its checksum is not the one that was written"):
            ImportanceLog(tmp_path).load(task)["a.bias"]
