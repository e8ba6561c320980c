"""The folder of a buffer on disk: who may write there, and what its last flush left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_optim.importance.files import fsync_folder, whole
from cl_optim.retention import sealed_torch
from cl_optim.retention.replay.lock import FolderLock

_SAMPLES, _STATE, _CHANGED = "samples.bin", "state.pt", "changed"
_WITHOUT_CHECKSUMS = "state.safetensors"  # of the versions before


class Folder:
    """A folder that belongs to one buffer that adds, or to any number that only draw.

    A copy of it (by ``pickle`` or ``copy``, or in a forked process) has no part in the lock.

    Args:
        path: Made if it does not exist, unless only drawn from.
        read_only: Whether it is only drawn from.

    Raises:
        ValueError: There is no buffer to draw from.
        LockedError: Another buffer is at work there.
        OSError: The folder cannot be made or locked.
    """

    def __init__(self, path: Path, read_only: bool) -> None:
        if not read_only:
            path.mkdir(parents=True, exist_ok=True)
        elif not (path / _STATE).exists():
            raise ValueError(
                f"path {str(path)!r} has no buffer that was filled and flushed, which "
                "read_only=True needs."
            )
        self.path = path
        self.samples = path / _SAMPLES
        self._lock: FolderLock | None = FolderLock(path, read_only, _in_use(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # two that add would destroy each other's samples

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_held(self) -> bool:
        """Whether the lock is this object's."""
        return self._lock is not None and self._lock.held

    @property
    def adds(self) -> bool:
        """Whether samples may be written."""
        return self._lock is not None and self._lock.held and not self._lock.shared

    @property
    def changed(self) -> bool:
        """Whether samples were written since the last flush."""
        return (self.path / _CHANGED).exists()

    def begin_change(self) -> None:
        """Note that the samples are not those of the last flush from now on."""
        (self.path / _CHANGED).touch()

    def load(self) -> dict[str, Any] | None:
        """Read the state that the last flush left, None where there is none.

        Raises:
            ValueError: The buffer was not flushed, is damaged, or is of an earlier version.
        """
        if self.changed:
            raise ValueError(
                f"path {str(self)!r} has a buffer that was changed and not flushed when its "
                "process ended: its samples may be torn. Delete the folder and fill it anew."
            )
        if (self.path / _WITHOUT_CHECKSUMS).exists():
            raise ValueError(
                f"path {str(self)!r} has a buffer of an earlier version of cl_optim, without "
                "checksums: read its samples() with that version and add() them in a new folder."
            )
        file = self.path / _STATE
        if not file.exists():
            return None
        state: dict[str, Any] = sealed_torch.load(file)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of the samples that are there now, durably."""
        with whole(self.path / _STATE) as file:
            sealed_torch.save(state, file)
        fsync_folder(self.path)
        (self.path / _CHANGED).unlink()

    def release(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.release()


def _in_use(folder: Path) -> str:
    """Return what to do where a folder is locked."""
    return (
        "close() that buffer first; where several processes add (torchrun), give each a folder of "
        f'its own, path=f"{folder}/rank{{rank}}"; where they only draw, fill the buffer in one, '
        "close() it, and open it in each with read_only=True and seed=rank"
    )
