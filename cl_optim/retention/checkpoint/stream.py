"""A stream of batches that knows where it is, and can go back there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from cl_optim.retention.checkpoint.random_state import rng_state, set_rng_state


class DataStream:
    """The batches of a DataLoader, epoch after epoch, from any position.

    The position is the number of the epoch, the batches taken from it, and the random states from
    which the loader and its sampler shuffled it. After :meth:`load_state_dict`, also in the middle
    of a loop over the stream, the next batch is the one that followed that position. The batches
    before it are loaded again and dropped.

    Random numbers that the dataset itself draws, for augmentation, repeat where it runs in this
    process or in workers that start anew in each epoch; ``persistent_workers`` keep their own.

    Args:
        loader: Its sampler draws from ``sampler.generator``, ``loader.generator`` or torch's global
            generator, or shuffles by the number of the epoch, which is given to its
            ``set_epoch()``.
        epochs: How many; ``None``: without end.

    Raises:
        ValueError: The loader has no batches, or ``epochs`` is not at least 1.

    Example:
        .. code-block:: python

            stream = DataStream(loader, epochs=3)
            guard = RetentionGuard(model, optimizer, evaluations, folder="runs/a", data=stream)
            guard.start()
            for batch in stream:
                train_step(batch)
                guard.step()
    """

    def __init__(self, loader: DataLoader[Any], epochs: int | None = None) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None, not {epochs}.")
        if hasattr(loader.dataset, "__len__") and len(loader) == 0:
            raise ValueError("loader must have at least one batch.")
        self.loader = loader
        self.epochs = epochs
        self._epoch = 0
        self._taken = 0
        self._first: int | None = None  # the sampler's epoch when the first one began
        self._began: dict[str, torch.Tensor] | None = None  # random states as the epoch began
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Go on from the present position."""
        while self.epochs is None or self._epoch < self.epochs:
            if self._batches is None:
                self._batches = self._open()
            try:
                batch = next(self._batches)
            except StopIteration:
                self._epoch, self._taken = self._epoch + 1, 0
                self._began = self._batches = None
                continue
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position: numbers and the random state."""
        return {
            "epoch": self._epoch,
            "taken": self._taken,
            "first": self._first,
            "began": self._began,
            "generators": {name: one.get_state() for name, one in self._generators().items()},
            "size": self._size(),
        }

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if the same position of this loader would be before other batches."""
        for key in ("epoch", "taken", "first", "began", "generators", "size"):
            if key not in state_dict:
                raise ValueError(f"it is not a stream's position: it has no {key!r}.")
        own, saved = self._generators().keys(), state_dict["generators"].keys()
        if own != saved:
            raise ValueError(
                f"it is the position of a loader that draws from {_drawn(saved)}, and this one "
                f"draws from {_drawn(own)}: make this one like that."
            )
        here, there = self._size(), state_dict["size"]
        if state_dict["taken"] and there != here:
            raise ValueError(
                f"it is a position in an epoch of {there['samples']} samples with batch_size="
                f"{there['batch_size']}, and this loader has {here['samples']} with batch_size="
                f"{here['batch_size']}: make it like that."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back, or on, to a position."""
        self._epoch, self._taken = state_dict["epoch"], state_dict["taken"]
        self._first, self._began = state_dict["first"], state_dict["began"]
        self._batches = None
        for name, generator in self._generators().items():
            generator.set_state(state_dict["generators"][name])

    def _tell_epoch(self) -> None:
        """Tell a sampler that shuffles by the number of the epoch which one this is."""
        for _, one in (("loader", self.loader), *self._samplers()):
            if callable(getattr(one, "set_epoch", None)):
                if self._first is None:  # as the user has set it, for a stream of one epoch, say
                    self._first = getattr(one, "epoch", getattr(one, "iteration", 0))
                one.set_epoch(self._first + self._epoch)
                return

    def _open(self) -> Iterator[Any]:
        self._tell_epoch()
        if self._began is None:
            self._began = self._random_states()
            return iter(self.loader)
        # Repeat the epoch's shuffle and skip. The numbers drawn for it are the loader's own; a
        # global generator must not have moved.
        now = rng_state()
        torch.set_rng_state(self._began["torch"])
        for name, generator in self._generators().items():
            generator.set_state(self._began[name])
        batches = iter(self.loader)
        for number in range(self._taken):
            if next(batches, self) is self:
                raise ValueError(
                    f"the position is after {self._taken} batches of an epoch, but the loader has "
                    f"only {number}."
                )
        set_rng_state(now)
        return batches

    def _generators(self) -> dict[str, torch.Generator]:
        """Return whose numbers are drawn, beside torch's global ones."""
        found = {} if self.loader.generator is None else {"loader": self.loader.generator}
        for name, one in self._samplers():
            generator = getattr(one, "generator", None)
            is_known = any(generator is other for other in found.values())
            is_told_epoch = hasattr(one, "set_epoch")  # and draws from nothing else
            if isinstance(generator, torch.Generator) and not (is_known or is_told_epoch):
                found[name] = generator
        return found

    def _samplers(self) -> list[tuple[str, Any]]:
        batch_sampler = self.loader.batch_sampler
        inner = getattr(batch_sampler, "sampler", self.loader.sampler)
        return [("batch sampler", batch_sampler), ("sampler", inner)]

    def _random_states(self) -> dict[str, torch.Tensor]:
        """Return the states of everything that an epoch's order is drawn from."""
        own = {name: generator.get_state() for name, generator in self._generators().items()}
        return {"torch": torch.get_rng_state(), **own}

    def _size(self) -> dict[str, int | None]:
        """Return what says which batches a number of them is."""
        loader, (_, sampler) = self.loader, self._samplers()[-1]
        batch_size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
        has_samples = hasattr(loader.dataset, "__len__")
        # A sampler knows how many are of this process.
        sized: Any = sampler if hasattr(sampler, "__len__") else loader.dataset
        return {"batch_size": batch_size, "samples": len(sized) if has_samples else None}


def _drawn(names: Iterable[str]) -> str:
    """Say from which generators a loader draws."""
    own = " and ".join(f"a generator of its {name}" for name in names)
    return own or "torch's global generator"
