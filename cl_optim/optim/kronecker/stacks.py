"""Matrices of equal shape, one after another in memory: one chain of products pulls all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import formats
from cl_optim.ops.importance_codec import hashed, stochastic_bfloat16
from cl_optim.optim.kronecker import shrink
from cl_optim.optim.kronecker.matrices import BASES, VALUES, Matrix, is_frozen, padded
from cl_optim.optim.state import weight_of

# Weights whose drift is in memory at once, if they are of several matrices; on a CPU, few enough
# that their memory is taken again from the caches.
_PIECE, _PIECE_CPU = 2**26, 2**20
_USE = 4  # tells the random numbers of a pull from those of a step


class Stack:
    """Matrices of one group and device, of equal shape and blocks; their factors are stacked.

    The tensors in their states are views of the stacks, of one rank: columns of zeros fill up.

    Args:
        members: One at least.

    Attributes:
        members: The matrices.
        group: The number of their weights' group.
        frozen: Of each matrix, which of its parameters have frozen weights.
    """

    def __init__(self, members: Sequence[Matrix]) -> None:
        self.members = list(members)
        self.group = members[0].groups[0]
        self.frozen = [
            tuple(
                is_frozen(state, param) is not None
                for state, param in zip(m.states, m.params, strict=True)
            )
            for m in members
        ]
        self._dtypes = [[param.dtype for param in m.params] for m in members]
        layout = members[0].layout
        self._size = (layout.outputs, layout.inputs)
        self._transposed = layout.transposed
        ranks = [max(m.state[k].shape[2] if k in m.state else 0 for m in members) for k in BASES]
        tensors = [padded(m.state, (ranks[0], ranks[1])) for m in members]
        whole: dict[str, Tensor] = {}
        for key in ("scale", *BASES):
            if key in tensors[0]:
                whole[key] = _as_one([of_one[key] for of_one in tensors])
        self._scale = whole["scale"]
        self._output, self._input = (whole.get(key) for key in BASES)
        for index, (member, of_one) in enumerate(zip(members, tensors, strict=True)):
            member.state.update({key: of_one[key] for key in VALUES})
            member.state.update({key: tensor[index] for key, tensor in whole.items()})
        self._seen = [m.state["scale"] for m in members]

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self._scale.device

    def is_current(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Tell whether the members are still those, with the same factors."""
        return all(
            state.get(m.params[0]) is m.state
            and m.state.get("scale") is seen
            and [param.dtype for param in m.params] == dtypes
            and all(param.device == self.device for param in m.params)
            for m, seen, dtypes in zip(self.members, self._seen, self._dtypes, strict=True)
        )

    # --- the pull ---------------------------------------------------------------------------------

    def pull(
        self,
        groups: Sequence[Mapping[str, Any]],
        pulls: Tensor,
        moved: Sequence[tuple[bool, ...]],
        sums: Tensor | None,
    ) -> None:
        """Take a proximal step: along each direction Δ = W̃ − W̃* becomes Δ/(1 + c), c = pull·S.

        Args:
            groups: The optimizer's.
            pulls: 2·Σ λ·lr of each matrix, float64 [L].
            moved: Of each matrix, which of its parameters are written.
            sums: float64 [L, 2]; written: Σ S z² and ‖Δ‖² of each from before the pull.
        """
        dtype = formats.arithmetic_dtype(self.members[0].params[0])
        pulls = pulls.clamp(max=torch.finfo(dtype).max).to(dtype)
        most = max(part.stop - part.start for part in self._pieces())
        memory = self._memory(most, dtype)
        for part in self._pieces():
            with _exact(self.device):
                bases, scale = self._bases(part, dtype), self._scale[part]
                delta = self._drift(part, memory)
                drift = None if sums is None else shrink.square_sums(delta)
                self._rest(part, delta)
                at = shrink.coordinates(delta, bases)
                if sums is not None and drift is not None:
                    sums[part] = torch.stack([shrink.penalty(delta, at, scale), drift], 1)
                share = shrink.shares(scale, pulls[part])
                correction = shrink.correction(delta, at, share, bases)
            self._subtract(part, groups, correction.add_(0.0), moved)  # −0 would change −0

    def penalties(self) -> Tensor:
        """Sum S z² of each matrix at the weights of now, float64 [L]."""
        each = []
        memory = self._memory(1, torch.float64)
        for index in range(len(self.members)):
            part = slice(index, index + 1)
            delta = self._drift(part, memory)
            self._rest(part, delta)
            with _exact(self.device):
                at = shrink.coordinates(delta, self._bases(part, torch.float64))
                each.append(shrink.penalty(delta, at, self._scale[part]))
        return torch.cat(each)

    def squares(self, index: int) -> Tensor:
        """Sum S² of a matrix over all directions, ‖F‖², float64, 0-dim."""
        squares = self._scale[index].double().square()
        outputs, inputs = self.members[index].rest
        squares[-1] *= outputs
        squares[:, -1] *= inputs
        return squares.sum()

    def _pieces(self) -> Iterator[slice]:
        most = _PIECE_CPU if self.device.type == "cpu" else _PIECE
        count = max(1, most // max(1, self._size[0] * self._size[1]))
        for begin in range(0, len(self.members), count):
            yield slice(begin, min(begin + count, len(self.members)))

    def _memory(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for matrices, [count, out, in], whose order is that of the weights'."""
        outputs, inputs = self._size
        if self._transposed:
            return torch.empty(count, inputs, outputs, dtype=dtype, device=self.device).mT
        return torch.empty(count, outputs, inputs, dtype=dtype, device=self.device)

    def _drift(self, part: slice, memory: Tensor) -> Tensor:
        """Return W̃ − W̃*, [L, out, in], in the memory of as many matrices or more."""
        members = self.members[part]
        delta = memory[: len(members)]
        for matrix, member in zip(delta, members, strict=True):
            parts = zip(member.places(matrix), member.params, member.states, strict=True)
            for place, param, state in parts:
                weight, anchor = param.detach(), state["anchor"]
                if weight.dtype == anchor.dtype == delta.dtype:
                    torch.sub(weight, anchor, out=place)
                    continue
                place.copy_(weight)
                if "compensation" in state:
                    place += state["compensation"]
                place -= anchor
        return delta

    def _rest(self, part: slice, delta: Tensor) -> None:
        """Let frozen weights have no drift."""
        for matrix, member, flags in zip(delta, self.members[part], self.frozen[part], strict=True):
            if any(flags):
                places = zip(member.places(matrix), member.states, member.params, strict=True)
                for place, state, param in places:
                    frozen = formats.frozen_weights(state["importance"], param)
                    place.masked_fill_(frozen, 0.0)

    def _bases(self, part: slice, dtype: torch.dtype) -> shrink.Bases:
        output, input = (
            None if basis is None else basis[part].to(dtype)
            for basis in (self._output, self._input)
        )
        rest = [any(counts) for counts in zip(*(m.rest for m in self.members), strict=True)]
        return shrink.Bases(output, input, *rest)

    def _subtract(
        self,
        part: slice,
        groups: Sequence[Mapping[str, Any]],
        correction: Tensor,
        moved: Sequence[tuple[bool, ...]],
    ) -> None:
        weights, corrections = [], []
        for index, matrix in zip(range(len(self.members))[part], correction, strict=True):
            member = self.members[index]
            for place, param, state, number, moves, has_frozen in zip(
                member.places(matrix),
                member.params,
                member.states,
                member.groups,
                moved[index],
                self.frozen[index],
                strict=True,
            ):
                if not moves:
                    continue
                if has_frozen:
                    frozen = formats.frozen_weights(state["importance"], param)
                    place = place.masked_fill(frozen, 0.0)
                if param.dtype == place.dtype:
                    weights.append(param.detach())
                    corrections.append(place)
                else:
                    stochastic = groups[number]["rounding"] == "stochastic"
                    _subtract_rounded(param, state, place, stochastic)
        if weights:
            torch._foreach_sub_(weights, corrections)


def _exact(device: torch.device) -> torch.autocast:
    """Compute as written: a step may be taken under the user's autocast."""
    return torch.autocast(device.type, enabled=False)


def stacked(matrices: Sequence[Matrix]) -> list[Stack]:
    """Put matrices in stacks; their states hold views of these afterwards."""
    alike: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        weight, state = matrix.params[0], matrix.state
        blocks = [
            (state[key].dtype, state[key].shape[:2]) if key in state else None for key in BASES
        ]
        size = (matrix.layout.outputs, matrix.layout.inputs)
        dtype = formats.arithmetic_dtype(weight)
        key = (matrix.groups[0], weight.device, dtype, size, *blocks)
        alike.setdefault(key, []).append(matrix)
    return [Stack(members) for members in alike.values()]


def apart(state: defaultdict[Tensor, Any]) -> defaultdict[Tensor, Any]:
    """Return a state whose tensors share no memory: pickles would write a stack for each view."""
    keys = ("scale", *BASES)
    copied = {
        param: {key: v.clone() if key in keys else v for key, v in of_param.items()}
        for param, of_param in state.items()
        if "scale" in of_param
    }
    return defaultdict(dict, {**state, **copied})


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one, [L, ...]: a view where they lie one after another."""
    first = tensors[0]
    storage, size = first.untyped_storage().data_ptr(), first.numel()
    in_line = size > 0 and all(
        tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.storage_offset() == first.storage_offset() + index * size
        for index, tensor in enumerate(tensors)
    )
    if not in_line:
        return torch.stack(list(tensors))
    strides = (size, *first.stride())
    return first.as_strided((len(tensors), *first.shape), strides, first.storage_offset())


def _subtract_rounded(
    param: Tensor, state: dict[str, Any], correction: Tensor, stochastic: bool
) -> None:
    """Subtract from a parameter of 16 bits, as its steps round; where it is 0, no bit changes."""
    moves = correction != 0.0
    value = weight_of(param, state) - correction
    random = partial(hashed, correction, state.get("step", 0.0), _USE)
    if "compensation" in state:
        high = value.to(param.dtype)
        low = stochastic_bfloat16(value - high, random())
        compensation = state["compensation"]
        compensation.copy_(torch.where(moves, low, compensation))
    elif stochastic and param.dtype == torch.bfloat16:
        high = stochastic_bfloat16(value, random())
    else:
        high = value.to(param.dtype)
    param.copy_(torch.where(moves, high, param))
