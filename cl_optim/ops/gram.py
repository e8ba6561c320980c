"""Products of gradients with memory rows, over lists of tensors.

A memory row is a gradient of the whole model. Rows are stored by parameter: ``memory[i]`` is
[t, *shape of parameter i], so that nothing is flattened or concatenated. Products are kept by
parameter as well, since a step may have gradients for some parameters only; their sum over the
parameters, `total`, is the product over the whole model.

Products are summed in float64, in which a product of two float32 numbers is exact: rows of any
scale are right, and so are nearly dependent ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_optim.ops import library

MAX_ROWS = 1024
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHUNK = 2**16
_FEW = 2**12

library.define(
    "gram_per_tensor(Tensor[] memory, Tensor[] grads) -> Tensor", cpu="compiled", cuda="triton"
)
library.define(
    "gram_dots_per_tensor(Tensor[] memory, Tensor[] grads) -> Tensor", cpu="compiled", cuda="triton"
)
library.define(
    "gram_combine_(Tensor(a!)[] grads, Tensor[] memory, Tensor coefficients, int[] blocks) -> ()",
    cpu="compiled",
    cuda="triton",
)


@library.fake("gram_per_tensor")
def _(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    size = len(memory[0]) + 1
    return memory[0].new_empty(len(memory), size, size, dtype=torch.float64)


@library.fake("gram_dots_per_tensor")
def _(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    return memory[0].new_empty(len(memory), len(memory[0]) + 1, dtype=torch.float64)


@library.implementation("gram_per_tensor", "cuda")
@torch.no_grad()
def gram_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Multiply the rows and the gradient with each other, all in one pass over the data.

    Args:
        memory: G by parameter: n tensors [t, ...], t ≤ 1024, float32, float64, bfloat16 or float16.
        grads: The gradient g by parameter: n tensors [...] on the same device; their dtypes may
            differ from the rows'.

    Returns:
        [n, t + 1, t + 1] float64: Q = GGᵀ in [:, :t, :t], c = Gg in the last column, and row,
        before the corner, which is ‖g‖². Every entry is summed in the same order: g = −G_k gives
        c = −Q_k bit for bit. [0, 1, 1] for n = 0.

    Raises:
        ValueError: Naming the argument that does not fit.
    """
    check(memory, grads)
    if not grads:
        return torch.zeros(0, 1, 1, dtype=torch.float64)
    backend = choose("gram_per_tensor", grads[0].device)
    if backend == "reference":
        return gram_per_tensor_reference(memory, grads)
    memory, grads = in_one_order(memory, grads)
    if backend == "triton":
        from cl_optim.ops import gram_triton

        return gram_triton.gram_per_tensor(memory, grads)
    products: Tensor = torch.ops.cl_optim.gram_per_tensor(memory, grads)
    return products


@library.implementation("gram_dots_per_tensor", "cuda")
@torch.no_grad()
def dots_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Multiply the rows and the gradient with the gradient: the last column of `gram_per_tensor`.

    That is c = Gg and ‖g‖², [n, t + 1] float64.

    On a CPU bit for bit; elsewhere summed in another order.
    """
    check(memory, grads)
    if not grads:
        return torch.zeros(0, 1, dtype=torch.float64)
    backend = choose("gram_dots_per_tensor", grads[0].device)
    if backend == "reference":
        return dots_per_tensor_reference(memory, grads)
    memory, grads = in_one_order(memory, grads)
    if backend == "triton":
        from cl_optim.ops import gram_triton

        return gram_triton.dots_per_tensor(memory, grads)
    products: Tensor = torch.ops.cl_optim.gram_dots_per_tensor(memory, grads)
    return products


@library.implementation("gram_combine_", "cuda")
@torch.no_grad()
def combine_(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    """Add Gᵀv to the gradient in place; where v is 0 it stays as it is, bit for bit.

    The sum over the rows is in float64 and rounded once, to the gradient's dtype: v may be far
    outside float32's range where rows and gradient are of different scales.

    Args:
        grads: The gradient by parameter; updated.
        memory: As for `gram_per_tensor`. Rows with v_k = 0 are not read and may hold anything.
        coefficients: v [B, t], float64, on the gradients' device. It is read there: no sync.
        blocks: For each tensor, the row of ``coefficients`` that applies to it.

    Raises:
        ValueError: Naming the argument that does not fit; nothing has been written.
    """
    check(memory, grads)
    _check_combination(grads, memory, coefficients, blocks)
    if not grads:
        return
    coefficients = coefficients.contiguous()
    backend = choose("gram_combine_", grads[0].device)
    if backend == "reference":
        combine_reference_(grads, memory, coefficients, blocks)
        return
    memory, arranged = in_one_order(memory, grads)
    if backend == "triton":
        from cl_optim.ops import gram_triton

        gram_triton.combine_(arranged, memory, coefficients, blocks)
    else:
        torch.ops.cl_optim.gram_combine_(arranged, memory, coefficients, blocks)
    # Writes through raw pointers pass autograd's version counters by.
    torch.autograd.graph.increment_version(arranged)
    for grad, written in zip(grads, arranged, strict=True):
        if written is not grad:
            grad.copy_(written)


def choose(operator: str, device: torch.device | str) -> str:
    """Return who computes one of the operators above on a device: "cpu", "triton" or "reference".

    Where there are no kernels it is the reference, with one warning that says why.
    """
    return library.choose(operator, device, "The Gram products run on their slower reference: {}")


def gram(
    memory: Sequence[Tensor] | Tensor, grad: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Return Q and c over all tensors; `cl_optim.functional.gram` documents it."""
    if isinstance(memory, Tensor) != isinstance(grad, Tensor):
        raise ValueError("memory and grad must be two tensors, or two lists of tensors.")
    memory = [memory] if isinstance(memory, Tensor) else memory
    grads = [grad] if isinstance(grad, Tensor) else grad
    products = total(gram_per_tensor(memory, grads))
    return products[:-1, :-1], products[:-1, -1]


def total(per_tensor: Tensor) -> Tensor:
    """Sum over the first dimension, every entry in the same order.

    ``torch.sum`` may sum the columns of a matrix in different orders, after which g = −G_k would
    no longer give c = −Q_k bit for bit.
    """
    if len(per_tensor) == 0:
        return per_tensor.new_zeros(per_tensor.shape[1:])
    if per_tensor.is_cpu and per_tensor.numel() <= _FEW:
        return per_tensor.cumsum(0)[-1]  # one after the other: an operation instead of many
    while len(per_tensor) > 1:
        half, rest = divmod(len(per_tensor), 2)
        pairs = per_tensor[:half] + per_tensor[half : 2 * half]
        per_tensor = torch.cat([pairs, per_tensor[-1:]]) if rest else pairs
    return per_tensor[0]


# --- the reference --------------------------------------------------------------------------------


@torch.no_grad()
def gram_per_tensor_reference(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Compute `gram_per_tensor` in plain PyTorch."""
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
def dots_per_tensor_reference(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Compute `dots_per_tensor` in plain PyTorch."""
    stacks = [_stack(rows, grad) for rows, grad in zip(memory, grads, strict=True)]
    return torch.stack([stack @ stack[-1] for stack in stacks])


@torch.no_grad()
def combine_reference_(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    """Compute `combine_` in plain PyTorch."""
    for grad, rows, block in zip(grads, memory, blocks, strict=True):
        v = coefficients[block].view(-1, *[1] * grad.dim())
        # A row that takes no part may hold anything, NaN included.
        used = torch.where(v != 0, rows.double(), 0.0)
        moved = grad.double() + (v * used).sum(0)
        grad.copy_(torch.where((v != 0).any(), moved.to(grad.dtype), grad))


def _stack(rows: Tensor, grad: Tensor) -> Tensor:
    shape = (len(rows), grad.numel())
    return torch.cat([rows.reshape(shape).double(), grad.reshape(1, -1).double()])


# --- the layout that kernels need -----------------------------------------------------------------


def in_one_order(
    memory: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make rows dense, and bring gradients into the same order of dimensions.

    Rows are read as they lie, whatever the order. A gradient in another order is copied, which
    costs less than to copy t rows; rows with gaps are copied too, and so is what is lazily negated.

    Returns:
        The arguments, with copies where they were needed.
    """
    rows_in_order, grads_in_order = [], []
    for rows, grad in zip(memory, grads, strict=True):
        rows, grad = rows.resolve_neg(), grad.resolve_neg()
        strides = rows.stride()[1:]
        if strides != grad.stride() or not grad.is_contiguous():
            if not is_dense(grad.shape, strides):
                rows = rows.contiguous()
                strides = rows.stride()[1:]
            if not _same_order(grad.shape, grad.stride(), strides):
                grad = grad.new_empty_strided(grad.shape, strides).copy_(grad)
        rows_in_order.append(rows)
        grads_in_order.append(grad)
    return rows_in_order, grads_in_order


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether a tensor fills its memory without gaps, in whatever order of dimensions."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_order(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    # The stride of a dimension of size 1 means nothing.
    together = zip(shape, first, second, strict=True)
    return 0 in shape or all(a == b or size < 2 for size, a, b in together)


# --- checks ---------------------------------------------------------------------------------------


def check(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Refuse lists that do not fit together.

    Raises:
        ValueError: Naming the argument and what it should be.
    """
    if len(memory) != len(grads):
        raise ValueError(f"memory must hold {len(grads)} tensors, as grads, not {len(memory)}.")
    if not grads:
        return
    device = grads[0].device
    rows = memory[0].shape[0] if memory[0].dim() else 0
    if rows > MAX_ROWS:
        raise ValueError(f"memory may have {MAX_ROWS} rows at most, not {rows}.")
    for i, (row, grad) in enumerate(zip(memory, grads, strict=True)):
        if row.shape != (rows, *grad.shape):
            raise ValueError(
                f"memory[{i}] must be {[rows, *grad.shape]}, rows of the shape of grads[{i}], not "
                f"{list(row.shape)}."
            )
        _check_tensor("memory", i, row, device)
        _check_tensor("grads", i, grad, device)


def _check_tensor(name: str, i: int, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}[{i}] must be float32, float64, bfloat16 or float16, not {tensor.dtype}."
        )
    if tensor.device != device:
        raise ValueError(f"{name}[{i}] is on {tensor.device}, but grads[0] is on {device}.")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}[{i}] must be a dense tensor, not {tensor.layout}.")


def _check_combination(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    if len(blocks) != len(grads):
        raise ValueError(
            f"blocks must hold {len(grads)} numbers, one per tensor, not {len(blocks)}."
        )
    if coefficients.dtype != torch.float64 or coefficients.dim() != 2:
        raise ValueError(
            f"coefficients must be float64 [B, t], not {coefficients.dtype} "
            f"{list(coefficients.shape)}."
        )
    if not grads:
        return
    if coefficients.shape[1] != len(memory[0]):
        raise ValueError(
            f"coefficients must be [B, {len(memory[0])}], one per row of memory, not "
            f"{list(coefficients.shape)}."
        )
    if coefficients.device != grads[0].device:
        raise ValueError(
            f"coefficients is on {coefficients.device}, but grads[0] is on {grads[0].device}."
        )
    for i, (block, grad) in enumerate(zip(blocks, grads, strict=True)):
        if not 0 <= block < len(coefficients):
            raise ValueError(
                f"blocks[{i}] must be in [0, {len(coefficients)}), a row of coefficients, not "
                f"{block}."
            )
        if not grad.is_contiguous() and any(
            stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)
        ):
            raise ValueError(f"grads[{i}] must not be expanded: it is written in place.")
