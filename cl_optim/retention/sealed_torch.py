"""Files of torch.save that end with a checksum of all that is before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import xxhash

from cl_optim.importance.errors import DamagedError

_MARK = b"\ncl_optim xxh3-128 "
_SEAL_BYTES = len(_MARK) + 32
_CHUNK = 1 << 20


class _Sealing:
    """A file for torch.save, which only appends; adds up the checksum of what is written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = xxhash.xxh3_128()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        rest = memoryview(data).cast("B")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Do nothing: all has been written."""

    def seal(self) -> bytes:
        return _MARK + self._hash.hexdigest().encode()


def save(content: Any, path: Path) -> None:
    """Write tensors, numbers, strings and containers of them, durably.

    ``torch.load(path, weights_only=True)`` reads the file, too, without verifying it.

    Raises:
        OSError: The disk refuses.
    """
    with open(path, "wb", buffering=0) as file:
        sealing: Any = _Sealing(file.fileno())
        try:
            torch.save(content, sealing)
        except RuntimeError:  # torch's, about a position, where a write has failed
            if sealing.error is None:
                raise
            raise sealing.error from None
        sealing.write(sealing.seal())
        os.fsync(file.fileno())


def load(path: Path) -> Any:
    """Read what :func:`save` wrote, on the CPU, after verifying every byte.

    Raises:
        DamagedError: The file is not what was written, or was written without a checksum.
        OSError: It cannot be read.
    """
    _verify(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def verify_sealed(path: Path) -> None:
    """Verify a file that ends with a checksum; any other is not looked at.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _SEAL_BYTES, 0))
        sealed = file.read(len(_MARK)) == _MARK
    if sealed:
        _verify(path)


def _verify(path: Path) -> None:
    found = xxhash.xxh3_128()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            found.update(chunk)
            left -= len(chunk)
        seal = file.read()
    if not seal.startswith(_MARK):
        raise DamagedError(
            f"{path} ends without a checksum: it is cut off, damaged, or of a version of cl_optim "
            "that wrote none."
        )
    if seal != _MARK + found.hexdigest().encode():
        raise DamagedError(f"{path} is damaged: its checksum is not the one that was written.")
