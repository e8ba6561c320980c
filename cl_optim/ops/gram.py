"""Products of gradients with memory rows, over lists of tensors.

A memory row is a gradient of the whole model. Rows are stored by parameter: ``memory[i]`` is
[t, *shape of parameter i], so that nothing is flattened or concatenated. Products are kept by
parameter as well, since a step may have gradients for some parameters only; their sum over the
parameters is the product over the whole model.

The functions below are the reference: plain PyTorch on any device, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**16


@torch.no_grad()
def gram_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """All products of the rows and the gradient with each other, in one pass over the data.

    Args:
        memory: G by parameter: n tensors [t, ...], float32, float64, bfloat16 or float16.
        grads: The gradient g by parameter: n tensors [...] on the same device; their dtypes may
            differ from the rows'.

    Returns:
        [n, t + 1, t + 1] float64: Q = GGᵀ in [:, :t, :t], c = Gg in the last column, and row,
        before the corner, which is ‖g‖². Every entry is summed in the same order: g = −G_k gives
        c = −Q_k bit for bit.
    """
    size = len(memory[0]) + 1
    gram = torch.zeros(len(memory), size, size, dtype=torch.float64, device=memory[0].device)
    for i, (rows, grad) in enumerate(zip(memory, grads, strict=True)):
        for chunk in torch.split(_stack(rows, grad), _CHUNK, dim=1):
            for k in range(size):
                products = (chunk[: k + 1] * chunk[k]).sum(1)
                gram[i, k, : k + 1] += products
                gram[i, :k, k] += products[:k]
    return gram


@torch.no_grad()
def dots_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The last column of `gram_per_tensor`: c = Gg and ‖g‖², [n, t + 1] float64."""
    stacks = [_stack(rows, grad) for rows, grad in zip(memory, grads, strict=True)]
    return torch.stack([stack @ stack[-1] for stack in stacks])


@torch.no_grad()
def combine_(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    """Add Gᵀv to the gradient in place; where v is 0 it stays as it is, bit for bit.

    Args:
        grads: The gradient by parameter; updated, in float32 arithmetic (float64 for float64).
        memory: As for `gram_per_tensor`.
        coefficients: v [B, t], float64, on the gradients' device. It is read there: no sync.
        blocks: For each tensor, the row of ``coefficients`` that applies to it.
    """
    for grad, rows, block in zip(grads, memory, blocks, strict=True):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        v = coefficients[block]
        shape = (-1, *[1] * grad.dim())
        # A row that takes no part may hold anything, NaN included.
        used = torch.where((v != 0).view(shape), rows.to(wide), 0.0)
        moved = grad.to(wide) + (v.to(wide).view(shape) * used).sum(0)
        grad.copy_(torch.where((v != 0).any(), moved.to(grad.dtype), grad))


def _stack(rows: Tensor, grad: Tensor) -> Tensor:
    return torch.cat([rows.reshape(len(rows), -1).double(), grad.reshape(1, -1).double()])
