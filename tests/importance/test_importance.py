"""Importance: what it reads, and its file."""

import json
import math
import os
import signal
import time
from functools import partial

import pytest
import torch
from bad_input import each_of, refused
from damage import flip, flipped
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from cl_optim.importance import Importance, sealed_safetensors
from cl_optim.importance.errors import DamagedError

SUMS = {
    "layer.weight": torch.arange(6.0).view(2, 3),
    "layer.bias": torch.tensor([1.0, 3.0], dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(5.0),
}


@pytest.fixture
def importance() -> Importance:
    return Importance(SUMS, samples=4, tokens=32, metadata={"labels": "sample", "shape": (2, 3)})


def test_reads_as_the_mean_over_samples(importance):
    assert list(importance) == list(SUMS)
    assert len(importance) == 4
    assert "scalar" in importance
    assert "other" not in importance
    for name, value in importance.items():
        torch.testing.assert_close(value, SUMS[name] / 4, rtol=0, atol=0)
        assert value.dtype == SUMS[name].dtype


def test_reads_per_token(importance):
    per_token = importance.per_token()
    assert list(per_token) == list(SUMS)
    torch.testing.assert_close(per_token["layer.weight"], SUMS["layer.weight"] / 32)


def test_raw_values(importance):
    assert importance.sums["layer.bias"] is SUMS["layer.bias"]
    assert (importance.samples, importance.tokens) == (4, 32)
    assert importance.metadata == {"labels": "sample", "shape": [2, 3]}
    assert importance != Importance(SUMS, samples=4, tokens=32)  # Mapping's != would fail
    assert importance.to("meta")["scalar"].device.type == "meta"
    assert importance.to("meta").metadata == importance.metadata


def test_repr(importance):
    assert repr(importance) == (
        "Importance(4 parameters with 9 weights, 4 samples of 32 tokens in all, labels='sample')"
    )
    assert repr(Importance({}, samples=1234)) == (
        "Importance(0 parameters with 0 weights, 1,234 samples)"
    )


@pytest.mark.parametrize("tokens", [32, None])
def test_save_and_load(tmp_path, importance, tokens):
    path = tmp_path / "task.safetensors"
    path.write_text("what was there before")
    # Views of one memory, not contiguous: as a tied or sliced tensor would be.
    sums = {**SUMS, "view": SUMS["layer.weight"].t(), "same": SUMS["layer.weight"]}
    Importance(sums, 4, tokens, importance.metadata).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    loaded = Importance.load(str(path))
    assert (loaded.samples, loaded.tokens) == (4, tokens)
    assert loaded.metadata == importance.metadata
    assert set(loaded) == set(sums)
    for name, value in loaded.sums.items():
        torch.testing.assert_close(value, sums[name], rtol=0, atol=0)


def test_a_failed_save_leaves_the_old_file(tmp_path, importance, monkeypatch):
    path = tmp_path / "task.safetensors"
    importance.save(path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cl_optim.importance.tensor_files.save_file", fail)
    with pytest.raises(OSError, match=r"task.safetensors' cannot be written: No space left"):
        importance.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_each_damaged_byte_and_each_cut_of_a_file_is_noticed(tmp_path):
    """Whatever is loaded is what was saved, bit for bit; all else is one error with the path."""
    sums = {"a": torch.rand(3), "b.weight": torch.rand(2, 2, dtype=torch.float64)}
    original = Importance(sums, samples=4, tokens=32, metadata={"labels": "sample"})
    path = tmp_path / "x"
    original.save(path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    for place in range(len(whole)):
        for mask in (1 << place % 8, 3, 255):  # 3: the format's 2 becomes a 1
            damaged.append(flipped(whole, place, mask))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as caught:
            Importance.load(path)
        assert caught.type in (ValueError, DamagedError)
    path.write_bytes(whole)
    for name, value in Importance.load(path).sums.items():
        assert torch.equal(value, sums[name])


def test_a_damaged_tensor_is_named(tmp_path, importance):
    path = tmp_path / "x"
    importance.save(path)
    flip(path, -1)
    message = r"^the file '.*/x' is damaged: the checksum of 'scalar' is not the one"
    with pytest.raises(DamagedError, match=message):
        Importance.load(path)


def test_a_file_of_an_earlier_version(tmp_path, importance):
    """It has no checksums, which is said; what is not even readable has the same error."""
    path = tmp_path / "x"
    header = {"format": "cl_optim.Importance/1", "samples": "4", "tokens": "32"}
    save_file(SUMS, path, {**header, "metadata": '{"labels": "sample"}'})
    with pytest.warns(UserWarning, match=r"/x' has no checksums: an earlier version wrote it"):
        loaded = Importance.load(path)
    assert torch.equal(loaded["layer.bias"], importance["layer.bias"])
    for metadata in ({}, {"metadata": "{"}, {"metadata": "{}", "samples": "-1"}):
        save_file(SUMS, path, {**header, **metadata})
        with pytest.warns(match="no checksums"), pytest.raises(DamagedError, match=str(path)):
            Importance.load(path)


def test_save_copies_only_what_it_must(tmp_path, monkeypatch):
    """No second importance in memory."""
    whole, other = torch.rand(1000), torch.rand(2000)
    given = {"whole": whole, "view": other[:1000], "same": whole, "shape": torch.rand(4, 5)}
    saved = {}
    original = sealed_safetensors.save_tensors

    def spy(tensors, path, metadata):
        saved.update(tensors)
        original(tensors, path, metadata)

    monkeypatch.setattr(sealed_safetensors, "save_tensors", spy)
    Importance(given, 1).save(tmp_path / "x")
    kept = [name for name in given if saved[name].data_ptr() == given[name].data_ptr()]
    assert kept == ["whole", "shape"]
    for name, value in Importance.load(tmp_path / "x").sums.items():
        assert torch.equal(value, given[name])


def test_who_may_read_a_file_is_left_to_the_umask(tmp_path, importance):
    before = os.umask(0o027)
    try:
        importance.save(tmp_path / "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_is_swept_and_a_live_ones_is_not(
    tmp_path, importance, monkeypatch
):
    """Two writers in one folder: one is killed in the middle, one is at work."""
    writers = []
    for _ in range(2):
        report, told = os.pipe()
        writers.append(os.fork())
        if writers[-1] == 0:
            try:
                monkeypatch.setattr(sealed_safetensors, "save_tensors", partial(stand_still, told))
                importance.save(tmp_path / "never")
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(report, 1) == b"x"
    try:
        folders = set(temporary(tmp_path))
        assert len(folders) == 2
        importance.save(tmp_path / "mine")
        assert set(temporary(tmp_path)) == folders
        os.kill(writers[0], signal.SIGKILL)
        os.waitpid(writers[0], 0)
        importance.save(tmp_path / "mine")
        assert len(temporary(tmp_path)) == 1
    finally:
        os.kill(writers[1], signal.SIGKILL)
        os.waitpid(writers[1], 0)
    (tmp_path / ".mine.tmp").touch()  # another program's
    (tmp_path / f".{'0' * 32}.tmp").touch()  # an earlier version's, which may be at work
    (tmp_path / f".{'1' * 32}.tmp").touch()
    os.utime(tmp_path / f".{'1' * 32}.tmp", (0, 0))
    Importance.load(tmp_path / "mine").save(tmp_path / "mine")
    assert temporary(tmp_path) == [f".{'0' * 32}.tmp", ".mine.tmp"]


def stand_still(told, *_):
    os.write(told, b"x")
    time.sleep(60)


def temporary(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".tmp")


BEYOND = {"a": torch.full((2,), 2.0**700, dtype=torch.float64)}  # what float32 holds
OUT_OF_RANGE = (-0.1, 1.1, math.nan)
BAD = [
    ("no tensor", lambda *_: Importance({"a": 1}, 1),
     TypeError, r"^sums\['a'\] must be a float32 or float64 tensor, not int"),
    ("bfloat16", lambda *_: Importance({"a": torch.zeros(2, dtype=torch.bfloat16)}, 1),
     TypeError, r"^sums\['a'\] must be .* not torch.bfloat16"),
    ("no name", lambda *_: Importance({0: SUMS["scalar"]}, 1),
     TypeError, "^sums must have parameter names"),
    ("no samples", lambda *_: Importance(SUMS, 0),
     ValueError, "^samples must be positive and finite"),
    ("infinite samples", lambda *_: Importance(SUMS, float("inf")),
     ValueError, "^samples must be positive and"),
    ("samples as text", lambda *_: Importance(SUMS, "2"),
     TypeError, "^samples must be a number, not str"),
    ("samples as bool", lambda *_: Importance(SUMS, True),
     TypeError, "^samples must be a number, not bool"),
    ("negative tokens", lambda *_: Importance(SUMS, 1, tokens=-1),
     ValueError, "^tokens must be positive"),
    ("a model as metadata", lambda *_: Importance(SUMS, 1, metadata={"a": nn.Linear(2, 2)}),
     TypeError, "^metadata must be what JSON can hold"),
    ("another parameter", lambda importance, _: importance["other"], KeyError, "other"),
    ("per_token() without tokens", lambda *_: Importance(SUMS, 4).per_token(),
     ValueError, r"^per_token\(\) needs a sequence model"),
    ("save() into no folder", lambda importance, folder: importance.save(folder / "none" / "x"),
     FileNotFoundError, "in a folder that does not exist"),
    ("save() into a stream", lambda importance, folder: importance.save(folder / "pipe"),
     OSError, "tensors need a file, not a stream"),
    ("save() of safetensors' name",
     lambda _, folder: Importance({"a": torch.ones(2), "__metadata__": torch.ones(2)}, 1).save(
         folder / "x"),
     ValueError, r"must not have the name '__metadata__'.*another name"),
    ("load() of no file", lambda _, folder: Importance.load(folder / "x"),
     FileNotFoundError, "is not a file"),
    ("load() of weights", lambda _, folder: Importance.load(folder / "weights"),
     ValueError, r"was not written by Importance\.save"),
    ("load() of text", lambda _, folder: Importance.load(folder / "text"),
     ValueError, "is not a safetensors file"),
    ("merge() of another shape", lambda importance, _: importance.merge({"scalar": torch.ones(3)}),
     ValueError, r"^'scalar' cannot be merged: its shapes are"),
    ("merge() with decay 2", lambda importance, _: importance.merge(SUMS, decay=2),
     ValueError, r"^decay must be in \[0, 1\], not 2"),
    ("normalize() of zeros", lambda *_: Importance({"a": torch.zeros(3)}, 1).normalize(),
     ValueError, "0 everywhere cannot be normalized"),
    ("per_layer() beyond float32", lambda *_: Importance(BEYOND, 1).per_layer(),
     ValueError, r"must be below 3.4e38 .*Importance.normalize\(\)"),
    ("overlap() of another shape",
     lambda *_: Importance({"a": torch.ones(2)}, 1).overlap({"a": torch.ones(3)}),
     ValueError, r"^'a' has the shapes \[\(2,\), \(3,\)\]: not one"),
    ("quantile() of nothing", lambda *_: Importance({"a": torch.zeros(0)}, 1).quantile(0.5),
     ValueError, "a quantile needs at least one weight"),
    *((f"top({bad})", lambda importance, _, bad=bad: importance.top(bad),
       ValueError, rf"^fraction must be in \[0, 1\], not {bad}") for bad in OUT_OF_RANGE),
    *((f"quantile({bad})", lambda importance, _, bad=bad: importance.quantile(bad),
       ValueError, rf"^q must be in \[0, 1\], not {bad}") for bad in OUT_OF_RANGE),
    *((f"overlap(fraction={bad})", lambda importance, _, bad=bad: importance.overlap(SUMS, bad),
       ValueError, r"^fraction must be in \(0, 1\]") for bad in OUT_OF_RANGE),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, importance, given, error, message):
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "text").write_bytes(b"neither")
    os.mkfifo(tmp_path / "pipe")

    def state():
        return {path.name: (path.is_fifo(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    before = state()
    with refused(error, message):
        given(importance, tmp_path)
    assert state() == before


def test_the_header_is_json(tmp_path, importance):
    """Other tools can read how it was made without this package."""
    importance.save(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["metadata"]) == importance.metadata
