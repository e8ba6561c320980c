"""The importance log: which weights mattered for which task, kept on disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cl_optim.distributed import Together, mesh_of, whole
from cl_optim.importance import codecs, record
from cl_optim.importance.checksums import Entry
from cl_optim.importance.errors import LockedError, LogError
from cl_optim.importance.files import fsync_folder
from cl_optim.importance.importance import Importance, check_reduced
from cl_optim.importance.kronecker.importance import KroneckerImportance, check_factors
from cl_optim.importance.manifest import (
    FILE,
    SEAL,
    Manifest,
    being_written,
    locked,
)
from cl_optim.importance.names import bare_names, match_names, without_wrappers
from cl_optim.importance.record import Anchors, Record
from cl_optim.ops.checks import check_fraction
from cl_optim.ops.warn import warn

if TYPE_CHECKING:
    from cl_optim.importance.report.tensorboard import ScalarWriter
    from cl_optim.importance.watch import Watch

_RECORDS = "records"
_UNFINISHED = "unfinished"
_PARTIAL = ".partial"
_RECORD = re.compile(r"\d+-\w+(\.partial)?")
_PATIENCE = 0.5  # seconds


class ImportanceLog:
    """A folder that keeps the importance of every task a model has learned.

    Records are only ever added. Each is written beside the others, made durable, moved into place
    and then listed in the manifest: a crash at any instant, a full disk or a pulled plug lose at
    most the record being written, which the next opening sets aside with a warning. Every byte has
    a checksum, and what is damaged is named and not returned. There is no pickle in it. Parameters
    have the names of the bare model, without what DDP, torch.compile, FSDP and PEFT put into them.

    An object knows what was in the log when it was opened, or when it last wrote to it itself.

    Args:
        path: The folder; it is made where there is none.
        mode: ``"a"`` to read and record, ``"r"`` to read only: nothing is made or moved.

    Raises:
        FileNotFoundError: ``mode="r"`` and there is no such folder.
        LogError: The folder is no log, or was written by a newer version.
        DamagedError: The log's header is damaged.
        OSError: The folder cannot be made.

    Example:
        .. code-block:: python

            log = ImportanceLog("runs/support-bot")
            log.record("task A", importance, model=model)
            optimizer.consolidate(log)
    """

    def __init__(self, path: str | os.PathLike[str], mode: Literal["a", "r"] = "a") -> None:
        if mode not in ("a", "r"):
            raise ValueError(f"mode must be 'a' or 'r', not {mode!r}.")
        self._path = Path(path)
        self._mode = mode
        if mode == "a":
            self._create()
        elif not self._path.is_dir():
            raise FileNotFoundError(f"path {str(self._path)!r} is not a folder.")
        if not (self._path / FILE).is_file():
            raise LogError(f"path {str(self._path)!r} is not an importance log: it has no {FILE}.")
        self._manifest = Manifest(self._path)
        self._entries = self._manifest.read()
        self._manifest.warn_of_damage()
        if self._unlisted():
            self._recover()

    def _create(self) -> None:
        if self._path.exists() and not self._path.is_dir():
            raise LogError(f"path {str(self._path)!r} is a file, not a folder.")
        # A seal alone is of a log that another is making, or was when it was killed.
        if self._path.is_dir() and any(
            name[0] != "." and name != SEAL for name in os.listdir(self._path)
        ):
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            Manifest.create(self._path)
        except OSError as error:
            raise type(error)(
                error.errno, f"a log cannot be made in {str(self._path)!r}: {error.strerror}"
            ) from None

    # --- after a crash ----------------------------------------------------------------------------

    def _unlisted(self) -> list[Path]:
        """Return the folders of records that are not in the manifest."""
        records = self._path / _RECORDS
        if not records.is_dir():
            return []
        listed = {entry["id"] for entry in self._entries if entry["event"] == "record"}
        return sorted(
            folder
            for folder in records.iterdir()
            if _RECORD.fullmatch(folder.name) and folder.name not in listed
        )

    def _recover(self) -> None:
        """Set aside what a writer that is no more has left; only say so where that is not ours."""
        try:
            if self._mode == "r":
                raise PermissionError
            with locked(self._path):
                self._entries = self._manifest.read()  # it may have been finished meanwhile
                for folder in self._unfinished():
                    aside = self._path / _UNFINISHED / folder.name
                    aside.parent.mkdir(exist_ok=True)
                    folder.rename(aside)
                    _warn_of_unfinished(aside)
        except LockedError:
            return  # a writer is at work on it
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
            found = set(self._unfinished())  # before the look at the lock: later ones are at work
            if not being_written(self._path):
                self._entries = self._manifest.read()
                for folder in found.intersection(self._unfinished()):
                    _warn_of_unfinished(folder)

    def _unfinished(self) -> list[Path]:
        """Return of what is not listed what no damaged or lost line can have listed."""
        return [
            folder
            for folder in self._unlisted()
            if folder.name.endswith(_PARTIAL) or not (self._manifest.damaged or self._manifest.lost)
        ]

    @contextlib.contextmanager
    def _only_writer(self) -> Iterator[None]:
        if self._mode == "r":
            raise LogError(f"the log {str(self._path)!r} was opened with mode='r': only to read.")
        with locked(self._path, _PATIENCE):
            yield

    # --- what is in it ----------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def tasks(self) -> list[str]:
        """The tasks that are protected, in the order in which they were recorded."""
        return list(self._listed())

    @property
    def forgotten(self) -> list[str]:
        """The tasks that were recorded and are to be forgotten."""
        recorded = {entry["task"]: None for entry in self._entries if entry["event"] == "record"}
        return [task for task in recorded if task not in self._listed()]

    def _listed(self) -> dict[str, Entry]:
        """Return task → the manifest's entry of its record."""
        listed: dict[str, Entry] = {}
        for entry in self._entries:
            if entry["event"] == "forget":
                listed.pop(entry["task"], None)
            else:
                listed[entry["task"]] = entry
        return listed

    def __len__(self) -> int:
        return len(self._listed())

    def __contains__(self, task: object) -> bool:
        return task in self._listed()

    def __getitem__(self, task: str) -> Record:
        """Return the record of a task, with its statistics, anchors and frozen weights.

        Raises:
            LogError: There is no such task.
            DamagedError: Its table is damaged.
        """
        listed = self._listed()
        if task not in listed:
            raise LogError(f"there is no task {task!r} in the log, which has {list(listed)}.")
        entry = listed[task]
        return Record(self._path / _RECORDS / entry["id"], entry["seal"])

    def load(self, task: str) -> Importance:
        """Return a task's importance; a tensor is read and verified when it is asked for.

        Raises:
            LogError: There is no such task.
            DamagedError: Its table is damaged; or, on access, the tensor that is asked for.
        """
        return self[task].importance()

    # --- recording --------------------------------------------------------------------------------

    def record(
        self,
        task: str,
        importance: Mapping[str, Tensor],
        model: nn.Module | None = None,
        anchors: Anchors = None,
        frozen: Mapping[str, Tensor] | None = None,
        codec: str | torch.dtype | codecs.Codec = "float32",
    ) -> None:
        """Add a task's importance, durably: when this returns, it survives a crash.

        Where tensors are DTensors, all of their processes call it: the first one gathers them, one
        after the other, in its host memory, and writes the record, whole; what it raises is raised
        in all.

        Args:
            task: Its name, any text.
            importance: Parameter name → F ≥ 0: an :class:`cl_optim.Importance`, whose counts and
                metadata are kept, or any mapping.
            model: Its parameters' names, shapes and dtypes are recorded, and must fit.
            anchors: The weights that the task leaves, by name: ``dict(model.named_parameters())``;
                or the path of the checkpoint that has them, of which a checksum is recorded.
            frozen: Masks, by name, of weights that are frozen from now on:
                ``{p.name: p.frozen for p in optimizer.protected()}``.
            codec: How the importance is written: ``"float32"``, ``"bfloat16"``, ``"log8"``,
                ``"topk"``, ``"rank1"``, the dtype of one of the first two, or a
                :class:`~cl_optim.importance.codecs.Codec`. Kronecker factors are written as they
                are or as ``"bfloat16"``; the other codecs are for diagonals.

        Raises:
            ValueError: The task is in the log already, an importance is negative or not finite, or
                of one of several processes; names or shapes do not fit the model.
            LockedError: Another writer is at work.
            OSError: The disk is full, or the folder cannot be written to. In all cases the log is
                as it was.
        """
        together = _together(importance, anchors, frozen)
        if together.size > 1:
            is_first = together.is_first()
            importance = _gathered(importance, is_first)
            anchors = _gathered(anchors, is_first)
            frozen = _gathered(frozen, is_first)
            with together.agreeing():
                if is_first:
                    self.record(task, importance, model, anchors, frozen, codec)
            self._entries = self._manifest.read()
            return
        how = codec if isinstance(codec, codecs.Codec) else codecs.codec(codec)
        self._check_task(task)
        _check_codec(importance, how)
        check_reduced(importance)
        _check_importance(importance)
        bare = _bare(importance)
        frozen = None if frozen is None else without_wrappers(frozen)
        _check_masks(frozen or {}, bare.shapes)
        _check_anchors(anchors)
        anchors = without_wrappers(anchors) if isinstance(anchors, Mapping) else anchors
        if model is not None:
            _check_model(importance, model)
        with self._writing(f"task {task!r} cannot be recorded"):
            if task in self:
                raise LogError(f"task {task!r} is in the log already: forget it first.")
            name = f"{len(self._entries) + 1:05}-{uuid.uuid4().hex[:8]}"
            partial, final = (self._path / _RECORDS / n for n in (name + _PARTIAL, name))
            try:
                if not partial.parent.exists():
                    partial.parent.mkdir()
                    fsync_folder(self._path)
                partial.mkdir()
                seal = record.write(partial, task, bare, model, anchors, frozen, how)
                partial.rename(final)
                fsync_folder(final.parent)
                self._append({"event": "record", "task": task, "id": name, "seal": seal})
            except BaseException:
                if all(entry.get("id") != name for entry in self._manifest.read()):
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.rmtree(final, ignore_errors=True)
                raise

    def forget(self, task: str) -> None:
        """Take a task out of what :meth:`merge` and ``consolidate`` protect; its record stays.

        Raises:
            LogError: There is no such task.
            LockedError: Another writer is at work.
        """
        with self._writing(f"task {task!r} cannot be forgotten"):
            if task not in self:
                raise LogError(f"there is no task {task!r} in the log, which has {self.tasks}.")
            self._append({"event": "forget", "task": task})

    @contextlib.contextmanager
    def _writing(self, failure: str) -> Iterator[None]:
        try:
            with self._only_writer():
                self._entries = self._manifest.read()  # another writer may have added some
                yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"{failure} in {str(self._path)!r}: {reason}; the log is as it was"
            ) from error

    def _append(self, entry: Entry) -> None:
        self._manifest.append(entry)
        self._entries.append(entry)

    @staticmethod
    def _check_task(task: str) -> None:
        if not isinstance(task, str) or not task:
            raise ValueError(f"task must be a name, not {task!r}.")

    # --- what it is for ---------------------------------------------------------------------------

    def merge(
        self, tasks: Sequence[str] | None = None, decay: float = 1.0, strict: bool = True
    ) -> Importance:
        """Return what online EWC protects after these tasks: Σ decayᵏ F of the k-th from the last.

        Args:
            tasks: In their order; all that are not forgotten if None.
            decay: What remains of the earlier ones with each task, in [0, 1].
            strict: As for :meth:`Importance.merge`.

        Raises:
            LogError: There is no such task, or none at all.
            ValueError: A parameter has two shapes; or some of the records have Kronecker factors,
                and others none: merge what ``log.load(task).diagonal()`` returns of each.
            DamagedError: A tensor is damaged.
        """
        check_fraction("decay", decay)
        chosen = self._chosen(tasks)
        if not chosen:
            raise LogError(f"there is no task to merge in the log {str(self._path)!r}.")
        merged = self.load(chosen[0])
        for task in chosen[1:]:
            merged = merged.merge(self.load(task), decay, strict)
        return merged

    def _chosen(self, tasks: Sequence[str] | None) -> list[str]:
        if isinstance(tasks, str):
            return [tasks]
        return self.tasks if tasks is None else list(tasks)

    def frozen(self, tasks: Sequence[str] | None = None, strict: bool = True) -> dict[str, Tensor]:
        """Return the masks of all weights that any of these tasks froze; empty where none did.

        Args:
            tasks: All that are not forgotten if None.
            strict: A parameter of two shapes is an error; ``False`` drops the masks of older ones.

        Raises:
            LogError: There is no such task.
            ValueError: A parameter has two shapes.
            DamagedError: A mask is damaged.
        """
        masks: dict[str, Tensor] = {}
        for task in self._chosen(tasks):
            found = self[task]
            for name in [name for name in masks if name in found.shapes]:
                before, now = tuple(masks[name].shape), found.shapes[name]
                if before == now:
                    continue
                if strict:
                    shapes = f"{before} and {now}"
                    raise ValueError(f"{name!r} cannot be frozen: its shapes are {shapes}.")
                del masks[name]
            for name, mask in (found.frozen() or {}).items():
                masks[name] = masks[name] | mask if name in masks else mask
        return masks

    def watch(self, optimizer: torch.optim.Optimizer, every: int = 100) -> Watch:
        """Record penalty, drift and importance of each layer while training.

        Args:
            optimizer: An :class:`cl_optim.EWCAdamW`, made from named parameters; or what is around
                one, such as :class:`cl_optim.GEM`.
            every: Steps from one entry to the next; nothing is computed in between.

        Returns:
            What stops the watching: ``close()``, or the end of its ``with``.

        Raises:
            TypeError: The optimizer protects nothing.
            ValueError: It was made without names, or ``every`` is no positive whole number.
        """
        from cl_optim.importance.watch import Watch

        if self._mode == "r":
            raise LogError(f"the log {str(self._path)!r} was opened with mode='r': only to read.")
        return Watch(optimizer, self._path / "training", every)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write the report, one self-contained HTML page."""
        from cl_optim.importance.report.data import report_data
        from cl_optim.importance.report.html import write_html

        write_html(report_data(self), Path(path))

    def to_tensorboard(self, writer: ScalarWriter) -> None:
        """Add the layers' statistics, task by task, and what was watched, step by step.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
        """
        from cl_optim.importance.report.tensorboard import add_log

        add_log(self, writer)

    def __repr__(self) -> str:
        return f"ImportanceLog({str(self._path)!r}: {len(self)} tasks)"


def _warn_of_unfinished(folder: Path) -> None:
    warn(
        f"an unfinished record was found: its writer stopped before the end. It is not in the log, "
        f"and lies in {folder}."
    )


_HOLDING = (dict, MappingProxyType)  # tensors; others make them when they are asked for


def _together(*given: object) -> Together:
    """Return the processes that what is to be recorded is spread over."""
    tensors: list[Tensor] = []
    for mapping in given:
        held = mapping._sums if isinstance(mapping, Importance) else mapping
        if isinstance(held, _HOLDING):  # what makes its tensors when they are asked for is of files
            tensors += [value for value in held.values() if isinstance(value, Tensor)]
    return Together(mesh=mesh_of(tensors))


def _gathered(given: Any, keep: bool) -> Any:
    """Return what is to be recorded with whole tensors in host memory, which one process keeps."""
    if isinstance(given, Importance):
        return given._with_sums(_gathered(given._sums, keep))
    if not isinstance(given, _HOLDING):
        return given
    found = {}
    for name, value in given.items():
        value = whole(value) if isinstance(value, Tensor) else value
        if keep:
            found[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return found


def _bare(importance: Mapping[str, Tensor]) -> Importance:
    """Return a checked importance under the names of the bare model; a mapping has one sample."""
    if not isinstance(importance, Importance):
        return Importance.lazy(without_wrappers(importance), 1, None, {})
    if isinstance(importance, KroneckerImportance):
        return importance.renamed(bare_names(importance))
    counts = (importance.samples, importance.tokens, importance.metadata)
    return Importance.lazy(without_wrappers(importance.sums), *counts)


def _check_codec(importance: Mapping[str, Tensor], how: codecs.Codec) -> None:
    if isinstance(importance, KroneckerImportance) and how.name not in record.OF_FACTORS:
        raise ValueError(
            f"codec must be one of {tuple(record.OF_FACTORS)} for an importance with Kronecker "
            f"factors, not {how.name!r}: or record its .diagonal()."
        )


def _check_importance(importance: Mapping[str, Tensor]) -> None:
    if not importance:
        raise ValueError("importance must have at least one parameter.")
    sums, samples = importance, 1.0
    if isinstance(importance, KroneckerImportance):
        sums, samples = importance.unfactored, importance.samples
        for weight, factors in importance.factors.items():
            check_factors(factors, weight)
    elif isinstance(importance, Importance):
        sums, samples = importance.sums, importance.samples
    largest = torch.finfo(torch.float32).max * min(samples, 1)  # of sums, and of means over samples
    for name, value in sums.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"importance[{name!r}] must be a real tensor with a text as its name.")
        if value.numel() == 0:
            continue
        low, high = (bound.item() for bound in value.detach().aminmax())  # NaN shows in both
        if not (low >= 0.0 and high <= largest):
            raise ValueError(
                f"the importance of {name!r} must be finite and at least 0; it reaches from {low} "
                f"to {high}."
            )


def _check_masks(frozen: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, mask in frozen.items():
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            raise TypeError(f"frozen[{name!r}] must be a bool tensor.")
        if name not in shapes:
            raise ValueError(f"frozen names {name!r}, which has no importance.")
        shape = shapes[name]
        if mask.shape != shape:
            raise ValueError(
                f"frozen[{name!r}] must have the importance's shape {tuple(shape)}, not "
                f"{tuple(mask.shape)}."
            )


def _check_anchors(anchors: Anchors) -> None:
    if isinstance(anchors, Mapping):
        for name, value in anchors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"anchors[{name!r}] must be a tensor.")
    elif anchors is not None and not Path(anchors).is_file():
        raise FileNotFoundError(f"anchors: there is no checkpoint {str(anchors)!r}.")


def _check_model(importance: Mapping[str, Tensor], model: nn.Module) -> None:
    params = dict(model.named_parameters())
    names = match_names(importance, params)
    shapes: Mapping[str, torch.Size] = (
        importance.shapes
        if isinstance(importance, Importance)
        else {name: value.shape for name, value in importance.items()}
    )
    for name, found in shapes.items():
        if name not in names:
            raise ValueError(f"the importance of {name!r} is of no parameter of the model.")
        shape = params[names[name]].shape
        if found != shape:
            raise ValueError(
                f"the importance of {name!r} must have the parameter's shape {tuple(shape)}, not "
                f"{tuple(found)}."
            )
