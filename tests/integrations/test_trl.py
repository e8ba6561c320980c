"""TRL's SFTTrainer with optimizers of this package: the steps of a plain loop, and its loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError
from trainer_cases import protected, tiny_gpt2, watched

from cl_optim import GEM, FisherEstimator, estimate_fisher

# TRL's default, of which transformers has a newer name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

PAD, STEPS, ACCUMULATION = 0, 6, 2


def rows():
    """Sequences of several lengths; the first three tokens of each are a prompt."""
    stream = torch.Generator().manual_seed(1)
    for length in torch.randint(6, 12, (24,), generator=stream).tolist():
        tokens = torch.randint(1, 32, (length,), generator=stream).tolist()
        yield {"input_ids": tokens, "completion_mask": [0] * 3 + [1] * (length - 3)}


def batches():
    """What the trainer makes of two sequences."""
    texts = list(rows())
    for pair in zip(texts[::2], texts[1::2], strict=True):
        tokens = [torch.tensor(row["input_ids"]) for row in pair]
        labels = [text.where(torch.arange(len(text)) >= 3, -100) for text in tokens]
        pad = nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(tokens, batch_first=True, padding_value=PAD),
            "attention_mask": pad([torch.ones_like(text) for text in tokens], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }


def sft_trainer(folder, model, optimizer, callbacks=(), **options):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    words = Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token=str(PAD)))
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, save_strategy="no", bf16=False, use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=ACCUMULATION, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", max_grad_norm=0.5,
        lr_scheduler_type="constant", completion_only_loss=True, **options,
    )  # fmt: skip
    return InOrder(
        model, arguments, train_dataset=Dataset.from_list(list(rows())),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=str(PAD), eos_token="1"
        ),
        optimizers=(optimizer, None), callbacks=list(callbacks),
    )  # fmt: skip


def plain_loop(model, optimizer):
    """What the trainer does: a mean over the answers' tokens of all micro-batches of a step."""
    each = list(batches())
    for start in range(0, len(each), ACCUMULATION):
        parts = each[start : start + ACCUMULATION]
        count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        for part in parts:
            logits = model(part["input_ids"], attention_mask=part["attention_mask"]).logits
            targets = part["labels"][:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
            (loss / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    """All that outputs depend on: not the keys' bias, whose gradient is rounding alone."""
    found = {name: param.detach().clone() for name, param in model.named_parameters()}
    found["transformer.h.0.attn.c_attn.bias"][16:32] = 0.0
    return nn.utils.parameters_to_vector(found.values())


def with_memory(model):
    """A GEM around a protected optimizer."""
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(9))
    gem = GEM(protected(model))
    gem.remember("old", lambda: model(tokens, labels=tokens.flip(0)).loss.backward())
    return gem


@pytest.mark.parametrize("optimizer_of", [protected, with_memory], ids=["ewc", "gem"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_as_a_plain_loop_does(tmp_path, optimizer_of, checkpointing):
    from cl_optim.integrations.huggingface import RetentionCallback

    expected = tiny_gpt2(dropout=0.0)
    plain_loop(expected, optimizer_of(expected))
    model, callback = tiny_gpt2(dropout=0.0), RetentionCallback(watched(), every=2)
    sft_trainer(
        tmp_path, model, optimizer_of(model), [callback], gradient_checkpointing=checkpointing
    ).train()
    assert [check.step for check in callback.guard.history] == [0, 2, 4, 6]
    found, loop, start = (weights(one) for one in (model, expected, tiny_gpt2(dropout=0.0)))
    assert (loop - start).abs().max() > 0.02
    # TRL sums the loss in tiles of its own.
    torch.testing.assert_close(found, loop, rtol=0.0, atol=1e-4)


def test_the_importance_of_a_model_that_sft_has_changed(tmp_path):
    """TRL puts a forward of its own into the model, which tells it when it is meant."""
    model = tiny_gpt2(dropout=0.0)
    sft_trainer(tmp_path, model, protected(model)).train()
    plain = tiny_gpt2(dropout=0.0)
    plain.load_state_dict(model.state_dict())
    plain.train(model.training)
    found, expected = (
        estimate_fisher(one, list(batches()), labels="empirical", progress=False)
        for one in (model, plain)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_importance_is_no_by_product_of_sft(tmp_path):
    """Its loss takes the head's weights in an autograd function, where no layer is seen.

    Under torch 2.10 its checkpoints notice what that changes before the estimator does.
    """
    refused: tuple[type[Exception], str] = (CheckpointError, "number of tensors was saved")
    if torch.__version__ >= "2.11":
        refused = NotImplementedError, r"'transformer\.wte\.weight' .* was not seen"
    model = tiny_gpt2(dropout=0.0)
    optimizer, fisher = protected(model), FisherEstimator(model, during_training=True)
    trainer = sft_trainer(tmp_path, model, optimizer)
    with (
        fisher.attach(optimizer, loss_terms="tokens"),
        pytest.raises(refused[0], match=refused[1]),
    ):
        trainer.train()
