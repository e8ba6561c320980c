"""Memory rows: gradients of earlier tasks, stored by parameter, and their products.

A row is one gradient of the whole model. The rows of a parameter are its part of all of them,
[t, *shape]: nothing is flattened or concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from cl_optim.distributed import rows_here, rows_like
from cl_optim.ops import gram as gram_ops
from cl_optim.ops.checks import listed
from cl_optim.optim.groups import Groups, name_of
from cl_optim.optim.shards import Shards


@dataclass(frozen=True)
class Products:
    """Of rows and gradient, by block: Q [n, t, t], c [n, t], ‖g‖² [n]; float64.

    Args:
        packed: As :meth:`MemoryRows.products` returns them, of which these are views.
    """

    packed: Tensor

    @property
    def gram(self) -> Tensor:
        """Return Q."""
        return self.packed[:, :-1, :-1]

    @property
    def linear(self) -> Tensor:
        """Return c."""
        return self.packed[:, -1, :-1]

    @property
    def square(self) -> Tensor:
        """Return ‖g‖²."""
        return self.packed[:, -1, -1]


class MemoryRows:
    """Memory rows by parameter, and their products with each other.

    Of a DTensor a parameter is the part that is in this process, and products are of that: to be
    added up over processes.

    Args:
        dtype: Of the rows; None: each parameter's own.

    Attributes:
        params: Those with elements, in the optimizer's order.
        by_param: The rows of each, laid out like the parameter.
        gram: Q by parameter, [n, t, t] float64.
        stale: The rows whose products are not in ``gram`` yet.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.params: list[Tensor] = []
        self.by_param: list[Tensor] = []
        self.gram = torch.zeros(0, 0, 0, dtype=torch.float64, device="cpu")
        self.stale: set[int] = set()

    def __len__(self) -> int:
        return self.gram.shape[1]

    def follow(self, params: list[Tensor]) -> None:
        """Keep the rows of these parameters; a new parameter's are zero."""
        if (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(rows.device == p.device for rows, p in zip(self.by_param, params, strict=True))
        ):
            return
        device = one_device(params)
        index = {param: i for i, param in enumerate(self.params)}
        gram = self.gram.new_zeros(len(params), len(self), len(self), device=device)
        by_param = []
        for i, param in enumerate(params):
            by_param.append(self._empty(param, len(self)).zero_())
            if param in index:
                by_param[i].copy_(self.by_param[index[param]])
                gram[i] = self.gram[index[param]]
        self.params, self.by_param, self.gram = list(params), by_param, gram

    def loses(self, params: list[Tensor]) -> bool:
        """Tell whether there are rows of parameters that are not among these."""
        if len(params) == len(self.params) and all(map(is_, params, self.params)):
            return False
        here = set(params)
        return any(param not in here for param in self.params)

    def append(self) -> None:
        """Make room for another row. One parameter after the other, to spare memory."""
        size = len(self)
        for i, (param, old) in enumerate(zip(self.params, self.by_param, strict=True)):
            self.by_param[i] = self._empty(param, size + 1)
            self.by_param[i][:size] = old
            self.by_param[i][size] = 0.0
        self.gram = torch.nn.functional.pad(self.gram, (0, 1, 0, 1))
        self.stale.add(size)

    def drop(self, k: int) -> None:
        """Remove a row."""
        for i, (param, old) in enumerate(zip(self.params, self.by_param, strict=True)):
            self.by_param[i] = self._empty(param, len(self) - 1)
            self.by_param[i][:k] = old[:k]
            self.by_param[i][k:] = old[k + 1 :]
        self.gram = torch.cat([self.gram[:, :k], self.gram[:, k + 1 :]], dim=1)
        self.gram = torch.cat([self.gram[:, :, :k], self.gram[:, :, k + 1 :]], dim=2)
        self.stale = {j - (j > k) for j in self.stale if j != k}

    def write(self, k: int, values: Mapping[Tensor, Tensor]) -> None:
        """Replace a row; it is zero for the parameters without a value."""
        written, found = [], []
        for param, rows in zip(self.params, self.by_param, strict=True):
            row, value = rows.select(0, k), values.get(param)
            if value is None:
                row.zero_()
            else:
                written.append(row)
                found.append(value)
        if written:
            torch._foreach_copy_(written, found)
        self.stale.add(k)

    def products(self, grads: Sequence[Tensor | None]) -> tuple[list[int], Tensor]:
        """Multiply by the gradients: indices and products of the parameters that have one.

        Returns:
            The indices, and [n, t + 1, t + 1] float64: Q, then c and ‖g‖² in the last row. (The
            last column may be zero.)
        """
        size = len(self)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        index = None if len(used) == len(grads) else on_device(used, self.gram.device)
        if len(self.stale) == size:
            # One pass for all products: then g = −G_k gives c = −Q_k exactly. A parameter without
            # a gradient needs its Q all the same, for a later step.
            pairs = zip(self.by_param, grads, strict=True)
            fill = [rows[0] if grad is None else grad for rows, grad in pairs]
            packed = gram_ops.gram_per_tensor(self.by_param, fill)
            self.gram.copy_(packed[:, :size, :size])  # state dicts have it beside the rows
            self.stale.clear()
            return used, packed if index is None else packed.index_select(0, index)
        for k in sorted(self.stale):
            row = [rows[k] for rows in self.by_param]
            column = gram_ops.dots_per_tensor(self.by_param, row)
            self.gram[:, k] = column[:, :size]
            self.gram[:, :, k] = column[:, :size]
        self.stale.clear()
        given = [grad for grad in grads if grad is not None]
        dots = gram_ops.dots_per_tensor([self.by_param[i] for i in used], given)
        packed = dots.new_zeros(len(used), size + 1, size + 1)
        packed[:, :size, :size] = self.gram if index is None else self.gram.index_select(0, index)
        packed[:, size] = dots
        return used, packed

    def state_dict(self, places: Sequence[int], shards: Shards) -> dict[str, Any]:
        """Return rows by the parameters' places among all, Q, and which of it is to be computed."""
        rows = zip(self.params, self.by_param, strict=True)
        is_whole = not shards.any
        return {
            "rows": {
                place: value if is_whole else rows_like(shards.param(param), value)
                for place, (param, value) in zip(places, rows, strict=True)
            },
            # Of parts it is this process's: there it is computed anew.
            "gram": self.gram if is_whole else torch.zeros_like(self.gram),
            "stale": sorted(self.stale) if is_whole else list(range(len(self))),
        }

    def load(
        self, saved: Mapping[str, Any], shards: Shards, places: Sequence[int], size: int
    ) -> None:
        """Copy from a state dict, in the dtypes that were saved; from none to ``size`` rows.

        Args:
            saved: What `state_dict` returned.
            shards: What knows of the parameters.
            places: Of each its place in the state dict.
            size: How many rows there must be.

        Raises:
            ValueError: It is damaged, or of other parameters.
        """
        params = shards.params()
        in_saved_order = sorted(places)
        if list(saved["rows"]) != in_saved_order:
            raise ValueError(
                f"the state dict belongs to other parameters, or is truncated: it has rows for "
                f"parameters {listed(list(saved['rows']), 6, str)}, this optimizer for "
                f"{listed(in_saved_order, 6, str)}."
            )
        for place, param in zip(places, params, strict=True):
            value, shape = saved["rows"][place], (size, *shards.param(param).shape)
            if (
                not isinstance(value, Tensor)
                or value.dtype not in gram_ops.DTYPES
                or value.shape != shape
            ):
                raise ValueError(
                    f"the state dict belongs to other parameters: the rows of parameter {place} "
                    f"must be a tensor of shape {shape}, not {_described(value)}."
                )
        shape = (len(params), size, size)
        if not isinstance(saved["gram"], Tensor) or saved["gram"].shape != shape:
            raise ValueError(
                f"the state dict is damaged: 'gram' must be a tensor of shape {shape}, not "
                f"{_described(saved['gram'])}."
            )
        if not set(saved["stale"]) <= set(range(size)):
            raise ValueError(f"the state dict is damaged: 'stale' is {saved['stale']}.")
        self.gram = self.gram.new_zeros(0, size, size)
        self.follow(params)
        for i, place in enumerate(places):
            value = rows_here(saved["rows"][place], shards.param(params[i]))
            self.by_param[i] = self.by_param[i].to(value.dtype).copy_(value)
        ranks = {place: rank for rank, place in enumerate(in_saved_order)}
        self.gram.copy_(saved["gram"][[ranks[place] for place in places]])
        self.stale = set(range(size)) if shards.any else set(saved["stale"])

    def _empty(self, param: Tensor, size: int) -> Tensor:
        row = torch.empty_like(
            param.detach(), dtype=self.dtype, memory_format=torch.preserve_format
        )
        return row.new_empty_strided((size, *row.shape), (row.numel(), *row.stride()))


def one_device(params: Sequence[Tensor]) -> torch.device:
    """Return the device of all parameters, or raise ValueError where they are on several."""
    devices = list(dict.fromkeys(param.device for param in params))
    if len(devices) > 1:
        raise ValueError(
            f"all parameters must be on one device; they are on {', '.join(map(str, devices))}."
        )
    return devices[0] if devices else torch.device("cpu")


def check_dense(groups: Groups, param: Tensor, grad: Tensor, where: str = "") -> None:
    """Raise RuntimeError where a gradient is sparse: products are taken over every weight."""
    if grad.layout is not torch.strided:
        group = next(g for g in groups if any(p is param for p in g["params"]))
        raise RuntimeError(
            f"the gradient of parameter {name_of(group, param)} {where}must be dense, not "
            f"{grad.layout}: GEM takes products over every weight."
        )


def on_device(indices: Sequence[int], device: torch.device) -> Tensor:
    """Copy indices to a device without waiting for it."""
    return torch.tensor(indices, device="cpu").to(device, non_blocking=True)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} of shape {tuple(value.shape)}"
