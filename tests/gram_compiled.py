"""Compiles the Triton kernels for a GPU that need not be there; prints JSON: registers and spills.

test_gram_triton.py runs it: ``python gram_compiled.py 80 90 100``, for compute capabilities.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from cl_optim.ops import gram_kernels as kernels
from cl_optim.ops import gram_triton as host

F32 = host.Group(torch.float32, torch.float32, aligned=True)
ODD = host.Group(torch.float32, torch.float32, aligned=False)
B16 = host.Group(torch.bfloat16, torch.float32, aligned=True)
B16_ALL = host.Group(torch.bfloat16, torch.bfloat16, aligned=True)
ODD_B16 = host.Group(torch.bfloat16, torch.float32, aligned=False)
F64 = host.Group(torch.float64, torch.float64, aligned=True)

LISTS = {"table": "*i64", "owners": "*i64"}
PAIRS = {**LISTS, "partial": "*fp64"}
ROWS = {**PAIRS, "t": "i32"}
COMBINE = {**LISTS, "coefficients": "*fp64", "t": "i32"}
TOTAL = {"table": "*i64", "partial": "*fp64", "out": "*fp64", "m": "i32", "entries": "i32"}
ONE = {"t": 1}  # Triton compiles an argument that is 1 into the kernel

CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "pairs, 2 odd": (kernels.pairs_kernel, PAIRS, host.pairs_constants(ODD, 2)),
    "pairs, 11": (kernels.pairs_kernel, PAIRS, host.pairs_constants(F32, 11)),
    "pairs, 11 bfloat16": (kernels.pairs_kernel, PAIRS, host.pairs_constants(B16, 11)),
    "pairs, 12": (kernels.pairs_kernel, PAIRS, host.pairs_constants(F32, 12)),
    "pairs, 12 float64": (kernels.pairs_kernel, PAIRS, host.pairs_constants(F64, 12)),
    "tiles, 21": (kernels.tiles_kernel, ROWS, host.tiles_constants(F32, 21)),
    "tiles, 129": (kernels.tiles_kernel, ROWS, host.tiles_constants(F32, 129)),
    "tiles, 129 odd float32": (kernels.tiles_kernel, ROWS, host.tiles_constants(ODD, 129)),
    "tiles, 129 odd": (kernels.tiles_kernel, ROWS, host.tiles_constants(ODD_B16, 129)),
    "tiles, 129 float64": (kernels.tiles_kernel, ROWS, host.tiles_constants(F64, 129)),
    "dots, 2": (kernels.dots_kernel, ROWS, {**host.dots_constants(F32, 2), **ONE}),
    "dots, 11": (kernels.dots_kernel, ROWS, host.dots_constants(F32, 11)),
    "dots, 11 odd": (kernels.dots_kernel, ROWS, host.dots_constants(ODD_B16, 11)),
    "combine, 2": (kernels.combine_kernel, COMBINE, {**host.combine_constants(F32, 2), **ONE}),
    "combine, 11": (kernels.combine_kernel, COMBINE, host.combine_constants(F32, 11)),
    "combine, 11 bfloat16": (kernels.combine_kernel, COMBINE, host.combine_constants(B16_ALL, 11)),
    "combine, 11 odd": (kernels.combine_kernel, COMBINE, host.combine_constants(ODD_B16, 11)),
    "total": (kernels.total_kernel, TOTAL, host.total_constants(matrix=True)),
    "total, 1": (kernels.total_kernel, TOTAL, {**host.total_constants(matrix=True), "m": 1}),
    "total, dots": (kernels.total_kernel, TOTAL, host.total_constants(matrix=False)),
}


def build(
    capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any]
) -> dict[str, int]:
    """Registers, bytes of spills and asynchronous copies of one kernel."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=host.OPTIONS)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", str(path), "-o", f"{path}.cubin"]
        command += [f"-arch={sm_arch_from_capability(capability)}"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (stores,) = re.findall(r"(\d+) bytes spill stores", shown)
    (registers,) = re.findall(r"Used (\d+) registers", shown)
    return {
        "registers": int(registers),
        "spills": int(stores),
        "shared": compiled.metadata.shared,
        "copies": ptx.count("cp.async.c"),
        "wide_loads": ptx.count("ld.global.v4"),
        "float64_tensor_core": ptx.count("mma.sync.aligned.m8n8k4.row.col.f64"),
    }


if __name__ == "__main__":
    report = {
        target: {name: build(int(target), *case) for name, case in CASES.items()}
        for target in sys.argv[1:]
    }
    print(json.dumps(report))
