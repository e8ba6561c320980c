"""The report's figures: what the page, the pictures, the tables and the files of figures show."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from cl_optim._version import __version__
from cl_optim.importance import watch
from cl_optim.importance.errors import LogError
from cl_optim.importance.importance import Importance
from cl_optim.importance.names import renamed
from cl_optim.importance.record import Record
from cl_optim.importance.statistics import Overlap, layer_of, overlap

if TYPE_CHECKING:
    from cl_optim.importance.log import ImportanceLog

FROZEN = (0.05, 0.10)
TOP = 0.05  # of the sets whose overlap is shown
_POINTS = 400  # of a curve; more than a screen has room for
_DRIFTING = 5  # layers with a curve of their own

Data: TypeAlias = dict[str, Any]


def report_data(log: ImportanceLog) -> Data:
    """Return all figures of a report, as JSON knows them.

    Rows are layers in the model's order, columns are the tasks that are not forgotten. A figure of
    a layer that a task does not know is None. Reads every tensor of these tasks.

    Raises:
        LogError: No task is protected.
        DamagedError: A record or a tensor is damaged.
    """
    if not log.tasks:
        raise LogError(f"there is nothing to report: the log {str(log.path)!r} has no task.")
    records = [log[task] for task in log.tasks]
    layers = _in_order([list(record.layers) for record in records])
    return {
        "name": log.path.resolve().name,
        "cl_optim": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tasks": [_task(record) for record in records],
        "forgotten": [_encodable(task) for task in log.forgotten],
        "layers": [{"name": name, "weights": _weights(name, records)} for name in layers],
        "mean": _table(records, layers, lambda record, layer: record.layers[layer].mean),
        "largest": _table(records, layers, lambda record, layer: record.layers[layer].largest),
        "share": _table(records, layers, _share),
        "ranks": _ranks(records, layers),
        "carriers": _table(records, layers, lambda record, layer: record.layers[layer].carriers),
        "top": TOP,
        "overlap": _overlap(overlap(_apart(records), TOP)),
        "frozen": _frozen(_merged(records), layers),
        "pinned": _pinned(log, layers, records),
        "training": [_training(entries) for entries in watch.read(log.path / "training")],
    }


def _in_order(lists: list[list[str]]) -> list[str]:
    """Return all records' layers; one that a model got later comes after its neighbour there."""
    ordered: list[str] = []
    for layers in lists:
        place = 0
        for layer in layers:
            if layer in ordered:
                place = ordered.index(layer) + 1
            else:
                ordered.insert(place, layer)
                place += 1
    return ordered


def _encodable(name: str) -> str:
    """Return a name with half surrogate pairs replaced: no file can hold them."""
    return name.encode(errors="replace").decode()


def _task(record: Record) -> Data:
    whole = record.whole
    return {
        "name": _encodable(record.task),
        "time": record.time,
        "samples": record.samples,
        "labels": record.metadata.get("labels"),
        "estimator": record.metadata.get("estimator"),
        "codec": record.codec.name,
        "bytes": record.nbytes,
        "weights": whole.weights,
        "mean": whole.mean,
        "largest": whole.largest,
        "zeros": whole.zeros,
        "carriers": list(whole.carriers),
    }


def _weights(layer: str, records: list[Record]) -> int:
    return max(record.layers[layer].weights for record in records if layer in record.layers)


def _table(
    records: list[Record], layers: list[str], figure: Callable[[Record, str], Any]
) -> list[list[Any]]:
    return [
        [figure(record, layer) if layer in record.layers else None for record in records]
        for layer in layers
    ]


def _share(record: Record, layer: str) -> float:
    """Return the layer's part of the task's importance."""
    total = record.whole.mean * record.whole.weights
    summary = record.layers[layer]
    return summary.mean * summary.weights / total if total else 0.0


def _ranks(records: list[Record], layers: list[str]) -> list[list[list[Data]]] | None:
    """Return the effective ranks of each layer's matrices, by task; None where none has factors."""
    if not any(record.effective_ranks for record in records):
        return None
    places = {layer: row for row, layer in enumerate(layers)}
    table: list[list[list[Data]]] = [[[] for _ in records] for _ in layers]
    for column, record in enumerate(records):
        for weight, (output, input) in record.effective_ranks.items():
            found = {"weight": _encodable(weight), "output": output, "input": input}
            table[places[layer_of(weight)]][column].append(found)
    return table


def _merged(records: list[Record]) -> Importance:
    """Return the sum of the records' diagonals: what all have, with factors or without."""
    merged, *others = (_diagonal(record.importance()) for record in records)
    for one in others:
        merged = merged.merge(one, strict=False)
    return merged


def _diagonal(importance: Importance) -> Importance:
    """Return the diagonal, of which a tensor is made when it is asked for."""
    counts = (importance.samples, importance.tokens, importance.metadata)
    return Importance.lazy(importance.sums, *counts)


def _apart(records: list[Record]) -> list[Mapping[str, Tensor]]:
    """Return the importances; a parameter that has got another shape is one of its own."""
    shapes = defaultdict(set)
    for record in records:
        for name, shape in record.shapes.items():
            shapes[name].add(shape)
    return [
        renamed(
            record.importance(),
            {
                name: f"{name} {shape}"
                for name, shape in record.shapes.items()
                if len(shapes[name]) > 1
            },
        )
        for record in records
    ]


def _overlap(found: Overlap) -> Data:
    return {name: value.tolist() for name, value in found._asdict().items()}


def _frozen(merged: Importance, layers: list[str]) -> list[Data]:
    """Return, for each fraction of all weights, that of each layer's that is among the top."""
    result = []
    for fraction in FROZEN:
        frozen, weights = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
        for name, mask in merged.top(fraction).items():
            frozen[layer_of(name)] += int(mask.sum())
            weights[layer_of(name)] += mask.numel()
        fractions = [frozen[layer] / max(weights[layer], 1) for layer in layers]
        result.append({"fraction": fraction, "layers": fractions})
    return result


def _pinned(log: ImportanceLog, layers: list[str], records: list[Record]) -> list[float] | None:
    """Return which fraction of each layer's weights the tasks froze; None where none is."""
    pinned = dict.fromkeys(layers, 0)
    for name, mask in log.frozen(strict=False).items():
        pinned[layer_of(name)] += int(mask.sum())
    if not any(pinned.values()):
        return None
    return [pinned[layer] / max(_weights(layer, records), 1) for layer in layers]


def _training(entries: list[Data]) -> Data:
    """Return the curves of a watch: the whole model's, and the most drifting layers'."""
    shown = entries[:: max(1, math.ceil(len(entries) / _POINTS))]
    if shown[-1] is not entries[-1]:
        shown.append(entries[-1])
    last = entries[-1]["layers"]

    def order(layer: str) -> float:
        drift = last[layer]["drift"]
        return -math.inf if drift is None else -drift

    drifting = sorted(last, key=order)[:_DRIFTING]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entries[0]["time"])),
        "steps": [entry["step"] for entry in shown],
        "penalty": [_whole(entry, "penalty", math.fsum) for entry in shown],
        "drift": [_whole(entry, "drift", lambda values: math.hypot(*values)) for entry in shown],
        "layers": [
            {
                "name": layer,
                "drift": [entry["layers"].get(layer, {"drift": 0.0})["drift"] for entry in shown],
            }
            for layer in drifting
        ],
    }


def _whole(entry: Data, figure: str, combine: Callable[[list[float]], float]) -> float | None:
    """Return a figure of the whole model; None where a layer's was not finite."""
    values = [layer[figure] for layer in entry["layers"].values()]
    return None if None in values else combine(values)
