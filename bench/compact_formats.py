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

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import cost_figures
import records
import torch
from contenders import Problem, adamw, ewc, gpt2_shapes

from cl_optim import EWCAdamW

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


def main() -> None:
    """Measure, print, and write JSON."""
    parser = records.parser(__doc__)
    parser.add_argument("--turns", type=int, default=9, help="of a process")
    parser.add_argument("--processes", type=int, default=3, help="one after another")
    parser.add_argument("--only", default="", help="rows whose name has this")
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
    figures = {"torch's kernels": torch.backends.cpu.get_cpu_capability(), "ratios": ratios}
    cost_figures.show(*(cost_figures.formats(weights, figures) for weights in ROWS))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
