"""Damage to files: bits that flip."""

from __future__ import annotations

from pathlib import Path


def flipped(data: bytes, place: int, mask: int = 1) -> bytes:
    """Return the data with bits of one byte flipped."""
    place %= len(data)
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def flip(path: Path, place: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file where it stands, which may be mapped."""
    data = flipped(path.read_bytes(), place, mask)
    with open(path, "r+b") as file:
        file.write(data)
