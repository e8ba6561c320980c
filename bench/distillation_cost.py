"""What distillation on stored outputs costs: a step in which a quarter of the batch is old text.

    python bench/distillation_cost.py [--json FILE] [--sequences 4] [--length 128] [--turns 7]

GPT-2 small with random weights. Plain: cross-entropy of all sequences, fused AdamW. With old text:
as many sequences, of which a quarter have KL to 64 stored outputs of each position in place of it.
They take turns; the memory is the largest of a process that does one of them only.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable

import cost_figures
import records
import torch
from training_step import adamw
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim.retention import Hidden, distillation_loss, top_k

KINDS = ("plain", "stored outputs", "stored outputs, from hidden states")


def steps(sequences: int, length: int) -> dict[str, Callable[[], None]]:
    """Return a training step of each kind, of one model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).train()
    optimizer = adamw(model)
    tokens = torch.randint(50257, (sequences, length))
    old = sequences // 4
    with torch.no_grad():
        stored = top_k(model(tokens[:old]).logits)

    def step(kind: str) -> None:
        optimizer.zero_grad()
        if kind == KINDS[0]:
            loss = model(input_ids=tokens, labels=tokens).loss
        else:
            states = model.transformer(tokens).last_hidden_state
            new = model.lm_head(states[old:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(new, tokens[old:, 1:].flatten())
            if kind == KINDS[1]:
                kept = distillation_loss(model.lm_head(states[:old]), stored)
            else:
                kept = distillation_loss(Hidden(states[:old], model.lm_head.weight), stored)
            loss = loss + (kept - loss) * (old / sequences)
        torch.autograd.backward(loss)
        optimizer.step()

    return {kind: lambda kind=kind: step(kind) for kind in KINDS}


def peak(kind: str, sequences: int, length: int) -> float:
    """Return the largest resident memory of a process that takes such steps, in MB."""
    one = steps(sequences, length)[kind]
    for _ in range(3):
        one()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    sizes = arguments.sequences, arguments.length
    spawn = multiprocessing.get_context("spawn")
    memory = {}
    for kind in KINDS:
        with spawn.Pool(1) as pool:
            memory[kind] = pool.apply(peak, (kind, *sizes))
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    every = steps(*sizes)
    for turn in range(arguments.turns + 1):
        for kind, step in every.items():
            start = time.perf_counter()
            step()
            if turn > 0:
                taken[kind].append(time.perf_counter() - start)
    figures = {"shape": sizes, "seconds": taken, "megabytes": memory}
    cost_figures.show(cost_figures.distillation(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
