"""What compact formats cost beside torch's fused AdamW of the same dtype, on a CPU.

    python bench/compact_formats.py [--processes 3] [--turns 9] [--only log8] [--json FILE]

AdamW and one contender at a time take turns of three steps each on GPT-2's 85 M parameters in 144
tensors, in several processes, since where a process's memory lies matters: medians of the turns'
ratios, with their quartiles. Bytes are those that a step reads and writes for each weight: where a
ratio is that of the bytes, memory alone is the limit. torch's bfloat16 AdamW keeps its moments in
bfloat16, ours in float32 unless said.

On a processor with AVX-512, what others run is measured with ATEN_CPU_CAPABILITY=avx2 and an
extension that CXX="c++ -DCL_OPTIM_WITHOUT_AVX512" has built.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from contenders import Problem, adamw, ewc, gpt2_shapes
from rich import box
from rich.console import Console
from rich.table import Table

from cl_optim import EWCAdamW
from cl_optim.demo.report import versions

_STEPS = 3  # in a turn
Make = Callable[[Problem], Callable[[], None]]


def unprotected(problem: Problem) -> Callable[[], None]:
    """EWCAdamW before anything is consolidated."""
    return EWCAdamW(problem.params, fused=True).step


def bitsandbytes_8bit(problem: Problem) -> Callable[[], None]:
    """The peer with 8-bit moments; it protects nothing."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(problem.params).step


_BF16_ANCHORS = {"anchor_dtype": "bfloat16"}
_LOG8 = {"importance_dtype": "log8"}
# By dtype of the weights: AdamW's bytes for each weight, and contenders with theirs.
ROWS: dict[str, tuple[int, dict[str, tuple[Make, float]]]] = {
    "float32": (28, {
        "unprotected": (unprotected, 28),
        "float32 importance": (ewc(), 36),
        "float32 importance, track_penalty": (ewc(track_penalty=True), 36),
        "float32 importance, proximal": (ewc(penalty="proximal"), 36),
        "bfloat16 importance": (ewc(importance_dtype="bfloat16"), 34),
        "log8": (ewc(**_LOG8), 33),
        "log8, bfloat16 anchors": (ewc(**_LOG8, **_BF16_ANCHORS), 31),
        "float32 importance, bfloat16 moments": (ewc(state_dtype="bfloat16"), 28),
        "log8, bfloat16 moments": (ewc(**_LOG8, state_dtype="bfloat16"), 25),
        "log8, 8-bit moments": (ewc(**_LOG8, state_dtype="8bit"), 21.1),
        "bitsandbytes AdamW8bit": (bitsandbytes_8bit, 16.1),
    }),
    "bfloat16": (14, {
        "unprotected": (unprotected, 22),
        "float32 importance": (ewc(), 28),
        "log8": (ewc(**_LOG8), 25),
        "log8, stochastic rounding": (ewc(**_LOG8, rounding="stochastic"), 25),
        "log8, Kahan": (ewc(**_LOG8, rounding="kahan"), 29),
        "log8, bfloat16 moments": (ewc(**_LOG8, state_dtype="bfloat16"), 17),
        "log8, 8-bit moments, Kahan": (ewc(**_LOG8, state_dtype="8bit", rounding="kahan"), 17.1),
    }),
}  # fmt: skip


def seconds(step: Callable[[], None]) -> float:
    """Return the seconds that a step takes, of a turn."""
    start = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - start) / _STEPS


def compare(base: Callable[[], None], make: Make, dtype: torch.dtype, turns: int) -> list[float]:
    """Return the ratios of a contender's step to the base's, by turn."""
    torch.manual_seed(0)
    step = make(Problem(gpt2_shapes(), dtype=dtype))
    for _ in range(3):  # plans are made
        seconds(step)
    ratios = []
    for turn in range(turns):
        first, second = (base, step) if turn % 2 else (step, base)
        found = {first: seconds(first), second: seconds(second)}
        ratios.append(found[step] / found[base])
    return ratios


def measure(only: str, turns: int) -> dict[str, list[float]]:
    """Return the ratios of all rows, in this process."""
    found = {}
    for name, (_, rows) in ROWS.items():
        dtype = getattr(torch, name)
        torch.manual_seed(0)
        base = adamw(Problem(gpt2_shapes(), dtype=dtype))
        for label, (make, _) in rows.items():
            if only in label:
                found[f"{name}: {label}"] = compare(base, make, dtype, turns)
    return found


def tables(ratios: dict[str, list[float]]) -> list[Table]:
    """Return a table for each dtype."""
    made = []
    for name, (base_bytes, rows) in ROWS.items():
        table = Table(title=f"{name} weights", title_justify="left", box=box.MARKDOWN)
        for column in ("", "÷ AdamW(fused)", "quartiles", "bytes", "÷ AdamW's bytes"):
            table.add_column(column, justify="right" if column else "left")
        for label, (_, count) in rows.items():
            if found := ratios.get(f"{name}: {label}"):
                low, middle, high = statistics.quantiles(found, n=4)
                shown = [f"{middle:.2f}", f"{low:.2f}–{high:.2f}", f"{count:g}"]
                table.add_row(label, *shown, f"{count / base_bytes:.2f}")
        made.append(table)
    return made


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9, help="of a process")
    parser.add_argument("--processes", type=int, default=3, help="one after another")
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.processes:  # this is one of them
        print(json.dumps(measure(arguments.only, arguments.turns)))
        return
    ratios: dict[str, list[float]] = defaultdict(list)
    command = [sys.executable, __file__, "--processes=0", f"--only={arguments.only}"]
    for _ in range(arguments.processes):
        done = subprocess.run(
            [*command, f"--turns={arguments.turns}"], capture_output=True, text=True, check=True
        )
        for row, found in json.loads(done.stdout.splitlines()[-1]).items():
            ratios[row] += found
    console = Console(width=120)
    for table in tables(ratios):
        console.print(table)
    if arguments.json:
        record = {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "torch's kernels": torch.backends.cpu.get_cpu_capability(),
            "ratios": ratios,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
