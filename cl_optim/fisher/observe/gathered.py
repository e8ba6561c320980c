"""Rows that were gathered from several samples: the tokens that a router sends to an expert.

Which sample a row belongs to travels with it: from where it is taken out of a tensor by index,
through functions that leave rows where they are, to where they are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cl_optim.fisher import nested
from cl_optim.fisher.observe.refusals import RefusedError, no_samples, not_the_batch, unknown_rows
from cl_optim.fisher.rules.families import ELEMENTWISE, UNARY, named
from cl_optim.fisher.samples import Samples

# Functions that leave rows where they are, if their results have them in front.
_ROW_BY_ROW = (
    ELEMENTWISE
    | UNARY
    | named("linear", "matmul", "mm", "bmm", "addmm", "_grouped_mm", "grouped_mm", "baddbmm")
    | named("dropout", "layer_norm", "rms_norm", "normalize", "prelu", "masked_fill", "clone")
    | named("relu6", "leaky_relu", "hardswish", "hardtanh", "mish", "glu", "clamp", "sin", "cos")
    | named("chunk", "split", "cat", "__matmul__", "masked_fill_", "relu_", "zeros_like", "detach")
    | named("selu", "celu", "logsigmoid", "softsign", "hardsigmoid", "softmax", "log_softmax")
    | named("nan_to_num", "embedding", "long", "int", "remainder", "__mod__", "floor_divide")
    | named("__floordiv__", "clamp_")
)
# Those that give rows another shape.
_RESHAPING = named("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as")
_REDUCING = named("sum", "mean")


class Gathered(Samples):
    """The samples of rows in any order.

    Args:
        count: Number of samples N.
        sample: Of each row, int64; its shape is that of the rows' leading dimensions.
    """

    def __init__(self, count: int, sample: Tensor) -> None:
        super().__init__(count)
        self.sample = sample

    @property
    def packed(self) -> bool:
        """See :class:`Samples`."""
        return True

    def rows(self, tensor: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """Return [rows, *features], and of each its sample; there may be several rows to one."""
        trailing = tensor.shape[tensor.dim() - features :]
        rows = tensor.reshape(-1, *trailing)
        repeat = len(rows) // max(1, self.sample.numel())
        return rows, self.sample.reshape(-1).repeat_interleave(repeat)

    def of_each(self, tensor: Tensor, features: int) -> Tensor:
        """See :class:`Samples`."""
        return self.rows(tensor, features)[1]

    def split(self, tensor: Tensor, features: int = 0) -> Tensor:
        """Return the rows, those of each sample following one another."""
        rows, sample = self.rows(tensor, features)
        return rows[sample.argsort(stable=True)]

    def sum(self, tensor: Tensor, features: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Sum over each sample's rows: [N, *features]."""
        rows, sample = self.rows(tensor, features)
        sums = rows.new_zeros((self.count, *rows.shape[1:]), dtype=dtype or tensor.dtype)
        return sums.index_add_(0, sample, rows.to(sums.dtype))

    def cu_seqlens(self, parts: Tensor) -> Tensor:
        """Return where each sample begins in what :meth:`split` returned, without waiting."""
        repeat = len(parts) // max(1, self.sample.numel())
        ordered = self.sample.reshape(-1).sort().values
        samples = torch.arange(self.count + 1, device=ordered.device)
        return (torch.searchsorted(ordered, samples) * repeat).to(torch.int32)

    def pad(self, parts: Tensor) -> Tensor:
        """Return [N, most rows, *features] of what :meth:`split` returned; waits for the device."""
        offsets = self.cu_seqlens(parts).long()
        lengths = offsets.diff()
        sample = torch.arange(self.count, device=parts.device).repeat_interleave(lengths)
        position = torch.arange(len(parts), device=parts.device) - offsets[sample]
        longest = int(lengths.max()) if self.count else 0
        padded = parts.new_zeros((self.count, longest, *parts.shape[1:]))
        return padded.index_put_((sample, position), parts)


class Tracker:
    """Knows of tensors that hold rows in any order which sample each row is of."""

    def __init__(self, samples: Samples, is_watched: Callable[[Tensor], bool]) -> None:
        self._samples, self._is_watched = samples, is_watched
        # None: rows that have been moved in a way that is not understood.
        self._known: Any = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Let go of everything."""
        self._known.clear()

    def of(self, tensors: Iterable[Tensor]) -> tuple[Tensor | None] | None:
        """Return of which samples rows are, (None,) if unknown; None if they are in order."""
        for tensor in tensors:
            if tensor in self._known:
                return (self._known[tensor],)
        return None

    def samples_of(
        self,
        tensors: Sequence[Tensor],
        shape: Sequence[int],
        features: int,
        name: str,
        by_rule: bool = False,
    ) -> Samples:
        """Return where the samples are in something that was made of tensors.

        Args:
            tensors: What it was made of, with the same rows.
            shape: Its own.
            features: Number of its trailing feature dimensions.
            name: The parameter that it meets.
            by_rule: Whether it is the input of a rule, and not a parameter that is expanded.

        Raises:
            RefusedError: It is not known.
        """
        known, samples = self.of(tensors), self._samples
        if known is not None:
            (sample,) = known
            if sample is None or sample.dim() > len(shape) - features:
                error = ValueError(unknown_rows(list(shape), name))
                raise RefusedError(error, [name], of_data=True)
            return Gathered(samples.count, sample)
        leading = shape[: len(shape) - features]
        if not leading:
            error = ValueError(no_samples(list(shape), samples, name))
            raise RefusedError(error, [name], of_data=by_rule)
        if not samples.holds(shape, features):
            error = ValueError(not_the_batch(list(shape), samples, name))
            of_data = samples.offsets is not None or leading[0] != 1
            raise RefusedError(error, [name], of_data=of_data)
        samples.record(shape, features)
        samples.see(shape)
        return samples

    def natural(self, tensor: Tensor) -> Tensor | None:
        """Return the samples of rows that are in order, or that are known."""
        if tensor in self._known:
            return self._known[tensor]  # type: ignore[no-any-return]
        if tensor.dim() == 0 or not self._samples.holds(tensor.shape, 0):
            return None
        return self._samples.of_rows(tensor.shape, tensor.device)

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Learn of which samples the rows of a function's results are."""
        if (taken := self._taken(func, args, kwargs, result)) is not None:
            made = next(nested.tensors(result))
            if taken[0] is not None or self._has_samples(args[0]):
                self._known[made] = taken[0]
            return
        if not self._known:
            return
        given = [t for t in nested.tensors((args, kwargs)) if t in self._known]
        if given and getattr(func, "__name__", "") in _PUTTING_BACK:
            self._put_back(func, args, kwargs)
            return
        for made in nested.tensors(result):
            # Indices say which rows are taken, and not whose the values are.
            rows = [t for t in given if t.is_floating_point() or not made.is_floating_point()]
            if getattr(func, "__name__", "") == "embedding":
                rows = given
            if not rows or made.dim() == 0 or made in self._known:
                continue
            if func in ELEMENTWISE and self._is_in_order(made, (args, kwargs)):
                continue
            best = next((t for t in rows if self._known[t] is not None), rows[0])
            moved = self._moved(func, args, kwargs, best, made)
            if moved is not None or made.is_floating_point() or len(made) == len(best):
                self._known[made] = moved

    def _has_samples(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and self._samples.holds(tensor.shape, 0)

    def _is_in_order(self, made: Tensor, arguments: Any) -> bool:
        """Return whether rows met others that are in order, as where a residual is added."""
        return any(
            other.shape == made.shape
            and other.is_floating_point()
            and other not in self._known
            and not self._is_watched(other)
            and (other.requires_grad or other.shape[0] == self._samples.count)
            and self._samples.holds(other.shape, 0)
            for other in nested.tensors(arguments)
        )

    def _taken(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[Tensor | None] | None:
        """Return the samples of what is taken out by index; None if nothing is."""
        name = getattr(func, "__name__", "")
        if name not in _TAKING or not args or not isinstance(args[0], Tensor):
            return None
        if self._is_watched(args[0]):
            return None
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return self._indexed(args[0], index)
        if name == "index_select":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            rows = kwargs.get("index", args[2] if len(args) > 2 else None)
            return self._indexed(args[0], (rows,)) if dim in (0, -args[0].dim()) else None
        if name == "repeat_interleave":
            repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
            dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
            # Without a dimension what is flattened is repeated.
            first = dim in (0, -args[0].dim()) or (dim is None and args[0].dim() == 1)
            if not first or repeats is None:
                return None
            sample = self.natural(args[0])
            return (None if sample is None else sample.repeat_interleave(repeats, 0),)
        if name in ("repeat", "expand"):
            return self._repeated(name, args, kwargs)
        if name == "sort" and args[0].dim() == 1:
            sample = self.natural(args[0])
            return None if sample is None else (sample[result[1]],)
        along = kwargs.get("dim", kwargs.get("dims", args[1] if len(args) > 1 else None))
        dims = along if isinstance(along, (tuple, list)) else (along,)
        return (None,) if name == "masked_select" or 0 in dims else None

    def _indexed(self, tensor: Tensor, index: tuple[Any, ...]) -> tuple[Tensor | None] | None:
        index = tuple(
            torch.as_tensor(part, device=tensor.device) if isinstance(part, list) else part
            for part in index
        )
        chosen = [i for i, part in enumerate(index) if isinstance(part, Tensor) and part.dim() > 0]
        if not chosen:
            return None
        index = index[: chosen[-1] + 1]
        if not all(part is None or isinstance(part, Tensor) for part in index):
            rest = [part for part in index if part is not None]
            return None if isinstance(rest[0], slice) and rest[0] == slice(None) else (None,)
        sample = self.natural(tensor)
        if sample is None:
            return (None,)
        return (_covering(sample, tensor, index)[index],)

    def _repeated(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None] | None:
        """Return those of copies for each expert: [R, D] as [E·R, D], [1, R, D] as [E, R, D]."""
        tensor = args[0]
        sizes = (
            args[1:] if len(args) > 1 and isinstance(args[1], int) else args[1] if args[1:] else ()
        )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or len(sizes) < 2:
            return None
        if name == "repeat" and len(sizes) == tensor.dim() and sizes[0] > 1:
            sample = self.natural(tensor)
            others = all(size == 1 for size in sizes[1:])
            return (
                None
                if sample is None
                else (sample.repeat(sizes[0], *[1] * (sample.dim() - 1)) if others else None,)
            )
        copies = name == "expand" and tensor.dim() == len(sizes) > 2 and tensor.shape[0] == 1
        if copies and sizes[0] > 1 and self._samples.count > 1:
            sample = self.natural(tensor[0])
            return None if sample is None else (sample.expand(sizes[0], *sample.shape),)
        return None

    def _put_back(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Let rows that are written into another tensor take their samples with them."""
        name = func.__name__
        if name in ("index_add_", "index_add"):
            dim, index, rows = (
                kwargs.get(key, args[i + 1] if len(args) > i + 1 else None)
                for i, key in enumerate(("dim", "index", "source"))
            )
            place = (index,) if dim == 0 else None
        else:
            index, rows = args[1], args[2]
            place = index if isinstance(index, tuple) else (index,)
        sample = self._known.get(rows) if isinstance(rows, Tensor) else None
        base: Tensor = args[0]
        if name.startswith("index_add") and self._has_samples(base) and base not in self._known:
            return  # sums for each token
        if sample is None or place is None or not all(isinstance(part, Tensor) for part in place):
            self._known[base] = None
            return
        known = self.natural(base)
        if known is None:  # where nothing is written, there is nothing to have a gradient
            known = torch.zeros(base.shape[:1], dtype=torch.long, device=base.device)
        known = _covering(known, base, place).clone()
        known[place] = sample
        self._known[base] = known

    def _moved(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Tensor,
        made: Tensor,
    ) -> Tensor | None:
        """Return the samples of the rows of what a function made of rows."""
        sample: Tensor | None = self._known[given]
        if sample is None:
            return None
        shape = tuple(made.shape)
        if func in _RESHAPING:
            return _regrouped(sample, shape)
        if func in _REDUCING:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if not isinstance(dim, int):
                return None
            dim = dim % given.dim()
            if dim >= sample.dim():
                return sample if shape[: sample.dim()] == sample.shape else None
            kept = kwargs.get("keepdim", False) or dim == 0
            return None if kept else sample.select(dim, 0)
        if func in _ROW_BY_ROW and shape[: sample.dim()] == sample.shape:
            along = kwargs.get("dim", 1)
            return sample if along not in (0, -made.dim()) or func not in _ALONG else None
        if getattr(func, "__name__", "") in ("__getitem__", "transpose", "permute", "__get__"):
            # Only what lies behind the rows was chosen, or moved.
            unmoved = sample.dim() <= min(made.dim(), given.dim()) and all(
                made.shape[i] == given.shape[i] and made.stride(i) == given.stride(i)
                for i in range(sample.dim())
            )
            return sample if unmoved else None
        return None


_TAKING = {"__getitem__", "index_select", "repeat_interleave", "repeat", "expand", "sort"} | {
    "gather", "take_along_dim", "flip", "masked_select",
}  # fmt: skip
_ALONG = named("chunk", "split", "cat", "softmax", "log_softmax", "glu")
_PUTTING_BACK = {"index_add_", "index_add", "__setitem__", "index_put_", "index_put"}


def _covering(sample: Tensor, tensor: Tensor, index: tuple[Any, ...]) -> Tensor:
    """Return the samples of all that an index may choose: of [N, T, ...], of the tokens."""
    parts = [part for part in index if part is not None]
    covered = sum(part.dim() if part.dtype == torch.bool else 1 for part in parts)
    if covered <= sample.dim():
        return sample
    further = [1] * (covered - sample.dim())
    return sample.reshape(*sample.shape, *further).expand(tensor.shape[:covered])


def _regrouped(sample: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return the samples of rows that were given another shape."""
    for leading in range(1, len(shape) + 1):
        if math.prod(shape[:leading]) == sample.numel():
            return sample.reshape(shape[:leading])
    return None
