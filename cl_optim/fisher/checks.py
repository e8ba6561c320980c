"""Refusals of arguments, each in one sentence."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor, nn

from cl_optim.importance.kronecker.side import BLOCK, ENERGY, MAX_RANK
from cl_optim.ops.checks import check_positive

Verify: TypeAlias = Literal["first"] | bool
Number: TypeAlias = int | float | Tensor


def check_model(model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")


def check_verify(verify: object) -> None:
    """Refuse other values of ``verify``."""
    if verify not in ("first", True, False):
        raise ValueError(f"verify must be 'first', True or False, not {verify!r}.")


def check_structure(
    structure: object, scale: object, block: object, energy: object, max_rank: object
) -> None:
    """Refuse what is no structure of an importance, or settings that it does not have."""
    if structure not in ("diagonal", "kronecker"):
        raise ValueError(f"structure must be 'diagonal' or 'kronecker', not {structure!r}.")
    if scale not in ("product", "exact"):
        raise ValueError(f"scale must be 'product' or 'exact', not {scale!r}.")
    check_integer("block", block, 1)
    if isinstance(energy, bool) or not isinstance(energy, (int, float)):
        raise TypeError(f"energy must be a number, not {type(energy).__name__}.")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be in (0, 1], not {energy}.")
    check_integer("max_rank", max_rank, 1, or_none=True)
    if structure == "diagonal":
        settings = {
            "scale": (scale, "product"),
            "block": (block, BLOCK),
            "energy": (energy, ENERGY),
            "max_rank": (max_rank, MAX_RANK),
        }
        for argument, (value, default) in settings.items():
            if value != default:
                raise ValueError(
                    f"{argument}={value!r} is of Kronecker factors: it needs structure='kronecker'."
                )


def check_integer(argument: str, value: object, least: int, *, or_none: bool = False) -> None:
    """Refuse what is no integer, or below ``least``."""
    if or_none and value is None:
        return
    either, or_else = (" or None", ", or None") if or_none else ("", "")
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer{either}, not {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}{or_else}, not {value}.")


def check_number(argument: str, value: object) -> None:
    """Refuse what is no positive number; the value of a tensor is not waited for."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{argument} must be a number or a tensor of one element, not a tensor of shape "
                f"{list(value.shape)}."
            )
        return
    check_positive(argument, value)
