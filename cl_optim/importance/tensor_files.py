"""The safetensors files of this package: written as other files are, read as bytes."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cl_optim.importance.files import is_stream


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, which may be read by whom the umask lets.

    Raises:
        OSError: It cannot be written: the disk is full, say, or it is no file.
    """
    if is_stream(path):  # safetensors would put a file in its place
        raise OSError(errno.ESPIPE, "tensors need a file, not a stream or a device")
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
        path.chmod(mode)  # safetensors may have moved a private file here
    except SafetensorError as error:  # which has the reason in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def read_header(file: BinaryIO) -> bytes:
    """Read the first bytes of a safetensors file, up to its tensors; all, if it is none."""
    length = file.read(8)
    size = os.fstat(file.fileno()).st_size
    return length + file.read(min(int.from_bytes(length, "little"), size))


def as_bytes(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor, as a NumPy array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
