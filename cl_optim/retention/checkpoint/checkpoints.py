"""Checkpoints of all that a run consists of: written whole or not at all, read back whole."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_optim.distributed import ALONE, is_dtensor
from cl_optim.importance.files import fsync_folder
from cl_optim.ops.checks import check_whole
from cl_optim.ops.warn import warn
from cl_optim.optim.settling import settle
from cl_optim.retention import sealed_torch
from cl_optim.retention.checkpoint.parts import (
    CheckpointError,
    Stateful,
    check_part,
    check_rng_state,
)
from cl_optim.retention.checkpoint.random_state import rng_state, set_rng_state

_FORMAT = "cl_optim.Checkpoint/2"
_NAME = re.compile(r"step-(\d{12})\.pt")


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an older one was taken."""


class Checkpoints:
    """The newest checkpoints of a run, in a folder of its own.

    A checkpoint is one file with the state dicts of all parts, the random number generators' states
    and, at its end, a checksum of every byte before it. It is written beside its place, flushed to
    the disk and moved there, so that a process killed at any moment leaves the checkpoints before
    it untouched. Files are read with ``weights_only=True``: loading one runs no code from it.

    Args:
        folder: Created where it does not exist. One run at a time may write into it.
        parts: By name, what has ``state_dict()`` and ``load_state_dict()``.
        keep: How many are kept; older ones are deleted after a newer one is complete.

    Raises:
        TypeError: A part lacks one of the two methods.
        ValueError: ``keep`` is not at least 1.
    """

    _together = ALONE

    def __init__(
        self, folder: str | os.PathLike[str], parts: Mapping[str, Stateful], keep: int = 3
    ) -> None:
        for name, part in parts.items():
            if not isinstance(part, Stateful):
                raise TypeError(
                    f"part {name!r} of a checkpoint must have state_dict() and load_state_dict(), "
                    f"which {type(part).__name__} has not."
                )
        check_whole("keep", keep)
        self.folder = Path(folder)
        self.parts = dict(parts)
        self.keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, ascending."""
        names = map(_NAME.fullmatch, os.listdir(self.folder))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.folder / f"step-{step:012d}.pt"

    def save(self, step: int) -> Path:
        """Write a checkpoint, then delete all but the newest ``keep``.

        Raises:
            CheckpointError: A part's state holds an object that is not a tensor, a number, a
                string or a container of them; no file is left behind.
            OSError: The disk refuses.
        """
        self._settle()
        self._write(self._content(step))
        self._prune(step)
        return self.path(step)

    def _content(self, step: int) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "step": step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": rng_state(),
        }

    def _write(self, content: dict[str, Any]) -> None:
        path = self.path(content["step"])
        temporary = path.with_name(f".{path.name}.tmp")  # one killed in the middle is overwritten
        try:
            sealed_torch.save(content, temporary)
            self._check_readable(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(self.folder)

    def restore(self) -> int:
        """Set all parts and the random number generators to the newest checkpoint that is whole.

        One that is truncated or corrupt, or was written by a version that gave it no checksum, is
        passed over with a :class:`CheckpointWarning`: nothing of it is loaded. Before anything is
        changed, models, optimizers, parts with a ``check_state_dict()`` and the random states are
        compared with it. If a part refuses its state all the same, those before it get back what
        they had, for which their states are kept in memory meanwhile.

        Returns:
            Its step.

        Raises:
            CheckpointError: No checkpoint can be read, or it belongs to other parts, or a part
                refuses its state. Nothing has been changed then.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                content = self._read(step)
            except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
                reason = str(error).splitlines()[0].rstrip(".")
                warn(
                    f"checkpoint {self.path(step)} cannot be read ({reason}); the one before it "
                    "is taken.",
                    CheckpointWarning,
                )
                continue
            self._apply(content)
            return step
        found = f"none of the {len(steps)} in it can be read" if steps else "there is none in it"
        raise CheckpointError(f"no checkpoint to restore from folder {self.folder}: {found}.")

    def _read(self, step: int) -> dict[str, Any]:
        return read_checked(self.path(step))

    def _apply(self, content: dict[str, Any]) -> None:
        saved = content["parts"]
        if saved.keys() != self.parts.keys():
            raise CheckpointError(
                f"the checkpoint of step {content['step']} has the parts {sorted(saved)}, this run "
                f"has {sorted(self.parts)}."
            )
        with self._together.agreeing():
            check_rng_state(content["rng"])
            for name, part in self.parts.items():
                check_part(name, part, saved[name])
        self._settle()
        before, random_before = {}, rng_state()
        try:
            with self._together.agreeing():
                for name, part in self.parts.items():
                    before[name] = _copied(part.state_dict())
                    part.load_state_dict(saved[name])
                name = "rng"
                set_rng_state(content["rng"])  # last: a part may draw while it loads
        except BaseException as error:
            for name, state in before.items():
                self.parts[name].load_state_dict(state)
            set_rng_state(random_before)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"part {name!r} refuses its state in the checkpoint of step {content['step']}: "
                f"{type(error).__name__}: {error}. Everything is as it was before."
            ) from error

    def _settle(self) -> None:
        """Let optimizers take the pull that is due, before any part's state is read."""
        for part in self.parts.values():
            settle(part)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for later in self.steps:
            if later > step:
                self._delete(later)

    def _delete(self, step: int) -> None:
        self.path(step).unlink()

    def _check_readable(self, path: Path) -> None:
        """Find out now, not at a roll-back, that a state holds what cannot be read back."""
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "a checkpoint holds tensors, numbers, strings and containers of them, nothing "
                f"else; one of the parts {sorted(self.parts)} has another object in its "
                f"state_dict(): {_unsupported(error)}."
            ) from None

    def _prune(self, newest: int) -> None:
        """Keep this one and those before it; those after it are of a run that was rolled back."""
        steps = self.steps
        kept = [step for step in steps if step <= newest][-self.keep :]
        for step in set(steps) - set(kept):
            self._delete(step)


def read_checked(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint.

    Raises:
        DamagedError: It is not what was written.
        ValueError: It is of another format.
        OSError: It cannot be read.
    """
    content = sealed_torch.load(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT}")
    return content


def _copied(state: Any) -> Any:
    """Copy a state, so that it does not change with its part; into main memory, not a GPU's."""
    if isinstance(state, torch.Tensor) and is_dtensor(state):
        return state.detach().clone()  # a part
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # of its own kind, with what hangs on a module's
        copied.update({key: _copied(value) for key, value in state.items()})
        return copied
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(_copied(value) for value in state)
    return copy.deepcopy(state)


def _unsupported(error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    return found[1] if found else str(error).splitlines()[0]
