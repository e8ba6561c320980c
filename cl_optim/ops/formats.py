"""How a parameter's state is stored: in which formats, and which of its weights are frozen.

A group of an optimizer names the formats: ``"float32"`` and ``"bfloat16"``, and with one byte per
weight ``"log8"`` for importance and ``"8bit"`` for moments (:mod:`cl_optim.ops.importance_codec`).
What is stored tells by its dtype which it is; codes are uint8. Parameters of float64 keep
everything in float64, whatever the group says.

A weight is frozen where the sign bit of its importance is set, or where its code is that of frozen
ones. ``csrc/formats.h`` says all of this to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import importance_codec as codec
from cl_optim.ops.checks import dtype_name

# What a group may ask for.
OPTIONS: dict[str, tuple[str | None, ...]] = {
    "importance_dtype": ("float32", "bfloat16", "log8"),
    "anchor_dtype": (None, "float32", "bfloat16"),
    "state_dtype": ("float32", "bfloat16", "8bit"),
    "rounding": ("nearest", "stochastic", "kahan"),
    "basis_dtype": ("float32", "bfloat16"),
}

# Eight bits are for the moments of large tensors; those of norms and biases weigh nothing and
# matter most.
SMALLEST_8BIT = 4096

_CODES = torch.uint8
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settle(group: MutableMapping[str, Any]) -> None:
    """Write a group's formats by name where they are dtypes.

    Raises:
        ValueError: There is no such format; the message names the option.
    """
    for option, allowed in OPTIONS.items():
        if group[option] in allowed:
            continue
        name = dtype_name(group[option])
        if name not in allowed:
            raise ValueError(f"{option} must be one of {allowed}, not {group[option]!r}.")
        group[option] = name


def described(dtype: torch.dtype) -> str:
    """Name what a tensor of this dtype stores."""
    return "codes (uint8)" if dtype == _CODES else str(dtype_name(dtype))


# --- dtypes and shapes ----------------------------------------------------------------------------


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's arithmetic, and of its state unless that is narrower."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def stored_dtypes(param: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that a parameter's moments and importance may have."""
    wide = arithmetic_dtype(param)
    return (wide,) if wide == torch.float64 else (wide, torch.bfloat16, _CODES)


def anchor_dtypes(param: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that a parameter's anchor may have."""
    wide = arithmetic_dtype(param)
    return (wide,) if wide == torch.float64 else (wide, param.dtype, torch.bfloat16)


def anchor_dtype(param: Tensor, format_: str | None) -> torch.dtype:
    """Return the dtype of a parameter's anchor in a format; None is for the parameter's own."""
    return param.dtype if format_ is None else _float_dtype(param, format_)


def is_codes(stored: Tensor) -> bool:
    """Tell blocks of one-byte codes from numbers."""
    return stored.dtype == _CODES


def stored_shape(stored: Tensor, param: Tensor) -> tuple[int, ...]:
    """Return the shape that a parameter's state must have, being of this dtype."""
    return codec.packed_shape(param.numel()) if is_codes(stored) else tuple(param.shape)


def like(param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make an empty tensor laid out like the parameter; without dtype, in its arithmetic's."""
    dtype = dtype or arithmetic_dtype(param)
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _float_dtype(param: Tensor, format_: str) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else _FLOATS[format_]


# --- moments --------------------------------------------------------------------------------------


def zero_moment(param: Tensor, format_: str, size: int | None = None) -> Tensor:
    """Make a parameter's moment as it begins.

    Args:
        param: The parameter.
        format_: How it is to be stored.
        size: How many weights all of it has, where this is a part; the format is that of the whole.
    """
    if format_ != "8bit":
        return like(param, _float_dtype(param, format_)).zero_()
    size = param.numel() if size is None else size
    if param.dtype == torch.float64 or size < SMALLEST_8BIT:
        return like(param).zero_()
    return torch.zeros(codec.packed_shape(param.numel()), dtype=_CODES, device=param.device)


def load_moment(stored: Tensor, param: Tensor, *, signed: bool) -> Tensor:
    """Read a stored moment in the dtype of the arithmetic; itself if that is its own."""
    if is_codes(stored):
        return codec.decode_moment(stored, param.shape, signed=signed)
    return stored.to(arithmetic_dtype(param))


def store_moment(
    stored: Tensor, values: Tensor, random: Callable[[], Tensor] | None = None, *, signed: bool
) -> None:
    """Write a moment where it is stored, rounded as far as that is narrower.

    Args:
        stored: Where to.
        values: The moment in the dtype of the arithmetic.
        random: Gives what `codec.hashed` returns, to round stochastically; to the nearest without.
        signed: Whether it is a first moment.
    """
    if is_codes(stored):
        stored.copy_(codec.encode_moment(values, random() if random else None, signed=signed))
    elif random and stored.dtype == torch.bfloat16 and values.dtype != stored.dtype:
        stored.copy_(codec.stochastic_bfloat16(values, random()))
    elif stored is not values:
        stored.copy_(values)


# --- importance, and which weights are frozen -----------------------------------------------------


def frozen_weights(stored: Tensor, param: Tensor) -> Tensor:
    """Read which weights a stored importance marks as frozen: bool of the parameter's shape."""
    return codec.frozen_log8(stored, param.shape) if is_codes(stored) else stored.signbit()


def count_frozen_codes(stored: Tensor) -> int:
    """Count the codes of frozen weights, as many as `mark_frozen_` returned; of codes only."""
    return codec.count_frozen_log8(stored)


def load_importance(
    stored: Tensor, param: Tensor, codes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read a stored importance.

    Args:
        stored: Codes, or floating-point numbers whose sign bits mark frozen weights.
        param: Its parameter.
        codes: What `mark_frozen_` returned. Without, frozen weights of codes have F = 0.

    Returns:
        F and which weights are frozen, of the parameter's shape; F in the dtype of the arithmetic.
    """
    frozen = frozen_weights(stored, param)
    if not is_codes(stored):
        return stored.to(arithmetic_dtype(param)).abs(), frozen
    thawed = stored if codes is None else codec.thaw_log8(stored, codes)
    return codec.decode_log8(thawed, param.shape), frozen


def store_importance(
    importance: Tensor,
    param: Tensor,
    format_: str,
    random: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Make a stored importance, of which nothing is frozen.

    Args:
        importance: F in the dtype of the arithmetic, of the parameter's shape.
        param: Its parameter.
        format_: How it is to be stored.
        random: Gives random numbers for these values, to round stochastically where the format is
            narrower; to the nearest without.
    """
    if format_ == "log8" and param.dtype != torch.float64:
        numbers = random(importance.contiguous()) if random else None
        return codec.encode_log8(importance, random=numbers)
    dtype = _float_dtype(param, "float32" if format_ == "float32" else "bfloat16")
    if dtype == torch.bfloat16:
        importance = importance.clamp(max=torch.finfo(dtype).max)
        if random:
            importance = codec.stochastic_bfloat16(importance, random(importance))
    return like(param, dtype).copy_(importance)


def mark_frozen_(stored: Tensor, frozen: Tensor) -> Tensor | None:
    """Mark weights as frozen in an importance that marks none.

    Returns:
        Of codes, those that the weights had, uint8 [number of them]; None for numbers, which keep
        theirs.
    """
    if is_codes(stored):
        return codec.freeze_log8_(stored, frozen)
    stored.copy_(torch.where(frozen, -stored, stored))
    return None


def unmark_frozen_(stored: Tensor, codes: Tensor | None) -> None:
    """Mark none of the weights; ``codes`` is what `mark_frozen_` returned."""
    if not is_codes(stored):
        stored.abs_()
    elif codes is not None:
        stored.copy_(codec.thaw_log8(stored, codes))
