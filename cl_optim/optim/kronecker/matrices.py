"""The factors of matrices in an optimizer's state: how they are written, found and checked.

A weight in a matrix has, besides what any protected parameter has: ``scale``, S, with a last row
and column for the tails; ``output_values``, ``input_values``, each side's eigenvalues; ``tails``
[2], those of the directions that are not kept; ``output_basis``, ``input_basis``, the directions,
absent for a side whose coordinates are the directions; and ``matrix``, int64 [7]: a number,
whether the weight is transposed, has a bias, an output basis, an input basis, and how many
directions are kept of each side. Its bias has ``matrix``, int64 [1], the same number. So the two
find each other in whatever order parameters come, and all of it is flat tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.importance.kronecker.importance import check_finite, departure
from cl_optim.importance.kronecker.side import Side, orthonormal
from cl_optim.ops import formats
from cl_optim.optim.groups import name_of

BASES = ("output_basis", "input_basis")
VALUES = ("output_values", "input_values")
KEYS = ("matrix", "scale", "tails", *VALUES, *BASES)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How far from orthonormal stored directions may be: what is more was damaged.
_ORTHONORMAL = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_BIAS = "bias"  # stands for its name, which the state does not have


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight, perhaps with a bias, whose importance is Kronecker-factored.

    Attributes:
        layout: How they lie in the matrix.
        params: The weight, and its bias.
        states: Their states; the factors are in the first.
        groups: The numbers of their groups.
        rest: How many directions of the output and of the input side are not kept.
    """

    layout: Layout
    params: tuple[Tensor, ...]
    states: tuple[dict[str, Any], ...]
    groups: tuple[int, ...]
    rest: tuple[int, int]

    @property
    def state(self) -> dict[str, Any]:
        """The weight's state."""
        return self.states[0]

    def factors(self) -> Factors:
        """Return the factors as the state has them, of padded ranks, say."""
        return _factors(self.state, self.layout)

    def places(self, matrix: Tensor) -> list[Tensor]:
        """Return the parameters' places in a tensor of the matrix's shape, as views."""
        weight, bias = self.layout.parameters(matrix)
        return [weight] if bias is None else [weight, bias]


def find(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> list[Matrix]:
    """Return the matrices of an optimizer, in the order of their weights."""
    biases: dict[int, tuple[Tensor, int]] = {}
    weights: list[tuple[Tensor, int]] = []
    for number, group in enumerate(groups):
        for param in group["params"]:
            of_param = state.get(param, {})
            if "scale" in of_param:
                weights.append((param, number))
            elif "matrix" in of_param:
                biases[int(of_param["matrix"][0])] = param, number
    found = []
    for weight, number in weights:
        identity, transposed, has_bias, *_, output, input = state[weight]["matrix"].tolist()
        members = [(weight, number)]
        if has_bias:
            if identity not in biases:
                name = name_of(groups[number], weight)
                raise RuntimeError(
                    f"the bias in the matrix of parameter {name} has lost its state."
                )
            members.append(biases[identity])
        layout = Layout(tuple(weight.shape), bool(transposed), _BIAS if has_bias else None)
        params, numbers = zip(*members, strict=True)
        rest = (layout.outputs - output, layout.inputs - input)
        found.append(Matrix(layout, params, tuple(state[p] for p in params), numbers, rest))
    return found


def write(
    state: dict[str, Any], bias_state: dict[str, Any] | None, factors: Factors, dtype: torch.dtype
) -> None:
    """Put a matrix's factors into the state of its weight; :func:`renumber` afterwards.

    Args:
        state: The weight's.
        bias_state: Its bias's, if that is in the matrix.
        factors: On the weight's device.
        dtype: Of the bases.
    """
    clear(state)
    sides = (factors.output, factors.input)
    device = factors.scale.device
    for basis_key, values_key, side in zip(BASES, VALUES, sides, strict=True):
        if side.basis is not None:
            state[basis_key] = side.basis.to(dtype).contiguous()
        state[values_key] = side.values.float()
    tails = [float(side.tail) for side in sides]
    state["tails"] = torch.tensor(tails, dtype=torch.float32, device=device)
    state["scale"] = factors.scale.float().contiguous()
    flags = [factors.layout.transposed, bias_state is not None, *(key in state for key in BASES)]
    numbers = [0, *flags, *(side.kept for side in sides)]
    state["matrix"] = torch.tensor(numbers, dtype=torch.int64, device=device)
    if bias_state is not None:
        clear(bias_state)
        bias_state["matrix"] = torch.zeros(1, dtype=torch.int64, device=device)


def clear(state: dict[str, Any]) -> None:
    """Take a parameter out of its matrix, or the matrix out of its state."""
    for key in KEYS:
        state.pop(key, None)


def renumber(pairs: Iterable[tuple[dict[str, Any], dict[str, Any] | None]]) -> None:
    """Give each matrix a number of its own.

    Args:
        pairs: The states of each weight and of its bias.
    """
    for number, (state, bias_state) in enumerate(pairs):
        for one in (state, bias_state):
            if one is not None:
                one["matrix"][0] = number


def unrounded(factors: Factors) -> Factors:
    """Return the factors with directions that bfloat16 has rounded orthonormal again."""
    sides = [
        replace(side, basis=orthonormal(side.basis))
        if side.basis is not None and side.basis.dtype == torch.bfloat16
        else side
        for side in (factors.output, factors.input)
    ]
    return Factors(factors.layout, sides[0], sides[1], factors.scale)


def padded(state: Mapping[str, Any], ranks: tuple[int, int]) -> dict[str, Tensor]:
    """Return the factors in a state with columns of zeros up to these ranks of a block.

    Args:
        state: The weight's.
        ranks: Of the output and of the input side; where there is no basis, nothing is padded.
    """
    result = {key: state[key] for key in ("scale", *VALUES)}
    for basis_key, values_key, rank in zip(BASES, VALUES, ranks, strict=True):
        if basis_key not in state:
            continue
        blocks, _, columns = state[basis_key].shape
        more = rank - columns
        result[basis_key] = torch.nn.functional.pad(state[basis_key], (0, more))
        result[values_key] = _with_zeros(state[values_key], blocks, more)
        if more == 0:
            continue
        scale = result["scale"] if basis_key == "input_basis" else result["scale"].mT
        scale = torch.cat([_with_zeros(scale[:, :-1], blocks, more), scale[:, -1:]], 1)
        result["scale"] = scale if basis_key == "input_basis" else scale.mT
    return result


def _with_zeros(values: Tensor, blocks: int, more: int) -> Tensor:
    """Return [..., blocks·rank] with so many zeros more in each block."""
    parts = values.reshape(*values.shape[:-1], blocks, -1)
    return torch.nn.functional.pad(parts, (0, more)).flatten(-2)


def _factors(state: Mapping[str, Any], layout: Layout) -> Factors:
    sizes = (layout.outputs, layout.inputs)
    kept, tails = state["matrix"].tolist()[-2:], state["tails"].tolist()
    sides = [
        Side(size, state[values], state.get(basis), tail=tail, kept=count)
        for size, values, basis, tail, count in zip(sizes, VALUES, BASES, tails, kept, strict=True)
    ]
    return Factors(layout, sides[0], sides[1], state["scale"])


# --- saved states ---------------------------------------------------------------------------------


def check_saved(
    states: Iterable[tuple[Mapping[str, Any], Tensor, Mapping[str, Any], str]],
) -> None:
    """Raise ValueError where saved factors are truncated, damaged, or of other parameters.

    Args:
        states: Each parameter's saved state, the parameter, its saved group and its name.
    """
    states = list(states)
    biases: dict[int, Tensor] = {}
    for state, param, _, name in states:
        if "matrix" in state and "scale" not in state:
            if state["matrix"].shape != (1,) or set(state) & {*VALUES, *BASES}:
                raise _truncated(name, "scale")
            biases[int(state["matrix"][0])] = param
    for state, param, group, name in states:
        if not set(state) & {"scale", *VALUES, *BASES}:
            continue
        for key in _required(state):
            if key not in state:
                raise _truncated(name, key)
        for key, length in (("matrix", 7), ("tails", 2)):
            if state[key].shape != (length,):
                raise _of_others(name, key, state[key].shape, (length,))
        number, transposed, has_bias, *_ = state["matrix"].tolist()
        bias = biases.get(number)
        if has_bias and bias is None:
            raise _truncated(name, "bias")
        layout = Layout(tuple(param.shape), bool(transposed), _BIAS if has_bias else None)
        if bias is not None and has_bias and bias.shape != (layout.outputs,):
            raise _of_others(name, "bias", bias.shape, (layout.outputs,))
        _check_factors(_factors(state, layout), name)
        check_group(group, partial(str, name))


def _required(state: Mapping[str, Any]) -> Iterator[str]:
    yield from ("matrix", "scale", "tails", *VALUES)
    flags = state["matrix"].flatten().tolist()[3:5]
    yield from (key for key, is_there in zip(BASES, flags, strict=True) if is_there)


def _check_factors(factors: Factors, name: str) -> None:
    sides = (factors.output, factors.input)
    sizes = (factors.layout.outputs, factors.layout.inputs)
    for basis_key, values_key, side, size in zip(BASES, VALUES, sides, sizes, strict=True):
        basis, rank = side.basis, size
        if basis is not None:
            if basis.dtype not in _ORTHONORMAL or basis.dim() != 3:
                raise ValueError(
                    f"the state dict is damaged: {basis_key!r} of parameter {name} must be float32 "
                    f"or bfloat16 [blocks, width, rank], not {basis.dtype} {list(basis.shape)}."
                )
            blocks, width, columns = basis.shape
            if -(-size // max(blocks, 1)) != width:
                raise _of_others(name, basis_key, basis.shape, ("blocks", f"{size} in all", "rank"))
            rank = blocks * columns
        used = size if basis is None else int((basis != 0).any(1).sum())
        if side.kept != used or not 0.0 <= side.tail < float("inf"):
            raise ValueError(
                f"the state dict is damaged: {basis_key!r} of parameter {name} has {used} "
                f"directions, not {side.kept}, and a mean of {side.tail} for the others."
            )
        if side.values.shape != (rank,):
            raise _of_others(name, values_key, side.values.shape, (rank,))
        check_finite(side.values, f"{values_key!r} of parameter {name}")
        error = departure(side)
        if basis is not None and not error <= _ORTHONORMAL[basis.dtype]:  # true for NaN as well
            raise ValueError(
                f"the state dict is damaged: the directions {basis_key!r} of parameter {name} must "
                f"be orthonormal, and are off by {error:.1g}."
            )
    ranks = (factors.output.rank + 1, factors.input.rank + 1)
    if factors.scale.shape != ranks:
        raise _of_others(name, "scale", factors.scale.shape, ranks)
    check_finite(factors.scale, f"'scale' of parameter {name}")
    unused = [
        tail
        for side, size, tail in zip(
            sides, sizes, (factors.scale[-1], factors.scale[:, -1]), strict=True
        )
        if side.kept == size
    ]
    if any(bool(tail.any()) for tail in unused):
        raise ValueError(
            f"the state dict is damaged: 'scale' of parameter {name} is not 0 for directions that "
            "there are none of."
        )


def _truncated(name: str, key: str) -> ValueError:
    return ValueError(
        f"the state dict is truncated: the Kronecker factors of parameter {name} have no {key!r}."
    )


def _of_others(name: str, key: str, shape: Sequence[int], wanted: Sequence[object]) -> ValueError:
    return ValueError(
        f"the state dict belongs to other parameters: {key!r} of parameter {name} has shape "
        f"{tuple(shape)}, not {tuple(wanted)}."
    )


# --- what a group must be -------------------------------------------------------------------------


def check_group(group: Mapping[str, Any], name: Callable[[], str]) -> None:
    """Raise ValueError where a group's options do not go together with Kronecker importance.

    Args:
        group: The group.
        name: Names a parameter of it that is in a matrix.
    """
    if group["penalty"] != "proximal":
        raise ValueError(
            f"penalty must be 'proximal' for parameter {name()}, whose importance is "
            f"Kronecker-factored, not {group['penalty']!r}: set it, or consolidate "
            "importance.diagonal()."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"differentiable must be False for parameter {name()}, whose importance is "
            "Kronecker-factored: set it, or consolidate importance.diagonal()."
        )


def check_groups_of(
    groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], numbers: Sequence[int]
) -> None:
    """Raise ValueError where the groups of a weight and its bias do not pull them alike.

    Args:
        groups: The optimizer's.
        params: The weight, and its bias.
        numbers: The numbers of their groups.
    """
    for number, param in zip(numbers, params, strict=True):
        check_group(groups[number], partial(name_of, groups[number], param))
    if len(set(numbers)) == 1:
        return
    group, bias_group = (groups[number] for number in numbers)
    for option in ("lr", "ewc_lambda", "every"):
        here, there = group[option], bias_group[option]
        if here is there or (
            not _is_on_device(here) and not _is_on_device(there) and here == there
        ):
            continue
        names = [name_of(groups[n], param) for n, param in zip(numbers, params, strict=True)]
        raise ValueError(
            f"{option} must be the same for parameter {names[0]} and its bias {names[1]}, whose "
            f"importance is that of one matrix, not {_shown(here)} and {_shown(there)}: set it in "
            "both groups, or consolidate importance.diagonal()."
        )


def _is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


def _shown(value: object) -> str:
    if _is_on_device(value):
        return "another tensor on a device"
    return str(value.item() if isinstance(value, Tensor) else value)


def is_frozen(state: Mapping[str, Any], param: Tensor) -> Tensor | None:
    """Return which weights of a parameter are frozen; None where none is."""
    frozen = formats.frozen_weights(state["importance"], param)
    return frozen if bool(frozen.any()) else None
