"""What the examples share: a small language model, and batches of two tasks.

``--model NAME`` takes one of transformers' models instead, with its tokenizer, and ``--old FILE``
and ``--new FILE`` text of your own.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cl_optim.retention import Evaluation

OLD = "the old task counts upwards: " + " ".join(map(str, range(200)))
NEW = "the new task counts downwards: " + " ".join(map(str, range(200, 0, -1)))
LENGTH, BATCH = 32, 4


def arguments(what: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", help="a name or folder for transformers; default: a tiny Llama")
    parser.add_argument("--old", type=Path, help="text of the old task")
    parser.add_argument("--new", type=Path, help="text of the new task")
    parser.add_argument("--steps", type=int, default=20, help="of learning the new task")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/example"))
    return parser.parse_args()


def tokens(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return windows of the old and of the new task's tokens, [N, LENGTH] each."""
    texts = [
        default if path is None else path.read_text(encoding="utf-8")
        for path, default in ((args.old, OLD), (args.new, NEW))
    ]
    if args.model is None:
        ids = [torch.tensor(list(text.encode())) for text in texts]
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    old, new = (one[: len(one) // LENGTH * LENGTH].view(-1, LENGTH) for one in ids)
    return old, new


def model_of(args: argparse.Namespace) -> nn.Module:
    """Return the model, on the CPU, the same in all processes."""
    torch.manual_seed(0)
    if args.model is not None:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(args.model)
        return model
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(windows: Tensor, steps: int, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yield batches, each process its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(steps):
        chosen = windows[torch.randint(0, len(windows), (BATCH,), generator=generator)]
        yield {"input_ids": chosen, "labels": chosen}


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Take one step."""
    device = next(model.parameters()).device
    optimizer.zero_grad()
    model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
    optimizer.step()


def evaluations(
    old: Tensor, new: Tensor, inner: Callable[[Any], Any] = lambda model: model
) -> list[Evaluation]:
    """Return what a guard measures: the loss on each task; ``inner`` finds the language model."""
    return [
        Evaluation(
            name,
            lambda model, windows=windows: loss_of(inner(model), windows),
            role=name,
            higher_is_better=False,
        )
        for name, windows in (("old", old), ("new", new))
    ]


def loss_of(model: Any, windows: Tensor) -> float:
    """Return the mean loss of at most eight windows, in nats a token."""
    chosen = windows[:8].to(next(model.parameters()).device)
    return float(model(input_ids=chosen, labels=chosen).loss)


def in_processes(train: Callable[[argparse.Namespace, torch.device], None]) -> None:
    """Join the processes that torchrun has started, train on this one's device, and leave them.

    What training has made is gone by then: a wrapper that outlives its processes' group waits for
    it at its end.
    """
    args = arguments(sys.modules["__main__"].__doc__)
    is_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if is_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    train(args, device)
    gc.collect()
    dist.destroy_process_group()
