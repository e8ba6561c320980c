"""What is random about a buffer: which slots new samples take, and which samples are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

Policy = Literal["reservoir", "class_balanced", "ring"]


class _Generator(torch.Generator):
    def __reduce__(self) -> tuple[Any, ...]:
        # As an array: torch does not send two generators to a spawned process.
        return _generator, (self.get_state().numpy(),)


def _generator(state: NDArray[np.uint8]) -> _Generator:
    generator = _Generator()
    generator.set_state(torch.from_numpy(state))
    return generator


class Slots:
    """Chooses the slots of a buffer that new samples take.

    Args:
        capacity: The number of slots.
        policy: As for :class:`~cl_optim.retention.ReplayBuffer`.
        seed: Of the choices.

    Attributes:
        seen: The number of samples that were ever offered.
    """

    def __init__(self, capacity: int, policy: Policy, seed: int) -> None:
        self.seen = 0
        self._capacity, self._policy = capacity, policy
        size = capacity if policy == "class_balanced" else 0
        self._labels: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._seen_of: dict[int, int] = {}
        self._full: set[int] = set()  # classes that have once been the largest
        self._generator = _Generator().manual_seed(seed)

    @property
    def used(self) -> int:
        """The number of slots that hold a sample: the first ones."""
        return min(self.seen, self._capacity)

    def take(self, size: int, classes: list[int] | None) -> dict[int, int]:
        """Choose for the samples of a batch.

        Args:
            size: How many there are.
            classes: Of each, its class, where these are to be balanced.

        Returns:
            Slot → row of the batch, of those that are kept.
        """
        if classes is not None:
            places = self._by_class(classes)
        elif self._policy == "ring":
            places = {(self.seen + i) % self._capacity: i for i in range(size)}
        else:
            places = self._reservoir(size)
        self.seen += size
        return places

    def _reservoir(self, size: int) -> dict[int, int]:
        """Return slot → row of the batch; a later row takes the slot of an earlier one."""
        index = torch.arange(self.seen, self.seen + size, dtype=torch.float64, device="cpu")
        drawn = (torch.empty_like(index).uniform_(generator=self._generator) * (index + 1)).long()
        slots = torch.where(index < self._capacity, index.long(), drawn).tolist()
        return {slot: row for row, slot in enumerate(slots) if slot < self._capacity}

    def _by_class(self, classes: list[int]) -> dict[int, int]:
        places: dict[int, int] = {}
        used = self.used
        kept = Counter(self._labels[:used].tolist())
        for row, own in enumerate(classes):
            self._seen_of[own] = self._seen_of.get(own, 0) + 1
            if used < self._capacity:
                slot, used = used, used + 1
            else:
                largest = max(kept.values())
                self._full.update(label for label, n in kept.items() if n == largest)
                if own in self._full:
                    if self._draw(self._seen_of[own]) >= kept[own]:
                        continue
                    victim = own
                else:
                    victim = min(label for label, n in kept.items() if n == largest)
                members = np.flatnonzero(self._labels == victim)
                slot = int(members[self._draw(len(members))])
                kept[victim] -= 1
            self._labels[slot] = own
            kept[own] += 1
            places[slot] = row
        return places

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator, device="cpu"))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the counters, the slots' classes and the generator's state."""
        return {
            "seen": self.seen,
            "seen_of": [[label, n] for label, n in self._seen_of.items()],
            "full": sorted(self._full),
            "labels": torch.from_numpy(self._labels.copy()),
            "adding": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.seen = state["seen"]
        self._seen_of = dict(state["seen_of"])
        self._full = set(state["full"])
        self._labels = state["labels"].cpu().numpy().copy()
        self._generator.set_state(state["adding"].cpu())


class Draws:
    """Draws slots at random; in the workers of a DataLoader each in its own way.

    Args:
        seed: Of the draws.

    Attributes:
        generator: What they come from outside of workers.
    """

    def __init__(self, seed: int) -> None:
        self.generator = _Generator().manual_seed(seed)
        self._worker_seed: int | None = None  # of the DataLoader's worker that this is in

    def distinct(self, n: int, below: int) -> Tensor:
        """Draw n different numbers below another: int64 [n]."""
        generator = self._begun()
        if 4 * n >= below:
            return torch.randperm(below, generator=generator, device="cpu")[:n]
        chosen: dict[int, None] = {}
        while len(chosen) < n:  # seldom twice: at most a quarter is taken
            chosen.update(dict.fromkeys(_any(n, below, generator).tolist()))
        return torch.tensor(list(chosen)[:n], device="cpu")

    def any(self, n: int, below: int) -> Tensor:
        """Draw n numbers below another, which may be equal: int64 [n]."""
        return _any(n, below, self._begun())

    def _begun(self) -> torch.Generator:
        """Return the generator; workers begin with copies of one."""
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            own = int(torch.randint(1 << 62, (), generator=self.generator, device="cpu"))
            self.generator.manual_seed(own ^ worker.seed)
        return self.generator


def _any(n: int, below: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (n,), generator=generator, device="cpu")
