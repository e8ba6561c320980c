"""What trainers of other packages are given: a small model, a protected optimizer, evaluations."""

from __future__ import annotations

import torch

from cl_optim import EWCAdamW
from cl_optim.retention import Evaluation


def protected(model):
    """An optimizer with importance and anchors, which a resumed run must get back."""
    optimizer = EWCAdamW(model.named_parameters(), lr=1e-2, ewc_lambda=3.0)
    torch.manual_seed(7)
    optimizer.consolidate({name: torch.rand_like(p) for name, p in model.named_parameters()})
    return optimizer


def distance(model):
    """How far the weights are from 0: it changes with every step and needs no data."""
    return sum(p.detach().square().sum().item() for p in model.parameters())


def watched(stop_below=None):
    """Two evaluations; the old one is forgotten at its third measurement if so wanted."""
    calls = []

    def old(model):
        calls.append(model)
        return 0.1 if stop_below is not None and len(calls) > stop_below else 1.0

    return [Evaluation("old", old), Evaluation("distance", distance, role="new")]


def tiny_gpt2(dropout=0.1):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def huggingface_trainer(folder, model, optimizer, callback, steps=6):
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]
    )


def tiny_llama():
    """A language model, and eight sequences of which some have no targets at their start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    data = [{"input_ids": t, "labels": t.clone()} for t in torch.randint(0, 13, (8, 5))]
    for k, row in enumerate(data):
        row["labels"][: k % 3] = -100
    return LlamaForCausalLM(config), data


def one_epoch(folder, model, data, optimizer, accumulation, **options):
    """A Trainer of transformers that does nothing but train, in batches of two."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        num_train_epochs=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        max_grad_norm=0.0, logging_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
