"""A writer that is killed at any instant loses at most the record that it was writing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from log_cases import SCALE, assert_is, importance_of, make_log, opened, record_until_killed

from cl_optim import ImportanceLog
from cl_optim.importance import record
from cl_optim.importance.checksums import unsealed
from cl_optim.importance.manifest import FILE, SEAL

KILLS = 200


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cl_optim", "pytest"])
    return context


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: whoever else uses the disk does not slow it down."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as name:
        yield Path(name)


def test_kill_at_random_instants(memory, processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    instants = random.Random(0)
    path = memory / "log"
    known: list[str] = []
    unfinished = 0
    seconds = processes.RawValue("d", 0.03)  # of a record, on this machine at this moment
    for kill in range(KILLS):
        started = processes.Event()
        writer = processes.Process(
            target=record_until_killed, args=(str(path), len(known), started, seconds)
        )
        writer.start()
        assert started.wait(60)
        if kill % 20 == 0:  # however slow the machine is, some records are finished
            while (path / FILE).read_bytes().count(b"\n") <= len(known) + 1:
                assert writer.is_alive()
        time.sleep(instants.uniform(0, 3 * min(seconds.value, 0.03)))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        left = [folder.name for folder in (path / "records").glob("*")] if known else None
        log, messages = opened(path)
        # Nothing that was recorded is gone, and nothing but what its writer finished is there.
        assert log.tasks[: len(known)] == known
        assert log.tasks == [f"task {number}" for number in range(len(log.tasks))]
        for number in {0, *range(len(known), len(log.tasks))} & set(range(len(log.tasks))):
            assert_is(log.load(f"task {number}"), importance_of(number, SCALE))
        # What was not finished is reported once, and set aside.
        aside = len(list((path / "unfinished").glob("*")))
        assert len(messages) == aside - unfinished
        assert all("an unfinished record was found" in message for message in messages)
        assert left is None or len(left) == len(log.tasks) + len(messages)
        unfinished, known = aside, log.tasks
    assert unfinished >= KILLS / 20  # the kills did hit the middle of records
    assert len(known) >= KILLS / 20
    for number in range(len(known)):
        assert_is(log.load(f"task {number}"), importance_of(number, SCALE))


@pytest.mark.parametrize("keep", [0, 1, 30, -2])
def test_half_a_line_at_the_end_is_cut_off(tmp_path, keep):
    """As a crash leaves it that comes after the record's folder is in place."""
    log = make_log(tmp_path, 1)
    seal = (tmp_path / SEAL).read_bytes()
    log.record("task 1", importance_of(1))
    (tmp_path / SEAL).write_bytes(seal)
    manifest = tmp_path / FILE
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    log, messages = opened(tmp_path)
    assert log.tasks == ["task 0"]
    assert len(messages) == 1
    assert "an unfinished record was found" in messages[0]
    assert opened(tmp_path)[1] == []
    log.record("task 1", importance_of(4))
    assert_is(ImportanceLog(tmp_path).load("task 0"), importance_of(0))
    assert_is(ImportanceLog(tmp_path).load("task 1"), importance_of(4))


@pytest.mark.parametrize("end", [b"", b"x", b"\x8a"])
@pytest.mark.parametrize("event", ["record", "forget"])
def test_a_line_whose_end_alone_is_lost_counts(tmp_path, event, end):
    """Else a task that was to be forgotten would be protected again, without a word."""
    log = make_log(tmp_path)
    if event == "forget":
        log.forget("task 0")
    tasks = log.tasks
    manifest = tmp_path / FILE
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-1] + end)
    again, messages = opened(tmp_path)
    assert (again.tasks, messages) == (tasks, [])
    again.record("task 2", importance_of(2))
    assert manifest.read_bytes().startswith(whole)
    assert ImportanceLog(tmp_path).tasks == [*tasks, "task 2"]


@pytest.mark.parametrize("event", ["record", "forget"])
def test_a_crash_between_a_line_and_its_seal(tmp_path, event):
    """The line counts, and the next one is sealed with it."""
    log = make_log(tmp_path)
    seal = (tmp_path / SEAL).read_bytes()
    if event == "record":
        log.record("task 2", importance_of(2))
    else:
        log.forget("task 0")
    (tmp_path / SEAL).write_bytes(seal)
    again, messages = opened(tmp_path)
    assert (again.tasks, messages) == (log.tasks, [])
    again.record("new", importance_of(3))
    assert unsealed((tmp_path / SEAL).read_bytes()) == {"lines": 5}
    assert opened(tmp_path)[1] == []


def test_an_interruption_after_the_seal_comes_too_late(tmp_path, monkeypatch):
    """What is sealed stays: a line less would look like damage."""
    log = make_log(tmp_path)
    original = os.replace

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.record("task 2", importance_of(2))
    again, messages = opened(tmp_path)
    assert (again.tasks, messages) == (["task 0", "task 1", "task 2"], [])
    assert_is(again.load("task 2"), importance_of(2))
    log.record("task 3", importance_of(3))
    assert opened(tmp_path)[0].tasks == log.tasks == [f"task {number}" for number in range(4)]
    assert opened(tmp_path)[1] == []


def test_a_crash_while_a_log_is_made(tmp_path):
    """Its seal is there, its manifest is not yet."""
    ImportanceLog(tmp_path)
    (tmp_path / FILE).unlink()
    log, messages = opened(tmp_path)
    assert (log.tasks, messages) == ([], [])


def test_a_stray_file_is_no_record(tmp_path):
    make_log(tmp_path)
    (tmp_path / "records" / ".DS_Store").touch()
    assert opened(tmp_path)[1] == []
    assert (tmp_path / "records" / ".DS_Store").exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path, monkeypatch):
    """A data loader's workers, begun while another thread records."""
    log = ImportanceLog(tmp_path)
    original, children = record.write, []

    def write(*arguments):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
            os._exit(0)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(record, "write", write)
        log.record("a", importance_of(0))
    try:
        log.record("b", importance_of(1))
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
    assert log.tasks == ["a", "b"]


def test_several_threads_make_one_log(tmp_path):
    for number in range(20):
        with ThreadPoolExecutor(4) as pool:
            logs = list(pool.map(ImportanceLog, [tmp_path / f"log {number}"] * 4))
        assert [len(log) for log in logs] == [0] * 4


def test_a_reader_reports_and_moves_nothing(tmp_path):
    make_log(tmp_path)
    left = tmp_path / "records" / "00007-abc.partial"
    left.mkdir()
    with pytest.warns(UserWarning, match=r"an unfinished record was found.*00007-abc.partial"):
        ImportanceLog(tmp_path, "r")
    assert left.is_dir()


def test_the_record_of_a_writer_at_work_is_left_alone(tmp_path, processes):
    started, seconds = processes.Event(), processes.RawValue("d", 0.0)
    writer = processes.Process(
        target=record_until_killed, args=(str(tmp_path), 0, started, seconds)
    )
    writer.start()
    try:
        assert started.wait(60)
        while len(ImportanceLog(tmp_path, "r").tasks) < 20:
            assert writer.is_alive()  # readers do not disturb it
            for mode in ("a", "r"):
                log, messages = opened(tmp_path, mode)
                assert messages == []
                if log.tasks:
                    last = len(log.tasks) - 1
                    assert_is(log.load(f"task {last}"), importance_of(last, SCALE))
    finally:
        writer.kill()
        writer.join()
    log, _ = opened(tmp_path)
    assert len(log.tasks) >= 20
    assert len(list((tmp_path / "unfinished").glob("*"))) <= 1
