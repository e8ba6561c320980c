"""Tensors in safetensors files of limited size, with a checksum of every byte.

While a shard is written, a second thread computes the checksums of its tensors, and what else there
is to do. Reading looks at one tensor at a time: file size and header are checked when a file is
first used, a tensor when it is read, and what differs from what was written is named and not
returned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_optim.importance.checksums import checksum
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.tensor_files import as_bytes, read_header, save_tensors

SHARD_BYTES = 512 * 2**20

Table = list[dict[str, Any]]


def write(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    limit: int = SHARD_BYTES,
    beside: Callable[[], object] = lambda: None,
) -> Table:
    """Write tensors to ``stem-00001.safetensors`` and so on, durably.

    Args:
        folder: Where.
        stem: How the files' names begin.
        tensors: Keys and tensors, made one at a time; one shard's tensors are held in memory.
        limit: The most bytes of tensors in one file. A larger tensor is cut into pieces.
        beside: Called in the second thread after the checksums of each file, while the disk is at
            work.

    Returns:
        For each file its name, size, header's size and checksum, and its tensors' checksums:
        what :class:`Reader` needs.
    """
    table: Table = []
    others = []
    with ThreadPoolExecutor(1, thread_name_prefix="cl_optim-checksum") as pool:
        for number, shard in enumerate(_shards(tensors, limit), start=1):
            path = folder / f"{stem}-{number:05}.safetensors"
            sums = {key: pool.submit(checksum, as_bytes(value)) for key, value in shard.items()}
            others.append(pool.submit(beside))
            save_tensors(shard, path)
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
                header = read_header(file)
            table.append(
                {
                    "file": path.name,
                    "bytes": path.stat().st_size,
                    "header_bytes": len(header),
                    "header": checksum(header),
                    "tensors": {key: future.result() for key, future in sums.items()},
                }
            )
            shard.clear()  # before the next one is made
    for other in others:
        other.result()
    return table


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in chain.from_iterable(_pieces(key, t, limit) for key, t in tensors):
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        if any(tensor.data_ptr() == other.data_ptr() for other in shard.values()):
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        shard[key] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _pieces(key: str, tensor: Tensor, limit: int) -> Iterator[tuple[str, Tensor]]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.nbytes <= limit:
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # what surrounds a view need not stay in memory
        yield f"0/{key}", tensor
        return
    step = limit // tensor.element_size()
    for number, piece in enumerate(torch.split(tensor.view(-1), step)):
        yield f"{number}/{key}", piece.clone()


class Reader:
    """Reads what :func:`write` wrote.

    Args:
        folder: Where the files are.
        table: What :func:`write` returned.
        owner: Whose tensors they are, for messages: ``"task 'A'"``.
    """

    def __init__(self, folder: Path, table: Table, owner: str) -> None:
        self._folder = folder
        self._owner = owner
        self._shards: Mapping[str, dict[str, Any]] = {
            key: shard for shard in table for key in shard["tensors"]
        }
        self._files: dict[str, Any] = {}

    def read(self, key: str, what: str) -> Tensor:
        """Read a tensor into memory of its own and verify it.

        Args:
            key: The tensor's; one that was cut into pieces comes as a vector.
            what: What it is, for messages.

        Raises:
            DamagedError: It, or the file that it is in, is not what was written.
        """
        pieces = [self._piece(f"0/{key}", what)]
        while f"{len(pieces)}/{key}" in self._shards:
            pieces.append(self._piece(f"{len(pieces)}/{key}", what))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _piece(self, key: str, what: str) -> Tensor:
        shard = self._shards[key]
        path = self._folder / shard["file"]
        try:
            self._check_size(path, shard, what)  # each time: a page that is gone ends the process
            if shard["file"] not in self._files:
                self._check_header(path, shard, what)
                self._files[shard["file"]] = safe_open(path, framework="pt")
            # A copy: the file's own pages could change after the checksum.
            tensor: Tensor = self._files[shard["file"]].get_tensor(key).clone()
        except FileNotFoundError:
            raise self._damaged(what, path, "the file is gone") from None
        except (SafetensorError, OSError) as error:
            raise self._damaged(what, path, str(error)) from None
        if checksum(as_bytes(tensor)) != shard["tensors"][key]:
            raise self._damaged(what, path, "its checksum is not the one that was written")
        return tensor

    def _check_size(self, path: Path, shard: dict[str, Any], what: str) -> None:
        size = path.stat().st_size
        if size != shard["bytes"]:
            reason = f"the file has {size:,} bytes, not {shard['bytes']:,}"
            raise self._damaged(what, path, reason)

    def _check_header(self, path: Path, shard: dict[str, Any], what: str) -> None:
        with open(path, "rb") as file:
            if checksum(file.read(shard["header_bytes"])) != shard["header"]:
                raise self._damaged(what, path, "the file's header is not what was written")

    def _damaged(self, what: str, path: Path, reason: str) -> DamagedError:
        return DamagedError(f"{what} of {self._owner} is damaged in {path}: {reason}.")
