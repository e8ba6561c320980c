"""Checkpoints: everything together, bit for bit, whatever happens to a file or a process."""

from __future__ import annotations

import copy
import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from damage import flipped
from guard_cases import flatten
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from cl_optim import EWCAdamW, FisherEstimator
from cl_optim.retention import (
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    DataStream,
    ReplayBuffer,
)
from cl_optim.retention.checkpoint import checkpoints
from cl_optim.retention.checkpoint.random_state import rng_state


class Run:
    """A small run with everything in it: dropout, protection, schedule, shuffled data."""

    def __init__(self, folder, generator=True, keep=3):
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.optimizer = EWCAdamW(self.model.named_parameters(), lr=0.02, ewc_lambda=0.5)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, gamma=0.7)
        data = TensorDataset(torch.randn(22, 6), torch.randint(0, 3, (22,)))
        shuffle = torch.Generator().manual_seed(5) if generator else None
        self.stream = DataStream(DataLoader(data, 4, shuffle=True, generator=shuffle))
        self.batches = iter(self.stream)
        self.checkpoints = Checkpoints(
            folder,
            {
                "model": self.model,
                "optimizer": self.optimizer,
                "scheduler": self.scheduler,
                "data": self.stream,
            },
            keep,
        )

    def train(self, steps):
        for _ in range(steps):
            x, y = next(self.batches)
            x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def protect(self):
        importance = {name: p.detach() ** 2 for name, p in self.model.named_parameters()}
        self.optimizer.consolidate(importance, anchors="exact")
        return self

    def bits(self):
        parts = [self.model.state_dict(), self.optimizer.state_dict()]
        return flatten([*parts, self.scheduler.state_dict(), self.stream.state_dict(), rng_state()])


@pytest.mark.parametrize("generator", [True, False])
@pytest.mark.parametrize("before", [1, 6, 9], ids=["in epoch 1", "at an epoch's end", "in epoch 2"])
def test_restore_brings_back_every_bit_and_the_same_future(tmp_path, generator, before):
    run = Run(tmp_path, generator).protect().train(before)
    run.checkpoints.save(before)
    saved = run.bits()
    future = run.train(11).bits()
    assert future != saved
    assert run.checkpoints.restore() == before
    assert run.bits() == saved
    assert run.train(11).bits() == future
    fresh = Run(tmp_path, generator)
    fresh.checkpoints.restore()
    assert fresh.bits() == saved
    assert fresh.train(11).bits() == future


def test_state_that_began_after_the_checkpoint_is_gone(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(0)
    run.train(2).protect()
    run.checkpoints.restore()
    assert not run.optimizer.state
    assert run.optimizer.penalty() == 0


def test_the_newest_are_kept(tmp_path):
    run = Run(tmp_path, keep=3)
    for step in (0, 10, 20, 30, 40):
        run.checkpoints.save(step)
    assert run.checkpoints.steps == [20, 30, 40]
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:012d}.pt" for step in (20, 30, 40)]


def test_a_checkpoint_written_after_a_roll_back_replaces_the_future(tmp_path):
    run = Run(tmp_path)
    for step in (0, 10, 20):
        run.checkpoints.save(step)
    run.checkpoints.save(10)
    assert run.checkpoints.steps == [0, 10]


def flip(path):
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) // 2))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    run = Run(tmp_path)
    run.train(1).checkpoints.save(1)
    saved = run.bits()
    run.train(1).checkpoints.save(2)
    damage(run.checkpoints.path(2))
    with pytest.warns(CheckpointWarning, match=r"step-000000000002\.pt cannot be read") as caught:
        assert run.checkpoints.restore() == 1
    assert len(caught) == 1
    assert run.bits() == saved


class Counting:
    """A part that counts how often something was loaded into it."""

    def __init__(self):
        self.weight = torch.arange(4.0)
        self.loaded = 0

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state_dict):
        self.weight, self.loaded = state_dict["weight"], self.loaded + 1


@pytest.fixture
def small(tmp_path):
    """A checkpoint of a small part, and the place of its ZIP directory."""
    part = Counting()
    checkpoints = Checkpoints(tmp_path, {"part": part})
    data = checkpoints.save(1).read_bytes()
    return checkpoints, part, data, data.index(b"PK\x01\x02")


def assert_nothing_is_loaded(checkpoints, part, damages):
    """Each damage, done to the file, is warned of; then there is no checkpoint left."""
    random_numbers = flatten(rng_state())
    path = checkpoints.path(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, damaged in enumerate(damages, start=1):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="none of the 1 in it can be read"):
                checkpoints.restore()
            assert len(caught) == number
    assert {warning.category for warning in caught} == {CheckpointWarning}
    assert all(str(path) in str(warning.message) for warning in caught)
    assert part.loaded == 0
    assert flatten(rng_state()) == random_numbers


def test_every_flipped_bit_is_noticed_before_anything_is_loaded(small):
    """Every third byte, and each bit of the ZIP directory and the checksum."""
    checkpoints, part, data, directory = small
    flips = [(place, 1 << place % 8) for place in range(0, directory, 3)]
    flips += [(place, 1 << bit) for place in range(directory, len(data)) for bit in range(8)]
    damages = (flipped(data, place, mask) for place, mask in flips)
    assert_nothing_is_loaded(checkpoints, part, damages)
    checkpoints.path(1).write_bytes(data)
    assert checkpoints.restore() == 1


def test_a_file_cut_anywhere_is_noticed_before_anything_is_loaded(small):
    checkpoints, part, data, directory = small
    sizes = [*range(0, directory, 7), *range(directory, len(data))]
    assert_nothing_is_loaded(checkpoints, part, (data[:size] for size in sizes))


def test_flipped_bits_fall_back_to_the_checkpoint_before(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    saved = run.bits()
    path = run.train(2).checkpoints.save(2)
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    places = range(directory, len(data), 97)
    for place in [*range(0, directory, directory // 40), *places]:
        path.write_bytes(flipped(data, place, 0x10))
        with pytest.warns(CheckpointWarning, match="the one before it is taken"):
            assert run.train(1).checkpoints.restore() == 1
        assert run.bits() == saved


def test_a_checkpoint_without_a_checksum_is_passed_over(tmp_path):
    """As versions before this one wrote them."""
    checkpoints = Checkpoints(tmp_path, {"part": Counting()})
    content = {"format": "cl_optim.Checkpoint/1", "step": 1, "parts": {}, "rng": rng_state()}
    torch.save(content, checkpoints.path(1))
    with (
        pytest.warns(CheckpointWarning, match="ends without a checksum: it is cut off"),
        pytest.raises(CheckpointError, match="none of the 1"),
    ):
        checkpoints.restore()


def test_a_full_disk_is_an_os_error_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    write, left = os.write, [0]

    def full(descriptor, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    size = run.checkpoints.path(1).stat().st_size
    for room in (0, 100, size // 2, size - 1):
        left[0] = room
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left on device"):
                run.checkpoints.save(2)
        assert os.listdir(tmp_path) == ["step-000000000001.pt"]
    assert run.checkpoints.restore() == 1


class Refusing(Counting):
    """A part that takes a state and then refuses it."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if state_dict["weight"][0] == 0:
            raise KeyError("weight")


def test_a_part_that_refuses_its_state_rolls_the_others_back(tmp_path):
    run = Run(tmp_path)
    refusing = Refusing()
    run.checkpoints.parts = {**run.checkpoints.parts, "refusing": refusing}
    run.protect().train(3).checkpoints.save(3)
    run.train(4)
    refusing.weight = torch.arange(4.0) + 1
    before = run.bits()
    with pytest.raises(
        CheckpointError, match=r"part 'refusing' refuses its state .* step 3: KeyError: 'weight'"
    ):
        run.checkpoints.restore()
    assert run.bits() == before
    assert refusing.weight.tolist() == [1, 2, 3, 4]
    future = run.train(9).bits()
    run.checkpoints.parts.popitem()
    other = Checkpoints(tmp_path / "other", run.checkpoints.parts)
    other.save(0)
    other.restore()
    assert run.bits() == future


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("torch", lambda rng: {"torch": rng["torch"][:100]}),
        ("numpy", lambda rng: {"numpy": (rng["numpy"][0], rng["numpy"][1][:5], *rng["numpy"][2:])}),
        ("python", lambda rng: {"python": (3, rng["python"][1][:9], None)}),
        ("9 GPUs", lambda rng: {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 9}),
    ],
)
def test_random_states_that_do_not_fit_are_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, name, change
):
    run = Run(tmp_path)
    state = rng_state()
    monkeypatch.setattr(checkpoints, "rng_state", lambda: {**state, **change(state)})
    run.checkpoints.save(0)
    monkeypatch.undo()
    before = run.train(1).bits()
    with pytest.raises(CheckpointError, match=f"random states? of {name}"):
        run.checkpoints.restore()
    assert run.bits() == before


def test_a_missing_checkpoint_falls_back_and_none_is_a_sentence(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match="there is none in it"):
        run.checkpoints.restore()
    run.checkpoints.save(1)
    run.checkpoints.save(2)
    run.checkpoints.path(2).unlink()
    assert run.checkpoints.restore() == 1
    flip(run.checkpoints.path(1))
    before = run.train(1).bits()
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="none of the 1 in it can be read"),
    ):
        run.checkpoints.restore()
    assert run.bits() == before


def wider():
    return nn.Sequential(
        nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3)
    )


def seeded():
    return DataStream(DataLoader(range(22), 4, shuffle=True, generator=torch.Generator()))


OTHERS = [
    ("other parts", lambda parts: {"model": parts["model"], "optimizer": parts["optimizer"]},
     CheckpointError, r"has the parts .*'scheduler'.* this run has"),
    ("another model", lambda parts: {**parts, "model": nn.Linear(2, 2)},
     CheckpointError, "belongs to another model"),
    ("another shape", lambda parts: {**parts, "model": wider()},
     CheckpointError, r"'0.weight' has shape \(8, 6\) there, \(9, 6\)"),
    ("another kind of loader", lambda parts: {**parts, "data": seeded()},
     CheckpointError, r"'data' .* draws from torch's global generator, and this one"),
]  # fmt: skip


@each_of(OTHERS)
def test_a_checkpoint_of_something_else_changes_nothing(tmp_path, given, error, message):
    Run(tmp_path, generator=False).checkpoints.save(1)
    run = Run(tmp_path, generator=False).train(1)
    parts = run.checkpoints.parts = given(run.checkpoints.parts)

    def bits():
        return run.bits() + flatten([part.state_dict() for part in parts.values()])

    before = bits()
    with refused(error, message):
        run.checkpoints.restore()
    assert bits() == before


def test_a_fisher_estimator_goes_on_bit_for_bit(tmp_path):
    def run(model, estimator, batches):
        for x in batches:
            with estimator.observe(batch_size=len(x)):
                model(x).square().mean().backward()
            estimator.apply_decay()

    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, FisherEstimator(model, decay=0.9)

    batches = torch.randn(6, 5, 3)
    model, estimator = make()
    run(model, estimator, batches[:3])
    Checkpoints(tmp_path, {"fisher": estimator}).save(3)
    run(model, estimator, batches[3:])
    expected = estimator.finalize()
    model, estimator = make()
    Checkpoints(tmp_path, {"fisher": estimator}).restore()
    run(model, estimator, batches[3:])
    found = estimator.finalize()
    assert flatten(dict(found.sums)) == flatten(dict(expected.sums))
    assert (found.samples, found.tokens) == (expected.samples, expected.tokens)
    other = FisherEstimator(nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="'weight' is not in both, or has another shape"):
        Checkpoints(tmp_path, {"fisher": other}).restore()


class Odd:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"odd": self.state}

    def load_state_dict(self, state_dict):
        raise AssertionError("never loaded")


def test_an_object_that_could_not_be_read_back_is_refused_when_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"odd": Odd(Odd(1))})
    with pytest.raises(CheckpointError, match=r"parts \['odd'\] has another object .*Odd"):
        checkpoints.save(1)
    assert os.listdir(tmp_path) == []


def loader(samples):
    return DataLoader(TensorDataset(torch.zeros(samples, 1)), 4)


BAD = [
    ("a part without state", lambda folder: Checkpoints(folder, {"x": object()}),
     TypeError, "part 'x' of a checkpoint must have state_dict"),
    *((f"keep={keep}", lambda folder, keep=keep: Checkpoints(folder, {}, keep=keep),
       ValueError, "keep must be a whole number of at least 1") for keep in (0, -1, 1.5)),
    ("a loader of nothing", lambda _: DataStream(loader(0)), ValueError, "at least one batch"),
    ("no epochs", lambda _: DataStream(loader(2), epochs=0),
     ValueError, "epochs must be at least 1"),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence(tmp_path, given, error, message):
    with refused(error, message):
        given(tmp_path)


KILLED = """
    import os, signal, sys, torch
    from cl_optim.retention import Checkpoints
    folder, moment = sys.argv[1:]
    model = torch.nn.Linear(300, 300)
    torch.nn.init.constant_(model.weight, 1.0)
    checkpoints = Checkpoints(folder, {"model": model})
    checkpoints.save(1)
    torch.nn.init.constant_(model.weight, 2.0)

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write":  # after half of the bytes
        save = torch.save

        def torn(content, file):
            class Torn:
                written = 0

                def write(self, data):
                    self.written += len(data)
                    if self.written > 200_000:
                        file.write(data[: len(data) // 2])
                        file.flush()
                        die()
                    return file.write(data)

                def flush(self):
                    file.flush()

            save(content, Torn())

        torch.save = torn
    else:
        setattr(os, moment, die)
    checkpoints.save(2)
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_process_killed_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path, moment):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(name.endswith(".tmp") for name in os.listdir(tmp_path))
    model = nn.Linear(300, 300)
    checkpoints = Checkpoints(tmp_path, {"model": model})
    assert checkpoints.steps == [1]
    assert checkpoints.restore() == 1
    assert (model.weight == 1.0).all()
    checkpoints.save(2)  # the torn file is in nobody's way
    assert sorted(os.listdir(tmp_path)) == ["step-000000000001.pt", "step-000000000002.pt"]


def test_a_stream_repeats_epochs_in_new_orders_and_ends():
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, 3, shuffle=True, generator=torch.Generator().manual_seed(0))
    values = torch.cat([x for (x,) in DataStream(loader, epochs=2)])
    first, second = values[:10], values[10:]
    assert len(second) == 10
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_a_loop_over_a_stream_jumps_back_and_the_random_numbers_of_others_do_not_move():
    loader = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True)
    stream = DataStream(loader, epochs=1)
    seen, position = [], None
    for (x,) in stream:
        seen.append(x.tolist())
        if len(seen) == 1:
            position = stream.state_dict()
        if len(seen) == 3:
            stream.load_state_dict(position)
            torch.rand(3)  # as dropout does
            expected = torch.get_rng_state()
        if len(seen) == 4:
            assert torch.equal(torch.get_rng_state(), expected)
    assert seen[3:] == seen[1:3] + seen[5:]
    assert len(seen) == 6
    stream.load_state_dict({**position, "taken": 9})
    with pytest.raises(ValueError, match="after 9 batches of an epoch, but the loader has only 4"):
        next(iter(stream))


class Shuffled(Sampler):
    """A sampler that is no torch's, with a generator of its own."""

    def __init__(self, samples, generator):
        self.samples, self.generator = samples, generator

    def __iter__(self):
        return iter(torch.randperm(self.samples, generator=self.generator).tolist())

    def __len__(self):
        return self.samples


@pytest.mark.parametrize("of_loader", [False, True], ids=["global", "loader's"])
@pytest.mark.parametrize("batched", [False, True], ids=["sampler", "batch_sampler"])
@pytest.mark.parametrize("kind", [Shuffled, WeightedRandomSampler])
def test_a_sampler_with_a_generator_of_its_own_goes_back_too(kind, batched, of_loader):
    def made(seed):
        generator = torch.Generator().manual_seed(seed)
        samples = [0.1] * 10 if kind is WeightedRandomSampler else 10
        more = {"num_samples": 10} if kind is WeightedRandomSampler else {}
        sampler = kind(samples, generator=generator, **more)
        given = {"generator": torch.Generator().manual_seed(seed + 10)} if of_loader else {}
        given |= (
            {"batch_sampler": BatchSampler(sampler, 3, False)} if batched
            else {"sampler": sampler, "batch_size": 3}
        )  # fmt: skip
        return DataStream(DataLoader(TensorDataset(torch.arange(10)), **given), epochs=2)

    whole = [batch[0].tolist() for batch in made(0)]
    stream = made(0)
    parts = iter(stream)
    first = [next(parts)[0].tolist() for _ in range(3)]
    position = copy.deepcopy(stream.state_dict())
    rest = [batch[0].tolist() for batch in parts]
    assert first + rest == whole
    for again in (stream, made(1)):
        again.check_state_dict(position)
        again.load_state_dict(position)
        assert [batch[0].tolist() for batch in again] == rest


def test_a_position_of_other_batches_is_refused():
    data = TensorDataset(torch.arange(8))
    stream = DataStream(DataLoader(data, 2, shuffle=True), epochs=2)
    begin = stream.state_dict()
    next(iter(stream))
    position = stream.state_dict()
    for other, is_said in (
        (DataLoader(data, 4, shuffle=True), "this loader has 8 with batch_size=4: make it"),
        (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, True)),
         "this loader has 8 with batch_size=4: make it"),
        (DataLoader(range(9), 2, shuffle=True), "this loader has 9 with batch_size=2: make it"),
        (DataLoader(data, 2, shuffle=True, generator=torch.Generator()),
         "draws from torch's global generator, and this one draws from a generator of its loader"),
        (DataLoader(data, 2, sampler=Shuffled(8, torch.Generator())),
         "draws from torch's global generator, and this one draws from a generator of its sampler"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=is_said):
            DataStream(other).check_state_dict(position)
    DataStream(DataLoader(data, 4, shuffle=True)).check_state_dict(begin)  # in no epoch yet


def test_a_position_among_another_number_of_processes_is_refused():
    """Of the same data in batches of the same size, of which each process has another part."""
    data = TensorDataset(torch.arange(8))

    def among(count):
        return DataStream(DataLoader(data, 2, sampler=DistributedSampler(data, count, rank=0)))

    stream = among(2)
    next(iter(stream))
    among(2).check_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"epoch of 4 samples .* loader has 2 with batch_size"):
        among(4).check_state_dict(stream.state_dict())


def test_a_replay_buffers_stream_is_a_part_like_any_other(tmp_path):
    def buffer():
        return ReplayBuffer(8, seed=3)

    old, new = torch.arange(100.0)[:, None], torch.arange(1000.0, 1040.0)[:, None]
    kept = buffer()
    kept.add(old)
    checkpoints = Checkpoints(tmp_path, {"replay": kept})
    kept.sample(3)
    checkpoints.save(1)
    future = [batch.tolist() for batch in kept.mix(new.split(4), ratio=0.5)]
    assert checkpoints.restore() == 1
    assert [batch.tolist() for batch in kept.mix(new.split(4), ratio=0.5)] == future
    other = buffer()
    Checkpoints(tmp_path, {"replay": other}).restore()
    assert [batch.tolist() for batch in other.mix(new.split(4), ratio=0.5)] == future


def test_a_sampler_that_shuffles_by_the_epoch_is_told_it():
    """In every process, and where a position is gone back to."""

    def made():
        data = TensorDataset(torch.arange(8))
        sampler = DistributedSampler(data, num_replicas=2, rank=0, seed=3)
        return DataStream(DataLoader(data, 2, sampler=sampler), epochs=3)

    whole = [batch[0].tolist() for batch in made()]
    assert len({str(whole[at : at + 2]) for at in (0, 2, 4)}) == 3
    stream = made()
    parts = iter(stream)
    first = [next(parts)[0].tolist() for _ in range(3)]
    again = made()
    again.load_state_dict(stream.state_dict())
    assert first + [batch[0].tolist() for batch in again] == whole


def test_an_epoch_that_the_user_has_set_stays():
    """A stream for each epoch: the sampler has been told before, and so has a resumed one."""
    data = TensorDataset(torch.arange(8))

    def made(epoch):
        sampler = DistributedSampler(data, num_replicas=2, rank=0, seed=3)
        sampler.set_epoch(epoch)
        return DataLoader(data, 2, sampler=sampler)

    for epoch in (0, 1, 5):
        plain = [batch[0].tolist() for batch in made(epoch)]
        stream = DataStream(made(epoch), epochs=1)
        parts = iter(stream)
        first = next(parts)[0].tolist()
        again = DataStream(made(0), epochs=1)
        again.load_state_dict(stream.state_dict())
        assert [first, *(batch[0].tolist() for batch in again)] == plain
