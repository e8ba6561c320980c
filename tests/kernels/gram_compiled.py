"""Compiles the Triton kernels for a GPU that need not be there; prints JSON.

test_gram_triton.py runs it: ``python gram_compiled.py 80 90 100``, for compute capabilities. Of
each kernel: registers, bytes of spills, and how often memory is accessed in how many bytes at once.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from ptx import compiled, widths
from triton.compiler import ASTSource

from cl_optim.ops import gram_triton_kernels as kernels
from cl_optim.ops import gram_triton_tiles as tiles
from cl_optim.ops.gram_triton import OPTIONS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

LISTS = {"table": "*i64", "owners": "*i64"}
PAIRS = {**LISTS, "partial": "*fp64"}
ROWS = {**PAIRS, "t": "i32"}
COMBINE = {**LISTS, "coefficients": "*fp64", "t": "i32"}
TOTAL = {"table": "*i64", "partial": "*fp64", "out": "*fp64", "m": "i32", "entries": "i32"}
ONE = {"t": 1}  # Triton compiles an argument that is 1 into the kernel

Case = tuple[Any, dict[str, str], dict[str, Any]]


def group(row: torch.dtype, grad: torch.dtype | None = None, aligned: bool = True) -> tiles.Group:
    return tiles.Group(row, grad or row, aligned)


# Of rows and gradient, the pairs of which code differs, aligned and not.
GROUPS = {
    "float32": group(F32),
    "bfloat16": group(BF16),
    "bfloat16 and float32": group(BF16, F32),
    "float64": group(F64),
    "odd float32": group(F32, aligned=False),
    "odd bfloat16 and float32": group(BF16, F32, aligned=False),
}
# Only widths and conversions differ from those; compiled for one capability.
MORE = {
    "float16": group(F16),
    "float64 and bfloat16": group(F64, BF16),
    "odd float16": group(F16, aligned=False),
    "odd float64": group(F64, aligned=False),
}


def cases(capability: int) -> dict[str, Case]:
    """Every kernel, for t rows and the gradient; t is 1 to 11 for `pairs_kernel`.

    What is the same but for constants is compiled for one capability.
    """
    thorough = capability == 90
    groups = GROUPS | MORE if thorough else GROUPS
    result: dict[str, Case] = {}
    for t in range(1, tiles.MAX_PAIRED) if thorough else (1, 3, 5, 10, 11):
        of_most = groups if t == tiles.MAX_PAIRED - 1 else {"float32": GROUPS["float32"]}
        for name, kind in of_most.items():
            constants = tiles.pairs_constants(kind, t + 1)
            result[f"pairs, {t} {name}"] = kernels.pairs_kernel, PAIRS, constants
    for t in (12, 31, 63, 128):
        of_size = groups if t == 128 else {"float32": GROUPS["float32"]}
        for name, kind in of_size.items():
            constants = tiles.tiles_constants(kind, t + 1)
            result[f"tiles, {t} {name}"] = kernels.tiles_kernel, ROWS, constants
    for name, kind in groups.items():
        for t in (1, 10, 31) if name.endswith("float32") else (10,):
            one = ONE if t == 1 else {}
            result[f"dots, {t} {name}"] = (
                kernels.dots_kernel, ROWS, tiles.dots_constants(kind, t + 1) | one,
            )  # fmt: skip
            result[f"combine, {t} {name}"] = (
                kernels.combine_kernel, COMBINE, tiles.combine_constants(kind, t + 1) | one,
            )  # fmt: skip
    for name, matrix, one in (("total", True, {}), ("total, 0", True, {"m": 1})):
        result[name] = kernels.total_kernel, TOTAL, tiles.total_constants(matrix) | one
    result["total, dots"] = kernels.total_kernel, TOTAL, tiles.total_constants(matrix=False)
    return result


def build(
    capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any]
) -> dict[str, Any]:
    """Registers, bytes of spills, tensor cores and widths of one kernel."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    made = compiled(ASTSource(kernel, signature, constants), capability, OPTIONS)
    ptx = made.result.asm["ptx"]
    return {
        "registers": made.registers,
        "spills": made.spilled,
        **widths(ptx),
        "parts": parts(constants) if "PER_SUM" in constants else [],
        "float64_tensor_core": len(re.findall(r"mma\.sync\.aligned\.\S*\.f64\s", ptx)),
    }


def parts(constants: dict[str, Any]) -> list[int]:
    """Bytes that a thread of `pairs_kernel` accesses at once, of a row and of the gradient."""
    elements = constants["BLOCK"] // (32 * OPTIONS["num_warps"])
    bits = {constants[name].primitive_bitwidth for name in ("ROW", "GRADIENT")}
    return [min(16, elements * width // 8) for width in sorted(bits)]


if __name__ == "__main__":
    report = {
        target: {name: build(int(target), *case) for name, case in cases(int(target)).items()}
        for target in sys.argv[1:]
    }
    print(json.dumps(report))
