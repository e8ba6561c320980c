"""A safetensors file that holds a checksum of every byte of its own.

Its metadata have ``"checksums"``, the xxh3-128 of each tensor's bytes by name, as JSON; and
``"header_checksum"``, that of the header with zeros in place of itself. Both are written as zeros
first, and filled in from what a second thread computes while the disk is at work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_optim.importance.checksums import checksum
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.tensor_files import as_bytes, read_header, save_tensors

_SUMS, _SEAL = "checksums", "header_checksum"
_ZEROS = "0" * 32
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and their checksums.

    Args:
        tensors: By name, of real dtypes; only those that are views, not contiguous, or not on the
            CPU are copied.
        path: A file that nobody reads yet (:func:`~cl_optim.importance.files.whole`).
        metadata: What else the file's header is to hold.

    Raises:
        ValueError: A tensor has the name that safetensors has for the metadata.
        OSError: It cannot be written.
    """
    if "__metadata__" in tensors:
        raise ValueError(
            "a parameter must not have the name '__metadata__', which safetensors files have for "
            "their own use: save it under another name."
        )
    apart = _apart(tensors)
    blank = {**metadata, _SUMS: json.dumps(dict.fromkeys(apart, _ZEROS)), _SEAL: _ZEROS}
    with ThreadPoolExecutor(1, thread_name_prefix="cl_optim-checksum") as pool:
        sums = {name: pool.submit(checksum, as_bytes(value)) for name, value in apart.items()}
        save_tensors(apart, path, blank)
    with open(path, "r+b") as file:
        header = read_header(file)
        found = {name: future.result() for name, future in sums.items()}
        header = _filled(header, _SUMS, json.dumps(found))
        header = _filled(header, _SEAL, checksum(header))
        file.seek(0)
        file.write(header)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with a memory of its own, as safetensors wants."""
    apart: dict[str, Tensor] = {}
    taken = set()
    for name, given in tensors.items():
        value = given.detach().cpu().contiguous()
        if value.untyped_storage().nbytes() != value.nbytes or value.data_ptr() in taken:
            value = value.clone()
        taken.add(value.data_ptr())
        apart[name] = value
    return apart


def _place(header: bytes, key: str) -> int:
    """Find where the text of a metadata key begins; -1 where there is none."""
    start = f'"{key}":"'.encode()  # within texts quotes are escaped
    found = header.find(start)
    return found if found < 0 else found + len(start)


def _filled(header: bytes, key: str, text: str) -> bytes:
    """Return the header with another text of the same length at a metadata key."""
    escaped, place = json.dumps(text)[1:-1].encode(), _place(header, key)
    return header[:place] + escaped + header[place + len(escaped) :]


def load(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Read tensors into memory of their own and verify them.

    Returns:
        The tensors on ``device``; the metadata; and whether there were checksums. A file without
        is read as it is.

    Raises:
        DamagedError: The file is not what :func:`save` wrote.
        ValueError: It is not a safetensors file.
    """
    with open(path, "rb") as file:
        header = read_header(file)
        place = _place(header, _SEAL)
        if place < 0:
            return *_unverified(path, device), False
        seal = header[place : place + len(_ZEROS)].decode(errors="replace")
        if checksum(_filled(header, _SEAL, _ZEROS)) != seal:
            raise _damaged(path, "its header is not what was written")
        table = json.loads(header[8:])  # which is as it was written, from here on
        metadata: dict[str, str] = table.pop("__metadata__")
        size = len(header) + max((one["data_offsets"][1] for one in table.values()), default=0)
        if os.fstat(file.fileno()).st_size != size:
            raise _damaged(path, f"it has not the {size:,} bytes that were written")
        sums = json.loads(metadata[_SUMS])
        return _verified(file, path, len(header), table, sums, device), metadata, True


def _verified(
    file: BufferedReader,
    path: Path,
    start: int,
    table: Mapping[str, Any],
    sums: Mapping[str, str],
    device: torch.device | str,
) -> dict[str, Tensor]:
    tensors, found = {}, {}
    with ThreadPoolExecutor(1, thread_name_prefix="cl_optim-checksum") as pool:
        for name, one in table.items():
            value = torch.empty(one["shape"], dtype=_DTYPES[one["dtype"]], device="cpu")
            data = as_bytes(value)
            file.seek(start + one["data_offsets"][0])
            file.readinto(data)
            found[name] = pool.submit(checksum, data)
            tensors[name] = value.to(device)
    for name, future in found.items():
        if future.result() != sums[name]:
            raise _damaged(path, f"the checksum of {name!r} is not the one that was written")
    return tensors


def _unverified(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path {str(path)!r} is not a safetensors file: {error}.") from None


def _damaged(path: Path, reason: str) -> DamagedError:
    return DamagedError(f"the file {str(path)!r} is damaged: {reason}.")
