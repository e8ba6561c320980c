"""Factors as named tensors, and as JSON that says how they fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.importance.kronecker.side import Side, orthonormal


def tensors(factors: Factors) -> dict[str, Tensor]:
    """Return the tensors by their parts' names: ``"scale"``, ``"input.values"`` and so on."""
    parts = {"scale": factors.scale}
    for which, side in (("output", factors.output), ("input", factors.input)):
        parts[f"{which}.values"] = side.values
        if side.basis is not None:
            parts[f"{which}.basis"] = side.basis
    return parts


def description(factors: Factors) -> dict[str, Any]:
    """Return, as JSON, what :func:`assembled` needs beside the tensors."""
    sides = {
        which: {
            "basis": None if side.basis is None else list(side.basis.shape),
            "tail": side.tail,
            "kept": side.kept,
        }
        for which, side in (("output", factors.output), ("input", factors.input))
    }
    return {**factors.layout._asdict(), **sides}


def layout(described: Mapping[str, Any]) -> Layout:
    """Return the layout of described factors."""
    shape = tuple(described["shape"])
    return Layout(shape, bool(described["transposed"]), described["bias"])


def assembled(described: Mapping[str, Any], read: Callable[[str], Tensor]) -> Factors:
    """Return the factors of that description, float32.

    Args:
        described: What :func:`description` returned.
        read: Returns the tensor of a part, of any shape. A basis in bfloat16 is made orthonormal
            again.
    """
    where = layout(described)
    sides = {}
    for which, size in (("output", where.outputs), ("input", where.inputs)):
        side, basis = described[which], None
        if side["basis"] is not None:
            basis = read(f"{which}.basis").reshape(side["basis"])
            basis = orthonormal(basis) if basis.dtype == torch.bfloat16 else basis.float()
        values = read(f"{which}.values").float()
        sides[which] = Side(size, values, basis, float(side["tail"]), int(side["kept"]))
    output, input = sides["output"], sides["input"]
    scale = read("scale").float().reshape(output.rank + 1, input.rank + 1)
    return Factors(where, output, input, scale)
