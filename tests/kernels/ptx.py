"""Compiles Triton kernels for GPUs that need not be there, and reads what became of them."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_logs: dict[str, str] = {}  # of what Triton has in its cache it says nothing more


class Compiled(NamedTuple):
    """A kernel for one compute capability, with what ptxas says of it.

    Attributes:
        result: Triton's.
        registers: Per thread.
        spilled: Bytes of registers that a thread keeps in local memory.
        log: All that ptxas said.
    """

    result: Any
    registers: int
    spilled: int
    log: str


def compiled(source: ASTSource, capability: int, options: dict[str, Any]) -> Compiled:
    """Compile, into a cache of Triton's that was empty when the process began."""
    triton.knobs.nvidia.dump_ptxas_log = True
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        result = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    log = _logs.setdefault(result.hash, output.getvalue())
    (spilled,) = re.findall(r"(\d+) bytes spill stores", log)
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return Compiled(result, int(registers), int(spilled), log)


def widths(ptx: str) -> dict[str, dict[int, int]]:
    """How often memory is accessed in how many bytes at once: loads, stores, copies to shared.

    Copies by tensor descriptors, which are of whole blocks, are not among them.
    """
    found = {}
    for name, instruction in (("loads", "ld"), ("stores", "st")):
        accesses = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
        found[name] = Counter(int(count or 1) * int(bits) // 8 for count, bits in accesses)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\S*\.global.*, 0x([0-9a-f]+),", ptx)
    found["copies"] = Counter(int(size, 16) for size in copies)
    return {name: dict(counts) for name, counts in found.items()}
