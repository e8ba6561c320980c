"""A stream of batches that knows where it is, and can go back there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from cl_optim.retention.checkpoint.random_state import rng_state, set_rng_state


class DataStream:
    """The batches of a DataLoader, epoch after epoch, from any position.

    The position is the number of the epoch, the batches taken from it, and the random state from
    which the loader shuffled it. After :meth:`load_state_dict`, also in the middle of a loop over
    the stream, the next batch is the one that followed that position. The batches before it are
    loaded again and dropped.

    Random numbers that the dataset itself draws, for augmentation, repeat where it runs in this
    process or in workers that start anew in each epoch; ``persistent_workers`` keep their own.

    Args:
        loader: Its sampler draws from ``loader.generator``, or from torch's global generator, or
            shuffles by the number of the epoch, which is given to its ``set_epoch()``.
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
        self._began: torch.Tensor | None = None  # random state at the start of the epoch
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
            "generator": None if self.loader.generator is None else self._random_state(),
        }

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if the position is of a loader that drew from another generator."""
        for key in ("epoch", "taken", "began", "generator"):
            if key not in state_dict:
                raise ValueError(f"it is not a stream's position: it has no {key!r}.")
        own, saved = self.loader.generator is not None, state_dict["generator"] is not None
        if own != saved:
            kinds = {True: "a generator of its own", False: "torch's global generator"}
            raise ValueError(
                f"it is the position of a loader with {kinds[saved]}, and this one has "
                f"{kinds[own]}."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back, or on, to a position."""
        self._epoch, self._taken = state_dict["epoch"], state_dict["taken"]
        self._began = state_dict["began"]
        self._first = state_dict.get("first", self._first)  # earlier versions had none
        self._batches = None
        if self.loader.generator is not None:
            self.loader.generator.set_state(state_dict["generator"])

    def _tell_epoch(self) -> None:
        """Tell a sampler that shuffles by the number of the epoch which one this is."""
        batch_sampler = self.loader.batch_sampler
        inner = getattr(batch_sampler, "sampler", None)
        for one in (self.loader, self.loader.sampler, batch_sampler, inner):
            if callable(getattr(one, "set_epoch", None)):
                if self._first is None:  # as the user has set it, for a stream of one epoch, say
                    self._first = getattr(one, "epoch", getattr(one, "iteration", 0))
                one.set_epoch(self._first + self._epoch)  # type: ignore[union-attr]
                return

    def _open(self) -> Iterator[Any]:
        self._tell_epoch()
        if self._began is None:
            self._began = self._random_state()
            return iter(self.loader)
        # Repeat the epoch's shuffle and skip. The numbers drawn for it are the loader's own; a
        # global generator must not have moved.
        now = rng_state()
        self._set_random_state(self._began)
        batches = iter(self.loader)
        for number in range(self._taken):
            if next(batches, self) is self:
                raise ValueError(
                    f"the position is after {self._taken} batches of an epoch, but the loader has "
                    f"only {number}."
                )
        set_rng_state(now)
        return batches

    def _random_state(self) -> torch.Tensor:
        generator = self.loader.generator
        return torch.get_rng_state() if generator is None else generator.get_state()

    def _set_random_state(self, state: torch.Tensor) -> None:
        if self.loader.generator is None:
            torch.set_rng_state(state)
        else:
            self.loader.generator.set_state(state)
