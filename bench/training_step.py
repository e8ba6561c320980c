"""A whole training step of GPT-2 small, protected and not: forward, backward, clipping, optimizer.

    python bench/training_step.py --json training.json --batch 2 --length 128

On the CPU, in float32; gpu/training.py measures the same steps on a GPU. The contenders take turns,
and the ratios are medians of those within a turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import cost_figures
import records
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def ewc(model: nn.Module) -> torch.optim.Optimizer:
    return protect(EWCAdamW(model.named_parameters(), lr=1e-5, ewc_lambda=1.0, fused=True))


def ewc_log8(model: nn.Module) -> torch.optim.Optimizer:
    return protect(
        EWCAdamW(
            model.named_parameters(), lr=1e-5, ewc_lambda=1.0, fused=True, importance_dtype="log8"
        )
    )


def protect(optimizer: EWCAdamW) -> EWCAdamW:
    (group,) = optimizer.param_groups
    named = zip(group["param_names"], group["params"], strict=True)
    optimizer.consolidate({name: torch.rand_like(param) for name, param in named})
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": adamw,
    "EWCAdamW": ewc,
    "EWCAdamW log8": ewc_log8,
}


def backward(model: nn.Module, tokens: Tensor) -> None:
    """Forward and backward; on a GPU under bfloat16 autocast."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        loss = model(input_ids=tokens, labels=tokens).loss
    torch.autograd.backward(loss)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    """Take a whole training step."""
    backward(model, tokens)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def training_step(
    make: Callable[[nn.Module], torch.optim.Optimizer], config: GPT2Config, tokens: Tensor
) -> Callable[[], None]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(tokens.device)
    optimizer = make(model)
    return lambda: step(model, optimizer, tokens)


def milliseconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    config = GPT2Config()
    tokens = torch.randint(config.vocab_size, (arguments.batch, arguments.length))
    steps = {name: training_step(make, config, tokens) for name, make in OPTIMIZERS.items()}
    turns: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.turns + 1):
        for name, step in steps.items():
            taken = milliseconds(step)
            if turn > 0:  # the first one warms up
                turns[name].append(taken)
    figures = {"shape": [arguments.batch, arguments.length], "ms": turns}
    cost_figures.show(cost_figures.training_step(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
