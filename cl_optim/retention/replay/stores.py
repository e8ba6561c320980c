"""Where a buffer keeps its samples: in memory, or in a file that has a checksum for each."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from cl_optim.importance.errors import DamagedError
from cl_optim.importance.files import whole
from cl_optim.retention.replay.samples import Layout


class Memory:
    """Samples in tensors [capacity, *shape], by place."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        self.tensors = layout.allocate(capacity)

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """Copy the samples of slots [n]: tensors [n, *shape] by place."""
        return {place: kept[slots] for place, kept in self.tensors.items()}

    def write(self, slots: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Put samples into different slots [n]; after an error they are what they were."""
        before = self.read(slots)
        try:
            self._put(slots, leaves)
        except BaseException:
            self._put(slots, before)
            raise

    def _put(self, slots: Tensor, leaves: Mapping[str, Tensor]) -> None:
        for place, kept in self.tensors.items():
            kept[slots] = leaves[place]


class Records:
    """Samples in a file, a record for each: the bytes of its tensors, one after the other.

    Each is verified when it is read. The file is not mapped: where it was cut, or the disk is full
    or broken, reading and writing are errors, and not the end of the process.

    Args:
        path: The file.
        layout: What a sample looks like.
        capacity: The number of records.

    Attributes:
        sums: [capacity] uint64, the xxh3-64 of each record that was written.
    """

    def __init__(self, path: Path, layout: Layout, capacity: int) -> None:
        self.path = path
        self.sums: NDArray[np.uint64] = np.zeros(capacity, dtype=np.uint64)
        self._shapes = layout.shapes()
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes.values()]
        self._ends = list(itertools.accumulate(sizes))
        self._size = self._ends[-1]

    @classmethod
    def create(cls, path: Path, layout: Layout, capacity: int) -> Records:
        """Make the file, with all the room that it will need.

        Raises:
            OSError: There is not enough; no file is left behind.
        """
        records = cls(path, layout, capacity)
        with whole(path) as temporary, open(temporary, "wb") as file:
            _reserve(file, capacity * records._size)
        return records

    @classmethod
    def open(cls, path: Path, layout: Layout, capacity: int, sums: Tensor) -> Records:
        """Use the file that is there, with the checksums as :meth:`packed_sums` returned them.

        Raises:
            ValueError: It is gone, or of another size.
        """
        records = cls(path, layout, capacity)
        records.sums[:] = sums.numpy().view(np.uint64)
        found, size = path.stat().st_size if path.exists() else None, capacity * records._size
        if found != size:
            what = "is gone" if found is None else f"has {found:,} bytes, not {size:,}"
            raise DamagedError(f"the buffer's file {str(path)!r} {what}: its samples are lost.")
        return records

    def packed_sums(self) -> Tensor:
        """Return the checksums as int64, which files of tensors know."""
        return torch.from_numpy(self.sums.view(np.int64).copy())

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """Read and verify the samples of slots [n]: tensors [n, *shape] by place.

        Raises:
            DamagedError: One is not what was written; the message names it.
            OSError: The file cannot be read.
        """
        with open(self.path, "rb", buffering=0) as file:
            rows = self._get(file, slots)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if xxhash.xxh3_64_intdigest(row) != self.sums[slot]:
                raise DamagedError(
                    f"sample {slot} of the buffer is damaged in {str(self.path)!r}, from byte "
                    f"{slot * self._size:,} on: it is not what was written; restore the folder "
                    "from a copy, or fill the buffer anew."
                )
        parts = np.split(rows, self._ends[:-1], axis=1)
        return {
            place: _tensor(part, dtype).view(len(rows), *shape)
            for part, (place, (shape, dtype)) in zip(parts, self._shapes.items(), strict=True)
        }

    def write(self, slots: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Put samples into different slots [n]; after an error they are what they were.

        Raises:
            OSError: The file cannot be written.
        """
        rows = np.concatenate([_bytes(leaves[place]) for place in self._shapes], axis=1)
        sums = [xxhash.xxh3_64_intdigest(row) for row in rows]
        with open(self.path, "r+b", buffering=0) as file:
            before = self._get(file, slots)
            try:
                self._put(file, slots, rows)
                self.sums[slots.numpy()] = np.array(sums, dtype=np.uint64)
            except BaseException:
                self._put(file, slots, before)
                raise

    def sync(self) -> None:
        """Wait until the samples are on disk."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def _get(self, file: BinaryIO, slots: Tensor) -> NDArray[np.uint8]:
        rows = np.zeros((len(slots), self._size), dtype=np.uint8)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            rest, offset = row.data, slot * self._size
            while rest and (n := os.preadv(file.fileno(), [rest], offset)):  # 0: a file that ends
                rest, offset = rest[n:], offset + n
        return rows

    def _put(self, file: BinaryIO, slots: Tensor, rows: Iterable[NDArray[np.uint8]]) -> None:
        try:
            for row, slot in zip(rows, slots.tolist(), strict=True):
                rest, offset = row.data, slot * self._size
                while rest:
                    n = os.pwrite(file.fileno(), rest, offset)
                    rest, offset = rest[n:], offset + n
        except OSError as error:
            reason = f"{str(self.path)!r} cannot be written: {error.strerror}"
            raise type(error)(error.errno, reason) from error


def _reserve(file: BinaryIO, size: int) -> None:
    """Have the file system set the bytes aside now, rather than one by one or not at all."""
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{error.strerror}, of {size:,} bytes that the buffer needs; make room, or choose "
            "another path or a smaller capacity",
        ) from None


def _bytes(leaf: Tensor) -> NDArray[np.uint8]:
    """Return [n, *shape] as [n, bytes of one]."""
    plain = leaf.resolve_conj().resolve_neg().contiguous()
    data: NDArray[np.uint8] = plain.view(-1).view(torch.uint8).numpy()
    return data.reshape(len(leaf), plain[:1].nbytes)


def _tensor(rows: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows)).view(-1).view(dtype)
