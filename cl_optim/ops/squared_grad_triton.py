"""The sum of squared per-sample gradients on a GPU: a Triton kernel, and the choice of its tiles.

Importing this module imports Triton; :mod:`cl_optim.ops.squared_grad` does so on first use.

A program owns a tile of the result and goes through the tokens, block by block, in one loop that
does not stop between samples: the next sample's loads are under way while the last one is squared.
The product of a sample never leaves the registers. A tile of 128 × 128 with 8 warps takes 64 of a
thread's 255 registers, and there are three such tiles: the product, Σ g² and Σ g.

Tiles are dealt in waves, one to each multiprocessor. Where the last wave is not full, several
programs share a tile of it and take different samples (squares add; the tokens of one sample must
never be split). They leave partial sums in a workspace, and a second kernel adds these in a fixed
order. There are no atomic operations: a GPU gives the same bits for the same call.
"""

# Triton's arguments have no annotation but constexpr, and names of those are capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# ruff: noqa: N803

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Precision = Literal["half", "tf32", "ieee"]


@dataclass(frozen=True)
class Config:
    """A tile of the result, and how it is computed.

    Attributes:
        block_out: Rows of the tile.
        block_in: Columns of the tile.
        block_tokens: Tokens multiplied at once.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        descriptors: Whether to load through tensor descriptors (compute capability 9 or later).
    """

    block_out: int
    block_in: int
    block_tokens: int
    warps: int
    stages: int
    descriptors: bool = False


_LARGE = Config(128, 128, 64, warps=8, stages=4)
_LARGE_DESCRIPTORS = Config(128, 128, 64, warps=8, stages=4, descriptors=True)
_LARGE_SHORT = Config(128, 128, 32, warps=8, stages=4)
_NARROW_IN = Config(128, 64, 64, warps=8, stages=4)
_NARROW_OUT = Config(64, 128, 64, warps=8, stages=4)
_SMALL = Config(64, 64, 64, warps=4, stages=4)
_LARGE_TF32 = Config(128, 128, 32, warps=8, stages=3)
_SMALL_TF32 = Config(64, 64, 32, warps=4, stages=3)
_IEEE = Config(64, 64, 32, warps=4, stages=3)

# What is summed: a result of more than 64 rows and columns, of samples of any length, of at least
# 512 tokens through tensor descriptors, of at most 32, or packed; or one that is narrow.
Kind = Literal["wide", "long", "short", "packed", "narrow out", "narrow in", "narrow"]


class Choice(NamedTuple):
    """A configuration, and how fast it is estimated to be.

    Attributes:
        config: The configuration.
        percent: From and to, of the rate of cuBLAS's product dW: estimated, not measured. From
            samples of 128 tokens to 512 and more; "short": of 16 to 32.
    """

    config: Config
    percent: tuple[int, int]


# The choice by compute capability and precision.
#
# A tile of m × n does 2mn FLOPs a token for 2(m + n) bytes of bfloat16: 64 FLOPs a byte for
# 128 × 128, 43 for 128 × 64, 32 for 64 × 64 (half of it for float32). So the largest one is taken
# where the result fills it: 8 warps, with three tiles of sums in their registers, one program a
# multiprocessor. A trial kernel with this tile reached 73 to 85 % of cuBLAS on an H100. The other
# figures scale that by the squares of each sample, which no product hides: about 400 clocks a tile,
# where its products take 15 a token on an A100, 7.5 on an H100 and 4 on a B200.
#
# On 8.0 the factors of a product pass through registers, too: for packed sequences, whose bounds
# the loop keeps as well, 32 tokens at once fit, for the same FLOPs a byte, and 64 spill. From 9.0
# on, products of TF32 want both factors transposed, which Triton copies 4 bytes at a time.
TABLE: dict[tuple[int, Precision], dict[Kind, Choice]] = {
    (80, "half"): {
        "wide": Choice(_LARGE, (65, 85)),
        "short": Choice(_LARGE_SHORT, (25, 50)),
        "packed": Choice(_LARGE_SHORT, (60, 85)),
        "narrow out": Choice(_NARROW_OUT, (50, 80)),
        "narrow in": Choice(_NARROW_IN, (50, 80)),
        "narrow": Choice(_SMALL, (40, 75)),
    },
    (90, "half"): {
        "wide": Choice(_LARGE, (60, 87)),
        "long": Choice(_LARGE_DESCRIPTORS, (80, 88)),
        "short": Choice(_LARGE_SHORT, (15, 40)),
        "packed": Choice(_LARGE, (55, 85)),
        "narrow out": Choice(_NARROW_OUT, (45, 80)),
        "narrow in": Choice(_NARROW_IN, (45, 80)),
        "narrow": Choice(_SMALL, (35, 75)),
    },
    (100, "half"): {
        "wide": Choice(_LARGE, (45, 75)),
        "long": Choice(_LARGE_DESCRIPTORS, (65, 80)),
        "short": Choice(_LARGE_SHORT, (10, 25)),
        "packed": Choice(_LARGE, (40, 75)),
        "narrow out": Choice(_NARROW_OUT, (35, 70)),
        "narrow in": Choice(_NARROW_IN, (35, 70)),
        "narrow": Choice(_SMALL, (30, 65)),
    },
    (80, "tf32"): {"wide": Choice(_LARGE_TF32, (65, 85)), "narrow": Choice(_SMALL_TF32, (40, 75))},
    (90, "tf32"): {"wide": Choice(_LARGE_TF32, (40, 75)), "narrow": Choice(_SMALL_TF32, (30, 60))},
    (100, "tf32"): {"wide": Choice(_LARGE_TF32, (30, 65)), "narrow": Choice(_SMALL_TF32, (25, 55))},
    (80, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
    (90, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
    (100, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
}

# The row of the table by compute capability, without what follows the point. Others take that of
# 8.0, which needs nothing that they lack: 12 has neither 9's products nor 10's, and less memory.
_ROWS = {8: 80, 9: 90, 10: 100, 11: 100}

# With less shared memory; bench/gpu/squared_grad.py times these, too.
_CANDIDATES: dict[Precision, tuple[Config, ...]] = {
    "half": (
        Config(128, 128, 64, warps=8, stages=3),
        Config(128, 128, 64, warps=8, stages=3, descriptors=True),
    ),
    "tf32": (),
    "ieee": (),
}

# All that tests compile and bench/gpu/squared_grad.py times; `choose` takes one from the table.
CONFIGS: dict[Precision, tuple[Config, ...]] = {
    precision: tuple(
        dict.fromkeys(
            choice.config
            for (_, of_row), row in TABLE.items()
            if of_row == precision
            for choice in row.values()
        )
    )
    + candidates
    for precision, candidates in _CANDIDATES.items()
}

_DESCRIPTOR_TOKENS = 512  # of a sample; a trial kernel gained nothing with fewer
_SHARE_BLOCKS = 8  # blocks of tokens for which a program of its own is worth a partial sum
_TILE_GROUP = tl.constexpr(8)  # rows of tiles that run together and share the second-level cache
_SEQUENCE_CHUNK = tl.constexpr(1024)  # lengths of sequences read at once
_REDUCE_ROWS = 16
_COLUMNS_AT_ONCE = tl.constexpr(32)  # of a tile that is added to the result
# Said outright, since leaving it to Triton 3.9 draws a warning about what 3.10 will do.
_FUSION = {"enable_fp_fusion": True}


def choose(
    precision: Precision,
    out_features: int,
    in_features: int,
    tokens: int | None,
    *,
    capability: int,
    descriptors: bool,
) -> Config:
    """The configuration for a shape, from ``TABLE``.

    Args:
        precision: ``"half"`` for bfloat16 and float16; for float32 what the products may do.
        out_features: Rows of the result.
        in_features: Columns of the result.
        tokens: Tokens per sample; ``None`` for packed sequences.
        capability: The GPU's compute capability, without what follows the point.
        descriptors: Whether GPU and tensors allow tensor descriptors.
    """
    kinds: list[Kind] = ["wide"]  # the most particular one last
    if tokens is None:
        kinds.append("packed")
    elif tokens <= _LARGE_SHORT.block_tokens:
        kinds.append("short")
    elif descriptors and tokens >= _DESCRIPTOR_TOKENS:
        kinds.append("long")
    narrow_out, narrow_in = out_features <= 64, in_features <= 64
    if narrow_out or narrow_in:
        kinds.append("narrow")
    if narrow_out != narrow_in:
        kinds.append("narrow out" if narrow_out else "narrow in")
    row = TABLE[_ROWS.get(capability, 80), precision]
    return next(row[kind] for kind in reversed(kinds) if kind in row).config


@dataclass(frozen=True)
class Schedule:
    """Which program computes what.

    Attributes:
        whole: Tiles with a program of their own; the first programs take them.
        shared: Tiles that come after, each computed by ``shares`` programs.
        shares: Programs per shared tile.
    """

    whole: int
    shared: int
    shares: int

    @property
    def programs(self) -> int:
        """Programs to launch."""
        return self.whole + self.shared * self.shares


def schedule(tiles: int, samples: int, blocks: int, processors: int) -> Schedule:
    """Fill the last wave of programs by sharing its tiles, where that pays.

    Args:
        tiles: Tiles of the result.
        samples: Samples; a share is at least one.
        blocks: Blocks of tokens in all samples.
        processors: Multiprocessors of the GPU; each runs one program at a time.
    """
    shared = tiles % processors
    if shared == 0:
        return Schedule(tiles, 0, 1)
    shares = min(processors // shared, samples, blocks // _SHARE_BLOCKS)
    if shares < 2:
        return Schedule(tiles, 0, 1)
    return Schedule(tiles - shared, shared, shares)


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
    """The kernel for :func:`cl_optim.ops.squared_grad.squared_grad_sum_`, which checks arguments.

    Args:
        out: [out, in], float32.
        inputs: [N, T, in], or packed [ΣT, in]; bfloat16, float16 or float32.
        grad_outputs: [N, T, out] or [ΣT, out]; of the dtype of ``inputs``.
        weight_grad: [out, in], float32, bfloat16 or float16.
        cu_seqlens: [N + 1], int32 or int64, for packed sequences.
        config: Instead of the one that :func:`choose` gives.
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
    with torch.cuda.device_of(out):
        _accumulate[(plan.programs,)](
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
            _reduce[(plan.shared, config.block_out // _REDUCE_ROWS)](
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
                ROWS=_REDUCE_ROWS,
                **_FUSION,
            )
    return out


def _in_rows(out: Tensor, weight_grad: Tensor | None) -> bool:
    """Whether neighbours in a row of the results are neighbours in memory, as the kernel needs it.

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
    """What Triton's compiler is told beside the arguments."""
    return {"num_warps": config.warps, "num_stages": config.stages, **_FUSION}


def _precision(dtype: torch.dtype) -> Precision:
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter, which loads no tensor descriptors
        return 8
    return torch.cuda.get_device_capability(device)[0]


def _with_aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose rows start and end at multiples of 16 bytes.

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
    """Strides of samples and tokens, and the number of features, each in units of 16 bytes."""
    vector = 16 // tensor.element_size()
    return tuple(size // vector for size in (*tensor.stride()[:-1], tensor.shape[-1]))


@triton.jit
def _tile(index, out_features, in_features, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """The first row and column of a tile; neighbours in order are neighbours in the matrix."""
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tiles_in = tl.cdiv(in_features, BLOCK_IN)
    group = index // (_TILE_GROUP * tiles_in)
    within = index % (_TILE_GROUP * tiles_in)
    height = tl.minimum(tiles_out - group * _TILE_GROUP, _TILE_GROUP)
    row = group * _TILE_GROUP + within % height
    return row * BLOCK_OUT, (within // height) * BLOCK_IN


@triton.jit
def _rows(sample, samples, tokens, cu_seqlens):
    """The first row of a sample and the one after its last, inside the tensor in any case."""
    if cu_seqlens is None:
        first = tl.zeros_like(sample)
        end = first + tokens
    else:
        exists = sample < samples
        first = tl.load(cu_seqlens + sample, mask=exists, other=0).to(tl.int32)
        end = tl.load(cu_seqlens + sample + 1, mask=exists, other=0).to(tl.int32)
        first = tl.minimum(tl.maximum(first, 0), tokens)
        end = tl.minimum(tl.maximum(end, 0), tokens)
    return first, end


@triton.jit
def _share(share, shares, samples, tokens, cu_seqlens, BLOCK_TOKENS: tl.constexpr):
    """The first sample of a share, and the blocks of tokens in it.

    Packed sequences are shared out by their number of tokens: those that start in a share's part
    of the rows belong to it. An empty sequence counts as a block, which is masked.
    """
    share = share.to(tl.int64)
    if cu_seqlens is None:
        sample = (share * samples // shares).to(tl.int32)
        after = ((share + 1) * samples // shares).to(tl.int32)
        blocks = (after - sample) * tl.cdiv(tokens, BLOCK_TOKENS)
    else:
        low = (share * tokens // shares).to(tl.int32)
        high = ((share + 1) * tokens // shares).to(tl.int32)
        sample = tl.zeros_like(low)
        blocks = tl.zeros_like(low)
        for chunk in range(0, samples, _SEQUENCE_CHUNK):
            index = chunk + tl.arange(0, _SEQUENCE_CHUNK)
            first, end = _rows(index, samples, tokens, cu_seqlens)
            before = (index < samples) & (first < low)
            mine = (index < samples) & (first >= low) & (first < high)
            count = tl.maximum(tl.cdiv(end - first, BLOCK_TOKENS), 1)
            sample += tl.sum(before.to(tl.int32))
            blocks += tl.sum(tl.where(mine, count, 0))
    return sample, blocks


@triton.jit
def _add_to(matrix, stride, first_row, first_column, out_features, in_features, values):
    """Add a tile to a matrix of rows, in float32, rounded once.

    A few columns at a time: the addresses of a whole tile, and what lies there, would not fit into
    the registers beside the sums.
    """
    if values.shape[1] > _COLUMNS_AT_ONCE:
        halves = values.reshape(values.shape[0], 2, values.shape[1] // 2).permute(0, 2, 1)
        left, right = halves.split()
        middle = first_column + left.shape[1]
        _add_to(matrix, stride, first_row, first_column, out_features, in_features, left)
        _add_to(matrix, stride, first_row, middle, out_features, in_features, right)
    else:
        row = tl.arange(0, values.shape[0])[:, None]
        column = tl.arange(0, values.shape[1])[None, :]
        inside = (row < out_features - first_row) & (column < in_features - first_column)
        place = matrix + (first_row.to(tl.int64) * stride + first_column)
        place += row.to(tl.int64) * stride + column
        total = tl.load(place, mask=inside).to(tl.float32) + values
        tl.store(place, total.to(matrix.dtype.element_ty), mask=inside)


# Sizes that change from batch to batch must not make Triton compile a kernel for each.
_VARYING = (
    "samples",
    "tokens",
    "inputs_sample_vectors",
    "inputs_token_vectors",
    "inputs_vectors",
    "grads_sample_vectors",
    "grads_token_vectors",
    "grads_vectors",
    "whole",
    "shares",
)


@triton.jit(do_not_specialize=_VARYING)
def _accumulate(
    out,
    weight_grad,
    inputs,
    grad_outputs,
    cu_seqlens,
    workspace,
    samples,
    tokens,
    out_features,
    in_features,
    inputs_sample_vectors,
    inputs_token_vectors,
    inputs_vectors,
    grads_sample_vectors,
    grads_token_vectors,
    grads_vectors,
    out_stride,
    weight_grad_stride,
    whole,
    shares,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    partial = program - whole  # which of the partial sums, if not negative
    is_whole = partial < 0
    tile = tl.where(is_whole, program, whole + partial // shares)
    share = tl.where(is_whole, 0, partial % shares)
    first_row, first_column = _tile(tile, out_features, in_features, BLOCK_OUT, BLOCK_IN)
    sample, blocks = _share(
        share, tl.where(is_whole, 1, shares), samples, tokens, cu_seqlens, BLOCK_TOKENS
    )

    rows = first_row + tl.arange(0, BLOCK_OUT)[:, None]
    columns = first_column + tl.arange(0, BLOCK_IN)[None, :]
    token = tl.arange(0, BLOCK_TOKENS)
    if not DESCRIPTORS:
        # Strides and widths come in vectors of 16 bytes, so that the compiler knows that they are
        # multiples of one: a thread loads 16 bytes or nothing.
        vector: tl.constexpr = 128 // inputs.dtype.element_ty.primitive_bitwidth
        in_columns = columns < inputs_vectors * vector
        in_rows = rows < grads_vectors * vector
        # b is loaded transposed, as the product wants it: transposing it after the load cost the
        # pipeline on compute capability 8.
        long = token.to(tl.int64)
        a_block = long[:, None] * (inputs_token_vectors.to(tl.int64) * vector) + columns
        b_block = long[None, :] * (grads_token_vectors.to(tl.int64) * vector) + rows

    product = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    squares = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    grad = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    first, end = _rows(sample, samples, tokens, cu_seqlens)
    for _ in range(blocks):
        if DESCRIPTORS:  # reads zeros past a sample's end and past the last column
            a = inputs.load([sample, first, first_column]).reshape(BLOCK_TOKENS, BLOCK_IN)
            b = grad_outputs.load([sample, first, first_row]).reshape(BLOCK_TOKENS, BLOCK_OUT).T
        else:
            in_sample = token < end - first
            sample_long, first_long = sample.to(tl.int64), first.to(tl.int64)
            a_start = sample_long * inputs_sample_vectors + first_long * inputs_token_vectors
            b_start = sample_long * grads_sample_vectors + first_long * grads_token_vectors
            # Both are masked, since 0 · NaN from a neighbouring sample would be NaN.
            a_mask, b_mask = in_sample[:, None] & in_columns, in_sample[None, :] & in_rows
            a = tl.load(inputs + (a_start * vector + a_block), mask=a_mask, other=0.0)
            b = tl.load(grad_outputs + (b_start * vector + b_block), mask=b_mask, other=0.0)
        product = tl.dot(b, a, product, input_precision=PRECISION)
        first += BLOCK_TOKENS
        is_last = first >= end
        if is_last:
            squares += product * product
            if weight_grad is not None:
                grad += product
            product = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        sample = tl.where(is_last, sample + 1, sample)
        next_first, next_end = _rows(sample, samples, tokens, cu_seqlens)
        first = tl.where(is_last, next_first, first)
        end = tl.where(is_last, next_end, end)

    if is_whole:
        _add_to(out, out_stride, first_row, first_column, out_features, in_features, squares)
        if weight_grad is not None:
            _add_to(
                weight_grad, weight_grad_stride,
                first_row, first_column, out_features, in_features, grad,
            )  # fmt: skip
    elif workspace is not None:
        results: tl.constexpr = 1 if weight_grad is None else 2
        place = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, :]
        slot = workspace + partial.to(tl.int64) * (results * BLOCK_OUT * BLOCK_IN)
        tl.store(slot + place, squares)
        if weight_grad is not None:
            tl.store(slot + BLOCK_OUT * BLOCK_IN + place, grad)


@triton.jit(do_not_specialize=("whole", "shares"))
def _reduce(
    out,
    weight_grad,
    workspace,
    out_features,
    in_features,
    out_stride,
    weight_grad_stride,
    whole,
    shares,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the partial sums of a shared tile, a few rows of it, in the order of the shares."""
    shared, part = tl.program_id(0), tl.program_id(1)
    first_row, first_column = _tile(whole + shared, out_features, in_features, BLOCK_OUT, BLOCK_IN)
    row = part * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_IN)[None, :]
    results: tl.constexpr = 1 if weight_grad is None else 2
    slot = workspace + (shared * shares).to(tl.int64) * (results * BLOCK_OUT * BLOCK_IN)
    place = row * BLOCK_IN + column
    squares = tl.zeros((ROWS, BLOCK_IN), dtype=tl.float32)
    grad = tl.zeros((ROWS, BLOCK_IN), dtype=tl.float32)
    for _ in range(shares):
        squares += tl.load(slot + place)
        if weight_grad is not None:
            grad += tl.load(slot + BLOCK_OUT * BLOCK_IN + place)
        slot += results * BLOCK_OUT * BLOCK_IN
    first_row += part * ROWS
    _add_to(out, out_stride, first_row, first_column, out_features, in_features, squares)
    if weight_grad is not None:
        _add_to(
            weight_grad, weight_grad_stride,
            first_row, first_column, out_features, in_features, grad,
        )  # fmt: skip
