"""A copy of a model with quantized weights, to see what quantization forgets."""

from __future__ import annotations

import copy
from typing import Literal, cast, get_args

import torch
from torch import nn

from cl_optim.ops.checks import dtype_name, require

Quantize = Literal["int8"]


def check_quantize(quantize: str | torch.dtype) -> Quantize:
    """Return a format's name; find out before training, not at the first evaluation.

    Raises:
        ValueError: The format is unknown.
        ModuleNotFoundError: torchao is not installed.
    """
    quantize = dtype_name(quantize)
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize must be one of {get_args(Quantize)} or None, not {quantize!r}.")
    require("torchao", "quantize", "quantize='int8'")
    return cast(Quantize, quantize)


def quantized(model: nn.Module, quantize: Quantize | torch.dtype) -> nn.Module:
    """Copy a model, with int8 weights in the copy's Linear layers, one scale for each row.

    The model itself is not changed. Weights are quantized, activations are not, so that the copy
    runs wherever the model does.

    Args:
        model: It is copied deeply.
        quantize: ``"int8"`` or ``torch.int8``.

    Raises:
        ValueError: The format is unknown, or the model has no Linear layer.
        ModuleNotFoundError: torchao is not installed.
    """
    quantize = check_quantize(quantize)
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise ValueError(
            f"quantize={quantize!r} quantizes nn.Linear layers; {type(model).__name__} has none."
        )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.grad = None
    quantize_(other, Int8WeightOnlyConfig())
    return other
