"""Fine-tune with Lightning's ModelParallelStrategy (fully_shard), and keep what the model knew.

``python examples/lightning_fsdp2.py`` starts a process for each GPU, or two on a CPU.
"""

from __future__ import annotations

import language_model as lm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import cl_optim
from cl_optim.integrations.lightning import RetentionCallback


class Module(LightningModule):
    """A language model whose old task is protected before the new one is learned."""

    def __init__(self, args, old: torch.Tensor) -> None:
        super().__init__()
        self._args, self._old = args, old
        self.model: torch.nn.Module | None = None

    def configure_model(self) -> None:
        """Shard the model where the strategy has made its mesh."""
        if self.model is not None:
            return
        self.model = lm.model_of(self._args).to(self.device)
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Protect what the model knows, by a pass over the old task's samples."""
        optimizer = cl_optim.EWCAdamW(
            self.model.named_parameters(), lr=self._args.lr, penalty="proximal", strength=0.1
        )
        batches = [
            {name: value.to(self.device) for name, value in batch.items()}
            for batch in lm.batches(self._old, 4)
        ]
        optimizer.consolidate(
            cl_optim.estimate_fisher(self.model, batches, "empirical", progress=False)
        )
        return optimizer

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        return self.model(**batch).loss


def main() -> None:
    """Run the example."""
    args = lm.arguments(__doc__)
    old, new = lm.tokens(args)
    module = Module(args, old)
    callback = RetentionCallback(
        lm.evaluations(old, new, inner=lambda module: module.model),
        on_breach="stop",
        every=5,
    )
    is_cuda = torch.cuda.is_available()
    trainer = Trainer(
        accelerator="cuda" if is_cuda else "cpu",
        devices=torch.cuda.device_count() if is_cuda else 2,
        strategy=ModelParallelStrategy(
            data_parallel_size=torch.cuda.device_count() if is_cuda else 2, tensor_parallel_size=1
        ),
        max_steps=args.steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in new]
    trainer.fit(module, DataLoader(rows, batch_size=lm.BATCH))
    if trainer.is_global_zero:
        print(callback.guard.report())


if __name__ == "__main__":
    main()
