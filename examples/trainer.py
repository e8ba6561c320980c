"""Fine-tune with transformers' Trainer in several processes, and keep what the model knew.

``torchrun --nproc-per-node 2 examples/trainer.py``: Trainer wraps the model in
DistributedDataParallel itself; the estimator is of the bare model.
"""

from __future__ import annotations

import argparse

import language_model as lm
import torch
from transformers import Trainer, TrainingArguments

import cl_optim
from cl_optim.integrations.huggingface import RetentionCallback


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Run the example."""
    old, new = lm.tokens(args)
    settings = TrainingArguments(
        output_dir=str(args.folder),
        max_steps=args.steps,
        per_device_train_batch_size=lm.BATCH,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = lm.model_of(args).to(device)
    optimizer = cl_optim.EWCAdamW(
        model.named_parameters(), lr=args.lr, penalty="proximal", strength=0.1
    )

    fisher = cl_optim.FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer, loss_terms="tokens"):
        Trainer(model, settings, train_dataset=rows(old), optimizers=(optimizer, None)).train()
    optimizer.consolidate(fisher.finalize(ranks="sum"))

    callback = RetentionCallback(lm.evaluations(old, new), budget=0.1, every=5)
    trainer = Trainer(
        model, settings, train_dataset=rows(new), optimizers=(optimizer, None),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        print(callback.guard.report())
        print(f"penalty: {optimizer.penalty():.4g}")


def rows(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return windows as Trainer takes them."""
    return [{"input_ids": row, "labels": row} for row in windows]


if __name__ == "__main__":
    lm.in_processes(train)
