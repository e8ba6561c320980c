"""What the reader of an example has already: a model, data, a training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cl_optim
from cl_optim.retention import Evaluation, RetentionGuard

N, FEATURES, CLASSES = 12, 4, 3


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(0, CLASSES, (N,), generator=generator))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def classification() -> dict[str, Any]:
    """A classifier, two tasks, and an optimizer and importance for it."""
    model = Classifier()
    old, new = (DataLoader(data(seed), batch_size=4) for seed in (1, 2))
    optimizer = cl_optim.EWCAdamW(model.named_parameters(), lr=1e-2)

    def accuracy(model: nn.Module, loader: DataLoader[Any] = old) -> float:
        return float(torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean())

    def train_step(*batch: Any) -> None:
        """Takes a batch, or its parts."""
        train(model, optimizer, [batch[0] if len(batch) == 1 else batch])

    english = Evaluation("English", accuracy)
    importance = cl_optim.estimate_fisher(model, old)
    kept_x, kept_y = next(iter(old))
    return {
        "cl_optim": cl_optim, "torch": torch, "nn": nn, "F": F,
        "model": model, "optimizer": optimizer, "opt": optimizer, "importance": importance,
        "train": train, "train_step": train_step, "loss": F.cross_entropy,
        "loss_fn": F.cross_entropy, "cross_entropy": F.cross_entropy,
        "task_a": old, "task_b": new, "task_c": new, "task_a_batches": old, "batches": old,
        "old_loader": old, "new_loader": new, "loader": new,
        "kept_x": kept_x, "kept_y": kept_y, "x_kept": kept_x, "y_kept": kept_y, "x": kept_x,
        "bits_per_byte": accuracy, "accuracy_on_old": accuracy,
        "accuracy_on_new": lambda model: accuracy(model, new),
        "evaluations": [english], "english": english,
        "RetentionGuard": RetentionGuard,
        "old_texts": ["the cat sat on the mat", "a dog ran"], "new_texts": ["x = f(y)", "del x"],
        "make_column": Classifier,
        "my_kernel": torch.mul,
    }  # fmt: skip


def page_scene(block: str, folder: Path) -> dict[str, Any]:
    """What a block of README or of a page in docs goes on from."""
    import accelerate

    if "trainer.train()" in block:
        scene = huggingface(folder)
    elif "integrations.lightning" in block:
        return lightning(folder)
    elif "import peft" in block:
        return {**language(), "torch": torch}
    else:
        scene = classification()
    if "integrations.avalanche" in block:
        scene |= avalanche()
    model = scene["model"]
    if "trainer.train()" in block:
        optimizer = scene["optimizer"] = cl_optim.EWCAdamW(model.named_parameters())
        scene["trainer"] = scene["Trainer"](
            model, scene["args"], train_dataset=scene["data"], optimizers=(optimizer, None)
        )
    if "language_model" in block:
        scene["language_model"] = language()["model"]
        scene["language_model"].config.bos_token_id = 1
    if "base.safetensors" in block:
        save_file(model.state_dict(), "base.safetensors")
        scene["train_step"](scene["new_loader"].dataset[:4])
    if "fisher.attach" in block:
        scene["fisher"] = cl_optim.FisherEstimator(model, during_training=True)
    if "ImportanceLog" in block:
        cl_optim.ImportanceLog("runs/support-bot").record("returns", scene["importance"])
    if "opt.remember" in block:
        scene["opt"] = cl_optim.GEM(scene["opt"])
    return {
        **scene,
        "scaler": torch.amp.GradScaler("cpu"),
        "accelerator": accelerate.Accelerator(cpu=True),
        "decay": [p for p in model.parameters() if p.dim() > 1],
        "no_decay": [p for p in model.parameters() if p.dim() == 1],
    }


def language() -> dict[str, Any]:
    """A causal language model of transformers."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    tokens = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens.split(4)]
    return {
        "cl_optim": cl_optim, "peft": peft, "model": transformers.LlamaForCausalLM(config),
        "batches": batches, "batch": batches[0],
        "old_batches": batches[:1], "new_batches": batches[1:],
        "loss": lambda model, batch: model(**batch).loss,
    }  # fmt: skip


def huggingface(folder: Path) -> dict[str, Any]:
    """Hugging Face's Trainer for it."""
    import transformers

    scene = language()
    rows = scene["batch"]["input_ids"]
    scene["importance"] = cl_optim.estimate_fisher(
        scene["model"], scene["batches"], labels="sample"
    )
    scene["data"] = [{"input_ids": row, "labels": row} for row in rows]
    scene["Trainer"] = transformers.Trainer
    scene["args"] = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    scene["english"] = Evaluation(
        "English", lambda model: float(model(**scene["batch"]).loss), higher_is_better=False
    )
    return scene


def lightning(folder: Path) -> dict[str, Any]:
    """A LightningModule, and a Trainer that is quiet."""
    import functools

    from lightning import pytorch

    scene = classification()

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return cl_optim.EWCAdamW(self.named_parameters())

    scene["module"] = Module()
    scene["english"] = Evaluation(
        "English", lambda module: float(module.training_step(next(iter(scene["loader"]))))
    )
    scene["Trainer"] = functools.partial(
        pytorch.Trainer, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    return scene


def avalanche() -> dict[str, Any]:
    """A benchmark of Avalanche, a model for it, and its plainest strategy."""
    import avalanche_cases

    return {
        "cl_optim": cl_optim, "torch": torch, "Naive": avalanche_cases.Naive,
        "benchmark": avalanche_cases.benchmark(), "model": avalanche_cases.mlp(),
    }  # fmt: skip
