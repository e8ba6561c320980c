"""Where the inputs of old tasks lie, for each matrix: directions, and how much each is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance import ImportanceLog
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance, check_finite, departure
from cl_optim.importance.kronecker.side import ENERGY, Side, leading
from cl_optim.importance.names import match_names
from cl_optim.ops import gram
from cl_optim.ops.checks import dtype_name, listed
from cl_optim.optim.groups import is_dtensor

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subspace:
    """The inputs that a matrix W̃ [out, in] had in old tasks.

    Attributes:
        name: Of the weight, for sentences.
        weight: The weight.
        bias: W̃'s last column; None where it has none, or the optimizer does not have it.
        layout: How the two lie in W̃.
        side: Directions of ΣA, A = E[ããᵀ] over a task's inputs, and its values there.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    layout: Layout
    side: Side

    @property
    def params(self) -> list[Tensor]:
        """The parameters of the matrix."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def added(self, newer: Subspace, decay: float) -> Subspace:
        """Return ``decay`` times these inputs and another task's.

        Raises:
            ValueError: The two are of different matrices, or cut into other blocks.
        """
        if decay == 0.0:
            return newer
        if self.layout._replace(bias=None) != newer.layout._replace(bias=None) or (
            (self.layout.bias is None) != (newer.layout.bias is None)
        ):
            raise ValueError(
                f"the Kronecker factors of {self.name!r} are of another matrix than those of the "
                "tasks before: give each task's of one model, or decay=0 to forget the others."
            )
        if self.side.blocks != newer.side.blocks:
            raise ValueError(
                f"the Kronecker factors of {self.name!r} have {newer.side.blocks} blocks, and "
                f"those of the tasks before {self.side.blocks}: estimate all with the same block=, "
                "or give decay=0 to forget the others."
            )
        sum_ = decay * self.side.matrix() + newer.side.matrix().to(self.side.values.device)
        side = leading(sum_, self.side.size, ENERGY, f"{self.name!r}'s inputs")
        return replace(newer, side=side)

    def scaled(self, factor: float) -> Subspace:
        """Return inputs that weigh so many times as much."""
        values = self.side.values * factor
        return replace(self, side=Side(self.side.size, values, self.side.basis))

    def to(self, device: torch.device) -> Subspace:
        """Return it with its directions on a device."""
        return replace(self, side=self.side.to(device))

    def movable(self) -> Side:
        """Return the directions among the columns that can move: a bias may be fixed, or a weight.

        A bias that does not require a gradient, or that the optimizer does not have, must not be
        moved by what the weight did; then the others are protected among themselves.
        """
        columns = torch.ones(self.side.size, dtype=torch.bool, device=self.side.values.device)
        if self.layout.bias is not None:
            weight = self.weight.requires_grad
            bias = self.bias is not None and self.bias.requires_grad
            if weight != bias:
                columns[:-1], columns[-1] = weight, bias
        if bool(columns.all()):
            return self.side
        matrix = self.side.matrix()
        if matrix.dim() == 1:
            return leading(matrix * columns, self.side.size, 1.0, repr(self.name))
        blocks, width, _ = matrix.shape
        kept = torch.nn.functional.pad(columns, (0, blocks * width - len(columns)))
        kept = kept.view(blocks, width).to(matrix.dtype)
        matrix = matrix * kept.unsqueeze(2) * kept.unsqueeze(1)
        return leading(matrix, self.side.size, 1.0, repr(self.name))

    def unit(self) -> Tensor:
        """Return what an eigenvalue of ΣA is measured in: their mean, trace over size; 0-dim."""
        return self.side.values.double().sum() / max(1, self.side.size)


def softly(values: Tensor, unit: Tensor, strength: float) -> Tensor:
    """Return which part of a displacement to take away along each direction: κe/(1 + κe).

    Args:
        values: e of each direction.
        unit: What they are measured in, so that κ = strength / unit.
        strength: Has no unit: along a direction of mean e, 1/(1 + strength) remains.
    """
    pull = strength * values.double() / unit.clamp_min(torch.finfo(torch.float64).tiny)
    return pull / (1.0 + pull)


def wholly(values: Tensor, energy: float) -> Tensor:
    """Return 1 for the fewest directions that hold a share of the trace, and 0 for the others."""
    ordered, order = values.double().sort(descending=True, stable=True)
    held = ordered.cumsum(0)
    taken = (held - ordered < energy * held[-1:]) & (ordered > 0)
    return torch.zeros_like(ordered).index_copy_(0, order, taken.to(ordered.dtype))


# --- from an importance ---------------------------------------------------------------------------


def kronecker(importance: object, *, strict: bool) -> KroneckerImportance:
    """Return an importance that knows inputs, or what a log of such has merged.

    Raises:
        TypeError: It is another, or a log of others.
        ValueError: It has no factors.
    """
    if isinstance(importance, ImportanceLog):
        importance = importance.merge(strict=strict)
    if not isinstance(importance, KroneckerImportance):
        raise TypeError(
            "importance must be a KroneckerImportance or an ImportanceLog of them, since only "
            f"these know a task's inputs, not {type(importance).__name__}: make it with "
            'estimate_fisher(..., structure="kronecker").'
        )
    if not importance.factors:
        raise ValueError(
            "importance must have Kronecker factors, and has none, so that no update would be "
            "projected: it is of a model without linear maps, or of none that was used."
        )
    return importance


def from_importance(
    importance: KroneckerImportance, named: Mapping[str, Tensor], *, strict: bool
) -> list[Subspace]:
    """Give each matrix of an optimizer its inputs, checked, on the weight's device.

    Args:
        importance: Of a task.
        named: The optimizer's parameters by name.
        strict: Factors of a weight that the optimizer does not have, or of another shape, are an
            error; else they are left out.

    Raises:
        ValueError: Factors do not fit, are not finite, or their directions not orthonormal.
    """
    names = match_names(importance, named)
    unknown = [name for name in importance.factors if name not in names]
    if strict and unknown:
        raise ValueError(
            f"importance has factors of {listed(unknown)}, which this optimizer does not have "
            "(strict=False ignores them)."
        )
    found, misfits = [], []
    for name, factors in importance.factors.items():
        if name not in names:
            continue
        weight, layout, side = named[names[name]], factors.layout, factors.input
        bias = named.get(names.get(layout.bias or "", ""))
        misfit = _misfit(weight, bias, layout)
        if misfit and strict:
            raise ValueError(
                f"the Kronecker factors of {name!r} are of another model: {misfit} "
                "(strict=False ignores them)."
            )
        if misfit:
            misfits.append(names[name])
            continue
        _check_param(names[name], weight)
        if bias is not None:
            _check_param(str(layout.bias), bias)
        _check_side(name, layout, side)
        found.append(Subspace(names[name], weight, bias, layout, side.to(weight.device)))
    if unknown or misfits:
        left_out = listed([*unknown, *misfits])
        _LOGGER.warning("Left out with strict=False: factors of %s.", left_out)
    return found


def _misfit(weight: Tensor, bias: Tensor | None, layout: Layout) -> str:
    """Return a sentence's part where the parameters are not those of the layout."""
    if tuple(weight.shape) != tuple(layout.shape):
        return f"its shape is {tuple(weight.shape)} here and was {tuple(layout.shape)}"
    if bias is not None and tuple(bias.shape) != (layout.outputs,):
        return f"its bias has shape {tuple(bias.shape)} here and had {(layout.outputs,)}"
    return ""


def _check_param(name: str, param: Tensor) -> None:
    if param.dtype not in gram.DTYPES:
        dtypes = listed([dtype_name(dtype) for dtype in gram.DTYPES], 6, str)
        raise ValueError(
            f"parameter {name!r} must be of {dtypes} to be projected, not {param.dtype}."
        )
    if is_dtensor(param):
        raise ValueError(
            f"parameter {name!r} must not be a DTensor: a shard of a matrix does not have all of "
            "its inputs."
        )


def _check_side(name: str, layout: Layout, side: Side) -> None:
    if side.size != layout.inputs:
        raise ValueError(
            f"the input side of the Kronecker factors of {name!r} must have size {layout.inputs}, "
            f"not {side.size}."
        )
    check_finite(side.values, f"the input eigenvalues of {name!r}")
    if not departure(side) <= 1e-3:  # true for NaN as well
        raise ValueError(
            f"the input directions of the Kronecker factors of {name!r} must be orthonormal: the "
            "file or the state that they are from is damaged."
        )


def log_the_others(named: Mapping[str, Tensor], subspaces: Iterable[Subspace]) -> None:
    """Say once which parameters that can move are not projected."""
    covered = {param for subspace in subspaces for param in subspace.params}
    others = [n for n, param in named.items() if param.requires_grad and param not in covered]
    if others:
        _LOGGER.warning(
            "The updates of %d parameters are not projected, since no inputs of them are known: "
            "%s.",
            len(others),
            listed(others, 6),
        )


# --- state dicts ----------------------------------------------------------------------------------


def saved(subspaces: Sequence[Subspace], places: Mapping[Tensor, int]) -> list[dict[str, Any]]:
    """Return them for a state dict; tensors are those that are in use.

    Args:
        subspaces: All.
        places: Of each parameter among the optimizer's.
    """
    return [
        {
            "name": one.name,
            "weight": places[one.weight],
            "bias": None if one.bias is None else places[one.bias],
            "shape": tuple(one.layout.shape),
            "transposed": one.layout.transposed,
            "bias_name": one.layout.bias,
            "values": one.side.values,
            "basis": one.side.basis,
        }
        for one in subspaces
    ]


def loaded(entries: Sequence[Mapping[str, Any]], params: Mapping[int, Tensor]) -> list[Subspace]:
    """Copy them from a state dict.

    Args:
        entries: What `saved` returned.
        params: The optimizer's parameters by their places in the state dict.

    Raises:
        ValueError: The state dict is truncated, damaged, or of other parameters.
    """
    found = []
    for number, entry in enumerate(entries):
        for key in (
            "weight",
            "bias",
            "name",
            "shape",
            "transposed",
            "bias_name",
            "values",
            "basis",
        ):
            if key not in entry:
                raise ValueError(
                    f"the state dict is truncated: its 'input_projection' has no {key!r} of matrix "
                    f"{number}."
                )
        shape = tuple(entry["shape"])
        layout = Layout(shape, bool(entry["transposed"]), entry["bias_name"])
        try:
            weight = params[entry["weight"]]
            bias = None if entry["bias"] is None else params[entry["bias"]]
        except KeyError as error:
            raise ValueError(
                f"the state dict belongs to other parameters: {entry['name']!r} is its parameter "
                f"{error}."
            ) from None
        misfit = _misfit(weight, bias, layout)
        if misfit:
            raise ValueError(
                f"the state dict belongs to other parameters: {entry['name']!r}, {misfit}."
            )
        basis = entry["basis"]
        values = entry["values"].to(weight.device, copy=True)
        side = Side(
            layout.inputs, values, None if basis is None else basis.to(weight.device, copy=True)
        )
        _check_shapes(entry["name"], side)
        _check_side(entry["name"], layout, side)
        found.append(Subspace(entry["name"], weight, bias, layout, side))
    return found


def _check_shapes(name: str, side: Side) -> None:
    if side.basis is None:
        fits = side.values.shape == (side.size,)
    else:
        fits = side.basis.dim() == 3 and (
            side.values.shape == (len(side.basis) * side.basis.shape[2],)
            and 0 <= len(side.basis) * side.basis.shape[1] - side.size < max(1, len(side.basis))
        )
    if not fits:
        shapes = [tuple(t.shape) for t in (side.values, side.basis) if t is not None]
        raise ValueError(
            f"the state dict is damaged: 'values' and 'basis' of {name!r} have shapes "
            f"{listed(shapes, show=str)}."
        )
