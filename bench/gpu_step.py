"""Time of one protected step on a GPU, by CUDA events, and on its host; prints JSON and the ratios.

Needs nothing but torch and cl_optim: `python bench/gpu_step.py --json step-gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from contenders import (
    BFLOAT16_CONTENDERS,
    CONTENDERS,
    Problem,
    compiled_foreach,
    gpt2_shapes,
)
from gpu_timing import host_milliseconds, milliseconds

from cl_optim.ops import library

TURNS, ROUNDS = 7, 20
GPT2 = "GPT-2 149 tensors 163 M"
SETS = {
    GPT2: (gpt2_shapes(embeddings=True), torch.float32),
    "GPT-2 149 tensors 163 M, bfloat16": (gpt2_shapes(embeddings=True), torch.bfloat16),
    "1 tensor of 163 M": ([(163_000_000,)], torch.float32),
    "1000 tensors of 64": ([(64,)] * 1000, torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the samples go")
    path = parser.parse_args().json
    if not library.available("cuda"):
        raise SystemExit(library.explain("cuda"))
    report: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "backend": library.backends()["cuda"].info,
        "unit": "ms, the median of each turn",
    }
    for name, (shapes, dtype) in SETS.items():
        contenders = CONTENDERS if dtype == torch.float32 else BFLOAT16_CONTENDERS
        turns: dict[str, list[float]] = {contender: [] for contender in contenders}
        steps = {
            contender: make(Problem(shapes, "cuda", dtype))
            for contender, make in contenders.items()
        }
        if name == GPT2:
            steps["torch.compile of foreach"] = compiled_foreach(Problem(shapes, "cuda", dtype))
            turns["torch.compile of foreach"] = []
            start = time.perf_counter()
            steps["torch.compile of foreach"]()
            torch.cuda.synchronize()
            report["torch.compile of foreach, seconds before its first step"] = (
                time.perf_counter() - start
            )
        for turn in range(TURNS + 1):
            for contender, step in steps.items():
                elapsed = milliseconds(step, ROUNDS)
                if turn > 0:  # the first one warms up
                    turns[contender].append(elapsed)
        hosts = {
            contender: statistics.median(host_milliseconds(step, ROUNDS) for _ in range(TURNS))
            for contender, step in steps.items()
        }
        report[name], report[f"{name}, host"] = turns, hosts
        plain = turns["AdamW fused"]
        print(name)
        for contender, times in turns.items():
            ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            print(
                f"  {contender:32}{statistics.median(times):9.3f} ms  {ratio:6.2f} x AdamW fused"
                f"  host {hosts[contender]:7.3f} ms"
                f" ({1e3 * hosts[contender] / len(shapes):.2f} µs per tensor)"
            )
        del steps
        torch.cuda.empty_cache()
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
