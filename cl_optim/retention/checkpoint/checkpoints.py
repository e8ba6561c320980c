"""Checkpoints of all that a run consists of: written whole or not at all, read back whole."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from cl_optim.ops.warn import warn
from cl_optim.retention import sealed

_FORMAT = "cl_optim.Checkpoint/2"
_NAME = re.compile(r"step-(\d{12})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read; the message says why."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an older one was taken."""


@runtime_checkable
class Stateful(Protocol):
    """A part of a run: a model, optimizer, scheduler, scaler, stream of data."""

    def state_dict(self) -> Any:
        """All that the part needs to go on from here."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on from there."""


@runtime_checkable
class _Checked(Protocol):
    def check_state_dict(self, state_dict: Any, /) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse it."""


def rng_state() -> dict[str, Any]:
    """The states of the global random number generators: Python's, numpy's, torch's on each device.

    Only numbers, strings, tuples and tensors, which ``torch.load(weights_only=True)`` reads.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if started else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if :func:`set_rng_state` would refuse the state."""
    kind, keys, *rest = state["numpy"]
    numpy_state = (kind, keys.numpy().astype(np.uint32), *rest)
    attempts: dict[str, Callable[[], object]] = {
        "python": lambda: random.Random().setstate(state["python"]),
        "numpy": lambda: np.random.RandomState().set_state(numpy_state),
        "torch": lambda: torch.Generator().set_state(state["torch"]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's random state of {name} does not fit this version of it: "
                f"{error}; nothing has been restored."
            ) from None
    if len(state["cuda"]) > torch.cuda.device_count():
        raise CheckpointError(
            f"the checkpoint has random states of {len(state['cuda'])} GPUs, here there are "
            f"{torch.cuda.device_count()}: restore it where there are as many, or load what you "
            "need of torch.load(path, weights_only=True)['parts']."
        )


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

    def __init__(
        self, folder: str | os.PathLike[str], parts: Mapping[str, Stateful], keep: int = 3
    ) -> None:
        for name, part in parts.items():
            if not isinstance(part, Stateful):
                raise TypeError(
                    f"part {name!r} of a checkpoint must have state_dict() and load_state_dict(), "
                    f"which {type(part).__name__} has not."
                )
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a whole number of at least 1, not {keep!r}.")
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
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:012d}.pt"

    def save(self, step: int) -> Path:
        """Write a checkpoint, then delete all but the newest ``keep``.

        Raises:
            CheckpointError: A part's state holds an object that is not a tensor, a number, a
                string or a container of them; no file is left behind.
            OSError: The disk refuses.
        """
        content = {
            "format": _FORMAT,
            "step": step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": rng_state(),
        }
        path = self.path(step)
        temporary = path.with_name(f".{path.name}.tmp")  # one killed in the middle is overwritten
        try:
            sealed.save(content, temporary)
            self._check_readable(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.folder)
        self._prune(step)
        return path

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
        content = sealed.load(self.path(step))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        return content

    def _apply(self, content: dict[str, Any]) -> None:
        saved = content["parts"]
        if saved.keys() != self.parts.keys():
            raise CheckpointError(
                f"the checkpoint of step {content['step']} has the parts {sorted(saved)}, this run "
                f"has {sorted(self.parts)}."
            )
        check_rng_state(content["rng"])
        for name, part in self.parts.items():
            _check_part(name, part, saved[name])
        before, random_before = {}, rng_state()
        try:
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

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        for later in self.steps:
            if later > step:
                self.path(later).unlink()

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
            self.path(step).unlink()


def _copied(state: Any) -> Any:
    """A state that does not change with its part; tensors in main memory, to spare a GPU's."""
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


def _check_part(name: str, part: Stateful, saved: Any) -> None:
    if isinstance(part, (nn.Module, torch.optim.Optimizer)) and not isinstance(saved, Mapping):
        raise CheckpointError(f"the checkpoint's {name!r} is not a {type(part).__name__}'s state.")
    if isinstance(part, nn.Module):
        _check_module(name, part, saved)
        return
    if isinstance(part, torch.optim.Optimizer):
        _check_optimizer(name, part, saved)
    if isinstance(part, _Checked):
        try:
            part.check_state_dict(saved)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's {name!r} does not fit: {error}") from None


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    own = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in saved.get("param_groups", [])]
    if own != there:
        raise CheckpointError(
            f"the checkpoint belongs to another {name}: its groups have {there} parameters, here "
            f"they have {own}."
        )


def _check_module(name: str, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Compare before loading: load_state_dict copies what fits before it complains."""
    own = module.state_dict()
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())[0]
        raise CheckpointError(f"the checkpoint belongs to another {name}: {odd!r} is in one only.")
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.shape != saved[key].shape:
            raise CheckpointError(
                f"the checkpoint belongs to another {name}: {key!r} has shape "
                f"{tuple(saved[key].shape)} there, {tuple(value.shape)} here."
            )


def _sync_folder(folder: Path) -> None:
    """Make a rename in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
