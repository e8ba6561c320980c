"""Fine-tune a language model with DistributedDataParallel, and keep what it knew.

``torchrun --nproc-per-node 2 examples/ddp.py``: learns an old task, while the Fisher information of
it is summed; protects it; learns a new one under a guard.
"""

from __future__ import annotations

import language_model as lm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import cl_optim
from cl_optim.retention import Evaluation, RetentionGuard


def main() -> None:
    """Run the example."""
    args = lm.arguments(__doc__)
    device = lm.start()
    old, new = lm.tokens(args)
    model = lm.model_of(args).to(device)
    parallel = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None
    )
    optimizer = cl_optim.EWCAdamW(model.named_parameters(), lr=args.lr, strength=0.1)

    # The estimator is of the bare model; it watches training, which goes through DDP's wrapper.
    fisher = cl_optim.FisherEstimator(model, during_training=True, decay=0.99)
    with fisher.attach(optimizer, loss_terms="tokens"):
        for batch in lm.batches(old, args.steps):
            train_step(parallel, optimizer, batch, device)
    importance = fisher.finalize(ranks="sum")  # of the samples of all processes: all call it
    optimizer.consolidate(importance)
    if dist.get_rank() == 0:  # one of them keeps it for later
        log = cl_optim.ImportanceLog(args.folder / "importance")
        if "old" not in log:
            log.record("old", importance, model, dict(model.named_parameters()))

    guard = RetentionGuard(
        model,
        optimizer,
        [
            Evaluation("old", lambda m: lm.loss_of(m, old, device), higher_is_better=False),
            Evaluation(
                "new", lambda m: lm.loss_of(m, new, device), role="new", higher_is_better=False
            ),
        ],
        budget=0.1,
        every=5,
    )
    guard.start()
    for batch in lm.batches(new, args.steps, seed=1):
        train_step(parallel, optimizer, batch, device)
        if guard.step():
            break
    guard.finish()
    if dist.get_rank() == 0:
        print(guard.report())
        print(f"penalty: {optimizer.penalty():.4g}")
    dist.destroy_process_group()


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    """Take one step."""
    optimizer.zero_grad()
    model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
