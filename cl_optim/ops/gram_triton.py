"""The Gram products on a GPU, in Triton: each row is read from memory once.

One launch serves all tensors of one pair of dtypes. Their addresses lie in a table on the device,
which is made once for the same addresses. A program sums a chunk of one tensor; a second launch
adds the chunks' sums in the order of the chunks. So the result depends neither on timing nor on
the GPU's size, and nothing waits for the GPU.

Sums are in float64. For few rows memory is the bound all the same: eleven rows need 66
multiplications per 44 bytes, a third of what an H100 does in that time. Float32 would overflow at
rows of 1e20, and could not tell nearly dependent rows apart.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_optim.ops import gram_kernels as kernels

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

# How kernels are compiled. Later Tritons do not join products and sums unless told so.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


class Group(NamedTuple):
    """What one launch serves: tensors of the same dtypes and alignment."""

    row: torch.dtype
    grad: torch.dtype
    aligned: bool  # in addresses, row stride and size, so that 16 bytes may be read at once

    def constants(self, m: int) -> dict[str, Any]:
        """What most kernels are compiled for; m is the number of rows, the gradient included."""
        return {
            "ROW": _TYPES[self.row],
            "GRADIENT": _TYPES[self.grad],
            "ALIGNED": self.aligned,
            "CHUNK": chunk_size(m),
        }


def chunk_size(m: int) -> int:
    """Elements per chunk. Its sums are a matrix: with more rows there must be fewer chunks."""
    return CHUNK * -(-m // 64)


def pairs_constants(group: Group, m: int) -> dict[str, Any]:
    """For `pairs_kernel`: 128 threads, with a sum for each pair, or more where pairs are few."""
    # Loads go ahead of time, through shared memory, if a thread's part has 4 bytes at least.
    narrow = min(group.row.itemsize, group.grad.itemsize) < 4
    per_sum = 2 if narrow and group.aligned else 1
    columns = 128 * (4 if m <= 4 else 2 if m <= 6 else 1)
    kernel = {"M": m, "BLOCK": columns * per_sum, "PER_SUM": per_sum, "STAGES": 4}
    return {**group.constants(m), **kernel}


def tiles_constants(group: Group, m: int) -> dict[str, Any]:
    """For `tiles_kernel`: a single tile for up to 64 rows, so that they are read once."""
    tile = 16 if m <= 16 else 32 if m <= 32 else _LARGEST_TILE
    block = 64 if tile <= 32 else 32
    if max(group.row.itemsize, group.grad.itemsize) == 8:
        block //= 2
    # Addresses of single elements, for three blocks ahead, spill on compute capability 8.
    stages = 3 if group.aligned or tile < 64 else 2
    kernel = {"TILES": triton.cdiv(m, tile), "TILE": tile, "BLOCK": block, "STAGES": stages}
    return {**group.constants(m), **kernel}


def dots_constants(group: Group, m: int) -> dict[str, Any]:
    """For `dots_kernel`: a single tile for up to 16 rows, so that g is read once, too."""
    tile = 8 if m <= 8 else 16
    kernel = {"TILES": triton.cdiv(m, tile), "TILE": tile, "BLOCK": 2048 // tile}
    return {**group.constants(m), **kernel}


def combine_constants(group: Group, m: int) -> dict[str, Any]:
    """For `combine_kernel`."""
    return {**group.constants(m), "BLOCK": 1024, "ROWS_AT_ONCE": 128}


def total_constants(matrix: bool) -> dict[str, Any]:
    """For `total_kernel`."""
    return {"MATRIX": matrix, "CHUNKS_AT_ONCE": 64, "BLOCK": 32}


def gram_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """As `gram.gram_per_tensor`, of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    out = grads[0].new_empty(len(grads), m, m, dtype=torch.float64)
    with _device(out):
        for group, table in _tables(memory, grads, m):
            chunks = len(table.owners)
            partial = out.new_empty(chunks, m, m)
            if m <= MAX_PAIRED:
                constants = pairs_constants(group, m)
                _launch(
                    kernels.pairs_kernel, chunks, table.entries, table.owners, partial, **constants
                )
            else:
                constants = tiles_constants(group, m)
                programs = chunks * constants["TILES"] ** 2
                arguments = (table.entries, table.owners, partial, m - 1)
                _launch(kernels.tiles_kernel, programs, *arguments, **constants)
            _total(table, partial, out)
    return out


def dots_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """As `gram.dots_per_tensor`, of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    out = grads[0].new_empty(len(grads), m, dtype=torch.float64)
    with _device(out):
        for group, table in _tables(memory, grads, m):
            chunks = len(table.owners)
            partial = out.new_empty(chunks, m)
            constants = dots_constants(group, m)
            arguments = (table.entries, table.owners, partial, m - 1)
            _launch(kernels.dots_kernel, chunks * constants["TILES"], *arguments, **constants)
            _total(table, partial, out)
    return out


def combine_(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    """As `gram.combine_`, of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    with _device(coefficients):
        for group, table in _tables(memory, grads, m, blocks):
            constants = combine_constants(group, m)
            programs = len(table.owners) * (constants["CHUNK"] // constants["BLOCK"])
            arguments = (table.entries, table.owners, coefficients, m - 1)
            _launch(kernels.combine_kernel, programs, *arguments, **constants)
    # Writes through raw pointers pass autograd's version counters by.
    torch.autograd.graph.increment_version(grads)


def _launch(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    if programs > 0:  # not so where all tensors are empty
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def _total(table: _Table, partial: Tensor, out: Tensor) -> None:
    constants = total_constants(matrix=out.dim() == 3)
    m, entries = out.shape[-1], out[0].numel()
    grid = (len(table.entries), triton.cdiv(entries, constants["BLOCK"]))
    kernels.total_kernel[grid](table.entries, partial, out, m, entries, **constants, **OPTIONS)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --- tables of addresses --------------------------------------------------------------------------

_Entry = tuple[int, ...]  # the words of a tensor, as gram_kernels.py numbers them


class _Table(NamedTuple):
    entries: Tensor  # [tensors, WORDS] int64
    owners: Tensor  # [chunks] int64
    host: Tensor  # what both were copied from


# A CUDA graph copies its tables at every replay, so they must stay.
_captured: list[_Table] = []


def _tables(
    memory: Sequence[Tensor], grads: Sequence[Tensor], m: int, blocks: Sequence[int] = ()
) -> list[tuple[Group, _Table]]:
    """The tensors by group, and where each group's table lies on their device."""
    groups: dict[Group, list[_Entry]] = {}
    firsts: dict[Group, int] = {}
    blocks = blocks or [0] * len(grads)
    for slot, (rows, grad, block) in enumerate(zip(memory, grads, blocks, strict=True)):
        stride, numel = rows.stride(0), grad.numel()
        row_address, grad_address = rows.data_ptr(), grad.data_ptr()
        aligned = (
            row_address % 16 == grad_address % 16 == 0
            and stride * rows.element_size() % 16 == stride % 8 == numel % 8 == 0
        )
        group = Group(rows.dtype, grad.dtype, aligned)
        first = firsts.get(group, 0)
        count = -(-numel // chunk_size(m))
        firsts[group] = first + count
        entry = (row_address, grad_address, stride, numel, first, count, slot, block)
        groups.setdefault(group, []).append(entry)
    device = grads[0].device
    return [(group, _table(tuple(entries), device)) for group, entries in groups.items()]


def _table(entries: tuple[_Entry, ...], device: torch.device) -> _Table:
    if device.type != "cuda":  # the interpreter
        return _make_table(entries, device)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(_make_table(entries, device))
        return _captured[-1]
    return _stored_table(entries, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _stored_table(entries: tuple[_Entry, ...], device: torch.device, stream: int) -> _Table:
    # By stream, too: the copy is in the order of the stream that it was made on.
    return _make_table(entries, device)


def _make_table(entries: tuple[_Entry, ...], device: torch.device) -> _Table:
    table = torch.tensor(entries, dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(entries)), table[:, kernels.CHUNKS.value])
    host = torch.cat([table.view(-1), owners])
    if device.type == "cuda":
        # From pinned memory the copy does not wait, and it is not reused before the copy is done.
        host = host.pin_memory()
    copy = host.to(device, non_blocking=True)
    words = table.numel()
    return _Table(copy[:words].view(table.shape), copy[words:], host)
