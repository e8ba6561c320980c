"""A whole training step of GPT-2 small on a GPU, protected and not: 8 sequences of 512 tokens.

Needs torch, transformers and cl_optim: `python bench/gpu_training_step.py --json training.json`.
Float32 weights, bfloat16 autocast; forward, backward, clipping and the optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_timing import milliseconds
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW
from cl_optim.ops import library

TURNS, ROUNDS = 7, 10
OPTIMIZERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
    "EWCAdamW": lambda model: protected(model),
    "EWCAdamW log8": lambda model: protected(model, importance_dtype="log8"),
    "EWCAdamW tracked": lambda model: protected(model, track_penalty=True),
}


def protected(model: torch.nn.Module, **options: str | bool) -> EWCAdamW:
    optimizer = EWCAdamW(model.named_parameters(), lr=1e-5, ewc_lambda=1.0, fused=True, **options)  # type: ignore[arg-type]
    optimizer.consolidate({name: torch.rand_like(p) for name, p in model.named_parameters()})
    return optimizer


def training_step(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer],
    config: GPT2Config,
    shape: tuple[int, int],
    device: str,
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(device)
    optimizer = make(model)
    tokens = torch.randint(config.vocab_size, shape, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the samples go")
    path = parser.parse_args().json
    if not library.available("cuda"):
        raise SystemExit(library.explain("cuda"))
    steps = {
        name: training_step(make, GPT2Config(), (8, 512), "cuda")
        for name, make in OPTIMIZERS.items()
    }
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):
        for name, step in steps.items():
            elapsed = milliseconds(step, ROUNDS)
            if turn > 0:  # the first one warms up
                turns[name].append(elapsed)
    for name, times in turns.items():
        ratio = statistics.median(a / b for a, b in zip(times, turns["AdamW fused"], strict=True))
        print(f"{name:20}{statistics.median(times):9.3f} ms  {ratio:6.3f} x AdamW fused")
    gpu, version = torch.cuda.get_device_name(), torch.__version__
    path.write_text(json.dumps({"gpu": gpu, "torch": version, "unit": "ms", "turns": turns}))


if __name__ == "__main__":
    main()
