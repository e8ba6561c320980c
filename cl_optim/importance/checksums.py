"""Checksums: of bytes, of a file, and of a line of JSON that begins with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

_CHUNK = 2**24

Entry = dict[str, Any]


def checksum(data: Any) -> str:
    """Return the xxh3-128 of bytes or of an array, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Return the :func:`checksum` of a file's bytes, of which a few are in memory at a time."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sealed(entry: Entry) -> bytes:
    """Return an entry as a line with its checksum: ``<xxh3-128> <JSON>``."""
    body = json.dumps(entry, allow_nan=False).encode()
    return f"{checksum(body)} ".encode() + body + b"\n"


def unsealed(line: bytes) -> Entry | None:
    """Return the entry of a line, None where the line is not what was written."""
    seal, _, body = line.partition(b" ")
    if not body.endswith(b"\n") or seal != checksum(body[:-1]).encode():
        return None
    entry: Entry = json.loads(body)
    return entry
