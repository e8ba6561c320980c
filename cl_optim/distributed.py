"""The processes that train one model: which of them this is, and what they do together."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

# What an importance is of: of all samples of all processes, or of a group's; or of this one's,
# which are all there are. None: of this one's, and marked so where there are others.
Ranks: TypeAlias = "Literal['sum', 'own'] | dist.ProcessGroup | None"
# The same, where what each process has found is one of several numbers for one thing.
MeanRanks: TypeAlias = "Literal['mean', 'own'] | dist.ProcessGroup | None"

_T = TypeVar("_T")


def place() -> tuple[int, int] | None:
    """Return this process's rank and how many there are; None where it is the only one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.get_rank(), dist.get_world_size()


def check_ranks(ranks: object, everyone: str = "sum") -> None:
    """Raise ValueError where an argument ``ranks`` is none of what it may be.

    Args:
        ranks: The argument.
        everyone: What says that the processes' numbers are taken together.
    """
    if ranks is None or (isinstance(ranks, str) and ranks in (everyone, "own")):
        return
    if not (dist.is_available() and isinstance(ranks, dist.ProcessGroup)):
        raise ValueError(
            f"ranks must be {everyone!r}, 'own', a process group of torch.distributed or None, not "
            f"{ranks!r}."
        )


class Together:
    """What the processes of a group do, each at the same time; alone where there is no other.

    Args:
        ranks: Whose processes; those of ``'own'`` and ``None`` are this one.
    """

    def __init__(self, ranks: Ranks | MeanRanks) -> None:
        everyone, self._owned = ranks in ("sum", "mean"), ranks == "own"
        self._group = None if ranks is None or isinstance(ranks, str) else ranks
        self._here = (everyone and place() is not None) or self._group is not None

    @property
    def metadata(self) -> dict[str, Any]:
        """What an importance says of this: ``"ranks"`` it is the sum of, or whose it is alone."""
        if self._here:
            return {"ranks": self.size}
        if self._owned or (here := place()) is None:
            return {}
        return {"rank": {"rank": here[0], "of": here[1]}}

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self._group) if self._here else 1

    def gather(self, value: _T) -> list[_T]:
        """Return what each process has given, by rank; anything that can be pickled."""
        if not self._here:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return cast(list[_T], found)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Raise in all processes what one of them has raised within, that of the lowest rank.

        The others would wait for it for ever.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # is raised below, in all of them
            error = raised
        first = next((one for one in self.gather(_sendable_error(error)) if one is not None), None)
        if first is not None:
            raise error or first

    def require_same(self, what: object, message: str) -> None:
        """Raise ValueError in all processes where one has given something else."""
        if any(one != what for one in self.gather(what)):
            raise ValueError(message)

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the means of numbers over all processes, which are the same bits in each.

        Raises:
            ValueError: They do not all have the same ones.
        """
        self.require_same(list(numbers), "the processes must give numbers for the same names.")
        found = self.gather(dict(numbers))
        return {name: sum(one[name] for one in found) / len(found) for name in numbers}

    def require_alike(self, numbers: Tensor, message: str) -> None:
        """Raise ValueError in all processes where one has a vector that is 0.1 % off another's."""
        found = torch.tensor(self.gather(numbers.double().tolist()), dtype=torch.float64)
        if ((found - found[0]).norm(dim=1) > 1e-3 * found[0].norm()).any():
            raise ValueError(message)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, which are the same bits in each."""
        if not self._here:
            return
        for tensor in tensors:
            there = self._sendable(tensor)
            dist.all_reduce(there, group=self._group)
            if there is not tensor:
                tensor.copy_(there)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the group's backend can send it from."""
        if "gloo" in dist.get_backend(self._group) or not tensor.is_cpu:
            return tensor.contiguous()
        return tensor.to(torch.accelerator.current_accelerator() or "cpu")


def _sendable_error(error: Exception | None) -> Exception | None:
    """Return an error that arrives in other processes: itself, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of the error's own making, whatever it is
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
