"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 28×28 pixels, 60 000 + 10 000 images.

MNIST's files have the same names and the same format.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_optim.demo.scenarios import DataError, Split, Task, digits, generator

# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_IMAGES = {"train": "train-images-idx3-ubyte.gz", "t10k": "t10k-images-idx3-ubyte.gz"}
_LABELS = {"train": "train-labels-idx1-ubyte.gz", "t10k": "t10k-labels-idx1-ubyte.gz"}


def fashion_mnist(folder: Path | None = None) -> Task:
    """Load Fashion-MNIST, 784 pixels in [0, 1]: 50 000 + 10 000 + 10 000 samples.

    The validation samples, a sixth, are drawn from the training files, always the same ones.

    Args:
        folder: Has the four gzipped IDX files. Default: Debian's folder, else torchvision, which
            downloads them into its cache.

    Raises:
        DataError: The files are missing, damaged, or of another data set.
    """
    if folder is None and not DEBIAN_FOLDER.is_dir():
        x, y, test_x, test_y = _from_torchvision()
    else:
        x, y, test_x, test_y = _from_files(folder or DEBIAN_FOLDER, "Fashion-MNIST")
    return _task(x, y, test_x, test_y)


def mnist(folder: Path) -> Task:
    """Load MNIST likewise, from its four IDX files, gzipped or not.

    Raises:
        DataError: The files are missing, damaged, or of another data set.
    """
    return _task(*_from_files(folder, "MNIST"))


def load(data: str, folder: Path | None) -> tuple[str, Task]:
    """Return a data set with its name; without its files, digits in place of Fashion-MNIST.

    Args:
        data: ``"fashion-mnist"`` or ``"mnist"``.
        folder: Of the four IDX files; MNIST needs one.

    Raises:
        DataError: The folder has no such files.
    """
    if data == "mnist":
        if folder is None:
            raise DataError("MNIST's four IDX files are needed: name their folder with --data-dir.")
        return "MNIST", mnist(folder)
    try:
        return "Fashion-MNIST", fashion_mnist(folder)
    except DataError:
        if folder is not None:
            raise
        return "digits", digits()


def _task(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Task:
    shuffled = torch.randperm(len(x), generator=generator(0, "fashion-mnist validation"))
    count = len(x) // 6  # 10 000 of 60 000
    validation, train = shuffled[:count], shuffled[count:]
    return Task(
        Split(x[train], y[train]), Split(x[validation], y[validation]), Split(test_x, test_y)
    )


def _from_files(folder: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(folder / _IMAGES[part])
        labels = _read_idx(folder / _LABELS[part])
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{folder} is not {name}: its {part} images have shape {images.shape} and its "
                f"labels {labels.shape}."
            )
        parts += [_pixels(images), torch.from_numpy(labels.astype(np.int64))]
    x, y, test_x, test_y = parts
    return x, y, test_x, test_y


def _from_torchvision() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if importlib.util.find_spec("torchvision") is None:
        raise DataError(
            "Fashion-MNIST was not found: install Debian's dataset-fashion-mnist, or torchvision "
            "(which downloads it), or name the folder of its gzipped IDX files with --data-dir."
        )
    from torchvision.datasets import FashionMNIST

    root = Path(torch.hub.get_dir()) / "fashion-mnist"
    try:
        parts = [FashionMNIST(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"torchvision could not download Fashion-MNIST: {error}.") from None
    train, test = parts
    return _pixels(train.data.numpy()), train.targets, _pixels(test.data.numpy()), test.targets


def _pixels(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255.0)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: 0, 0, type 8, dimensions; sizes as big-endian uint32.

    Args:
        path: Of the gzipped file; without it, the one that it was made from is read.
    """
    plain = path.with_suffix("")
    try:
        if plain.is_file() and not path.exists():
            content = plain.read_bytes()
        else:
            with gzip.open(path) as file:
                content = file.read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is not an IDX file of bytes.")
    begin = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:begin], ">u4"))
    if len(content) - begin != np.prod(shape):
        raise DataError(f"{path} is truncated: it has {len(content) - begin} bytes for {shape}.")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)
