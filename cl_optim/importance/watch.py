"""What happens to protected weights while training: penalty, drift, importance of each layer."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cl_optim.importance.checksums import sealed, unsealed
from cl_optim.importance.statistics import layer_of
from cl_optim.ops.checks import check_whole
from cl_optim.ops.ewc_adamw_reference import penalty_sums
from cl_optim.ops.warn import warn

QUANTILES = (0.5, 0.95, 0.99)
_SAMPLE = 2**14  # weights of a parameter that its quantiles are taken from


class ProtectedParameter(Protocol):
    """A protected parameter of an optimizer."""

    @property
    def name(self) -> str | None:
        """Its name, if the optimizer knows it."""

    @property
    def param(self) -> Tensor:
        """Its weights now, θ."""

    @property
    def importance(self) -> Tensor:
        """F."""

    @property
    def frozen(self) -> Tensor:
        """Which weights do not move: they are not in the penalty."""

    @property
    def anchor(self) -> Tensor:
        """θ*."""

    @property
    def ewc_lambda(self) -> float:
        """λ."""


class ProtectingOptimizer(Protocol):
    """What can be watched; EWCAdamW is one."""

    param_groups: list[dict[str, Any]]

    def protected(self) -> Iterable[ProtectedParameter]:
        """Return each protected parameter."""

    def matrix_penalties(self) -> Mapping[Tensor, Tensor]:
        """Return the penalties of parameters whose importance is not the diagonal alone."""

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call the hook after each step."""


class Watch:
    """Writes an entry every so many steps, into a file of its own.

    Between entries a step costs one call that counts. For an entry everything is computed on the
    parameters' device and fetched with one synchronisation; numbers that are not finite are null.
    Before the first ``consolidate`` there is nothing to write. Where the disk refuses an entry, a
    warning says so, the watching ends, and the training goes on.

    Args:
        optimizer: Made from named parameters; or what has such a one as its ``optimizer``.
        folder: Where the file goes.
        every: Steps from one entry to the next.

    Raises:
        TypeError: The optimizer protects nothing.
        ValueError: ``every`` is no positive whole number, or parameters have no names.
    """

    def __init__(self, optimizer: Any, folder: Path, every: int) -> None:
        check_whole("every", every)
        self._optimizer = _protecting(optimizer)
        if not all("param_names" in group for group in self._optimizer.param_groups):
            raise ValueError(
                "watch needs an optimizer that was made from model.named_parameters(): this one "
                "has no names."
            )
        self._every = every
        self._step = 0
        folder.mkdir(exist_ok=True)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
        self._file = open(folder / f"{stamp}-{uuid.uuid4().hex[:8]}.jsonl", "ab")  # noqa: SIM115
        self._handle = self._optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self._step += 1
        if self._step % self._every:
            return
        try:
            self.write()
        except OSError as error:
            warn(
                f"watching ends at step {self._step}: {self._file.name} cannot be written: "
                f"{error.strerror}."
            )
            self._handle.remove()

    def write(self) -> None:
        """Write an entry now.

        Raises:
            OSError: The disk is full, say.
        """
        layers = _layers(self._optimizer.protected(), self._optimizer.matrix_penalties())
        if not layers:
            return
        entry = {"step": self._step, "time": time.time(), "layers": layers}
        self._file.write(sealed(entry))
        self._file.flush()

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()
        with contextlib.suppress(OSError):  # of what is left of an entry that could not be written
            self._file.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _protecting(optimizer: Any) -> ProtectingOptimizer:
    inner = optimizer
    while not hasattr(inner, "protected") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not hasattr(inner, "protected"):
        raise TypeError(f"watch needs an EWCAdamW or an EWC, not {type(optimizer).__name__}.")
    found: ProtectingOptimizer = inner
    return found


@torch.no_grad()
def _layers(
    protected: Iterable[ProtectedParameter], of_matrices: Mapping[Tensor, Tensor]
) -> dict[str, dict[str, Any]]:
    """Return layer → penalty λ Σ F Δ², drift ‖Δ‖, quantiles of F from evenly spaced weights.

    Where a parameter is in a matrix with Kronecker importance, the penalty is the matrix's.
    """
    sums: dict[str, list[Tensor]] = defaultdict(list)
    samples: dict[str, list[Tensor]] = defaultdict(list)
    for one in protected:
        layer = layer_of(one.name or "")
        penalty, square = penalty_sums(one.param, one.importance, one.frozen, one.anchor)
        penalty = of_matrices.get(one.param, one.ewc_lambda * penalty)
        sums[layer].append(torch.stack([penalty, square]))
        flat = one.importance.reshape(-1)
        samples[layer].append(flat[:: max(1, flat.numel() // _SAMPLE)].float())
    rows = []
    for layer, values in samples.items():
        ranked = torch.cat(values).sort().values
        places = [round(q * (len(ranked) - 1)) for q in QUANTILES] if len(ranked) else []
        quantiles = ranked[places] if places else ranked.new_zeros(len(QUANTILES))
        penalty, square = torch.stack(sums[layer]).sum(0)
        rows.append(torch.stack([penalty, square.sqrt(), *quantiles.double()]))
    if not rows:
        return {}
    fetched = [
        [number if math.isfinite(number) else None for number in row]
        for row in torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    ]
    return {
        layer: {"penalty": row[0], "drift": row[1], "quantiles": row[2:]}
        for layer, row in zip(samples, fetched, strict=True)
    }


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """Read the entries of each watch in a folder, oldest first, without half a last line.

    So is a damaged one, with a warning.
    """
    watches = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        entries = [unsealed(line) for line in lines]
        for number, (line, entry) in enumerate(zip(lines, entries, strict=True), start=1):
            if entry is None and (line.endswith(b"\n") or number < len(lines)):
                warn(f"line {number} of {path} is damaged and left out.")
        intact = [entry for entry in entries if entry is not None]
        if intact:
            watches.append(intact)
    return watches
