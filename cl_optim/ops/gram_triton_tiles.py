"""The tiles of `gram_triton`: what its kernels are compiled for, by dtypes and number of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Elements whose products make one partial sum, for memories of up to 64 rows.
CHUNK = 2**15
# With more rows than these, the gradient included, the sums of all pairs exceed the registers.
MAX_PAIRED = 12

# Before 3.8, Triton fails on float64 products of 64 rows on sm_100: it takes them for ones that the
# new tensor cores can do.
_LARGEST_TILE = 64 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 32

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Group(NamedTuple):
    """What one launch serves: tensors of the same dtypes and alignment."""

    row: torch.dtype
    grad: torch.dtype
    aligned: bool  # in addresses, row stride and size, so that 16 bytes may be read at once

    def constants(self, m: int) -> dict[str, Any]:
        """Return what most kernels are compiled for; m is how many rows there are, with g."""
        return {
            "ROW": _TYPES[self.row],
            "GRADIENT": _TYPES[self.grad],
            "ALIGNED": self.aligned,
            "CHUNK": chunk_size(m),
        }


def chunk_size(m: int) -> int:
    """Return the elements per chunk. Its sums are a matrix: with more rows there are fewer."""
    return CHUNK * -(-m // 64)


def pairs_constants(group: Group, m: int) -> dict[str, Any]:
    """Tell `pairs_kernel`: 128 threads with a sum for each pair, or more where pairs are few."""
    # Loads go ahead of time, through shared memory, if a thread's part has 4 bytes at least.
    narrow = min(group.row.itemsize, group.grad.itemsize) < 4
    per_sum = 2 if narrow and group.aligned else 1
    columns = 128 * (4 if m <= 4 else 2 if m <= 6 else 1)
    kernel = {"M": m, "BLOCK": columns * per_sum, "PER_SUM": per_sum, "STAGES": 4}
    return {**group.constants(m), **kernel}


def tiles_constants(group: Group, m: int) -> dict[str, Any]:
    """Tell `tiles_kernel`: one tile for as many rows as the largest has: they are read once."""
    tile = 16 if m <= 16 else 32 if m <= 32 else _LARGEST_TILE
    block = 64 if tile <= 32 else 32
    if max(group.row.itemsize, group.grad.itemsize) == 8:
        block //= 2
    # Addresses of single elements, for three blocks ahead, spill on compute capability 8.
    stages = 3 if group.aligned or tile < 64 else 2
    kernel = {"TILES": triton.cdiv(m, tile), "TILE": tile, "BLOCK": block, "STAGES": stages}
    return {**group.constants(m), **kernel}


def dots_constants(group: Group, m: int) -> dict[str, Any]:
    """Tell `dots_kernel`: a single tile for up to 16 rows, so that g is read once, too."""
    tile = 8 if m <= 8 else 16
    kernel = {"TILES": triton.cdiv(m, tile), "TILE": tile, "BLOCK": 2048 // tile}
    return {**group.constants(m), **kernel}


def combine_constants(group: Group, m: int) -> dict[str, Any]:
    """Tell `combine_kernel` what it is compiled for."""
    return {**group.constants(m), "BLOCK": 1024, "ROWS_AT_ONCE": 128}


def total_constants(matrix: bool) -> dict[str, Any]:
    """Tell `total_kernel` what it is compiled for."""
    return {"MATRIX": matrix, "CHUNKS_AT_ONCE": 64, "BLOCK": 32}
