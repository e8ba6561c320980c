"""Fine-tune a language model sharded by fully_shard (FSDP2), and keep what it knew.

``torchrun --nproc-per-node 2 examples/fsdp2.py``: as ``ddp.py``, but each process has a part of the
weights, of the optimizer's state, of importance and anchors; the guard writes checkpoints.
"""

from __future__ import annotations

import argparse

import language_model as lm
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import cl_optim
from cl_optim.retention import RetentionGuard


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Run the example."""
    old, new = lm.tokens(args)
    model = lm.model_of(args).to(device)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = cl_optim.EWCAdamW(
        model.named_parameters(),
        lr=args.lr,
        penalty="proximal",
        strength=0.1,
        importance_dtype="log8",
    )

    fisher = cl_optim.FisherEstimator(model, during_training=True, decay=0.99)
    with fisher.attach(optimizer, loss_terms="tokens"):
        for batch in lm.batches(old, args.steps):
            lm.train_step(model, optimizer, batch)
    importance = fisher.finalize()  # DTensors, of the samples of all processes
    optimizer.consolidate(importance)
    log = cl_optim.ImportanceLog(args.folder / "importance")
    if "old" not in log:  # gathered tensor by tensor; the first process writes
        log.record("old", importance, model, dict(model.named_parameters()))

    # A forward pass is one of all processes: each evaluates, and the mean counts.
    guard = RetentionGuard(
        model,
        optimizer,
        lm.evaluations(old, new),
        budget=0.1,
        every=5,
        folder=args.folder / "guard",
    )
    guard.start()
    for batch in lm.batches(new, args.steps, seed=1):
        lm.train_step(model, optimizer, batch)
        if guard.step():
            break
    guard.finish()
    penalty = optimizer.penalty()  # a sum over all processes: all call it
    if dist.get_rank() == 0:
        print(guard.report())
        print(f"penalty: {penalty:.4g}")


if __name__ == "__main__":
    lm.in_processes(train)
