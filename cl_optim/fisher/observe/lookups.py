"""Tables that are looked up once for all samples, as for positions, and not for each.

Which of both it is may show only in what is done with what was looked up: until then, that is
undecided, and can be looked up for each sample instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cl_optim.fisher import nested
from cl_optim.fisher.observe.calls import Call
from cl_optim.fisher.observe.gathered import Tracker
from cl_optim.fisher.observe.refusals import RefusedError, listed
from cl_optim.fisher.observe.sources import Source, then
from cl_optim.fisher.observe.watched import Watched
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.tables import Entries
from cl_optim.fisher.rules.families import VIEWS
from cl_optim.fisher.rules.registry import wide
from cl_optim.fisher.rules.tables import check_embedding, table_gradients
from cl_optim.fisher.samples import Samples

# Methods that tell what a tensor is like, and use none of its values.
_METADATA = {"dim", "size", "numel", "stride", "__len__", "is_floating_point", "is_contiguous"} | {
    "ndimension", "nelement", "element_size", "storage_offset", "data_ptr", "get_device",
}  # fmt: skip


class _Undecided:
    """Something looked up once, and how to look it up for each sample instead."""

    def __init__(self, name: str, make: Callable[[], Tensor]) -> None:
        self.name, self._make = name, make
        self._made: Tensor | None = None

    def by_sample(self) -> Tensor:
        """Look it up, the first time."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def then(self, view: Callable[[Tensor], Tensor]) -> _Undecided:
        """Return a view of it."""
        return _Undecided(self.name, lambda: view(self.by_sample()))


class Lookups:
    """The lookups of one batch.

    Args:
        parameters: The watched parameters by name.
        watched: Watches what was looked up once.
        samples: Where the batch's samples are.
        tracker: Knows of tensors whose rows are of several samples.
        shared: Names of tables, and whether they are looked up once; is added to.

    Attributes:
        undecided: What was looked up with [N, T] or [T, T] indices, of tokens or of relative
            positions.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        watched: Watched,
        samples: Samples,
        tracker: Tracker,
        shared: dict[str, bool],
    ) -> None:
        self._parameters, self._watched = parameters, watched
        self._samples, self._tracker, self._shared = samples, tracker, shared
        self.undecided: Any = WeakIdKeyDictionary()
        # A table looked up with one index per sample, if there is one: the indices may be positions
        # if sequences are as long as the batch.
        self._table: str | None = None

    def share(self, call: Call, by_sample: Callable[[], Tensor]) -> Tensor | None:
        """Look a table up once for all samples; return None if it is for each sample.

        Args:
            call: Of ``F.embedding``.
            by_sample: Looks it up for each sample.
        """
        bound = call.bound("input", "weight", "padding_idx")
        indices, table, padding = bound["input"], bound["weight"], bound.get("padding_idx")
        source = call.found.get(id(table))
        if source is None or self._tracker.of([indices]) is not None:
            return None
        shape, count = indices.shape, self._samples.count
        shared, unsure = self._is_shared(shape)
        known = self._shared.get(source.name)
        if not unsure:
            self._shared[source.name] = shared
        elif known is not None and (len(shape) > 1 or shape[0] == count):
            shared = known
        elif len(shape) == 1 and shape[0] == count:
            self._table = source.name
        else:
            shared = True  # unless it is used in another way: see decide
        if not shared:
            return None
        ignored = ("input", "weight", "padding_idx", "norm_type")
        options = {key: value for key, value in call.kwargs.items() if key not in ignored}
        check_embedding(*call.args[3:4], **options)
        looked_up: Tensor = call.run()
        length, width = table.shape
        dtype = wide(self._parameters[source.name])

        def step(inner: PerSample) -> PerSample:
            if isinstance(inner, Entries) and indices.dim() == 1 and padding is None:
                return inner.of(indices.long(), length)
            grads = inner.dense(0, count, dtype).reshape(count, -1, width)
            each = indices.reshape(1, -1).expand(count, -1)
            return table_gradients(Samples(count), each, grads, length, padding)

        start = int(looked_up.storage_offset())
        pullbacks = then(source.pullbacks, step)
        self._watched.derive(looked_up, Source(pullbacks, start, call.remake, doubt=source.doubt))
        if unsure and known is None:
            self._leave_undecided(looked_up, _Undecided(source.name, by_sample))
        return looked_up

    def require_samples(self, call: Call) -> None:
        """Refuse what is not known to be looked up for each sample, of a table of DTensors.

        Raises:
            RefusedError: It may be looked up once for all samples, as positions are.
        """
        indices = call.bound("input")["input"]
        if any(self._is_shared(indices.shape)) and self._tracker.of([indices]) is None:
            error = NotImplementedError(
                f"{listed(call.names())} met indices {list(indices.shape)}, which are, or may be, "
                "positions, and tables of positions are not supported under tensor parallelism "
                "(use another batch size, where they are as many as the sequences are long)"
            )
            raise RefusedError(error, call.names())

    def _is_shared(self, shape: Sequence[int]) -> tuple[bool, bool]:
        """Return whether indices of that shape are of all samples, and whether they may be."""
        count = self._samples.count
        shared = not self._samples.holds(shape, 0)
        packed = self._samples.offsets is not None
        return shared, not packed and count > 1 and not shared and _may_be_positions(shape, count)

    def _leave_undecided(self, tensor: Tensor, how: _Undecided) -> None:
        for one in (tensor, self._watched.derived_stand_in(tensor)):
            self.undecided[one] = how

    def decide(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Look up for each sample what is used as activations are.

        The samples of [N, T] tokens lead, and stay where they are. Of [T, T] relative positions the
        dimensions are first moved behind others: see :meth:`decide_views`.
        """
        if func in VIEWS or getattr(func, "__name__", "") in _METADATA:
            return args, kwargs
        by_sample = {}
        for tensor in nested.tensors((args, kwargs)):
            if (how := self.undecided.get(tensor)) is not None:
                self._shared[how.name] = False
                by_sample[id(tensor)] = how.by_sample()
        return nested.replace(args, by_sample), nested.replace(kwargs, by_sample)

    def decide_views(self, call: Call, tensor: Tensor, views: Sequence[Tensor]) -> None:
        """Decide by a view that moves the first dimension: that is not the samples'."""
        how = self.undecided.get(tensor)
        if how is None:
            return
        if any(_moves_the_first_dimension(tensor, view) for view in views):
            self._shared[how.name] = True
            for other in [one for one, way in self.undecided.items() if way.name == how.name]:
                del self.undecided[other]
            return

        def make(made: Tensor, i: int) -> Tensor:
            return list(nested.tensors(call.replaced({id(tensor): made}).run()))[i]

        for i, view in enumerate(views):
            self._leave_undecided(view, how.then(lambda made, i=i: make(made, i)))

    def check_table(self) -> None:
        """Refuse a lookup that cannot be told to be of samples or of positions."""
        if self._table is not None and self._samples.count in self._samples.lengths:
            raise ValueError(
                f"parameter {self._table!r} met {self._samples.count} indices, which may be "
                f"samples or positions, since sequences are as long as batch_size; use another "
                f"batch size."
            )


def _moves_the_first_dimension(tensor: Tensor, view: Tensor) -> bool:
    """Return whether the first dimension of a tensor does not come first any more in its view."""
    if view.dim() == 0 or view.shape[0] == 1:
        return True
    kept = view.shape[0] == tensor.shape[0] and view.stride(0) == tensor.stride(0)
    regrouped = view.numel() == tensor.numel() and view.is_contiguous()
    # [N, T, ...] as [T, N, ...], as nn.MultiheadAttention has it, tells nothing yet.
    swapped = view.dim() > 1 and view.stride() == tensor.transpose(0, 1).stride()
    return not (kept or regrouped or swapped)


def _may_be_positions(indices: Sequence[int], count: int) -> bool:
    """Return whether indices of that shape may be [T] or [T, T], perhaps flattened."""
    if len(indices) > 1:
        return indices[0] == indices[1]
    return indices[0] == count or math.isqrt(indices[0]) ** 2 == indices[0]
