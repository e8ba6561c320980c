"""Where the inputs of old tasks lie, for each matrix: directions, and how much each is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_optim.distributed import is_dtensor
from cl_optim.importance import ImportanceLog
from cl_optim.importance.importance import check_reduced
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance, check_side
from cl_optim.importance.kronecker.side import Side, leading, merged_side
from cl_optim.importance.names import match_names
from cl_optim.ops import gram
from cl_optim.ops.checks import dtype_name, listed

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subspace:
    """The inputs that a matrix W̃ [out, in] had in old tasks.

    Attributes:
        name: Of the weight, for sentences.
        weight: The weight.
        bias: W̃'s last column; None where it has none, or the optimizer does not have it.
        layout: How the two lie in W̃.
        side: ΣA, A = E[ããᵀ] over a task's inputs: leading directions, and the mean beside them.
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

    def added(
        self, newer: Subspace, decay: float, energy: float, *, capped: bool = True
    ) -> Subspace:
        """Return ``decay`` times these inputs and another task's.

        Args:
            newer: Of the same matrix.
            decay: What remains of these.
            energy: The share of the sum's trace that its directions hold.
            capped: As for :func:`~cl_optim.importance.kronecker.side.merged_side`.

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
        name = f"{self.name!r}'s inputs"
        side = merged_side(self.side, newer.side, decay, energy, name, capped=capped)
        return replace(newer, side=side)

    def scaled(self, factor: float) -> Subspace:
        """Return inputs that weigh so many times as much."""
        return replace(self, side=self.side.times(factor))

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

    def trace(self) -> Tensor:
        """Return the trace of ΣA, float64, 0-dim."""
        return self.side.values.double().sum() + self.side.rest * self.side.tail


class Parts(NamedTuple):
    """Which part of a displacement is taken away.

    Attributes:
        along: Along each direction of a side, float64 [rank].
        beside: In what is orthogonal to all of them.
    """

    along: Tensor
    beside: float


def softly(side: Side, unit: float, strength: float) -> Parts:
    """Take κe/(1 + κe) along an eigenvector of ΣA with eigenvalue e.

    Args:
        side: Of ΣA, or of a part of it.
        unit: What eigenvalues are measured in: κ = strength / unit.
        strength: Has no unit.
    """
    kappa = strength / unit if unit > 0.0 else 0.0
    pull = kappa * side.values.double()
    return Parts(pull / (1.0 + pull), kappa * side.tail / (1.0 + kappa * side.tail))


def wholly(side: Side, trace: float, energy: float) -> Parts:
    """Take all along the fewest directions that hold a share of a trace, and nothing elsewhere."""
    ordered, order = side.values.double().sort(descending=True, stable=True)
    held_before = ordered.cumsum(0) - ordered
    taken = (held_before < energy * trace * (1 - 1e-9)) & (ordered > 0)
    return Parts(torch.zeros_like(ordered).index_copy_(0, order, taken.to(ordered.dtype)), 0.0)


def check_energy(subspaces: Iterable[Subspace], energy: float) -> None:
    """Raise ValueError where directions hold less than a share of the trace."""
    for one in subspaces:
        held = float(one.side.values.double().sum() / one.trace()) if one.side.rest else 1.0
        if held < energy - 1e-4:
            raise ValueError(
                f"energy={energy} is more than the share of {one.name!r}'s inputs that importance "
                f"has directions for, {held:.4f}: estimate it with energy={energy} or more and "
                "max_rank=None, or make the InputProjection with less."
            )


# --- from an importance ---------------------------------------------------------------------------


def kronecker(importance: object, *, strict: bool) -> KroneckerImportance:
    """Return an importance that knows inputs, or what a log of such has merged.

    Raises:
        TypeError: It is another, or a log of others.
        ValueError: It has no factors, or is of one of several processes.
    """
    check_reduced(importance)
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
        check_side(side, layout.inputs, "input", name)
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


def log_the_others(
    named: Mapping[str, Tensor], subspaces: Iterable[Subspace], importance: Mapping[str, Tensor]
) -> None:
    """Say once which parameters that can move are not projected.

    It is a warning where the task's importance says that it uses one of them, such as a norm.
    """
    covered = {param for subspace in subspaces for param in subspace.params}
    others = [n for n, param in named.items() if param.requires_grad and param not in covered]
    if others:
        used = {
            named[known]
            for name, known in match_names(importance, named).items()
            if bool(importance[name].any())
        }
        _LOGGER.log(
            logging.WARNING if any(named[name] in used for name in others) else logging.INFO,
            "The updates of %d parameters are not projected, since no inputs of them are known: "
            "%s.",
            len(others),
            listed(others, 6),
        )


# --- state dicts ----------------------------------------------------------------------------------

_LAYOUT = ("shape", "transposed", "bias_name")
_ENTRY = ("name", "weight", "bias", *_LAYOUT, "values", "basis", "tail", "kept")


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
            "tail": one.side.tail,
            "kept": one.side.kept,
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
        missing = [key for key in _ENTRY if key not in entry]
        if missing:
            raise ValueError(
                f"the state dict is truncated: its 'input_projection' has no {missing[0]!r} of "
                f"matrix {number}."
            )
        name, layout = entry["name"], Layout(*(entry[key] for key in _LAYOUT))
        layout = layout._replace(shape=tuple(layout.shape))
        absent = [p for p in (entry["weight"], entry["bias"]) if p not in (None, *params)]
        misfit = f"there is no parameter {absent[0]}" if absent else ""
        if not absent:
            weight = params[entry["weight"]]
            bias = None if entry["bias"] is None else params[entry["bias"]]
            misfit = _misfit(weight, bias, layout)
        if misfit:
            raise ValueError(f"the state dict belongs to other parameters: of {name!r}, {misfit}.")
        values, basis = entry["values"], entry["basis"]
        side = Side(
            layout.inputs,
            values.to(weight.device, copy=True),
            None if basis is None else basis.to(weight.device, copy=True),
            entry["tail"],
            entry["kept"],
        )
        check_side(side, layout.inputs, "input", name)
        found.append(Subspace(name, weight, bias, layout, side))
    return found
