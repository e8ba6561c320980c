"""One record of the log: a task's importance, and what belongs to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_optim._version import __version__
from cl_optim.importance import codecs, shards
from cl_optim.importance.checksums import checksum, file_checksum, sealed, unsealed
from cl_optim.importance.codecs import Codec
from cl_optim.importance.errors import DamagedError, LogError
from cl_optim.importance.files import fsync_folder, write_durably
from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker import disk
from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.importance.names import Lazy, without_wrappers
from cl_optim.importance.statistics import Summaries, Summary, flat_float32
from cl_optim.ops.checks import dtype_name

_FILE = "record.json"
# In which codecs Kronecker factors can be written, and as what. Others round S as if its neighbours
# were alike, and would not make a record smaller: the bases outweigh it.
OF_FACTORS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Anchors = Mapping[str, Tensor] | str | os.PathLike[str] | None


# --- writing --------------------------------------------------------------------------------------


def write(
    folder: Path,
    task: str,
    importance: Importance,
    model: nn.Module | None,
    anchors: Anchors,
    frozen: Mapping[str, Tensor] | None,
    how: Codec,
) -> str:
    """Write a checked record into an empty folder, durably.

    Args:
        folder: The record's own.
        task: Its name.
        importance: Under the names of the bare model, as are ``anchors`` and ``frozen``.
        model: Whose parameters' names, shapes and dtypes are recorded.
        anchors: The weights that the task leaves, or the checkpoint that has them.
        frozen: Masks of frozen weights.
        how: The codec of the importance.

    Returns:
        The checksum of its table, which the manifest keeps.
    """
    sums, matrices = importance.sums, None
    if isinstance(importance, KroneckerImportance):
        sums, matrices = importance.unfactored, importance.factors
    table: dict[str, Any] = {
        "task": task,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cl_optim": __version__,
        "samples": importance.samples,
        "tokens": importance.tokens,
        "metadata": importance.metadata,
        "codec": {"name": how.name, **how.options()},
        "shapes": {name: list(shape) for name, shape in importance.shapes.items()},
        "model": None if model is None else fingerprint(model),
    }
    summaries = Summaries()
    names: SimpleQueue[str] = SimpleQueue()

    def encoded() -> Iterator[tuple[str, Tensor]]:
        encode = how.encoder(sums)
        for name, value in sums.items():
            names.put(name)
            flat = flat_float32(value)
            for part, tensor in encode(flat.view(value.shape)).items():
                yield f"{part}/{name}", tensor

    def factored(matrices: Mapping[str, Factors]) -> Iterator[tuple[str, Tensor]]:
        for weight, factors in matrices.items():
            table["factors"][weight] = disk.description(factors)
            ranks = (factors.output.effective_rank(), factors.input.effective_rank())
            table["effective_ranks"][weight] = ranks
            for name in (weight, factors.layout.bias):
                if name is not None:
                    names.put(name)
            for part, tensor in disk.tensors(factors).items():
                yield f"{part}/{weight}", tensor.to(OF_FACTORS[how.name])

    def summarize() -> None:
        # Not beside the encoder, which has a thread on every core and waits for the slowest.
        while not names.empty():
            name = names.get()
            if name in sums:
                summaries.add(name, sums[name], importance.samples)
            else:  # made of its factors, here alone
                summaries.add(name, importance[name])
        layers = summaries.layers()
        table["layers"] = {layer: list(summary) for layer, summary in layers.items()}
        table["whole"] = list(summaries.whole())

    if matrices is not None:
        table |= {"factors": {}, "effective_ranks": {}}
        parts = factored(matrices)
        table["kronecker"] = shards.write(folder, "kronecker", parts, beside=summarize)
    table["importance"] = shards.write(folder, "importance", encoded(), beside=summarize)
    if isinstance(anchors, Mapping):
        table["anchors"] = shards.write(folder, "anchors", iter(anchors.items()))
        table["anchor_shapes"] = {name: list(value.shape) for name, value in anchors.items()}
    elif anchors is not None:
        table["checkpoint"] = _reference(Path(anchors))
    if frozen is not None:
        bits = ((name, _packed(mask)) for name, mask in frozen.items())
        table["frozen"] = shards.write(folder, "frozen", bits)
        table["frozen_shapes"] = {name: list(mask.shape) for name, mask in frozen.items()}
    line = sealed(table)
    write_durably(folder / _FILE, line)
    fsync_folder(folder)
    return checksum(line)


def fingerprint(model: nn.Module) -> dict[str, list[Any]]:
    """Name → shape and dtype of each parameter."""
    params = without_wrappers(dict(model.named_parameters()))
    return {name: [list(param.shape), dtype_name(param.dtype)] for name, param in params.items()}


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy()))


def _reference(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint.resolve()
    return {"path": str(path), "bytes": path.stat().st_size, "checksum": file_checksum(path)}


# --- reading --------------------------------------------------------------------------------------


class Record:
    """A record on disk.

    Attributes:
        task: Whose importance it is.
        time: When it was recorded, UTC.
        metadata: How the importance was made.
        codec: What it is written in.
    """

    def __init__(self, folder: Path, seal: str) -> None:
        try:
            line = (folder / _FILE).read_bytes()
        except OSError as error:
            raise DamagedError(f"{folder / _FILE} cannot be read: {error.strerror}.") from None
        table = unsealed(line)
        if table is None or checksum(line) != seal:
            raise DamagedError(f"{folder / _FILE} is damaged: its checksum is not the one written.")
        self._table = table
        self._folder = folder
        self.task: str = table["task"]
        self.time: str = table["time"]
        self.metadata: dict[str, Any] = table["metadata"]
        options = dict(table["codec"])
        self.codec = codecs.codec(options.pop("name"), **options)

    @property
    def samples(self) -> float:
        """The samples in the importance's sums."""
        return float(self._table["samples"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → shape."""
        return {name: tuple(shape) for name, shape in self._table["shapes"].items()}

    @cached_property
    def layers(self) -> dict[str, Summary]:
        """The layers' statistics, without reading a tensor."""
        return {layer: _summary(values) for layer, values in self._table["layers"].items()}

    @property
    def whole(self) -> Summary:
        """The statistics of all weights."""
        return _summary(self._table["whole"])

    @property
    def effective_ranks(self) -> dict[str, tuple[float, float]]:
        """Those of each matrix with Kronecker factors, without reading a tensor; none, if none."""
        ranks = self._table.get("effective_ranks", {})
        return {weight: (output, input) for weight, (output, input) in ranks.items()}

    @property
    def model(self) -> dict[str, list[Any]] | None:
        """The model's parameters at the time, name → [shape, dtype]; None where not recorded."""
        model: dict[str, list[Any]] | None = self._table["model"]
        return model

    @property
    def nbytes(self) -> int:
        """Bytes of all its shards."""
        kinds = ("importance", "kronecker", "anchors", "frozen")
        return sum(shard["bytes"] for kind in kinds for shard in self._table.get(kind, ()))

    def importance(self) -> Importance:
        """Return its importance; a tensor is read and verified when it is asked for.

        A :class:`~cl_optim.KroneckerImportance`, if that was recorded.
        """
        shapes = self._table["shapes"]
        reader = self._reader("importance")

        def read(name: str) -> Tensor:
            what = f"the importance of {name!r}"
            parts = {part: reader.read(f"{part}/{name}", what) for part in self.codec.parts}
            return self.codec.decode(parts, torch.Size(shapes[name]))

        metadata = {**self.metadata, "task": self.task}
        counts = (self._table["samples"], self._table["tokens"], metadata)
        if "factors" not in self._table:
            return Importance.lazy(Lazy(shapes, read), *counts)
        described = self._table["factors"]
        layouts = {weight: disk.layout(one) for weight, one in described.items()}
        matrices = self._reader("kronecker")

        def assembled(weight: str) -> Factors:
            what = f"the Kronecker factors of {weight!r}"
            return disk.assembled(
                described[weight], lambda part: matrices.read(f"{part}/{weight}", what)
            )

        inside = {*layouts, *(layout.bias for layout in layouts.values())}
        sums = Lazy([name for name in shapes if name not in inside], read)
        return KroneckerImportance.lazy(sums, *counts, Lazy(layouts, assembled), layouts)

    def anchors(self) -> Mapping[str, Tensor] | None:
        """Return the weights that the task left, None where they were not recorded.

        Raises:
            LogError: They are in a checkpoint that is not safetensors, which only its owner's
                code can load.
            DamagedError: The checkpoint has changed.
        """
        if "checkpoint" in self._table:
            return self._referenced(self._table["checkpoint"])
        if "anchors" not in self._table:
            return None
        shapes, reader = self._table["anchor_shapes"], self._reader("anchors")

        def read(name: str) -> Tensor:
            return reader.read(name, f"the anchor of {name!r}").view(shapes[name])

        return Lazy(shapes, read)

    def frozen(self) -> Mapping[str, Tensor] | None:
        """Return the masks of frozen weights, None where they were not recorded."""
        if "frozen" not in self._table:
            return None
        shapes, reader = self._table["frozen_shapes"], self._reader("frozen")

        def read(name: str) -> Tensor:
            bits = reader.read(name, f"the frozen mask of {name!r}").numpy()
            shape = torch.Size(shapes[name])
            return torch.from_numpy(np.unpackbits(bits, count=shape.numel())).bool().view(shape)

        return Lazy(shapes, read)

    def _reader(self, kind: str) -> shards.Reader:
        return shards.Reader(self._folder, self._table[kind], f"task {self.task!r}")

    def _referenced(self, reference: Mapping[str, Any]) -> Mapping[str, Tensor]:
        path = Path(reference["path"])
        if path.suffix != ".safetensors":
            raise LogError(
                f"the anchors of task {self.task!r} are the checkpoint {path}, which is not "
                "safetensors: load it with the code that wrote it."
            )
        if not path.is_file():
            raise LogError(f"the anchors of task {self.task!r}, {path}, are gone.")
        if path.stat().st_size != reference["bytes"] or (
            file_checksum(path) != reference["checksum"]
        ):
            raise DamagedError(f"the anchors of task {self.task!r}, {path}, have changed.")
        try:
            anchors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise LogError(
                f"the anchors of task {self.task!r} are {path}, which is as it was recorded, but "
                f"not a safetensors file: {error}."
            ) from None
        return anchors


def _summary(values: list[Any]) -> Summary:
    weights, mean, largest, zeros, quantiles, carriers = values
    return Summary(weights, mean, largest, zeros, tuple(quantiles), tuple(carriers))
