"""The replay buffer: which samples it keeps, what it draws, and that it goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, UserDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import cl_optim
from cl_optim.retention import ReplayBuffer


def numbers(first, last):
    return torch.arange(first, last)


def kept(buffer):
    return sorted(buffer.samples().tolist())


def fill(buffer, batches=6, size=7):
    for i in range(batches):
        x = numbers(size * i, size * (i + 1))
        buffer.add({"x": x.double().view(-1, 1).expand(-1, 3), "y": (x % 3, x.bfloat16())})


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

    def test_a_loader_without_length(self):
        with pytest.raises(TypeError, match="no length"):
            len(ReplayBuffer(5).mix((b for b in ()), 0.1))


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

    def test_of_another_kind_is_refused_and_changes_nothing(self, tmp_path, disk):
        buffer = ReplayBuffer(12, path=tmp_path / "a" if disk else None)
        fill(buffer)
        before = buffer.samples()["x"]
        for other in (ReplayBuffer(13), ReplayBuffer(12, policy="ring")):
            with pytest.raises(ValueError, match=r"must be of a buffer with (capacity|policy)"):
                buffer.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="must be of a ReplayBuffer"):
            buffer.load_state_dict({})
        assert torch.equal(buffer.samples()["x"], before)


class TestDisk:
    def test_equals_memory(self, tmp_path):
        memory, disk = ReplayBuffer(12), ReplayBuffer(12, path=tmp_path)
        fill(memory)
        fill(disk)
        for a, b in ((memory.samples(), disk.samples()), (memory.sample(5), disk.sample(5))):
            assert torch.equal(a["x"], b["x"])
            assert torch.equal(a["y"][1], b["y"][1])
        sizes = {p.name: p.stat().st_size for p in tmp_path.glob("*.bin")}
        assert sorted(sizes.values()) == [12 * 2, 12 * 8, 12 * 24]

    def test_survives_its_process(self, tmp_path):
        disk = ReplayBuffer(12, path=tmp_path)
        fill(disk)
        disk.flush()
        again = ReplayBuffer(12, path=tmp_path)
        assert torch.equal(again.samples()["x"], disk.samples()["x"])
        assert torch.equal(again.sample(5)["x"], disk.sample(5)["x"])

    def test_killed_before_a_flush_says_so(self, tmp_path):
        code = (
            "import os, signal, sys, torch; from cl_optim.retention import ReplayBuffer\n"
            "b = ReplayBuffer(5, path=sys.argv[1]); b.add(torch.arange(5)); b.flush()\n"
            "b.add(torch.arange(50)); os.kill(os.getpid(), signal.SIGKILL)"
        )
        root = Path(__file__).parent.parent
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
        assert result.returncode == -9
        with pytest.raises(ValueError, match="not flushed"):
            ReplayBuffer(5, path=tmp_path)

    def test_a_state_older_than_the_files_is_refused(self, tmp_path):
        disk = ReplayBuffer(12, path=tmp_path)
        fill(disk)
        state = disk.state_dict()
        fill(disk)
        with pytest.raises(ValueError, match="changed since"):
            disk.load_state_dict(state)

    def test_a_lost_or_cut_file_is_not_a_file_of_zeros(self, tmp_path):
        disk = ReplayBuffer(12, path=tmp_path)
        fill(disk)
        disk.flush()
        os.truncate(tmp_path / "samples-0.bin", 7)
        with pytest.raises(ValueError, match=r"samples-0.bin' has 7 bytes, not \d+: its samples"):
            ReplayBuffer(12, path=tmp_path)
        (tmp_path / "samples-0.bin").unlink()
        with pytest.raises(ValueError, match=r"samples-0.bin' is gone: its samples are lost"):
            ReplayBuffer(12, path=tmp_path)

    def test_a_corrupt_state_and_another_capacity(self, tmp_path):
        disk = ReplayBuffer(12, path=tmp_path)
        fill(disk)
        disk.flush()
        with pytest.raises(ValueError, match="capacity=13"):
            ReplayBuffer(13, path=tmp_path)
        (tmp_path / "state.safetensors").write_bytes(b"no")
        with pytest.raises(ValueError, match="not a safetensors file"):
            ReplayBuffer(12, path=tmp_path)


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


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"capacity": 0}, "capacity must be a positive whole number, not 0"),
            ({"capacity": 2, "policy": "fifo"}, "policy must be one of"),
            ({"capacity": 2, "policy": "class_balanced"}, "label goes with"),
            ({"capacity": 2, "label": "y"}, "label goes with"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            ReplayBuffer(**options)

    @pytest.mark.parametrize(
        ("batch", "error", "message"),
        [
            ({"x": torch.zeros(4, 3)}, ValueError, "batch must have the structure"),
            ((torch.zeros(4, 2), torch.zeros(4)), ValueError, r"batch\[0\] .* shape \[3\]"),
            ((torch.zeros(4, 3).half(), torch.zeros(4)), ValueError, "not \\[3\\], float16"),
            ((torch.zeros(4, 3), torch.zeros(5)), ValueError, r"batch\[1\] .* has 5 samples"),
            ((torch.zeros(4, 3), torch.zeros(())), ValueError, "0-dimensional"),
            ((torch.zeros(4, 3), "text"), TypeError, r"batch\[1\] must be a tensor"),
            ({1: torch.zeros(3)}, TypeError, "strings as keys"),
            ((), TypeError, "contain a tensor"),
        ],
    )
    def test_batches_change_nothing(self, batch, error, message):
        buffer = ReplayBuffer(3)
        buffer.add((torch.ones(5, 3), torch.ones(5)))
        state = buffer.state_dict()
        with pytest.raises(error, match=message):
            buffer.add(batch)
        after = buffer.state_dict()
        assert after["seen"] == state["seen"]
        assert torch.equal(after["adding"], state["adding"])
        assert torch.equal(after["samples"]["batch[0]"], state["samples"]["batch[0]"])

    def test_classes(self):
        buffer = ReplayBuffer(3, policy="class_balanced", label="y")
        with pytest.raises(ValueError, match="integer tensor \\[4\\]"):
            buffer.add({"y": torch.zeros(4)})
        assert buffer.seen == 0

    def test_draws_and_ratios(self):
        buffer = ReplayBuffer(3)
        with pytest.raises(ValueError, match="empty"):
            buffer.sample(1)
        buffer.add(numbers(0, 2))
        with pytest.raises(ValueError, match="at most the 2 samples"):
            buffer.sample(3)
        with pytest.raises(ValueError, match="positive"):
            buffer.sample(0)
        for ratio in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match="ratio must be"):
                buffer.mix([], ratio)
