"""Real trainers with a protected optimizer and a guard: train, save, resume, the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from test_checkpoint import flatten
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cl_optim import EWCAdamW
from cl_optim.retention import Evaluation


def protected(model):
    """An optimizer with importance and anchors, which a resumed run must get back."""
    optimizer = EWCAdamW(model.named_parameters(), lr=1e-2, ewc_lambda=3.0)
    torch.manual_seed(7)
    optimizer.consolidate({name: torch.rand_like(p) for name, p in model.named_parameters()})
    return optimizer


def fresh(optimizer_of, model):
    """An optimizer without protection: what it has after a resume came from the checkpoint."""
    return optimizer_of(model.named_parameters(), lr=1e-2, ewc_lambda=3.0)


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


def values(guard):
    return [[(m.evaluation.name, m.value) for m in check.measured] for check in guard.history]


# --- Hugging Face ---------------------------------------------------------------------------------


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
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


def test_huggingface_resumes_with_the_same_weights_and_guard(tmp_path):
    from cl_optim.integrations.huggingface import RetentionCallback

    model = tiny_gpt2()
    optimizer = protected(model)
    callback = RetentionCallback(watched(), every=2)
    huggingface_trainer(tmp_path, model, optimizer, callback).train()
    assert callback.guard.steps == 6
    assert [check.step for check in callback.guard.history] == [0, 2, 4, 6]

    again = tiny_gpt2()
    resumed = RetentionCallback(watched(), every=2)
    trainer = huggingface_trainer(tmp_path, again, fresh(EWCAdamW, again), resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert flatten(again.state_dict()) == flatten(model.state_dict())
    assert trainer.optimizer.optimizer.penalty() == optimizer.penalty() > 0
    assert resumed.guard.baselines == callback.guard.baselines
    assert values(resumed.guard) == values(callback.guard)


def test_huggingface_stops_and_rolls_back(tmp_path):
    from cl_optim.integrations.huggingface import RetentionCallback

    model = tiny_gpt2()
    callback = RetentionCallback(
        watched(stop_below=2), every=2, on_breach="rollback", folder=tmp_path / "guard"
    )
    trainer = huggingface_trainer(tmp_path, model, protected(model), callback)
    trainer.train()
    assert trainer.state.global_step == 4
    other = tiny_gpt2()
    reference = RetentionCallback(watched(), every=2)
    huggingface_trainer(tmp_path / "b", other, protected(other), reference, steps=6).train()
    good = values(reference.guard)[1]
    assert distance(model) == dict(good)["distance"]  # of step 2


def test_huggingface_resumes_two_guards_each_with_its_own_state(tmp_path):
    from cl_optim.integrations.huggingface import RetentionCallback

    def callbacks():
        other = Evaluation("other", lambda model: 2.0)
        return [RetentionCallback(watched(), every=2), RetentionCallback([other], every=3)]

    model, (first, second) = tiny_gpt2(), callbacks()
    trainer = huggingface_trainer(tmp_path, model, protected(model), first)
    trainer.add_callback(second)
    trainer.train()
    again, (third, fourth) = tiny_gpt2(), callbacks()
    trainer = huggingface_trainer(tmp_path, again, fresh(EWCAdamW, again), third)
    trainer.add_callback(fourth)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert values(third.guard) == values(first.guard)
    assert values(fourth.guard) == values(second.guard)


def test_huggingface_with_other_evaluations_is_a_sentence(tmp_path):
    from cl_optim.integrations.huggingface import RetentionCallback

    model = tiny_gpt2()
    callback = RetentionCallback(watched(), every=2)
    huggingface_trainer(tmp_path, model, protected(model), callback).train()
    other = RetentionCallback([Evaluation("other", lambda model: 1.0)], every=2)
    trainer = huggingface_trainer(tmp_path, model, fresh(EWCAdamW, model), other)
    with pytest.raises(ValueError, match="resume with the evaluations that it was begun with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- Lightning ------------------------------------------------------------------------------------


def lightning_module(optimizer_of):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = optimizer_of(self)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [schedule]

    return Module()


def lightning_fit(folder, module, callback, epochs, resume=None):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(3)
    data = TensorDataset(torch.randn(24, 4), torch.randint(0, 2, (24,)))
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    with warnings.catch_warnings():
        # Lightning's advice on workers, and on its own logging interval.
        warnings.filterwarnings("ignore", module="lightning")
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback, keep], accumulate_grad_batches=2,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, 3), ckpt_path=resume)
    return trainer


def test_lightning_resumes_with_the_same_weights_and_guard(tmp_path):
    from cl_optim.integrations.lightning import RetentionCallback

    callback, module = RetentionCallback(watched(), every=2), lightning_module(protected)
    module.net[2] = nn.Identity()  # Lightning does not restore random states
    trainer = lightning_fit(tmp_path, module, callback, epochs=2)
    assert callback.guard.steps == trainer.global_step == 8

    resumed = RetentionCallback(watched(), every=2)
    again = lightning_module(lambda module: fresh(EWCAdamW, module))
    again.net[2] = nn.Identity()
    other = lightning_fit(tmp_path, again, resumed, 2, resume=tmp_path / "epoch=0.ckpt")
    assert other.global_step == 8
    assert flatten(again.state_dict()) == flatten(module.state_dict())
    assert other.optimizers[0].penalty() == trainer.optimizers[0].penalty() > 0
    assert values(resumed.guard) == values(callback.guard)
    lightning_fit(tmp_path / "anew", again, resumed, 1)  # begins anew, from the weights now
    assert resumed.guard.history[0].step == 0
    assert resumed.guard.baselines["distance"] != callback.guard.baselines["distance"]


def test_lightning_stops_and_rolls_back(tmp_path):
    from cl_optim.integrations.lightning import RetentionCallback

    module = lightning_module(protected)
    callback = RetentionCallback(
        watched(stop_below=2), every=2, on_breach="rollback", folder=tmp_path / "guard"
    )
    trainer = lightning_fit(tmp_path, module, callback, epochs=2)
    assert trainer.global_step == 4
    good = dict(values(callback.guard)[1])["distance"]
    assert distance(module) == good


def test_lightning_with_several_optimizers_is_a_sentence():
    from types import SimpleNamespace

    from cl_optim.integrations.lightning import RetentionCallback

    with pytest.raises(ValueError, match="needs a module with one optimizer, not 2"):
        RetentionCallback(watched()).on_train_start(SimpleNamespace(optimizers=[1, 2]), None)


# --- Accelerate -----------------------------------------------------------------------------------


def accelerated(optimizer_of, evaluations):
    from accelerate import Accelerator

    from cl_optim.integrations.accelerate import retention_guard

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    guard = retention_guard(accelerator, model, optimizer, evaluations, every=2)
    return accelerator, model, optimizer, guard


def accelerate_train(accelerator, model, optimizer, guard, batches):
    for x in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and guard.step():
            return


def test_accelerate_resumes_with_the_same_weights_and_guard(tmp_path):
    batches = torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(2))
    run = accelerated(protected, watched())
    accelerator, model, optimizer, guard = run
    guard.start()
    accelerate_train(*run, batches[:8])
    accelerator.save_state(str(tmp_path), safe_serialization=True)
    accelerate_train(*run, batches[8:])
    assert guard.steps == 8

    again = accelerated(lambda model: fresh(EWCAdamW, model), watched())
    again[0].load_state(str(tmp_path))
    assert again[3].steps == 4
    accelerate_train(*again, batches[8:])
    assert flatten(again[1].state_dict()) == flatten(model.state_dict())
    assert again[2].optimizer.penalty() == optimizer.optimizer.penalty() > 0
    assert values(again[3]) == values(guard)


# --- all ------------------------------------------------------------------------------------------


def test_the_guards_state_is_json():
    from test_guard import guard_of, scripted

    guard = guard_of(scripted(1.0, 0.5), on_breach="raise_lambda")
    guard.start()
    guard.step()
    state = guard.state_dict()
    assert json.loads(json.dumps(state)) == state


def test_importing_the_package_loads_no_trainer():
    code = (
        "import sys, cl_optim, cl_optim.retention, cl_optim.integrations\n"
        "heavy = {'transformers', 'lightning', 'accelerate', 'torchao', 'peft', 'matplotlib', "
        "'sklearn', 'triton', 'tensorboard'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
