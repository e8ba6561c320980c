"""Functions run by several processes of torch.distributed at once, with gloo."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Rank = Callable[..., Any]


def in_processes(function: Rank, count: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in each of so many processes."""
    with tempfile.TemporaryDirectory() as meeting:
        arguments_ = (function, count, f"file://{meeting}/store", arguments)
        torch.multiprocessing.spawn(_start, arguments_, nprocs=count)


def results_of(functions: dict[str, Rank], count: int, folder: Path) -> dict[str, list[Any]]:
    """Return what ``function(rank)`` returns in each process, by name; one start for all."""
    in_processes(_save_results, count, functions, str(folder))
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    return {name: [one[name] for one in saved] for name in functions}


def _save_results(rank: int, functions: dict[str, Rank], folder: str) -> None:
    torch.save(
        {name: function(rank) for name, function in functions.items()}, f"{folder}/{rank}.pt"
    )


def _start(rank: int, function: Rank, count: int, address: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    # What trainers look for; they meet at the address all the same.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    try:
        function(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
    # Gloo's threads outlive the group while a cache refers to it, and one that still holds a
    # tensor aborts an interpreter that ends (pytorch#179291): this one is left as it is.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
