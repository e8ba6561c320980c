"""The kernels that `gram_triton` launches: sums of products in float64, over tables of arrays."""
# Triton reads this file: constants of a kernel are in capitals, tuples grow by `+`.
# ruff: noqa: N803, N806, RUF005, SIM108
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# The words of a tensor in the table.
ROWS = tl.constexpr(0)  # the address of its first row
GRAD = tl.constexpr(1)  # the address of its gradient
STRIDE = tl.constexpr(2)  # elements from row to row
NUMEL = tl.constexpr(3)
FIRST = tl.constexpr(4)  # its first chunk
CHUNKS = tl.constexpr(5)  # how many it has
SLOT = tl.constexpr(6)  # its place in the output
COEFFICIENTS = tl.constexpr(7)  # its row of coefficients
WORDS = tl.constexpr(8)


@triton.jit
def _open(
    table,  # [tensors, WORDS] int64
    owners,  # [chunks] int64: the tensor of each chunk
    chunk,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Read a chunk's tensor: its entry, arrays and row stride, where the chunk begins and ends."""
    entry = table + tl.load(owners + chunk) * WORDS
    rows = tl.load(entry + ROWS).to(tl.pointer_type(ROW))
    grad = tl.load(entry + GRAD).to(tl.pointer_type(GRADIENT))
    stride = tl.load(entry + STRIDE)
    begin = (chunk - tl.load(entry + FIRST)) * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(entry + NUMEL))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
        grad = tl.multiple_of(grad, 16)
        stride = tl.multiple_of(stride, 8)
        end = tl.multiple_of(end, 8)
    return entry, rows, grad, stride, begin, end


@triton.jit
def _load_parts(array, index, inside, PER_SUM: tl.constexpr):
    """Load neighbours in memory as PER_SUM blocks, so that a thread adds them to one sum."""
    parts = (tl.load(array + index, inside, other=0.0),)
    if PER_SUM == 2:
        pairs = tl.reshape(parts[0], [parts[0].shape[0] // 2, 2])
        parts = tl.split(pairs)
    wide = ()
    for part in tl.static_range(PER_SUM):
        wide = wide + (parts[part].to(tl.float64),)
    return wide


@triton.jit
def pairs_kernel(
    table,
    owners,
    partial,  # [chunks, M, M] float64, of which column <= row is written
    M: tl.constexpr,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_SUM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum all products of few rows: each thread keeps a sum for every pair."""
    chunk = tl.program_id(0).to(tl.int64)
    _, rows, grad, stride, begin, end = _open(table, owners, chunk, ROW, GRADIENT, CHUNK, ALIGNED)
    sums = ()
    for _ in tl.static_range(M * (M + 1) // 2):
        sums = sums + (tl.zeros([BLOCK // PER_SUM], tl.float64),)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        x = ()
        for k in tl.static_range(M - 1):
            x = x + (_load_parts(rows + k * stride, index, inside, PER_SUM),)
        x = x + (_load_parts(grad, index, inside, PER_SUM),)
        more = ()
        for r in tl.static_range(M):
            for c in tl.static_range(r + 1):
                s = sums[r * (r + 1) // 2 + c]
                for part in tl.static_range(PER_SUM):
                    s += x[r][part] * x[c][part]
                more = more + (s,)
        sums = more
    place = partial + chunk * (M * M)
    for r in tl.static_range(M):
        for c in tl.static_range(r + 1):
            tl.store(place + (r * M + c), tl.sum(sums[r * (r + 1) // 2 + c]))


@triton.jit
def _load_rows(rows, grad, stride, k, t, index, end):
    """Load the numbers at `index` of the rows k, of which row t is the gradient."""
    k = k.to(tl.int64)[:, None]
    inside = (index < end)[None, :]
    x = tl.load(rows + k * stride + index[None, :], inside & (k < t), other=0.0)
    g = tl.load(grad + 0 * k + index[None, :], inside & (k == t), other=0.0)
    return tl.where(k == t, g.to(tl.float64), x.to(tl.float64))


@triton.jit
def tiles_kernel(
    table,
    owners,
    partial,  # [chunks, t + 1, t + 1] float64, of which column <= row is written
    t,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum all products of many rows, in TILES x TILES tiles, on the tensor cores for float64."""
    chunk = tl.program_id(0).to(tl.int64) // (TILES * TILES)
    tile = tl.program_id(0) % (TILES * TILES)
    if tile % TILES > tile // TILES:
        return
    _, rows, grad, stride, begin, end = _open(table, owners, chunk, ROW, GRADIENT, CHUNK, ALIGNED)
    r = tile // TILES * TILE + tl.arange(0, TILE)
    c = tile % TILES * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE, TILE], tl.float64)
    index = begin + tl.arange(0, BLOCK)
    if ROW.primitive_bitwidth == 16 or GRADIENT.primitive_bitwidth == 16:
        # Triton 3.6 fails on a float64 product of what was loaded in 16 bits. It does not see that
        # of numbers which one turn of the loop hands to the next.
        x = _load_rows(rows, grad, stride, r, t, index, end)
        y = _load_rows(rows, grad, stride, c, t, index, end)
        for _ in range(begin, end, BLOCK):
            sums = tl.dot(x, tl.trans(y), sums, out_dtype=tl.float64)
            index += BLOCK
            x = _load_rows(rows, grad, stride, r, t, index, end)
            y = _load_rows(rows, grad, stride, c, t, index, end)
    else:
        for _ in tl.range(begin, end, BLOCK, num_stages=STAGES):
            x = _load_rows(rows, grad, stride, r, t, index, end)
            if TILES == 1:
                y = x
            else:
                y = _load_rows(rows, grad, stride, c, t, index, end)
            sums = tl.dot(x, tl.trans(y), sums, out_dtype=tl.float64)
            index += BLOCK
    m = t + 1
    place = partial + chunk * m * m + r[:, None] * m + c[None, :]
    tl.store(place, sums, (r[:, None] < m) & (c[None, :] <= r[:, None]))


@triton.jit
def dots_kernel(
    table,
    owners,
    partial,  # [chunks, t + 1] float64
    t,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the products of all rows, in TILES tiles, with the gradient."""
    chunk = tl.program_id(0).to(tl.int64) // TILES
    _, rows, grad, stride, begin, end = _open(table, owners, chunk, ROW, GRADIENT, CHUNK, ALIGNED)
    k = tl.program_id(0) % TILES * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE, BLOCK], tl.float64)
    for first in tl.range(begin, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        g = tl.load(grad + index[None, :], (index < end)[None, :], other=0.0).to(tl.float64)
        sums += _load_rows(rows, grad, stride, k, t, index, end) * g
    place = partial + chunk * (t + 1) + k
    tl.store(place, tl.sum(sums, 1), k <= t)


@triton.jit
def total_kernel(
    table,
    partial,  # [chunks, entries] float64
    out,  # [n, entries] float64
    m,
    entries,  # m * m, of which column <= row is there, or m
    MATRIX: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the chunks of each tensor, in their order; fill the other half of a matrix."""
    entry = table + tl.program_id(0).to(tl.int64) * WORDS
    first = tl.load(entry + FIRST)
    count = tl.load(entry + CHUNKS)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // m, place % m
    there = place < entries
    if MATRIX:
        there = there & (column <= row)
    sums = tl.zeros([CHUNKS_AT_ONCE, BLOCK], tl.float64)
    for begin in tl.range(0, count, CHUNKS_AT_ONCE):
        chunk = begin + tl.arange(0, CHUNKS_AT_ONCE)
        source = partial + (first + chunk)[:, None] * entries + place[None, :]
        sums += tl.load(source, (chunk < count)[:, None] & there[None, :], other=0.0)
    result = tl.sum(sums, 0)
    matrix = out + tl.load(entry + SLOT) * entries
    tl.store(matrix + place, result, there)
    if MATRIX:
        tl.store(matrix + column * m + row, result, there)


@triton.jit
def combine_kernel(
    table,
    owners,
    coefficients,  # [B, t] float64
    t,
    ROW: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
):
    """Add sum_k v_k G_k to g. Rows with v_k = 0 are not read, nor is a gradient with no others."""
    PARTS: tl.constexpr = CHUNK // BLOCK
    chunk = tl.program_id(0).to(tl.int64) // PARTS
    entry, rows, grad, stride, begin, end = _open(
        table, owners, chunk, ROW, GRADIENT, CHUNK, ALIGNED
    )
    begin += tl.program_id(0) % PARTS * BLOCK
    if begin >= end:
        return
    v = coefficients + tl.load(entry + COEFFICIENTS) * t
    active = 0
    for first in tl.range(0, t, ROWS_AT_ONCE):
        k = first + tl.arange(0, ROWS_AT_ONCE)
        active += tl.sum((tl.load(v + k, k < t, other=0.0) != 0.0).to(tl.int32))
    if active == 0:
        return
    index = begin + tl.arange(0, BLOCK)
    inside = index < end
    g = tl.load(grad + index, inside, other=0.0).to(tl.float64)
    for k in tl.range(0, t):
        factor = tl.load(v + k)
        if factor != 0.0:
            g += factor * tl.load(rows + k * stride + index, inside, other=0.0).to(tl.float64)
    if GRADIENT.primitive_bitwidth == 16:
        g = g.to(tl.float32)  # as on the CPU; there is no instruction that skips it
    tl.store(grad + index, g.to(GRADIENT), inside)
