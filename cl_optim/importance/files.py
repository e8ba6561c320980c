"""Files that appear whole or not at all, and stay."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_ABANDONED = 3600  # seconds


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move what was written to ``path`` at the end.

    After an error there is no new file, and an old one is as it was. What is no file, such as
    /dev/stdout, is written to itself, and so is what a link points to.

    Raises:
        OSError: It cannot be written; the sentence names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} cannot be written: it is a folder")
    if is_stream(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    try:
        with temporary_folder(path.parent) as folder:
            yield folder / path.name
            os.replace(folder / path.name, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"{str(path)!r} cannot be written: {reason}") from error


def is_stream(path: Path) -> bool:
    """Return whether a path is no file that another one could replace."""
    is_link = str(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))  # to what is open
    return is_link or (path.exists() and not path.is_file())


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- what killed writers leave --------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Make a folder in another one, for files on their way into that, and delete it at the end.

    A writer that is killed leaves its folder, which the next one here deletes. Those of writers at
    work are safe, in whatever process: each has its folder locked, and a process that ends, however
    it does, frees its locks.
    """
    _sweep(beside)
    folder, descriptor = _locked_folder(beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(beside: Path) -> tuple[Path, int]:
    while True:
        folder = beside / f".{uuid.uuid4().hex}.tmp"
        folder.mkdir(0o700)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # it was swept before it was locked
        # Where the file system has no locks, nobody can take one to sweep, either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


def _sweep(beside: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that cannot be read, say
        for name in os.listdir(beside):
            if _TEMPORARY.fullmatch(name):
                _sweep_one(beside / name)


def _sweep_one(left: Path) -> None:
    """Delete it, unless a writer is at work in it."""
    try:
        descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # another's, or just gone
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif time.time() - left.stat().st_mtime > _ABANDONED:
            left.unlink()  # of an earlier version, whose writers took no locks
    except OSError:
        return
    finally:
        os.close(descriptor)
