"""Matrices of equal shape, one after another in memory: one chain of products pulls all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.ops import formats
from cl_optim.ops import kronecker_shrink as shrink
from cl_optim.ops.importance_codec import Use, hashed, stochastic_bfloat16
from cl_optim.optim.kronecker.matrices import BASES, VALUES, Matrix, is_frozen, padded
from cl_optim.optim.state import weight_of

# Weights whose drift is in memory at once, if they are of several matrices; on a CPU, few enough
# that their memory is taken again from the caches.
_PIECE, _PIECE_CPU = 2**26, 2**20
Places: TypeAlias = list[list[Tensor]]  # by matrix: a weight's and perhaps a bias's


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
        self._rest = [any(counts) for counts in zip(*(m.rest for m in members), strict=True)]
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
        pulls: Tensor | float,
        moved: Sequence[tuple[bool, ...]],
        sums: Tensor | None,
    ) -> None:
        """Take a proximal step: along each direction Δ = W̃ − W̃* becomes Δ/(1 + c), c = pull·S.

        Args:
            groups: The optimizer's.
            pulls: 2·Σ λ·lr: of each matrix, float64 [L], or one for all.
            moved: Of each matrix, which of its parameters are written.
            sums: float64 [L, 2]; written: Σ S z² and ‖Δ‖² of each from before the pull.
        """
        dtype = formats.arithmetic_dtype(self.members[0].params[0])
        largest = torch.finfo(dtype).max
        if isinstance(pulls, float):
            pulls = min(pulls, largest)
        else:
            pulls = pulls.clamp(max=largest).to(dtype)
        if sums is None and self._pulled_at_once(pulls, dtype, moved):
            return
        parts = self._pieces()
        memory = self._memory(parts[0].stop, dtype)
        for part in parts:
            delta = memory[: part.stop - part.start]
            places = self._places(part, delta)
            with _exact(self.device):
                bases, scale = self._bases(part, dtype), _in_dtype(self._scale, part, dtype)
                self._drift(part, places)
                drift = None if sums is None else shrink.square_sums(delta)
                at = shrink.coordinates(delta, bases)
                if sums is not None and drift is not None:
                    sums[part] = torch.stack([shrink.penalty(delta, at, scale), drift], 1)
                share = shrink.shares(scale, pulls if isinstance(pulls, float) else pulls[part])
                correction = shrink.correction(delta, at, share, bases)
            if correction is not delta:
                places = self._places(part, correction)
            correction.add_(0.0)  # −0 would change −0
            self._subtract(part, groups, places, moved)

    def _pulled_at_once(
        self, pulls: Tensor | float, dtype: torch.dtype, moved: Sequence[tuple[bool, ...]]
    ) -> bool:
        """Pull small matrices of plain weights by one kernel, if that is what these are."""
        if any(map(any, self.frozen)) or not all(map(all, moved)):
            return False
        params = [m.params for m in self.members]
        anchors = [[state["anchor"] for state in m.states] for m in self.members]
        tensors = [t for one in (*params, *anchors) for t in one]
        if not shrink.fits(self._size, (self._output, self._input), tensors):
            return False
        every = slice(0, len(self.members))
        bases = self._bases(every, dtype)  # not of large ones: it may be a copy
        weights, of_weights, biases, of_biases = (
            [of_one[place] for of_one in of_all if place < len(of_one)]
            for place in (0, 1)
            for of_all in (params, anchors)
        )
        scale = _in_dtype(self._scale, every, dtype)
        shrink.fused_(
            weights, of_weights, biases, of_biases, bases, scale, pulls, transposed=self._transposed
        )
        return True

    def penalties(self) -> Tensor:
        """Sum S z² of each matrix at the weights of now, float64 [L]."""
        each = []
        delta = self._memory(1, torch.float64)
        for index in range(len(self.members)):
            part = slice(index, index + 1)
            self._drift(part, self._places(part, delta))
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

    def _pieces(self) -> list[slice]:
        """Return which members are pulled at once; the first are the most."""
        most = _PIECE_CPU if self.device.type == "cpu" else _PIECE
        count = max(1, most // max(1, self._size[0] * self._size[1]))
        size = len(self.members)
        return [slice(begin, min(begin + count, size)) for begin in range(0, size, count)]

    def _memory(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for matrices, [count, out, in], whose order is that of the weights'."""
        outputs, inputs = self._size
        if self._transposed:
            return torch.empty(count, inputs, outputs, dtype=dtype, device=self.device).mT
        return torch.empty(count, outputs, inputs, dtype=dtype, device=self.device)

    def _places(self, part: slice, matrices: Tensor) -> Places:
        """Return the parameters' places in [L, out, in], as views."""
        return [member.places(m) for m, member in zip(matrices, self.members[part], strict=True)]

    def _drift(self, part: slice, places: Places) -> None:
        """Write W̃ − W̃* where it has its places; 0 for frozen weights."""
        members = zip(self.members[part], self.frozen[part], places, strict=True)
        for member, frozen, of_one in members:
            parts = zip(of_one, member.params, member.states, frozen, strict=True)
            for place, param, state, has_frozen in parts:
                weight, anchor = param.detach(), state["anchor"]
                if weight.dtype == anchor.dtype == place.dtype:
                    torch.sub(weight, anchor, out=place)
                else:
                    place.copy_(weight)
                    if "compensation" in state:
                        place += state["compensation"]
                    place -= anchor
                if has_frozen:
                    place.masked_fill_(formats.frozen_weights(state["importance"], param), 0.0)

    def _bases(self, part: slice, dtype: torch.dtype) -> shrink.Bases:
        output, input = (
            None if basis is None else _in_dtype(basis, part, dtype)
            for basis in (self._output, self._input)
        )
        return shrink.Bases(output, input, *self._rest)

    def _subtract(
        self,
        part: slice,
        groups: Sequence[Mapping[str, Any]],
        places: Places,
        moved: Sequence[tuple[bool, ...]],
    ) -> None:
        """Subtract from the parameters what is in their places."""
        weights, corrections = [], []
        members = zip(self.members[part], self.frozen[part], moved[part], places, strict=True)
        for member, frozen_of_one, moves_of_one, places_of_one in members:
            for place, param, state, number, moves, has_frozen in zip(
                places_of_one,
                member.params,
                member.states,
                member.groups,
                moves_of_one,
                frozen_of_one,
                strict=True,
            ):
                if not moves:
                    continue
                if has_frozen:
                    frozen = formats.frozen_weights(state["importance"], param)
                    place.masked_fill_(frozen, 0.0)
                if param.dtype == place.dtype:
                    weights.append(param.detach())
                    corrections.append(place)
                else:
                    stochastic = groups[number]["rounding"] == "stochastic"
                    _subtract_rounded(param, state, place, stochastic)
        if weights:
            torch._foreach_sub_(weights, corrections)


def _in_dtype(stack: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Return some of a stack's matrices; without a call of torch for what is as it is wanted."""
    some = stack if part.start == 0 and part.stop == len(stack) else stack[part]
    return some if some.dtype == dtype else some.to(dtype)


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """Compute as written: a step may be taken under the user's autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def stacked(matrices: Sequence[Matrix]) -> list[Stack]:
    """Put matrices in stacks; their states hold views of these afterwards."""
    alike: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        weight, state = matrix.params[0], matrix.state
        blocks = [
            (state[key].dtype, state[key].shape[:2]) if key in state else None for key in BASES
        ]
        layout = matrix.layout
        alike_in = (layout.outputs, layout.inputs, layout.transposed, layout.bias is None)
        dtype = formats.arithmetic_dtype(weight)
        key = (matrix.groups[0], weight.device, dtype, alike_in, *blocks)
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
    random = partial(hashed, correction, state.get("step", 0.0), Use.KRONECKER_PULL)
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
