"""Rules of products with a matrix, and with one matrix for each expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.per_sample.base import Bias
from cl_optim.fisher.per_sample.matrices import Experts, Outer
from cl_optim.fisher.rules.families import named
from cl_optim.fisher.rules.registry import (
    Gradients,
    UnsupportedUseError,
    Use,
    if_trained,
    rule,
    wide,
)
from cl_optim.fisher.samples import Samples


def _outer(samples: Samples, inputs: Tensor, grads: Tensor) -> Outer:
    inputs, grads = samples.split(inputs, 1), samples.split(grads, 1)
    cu_seqlens = samples.cu_seqlens(inputs)
    pad = None if cu_seqlens is None else samples.pad
    return Outer(inputs, grads, samples.count, cu_seqlens, pad)


def _bias(samples: Samples, grads: Tensor) -> Bias:
    return Bias(samples.sum(grads, 1, wide(grads)))


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    """Describe ``torch.nn.functional.linear``."""
    if weight.dim() != 2:
        raise UnsupportedUseError(f"its weight must have 2 dimensions, not {weight.dim()}")

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        outer = None if input is None else _outer(samples, input, grad)
        return outer, _bias(samples, grad) if bias_trained else None

    bias_trained = bias is not None and bias.requires_grad
    return Use(input, 1, (weight, bias), (if_trained(input, weight),), gradients)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: Tensor, **options: Any) -> Use:
    """Describe ``input @ weight``."""
    _refuse_options(options)
    if other.dim() != 2 or input.dim() < 2:
        raise UnsupportedUseError(
            f"only [..., in] @ [in, out] is supported, not {list(input.shape)} @ "
            f"{list(other.shape)}"
        )

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        return (_outer(samples, input, grad).transposed(),)

    return Use(input, 1, (other,), (input,), gradients)


@rule(*named("_grouped_mm", "grouped_mm"))
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Use:
    """Describe ``grouped_mm``: rows sorted by expert, times that expert's matrix.

    Where an expert's rows begin has to be known on the host, which waits for the device.
    """
    if offs is None or mat_a.dim() != 2 or mat_b.dim() != 3 or bias is not None:
        raise UnsupportedUseError("only [S, in] times [E, in, out] with offs, without bias, is")

    def gradients(samples: Samples, grad: Tensor, input: Tensor, offs: Tensor) -> Gradients:
        rows = torch.arange(len(input), device=input.device)
        expert = torch.searchsorted(offs.long(), rows, right=True)
        sample = samples.of_each(input, 1)
        return (Experts(input, grad, expert, sample, samples.count, len(offs)),)

    return Use(mat_a, 1, (mat_b,), (mat_a, offs), gradients)


def batched(input: Tensor, weight: Tensor, transposed: bool, rows: int) -> Use:
    """Describe ``bmm(input, weight)``, or if ``transposed`` the weight times rows.

    Args:
        input: [E, T, in], or, if transposed, [E, in, T].
        weight: [E, in, out], or, if transposed, [E, out, in].
        transposed: Whether the weight is the first factor.
        rows: How many leading dimensions of ``input`` run over rows whose samples are known.
    """

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        if transposed:
            input, grad = input.mT, grad.mT  # [E, T, in], [E, T, out]
        count, tokens = input.shape[:2]
        expert = torch.arange(count, device=input.device).repeat_interleave(tokens)
        sample = samples.of_each(input, input.dim() - rows) if rows == 2 else None
        if sample is None:
            sample = samples.of_each(input[:, 0], 1).repeat_interleave(tokens)
        left, right = (grad, input) if transposed else (input, grad)
        factors = (left.flatten(0, 1), right.flatten(0, 1))
        return (Experts(*factors, expert, sample.reshape(-1), samples.count, count),)

    return Use(input, input.dim() - rows, (weight,), (input,), gradients)


@rule(torch.addmm, Tensor.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **options: Any
) -> Use:
    """Describe ``bias + input @ weight``."""
    _refuse_options(options)
    if beta != 1 or alpha != 1:
        raise UnsupportedUseError(f"beta = {beta} and alpha = {alpha} are not supported, only 1")
    if input.dim() != 1 or len(input) != mat2.shape[1]:
        raise UnsupportedUseError(
            f"what is added must have shape [{mat2.shape[1]}], not {list(input.shape)}"
        )

    bias_trained = input.requires_grad

    def gradients(samples: Samples, grad: Tensor, mat1: Tensor | None) -> Gradients:
        outer = None if mat1 is None else _outer(samples, mat1, grad).transposed()
        return _bias(samples, grad) if bias_trained else None, outer

    return Use(mat1, 1, (input, mat2), (if_trained(mat1, mat2),), gradients)


def _refuse_options(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UnsupportedUseError(f"{given[0]} is not supported")
