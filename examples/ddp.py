"""Fine-tune a language model with DistributedDataParallel, and keep what it knew.

``torchrun --nproc-per-node 2 examples/ddp.py``: learns an old task, while the Fisher information of
it is summed; protects it; learns a new one under a guard.
"""

from __future__ import annotations

import argparse

import language_model as lm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cl_optim
from cl_optim.retention import RetentionGuard


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Run the example."""
    old, new = lm.tokens(args)
    model = lm.model_of(args).to(device)
    parallel = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None
    )
    optimizer = cl_optim.EWCAdamW(
        model.named_parameters(), lr=args.lr, penalty="proximal", strength=0.1
    )

    # The estimator is of the bare model; it watches training, which goes through DDP's wrapper.
    fisher = cl_optim.FisherEstimator(model, during_training=True, decay=0.99)
    with fisher.attach(optimizer, loss_terms="tokens"):
        for batch in lm.batches(old, args.steps):
            lm.train_step(parallel, optimizer, batch)
    importance = fisher.finalize(ranks="sum")  # of the samples of all processes: all call it
    optimizer.consolidate(importance)
    if dist.get_rank() == 0:  # one of them keeps it for later
        log = cl_optim.ImportanceLog(args.folder / "importance")
        if "old" not in log:
            log.record("old", importance, model, dict(model.named_parameters()))

    guard = RetentionGuard(model, optimizer, lm.evaluations(old, new), budget=0.1, every=5)
    guard.start()
    for batch in lm.batches(new, args.steps, seed=1):
        lm.train_step(parallel, optimizer, batch)
        if guard.step():
            break
    guard.finish()
    if dist.get_rank() == 0:
        print(guard.report())
        print(f"penalty: {optimizer.penalty():.4g}")


if __name__ == "__main__":
    lm.in_processes(train)
