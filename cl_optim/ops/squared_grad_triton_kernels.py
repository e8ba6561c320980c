"""The kernels that `squared_grad_triton` launches: sums of squared products, tile by tile.

A program owns a tile of the result and goes through the tokens, block by block, in one loop that
does not stop between samples: the next sample's loads are under way while the last one is squared.
The product of a sample never leaves the registers. A tile of 128 × 128 with 8 warps takes 64 of a
thread's 255 registers, and there are three such tiles: the product, Σ g² and Σ g.

Programs that share a tile leave partial sums in a workspace, and a second kernel adds these in a
fixed order.
"""
# Triton's arguments have no annotation but constexpr, and names of those are capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

_TILE_GROUP = tl.constexpr(8)  # rows of tiles that run together and share the second-level cache
_SEQUENCE_CHUNK = tl.constexpr(1024)  # lengths of sequences read at once
_COLUMNS_AT_ONCE = tl.constexpr(32)  # of a tile that is added to the result


@triton.jit
def _tile(index, out_features, in_features, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """Find the first row and column of a tile; neighbours in order are neighbours in the matrix."""
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tiles_in = tl.cdiv(in_features, BLOCK_IN)
    group = index // (_TILE_GROUP * tiles_in)
    within = index % (_TILE_GROUP * tiles_in)
    height = tl.minimum(tiles_out - group * _TILE_GROUP, _TILE_GROUP)
    row = group * _TILE_GROUP + within % height
    return row * BLOCK_OUT, (within // height) * BLOCK_IN


@triton.jit
def _rows(sample, samples, tokens, cu_seqlens):
    """Find the first row of a sample and the one after its last, in any case in the tensor."""
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
    """Find the first sample of a share, and the blocks of tokens in it.

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
def accumulate_kernel(
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
    """Sum the squares of a tile, or of a share of its samples."""
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
def reduce_kernel(
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
