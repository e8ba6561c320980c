"""A copy of a model with quantized weights, to see what quantization forgets."""

from __future__ import annotations

import copy
import importlib.util
from typing import Literal, get_args

from torch import nn

Quantize = Literal["int8"]


def check_quantize(quantize: str) -> None:
    """Find out before training, not at the first evaluation.

    Raises:
        ValueError: The format is unknown.
        ModuleNotFoundError: torchao is not installed.
    """
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize must be one of {get_args(Quantize)} or None, not {quantize!r}.")
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(
            "quantize='int8' needs torchao: pip install 'cl-optim[quantize]'.", name="torchao"
        )


def quantized(model: nn.Module, quantize: Quantize) -> nn.Module:
    """A deep copy of the model whose Linear layers have int8 weights, one scale for each row.

    The model itself is not changed. Weights are quantized, activations are not, so that the copy
    runs wherever the model does.

    Raises:
        ValueError: The format is unknown, or the model has no Linear layer.
        ModuleNotFoundError: torchao is not installed.
    """
    check_quantize(quantize)
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
