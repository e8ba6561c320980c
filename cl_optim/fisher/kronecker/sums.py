"""Sums of the rows' outer products, Σ ããᵀ and Σ bbᵀ, over batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_optim.distributed import Together
from cl_optim.fisher.kronecker.structure import Structure
from cl_optim.fisher.kronecker.used import Used
from cl_optim.fisher.per_sample.base import samples_at_once
from cl_optim.fisher.per_sample.rows import Rows, Way

# Products of wider matrices with themselves are formed in halves: the lower triangle is not needed.
_HALVED = 512


class Matrices(ABC):
    """Sums of matrices that take the place of squares of their elements."""

    @abstractmethod
    def add(self, name: str, uses: Sequence[Used], again: bool) -> bool:
        """Add what a backward pass says of a parameter.

        Args:
            name: The parameter's.
            uses: All its uses.
            again: The backward pass is not the first through its forward pass.

        Returns:
            Whether it was added; if not, squares are wanted.
        """

    @abstractmethod
    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, each with its parameter's name."""


@dataclass
class Sums:
    """Sums over the rows of one way in which a matrix is used.

    Of the sums of full matrices only the upper triangle means something.

    Attributes:
        inputs: Σ ããᵀ of each group, [groups, k, m, m], or the diagonals, [groups, in]; float64.
        gradients: Σ bbᵀ likewise, in the units of the loss squared.
        rows: How many are in ``inputs``, a float64 scalar on the device.
        bias: The bias that is added to the outputs; ``""`` where that was not always the same.
    """

    inputs: Tensor
    gradients: Tensor
    rows: Tensor
    bias: str | None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all."""
        return self.inputs, self.gradients, self.rows


class FactorSums(Matrices):
    """The sums of the matrices of a model.

    Args:
        structure: Decides which parameters have some; may be that of others.

    Attributes:
        structure: As given.
        ways: For each matrix its sums, by the way that it is used, and whether ã = [a; 1].
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.ways: dict[str, dict[tuple[Way, bool], Sums]] = {}

    def add(self, name: str, uses: Sequence[Used], again: bool) -> bool:
        """See :class:`Matrices`."""
        if not self.structure.decide(name, uses):
            return False
        for use in uses:
            assert isinstance(use.rows, Rows)
            self._add(name, use, use.rows, again)
        return True

    def _add(self, name: str, use: Used, rows: Rows, again: bool) -> None:
        ones = use.partner is not None
        ways = self.ways.setdefault(name, {})
        sums = ways.get((rows.way, ones))
        for inputs, gradients in rows.parts():
            if sums is None:
                sums = ways[rows.way, ones] = self._new(name, use, rows.way, ones, gradients.device)
            add_products_(sums.gradients, gradients)
            if again:
                continue
            kept = None if use.kept is None else use.kept.flatten().to(inputs.device)
            if rows.way.looked_up:
                counted = None if rows.counted is None else rows.counted.flatten()
                if kept is not None:
                    counted = kept if counted is None else counted & kept
                _count_(sums, inputs, counted)
            else:
                count = inputs.shape[1] if kept is None else kept.sum()
                add_products_(sums.inputs, inputs, kept)
                if ones:
                    _add_ones_(sums.inputs, inputs, kept, count)
                sums.rows += count
        if sums is not None and sums.bias != use.partner:
            sums.bias = ""

    def _new(self, name: str, use: Used, way: Way, ones: bool, device: torch.device) -> Sums:
        length, *others = self.structure.shapes[name]
        width = torch.Size(others).numel()
        zeros = self.structure.zeros
        if way.looked_up:
            inputs = torch.zeros(1, length, dtype=torch.float64, device=device)
            gradients = zeros(name, width, 1, width, device)
        elif way.forward:
            inputs = zeros(name, width + ones, way.groups, width + ones, device)
            gradients = zeros(name, length, way.groups, way.size, device)
        else:
            inputs = zeros(name, length + ones, 1, length + ones, device)
            gradients = zeros(name, width, 1, width, device)
        rows = torch.zeros((), dtype=torch.float64, device=device)
        return Sums(inputs, gradients, rows, use.partner)

    def forget(self) -> None:
        """Forget all sums, and which parameters have some."""
        self.ways.clear()
        self.structure.forget()

    def each(self) -> Iterator[tuple[str, tuple[Way, bool], Sums]]:
        """Yield all sums with the matrix's name and the way."""
        for name, ways in self.ways.items():
            for way, sums in ways.items():
                yield name, way, sums

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Matrices`."""
        for name, _, sums in self.each():
            for tensor in sums.tensors():
                yield name, tensor

    def gradients(self) -> list[Tensor]:
        """List the sums that are in the units of the loss squared."""
        return [sums.gradients for *_, sums in self.each()]

    def counts(self) -> list[Tensor]:
        """List the others: of inputs and rows."""
        return [tensor for *_, sums in self.each() for tensor in (sums.inputs, sums.rows)]

    def add_(self, other: FactorSums, finite: Tensor | None) -> None:
        """Add others, unless they are not finite."""
        for name, way, sums in other.each():
            mine = self.ways.setdefault(name, {})
            if way not in mine:
                inputs, gradients, rows = map(torch.zeros_like, sums.tensors())
                mine[way] = Sums(inputs, gradients, rows, sums.bias)
            elif mine[way].bias != sums.bias:
                mine[way].bias = ""
            for total, value in zip(mine[way].tensors(), sums.tensors(), strict=True):
                total += value if finite is None else torch.where(finite.to(value.device), value, 0)

    def over(
        self, together: Together, gradients: float, counts: float, like: Mapping[str, Tensor]
    ) -> FactorSums:
        """Return the sums over several processes; all call it.

        Args:
            together: The processes.
            gradients: What the sums of gradients are to be multiplied by here.
            counts: And those of inputs and rows.
            like: Parameters, on the devices where the sums are to be.
        """
        whole = FactorSums(self.structure.agreed(together.gather(self.structure)))
        here = {
            (name, way): (sums.bias, [tensor.shape for tensor in sums.tensors()])
            for name, way, sums in self.each()
        }
        found: dict[tuple[str, tuple[Way, bool]], tuple[str | None, list[torch.Size]]] = {}
        for process in together.gather(here):
            for key, (bias, shapes) in process.items():
                same = key not in found or found[key][0] == bias
                found[key] = (bias if same else "", shapes)
        for (name, way), (bias, shapes) in found.items():
            mine, device = self.ways.get(name, {}).get(way), like[name].device
            if mine is None:
                tensors = [torch.zeros(one, dtype=torch.float64, device=device) for one in shapes]
            else:
                factors = (counts, gradients, counts)
                each = zip(mine.tensors(), factors, strict=True)
                tensors = [tensor * factor for tensor, factor in each]
            together.sum_(tensors)
            inputs, products, rows = tensors
            whole.ways.setdefault(name, {})[way] = Sums(inputs, products, rows, bias)
        return whole

    def to(self, name: str, device: torch.device) -> None:
        """Follow a parameter to another device."""
        for sums in self.ways.get(name, {}).values():
            tensors = (tensor.to(device) for tensor in sums.tensors())
            sums.inputs, sums.gradients, sums.rows = tensors

    def state_dict(self) -> list[dict[str, Any]]:
        """Return all sums; the tensors are these themselves."""
        return [
            {"name": name, "way": tuple(way), "ones": ones, **vars(sums)}
            for name, (way, ones), sums in self.each()
        ]

    def load_state_dict(
        self, state: Sequence[Mapping[str, Any]], like: Mapping[str, Tensor]
    ) -> None:
        """Take copies of them, each on its parameter's device."""
        self.ways = {}
        for one in state:
            device = like[one["name"]].device
            inputs, gradients, rows = (
                one[key].to(device, copy=True) for key in ("inputs", "gradients", "rows")
            )
            ways = self.ways.setdefault(one["name"], {})
            ways[Way(*one["way"]), one["ones"]] = Sums(inputs, gradients, rows, one["bias"])


def add_products_(sums: Tensor, x: Tensor, kept: Tensor | None = None) -> None:
    """Add Σ xxᵀ over rows: products in float32 (float64 for float64 rows), their sum in float64.

    Args:
        sums: [groups, k, m, m] or [groups, n]; may be wider than the rows.
        x: [groups, rows, n].
        kept: Rows to add, bool [rows].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups, rows, size = x.shape
    diagonal = sums.dim() == 2
    # As they are, rows need no memory besides; else a part of them at a time has it.
    whole = x.dtype == dtype and kept is None and not diagonal
    step = max(1, rows) if whole else samples_at_once(groups * size * dtype.itemsize)
    for start in range(0, rows, step):
        part = x[:, start : start + step].to(dtype)
        if kept is not None:
            part = part.masked_fill(~kept[start : start + step].view(1, -1, 1), 0.0)
        if diagonal:
            sums[:, :size] += part.square().sum(1)
            continue
        width = sums.shape[-1]
        for i in range(-(-size // width)):
            columns = part[..., i * width : (i + 1) * width]
            across = columns.shape[-1]
            _add_upper_(sums[:, i, :across, :across], columns)


def _add_upper_(sums: Tensor, x: Tensor) -> None:
    """Add the upper triangle of xᵀx."""
    width = x.shape[-1]
    if width < 2 * _HALVED:
        sums += x.mT @ x
        return
    half = width // 2
    left, right = x[..., :half], x[..., half:]
    _add_upper_(sums[..., :half, :half], left)
    _add_upper_(sums[..., half:, half:], right)
    sums[..., :half, half:] += left.mT @ right


def _add_ones_(sums: Tensor, x: Tensor, kept: Tensor | None, count: int | Tensor) -> None:
    """Add what [x; 1][x; 1]ᵀ has beside xxᵀ."""
    size = x.shape[-1]
    if sums.dim() == 2:
        sums[:, size] += count
        return
    block, place = divmod(size, sums.shape[-1])
    if place:
        columns = x[..., block * sums.shape[-1] :]
        columns = columns if kept is None else columns.masked_fill(~kept.view(1, -1, 1), 0.0)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums[:, block, :place, place] += columns.sum(1, dtype=dtype)
    sums[:, block, place, place] += count


def _count_(sums: Sums, indices: Tensor, counted: Tensor | None) -> None:
    """Add how often each index was looked up."""
    once = torch.ones_like(indices, dtype=torch.float64)
    once = once if counted is None else once * counted
    sums.inputs[0].index_add_(0, indices, once)
    sums.rows += once.sum()
