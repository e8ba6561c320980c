"""The log's table of contents: a file of lines, each with its checksum, that only grows.

A line is ``<xxh3-128> <JSON>``. What is not in the manifest has not happened: a record counts from
the moment its line is on disk. A crash can leave half a line at the end, which the next writer cuts
off. Lines are numbered, and a file beside the manifest, replaced after each, has the number of the
last: lines that are lost, at the end, too, are noticed. A crash between the two leaves a line more
than that, which counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cl_optim._version import __version__
from cl_optim.importance.checksums import Entry, sealed, unsealed
from cl_optim.importance.errors import DamagedError, LockedError, LogError
from cl_optim.importance.files import fsync_folder, temporary_folder, whole, write_durably
from cl_optim.ops.warn import warn

FORMAT = "cl_optim.ImportanceLog"
VERSION = 1
FILE = "manifest.jsonl"
SEAL = "manifest.seal"
_LOCK = "lock"


def _completed(line: bytes) -> bytes | None:
    """Return a last line of which only the end is missing, or damaged, whole; else None."""
    candidates = (line + b"\n", line[:-1] + b"\n")
    return next((whole for whole in candidates if unsealed(whole) is not None), None)


class Manifest:
    """The manifest of the log in a folder.

    Attributes:
        damaged: The numbers of lines that are not what was written, from 1.
        lost: The numbers of lines that are gone.
        is_sealed: Whether its seal is there, where it has had one from its beginning.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.damaged: list[int] = []
        self.lost: list[int] = []
        self.is_sealed = True
        self._seal = folder / SEAL
        self._last = 1  # the number of the last line that there ever was

    @classmethod
    def create(cls, folder: Path) -> None:
        """Start a log in an empty folder; the manifest appears whole or not at all."""
        header = {"format": FORMAT, "version": VERSION, "cl_optim": __version__, "seal": SEAL}
        with temporary_folder(folder) as beside:
            for name, entry in ((SEAL, {"lines": 1}), (FILE, header)):  # no manifest without a seal
                write_durably(beside / name, sealed(entry))
                # A link, unlike a rename, does not replace another's.
                with contextlib.suppress(FileExistsError):
                    os.link(beside / name, folder / name)
        fsync_folder(folder)

    def read(self) -> list[Entry]:
        """Read all intact entries after the header.

        Raises:
            LogError: It is not a log's manifest, or one of a newer format.
            DamagedError: Its header is damaged.
        """
        seal = self._read_seal()  # before the manifest, to which a writer may be adding
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            # Half written, by a writer that was killed or that is at work, if not whole otherwise.
            whole_line = _completed(lines.pop())
            lines += [] if whole_line is None else [whole_line]
        entries = [unsealed(line) for line in lines]
        header = self._checked_header(entries[0] if entries else None)
        self._check_lines(entries, 1 if seal is None else seal["lines"])
        self.is_sealed = seal is not None or "seal" not in header
        return [entry for entry in entries[1:] if entry is not None]

    def _read_seal(self) -> Entry | None:
        try:
            return unsealed(self._seal.read_bytes())
        except FileNotFoundError:
            return None

    def _check_lines(self, entries: list[Entry | None], last: int) -> None:
        """Find the lines that are damaged or gone; ``last`` is the last one's number."""
        self.damaged = [place for place, entry in enumerate(entries, 1) if entry is None]
        self.lost = []
        number, after_damage = 0, False
        for entry in entries:
            expected = number + 1
            number = expected if entry is None else entry.get("line", expected)
            if not after_damage:  # a damaged line may have been several
                self.lost += range(expected, number)
            after_damage = entry is None
        if not after_damage:
            self.lost += range(number + 1, last + 1)
        self._last = max(number, last)

    def _checked_header(self, header: Entry | None) -> Entry:
        if header is None:
            raise DamagedError(f"the first line of {self.path} is damaged: it is no log's header.")
        if header.get("format") != FORMAT:
            raise LogError(f"{self.path} is not the manifest of an importance log.")
        if header["version"] > VERSION:
            raise LogError(
                f"{self.path.parent} was written in format {header['version']} by cl_optim "
                f"{header['cl_optim']}; this version reads format {VERSION}: upgrade cl_optim."
            )
        return header

    def append(self, entry: Entry) -> None:
        """Add an entry, durably; on failure the file is as it was. Only with the lock, after read.

        The seal comes last, and with it the entry counts.
        """
        number = self._last + 1
        with open(self.path, "r+b") as file:
            data = file.read()
            end = data.rfind(b"\n") + 1  # a torn line's writer did not live to report it
            last = _completed(data[end:]) or b""
            try:
                file.seek(end)
                file.truncate()
                file.write(last + sealed({"line": number, **entry}))
                file.flush()
                os.fsync(file.fileno())
                with whole(self._seal) as beside:
                    write_durably(beside, sealed({"lines": number}))
            except BaseException:
                seal = self._read_seal()
                if seal is None or seal["lines"] < number:
                    os.truncate(self.path, end)
                    if last:
                        file.seek(end)
                        file.write(last)
                raise
        self._last = number

    def warn_of_damage(self) -> None:
        """Name what is damaged or gone."""
        lines = [(number, "damaged") for number in self.damaged]
        lines += [(number, "gone") for number in self.lost]
        remarks = [
            f"line {number} of {self.path} is {what}: a record that it lists is left out, a task "
            "that it forgets is protected again."
            for number, what in sorted(lines)
        ]
        if not self.is_sealed:
            remarks.append(
                f"{self._seal} is gone or damaged: whether lines are missing at the end of {FILE} "
                "cannot be known. The next record writes it anew."
            )
        for remark in remarks:
            warn(remark)


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Be the only writer; one that is killed frees the lock, once its forked children end.

    Args:
        folder: The log's.
        patience: Seconds to wait for others. Who opens a log has the lock for a moment, to look
            whether anyone is writing; a record takes longer.

    Raises:
        LockedError: Another one is at work.
        OSError: The folder cannot be written to.
    """
    with open(folder / _LOCK, "a+b") as file:
        end = time.monotonic() + patience
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() >= end:
                file.seek(0)
                writer = file.read().decode(errors="replace") or "unknown"
                raise LockedError(
                    f"{folder} is being written to by another writer (process {writer}): wait "
                    "for it."
                )
            time.sleep(0.01)
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not, where a child was forked meanwhile


def _try_lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def being_written(folder: Path) -> bool:
    """Return whether a writer is at work; needs no right to write."""
    try:
        file = open(folder / _LOCK, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    with file:
        return not _try_lock(file, fcntl.LOCK_SH)
