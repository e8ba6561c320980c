"""Real trainers with a protected optimizer and a guard: train, save, resume, the same weights."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings

import pytest
import torch
from guard_cases import flatten, guard_of, scripted
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_cases import distance, huggingface_trainer, protected, tiny_gpt2, watched

from cl_optim import EWC, GEM, EWCAdamW
from cl_optim.retention import Evaluation


def fresh(optimizer_of, model):
    """An optimizer without protection: what it has after a resume came from the checkpoint."""
    return optimizer_of(model.named_parameters(), lr=1e-2, ewc_lambda=3.0)


class Witness:
    """A GEM with a memory of a loss, and what its steps did: one for each trainer, and the loop.

    Attributes:
        refreshed: For each step whether the row was the loss's gradient at the weights before it.
        conflicts: For each step the cosine of gradient and row, and whether the row was added.
    """

    REFRESH_EVERY = 2

    def __init__(self, inner, model, loss):
        self.gem = GEM(inner)
        self.params = list(model.parameters())
        self.loss = loss
        self.gem.remember("old", lambda: loss().backward(), self.REFRESH_EVERY)
        self.refreshed, self.conflicts = [], []

    def before_step(self):
        with torch.enable_grad():
            self.fresh = torch.autograd.grad(self.loss(), self.params)

    def after_step(self):
        rows = self.gem.state_dict()["gem"]["rows"].values()
        pairs = zip(rows, self.fresh, strict=True)
        self.refreshed.append(all(torch.equal(row[0], grad) for row, grad in pairs))
        active = self.gem.last_projection.active.item()
        self.conflicts.append((self.gem.conflicts().item(), active))

    def check(self, model, other, plain, steps):
        """Compare with the plain loop, from the first of its steps that this has taken on."""
        assert self.refreshed == [step % self.REFRESH_EVERY == 0 for step in steps]
        assert self.conflicts == [plain.conflicts[step] for step in steps]
        assert any(active for _, active in self.conflicts)
        assert flatten(model.state_dict()) == flatten(other.state_dict())


def protected_in_gem(model, loss, optimizer_of=protected):
    return Witness(optimizer_of(model), model, loss)


def values(guard):
    return [[(m.evaluation.name, m.value) for m in check.measured] for check in guard.history]


# --- Hugging Face ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("on_breach", [None, "stop", "rollback", ("rollback", "raise_lambda")])
def test_huggingface_loads_no_other_weights_after_a_breach(tmp_path, on_breach):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from cl_optim.integrations.huggingface import RetentionCallback

    args = TrainingArguments(
        str(tmp_path), load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps"
    )
    model = tiny_gpt2()
    given = {"model": model, "optimizer": protected(model), "lr_scheduler": None}
    for options in ({"on_breach": on_breach}, {"budget": 0.1}):
        callback = RetentionCallback(watched(), folder=tmp_path / "guard", **options)
        begin = functools.partial(callback.on_train_begin, args, TrainerState(), TrainerControl())
        if "budget" in options:
            begin(**given)
            continue
        with pytest.raises(ValueError, match=r"load_best_model_at_end.* give the guard a budget"):
            begin(**given)


def far(model, start):
    """1 plus a distance: a budget is of the distance."""
    return (
        1.0
        + sum(
            (p.detach() - old).square().sum().item()
            for p, old in zip(model.parameters(), start, strict=True)
        )
        ** 0.5
    )


def test_huggingface_keeps_a_budget(tmp_path):
    from cl_optim.integrations.huggingface import RetentionCallback

    model = tiny_gpt2()
    start = [p.detach().clone() for p in model.parameters()]
    old = Evaluation("old", lambda now: far(now, start), higher_is_better=False)
    callback = RetentionCallback([old], budget=0.1, every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    huggingface_trainer(tmp_path, model, optimizer, callback).train()
    assert [check.step for check in callback.guard.history] == [0, 2, 4, 6, 6]
    assert callback.guard.history[-2].measured[0].loss > 0.1
    assert 0.05 < far(model, start) - 1.0 <= 0.1 + 1e-6


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


def huggingface_watch(witness):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            witness.before_step()

        def on_optimizer_step(self, *args, **kwargs):
            witness.after_step()

    return Watch()


def old_texts(model):
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(9))
    return lambda: model(tokens, labels=tokens.flip(0)).loss


def token_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def gem_trainer(folder, model, optimizers, callback, **options):
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no", max_grad_norm=0.5,
    )  # fmt: skip
    return InOrder(
        model, arguments, train_dataset=new_texts(), compute_loss_func=token_loss,
        optimizers=optimizers, callbacks=[callback], **options,
    )  # fmt: skip


def new_texts():
    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


def plain_huggingface_loop(optimizer_of):
    """What the Trainer of the tests below does, in six lines."""
    model = tiny_gpt2(dropout=0.0)
    witness = protected_in_gem(model, old_texts(model), optimizer_of)
    scheduler = halving(witness.gem)
    tokens = torch.stack([row["input_ids"] for row in new_texts()]).view(6, 2, 2, 8)
    for parts in tokens:
        for part in parts:
            token_loss(model(part), part, num_items_in_batch=2 * 2 * 8).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        witness.before_step()
        witness.gem.step()
        witness.after_step()
        scheduler.step()
        witness.gem.zero_grad()
    return model, witness


@pytest.mark.parametrize("kind", ["ewc", "adamw"])
def test_huggingface_trains_and_resumes_gem_as_a_plain_loop_does(tmp_path, kind):
    def optimizer_of(model):
        return protected(model) if kind == "ewc" else torch.optim.AdamW(model.parameters(), lr=1e-2)

    expected, plain = plain_huggingface_loop(optimizer_of)
    model = tiny_gpt2(dropout=0.0)
    witness = protected_in_gem(model, old_texts(model), optimizer_of)
    optimizers = witness.gem, halving(witness.gem)
    gem_trainer(tmp_path, model, optimizers, huggingface_watch(witness)).train()
    witness.check(model, expected, plain, range(6))

    again = tiny_gpt2(dropout=0.0)
    resumed = protected_in_gem(
        again,
        old_texts(again),
        (lambda model: fresh(EWCAdamW, model)) if kind == "ewc" else optimizer_of,
    )
    optimizers = resumed.gem, halving(resumed.gem)
    trainer = gem_trainer(tmp_path, again, optimizers, huggingface_watch(resumed))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed.check(again, expected, plain, range(3, 6))


def test_huggingface_makes_the_gem_itself(tmp_path):
    """The memory comes when training begins, after the checkpoint has been loaded."""
    from transformers import TrainerCallback

    class Factory:  # the Trainer calls an instance of what is no torch optimizer
        def __call__(self, model, **options):
            return GEM(torch.optim.AdamW(model.parameters(), **options), memory_strength=0.1)

    def run(**resume):
        model, conflicts = tiny_gpt2(dropout=0.0), []
        loss = old_texts(model)

        class Remember(TrainerCallback):
            def on_train_begin(self, *args, optimizer, **kwargs):
                optimizer.optimizer.remember("old", lambda: loss().backward(), refresh_every=2)

            def on_optimizer_step(self, *args, optimizer, **kwargs):
                conflicts.append(optimizer.optimizer.conflicts().item())

        made = {"optimizer_cls_and_kwargs": (Factory, {"lr": 1e-2})}
        gem_trainer(tmp_path, model, (None, None), Remember(), **made).train(**resume)
        return model, conflicts

    model, conflicts = run()
    again, resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert min(conflicts) < 0
    assert resumed == conflicts[3:]
    assert flatten(again.state_dict()) == flatten(model.state_dict())


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
    # A checkpoint that is tested meanwhile changes nothing.
    saved = callback.state_dict()
    callback.setup(trainer, again, "test")
    callback.load_state_dict(saved)
    lightning_fit(tmp_path / "again", again, callback, 1)
    assert callback.guard.history[0].step == 0


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


def test_lightning_keeps_a_budget(tmp_path):
    from cl_optim.integrations.lightning import RetentionCallback

    module = lightning_module(lambda one: torch.optim.AdamW(one.parameters(), lr=0.1))
    start = [p.detach().clone() for p in module.parameters()]
    old = Evaluation("old", lambda now: far(now, start), higher_is_better=False)
    callback = RetentionCallback([old], budget=0.1, every=2)
    lightning_fit(tmp_path, module, callback, epochs=2)
    assert callback.guard.history[-2].measured[0].loss > 0.1
    assert 0.05 < far(module, start) - 1.0 <= 0.1 + 1e-6


def test_lightning_with_several_optimizers_is_a_sentence():
    from types import SimpleNamespace

    from cl_optim.integrations.lightning import RetentionCallback

    with pytest.raises(ValueError, match="needs a module with one optimizer, not 2"):
        RetentionCallback(watched()).on_train_start(SimpleNamespace(optimizers=[1, 2]), None)


def opposite(net):
    """An old task that the new one contradicts."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
    y = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(5))
    return lambda: F.cross_entropy(net(x), y)


def lightning_gem(optimizer_of):
    """A module that makes a GEM, remembers and is watched."""

    def gem_of(module):
        module.witness = protected_in_gem(module, opposite(module.net), optimizer_of)
        return module.witness.gem

    module = lightning_module(gem_of)
    module.net[2] = nn.Identity()  # Lightning does not restore random states
    module.on_before_optimizer_step = lambda optimizer: module.witness.before_step()
    return module


def lightning_watch(module):
    from lightning.pytorch import Callback

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step > self.step:  # gradients are not being accumulated
                self.step = trainer.global_step
                module.witness.after_step()

        def on_train_start(self, trainer, pl_module):
            self.step = trainer.global_step

    return Watch()


def test_lightning_trains_and_resumes_gem_as_a_plain_loop_does(tmp_path):
    """Its optimizers step with a closure, which computes the loss and its gradient."""
    expected = lightning_gem(protected)
    (gem,), (scheduler,) = expected.configure_optimizers()
    torch.manual_seed(3)
    x, y = torch.randn(24, 4), torch.randint(0, 2, (24,))
    for _ in range(2):
        for parts in zip(x.view(4, 2, 3, 4), y.view(4, 2, 3), strict=True):
            for part in zip(*parts, strict=True):
                (expected.training_step(part, 0) / 2).backward()
            expected.witness.before_step()
            gem.step()
            expected.witness.after_step()
            gem.zero_grad()
        scheduler.step()

    module = lightning_gem(protected)
    lightning_fit(tmp_path, module, lightning_watch(module), epochs=2)
    module.witness.check(module, expected, expected.witness, range(8))

    again = lightning_gem(lambda module: fresh(EWCAdamW, module))
    lightning_fit(
        tmp_path, again, lightning_watch(again), epochs=2, resume=tmp_path / "epoch=0.ckpt"
    )
    again.witness.check(again, expected, expected.witness, range(4, 8))


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


@pytest.mark.parametrize("prepare", [True, False])
def test_a_guard_of_accelerate_keeps_the_gem(prepare):
    """GEM has an `optimizer`, as what Accelerate wraps has: only Accelerate's is taken off."""
    from accelerate import Accelerator

    from cl_optim.integrations.accelerate import retention_guard

    accelerator, model = Accelerator(cpu=True), nn.Linear(4, 2)
    gem = GEM(protected(model))
    optimizer = accelerator.prepare(gem) if prepare else gem
    assert retention_guard(accelerator, model, optimizer, watched()).optimizer is gem


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


def accelerated_gem(optimizer_of, scaler=None):
    """What is prepared; with a scaler, as it would be for float16, for which it wants a GPU."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    witness = protected_in_gem(model, opposite(model), optimizer_of)
    scheduler = halving(witness.gem)
    if scaler is None:
        model, optimizer, scheduler = accelerator.prepare(model, witness.gem, scheduler)
    else:
        optimizer = AcceleratedOptimizer(witness.gem, scaler=scaler)
    return accelerator, model, optimizer, scheduler, witness


def new_batches():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, 4, generator=generator)
    return list(zip(x, torch.randint(0, 2, (16, 3), generator=generator), strict=True))


def accelerate_gem_train(run, batches):
    accelerator, model, optimizer, scheduler, witness = run
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                witness.before_step()
            optimizer.step()
            scheduler.step()
            if accelerator.sync_gradients:
                witness.after_step()
            optimizer.zero_grad()


def plain_gem_train(optimizer_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    witness = protected_in_gem(model, opposite(model), optimizer_of)
    scheduler = halving(witness.gem)
    for number, (x, y) in enumerate(new_batches()):
        (F.cross_entropy(model(x), y) / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            witness.before_step()
            witness.gem.step()
            witness.after_step()
            scheduler.step()
            witness.gem.zero_grad()
    return model, witness


@pytest.mark.parametrize("kind", ["ewc", "adamw"])
def test_accelerate_trains_and_resumes_gem_as_a_plain_loop_does(tmp_path, kind):
    def optimizer_of(model):
        return protected(model) if kind == "ewc" else torch.optim.AdamW(model.parameters(), lr=1e-2)

    expected, plain = plain_gem_train(optimizer_of)
    run = accelerated_gem(optimizer_of)
    accelerate_gem_train(run, new_batches()[:8])
    run[0].save_state(str(tmp_path), safe_serialization=True)
    accelerate_gem_train(run, new_batches()[8:])
    run[4].check(run[1], expected, plain, range(8))

    again = accelerated_gem(
        (lambda model: fresh(EWCAdamW, model)) if kind == "ewc" else optimizer_of
    )
    again[0].load_state(str(tmp_path))
    accelerate_gem_train(again, new_batches()[8:])
    again[4].check(again[1], expected, plain, range(4, 8))


@pytest.mark.parametrize("kind", ["ewc", "adamw"])
def test_accelerates_scaler_leaves_out_a_step_that_overflows(kind):
    """A scale that is a power of two rounds nothing: the other steps are those without a scaler."""

    def optimizer_of(model):
        return protected(model) if kind == "ewc" else torch.optim.AdamW(model.parameters(), lr=1e-2)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, model, optimizer, _, witness = accelerated_gem(optimizer_of, scaler)
    expected = accelerated_gem(optimizer_of)[1]
    plain = protected_in_gem(expected, opposite(expected), optimizer_of)
    skipped = []
    for number, (x, y) in enumerate(new_batches()[:6]):
        factor = torch.inf if number == 2 else 1.0
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.unscale_(witness.gem)
        if number != 2:
            F.cross_entropy(expected(x), y).backward()
            for each, its in ((witness, model), (plain, expected)):
                nn.utils.clip_grad_norm_(its.parameters(), 0.5)
                each.before_step()
            plain.gem.step()
            plain.after_step()
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        if number != 2:
            witness.after_step()
        optimizer.zero_grad()
        plain.gem.zero_grad()
    assert skipped == [number == 2 for number in range(6)]
    assert scaler.get_scale() == 512.0
    witness.check(model, expected, plain, range(5))


def test_ewc_adamw_in_trainers():
    """What docs/ewc-adamw.md says of reaching the optimizer, of groups and of names."""
    from accelerate import Accelerator

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    # Accelerate wraps the optimizer, as Hugging Face's Trainer does in trainer.optimizer.
    opt = EWCAdamW(model.named_parameters(), lr=1e-3)
    model, opt = Accelerator(cpu=True).prepare(model, opt)
    assert not hasattr(opt, "consolidate")
    opt.optimizer.consolidate(importance)
    assert len(list(opt.optimizer.protected())) == 4
    # Groups without names.
    decay, no_decay = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    opt = EWCAdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-3)
    with pytest.raises(ValueError, match=r"or pass model=model to consolidate\(\)"):
        opt.consolidate(importance)
    opt.consolidate(importance, model=model)
    for found, param in zip(opt.protected(), [*decay, *no_decay], strict=True):
        name = next(name for name, p in model.named_parameters() if p is param)
        assert found.param is param
        assert torch.equal(found.importance, importance[name])
    # Groups with names.
    named = list(model.named_parameters())
    opt = EWCAdamW([{"params": named[:2]}, {"params": named[2:], "lr": 1e-4}])
    opt.consolidate(importance)
    assert [found.name for found in opt.protected()] == [name for name, _ in named]


# --- all ------------------------------------------------------------------------------------------


def test_the_guards_state_is_json():
    guard = guard_of(scripted(1.0, 0.5), on_breach="raise_lambda")
    guard.start()
    guard.step()
    state = guard.state_dict()
    assert json.loads(json.dumps(state)) == state


def test_importing_the_package_loads_no_trainer():
    code = (
        "import sys, cl_optim, cl_optim.retention, cl_optim.integrations\n"
        "heavy = {'transformers', 'lightning', 'accelerate', 'torchao', 'peft', 'matplotlib', "
        "'sklearn', 'triton', 'tensorboard', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def adafactor_trainer(folder, model, steps=6):
    """Trainer's own Adafactor, with EWC around it."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=2,
        use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        logging_strategy="no", optim="adafactor", learning_rate=1e-2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    optimizer = EWC(trainer.create_optimizer(), ewc_lambda=3.0)
    torch.manual_seed(7)
    importance = {name: 100 * torch.rand_like(p) for name, p in model.named_parameters()}
    optimizer.consolidate(importance, model=model)
    trainer.optimizer = optimizer
    return trainer


def test_ewc_around_the_optimizer_that_trainer_makes(tmp_path):
    from transformers.optimization import Adafactor

    model = tiny_gpt2()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = adafactor_trainer(tmp_path, model)
    trainer.train()
    ewc = trainer.optimizer.optimizer
    assert isinstance(ewc, EWC)
    assert isinstance(ewc.optimizer, Adafactor)
    ends = [p.detach().clone() for p in model.parameters()]
    penalty = float(ewc.penalty())
    assert penalty > 0.0

    bare = tiny_gpt2()
    free = adafactor_trainer(tmp_path / "free", bare)
    for group in free.optimizer.param_groups:
        group["ewc_lambda"] = 0.0
    free.train()

    def distance(weights):
        return sum(float((a - b).square().sum()) for a, b in zip(weights, before, strict=True))

    assert distance(ends) < 0.7 * distance([p.detach() for p in bare.parameters()])

    resumed = tiny_gpt2()
    with torch.no_grad():
        for param in resumed.parameters():
            param.add_(0.5)  # so that importance and anchors must come from the checkpoint
    again = adafactor_trainer(tmp_path, resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, resumed.parameters(), ends))
    assert float(again.optimizer.optimizer.penalty()) == penalty
