"""The old weights of a guarded run, and how far back towards them it ends."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_optim.distributed import MeanRanks, Together, here, is_counted, is_dtensor, mesh_of, reshard
from cl_optim.retention.guard.evaluation import Evaluation
from cl_optim.retention.interpolation.between import check_between, interpolate
from cl_optim.retention.interpolation.curve import Curve
from cl_optim.retention.interpolation.old_weights import Old, anchors_of, running_statistics

_FILE = "old-weights.safetensors"


class WayBack:
    """Knows the weights that a run began with, wherever they are.

    Args:
        model: The network in training.
        optimizer: Its optimizer.
        old: The old weights; None: the optimizer's anchors where these are the weights at
            :meth:`start`, else a copy that it makes.
        folder: Where the copy goes; None: into memory.
        ranks: Of which processes numbers are means.

    Raises:
        ValueError: ``old`` does not fit the model.
        TypeError: It is of an unknown kind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        old: Old | None,
        folder: str | os.PathLike[str] | None,
        ranks: MeanRanks,
    ) -> None:
        self._ranks = ranks
        self._model = model
        self._optimizer = optimizer
        self._file = None if folder is None else Path(folder) / _FILE
        self._old = old
        # Of each anchor the sum, where they are the old weights: they change if it consolidates.
        self.anchors: list[float] | None = None
        if old is not None:
            check_between(model, old)

    def start(self) -> None:
        """Find the old weights, or copy those of now: before training.

        Raises:
            ValueError: There is no way between them and others of this model.
        """
        if self._old is not None:
            return
        if self._begins_at_anchors():
            self.anchors = self._sums()
            if self._file is not None:
                self._file.unlink(missing_ok=True)  # of another run
            return
        self.anchors = None
        reshard(self._model)
        moving: dict[str, Tensor] = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        moving.update((n, b) for n, b in self._model.named_buffers() if b.is_floating_point())
        copy = {
            # Parts are small, and stay where they are.
            name: value.detach().clone()
            if is_dtensor(value)
            else value.detach().to("cpu", copy=True).contiguous()
            for name, value in moving.items()
        }
        check_between(self._model, copy)
        if self._file is None:
            self._old = copy
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".unfinished")
        save_file(copy, unfinished)
        os.replace(unfinished, self._file)

    def go(
        self, evaluations: Sequence[Evaluation], budget: float, baselines: Mapping[str, float]
    ) -> Curve:
        """Go back as far as a budget asks for, which is a part of the baselines.

        Raises:
            ValueError: The old weights are not known any more, or as for ``interpolate``.
        """
        old = self._old
        if old is None and self.anchors is not None:
            if not self._are_the_same(self._sums()):
                raise ValueError(
                    "the optimizer's anchors are not those that the run began with, since it has "
                    "consolidated: give the guard the old weights as old=."
                )
            old = self._optimizer
        if old is None and self._file is not None and self._file.is_file():
            old = self._file
        if old is None:
            raise ValueError(
                "the weights that the run began with are not known in this process: give them as "
                "old=, or the guard a folder from the start."
            )
        names = {evaluation.name for evaluation in evaluations}
        return interpolate(
            self._model,
            old,
            evaluate=evaluations,
            budget=budget,
            baselines={name: value for name, value in baselines.items() if name in names},
            ranks=self._ranks,
        )

    def _anchors(self) -> Mapping[str, Tensor]:
        try:
            return anchors_of(self._optimizer, self._model)
        except ValueError:
            return {}

    def _begins_at_anchors(self) -> bool:
        """Tell whether the anchors are all the model of now.

        Exact ones of several tasks are not, and they have no running statistics.
        """
        if running_statistics(self._model):
            return False
        anchors = self._anchors()
        reshard(self._model)
        params = dict(self._model.named_parameters())
        begins = all(
            name in anchors and torch.equal(here(anchors[name]).to(p.dtype), here(p.detach()))
            for name, p in params.items()
            if p.requires_grad
        )
        return all(Together(mesh=mesh_of(params.values())).gather(begins))

    def _sums(self) -> list[float]:
        """Return the sum of each anchor's absolute values, over all processes."""
        params = dict(self._model.named_parameters())
        mesh = mesh_of(params.values())
        sums = [
            float(here(anchor).double().abs().sum()) if is_counted(params[name], mesh) else 0.0
            for name, anchor in self._anchors().items()
        ]
        (total,) = Together(mesh=mesh).added(torch.tensor(sums, dtype=torch.float64))
        found: list[float] = total.tolist()
        return found

    def _are_the_same(self, sums: Sequence[float]) -> bool:
        """Tell whether these are the sums at the start, in whatever order they were added up."""
        assert self.anchors is not None
        return len(sums) == len(self.anchors) and all(
            math.isclose(one, other, rel_tol=1e-9)
            for one, other in zip(sums, self.anchors, strict=True)
        )
