"""Reading Fashion-MNIST's and MNIST's files; real ones, where Debian's package is installed."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_idx

from bench.retention import fashion_mnist as module
from bench.retention.fashion_mnist import DEBIAN_FOLDER, fashion_mnist
from cl_optim.demo.scenarios import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 30)):
        images = generator.integers(0, 256, (count, 2, 3))
        images[:, 0, 0] = np.arange(count) % 10  # the label, in the first pixel
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", images[:, 0, 0])
    return tmp_path


def test_reads_the_files(folder):
    task = fashion_mnist(folder)
    assert [len(split.x) for split in (task.train, task.validation, task.test)] == [100, 20, 30]
    for split in (task.train, task.validation, task.test):
        assert split.x.shape[1] == 6
        assert split.x.dtype == torch.float32
        assert split.x.min() >= 0
        assert split.x.max() <= 1
        assert torch.equal((split.x[:, 0] * 255).round().long(), split.y)


def test_mnist_is_read_likewise_gzipped_or_not(folder):
    task, expected = module.mnist(folder), fashion_mnist(folder)
    assert torch.equal(task.train.x, expected.train.x)
    for path in [*folder.iterdir()]:
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert torch.equal(module.mnist(folder).test.x, expected.test.x)


def test_always_the_same_validation_samples(folder):
    assert torch.equal(fashion_mnist(folder).train.x, fashion_mnist(folder).train.x)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read"),
        (lambda path: path.write_bytes(b"no gzip at all"), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(b"\0\0\x09\x01\0\0\0\0")), "not an IDX file"),
        (
            lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])),
            "is truncated",
        ),
        (lambda path: write_idx(path, np.zeros((5, 2, 3))), "is not Fashion-MNIST"),
    ],
)
def test_damaged_files(folder, damage, message):
    path = folder / "t10k-images-idx3-ubyte.gz"
    damage(path)
    with pytest.raises(DataError, match=message):
        fashion_mnist(folder)


def test_the_sentence_names_both_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"Debian's dataset-fashion-mnist, or torchvision"):
        fashion_mnist()


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_files():
    task = fashion_mnist()
    assert [len(split.x) for split in (task.train, task.validation, task.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    assert torch.equal(task.test.y.bincount(), torch.full((10,), 1000))
