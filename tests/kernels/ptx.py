"""How PTX accesses global memory."""

from __future__ import annotations

import re
from collections import Counter


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
