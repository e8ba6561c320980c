"""Importance: what it reads, and its file."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cl_optim.importance import Importance

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
    with pytest.raises(KeyError):
        importance["other"]


def test_reads_per_token(importance):
    per_token = importance.per_token()
    assert list(per_token) == list(SUMS)
    torch.testing.assert_close(per_token["layer.weight"], SUMS["layer.weight"] / 32)
    with pytest.raises(ValueError, match=r"^per_token\(\) needs a sequence model"):
        Importance(SUMS, samples=4).per_token()


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

    monkeypatch.setattr("cl_optim.importance.files.save_file", fail)
    with pytest.raises(OSError, match=r"task.safetensors' cannot be written: No space left"):
        importance.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bad_files(tmp_path, importance):
    with pytest.raises(FileNotFoundError, match="in a folder that does not exist"):
        importance.save(tmp_path / "none" / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        Importance.load(tmp_path / "x.safetensors")
    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"was not written by Importance\.save"):
        Importance.load(other)
    other.write_bytes(b"neither")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Importance.load(other)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"^sums\['a'\] must be a float32 or float64 tensor, not int",
         {"sums": {"a": 1}, "samples": 1}),
        (TypeError, r"^sums\['a'\] must be .* not torch.bfloat16",
         {"sums": {"a": torch.zeros(2, dtype=torch.bfloat16)}, "samples": 1}),
        (TypeError, "^sums must have parameter names", {"sums": {0: SUMS["scalar"]}, "samples": 1}),
        (ValueError, "^samples must be positive and finite", {"sums": SUMS, "samples": 0}),
        (ValueError, "^samples must be positive and", {"sums": SUMS, "samples": float("inf")}),
        (TypeError, "^samples must be a number, not str", {"sums": SUMS, "samples": "2"}),
        (TypeError, "^samples must be a number, not bool", {"sums": SUMS, "samples": True}),
        (ValueError, "^tokens must be positive", {"sums": SUMS, "samples": 1, "tokens": -1}),
        (TypeError, "^metadata must be what JSON can hold",
         {"sums": SUMS, "samples": 1, "metadata": {"model": torch.nn.Linear(2, 2)}}),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        Importance(**arguments)


def test_the_header_is_json(tmp_path, importance):
    """Other tools can read how it was made without this package."""
    importance.save(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["metadata"]) == importance.metadata
