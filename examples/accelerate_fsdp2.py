"""Fine-tune with Accelerate's FSDP2, which exchanges the optimizer's parameters for shards.

``torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py``: ``prepare()`` first, then everything
that is of the weights: the estimator, ``consolidate()``, the guard. On a CPU, where Accelerate has
no FSDP, it is DistributedDataParallel.
"""

from __future__ import annotations

import language_model as lm
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

import cl_optim
from cl_optim.integrations.accelerate import retention_guard


def main() -> None:
    """Run the example."""
    args = lm.arguments(__doc__)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    old, new = lm.tokens(args)
    model = lm.model_of(args)
    optimizer = cl_optim.EWCAdamW(
        model.named_parameters(), lr=args.lr, penalty="proximal", strength=0.1
    )
    model, prepared = accelerator.prepare(model, optimizer)

    bare = accelerator.unwrap_model(model)
    fisher = cl_optim.FisherEstimator(bare, during_training=True, decay=0.99)
    with fisher.attach(optimizer, loss_terms="tokens"):
        for batch in lm.batches(old, args.steps):
            train_step(accelerator, model, prepared, batch)
    optimizer.consolidate(fisher.finalize(ranks="sum"))  # all processes call it

    guard = retention_guard(
        accelerator,
        model,
        prepared,
        lm.evaluations(old, new),
        budget=0.1,
        every=5,
    )
    guard.start()
    for batch in lm.batches(new, args.steps, seed=1):
        train_step(accelerator, model, prepared, batch)
        if guard.step():
            break
    guard.finish()
    penalty = optimizer.penalty()
    accelerator.print(guard.report())
    accelerator.print(f"penalty: {penalty:.4g}")
    accelerator.end_training()


def train_step(accelerator: Accelerator, model: object, optimizer: object, batch: dict) -> None:
    """Take one step."""
    optimizer.zero_grad()
    batch = {name: value.to(accelerator.device) for name, value in batch.items()}
    accelerator.backward(model(**batch).loss)
    optimizer.step()


if __name__ == "__main__":
    main()
