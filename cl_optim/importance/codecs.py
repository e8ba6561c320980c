"""How an importance is written: five codecs, from exact to a few bytes per row.

Each turns one parameter's importance (float32, finite, ≥ 0) into a few named tensors and back.
Importance is an estimate: 500 samples leave it uncertain by at least 6 %, so that log8's 4.5 %
cannot be seen. :func:`measure` says what a codec does to a given importance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.importance.errors import LogError
from cl_optim.importance.statistics import cut, flat_float32, overlap
from cl_optim.ops import importance_codec
from cl_optim.ops.checks import dtype_name

Parts = dict[str, Tensor]
_BLOCK = 256
_CHUNK = 2**20  # as much as stays in a cache


class Codec(ABC):
    """A way to write importance.

    Attributes:
        name: In the log.
        parts: The names of the tensors that it makes of one.
    """

    name: str
    parts: tuple[str, ...]

    def options(self) -> dict[str, Any]:
        """Return what :func:`codec` needs besides the name to make it again."""
        return {}

    def encoder(self, values: Mapping[str, Tensor]) -> Callable[[Tensor], Parts]:
        """Make what encodes each of these tensors; it sees all, so that it can rank them."""
        return self.encode

    @abstractmethod
    def encode(self, values: Tensor) -> Parts:
        """Encode float32 values ≥ 0 of any shape."""

    @abstractmethod
    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Decode to float32 of that shape."""


class Float32(Codec):
    """Four bytes per weight, exact for float32."""

    name = "float32"
    parts = ("values",)

    def encode(self, values: Tensor) -> Parts:
        """Leave them as they are."""
        return {"values": values}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Leave them as they are."""
        return parts["values"].view(shape)


class BFloat16(Codec):
    """Two bytes per weight, within 0.4 %."""

    name = "bfloat16"
    parts = ("values",)

    def encode(self, values: Tensor) -> Parts:
        """Round to the nearest."""
        # What would round to infinity is the largest number.
        return {"values": values.to(torch.bfloat16).clamp_(max=torch.finfo(torch.bfloat16).max)}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Widen."""
        return parts["values"].view(shape).float()


class Log8(Codec):
    """One byte per weight and four per 256: logarithmic codes, within 4.5 %.

    Below 2⁻³¹ of the largest of its 256 neighbours, what is not 0 takes the lowest code, 2⁻³¹ of
    that: :func:`measure` counts these as underflows.
    """

    name = "log8"
    parts = ("blocks",)

    def encode(self, values: Tensor) -> Parts:
        """Return the nearest codes, as the optimizer keeps them."""
        return {"blocks": importance_codec.encode_log8(values)}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Return the codes' values."""
        if not importance_codec.has_levels(parts["blocks"]):
            raise LogError(
                "log8 codes of an earlier version of cl_optim are not read: record the importance "
                "again, or let that version record it with codec='float32'."
            )
        return importance_codec.decode_log8(parts["blocks"], shape)


class TopK(Codec):
    """A bit per weight for the most important ones, and two means for each 256 weights.

    The set of the most important weights is kept exactly, and so is each block's sum; within a
    block, the weights of each kind become equal.

    Args:
        fraction: Of all weights of the importance; weights equal to the last are kept, too.
    """

    name = "topk"
    parts = ("mask", "means")

    def __init__(self, fraction: float = 0.05) -> None:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fraction must be in (0, 1), not {fraction}.")
        self.fraction = fraction

    def options(self) -> dict[str, Any]:
        """Return the fraction."""
        return {"fraction": self.fraction}

    def encoder(self, values: Mapping[str, Tensor]) -> Callable[[Tensor], Parts]:
        """Make an encoder with one threshold for all."""
        total = sum(value.numel() for value in values.values())
        # Rounded like the values: what is not below it stays so.
        threshold = float(np.float32(cut(values, math.ceil(self.fraction * total)).value))
        return lambda value: self._encode(value, threshold)

    def encode(self, values: Tensor) -> Parts:
        """Encode a tensor by itself."""
        return self.encoder({"": values})(values)

    def _encode(self, values: Tensor, threshold: float) -> Parts:
        masks, means = [np.empty(0, np.uint8)], [torch.empty(0, 2, device="cpu")]
        for chunk in torch.split(values.reshape(-1), _CHUNK):
            missing = -chunk.numel() % _BLOCK
            blocks = F.pad(chunk, (0, missing))
            blocks = blocks.view(blocks.numel() // _BLOCK, _BLOCK)
            top = (blocks >= threshold) & (blocks > 0)
            masks.append(np.packbits(top.view(-1)[: chunk.numel()].numpy()))
            kept = torch.where(top, blocks, 0.0)
            sums = torch.stack([kept.double().sum(1), (blocks - kept).double().sum(1)], dim=1)
            counts = torch.full_like(sums, float(_BLOCK))
            counts[-1:] -= missing
            counts[:, 0] = top.sum(1)
            counts[:, 1] -= counts[:, 0]
            means.append((sums / counts.clamp(min=1)).float())
        return {"mask": torch.from_numpy(np.concatenate(masks)), "means": torch.cat(means)}

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Give each weight its block's mean of its kind."""
        means = parts["means"]
        values = means.new_empty(len(means), _BLOCK)
        bits = np.unpackbits(parts["mask"].numpy(), count=values.numel())
        top = torch.from_numpy(bits).view(torch.bool).view(values.shape)
        rows = _CHUNK // _BLOCK
        chunks = (torch.split(whole, rows) for whole in (values, top, means))
        for out, mask, mean in zip(*chunks, strict=True):
            torch.where(mask, mean[:, :1], mean[:, 1:], out=out)
        return values.view(-1)[: shape.numel()].view(shape)


class Rank1(Codec):
    """Row sums times column sums, as Adafactor keeps second moments: a few bytes per row.

    A tensor of more than two dimensions is a matrix of its first by the others. A vector is exact.

    References:
        Shazeer & Stern 2018, arXiv:1804.04235.
    """

    name = "rank1"
    parts = ("rows", "columns")

    def encode(self, values: Tensor) -> Parts:
        """Return row means, and column sums over the mean of the row means."""
        matrix = _matrix(values)
        rows = matrix.new_zeros(matrix.shape[0], dtype=torch.float64)
        columns = matrix.new_zeros(matrix.shape[1], dtype=torch.float64)
        step = max(1, _CHUNK // max(1, len(columns)))
        for some, out in zip(torch.split(matrix, step), torch.split(rows, step), strict=True):
            wide = some.double()
            torch.sum(wide, 1, out=out)
            columns += wide.sum(0)
        total = rows.sum()
        return {
            "rows": (rows / max(1, len(columns))).float(),
            "columns": torch.where(total > 0, columns * len(columns) / total, 0.0).float(),
        }

    def decode(self, parts: Parts, shape: torch.Size) -> Tensor:
        """Return the outer product."""
        product = torch.outer(parts["rows"], parts["columns"])
        return product.clamp_(max=torch.finfo(product.dtype).max).view(shape)


def _matrix(values: Tensor) -> Tensor:
    if values.dim() < 2:
        return values.reshape(-1, 1)
    return values.reshape(values.shape[0], values.shape[1:].numel())


_CODECS: dict[str, type[Codec]] = {
    kind.name: kind for kind in (Float32, BFloat16, Log8, TopK, Rank1)
}
NAMES = tuple(_CODECS)


def codec(name: str | torch.dtype, **options: Any) -> Codec:
    """Return the codec of that name.

    Args:
        name: ``"float32"``, ``"bfloat16"``, ``"log8"``, ``"topk"`` or ``"rank1"``; a dtype counts
            as its name.
        options: The codec's.

    Raises:
        ValueError: There is no such codec.
    """
    name = dtype_name(name)
    if name not in _CODECS:
        raise ValueError(f"codec must be one of {NAMES}, not {name!r}.")
    return _CODECS[name](**options)


class Distortion(NamedTuple):
    """What a codec does to an importance.

    Attributes:
        bytes_per_weight: Of all encoded tensors.
        relative: ‖decoded − F‖ / ‖F‖.
        largest: The largest relative error of a weight whose importance is not 0.
        top_overlap: The fraction of the 5 % most important weights that are still among them.
        underflows: How many weights were above 0, but too small for the code.
    """

    bytes_per_weight: float
    relative: float
    largest: float
    top_overlap: float
    underflows: int


def measure(how: Codec, importance: Mapping[str, Tensor], fraction: float = 0.05) -> Distortion:
    """Encode and decode an importance, and say what it did to it.

    Args:
        how: The codec.
        importance: Finite and ≥ 0.
        fraction: Of the weights whose overlap is measured.
    """
    encode = how.encoder(importance)
    decoded: dict[str, Tensor] = {}
    size = weights = underflows = 0
    difference = norm = largest = 0.0
    for name, given in importance.items():
        values = flat_float32(given).view(given.shape)
        parts = encode(values)
        size += sum(part.nbytes for part in parts.values())
        weights += values.numel()
        decoded[name] = how.decode(parts, values.shape)
        if how.name == Log8.name:
            underflows += importance_codec.count_underflows(values)
        error = (decoded[name].double() - values.double()).abs()
        difference += error.square().sum().item()
        norm += values.double().square().sum().item()
        relative = (error / values.double())[values > 0]
        largest = max(largest, relative.max().item() if relative.numel() else 0.0)
    jaccard = overlap([importance, decoded], fraction).jaccard[0, 1].item()
    return Distortion(
        bytes_per_weight=size / max(weights, 1),
        relative=math.sqrt(difference / norm) if norm else 0.0,
        largest=largest,
        top_overlap=2 * jaccard / (1 + jaccard),  # both sets are of one size
        underflows=underflows,
    )
