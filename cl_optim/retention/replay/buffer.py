"""A buffer of samples of earlier tasks, to be mixed into what is learned now."""

from __future__ import annotations

import atexit
import copy
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from cl_optim.importance.errors import DamagedError
from cl_optim.ops.checks import check_whole
from cl_optim.retention.replay.choices import Draws, Policy, Slots
from cl_optim.retention.replay.folder import Folder
from cl_optim.retention.replay.samples import Layout, count, flatten, replace, unflatten
from cl_optim.retention.replay.stores import Memory, Records

_FORMAT = "cl_optim.ReplayBuffer/1"


class ReplayBuffer:
    """Samples of what was learned before, drawn at random beside new ones.

    A sample is any nesting of mappings, lists and tuples of tensors; a batch has the samples as the
    first dimension of each tensor. Everything random comes from two generators of the buffer's own
    (one for additions, one for draws), so that the same calls give the same samples.

    Args:
        capacity: The number of samples kept.
        policy: Which ones. ``"reservoir"``: each sample ever added with the same probability.
            ``"class_balanced"``: as many of each class as there are, a reservoir within each
            class. ``"ring"``: the newest.
        seed: Of the generators.
        path: A folder for the samples, which are then in a file instead of in memory; made if it
            does not exist. A buffer that is there already is opened, with its generators as they
            were at its last `flush`; ``seed`` then counts for nothing.
        label: For ``"class_balanced"``: a batch's integer classes [n], as a function of the batch
            or as the key or index under which the batch has them.
        read_only: Only draw from the buffer in ``path``, in any number of processes at once. Draws
            come from ``seed``: give each process its own.

    Attributes:
        seen: The number of samples ever added.

    Note:
        **On disk**, the room for all samples is taken at the first addition, and each sample has a
        checksum, which every draw verifies. A folder belongs to one buffer at a time, or to any
        number of ``read_only`` ones. Copies (by ``pickle`` or ``copy``, or in a forked process, as
        a DataLoader's workers have them) only draw, too.

        Additions go to the file at once and count from the next :meth:`flush` on;
        :meth:`state_dict`, :meth:`close` and the normal end of the buffer or the process flush. If
        the process is killed between an addition and the flush, old and new samples are mixed in
        the file: opening it then is an error that says so. Draws change no file, so a buffer that
        was filled and flushed survives any end.

        **In the workers of a DataLoader** a buffer draws from a generator that starts from the
        worker's seed and its own, so that workers differ, as epochs do, and ``loader.generator``
        fixes them. These draws are not in the :meth:`state_dict` of the buffer in the main process.

    Raises:
        ValueError: An argument is out of its range; ``path`` has a buffer of another capacity or
            policy, or one that was not flushed, or is damaged (:class:`DamagedError`), or is in use
            (:class:`LockedError`, which names the holder).
        OSError: The disk is full, or refuses otherwise.

    References:
        Vitter 1985 (reservoir, algorithm R); Chrysakis & Moens 2020 (class-balanced reservoir);
        Chaudhry et al. 2019, arXiv:1902.10486 (tiny episodic memories).
    """

    def __init__(
        self,
        capacity: int,
        policy: Policy = "reservoir",
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
        label: Callable[[Any], Tensor] | str | int | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        check_whole("capacity", capacity)
        if policy not in get_args(Policy):
            raise ValueError(f"policy must be one of {get_args(Policy)}, not {policy!r}.")
        if (label is not None) != (policy == "class_balanced"):
            raise ValueError(
                "label goes with policy='class_balanced', which needs it to know a sample's class."
            )
        if read_only and path is None:
            raise ValueError("read_only=True needs the path of a buffer that is there already.")
        self.capacity, self.policy = capacity, policy
        self._label = label
        self._slots, self._draws = Slots(capacity, policy, seed), Draws(seed + 1)
        self._layout: Layout | None = None
        self._store: Memory | Records | None = None
        self._owed = 0.0  # the fraction of a sample that `mix` has still to add
        self._folder = None if path is None else Folder(Path(path).absolute(), read_only)
        if self._folder is not None:
            try:
                self._open(self._folder)
            except BaseException:
                self._folder.release()
                raise
            if read_only:
                self._draws = Draws(seed + 1)
            _OPEN.add(self)

    @property
    def seen(self) -> int:
        """The number of samples ever added."""
        return self._slots.seen

    def __len__(self) -> int:
        return self._slots.used

    def __repr__(self) -> str:
        place = "" if self._folder is None else f", path={str(self._folder)!r}"
        return (
            f"ReplayBuffer({len(self):,} of {self.capacity:,} samples, policy={self.policy!r}, "
            f"{self.seen:,} seen{place})"
        )

    def __enter__(self) -> ReplayBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_folder", None) is not None:
            self.close()

    def __copy__(self) -> ReplayBuffer:
        return copy.deepcopy(self)

    # --- additions --------------------------------------------------------------------------------

    def add(self, batch: Any) -> None:
        """Offer the samples of a batch to the buffer, which copies those that it keeps.

        Args:
            batch: A nesting of tensors [n, ...], on any device.

        After an error the buffer is as it was.

        Raises:
            TypeError: Something in it is no tensor.
            ValueError: Its structure, dtypes or shapes are not those of earlier samples, or its
                classes are not n integers.
            RuntimeError: This buffer only draws from the files that it is in.
            OSError: The disk is full, or refuses otherwise.
        """
        leaves, structure = flatten(batch)
        size = count(leaves)
        layout = Layout.of(leaves, structure)
        if self._layout is not None:
            self._layout.check(layout)
        classes = self._classes(batch, size)
        if size == 0:
            return
        store = self._store_for(layout)
        before, layout_before = self._counters(), self._layout
        try:
            places = self._slots.take(size, classes)
            # The first batch's, in whose order of fields records are written.
            self._layout, self._store = self._layout or layout, store
            if places:
                slots, rows = torch.tensor(list(places.items()), device="cpu").unbind(1)
                kept = {k: leaf.detach()[rows.to(leaf.device)].cpu() for k, leaf in leaves.items()}
                store.write(slots, kept)
        except BaseException:  # an interruption, too, must not leave samples beside others' labels
            self._restore(before, layout_before, store if layout_before else None)
            raise

    def _store_for(self, layout: Layout) -> Memory | Records:
        """Return where the next samples go; on disk it counts as changed from now on."""
        if self._folder is None:
            return self._store or Memory(layout, self.capacity)
        if not self._folder.adds:
            raise RuntimeError(
                f"this buffer only draws from {str(self._folder)!r}: it was opened with "
                "read_only=True, was closed, or is a copy (by pickle or copy, or in a forked "
                "process) of the buffer that adds there; add to that one."
            )
        store = self._store or Records.create(self._folder.samples, layout, self.capacity)
        self._folder.begin_change()
        return store

    def _classes(self, batch: Any, size: int) -> list[int] | None:
        if self._label is None:
            return None
        classes = self._label(batch) if callable(self._label) else batch[self._label]
        if (
            not isinstance(classes, Tensor)
            or classes.shape != (size,)
            or classes.is_floating_point()
            or classes.is_complex()
        ):
            raise ValueError(
                f"label must give an integer tensor [{size}], a class for each sample."
            )
        return [int(value) for value in classes.tolist()]

    # --- draws ------------------------------------------------------------------------------------

    def sample(self, n: int, replacement: bool = False) -> Any:
        """Draw n samples uniformly, on the CPU.

        Args:
            n: How many.
            replacement: Whether a sample may be drawn twice, and n exceed ``len(self)``.

        Returns:
            A batch structured like the first one that was added, lists and named tuples as tuples.

        Raises:
            ValueError: n is not positive, or more than there are; a sample on disk is damaged.
        """
        check_whole("n", operator.index(n))
        if not len(self):
            raise ValueError("The buffer is empty: add samples before drawing some.")
        if n > len(self) and not replacement:
            raise ValueError(
                f"n must be at most the {len(self)} samples in the buffer, not {n}, unless "
                "replacement=True."
            )
        draw = self._draws.any if replacement else self._draws.distinct
        return self._take(draw(n, len(self)))

    def samples(self) -> Any:
        """Return all samples, as one batch (a copy)."""
        if not len(self):
            raise ValueError("The buffer is empty: it has no samples.")
        return self._take(torch.arange(len(self), device="cpu"))

    def _take(self, slots: Tensor) -> Any:
        assert self._layout is not None
        assert self._store is not None
        try:
            leaves = self._store.read(slots)
        except DamagedError as error:
            if self._folder is not None and self._folder.is_held:
                raise
            raise DamagedError(
                f"{error} Or samples were added to it since this copy of it was made: copy it anew."
            ) from None
        return unflatten(leaves, self._layout.structure)

    def mix(self, loader: Iterable[Any], ratio: float) -> MixedLoader:
        """Add replayed samples to every batch of a loader.

        All of the loader's samples stay: a batch of b is followed by b·ratio/(1 − ratio) replayed
        ones, so that ``ratio`` is their share of the whole. Fractions carry over to the next
        batch. While the buffer is empty, batches pass as they are; from one with fewer samples than
        a batch needs, some are drawn twice.

        Args:
            loader: Yields batches structured like the buffer's.
            ratio: From 0 up to, but less than, 1.

        Returns:
            An iterable over the mixed batches, with the loader's length; replayed samples are on
            the device of the loader's. Position in the loader is the loader's own to restore; the
            draws are in the buffer's `state_dict`.

        Raises:
            ValueError: ``ratio`` is out of range.
        """
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio must be at least 0 and less than 1, not {ratio!r}.")
        return MixedLoader(self, loader, ratio)

    def _mixed(self, batch: Any, ratio: float) -> Any:
        leaves, structure = flatten(batch)
        size = count(leaves)
        if self._layout is None:
            return batch
        self._layout.check(Layout.of(leaves, structure))
        self._owed += size * ratio / (1 - ratio)
        extra = math.floor(self._owed)
        self._owed -= extra
        if not extra:
            return batch
        drawn, _ = flatten(self.sample(extra, replacement=extra > len(self)))
        both = {place: torch.cat([v, drawn[place].to(v.device)]) for place, v in leaves.items()}
        return replace(batch, both)

    def closure(
        self,
        loss_fn: Callable[[Any], Tensor],
        n: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Callable[[], Tensor]:
        """Return a closure for `GEM.remember`: backward of the loss on the buffer's samples.

        Args:
            loss_fn: The mean loss (0-dim) of a batch structured like those added:
                ``lambda batch: cross_entropy(model(batch[0]), batch[1])``.
            n: How many samples each call draws anew (some twice, if there are fewer); None: all.
            device: Where they are wanted: the model's.

        Returns:
            A function without arguments that returns the loss.
        """

        def run() -> Tensor:
            batch = self.samples() if n is None else self.sample(n, replacement=n > len(self))
            leaves, structure = flatten(batch)
            on_device = {place: leaf.to(device) for place, leaf in leaves.items()}
            loss = loss_fn(unflatten(on_device, structure))
            torch.autograd.backward(loss)
            return loss.detach()

        return run

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the generators and, unless on disk, a copy of the samples.

        Additions to a buffer on disk are flushed; its samples stay in the files, so the state can
        be loaded as long as nothing has been added since.
        """
        self.flush()
        state = self._counters()
        if self._folder is None:
            kept = self._store.tensors if isinstance(self._store, Memory) else {}
            state["samples"] = {k: v[: len(self)].clone() for k, v in kept.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the same additions and draws follow.

        Raises:
            ValueError: It is of a buffer of another kind, or, on disk, samples were added since.
                Nothing has been changed then.
        """
        self.check_state_dict(state)
        layout = Layout.loads(state["layout"]) if state["layout"] else None
        store = self._store
        if self._folder is None:
            store = Memory(layout, self.capacity) if layout else None
            if store and state["seen"]:
                store.write(
                    torch.arange(min(state["seen"], self.capacity), device="cpu"), state["samples"]
                )
        else:
            layout = self._layout or layout  # of the files
        self._restore(state, layout, store)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse the state."""
        self._check_state(state, "state")
        if self._folder is not None:
            if "samples" in state:
                raise ValueError("state must be of a buffer on disk: it has samples of its own.")
            if state["seen"] != self.seen:
                raise ValueError(
                    f"state is of {state['seen']} samples seen, but the files in "
                    f"{str(self._folder)!r} have been changed since, at {self.seen}."
                )
        elif "samples" not in state:
            raise ValueError("state must have samples: it is of a buffer on disk.")

    def flush(self) -> None:
        """Make additions to a buffer on disk count; in memory there is nothing to do.

        Raises:
            OSError: The disk is full, or refuses otherwise.
        """
        if self._folder is None or not self._folder.adds or not self._folder.changed:
            return
        state = self._counters()
        if isinstance(self._store, Records):
            self._store.sync()
            state["sums"] = self._store.packed_sums()
        self._folder.save(state)

    def close(self) -> None:
        """Flush, and let others have the folder; from now on this buffer only draws.

        A ``with`` block does so at its end. In memory there is nothing to do.
        """
        self.flush()
        if self._folder is not None:
            self._folder.release()

    def _counters(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "capacity": self.capacity,
            "policy": self.policy,
            "owed": self._owed,
            "layout": self._layout.dumps() if self._layout else "",
            "drawing": self._draws.generator.get_state(),
            **self._slots.state_dict(),
        }

    def _check_state(self, state: Mapping[str, Any], name: str) -> None:
        if state.get("format") != _FORMAT:
            raise ValueError(f"{name} must be of a ReplayBuffer: its format is not {_FORMAT!r}.")
        for key in ("capacity", "policy"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"{name} must be of a buffer with {key}={getattr(self, key)!r}, not "
                    f"{state[key]!r}."
                )

    def _restore(
        self, state: Mapping[str, Any], layout: Layout | None, store: Memory | Records | None
    ) -> None:
        self._layout, self._store = layout, store
        self._owed = state["owed"]
        self._slots.load_state_dict(state)
        self._draws.generator.set_state(state["drawing"].cpu())

    def _open(self, folder: Folder) -> None:
        state = folder.load()
        if state is None:
            return
        self._check_state(state, f"path {str(folder)!r}")
        if not state["layout"]:  # an addition that failed was the first
            return
        layout = Layout.loads(state["layout"])
        store = Records.open(folder.samples, layout, self.capacity, state["sums"])
        self._restore(state, layout, store)


_OPEN: weakref.WeakSet[ReplayBuffer] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Flush what is still open when the process ends in the normal way."""
    for buffer in list(_OPEN):
        buffer.close()


class MixedLoader:
    """What `ReplayBuffer.mix` returns: the batches of a loader, each with replayed samples."""

    def __init__(self, buffer: ReplayBuffer, loader: Iterable[Any], ratio: float) -> None:
        self.buffer, self.loader, self.ratio = buffer, loader, ratio

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield self.buffer._mixed(batch, self.ratio)

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError("The loader that was mixed has no length.")
        return len(self.loader)
