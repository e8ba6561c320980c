"""The replay buffer: which samples it keeps, what it draws, and that it goes on where it was."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter, UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from damage import flipped
from paths import ROOT
from scipy import stats
from torch import nn

import cl_optim
from cl_optim.importance.errors import DamagedError, LockedError
from cl_optim.retention import ReplayBuffer


def start(code, *arguments, cwd=ROOT):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)


def run(code, *arguments, cwd=ROOT):
    with start(code, *arguments, cwd=cwd) as process:
        out, errors = process.communicate()
    return subprocess.CompletedProcess(code, process.returncode, out, errors)


def assert_same_state(found, expected):
    for key, value in expected.items():
        if key != "samples":
            same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
            assert same, key


def numbers(first, last):
    return torch.arange(first, last)


def kept(buffer):
    return sorted(buffer.samples().tolist())


def fill(buffer, batches=6, size=7):
    for i in range(batches):
        x = numbers(size * i, size * (i + 1))
        buffer.add({"x": x.double().view(-1, 1).expand(-1, 3), "y": (x % 3, x.bfloat16())})


def filled(path=None):
    buffer = ReplayBuffer(12, path=path)
    fill(buffer)
    return buffer


class TestPolicies:
    def test_reservoir_is_uniform(self):
        runs, capacity, total = 1000, 8, 32
        counts = np.zeros(total)
        for seed in range(runs):
            buffer = ReplayBuffer(capacity, seed=seed)
            for first, last in ((0, 5), (5, 20), (20, 21), (21, total)):
                buffer.add(numbers(first, last))
            counts[buffer.samples().numpy()] += 1
        expected = runs * capacity / total
        # A sample is in or out, hence the variance of a binomial; without replacement, the sum over
        # samples has total − 1 degrees of freedom after the factor (total − 1)/total.
        variance = expected * (1 - capacity / total) * total / (total - 1)
        chi2 = ((counts - expected) ** 2 / variance).sum()
        assert stats.chi2.sf(chi2, total - 1) > 1e-3

    def test_reservoir_of_everything(self):
        buffer = ReplayBuffer(10)
        buffer.add(numbers(0, 10))
        assert buffer.samples().tolist() == list(range(10))

    @pytest.mark.parametrize("sizes", [(3, 4, 5), (25,), (4, 9)])
    def test_ring_keeps_the_newest(self, sizes):
        buffer, total = ReplayBuffer(4, policy="ring"), 0
        for size in sizes:
            buffer.add(numbers(total, total + size))
            total += size
        assert kept(buffer) == list(range(total - 4, total))

    def test_class_balanced(self):
        classes = torch.tensor([0] * 300 + [1] * 40 + [2] * 12 + [3] * 2)
        classes = classes[torch.randperm(354, generator=torch.Generator().manual_seed(1))]
        buffer = ReplayBuffer(40, policy="class_balanced", label="y")
        for part in torch.split(torch.arange(354), 30):
            buffer.add({"x": part, "y": classes[part]})
        batch = buffer.samples()
        assert torch.equal(batch["y"], classes[batch["x"]])
        assert len(set(batch["x"].tolist())) == 40
        assert Counter(batch["y"].tolist()) == {0: 13, 1: 13, 2: 12, 3: 2}

    def test_class_balanced_is_uniform_within_a_class(self):
        runs, total, capacity = 1000, 24, 4
        counts = np.zeros((2, total))
        classes = torch.arange(2).repeat(total)
        for seed in range(runs):
            buffer = ReplayBuffer(capacity, policy="class_balanced", label=1, seed=seed)
            buffer.add((numbers(0, 2 * total), classes))
            x, y = buffer.samples()
            counts[y, x // 2] += 1
        share = counts.sum(axis=1) / runs / total
        variance = runs * share * (1 - share) * total / (total - 1)
        chi2 = ((counts - runs * share[:, None]) ** 2 / variance[:, None]).sum(axis=1)
        assert (stats.chi2.sf(chi2, total - 1) > 1e-3).all()


class TestDraws:
    def test_are_distinct_and_uniform(self):
        buffer = ReplayBuffer(40)
        buffer.add(numbers(0, 40))
        for n in (3, 35, 40):
            assert len(set(buffer.sample(n).tolist())) == n
        counts = np.bincount([v for _ in range(1000) for v in buffer.sample(4).tolist()])
        variance = 4000 / 40 * (1 - 4 / 40) * 40 / 39
        assert stats.chi2.sf(((counts - 100) ** 2 / variance).sum(), 39) > 1e-3

    def test_structure_dtypes_and_values(self):
        buffer = ReplayBuffer(100)
        fill(buffer)
        batch = buffer.sample(20)
        x, (remainder, half) = batch["x"], batch["y"]
        assert (x.dtype, x.shape) == (torch.float64, (20, 3))
        assert torch.equal(x[:, 0].long() % 3, remainder)
        assert torch.equal(x[:, 0].bfloat16(), half)

    def test_a_seed_fixes_them(self):
        first, again, other = (ReplayBuffer(10, seed=seed) for seed in (3, 3, 4))
        for buffer in (first, again, other):
            buffer.add(numbers(0, 100))
        assert torch.equal(first.sample(8), again.sample(8))
        assert kept(first) == kept(again) != kept(other)

    def test_do_not_depend_on_other_generators(self):
        streams = []
        for noise in (0, 1):
            torch.manual_seed(noise)
            buffer = ReplayBuffer(10)
            buffer.add(numbers(0, 100))
            streams.append(buffer.sample(5).tolist())
        assert streams[0] == streams[1]


class TestMix:
    def test_adds_the_share_and_keeps_what_is_new(self):
        buffer = ReplayBuffer(50)
        buffer.add(numbers(0, 50))
        new = list(torch.split(numbers(100, 250), 10))
        mixed = buffer.mix(new, 0.25)
        batches = list(mixed)
        assert len(mixed) == len(batches) == 15
        assert all(torch.equal(b[:10], n) for b, n in zip(batches, new, strict=True))
        replayed = [len(batch) - 10 for batch in batches]
        assert replayed[:3] == [3, 3, 4]  # 10/3 each: fractions carry over
        assert sum(replayed) == 50
        assert all((batch[10:] < 50).all() for batch in batches)

    def test_of_a_real_loader_with_its_lists(self):
        x, y = torch.randn(20, 3), torch.arange(20)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
        buffer = ReplayBuffer(8)
        buffer.add((x, y))
        for a, b in buffer.mix(loader, 0.5):
            assert a.shape == (10, 3)
            assert torch.equal(a, x[b])

    def test_batches_keep_their_kinds(self):
        class Pair(NamedTuple):
            x: torch.Tensor
            more: list[torch.Tensor]

        batches = [Pair(numbers(i, i + 2), [numbers(0, 2)]) for i in range(4)]
        buffer = ReplayBuffer(8)
        buffer.add(batches[0])
        for batch in buffer.mix(batches, 0.25):  # not every one gets a replayed sample
            assert type(batch) is Pair
            assert type(batch.more) is list
        words = UserDict(ids=numbers(0, 4))
        other = ReplayBuffer(8)
        other.add(words)
        (batch,) = other.mix([words], 0.5)
        assert type(batch) is UserDict
        assert len(batch["ids"]) == 8
        assert len(words["ids"]) == 4  # the loader's own is as it was

    def test_of_an_empty_buffer_is_the_loader(self):
        assert next(iter(ReplayBuffer(5).mix([numbers(0, 3)], 0.5))).tolist() == [0, 1, 2]

    def test_from_few_samples_draws_some_twice(self):
        buffer = ReplayBuffer(5)
        buffer.add(numbers(0, 2))
        (batch,) = buffer.mix([numbers(10, 20)], 0.5)
        assert len(batch) == 20
        assert set(batch[10:].tolist()) == {0, 1}


@pytest.mark.parametrize("disk", [False, True])
class TestResume:
    @pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "ring"])
    def test_goes_on_with_the_same_stream(self, tmp_path, policy, disk):
        options = {"capacity": 12, "policy": policy}
        options["label"] = (lambda batch: batch["y"][0]) if policy == "class_balanced" else None

        def go_on(buffer):
            stream = []
            for i in range(5):
                fill(buffer, batches=1, size=9 + i)
                stream += [buffer.sample(3)["x"], buffer.samples()["x"]]
                stream += [b["x"] for b in buffer.mix([buffer.samples()], 0.3)]
            return stream

        def path(name):
            return tmp_path / name if disk else None

        buffer = ReplayBuffer(**options, path=path("first"))
        fill(buffer)
        list(buffer.mix([buffer.samples()], 0.3))
        torch.save(buffer.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        if disk:  # another process would open copies of the same files
            import shutil

            shutil.copytree(path("first"), path("second"))
        resumed = ReplayBuffer(**options, path=path("second"), seed=99)
        resumed.load_state_dict(state)
        assert (len(resumed), resumed.seen) == (12, 42)
        for a, b in zip(go_on(buffer), go_on(resumed), strict=True):
            assert torch.equal(a, b)


class TestDisk:
    def test_equals_memory(self, tmp_path):
        memory, disk = ReplayBuffer(12), ReplayBuffer(12, path=tmp_path)
        fill(memory)
        fill(disk)
        for a, b in ((memory.samples(), disk.samples()), (memory.sample(5), disk.sample(5))):
            assert torch.equal(a["x"], b["x"])
            assert torch.equal(a["y"][1], b["y"][1])
        assert (tmp_path / "samples.bin").stat().st_size == 12 * (2 + 8 + 24)

    @pytest.mark.parametrize("loads", [False, True])
    def test_fields_may_come_in_another_order(self, tmp_path, loads):
        ids, mask = torch.arange(20).view(4, 5), torch.ones(4, 5, dtype=torch.long)
        memory, disk = ReplayBuffer(16), ReplayBuffer(16, path=tmp_path)
        for buffer in (memory, disk):
            buffer.add({"ids": ids, "mask": mask})
            buffer.add({"mask": mask, "ids": ids + 20})
        if loads:
            disk.load_state_dict(disk.state_dict())
        disk.close()
        again = ReplayBuffer(16, path=tmp_path)
        again.add({"mask": mask, "ids": ids + 40})
        memory.add({"mask": mask, "ids": ids + 40})
        again.close()
        with ReplayBuffer(16, path=tmp_path, read_only=True) as last:
            found = last.samples()
        assert torch.equal(found["mask"], torch.ones(12, 5, dtype=torch.long))
        assert torch.equal(found["ids"], torch.arange(60).view(12, 5))
        assert torch.equal(memory.samples()["ids"], found["ids"])

    def test_survives_its_process(self, tmp_path):
        disk = filled(tmp_path)
        disk.close()
        again = ReplayBuffer(12, path=tmp_path)
        assert torch.equal(again.samples()["x"], disk.samples()["x"])
        assert torch.equal(again.sample(5)["x"], disk.sample(5)["x"])

    def test_killed_before_a_flush_says_so(self, tmp_path):
        code = (
            "import os, signal, sys, torch; from cl_optim.retention import ReplayBuffer\n"
            "b = ReplayBuffer(5, path=sys.argv[1]); b.add(torch.arange(5)); b.flush()\n"
            "b.add(torch.arange(50)); os.kill(os.getpid(), signal.SIGKILL)"
        )
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
        assert result.returncode == -9
        with pytest.raises(ValueError, match="not flushed"):
            ReplayBuffer(5, path=tmp_path)

    def test_a_state_older_than_the_files_is_refused(self, tmp_path):
        disk = filled(tmp_path)
        state = disk.state_dict()
        fill(disk)
        with pytest.raises(ValueError, match="changed since"):
            disk.load_state_dict(state)

    def test_a_lost_or_cut_file_is_not_a_file_of_zeros(self, tmp_path):
        disk = filled(tmp_path)
        disk.close()
        os.truncate(tmp_path / "samples.bin", 7)
        with pytest.raises(DamagedError, match="sample 3 of the buffer is damaged"):
            disk._take(torch.tensor([3]))  # a mapped file would end the process
        with pytest.raises(ValueError, match=r"samples.bin' has 7 bytes, not \d+: its samples"):
            ReplayBuffer(12, path=tmp_path)
        (tmp_path / "samples.bin").unlink()
        with pytest.raises(ValueError, match=r"samples.bin' is gone: its samples are lost"):
            ReplayBuffer(12, path=tmp_path)

    def test_a_corrupt_state_and_another_capacity(self, tmp_path):
        disk = filled(tmp_path)
        disk.close()
        with pytest.raises(ValueError, match="capacity=13"):
            ReplayBuffer(13, path=tmp_path)
        (tmp_path / "state.pt").write_bytes(b"no")
        with pytest.raises(DamagedError, match=r"state\.pt ends without a checksum"):
            ReplayBuffer(12, path=tmp_path)

    def test_a_buffer_without_checksums_is_refused(self, tmp_path):
        (tmp_path / "state.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="of an earlier version of cl_optim, without checksum"):
            ReplayBuffer(12, path=tmp_path)

    def test_every_damaged_sample_is_named_and_the_others_are_read(self, tmp_path):
        disk = filled(tmp_path)
        whole, (file, size) = disk.samples(), (tmp_path / "samples.bin", 24 + 8 + 2)
        data = file.read_bytes()
        for place in range(len(data)):
            file.write_bytes(flipped(data, place, 1 << place % 8))
            slot = place // size
            with pytest.raises(DamagedError, match=f"sample {slot} of .*samples.bin', from byte"):
                disk._take(torch.tensor([slot]))
            others = torch.tensor([i for i in range(12) if i != slot])
            assert torch.equal(disk._take(others)["x"], whole["x"][others])

    def test_every_damaged_byte_of_the_state_is_noticed(self, tmp_path):
        disk = filled(tmp_path)
        disk.close()
        data = (tmp_path / "state.pt").read_bytes()
        for place in range(0, len(data), 29):
            (tmp_path / "state.pt").write_bytes(flipped(data, place, 1 << place % 8))
            with pytest.raises(DamagedError, match=r"state\.pt"):
                ReplayBuffer(12, path=tmp_path)

    def test_all_dtypes_and_shapes_come_back(self, tmp_path):
        dtypes = [
            *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16),
            *(torch.float32, torch.float64, torch.complex64, torch.complex128),
        ]
        batch = {
            str(dtype): (torch.randn(9, *shape, dtype=torch.float64) * 3).to(dtype)
            for dtype, shape in zip(dtypes, [(), (3,), (2, 0), (1, 2)] * 3, strict=False)
        }
        batch["conjugate"] = torch.randn(9, 2, dtype=torch.complex64).conj()
        disk, memory = ReplayBuffer(5, path=tmp_path), ReplayBuffer(5)
        disk.add(batch)
        memory.add(batch)
        for key, values in memory.samples().items():
            assert torch.equal(disk.samples()[key], values)

    def test_is_flushed_at_the_normal_end_of_process_and_buffer(self, tmp_path):
        code = """if True:
            import sys, torch; from cl_optim.retention import ReplayBuffer
            kept = ReplayBuffer(5, path=sys.argv[1])
            kept.add(torch.arange(5))
        """
        assert run(code, tmp_path).returncode == 0
        again = ReplayBuffer(5, path=tmp_path)
        assert again.samples().tolist() == [0, 1, 2, 3, 4]
        again.add(torch.arange(50))
        expected = again.samples()
        del again
        with ReplayBuffer(5, path=tmp_path) as third:
            assert torch.equal(third.samples(), expected)
            third.add(torch.arange(3))
        assert ReplayBuffer(5, path=tmp_path).seen == 58


class TestOneFolder:
    """Two buffers that add would destroy each other's samples."""

    def test_has_one_buffer_and_the_error_names_it(self, tmp_path):
        first = filled(tmp_path)
        before = first.state_dict()
        with pytest.raises(
            LockedError,
            match=rf"in use by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-.*"
            rf'\(this process\): close\(\) .* path=f"{tmp_path}/rank{{rank}}"',
        ):
            ReplayBuffer(12, path=tmp_path)
        assert torch.equal(first.state_dict()["adding"], before["adding"])
        fill(first)
        first.close()
        with pytest.raises(RuntimeError, match=r"only draws .* was closed"):
            fill(first)
        assert ReplayBuffer(12, path=tmp_path).seen == first.seen == 84

    def test_of_two_processes_one_is_refused_until_the_other_is_killed(self, tmp_path):
        code = """if True:
            import os, sys, time, torch; from cl_optim.retention import ReplayBuffer
            buffer = ReplayBuffer(5, path=sys.argv[1])
            buffer.add(torch.arange(5))
            buffer.flush()
            child = os.fork()  # has the descriptors of the files that its parent has open
            if child == 0:
                buffer.samples()
                time.sleep(60)
            print(child, flush=True)
            time.sleep(60)
        """
        with start(code, tmp_path) as process:
            child = int(process.stdout.readline())
            with pytest.raises(LockedError, match=f"in use by process {process.pid} on .* since"):
                ReplayBuffer(5, path=tmp_path)
            with pytest.raises(LockedError, match=f"in use by process {process.pid} on "):
                ReplayBuffer(5, path=tmp_path, read_only=True)
            process.kill()
            process.wait()
            try:
                assert ReplayBuffer(5, path=tmp_path).samples().tolist() == [0, 1, 2, 3, 4]
            finally:
                os.kill(child, signal.SIGKILL)

    def test_a_forked_child_draws_and_neither_adds_nor_unlocks(self, tmp_path):
        code = """if True:
            import os, sys, torch; from cl_optim.retention import ReplayBuffer
            buffer = ReplayBuffer(5, path=sys.argv[1])
            buffer.add(torch.arange(5))
            if os.fork() == 0:
                assert buffer.samples().tolist() == [0, 1, 2, 3, 4]
                try:
                    buffer.add(torch.arange(5))
                except RuntimeError as error:
                    assert "in a forked process" in str(error)
                else:
                    raise SystemExit("it adds")
                buffer.close()
                raise SystemExit  # in the normal way, with all that is done at exit
            assert os.wait()[1] == 0
            try:
                ReplayBuffer(5, path=sys.argv[1])
            except ValueError as error:
                assert "in use by" in str(error)
            else:
                raise SystemExit("it is unlocked")
            buffer.add(torch.arange(5))
        """
        result = run(code, tmp_path)
        assert result.returncode == 0, result.stderr
        assert ReplayBuffer(5, path=tmp_path).seen == 10

    @pytest.mark.parametrize(
        "copied", [copy.copy, copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))]
    )
    def test_copies_on_disk_only_draw(self, tmp_path, copied):
        buffer = filled(tmp_path)
        other = copied(buffer)
        assert torch.equal(other.samples()["x"], buffer.samples()["x"])
        assert torch.equal(other.sample(5)["x"], buffer.sample(5)["x"])
        with pytest.raises(RuntimeError, match=r"is a copy .* add to that one"):
            fill(other)
        del other
        fill(buffer, batches=9)
        other = copied(buffer)
        fill(buffer, batches=9)
        with pytest.raises(DamagedError, match="Or samples were added to it since this copy"):
            other.samples()

    @pytest.mark.parametrize(
        "copied", [copy.copy, copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))]
    )
    def test_copies_in_memory_are_independent(self, copied):
        buffer = filled()
        before = buffer.samples()["x"]
        other = copied(buffer)
        drawn = buffer.sample(5)["x"]
        assert torch.equal(other.sample(5)["x"], drawn)
        fill(other, batches=20)
        assert torch.equal(buffer.samples()["x"], before)
        assert buffer.seen == 42

    def test_has_any_number_of_readers(self, tmp_path):
        writer = filled(tmp_path)
        writer.close()
        readers = [ReplayBuffer(12, path=tmp_path, read_only=True, seed=seed) for seed in (1, 2, 1)]
        assert all(torch.equal(r.samples()["x"], writer.samples()["x"]) for r in readers)
        drawn = [reader.sample(6)["x"] for reader in readers]
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[1])
        with pytest.raises(RuntimeError, match="opened with read_only=True"):
            fill(readers[0])
        with pytest.raises(LockedError, match="is being read by other buffers: close"):
            ReplayBuffer(12, path=tmp_path)
        state = readers[0].state_dict()
        following = readers[0].sample(6)["x"]
        readers[2].load_state_dict(state)
        assert torch.equal(readers[2].sample(6)["x"], following)
        for reader in readers:
            reader.close()
        fill(ReplayBuffer(12, path=tmp_path))


class TestFullDisk:
    """Or one that fails otherwise, or an interruption: the buffer is as it was."""

    def test_the_room_is_taken_first(self, tmp_path, monkeypatch):
        def full(descriptor, offset, length):
            os.ftruncate(descriptor, length // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        buffer = ReplayBuffer(1000, path=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(
                OSError, match=r"samples.bin' .* No space left on device, of 34,000 bytes .* capac"
            ):
                fill(buffer)
        assert (len(buffer), buffer.seen) == (0, 0)
        assert sorted(os.listdir(tmp_path)) == ["lock"]
        fill(buffer)
        assert len(buffer) == 42

    def test_a_file_system_that_is_full(self, tmp_path):
        """A real one of 256 kB, which another file fills."""
        code = """if True:
            import os, sys, torch; from cl_optim.retention import ReplayBuffer
            try:
                ReplayBuffer(100, path=sys.argv[1] + "/a").add(torch.zeros(100, 10_000))
            except OSError as error:
                assert "No space left on device, of 4,000,000 bytes" in str(error)
            else:
                raise SystemExit("no error")
            buffer = ReplayBuffer(100, path=sys.argv[1] + "/b")
            buffer.add(torch.ones(1, 400))
            try:
                with open(sys.argv[1] + "/rest", "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass
            buffer.add(torch.ones(99, 400))
            assert (buffer.samples() == 1).all()
            os.remove(sys.argv[1] + "/rest")
        """
        mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path} && exec "
        script = mount + shlex.join([sys.executable, "-c", code, str(tmp_path)])
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
        allowed = subprocess.run([*command[:-1], "mount -t tmpfs tmpfs /mnt"], check=False)
        if allowed.returncode:
            pytest.skip("no file system can be mounted here")
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "ring"])
    @pytest.mark.parametrize("survived", [0, 1, 3])
    def test_a_write_that_fails(self, tmp_path, monkeypatch, policy, survived):
        options = {"label": lambda batch: batch["y"][0]} if policy == "class_balanced" else {}
        buffer = ReplayBuffer(12, path=tmp_path, policy=policy, **options)
        fill(buffer, batches=1)
        before, samples = buffer.state_dict(), buffer.samples()
        left, pwrite = [survived], os.pwrite

        def failing(*args):
            if left[0] == 0:
                left[0] = 99
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left[0] -= 1
            return pwrite(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing)
            with pytest.raises(OSError, match=r"samples.bin' cannot be written: Input/output"):
                fill(buffer, batches=4)
        assert_same_state(buffer.state_dict(), before)
        assert torch.equal(buffer.samples()["y"][1], samples["y"][1])
        fill(buffer, batches=4)

    @pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "ring"])
    def test_an_interruption_in_memory(self, monkeypatch, policy):
        options = {"label": lambda batch: batch["y"][0]} if policy == "class_balanced" else {}
        buffer = ReplayBuffer(12, policy=policy, **options)
        fill(buffer, batches=2)
        before = buffer.state_dict()
        put, calls = torch.Tensor.__setitem__, []

        def interrupted(self, index, value):
            calls.append(index)
            if len(calls) == 2:
                raise KeyboardInterrupt
            put(self, index, value)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__setitem__", interrupted)
            with pytest.raises(KeyboardInterrupt):
                buffer.add(buffer.samples())
        after = buffer.state_dict()
        assert_same_state(after, before)
        for place, values in before["samples"].items():
            assert torch.equal(after["samples"][place], values)


DRAWING = """
import sys, torch
from cl_optim.retention import ReplayBuffer
from torch.utils.data import DataLoader, IterableDataset

class Drawn(IterableDataset):
    def __init__(self, *buffers):
        self.buffers = buffers

    def __iter__(self):
        for _ in range(3):
            yield [buffer.sample(10) for buffer in self.buffers]

def epoch(seed):
    loader = DataLoader(
        Drawn(memory, disk), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[2],
        generator=torch.Generator().manual_seed(seed),
    )
    return [tuple(sorted(drawn.tolist())) for both in loader for drawn in both]

if __name__ == "__main__":
    memory, disk = ReplayBuffer(1000), ReplayBuffer(1000, path=sys.argv[1], seed=7)
    for buffer in (memory, disk):
        buffer.add(torch.arange(1000))
    first = epoch(5)
    assert len(set(first)) == 12
    if sys.argv[2] == "fork":
        assert epoch(5) == first
        assert not set(epoch(6)) & set(first)
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader_draw_different_samples(tmp_path, context):
    (tmp_path / "drawing.py").write_text(DRAWING)
    command = [sys.executable, str(tmp_path / "drawing.py"), str(tmp_path / "buffer"), context]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


PAGE = """
from collections import OrderedDict
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import cl_optim

model = nn.Linear(3, 2)
loss = nn.functional.cross_entropy
loss_fn = lambda batch: loss(model(batch[0]), batch[1])
opt = cl_optim.GEM(cl_optim.EWCAdamW(model.named_parameters()))
data = TensorDataset(torch.randn(50, 3), torch.randint(2, (50,)))
old_loader, new_loader = DataLoader(data, 12), DataLoader(data, 12)
old_texts, new_texts = ["one two"], ["two three"]
make_column = lambda: nn.Sequential(OrderedDict(body=nn.Linear(3, 4), head=nn.Linear(4, 2)))
BLOCK
assert len(x) in (2, 3)  # of the last batch, of two
opt.zero_grad()
loss(model(x), y).backward()
opt.step()
print(len(buffer), buffer.seen)
"""


def test_the_lines_of_the_page_run_and_run_again(tmp_path):
    text = (ROOT / "docs" / "retention.md").read_text(encoding="utf-8")
    block = text.split("```python")[1].split("```")[0]
    for seen in (50, 100):  # the second time, the buffer of the first is there
        result = run(PAGE.replace("BLOCK", block), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{seen} {seen}"


def test_closure_is_gems():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(40, 3), torch.randint(2, (40,))
    buffer = ReplayBuffer(16)
    buffer.add((x, y))

    def loss(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    value = buffer.closure(loss)()
    expected = torch.autograd.grad(loss(buffer.samples()), list(model.parameters()))
    assert value == loss(buffer.samples())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))

    optimizer = cl_optim.GEM(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.remember("A", buffer.closure(loss), refresh_every=1)
    optimizer.zero_grad()
    (-loss((x, y))).backward()  # a new task that wants the opposite
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.step()
    update = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    row = torch.cat([g.flatten() for g in expected])
    assert optimizer.last_projection.active.item()
    assert update.norm() > 1e-3
    assert abs(update @ row) < 1e-6  # to first order the old loss stays where it was


def test_closure_draws_anew():
    buffer = ReplayBuffer(16)
    buffer.add(numbers(0, 16))
    seen, weight = [], torch.zeros((), requires_grad=True)
    closure = buffer.closure(lambda x: seen.append(x.tolist()) or weight * x.sum(), n=4)
    closure(), closure()
    assert all(len(set(x)) == 4 for x in seen)
    assert seen[0] != seen[1]
    assert weight.grad == sum(map(sum, seen))


def add(batch):
    """Return a call that adds a batch."""
    return lambda buffer, _: buffer.add(batch)


X, Y = torch.zeros(4, 3), torch.zeros(4)
BAD = [
    ("no capacity", lambda *_: ReplayBuffer(0),
     ValueError, "capacity must be a whole number of at least 1, not 0"),
    ("a policy", lambda *_: ReplayBuffer(2, policy="fifo"), ValueError, "policy must be one of"),
    ("classes without label", lambda *_: ReplayBuffer(2, policy="class_balanced"),
     ValueError, "label goes with"),
    ("a label without classes", lambda *_: ReplayBuffer(2, label="y"),
     ValueError, "label goes with"),
    ("read_only in memory", lambda *_: ReplayBuffer(12, read_only=True),
     ValueError, "read_only=True"),
    ("read_only of nothing", lambda _, path: ReplayBuffer(12, path=path, read_only=True),
     ValueError, "read_only=True"),
    ("another structure", add({"x": X}), ValueError, "batch must have the structure"),
    ("another shape", add((torch.zeros(4, 2), Y)), ValueError, r"batch\[0\] .* shape \[3\]"),
    ("another dtype", add((X.half(), Y)), ValueError, "not \\[3\\], float16"),
    ("unequal sizes", add((X, torch.zeros(5))), ValueError, r"batch\[1\] .* has 5 samples"),
    ("no samples", add((X, torch.zeros(()))), ValueError, "0-dimensional"),
    ("no tensor", add((X, "text")), TypeError, r"batch\[1\] must be a tensor"),
    ("no names", add({1: torch.zeros(3)}), TypeError, "strings as keys"),
    ("an empty batch", add(()), TypeError, "contain a tensor"),
    ("sample() of nothing", lambda *_: ReplayBuffer(3).sample(1), ValueError, "empty"),
    ("sample() of too many", lambda buffer, _: buffer.sample(4),
     ValueError, "at most the 3 samples"),
    ("sample() of none", lambda buffer, _: buffer.sample(0), ValueError, "at least 1, not 0"),
    *((f"mix() with ratio {ratio}", lambda buffer, _, ratio=ratio: buffer.mix([], ratio),
       ValueError, "ratio must be") for ratio in (-0.1, 1.0, float("nan"))),
    ("the length of a generator", lambda buffer, _: len(buffer.mix((b for b in ()), 0.1)),
     TypeError, "no length"),
    ("a state of another capacity",
     lambda buffer, _: buffer.load_state_dict(ReplayBuffer(13).state_dict()),
     ValueError, "must be of a buffer with capacity"),
    ("a state of another policy",
     lambda buffer, _: buffer.load_state_dict(ReplayBuffer(3, policy="ring").state_dict()),
     ValueError, "must be of a buffer with policy"),
    ("no state", lambda buffer, _: buffer.load_state_dict({}),
     ValueError, "must be of a ReplayBuffer"),
]  # fmt: skip


@pytest.mark.parametrize("disk", [False, True])
@each_of(BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, disk, given, error, message):
    buffer = ReplayBuffer(3, path=tmp_path / "buffer" if disk else None)
    buffer.add((torch.ones(5, 3), torch.ones(5)))
    state, samples = buffer.state_dict(), buffer.samples()
    with refused(error, message):
        given(buffer, tmp_path / "none")
    assert_same_state(buffer.state_dict(), state)
    assert all(torch.equal(*pair) for pair in zip(buffer.samples(), samples, strict=True))
    assert not (tmp_path / "none").exists()


def test_classes_that_are_no_integers_are_refused():
    buffer = ReplayBuffer(3, policy="class_balanced", label="y")
    with refused(ValueError, "integer tensor \\[4\\]"):
        buffer.add({"y": torch.zeros(4)})
    assert buffer.seen == 0
