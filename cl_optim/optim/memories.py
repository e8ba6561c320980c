"""Memories of earlier tasks: their closures, when their rows are computed, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cl_optim.distributed import MeanRanks, Together
from cl_optim.ops import nnqp
from cl_optim.ops.checks import listed
from cl_optim.ops.passes import unobserved
from cl_optim.optim.memory_rows import MemoryRows, check_dense
from cl_optim.optim.shards import Shards


@dataclass(eq=False)
class Memory:
    """A task that is kept; its row is in `MemoryRows`.

    Attributes:
        closure: None where only the row was loaded, until `Memories.remember` attaches one.
        refresh_every: Steps after which the row is computed anew; None: never.
        age: Steps taken since it was.
    """

    name: str
    closure: Callable[[], object] | None
    refresh_every: int | None
    age: int = 0

    @property
    def due(self) -> bool:
        """Tell whether the row is to be computed anew."""
        return self.refresh_every is not None and self.age >= self.refresh_every


class Memories:
    """The memories of an optimizer, and their rows.

    Args:
        average: Whether the only row is the mean of all gradients; else row k is memory k's.
        dtype: Of the rows; None: each parameter's own.
        ranks: Of which processes' gradients rows are means.

    Attributes:
        kept: The memories, in the order in which they were first remembered.
    """

    def __init__(self, average: bool, dtype: torch.dtype | None, ranks: MeanRanks = None) -> None:
        self.average = average
        self.ranks = ranks
        self.rows = MemoryRows(dtype)
        self.kept: list[Memory] = []
        self._mean_is_outdated = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the memories' names."""
        return tuple(memory.name for memory in self.kept)

    def remember(self, memory: Memory, shards: Shards, capacity: int | None, evict: str) -> None:
        """Add a memory or replace the one of its name; to one without closure attach this one's.

        Raises:
            RuntimeError: There is no room, or a closure gave no gradient. Nothing has changed then.
        """
        index = next((k for k, m in enumerate(self.kept) if m.name == memory.name), None)
        if index is not None and self.kept[index].closure is None:
            self.kept[index].closure = memory.closure
            self.kept[index].refresh_every = memory.refresh_every
            return
        kept = list(self.kept)
        if index is not None:
            kept[index] = memory
        else:
            kept = [*self._room_for(memory.name, capacity, evict), memory]
        self._follow(shards)
        with unobserved(), _Passes(self._together(shards), are_first=True) as passes:
            values = (
                self._mean(kept, shards, passes)
                if self.average
                else self._row(memory, shards, passes)
            )
        # From here on nothing raises.
        for old in [m for m in self.kept if m not in kept and m.name != memory.name]:
            self._remove(old)
        if len(self.rows) < (1 if self.average else len(kept)):
            self.rows.append()
        self.kept = kept
        if self.average:
            self._write_mean(values)
        else:
            self.rows.write(kept.index(memory), values)

    def _room_for(self, name: str, capacity: int | None, evict: str) -> list[Memory]:
        """Return the memories that remain when another one comes."""
        capacity = nnqp.MAX_SIZE if capacity is None else capacity
        if len(self.kept) < capacity:
            return self.kept
        if evict == "error":
            raise RuntimeError(
                f"the capacity of {capacity} memories is reached, by {listed(self.names, 6, str)}: "
                f"forget one before {name!r} is remembered, or use evict='oldest'."
            )
        return self.kept[len(self.kept) - capacity + 1 :]

    def forget(self, name: str) -> None:
        """Drop a memory and its row.

        Raises:
            ValueError: There is no memory of this name.
        """
        memory = next((m for m in self.kept if m.name == name), None)
        if memory is None:
            known = listed(self.names, 6, str) if self.kept else "there is none"
            raise ValueError(f"no memory is named {name!r}: {known}.")
        self._remove(memory)

    def _remove(self, memory: Memory) -> None:
        k = self.kept.index(memory)
        del self.kept[k]
        if not self.average:
            self.rows.drop(k)
        elif not self.kept:
            self.rows.drop(0)
            self._mean_is_outdated = False
        else:
            self._mean_is_outdated = True

    def refresh(self, shards: Shards) -> None:
        """Compute the rows anew that are due, for the parameters that there are.

        Raises:
            RuntimeError: A memory has no closure; or parameters were exchanged for others, and one
                is never refreshed.
        """
        self._follow(shards)
        for memory in self.kept:
            if memory.closure is None and (memory.refresh_every is not None or self.average):
                raise RuntimeError(
                    f"memory {memory.name!r} has no closure, since none is saved: call "
                    f"remember({memory.name!r}, closure) to attach one, or forget it."
                )
        due = [memory for memory in self.kept if memory.due]
        with unobserved(), _Passes(self._together(shards)) as passes:
            if self.average:
                if self._mean_is_outdated or due:
                    self._write_mean(self._mean(self.kept, shards, passes))
                return
            for memory in due:
                self._write_row(memory, self._row(memory, shards, passes))

    def _mean(
        self, memories: Sequence[Memory], shards: Shards, passes: _Passes
    ) -> dict[Tensor, Tensor]:
        """Return the mean of the memories' gradients, by parameter."""
        mean: dict[Tensor, Tensor] = {}
        for memory in memories:
            for param, value in self._row(memory, shards, passes).items():
                mean[param] = mean[param] + value if param in mean else _wide(value)
        return {param: value / len(memories) for param, value in mean.items()}

    def _together(self, shards: Shards) -> Together:
        """Return the processes whose gradients make a row."""
        if shards.any:
            return shards.together
        return Together("mean" if self.ranks is None else self.ranks)

    def _row(self, memory: Memory, shards: Shards, passes: _Passes) -> dict[Tensor, Tensor]:
        """Return a memory's gradient, which is the same in all processes that train the model.

        Raises:
            ValueError: It is not, and nothing says what is to be done about that.
        """
        together = passes.together
        with together.agreeing():
            gradient = _gradient(memory, shards, passes)
        # The model that is spread has made it that of all processes.
        gradient = shards.of_params(gradient) if shards.any else gradient
        if together.size == 1 or shards.any:
            return gradient
        params = shards.params()
        values = [gradient.get(param, torch.zeros_like(param)) for param in params]
        if self.ranks is None:
            are_equal = together.require_alike(
                # In float64, where a number's last bit is seen.
                torch.stack(
                    [torch.linalg.vector_norm(value, dtype=torch.float64) for value in values]
                ).cpu(),
                f"the closure of memory {memory.name!r} has found another gradient in each of "
                f"{together.size} processes, whose weights would drift apart: make the GEM with "
                "ranks='mean', where each has samples of its own, or with ranks='own', where each "
                "trains a model of its own.",
            )
            if are_equal:
                return gradient
            # Passes are not reproducible here: with rows of its own each would drift away.
        wide = [
            value.to(torch.float32, copy=True) if value.dtype.itemsize < 4 else value.clone()
            for value in values
        ]
        together.sum_(wide)
        return dict(zip(params, torch._foreach_div(wide, together.size), strict=True))

    def _follow(self, shards: Shards) -> None:
        """Follow the parameters; where some were exchanged, rows are of weights that are gone.

        Raises:
            RuntimeError: They were, and a memory is never refreshed.
        """
        params = shards.params()
        if len(self.rows) and self.rows.loses(params):
            fixed = [memory.name for memory in self.kept if memory.refresh_every is None]
            if fixed and not self.average:
                raise RuntimeError(
                    f"parameters of the optimizer were exchanged for others, as a trainer's "
                    f"prepare() does where it shards the model, and memory {fixed[0]!r} is never "
                    f"refreshed: forget({fixed[0]!r}), and remember() it again."
                )
            self._mean_is_outdated = self.average
            self.outdate()
        self.rows.follow(params)

    def _write_row(self, memory: Memory, values: Mapping[Tensor, Tensor]) -> None:
        if memory in self.kept:  # its closure may have forgotten it
            self.rows.write(self.kept.index(memory), values)
            memory.age = 0

    def _write_mean(self, values: Mapping[Tensor, Tensor]) -> None:
        self.rows.write(0, values)
        self._mean_is_outdated = False
        for memory in self.kept:
            memory.age = 0

    def grow_older(self) -> None:
        """Count a step."""
        for memory in self.kept:
            memory.age += 1

    def outdate(self) -> None:
        """Let the next step compute all rows anew, but for those that are never refreshed."""
        for memory in self.kept:
            memory.age = memory.refresh_every or memory.age

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the closures, which belong to the model of the original."""
        kept = [replace(memory, closure=None) for memory in self.kept]
        ranks = self.ranks if isinstance(self.ranks, str) else None  # a group is of this process
        return {**self.__dict__, "kept": kept, "ranks": ranks}

    def state_dict(self, shards: Shards) -> dict[str, Any]:
        """Return everything but the closures; tensors are the very ones that are in use."""
        self._follow(shards)
        return {
            "memories": [
                {"name": m.name, "refresh_every": m.refresh_every, "age": m.age} for m in self.kept
            ],
            **self.rows.state_dict(_places(shards), shards),
            "mean_is_outdated": self._mean_is_outdated,
        }

    def load(
        self,
        saved: Mapping[str, Any],
        shards: Shards,
        places: Sequence[int],
        closures: Mapping[str, Callable[[], object] | None],
    ) -> None:
        """Copy from a state dict, where there are no memories yet.

        Args:
            saved: What `state_dict` returned.
            shards: What knows of the optimizer's parameters.
            places: Of all its parameters in the state dict.
            closures: By name of a memory, as far as there are some.

        Raises:
            ValueError: The state dict is truncated, damaged, or of other parameters.
        """
        for key in ("memories", "rows", "gram", "stale", "mean_is_outdated"):
            if key not in saved:
                raise ValueError(f"the state dict is truncated: its 'gem' has no {key!r}.")
        try:
            self.kept = [
                Memory(m["name"], closures.get(m["name"]), m["refresh_every"], m["age"])
                for m in saved["memories"]
            ]
        except KeyError as error:
            raise ValueError(f"the state dict is truncated: a memory has no {error}.") from None
        size = min(len(self.kept), 1) if self.average else len(self.kept)
        own_places = [places[place] for place in _places(shards)]
        self.rows.load(saved, shards, own_places, size)
        self._mean_is_outdated = bool(saved["mean_is_outdated"])


def _places(shards: Shards) -> list[int]:
    """Return the places of the parameters with elements among all."""
    params = (param for group in shards.groups for param in group["params"])
    return [place for place, param in enumerate(params) if shards.size(param) > 0]


class _Passes:
    """Counts the backward passes through parameters, by hooks that it takes away at the end.

    Args:
        together: The processes that take part.
        are_first: Whether the closure is a new one, whose gradient is hardly zero.
    """

    def __init__(self, together: Together, *, are_first: bool = False) -> None:
        self.together = together
        self.are_first = are_first
        self._params: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._number: dict[Tensor, int] = {}
        # Of each parameter its sum, how often that has been written, and how often by hooks of
        # others in each pass.
        self._sums: dict[Tensor, tuple[Tensor, int, int]] = {}
        self.reset = False

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, params: list[Tensor]) -> None:
        """Count from 0, for these parameters: hooks are kept for the same as before."""
        self._number.clear()
        self._sums.clear()
        self.reset = False
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            return
        self._remove_hooks()
        self._params = params
        self._handles = [
            param.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]
            for param in params
        ]

    def _count(self, param: Tensor) -> None:
        self._number[param] = self._number.get(param, 0) + 1
        grad = param.grad
        if grad is None:  # a hook of others has taken it
            return
        before, version, writes = self._sums.get(param, (grad, grad._version, grad._version))
        # Each pass adds to the tensor of the first one, and nobody else writes there.
        self.reset |= before is not grad or grad._version > version + 1 + writes
        self._sums[param] = grad, grad._version, writes

    def zeroed(self) -> bool:
        """Tell whether the sum was written after the last pass, and is zero."""
        sums = self._sums.values()
        was_written = [grad._version > version for grad, version, _ in sums]
        return any(was_written) and all(was_written) and not any(bool(g.any()) for g, *_ in sums)

    @property
    def total(self) -> int:
        """Return how many passes there were: not all need to reach each parameter."""
        return max(self._number.values(), default=0)


def _gradient(memory: Memory, shards: Shards, passes: _Passes) -> dict[Tensor, Tensor]:
    """Return the mean gradient of the closure's backward passes, by parameter."""
    if memory.closure is None:
        raise RuntimeError(
            f"memory {memory.name!r} has no closure, since none is saved, and the mean of all "
            f"memories needs it: call remember({memory.name!r}, closure) first, or forget it."
        )
    params = [p for p in shards.whole() if p.requires_grad]
    saved = [param.grad for param in params]
    versions = [None if grad is None else grad._version for grad in saved]
    passes.begin(params)
    try:
        for param in params:
            param.grad = None
        with torch.enable_grad():
            memory.closure()
        grads = {param: param.grad for param in params if param.grad is not None}
    finally:
        for param, grad in zip(params, saved, strict=True):
            param.grad = grad
    if versions != [None if grad is None else grad._version for grad in saved]:
        raise RuntimeError(
            f"the closure of memory {memory.name!r} wrote into the gradients of the step, and "
            "they are lost: under DistributedDataParallel with gradient_as_bucket_view=True it "
            "must run the bare module, model.module."
        )
    if passes.total == 0 or not grads:
        raise RuntimeError(
            f"the closure of memory {memory.name!r} left no gradient on any parameter of this "
            "optimizer: it must call backward() on a loss of the model that is trained."
        )
    for param, grad in grads.items():
        check_dense(shards.groups, shards.part(param), grad, f"in memory {memory.name!r} ")
    if passes.reset or (passes.are_first and passes.zeroed()):
        raise RuntimeError(
            f"the closure of memory {memory.name!r} must not reset gradients between its "
            "backward passes, nor after them, nor may hooks write into them in some passes only: "
            "the row is made of their sum. Let it run the bare module, and reset before the first."
        )
    if passes.total == 1:
        return grads
    return {param: _wide(grad) / passes.total for param, grad in grads.items()}


def _wide(value: Tensor) -> Tensor:
    """Return it in float32 at least, so that dividing it rounds nothing that matters."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
