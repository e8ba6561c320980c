"""Compiles the Triton kernels ahead of time for one GPU architecture; needs no GPU.

`python tests/kernels/triton_compilation.py 90` prints, as JSON, what became of each: bytes spilled
to local memory, registers and shared memory. A process of its own, since Triton is either compiling
or interpreting for as long as a process lives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ptx import compiled, widths
from triton.compiler import ASTSource

from cl_optim.ops import squared_grad_triton as launch
from cl_optim.ops import squared_grad_triton_kernels as kernels
from cl_optim.ops.squared_grad_triton_tiles import CONFIGS, TABLE, Config


@dataclass(frozen=True)
class Case:
    """One instance of the kernel: a configuration, and what its arguments are like."""

    config: Config
    dtype: str
    precision: str = "ieee"
    weight_grad: str | None = "fp32"
    packed: bool = False
    odd: bool = False  # rows of the results, which are not whole multiples of 16 bytes then
    one_feature: bool = False  # which Triton makes a constant when it launches the kernel

    def __str__(self) -> str:
        tile = "x".join(map(str, list(asdict(self.config).values())[:3]))
        parts = [self.dtype, tile, f"{self.config.stages} stages"]
        parts += ["descriptors"] * self.config.descriptors + ["packed"] * self.packed
        parts += ["odd"] * self.odd + ["one feature"] * self.one_feature
        parts += [f"weight_grad {self.weight_grad}"] * (self.weight_grad != "fp32")
        parts += [self.precision] * (self.dtype == "fp32")
        return " ".join(parts)


def cases(architecture: int) -> list[Case]:
    """Each configuration of the table with the least and the most to keep, and each other choice.

    Fewer stages are the same code with less shared memory: compiled for one architecture alone.
    """
    half, tf32, ieee = (TABLE[architecture, precision] for precision in ("half", "tf32", "ieee"))
    wide, packed, narrow = (half[kind].config for kind in ("wide", "packed", "narrow"))
    # Packed sequences take the tiles that are for them, and the narrow ones.
    of_packed = {c.config for kind, c in half.items() if kind == "packed" or "narrow" in kind}
    configs = dict.fromkeys(choice.config for choice in half.values())
    result = [Case(config, "bf16") for config in configs]
    result += [
        Case(config, "bf16", weight_grad="bf16", packed=config in of_packed, odd=True)
        for config in configs
    ]
    result += [
        Case(wide, "bf16", weight_grad=None),
        Case(wide, "bf16", weight_grad="fp16", odd=True),
        Case(packed, "fp16", packed=True),
        Case(narrow, "fp16", one_feature=True),
    ]
    for choice in tf32.values():
        result += [Case(choice.config, "fp32", "tf32")]
        result += [Case(choice.config, "fp32", "tf32", "bf16", packed=True, odd=True)]
    for choice in ieee.values():
        result += [Case(choice.config, "fp32", packed=True)]
        result += [Case(choice.config, "fp32", weight_grad="bf16", odd=True)]
    if architecture == 90:
        result += [Case(c, "bf16") for c in CONFIGS["half"] if c not in configs]
    return result


def signature(case: Case) -> tuple[dict[str, str], dict[str, Any]]:
    """The types of the kernel's arguments, and the values of those known when compiling."""
    config = case.config
    constants: dict[str, Any] = {
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "BLOCK_TOKENS": config.block_tokens,
        "DESCRIPTORS": config.descriptors,
        "PRECISION": case.precision,
    }
    if case.one_feature:
        constants |= {"out_features": 1, "in_features": 1}
    if not case.packed:
        constants["cu_seqlens"] = None
    if case.weight_grad is None:
        constants["weight_grad"] = None
    types = {"out": "*fp32", "workspace": "*fp32", "cu_seqlens": "*i64"}
    types |= {"weight_grad": f"*{case.weight_grad}"}
    types |= dict.fromkeys(("inputs", "grad_outputs"), f"*{case.dtype}")
    if config.descriptors:
        for name, block in (("inputs", config.block_in), ("grad_outputs", config.block_out)):
            types[name] = f"tensordesc<{case.dtype}[1,{config.block_tokens},{block}]>"
    names = kernels.accumulate_kernel.arg_names
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    return types, constants


def build(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    even: bool,
    options: dict[str, Any],
    architecture: int,
) -> dict[str, Any]:
    """Compile, and say what became of it.

    Addresses, sizes and strides of the results are multiples of 16 where `even`.
    """
    divisible = [
        index
        for index, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (even and name.endswith(("features", "_stride")))
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    source = ASTSource(kernel, types, constants, attributes)
    made = compiled(source, architecture, options)
    ptx = made.result.asm["ptx"]
    return {
        "spilled": made.spilled,
        "registers": made.registers,
        "shared": made.result.metadata.shared,
        # ptxas then lets each product finish before the next one starts
        "serialized": "serialized" in made.log,
        "even": even,
        **widths(ptx),
        "by_descriptor": ptx.count("cp.async.bulk.tensor"),
    }


def main() -> None:
    architecture = int(sys.argv[1])
    results = {}
    for case in cases(architecture):
        options = launch.launch_options(case.config)
        made = build(
            kernels.accumulate_kernel, *signature(case), not case.odd, options, architecture
        )
        results[str(case)] = made | {"pipelined": pipelined(case)}
    for name, types, constants in reductions():
        made = build(
            kernels.reduce_kernel, types, constants, "odd" not in name, launch.FUSION, architecture
        )
        results[name] = made | {"pipelined": 0}
    print(json.dumps(results))


def pipelined(case: Case) -> int:
    """Bytes of shared memory that the pipeline takes at least, if there is one."""
    config = case.config
    width = 4 if case.dtype == "fp32" else 2
    # Triton gives a pipeline one buffer less than its stages where the product reads registers.
    blocks = (config.stages - 1) * config.block_tokens
    return blocks * (config.block_out + config.block_in) * width


def reductions() -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """`reduce_kernel` of the largest and the smallest tile: names, types, constants."""
    choices = [("fp32", 128, ""), (None, 128, ""), ("bf16", 64, ""), ("bf16", 128, " odd")]
    for weight_grad, block, odd in choices:
        constants: dict[str, Any] = {"BLOCK_OUT": block, "BLOCK_IN": block}
        constants["ROWS"] = launch.REDUCE_ROWS
        if weight_grad is None:
            constants["weight_grad"] = None
        types = dict.fromkeys(kernels.reduce_kernel.arg_names, "i32")
        types |= {"out": "*fp32", "weight_grad": f"*{weight_grad}", "workspace": "*fp32"}
        types |= dict.fromkeys(constants, "constexpr")
        yield f"reduction of {block}, weight_grad {weight_grad}{odd}", types, constants


if __name__ == "__main__":
    main()
