"""The sum of squared per-sample gradients on a GPU, in Triton: the launch.

Importing this module imports Triton; :mod:`cl_optim.ops.squared_grad` does so on first use. There
are no atomic operations: a GPU gives the same bits for the same call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cl_optim.ops import squared_grad_triton_kernels as kernels
from cl_optim.ops.squared_grad_triton_tiles import Config, Precision, choose, schedule

REDUCE_ROWS = 16  # of a shared tile, which one program adds up
# Said outright, since leaving it to Triton 3.9 draws a warning about what 3.10 will do.
FUSION = {"enable_fp_fusion": True}


def squared_grad_sum_(
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    config: Config | None = None,
    processors: int | None = None,
) -> Tensor:
    """Compute :func:`cl_optim.ops.squared_grad.squared_grad_sum_`, which checks arguments.

    Args:
        out: [out, in], float32.
        inputs: [N, T, in], or packed [ΣT, in]; bfloat16, float16 or float32.
        grad_outputs: [N, T, out] or [ΣT, out]; of the dtype of ``inputs``.
        weight_grad: [out, in], float32, bfloat16 or float16.
        cu_seqlens: [N + 1], int32 or int64, for packed sequences.
        config: Instead of the one that `squared_grad_triton_tiles.choose` gives.
        processors: Instead of the GPU's number of multiprocessors.

    Returns:
        ``out``.
    """
    if inputs.numel() == 0 or grad_outputs.numel() == 0:
        return out
    if not _in_rows(out, weight_grad):
        sum_ = functools.partial(
            squared_grad_sum_, cu_seqlens=cu_seqlens, config=config, processors=processors
        )
        return _sum_in_rows_(sum_, out, inputs, grad_outputs, weight_grad)
    rows, tokens = inputs.shape[:-1].numel(), inputs.shape[-2]
    if rows >= 2**31:
        raise ValueError(f"inputs must have fewer than 2**31 rows on a GPU, not {rows}.")
    out_features, in_features = out.shape
    inputs, grad_outputs = _with_aligned_rows(inputs), _with_aligned_rows(grad_outputs)
    a_vectors, b_vectors = _in_vectors(inputs), _in_vectors(grad_outputs)
    if cu_seqlens is None:
        samples, tokens_of_each = len(inputs), tokens
    else:
        cu_seqlens = cu_seqlens.contiguous()
        samples, tokens_of_each = len(cu_seqlens) - 1, None
        # A row's place does not depend on its sample.
        a_vectors, b_vectors = (0, *a_vectors), (0, *b_vectors)
    precision = _precision(inputs.dtype)
    if config is None:
        capability = _capability(inputs.device)
        descriptors = capability >= 9 and cu_seqlens is None and min(*a_vectors, *b_vectors) > 0
        config = choose(
            precision,
            out_features,
            in_features,
            tokens_of_each,
            capability=capability,
            descriptors=descriptors,
        )
    if processors is None:
        properties = torch.cuda.get_device_properties(inputs.device)
        processors = int(properties.multi_processor_count)

    tiles = triton.cdiv(out_features, config.block_out) * triton.cdiv(in_features, config.block_in)
    if tokens_of_each is None:
        blocks = triton.cdiv(tokens, config.block_tokens)
    else:
        blocks = samples * triton.cdiv(tokens, config.block_tokens)
    plan = schedule(tiles, samples, blocks, processors)
    results = 1 if weight_grad is None else 2
    workspace = None
    if plan.shared:
        partial_sums = plan.shared * plan.shares * results
        workspace = out.new_empty(partial_sums, config.block_out, config.block_in)

    a: Tensor | TensorDescriptor = inputs
    b: Tensor | TensorDescriptor = grad_outputs
    if config.descriptors:
        a = TensorDescriptor.from_tensor(inputs, [1, config.block_tokens, config.block_in])
        b = TensorDescriptor.from_tensor(grad_outputs, [1, config.block_tokens, config.block_out])
    out_stride = out.stride(0)
    weight_grad_stride = 0 if weight_grad is None else weight_grad.stride(0)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernels.accumulate_kernel[(plan.programs,)](
            out,
            weight_grad,
            a,
            b,
            cu_seqlens,
            workspace,
            samples,
            tokens,
            out_features,
            in_features,
            *a_vectors,
            *b_vectors,
            out_stride,
            weight_grad_stride,
            plan.whole,
            plan.shares,
            BLOCK_OUT=config.block_out,
            BLOCK_IN=config.block_in,
            BLOCK_TOKENS=config.block_tokens,
            DESCRIPTORS=config.descriptors,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            **launch_options(config),
        )
        if workspace is not None:
            kernels.reduce_kernel[(plan.shared, config.block_out // REDUCE_ROWS)](
                out,
                weight_grad,
                workspace,
                out_features,
                in_features,
                out_stride,
                weight_grad_stride,
                plan.whole,
                plan.shares,
                BLOCK_OUT=config.block_out,
                BLOCK_IN=config.block_in,
                ROWS=REDUCE_ROWS,
                **FUSION,
            )
    return out


def _in_rows(out: Tensor, weight_grad: Tensor | None) -> bool:
    """Return whether a row of the results lies in one piece of memory, as the kernel needs it.

    It adds to 16 bytes at once then; addresses of single elements would fill a thread's registers.
    """
    results = (out,) if weight_grad is None else (out, weight_grad)
    return all(result.stride(1) == 1 or result.shape[1] == 1 for result in results)


def _sum_in_rows_(
    sum_: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    out: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: Tensor | None,
) -> Tensor:
    """Sum the transposes, at no cost, where these are in rows; else into new tensors, then add."""
    out_t, weight_grad_t = out.mT, None if weight_grad is None else weight_grad.mT
    if _in_rows(out_t, weight_grad_t):
        sum_(out_t, grad_outputs, inputs, weight_grad_t)
        return out
    squares = torch.zeros_like(out, memory_format=torch.contiguous_format)
    grad = None if weight_grad is None else torch.zeros_like(squares)
    out += sum_(squares, inputs, grad_outputs, grad)
    if weight_grad is not None and grad is not None:
        weight_grad += grad
    return out


def launch_options(config: Config) -> dict[str, int]:
    """Return what Triton's compiler is told beside the arguments."""
    return {"num_warps": config.warps, "num_stages": config.stages, **FUSION}


def _precision(dtype: torch.dtype) -> Precision:
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter, which loads no tensor descriptors
        return 8
    return torch.cuda.get_device_capability(device)[0]


def _with_aligned_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy whose rows start and end at multiples of 16 bytes.

    Loading odd rows element by element stops the pipeline and spills registers: a copy is far
    cheaper.
    """
    vector = 16 // tensor.element_size()
    *outer, inner = tensor.stride()
    features = tensor.shape[-1]
    starts = (tensor.data_ptr() // tensor.element_size(), features, *outer)
    if inner == 1 and all(start % vector == 0 for start in starts):
        return tensor
    width = triton.cdiv(features, vector) * vector
    copy = tensor.new_empty(*tensor.shape[:-1], width)
    copy[..., :features] = tensor
    copy[..., features:] = 0
    return copy


def _in_vectors(tensor: Tensor) -> tuple[int, ...]:
    """Return strides of samples and tokens and the number of features, in units of 16 bytes."""
    vector = 16 // tensor.element_size()
    return tuple(size // vector for size in (*tensor.stride()[:-1], tensor.shape[-1]))
