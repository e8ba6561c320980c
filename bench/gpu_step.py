"""Time of one protected step on a GPU, by CUDA events; prints JSON and the ratios.

Needs nothing but torch and cl_optim: `python bench/gpu_step.py --json step-gpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from contenders import BFLOAT16_CONTENDERS, CONTENDERS, Problem, gpt2_shapes
from gpu_timing import milliseconds

from cl_optim.ops import library

TURNS, ROUNDS = 7, 20
SETS = {
    "GPT-2 149 tensors 163 M": (gpt2_shapes(embeddings=True), torch.float32),
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
        for turn in range(TURNS + 1):
            for contender, step in steps.items():
                time = milliseconds(step, ROUNDS)
                if turn > 0:  # the first one warms up
                    turns[contender].append(time)
        report[name] = turns
        plain = turns["AdamW fused"]
        print(name)
        for contender, times in turns.items():
            ratio = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            print(f"  {contender:32}{statistics.median(times):9.3f} ms  {ratio:6.2f} x AdamW fused")
        del steps
        torch.cuda.empty_cache()
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
