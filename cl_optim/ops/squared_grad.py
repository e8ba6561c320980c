"""The sum of squared per-sample gradients of a linear map, without storing any of the gradients.

:func:`squared_grad_sum_` is the reference: plain PyTorch on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of per-sample products formed at once. A CPU reads them again right after writing them, so
# they should stay in its second-level cache; an accelerator wants large launches.
_CHUNK_BYTES_CPU = 2**18
_CHUNK_BYTES = 2**24


@torch.no_grad()
def squared_grad_sum_(
    out: Tensor, inputs: Tensor, grad_outputs: Tensor, weight_grad: Tensor | None = None
) -> Tensor:
    r"""Add :math:`Σ_n (b_n^\top a_n)^2`, squared elementwise, to ``out`` in place.

    For a linear map y = a Wᵀ, the gradient of sample n's loss with respect to W is b_nᵀ a_n, where
    a_n [T, in] is the sample's input and b_n [T, out] the gradient of the loss with respect to its
    output: the sum over the sample's T tokens comes before the square.

    The arithmetic is in the dtype of ``out`` (squares underflow in float16). Memory beside the
    arguments: two tensors of ``out``'s shape and one bounded chunk.

    Args:
        out: [out, in], float32, or float64 (required for float64 data).
        inputs: a, [N, T, in] or, for T = 1, [N, in]; any real floating-point dtype.
        grad_outputs: b, [N, T, out] or [N, out].
        weight_grad: If given, [out, in] in the dtype of ``out``: the ordinary gradient
            Σ_n b_nᵀ a_n is added to it.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
    """
    _check(out, inputs, grad_outputs, weight_grad)
    if inputs.dim() == 3 and inputs.shape[1] == 1:
        inputs, grad_outputs = inputs.squeeze(1), grad_outputs.squeeze(1)
    if inputs.dim() == 2:
        a, b = inputs.to(out.dtype), grad_outputs.to(out.dtype)
        if weight_grad is not None:
            weight_grad.addmm_(b.mT, a)
        return out.addmm_(b.square().mT, a.square())

    chunk_bytes = _CHUNK_BYTES_CPU if out.device.type == "cpu" else _CHUNK_BYTES
    samples = max(1, chunk_bytes // max(1, out.numel() * out.element_size()))
    for a, b in zip(torch.split(inputs, samples), torch.split(grad_outputs, samples), strict=True):
        product = torch.bmm(b.to(out.dtype).mT, a.to(out.dtype))
        if weight_grad is not None:
            weight_grad += product.sum(0)
        if len(product) == 1:
            out.addcmul_(product[0], product[0])
        else:
            out += product.square_().sum(0)
    return out


def _check(out: Tensor, inputs: Tensor, grad_outputs: Tensor, weight_grad: Tensor | None) -> None:
    if inputs.dim() not in (2, 3):
        raise ValueError(f"inputs must be [N, T, in] or [N, in], not {list(inputs.shape)}.")
    if grad_outputs.shape[:-1] != inputs.shape[:-1] or grad_outputs.dim() != inputs.dim():
        raise ValueError(
            f"grad_outputs must have the leading dimensions of inputs, {list(inputs.shape[:-1])}, "
            f"but its shape is {list(grad_outputs.shape)}."
        )
    shape = (grad_outputs.shape[-1], inputs.shape[-1])
    for name, tensor in (("out", out), ("weight_grad", weight_grad)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}.")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != out.dtype:
            raise ValueError(
                f"{name} must be float32 or float64, and of one dtype with out, not {tensor.dtype}."
            )
        if tensor.device != inputs.device:
            raise ValueError(f"{name} is on {tensor.device}, but inputs is on {inputs.device}.")
    for name, tensor in (("inputs", inputs), ("grad_outputs", grad_outputs)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, not {tensor.dtype}.")
        if tensor.dtype == torch.float64 and out.dtype != torch.float64:
            raise ValueError(f"out must be float64 where {name} is float64, not {out.dtype}.")
    if grad_outputs.device != inputs.device:
        raise ValueError(
            f"grad_outputs is on {grad_outputs.device}, but inputs is on {inputs.device}."
        )
