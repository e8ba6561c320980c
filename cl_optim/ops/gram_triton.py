"""The Gram products on a GPU, in Triton: rows are read from memory once, where they fit one tile.

That is up to 63 of them (31 with Triton before 3.8). Of more, a tile is read again with each of the
others, by programs next to each other, so that the second-level cache may still have it.

One launch serves all tensors of one pair of dtypes. Their addresses lie in a table on the device,
which is made once for the same addresses. A program sums a chunk of one tensor; a second launch
adds the chunks' sums in the order of the chunks. So the result depends neither on timing nor on
the GPU's size, and nothing waits for the GPU.

Sums are in float64. For few rows memory is the bound all the same: eleven rows need 66
multiplications per 44 bytes, a third of what an H100 does in that time. (Half as many bytes in
bfloat16; from about 31 rows on, products are the bound.) Float32 would overflow at rows of 1e20,
and could not tell nearly dependent rows apart.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cl_optim.ops import gram_triton_kernels as kernels
from cl_optim.ops import gram_triton_tiles as tiles
from cl_optim.ops.capture import is_capturing

# How kernels are compiled. Later Tritons do not join products and sums unless told so.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def gram_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Compute `gram.gram_per_tensor` of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    out = grads[0].new_empty(len(grads), m, m, dtype=torch.float64)
    with _device(out):
        for group, table in _tables(memory, grads, m):
            chunks = len(table.owners)
            partial = out.new_empty(chunks, m, m)
            if m <= tiles.MAX_PAIRED:
                constants = tiles.pairs_constants(group, m)
                _launch(
                    kernels.pairs_kernel, chunks, table.entries, table.owners, partial, **constants
                )
            else:
                constants = tiles.tiles_constants(group, m)
                programs = chunks * constants["TILES"] ** 2
                arguments = (table.entries, table.owners, partial, m - 1)
                _launch(kernels.tiles_kernel, programs, *arguments, **constants)
            _total(table, partial, out)
    return out


def dots_per_tensor(memory: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Compute `gram.dots_per_tensor` of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    out = grads[0].new_empty(len(grads), m, dtype=torch.float64)
    with _device(out):
        for group, table in _tables(memory, grads, m):
            chunks = len(table.owners)
            partial = out.new_empty(chunks, m)
            constants = tiles.dots_constants(group, m)
            arguments = (table.entries, table.owners, partial, m - 1)
            _launch(kernels.dots_kernel, chunks * constants["TILES"], *arguments, **constants)
            _total(table, partial, out)
    return out


def combine_(
    grads: Sequence[Tensor], memory: Sequence[Tensor], coefficients: Tensor, blocks: Sequence[int]
) -> None:
    """Compute `gram.combine_` of arrays in one order on one GPU."""
    m = len(memory[0]) + 1
    with _device(coefficients):
        for group, table in _tables(memory, grads, m, blocks):
            constants = tiles.combine_constants(group, m)
            programs = len(table.owners) * (constants["CHUNK"] // constants["BLOCK"])
            arguments = (table.entries, table.owners, coefficients, m - 1)
            _launch(kernels.combine_kernel, programs, *arguments, **constants)


def _launch(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    if programs > 0:  # not so where all tensors are empty
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def _total(table: _Table, partial: Tensor, out: Tensor) -> None:
    constants = tiles.total_constants(matrix=out.dim() == 3)
    m, entries = out.shape[-1], out[0].numel()
    grid = (len(table.entries), triton.cdiv(entries, constants["BLOCK"]))
    kernels.total_kernel[grid](table.entries, partial, out, m, entries, **constants, **OPTIONS)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# --- tables of addresses --------------------------------------------------------------------------

# Tables that CUDA graphs may read. There is no telling when a graph is gone, so they stay.
_MOST_IN_GRAPHS = 256


class _Arrays(NamedTuple):
    """All that tables are made from: equal ones have equal tables."""

    device: torch.device
    chunk: int  # elements
    rows: tuple[int, ...]  # addresses
    grads: tuple[int, ...]
    row_types: tuple[torch.dtype, ...]
    grad_types: tuple[torch.dtype, ...]
    strides: tuple[int, ...]  # elements from row to row
    numels: tuple[int, ...]
    blocks: tuple[int, ...]  # rows of coefficients


class _Table(NamedTuple):
    entries: Tensor  # [tensors, WORDS] int64
    owners: Tensor  # [chunks] int64: the tensor of each chunk


_ByGroup = list[tuple[tiles.Group, _Table]]


@dataclass(eq=False)  # a weak reference needs a class, and a set one that hashes
class _Stored:
    arrays: _Arrays
    tables: _ByGroup
    arrived: Tensor  # on the host, pinned: 1 once the tables are on the device


_stored: weakref.WeakSet[_Stored] = weakref.WeakSet()
_in_graphs: dict[_Arrays, _Stored] = {}


def _tables(
    memory: Sequence[Tensor], grads: Sequence[Tensor], m: int, blocks: Sequence[int] = ()
) -> _ByGroup:
    """Return the tensors by group, and where each group's table lies on their device.

    Only what the tables depend on is read from each tensor of each call; the rest is stored.
    """
    arrays = _Arrays(
        grads[0].device,
        tiles.chunk_size(m),
        tuple(map(Tensor.data_ptr, memory)),
        tuple(map(Tensor.data_ptr, grads)),
        tuple([rows.dtype for rows in memory]),
        tuple([grad.dtype for grad in grads]),
        tuple([rows.stride()[0] for rows in memory]),
        tuple(map(Tensor.numel, grads)),
        tuple(blocks) or (0,) * len(grads),
    )
    if is_capturing():
        return _for_graphs(arrays) or _written_by_the_graph(arrays)
    return _store(arrays, _stream(arrays.device)).tables


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.lru_cache(maxsize=64)
def _store(arrays: _Arrays, stream: int) -> _Stored:
    """Copy tables to the device; stored by stream, in whose order the copy is."""
    entries = _entries(arrays)
    host_words: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
    tables = {group: torch.tensor(words, **host_words) for group, words in entries.items()}
    host: list[Tensor] = []
    for table in tables.values():
        owners = _owners(table)
        # Of an even length, so that all begin at multiples of 16 bytes: Triton compiles for these.
        host += [table.view(-1), owners, owners.new_zeros(len(owners) % 2)]
    host.append(torch.ones(1, **host_words))
    words = torch.cat(host)
    # From pinned memory the copy does not wait, and it is not reused before the copy is done.
    words = words.pin_memory() if arrays.device.type == "cuda" else words
    on_device = words.to(arrays.device, non_blocking=True)
    *parts, one = torch.split(on_device, list(map(len, host)))
    by_group = [
        (group, _Table(parts[3 * i].view(table.shape), parts[3 * i + 1]))
        for i, (group, table) in enumerate(tables.items())
    ]
    # An event cannot be asked during a capture; memory of the host can be read.
    arrived = torch.zeros(1, **host_words, pin_memory=arrays.device.type == "cuda")
    stored = _Stored(arrays, by_group, arrived.copy_(one, non_blocking=True))
    _stored.add(stored)
    return stored


def _for_graphs(arrays: _Arrays) -> _ByGroup | None:
    """Return stored tables that are on the device, and so there for a replay on any stream."""
    if arrays not in _in_graphs and len(_in_graphs) < _MOST_IN_GRAPHS:
        same = (stored for stored in list(_stored) if stored.arrays == arrays)
        _in_graphs.update((arrays, stored) for stored in same if stored.arrived.item())
    return _in_graphs[arrays].tables if arrays in _in_graphs else None


def _written_by_the_graph(arrays: _Arrays) -> _ByGroup:
    """Make tables that the graph being captured writes at each replay: none need be kept for it.

    Their words are arguments of its kernels. A copy from the host would read the host's memory at
    each replay, and there is no telling until when.
    """
    result = []
    for group, entries in _entries(arrays).items():
        words = [word for entry in entries for word in entry]
        table = torch.zeros(len(words), dtype=torch.int64, device=arrays.device)
        torch._foreach_add_(table.unbind(), words)
        table = table.view(len(entries), -1)
        chunks = entries[-1][kernels.FIRST.value] + entries[-1][kernels.CHUNKS.value]
        result.append((group, _Table(table, _owners(table, chunks))))
    return result


def _entries(arrays: _Arrays) -> dict[tiles.Group, list[tuple[int, ...]]]:
    """Return the words of each tensor by group, as gram_triton_kernels.py numbers them."""
    groups: dict[tiles.Group, list[tuple[int, ...]]] = {}
    chunks: dict[tiles.Group, int] = {}
    columns = zip(*arrays[2:], strict=True)
    for slot, (rows, grad, row_type, grad_type, stride, numel, block) in enumerate(columns):
        aligned = (
            rows % 16 == grad % 16 == 0
            and stride * row_type.itemsize % 16 == stride % 8 == numel % 8 == 0
        )
        group = tiles.Group(row_type, grad_type, aligned)
        first, count = chunks.get(group, 0), -(-numel // arrays.chunk)
        chunks[group] = first + count
        groups.setdefault(group, []).append((rows, grad, stride, numel, first, count, slot, block))
    return groups


def _owners(table: Tensor, chunks: int | None = None) -> Tensor:
    """Return each chunk's tensor; the host waits for a device unless told how many there are."""
    return torch.repeat_interleave(table[:, kernels.CHUNKS.value], output_size=chunks)
