"""Checkpoints of a run of several processes: a folder, in which each writes what it alone has."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cl_optim.distributed import MeanRanks, Together, here, is_dtensor, like, rows_like
from cl_optim.importance.files import fsync_folder
from cl_optim.retention import sealed_torch
from cl_optim.retention.checkpoint.checkpoints import Checkpoints, read_checked
from cl_optim.retention.checkpoint.parts import CheckpointError, Stateful

_NAME = re.compile(r"step-(\d{12})")
_PART = "cl_optim.part"  # the key of what stands for a DTensor
# Are the same in all processes, but for the parts of DTensors.
_SHARED = ("model", "optimizer")


class SharedCheckpoints(Checkpoints):
    """The newest checkpoints of a run of several processes, in a folder that all can read.

    A checkpoint is a folder with a file of each process: its parts of what is spread over them, its
    position in the data and its random states; of replicas the first one's alone. The folder gets
    its name when all have written: killed at any moment, processes leave the checkpoints before it
    untouched. It is read by as many processes as have written it: to go on with another number,
    save model and optimizer by ``torch.distributed.checkpoint`` besides.

    Args:
        folder: As for :class:`Checkpoints`, as are the next two.
        parts: One is named ``"model"``, one ``"optimizer"``.
        keep: How many are kept.
        together: The processes, which do everything at the same time.

    Raises:
        TypeError: As for :class:`Checkpoints`.
        ValueError: Likewise; or the processes have parts of other names, or models of others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        parts: Mapping[str, Stateful],
        keep: int,
        together: Together,
    ) -> None:
        self._together = together
        super().__init__(folder, parts, keep)
        model: Any = parts["model"]
        together.require_same(
            (sorted(parts), sorted(model.state_dict())),
            "the processes have other models, or parts of other names: a checkpoint is of replicas "
            "of one model, or of its DTensors. Where each trains a part of its own, give it a "
            "folder of its own and ranks='own'.",
        )

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, ascending; the same in all processes."""
        names = map(_NAME.fullmatch, os.listdir(self.folder))
        return self._together.gather(sorted(int(match[1]) for match in names if match))[0]

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.folder / f"step-{step:012d}"

    def _file(self, rank: int) -> str:
        return f"rank-{rank}-of-{self._together.size}.pt"

    def _write(self, content: dict[str, Any]) -> None:
        together, path = self._together, self.path(content["step"])
        partial = path.with_name(f".{path.name}.partial")
        with together.agreeing():
            if together.is_first():
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                partial.mkdir()
        with together.agreeing():
            content["parts"] = {
                name: self._own(name, _without_parts(state))
                for name, state in content["parts"].items()
            }
            file = partial / self._file(together.rank)
            sealed_torch.save(content, file)
            self._check_readable(file)
            fsync_folder(partial)
        with together.agreeing():
            if together.is_first():
                shutil.rmtree(path, ignore_errors=True)  # of a run that was rolled back
                os.replace(partial, path)
                fsync_folder(self.folder)

    def _own(self, name: str, state: Any) -> Any:
        """Return what this process writes of a part: nothing of what the first one writes."""
        if name in _SHARED and not self._together.is_first() and not _has_parts(state):
            return None
        return state

    def _read(self, step: int) -> dict[str, Any]:
        with self._together.agreeing():
            path = self.path(step)
            if not (path / self._file(self._together.rank)).is_file():
                raise CheckpointError(
                    f"checkpoint {path} is not of {self._together.size} processes: it is read by "
                    "as many as have written it."
                )
            content = read_checked(path / self._file(self._together.rank))
            first: dict[str, Any] | None = None
            for name in _SHARED:
                if content["parts"].get(name) is None:
                    first = first or read_checked(path / self._file(0))
                    content["parts"][name] = first["parts"][name]
            model: Any = self.parts["model"]
            known = [p for p in model.state_dict().values() if is_dtensor(p)]
            content["parts"] = {
                name: _with_parts(state, known) for name, state in content["parts"].items()
            }
            return content

    def _delete(self, step: int) -> None:
        with self._together.agreeing():
            if self._together.is_first():
                shutil.rmtree(self.path(step))


def checkpoints(
    folder: str | os.PathLike[str],
    parts: Mapping[str, Stateful],
    keep: int,
    ranks: MeanRanks,
) -> Checkpoints:
    """Return the checkpoints of a run, of one process or of several.

    Raises:
        TypeError: As for :class:`Checkpoints`.
        ValueError: Likewise.
    """
    together = Together(ranks)
    if together.size > 1:
        return SharedCheckpoints(folder, parts, keep, together)
    return Checkpoints(folder, parts, keep)


# --- parts of DTensors in a state -----------------------------------------------------------------


def _mapped(state: Any, change: Callable[[Any], Any]) -> Any:
    """Return a state with something else in place of what ``change`` returns it for."""
    changed = change(state)
    if changed is not state:
        return changed
    if isinstance(state, Mapping):
        found = {key: _mapped(value, change) for key, value in state.items()}
        return found if any(found[key] is not state[key] for key in found) else state
    if isinstance(state, (list, tuple)) and not hasattr(state, "_fields"):
        return type(state)(_mapped(value, change) for value in state)
    return state


def _without_parts(state: Any) -> Any:
    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_dtensor(value):
            return value
        return {_PART: here(value.detach()), "layout": _layout(value)}

    return _mapped(state, change)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and _PART in value


def _has_parts(state: Any) -> bool:
    found = False

    def change(value: Any) -> Any:
        nonlocal found
        found |= _is_part(value)
        return value

    _mapped(state, change)
    return found


def _layout(tensor: Any) -> str:
    """Say of what shape a DTensor is, and how it is spread over which processes."""
    return f"{tuple(tensor.shape)} as {tensor.placements} over {tensor.device_mesh.mesh.tolist()}"


def _with_parts(state: Any, known: list[Tensor]) -> Any:
    """Return a state with DTensors, which lie as one of the model's does, or as rows of these."""
    layouts = {_layout(one): one for one in known}

    def change(value: Any) -> Any:
        if not _is_part(value):
            return value
        part, layout = value[_PART], value["layout"]
        if layout in layouts:
            return like(layouts[layout], part.to(layouts[layout].device))
        for one in layouts.values():
            if part.shape[1:] == here(one).shape:
                rows = rows_like(one, part.to(one.device))
                if _layout(rows) == layout:
                    return rows
        raise CheckpointError(
            f"the checkpoint has a part of a tensor of shape {layout}, and the model has none that "
            "lies so: it was spread in another way, or is another model."
        )

    return _mapped(state, change)
