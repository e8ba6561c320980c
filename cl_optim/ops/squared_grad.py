"""The sum of squared per-sample gradients of a linear map, without storing any of the gradients.

:func:`squared_grad_sum_` computes it, on a GPU by the Triton kernel of
:mod:`cl_optim.ops.squared_grad_triton`. :func:`squared_grad_sum_reference_` is plain PyTorch, for
any device; :func:`choose` says which of the two a call takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops import library
from cl_optim.ops.checks import dtype_name

# Bytes of per-sample products formed at once. A CPU reads them again right after writing them, so
# they should stay in its second-level cache; an accelerator wants large launches.
_CHUNK_BYTES_CPU = 2**18
_CHUNK_BYTES = 2**24

library.define(
    "squared_grad_sum_(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, "
    "Tensor(b!)? weight_grad=None, Tensor? cu_seqlens=None) -> ()",
    cuda="triton",
    capability=8,
)


@library.implementation("squared_grad_sum_", "cpu", "cuda")
def _(*tensors: Any) -> None:
    squared_grad_sum_(*tensors)


@torch.no_grad()
def squared_grad_sum_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Add :math:`Σ_n (b_n^\top a_n)^2`, squared elementwise, to ``out`` in place.

    For a linear map y = a Wᵀ, the gradient of sample n's loss with respect to W is b_nᵀ a_n, where
    a_n [T, in] is the sample's input and b_n [T, out] the gradient of the loss with respect to its
    output: the sum over the sample's T tokens comes before the square.

    Sums and squares are in the dtype of ``out`` (in float16, squares would underflow). For float32
    data so are the products, unless ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"``
    (``torch.set_float32_matmul_precision("high")`` makes it so).

    bfloat16, float16 and float32 data on a CUDA device of compute capability 8.0 or later is summed
    by a Triton kernel, at T > 1: a per-sample product never leaves the registers, and the host
    does not wait. Beside the arguments it needs at most 64 KiB of partial sums per multiprocessor
    and result, and a copy of ``inputs`` or ``grad_outputs`` where rows are not whole multiples of
    16 bytes; and float32 tensors of the results' shape where these have stride 1 neither both
    along rows nor both along columns. Everything else is summed by plain PyTorch, which needs one
    tensor of ``out``'s shape or one bounded chunk: float64, T = 1 (which is ``(b²)ᵀ(a²)``), other
    devices, and, with one warning, a GPU that the kernel cannot run on.
    :func:`cl_optim.ops.squared_grad.choose` tells which. Either way a call's additions have a
    fixed order.

    Args:
        out: [out, in], float32, or float64 (required for float64 data).
        inputs: a, [N, T, in] or, for T = 1, [N, in]; with ``cu_seqlens``, [ΣT, in]. Any real
            floating-point dtype, any strides.
        grad_outputs: b, [N, T, out], [N, out] or [ΣT, out].
        weight_grad: If given, [out, in]: the ordinary gradient Σ_n b_nᵀ a_n is added to it. Of
            ``out``'s dtype, or bfloat16 or float16 beside a float32 ``out``: it is then summed in
            float32 and rounded once.
        cu_seqlens: [N + 1], int32 or int64, for packed sequences of different lengths, empty ones
            included: sample n is rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``. It rises from 0
            to ΣT. On a GPU its values are not checked, since the host would have to wait for
            them: rows outside the tensors are never read, but sums are wrong where it is.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or ``cu_seqlens`` does not rise
            from 0 to ΣT.

    Example:
        >>> import torch
        >>> from cl_optim import functional as F
        >>> a, b = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [-1.0]]])
        >>> F.squared_grad_sum_(torch.zeros(1, 1), a, b)  # (3·1 − 1·2)²
        tensor([[1.]])
    """
    _check(out, inputs, grad_outputs, weight_grad, cu_seqlens)
    if choose(out, inputs, cu_seqlens) == "reference":
        return squared_grad_sum_reference_(out, inputs, grad_outputs, weight_grad, cu_seqlens)
    from cl_optim.ops import squared_grad_triton

    dtype = torch.promote_types(inputs.dtype, grad_outputs.dtype)
    inputs, grad_outputs = inputs.to(dtype).resolve_neg(), grad_outputs.to(dtype).resolve_neg()
    squared_grad_triton.squared_grad_sum_(out, inputs, grad_outputs, weight_grad, cu_seqlens)
    written = [out] if weight_grad is None else [out, weight_grad]
    # Writes through raw pointers pass autograd's version counters by.
    torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
    return out


def choose(out: Tensor, inputs: Tensor, cu_seqlens: Tensor | None = None) -> str:
    """Return who computes :func:`squared_grad_sum_` of these arguments.

    Warns once where a GPU has to do without the Triton kernel.

    Returns:
        ``"triton"`` or ``"reference"``.
    """
    one_token = cu_seqlens is None and (inputs.dim() == 2 or inputs.shape[1] == 1)
    if out.device.type != "cuda" or out.dtype != torch.float32 or one_token:
        return "reference"
    warning = "Squared gradients are summed by the slower reference: {}"
    return library.choose("squared_grad_sum_", out.device, warning)


@torch.no_grad()
def squared_grad_sum_reference_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute :func:`squared_grad_sum_` in plain PyTorch; reads ``cu_seqlens`` on the host."""
    if weight_grad is not None and weight_grad.dtype != out.dtype:
        total = torch.zeros_like(out)
        squared_grad_sum_reference_(out, inputs, grad_outputs, total, cu_seqlens)
        weight_grad += total
        return out
    if cu_seqlens is None and inputs.dim() == 3 and inputs.shape[1] == 1:
        inputs, grad_outputs = inputs.squeeze(1), grad_outputs.squeeze(1)
    if cu_seqlens is None and inputs.dim() == 2:
        a, b = inputs.to(out.dtype), grad_outputs.to(out.dtype)
        if weight_grad is not None:
            weight_grad.addmm_(b.mT, a)
        return out.addmm_(b.square().mT, a.square())

    # A backward pass may run under the user's autocast, which would round the products.
    with torch.autocast(out.device.type, enabled=False):
        _add_products(out, inputs, grad_outputs, weight_grad, cu_seqlens)
    return out


def _add_products(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    chunk_bytes = _CHUNK_BYTES_CPU if out.device.type == "cpu" else _CHUNK_BYTES
    samples = max(1, chunk_bytes // max(1, out.numel() * out.element_size()))
    product = None  # of a matrix too large to form several of; its memory is used again
    for a, b in _chunks(inputs, grad_outputs, cu_seqlens, samples):
        a, b = a.to(out.dtype), b.to(out.dtype).mT
        if len(a) == 1:
            product = torch.mm(b[0], a[0], out=product)
            if weight_grad is not None:
                weight_grad += product
            out.addcmul_(product, product)
        else:
            products = torch.bmm(b, a)
            if weight_grad is not None:
                weight_grad += products.sum(0)
            out += products.square_().sum(0)


def _chunks(
    inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor | None, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples of one length, [n, T, in] and [n, T, out], where n is at most ``samples``."""
    if cu_seqlens is None:
        pairs = zip(torch.split(inputs, samples), torch.split(grad_outputs, samples), strict=True)
        yield from pairs
        return
    lengths = cu_seqlens.diff().tolist()
    pairs = zip(torch.split(inputs, lengths), torch.split(grad_outputs, lengths), strict=True)
    yield from ((a[None], b[None]) for a, b in pairs if len(a))


def _check(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if cu_seqlens is not None and inputs.dim() != 2:
        raise ValueError(f"inputs must be [ΣT, in] with cu_seqlens, not {list(inputs.shape)}.")
    if inputs.dim() not in (2, 3):
        raise ValueError(f"inputs must be [N, T, in] or [N, in], not {list(inputs.shape)}.")
    if grad_outputs.shape[:-1] != inputs.shape[:-1] or grad_outputs.dim() != inputs.dim():
        raise ValueError(
            f"grad_outputs must have the leading dimensions of inputs, {list(inputs.shape[:-1])}, "
            f"but its shape is {list(grad_outputs.shape)}."
        )
    for name, tensor in (("inputs", inputs), ("grad_outputs", grad_outputs)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, not {tensor.dtype}.")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}.")
    shape = (grad_outputs.shape[-1], inputs.shape[-1])
    _check_result("out", out, shape, (torch.float32, torch.float64))
    if weight_grad is not None:
        half = (torch.bfloat16, torch.float16) if out.dtype == torch.float32 else ()
        _check_result("weight_grad", weight_grad, shape, (out.dtype, *half))
    for name, tensor in (("inputs", inputs), ("grad_outputs", grad_outputs)):
        if tensor.dtype == torch.float64 and out.dtype != torch.float64:
            raise ValueError(f"out must be float64 where {name} is float64, not {out.dtype}.")
    others = {"out": out, "grad_outputs": grad_outputs}
    others |= {} if weight_grad is None else {"weight_grad": weight_grad}
    others |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    for name, tensor in others.items():
        if tensor.device != inputs.device:
            raise ValueError(f"{name} is on {tensor.device}, but inputs is on {inputs.device}.")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, len(inputs))


def _check_result(
    name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        names = " or ".join(map(dtype_name, dtypes))
        raise ValueError(f"{name} must be {names}, not {tensor.dtype}.")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}.")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), shape, strict=True)):
        raise ValueError(f"{name} must not be expanded: its elements share memory.")
    if tensor.is_neg():
        raise ValueError(
            f"{name} is written and must not be lazily negated: pass {name}.resolve_neg()."
        )


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be [N + 1], not {list(cu_seqlens.shape)}.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}.")
    if cu_seqlens.device.type == "cuda":  # reading the values would make the host wait
        return
    ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if ends != (0, rows) or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {rows} rows of inputs, not {cu_seqlens.tolist()}."
        )
