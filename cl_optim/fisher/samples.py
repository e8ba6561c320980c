"""Where the samples of a batch are in a tensor: its leading dimension, or runs of packed tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Samples:
    """The samples of one batch.

    In most batches they run along the leading dimension of each tensor, [N, ..., *features], and
    what lies between are tokens (or pixels) of one sample. Some layers see samples and tokens in
    one dimension, [N·T, *features]; that is taken apart where T is known from another tensor.
    In a packed batch all tokens follow one another, [ΣT, ...] or [1, ΣT, ...], and offsets say
    where each sample begins.

    Args:
        count: Number of samples N.
        offsets: For a packed batch, the N + 1 positions where samples begin and the last one ends.
    """

    def __init__(self, count: int, offsets: Sequence[int] | None = None) -> None:
        self.count = count
        self.offsets = None if offsets is None else tuple(offsets)
        self.lengths: set[int] = set()  # tokens per sample, of the tensors seen so far
        self.tokens: int | None = None  # in the batch; the most that any tensor had
        self._runs: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        if self.offsets is not None:
            self.tokens = self.offsets[-1]

    @property
    def packed(self) -> bool:
        """Whether all tokens follow one another, instead of having a dimension of their own."""
        return self.offsets is not None

    def of_rows(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return which sample each row is of, for a shape that :meth:`holds` the samples.

        Its own shape is that of the dimensions that the samples are in: [N], [N·T], [1, ΣT], ...
        """
        if self.offsets is not None:
            sample = self._layout(self.offsets[-1], device)[1]
            return sample if shape[0] == self.offsets[-1] else sample.unsqueeze(0)
        sample = torch.arange(self.count, device=device)
        return sample.repeat_interleave(shape[0] // max(1, self.count))

    def see(self, shape: Sequence[int]) -> None:
        """Learn how many tokens or positions a sample may have from the shape of a tensor."""
        if self.offsets is not None or len(shape) < 2 or self.count == 0:
            return
        frames, rest = divmod(shape[0], self.count)
        if rest == 0 and (frames == 1 or frames in self.lengths):
            inner = {shape[1], math.prod(shape[1:-1]), math.prod(shape[2:])}
            self.lengths |= {frames * tokens for tokens in inner}

    def holds(self, shape: Sequence[int], features: int) -> bool:
        """Return whether the leading dimensions of [..., *features] run over the samples."""
        leading = shape[: len(shape) - features]
        if not leading:
            return False
        if self.offsets is not None:
            total = self.offsets[-1]
            return leading[0] == total or tuple(leading[:2]) == (1, total)
        if leading[0] == self.count or self.count == 1:
            return True
        tokens, rest = divmod(leading[0], self.count)
        return rest == 0 and tokens in self.lengths

    def record(self, shape: Sequence[int], features: int) -> None:
        """Remember the tokens per sample of a tensor that :meth:`holds` the samples."""
        leading = shape[: len(shape) - features]
        if self.offsets is None and (len(leading) > 1 or leading[0] != self.count):
            tokens = math.prod(leading)
            self.tokens = max(self.tokens or 0, tokens)
            if self.count:
                self.lengths.add(tokens // self.count)

    def split(self, tensor: Tensor, features: int = 0) -> Tensor:
        """View [..., *features] as [N, T, *features]; where packed, as [ΣT, *features]."""
        trailing = tensor.shape[tensor.dim() - features :]
        if self.offsets is not None:
            return tensor.reshape(-1, *trailing)
        tokens = math.prod(tensor.shape[: tensor.dim() - features]) // max(self.count, 1)
        return tensor.reshape(self.count, tokens, *trailing)

    def sum(self, tensor: Tensor, features: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Sum [..., *features] over each sample's tokens: [N, *features]."""
        parts = self.split(tensor, features)
        if self.offsets is None:
            return parts.sum(1, dtype=dtype)
        _, sample, _ = self._layout(len(parts), tensor.device)
        sums = parts.new_zeros((self.count, *parts.shape[1:]), dtype=dtype or tensor.dtype)
        return sums.index_add_(0, sample, parts.to(sums.dtype))

    def of_each(self, tensor: Tensor, features: int) -> Tensor:
        """Return which sample each row of [..., *features] is of, [rows]."""
        leading = tensor.shape[: tensor.dim() - features]
        sample = self.of_rows(leading, tensor.device)
        repeat = math.prod(leading) // max(1, sample.numel())
        return sample.reshape(-1).repeat_interleave(repeat)

    def pad(self, parts: Tensor) -> Tensor:
        """Return packed [ΣT, *features] as [N, longest T, *features], zeros after each sample."""
        position, sample, _ = self._layout(len(parts), parts.device)
        repeat = self._repeat(len(parts))
        padded = parts.new_zeros((self.count, self._longest() * repeat, *parts.shape[1:]))
        return padded.index_put_((sample, position), parts)

    def cu_seqlens(self, parts: Tensor) -> Tensor | None:
        """Return int32 offsets into packed [ΣT, *features]; None for [N, T, *features]."""
        return None if self.offsets is None else self._layout(len(parts), parts.device)[2]

    def _longest(self) -> int:
        assert self.offsets is not None
        return max((b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)), default=0)

    def _repeat(self, rows: int) -> int:
        """Return rows per token: several where [ΣT, H, *features] was seen as [ΣT·H, *features]."""
        assert self.offsets is not None
        return rows // max(self.offsets[-1], 1)

    def _layout(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each row its position in its sample and its sample, and the samples' offsets.

        All are made from the host's offsets once, so that nothing waits for the device.
        """
        assert self.offsets is not None
        repeat = self._repeat(rows)
        if (repeat, device) not in self._runs:
            offsets = torch.tensor(self.offsets, device="cpu") * repeat
            sample = torch.arange(self.count, device="cpu").repeat_interleave(offsets.diff())
            position = torch.arange(rows, device="cpu") - offsets[sample]
            cu_seqlens = offsets.to(torch.int32)
            self._runs[repeat, device] = (
                position.to(device, non_blocking=True),
                sample.to(device, non_blocking=True),
                cu_seqlens.to(device, non_blocking=True),
            )
        return self._runs[repeat, device]
