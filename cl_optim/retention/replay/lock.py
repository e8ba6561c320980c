"""A lock on a folder that says who holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path

from cl_optim.importance.errors import LockedError

_FILE = "lock"


class FolderLock:
    """Keeps a folder for one writer, or for any number of readers.

    The kernel ends it with the process, however that ends; a forked child has no part in it.

    Args:
        folder: Where the file ``lock`` is; a writer makes it.
        shared: Whether this is a reader.
        remedy: The end of the sentence for those who come too late.

    Raises:
        LockedError: Another one has the folder, in this process or in another.
        FileNotFoundError: A reader finds no lock.
        OSError: The file system has no locks, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, shared: bool, remedy: str) -> None:
        flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        descriptor = os.open(folder / _FILE, flags, 0o666)
        try:
            if not _try(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                raise LockedError(f"path {str(folder)!r} is {_holder(descriptor)}: {remedy}.")
            if not shared:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _signature().encode(), 0)
        except OSError as error:
            os.close(descriptor)
            reason = f"path {str(folder)!r} cannot be locked: {error.strerror}; choose another disk"
            raise type(error)(error.errno, reason) from None
        except BaseException:
            os.close(descriptor)
            raise
        self.shared = shared
        self._descriptor = descriptor
        self._end = weakref.finalize(self, os.close, descriptor)
        self._end.atexit = False  # what is done at exit still needs it; then the kernel ends it
        _HELD.add(self)

    @property
    def held(self) -> bool:
        """Whether it is this process's still."""
        return self._end.alive

    def release(self) -> None:
        """Let others have the folder."""
        if self.held:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._end()


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _signature() -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def _holder(descriptor: int) -> str:
    if _try(descriptor, fcntl.LOCK_SH):  # then it is no writer who has it
        return "being read by other buffers"
    signature = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
    own = signature.startswith(_signature().partition(" since ")[0] + " ")
    return f"in use by {signature}" + (" (this process)" if own else "")


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget() -> None:
    """Close a forked child's copies of the locks, or it would keep them after its parent's end."""
    for lock in _HELD:
        lock._end()


os.register_at_fork(after_in_child=_forget)
