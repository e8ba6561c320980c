"""Text that a model writes itself: its distribution, what is stored beside it, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from bad_input import each_of, refused
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cl_optim
from cl_optim.retention import OldModel, ReplayBuffer, distillation_loss, self_written, top_k

V = 12


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=3, eos_token_id=4
    )
    return GPT2LMHeadModel(config)


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Bigrams(nn.Module):
    """Each token depends on the one before it alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


def tokens_of(buffer):
    return buffer.samples()["input_ids"]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_with_and_without_a_cache_it_is_the_same_text(make):
    model = make()
    cached = self_written(model, 6, 10, batch_size=4, seed=5)
    whole = self_written(model, 6, 10, batch_size=4, seed=5, logits=lambda m, x: m(x).logits)
    a, b = tokens_of(cached), tokens_of(whole)
    assert a.shape == (6, 10)
    assert a.dtype == torch.int64
    assert torch.equal(a, b)
    assert bool((a[:, 0] == 3).all())
    assert torch.equal(tokens_of(self_written(model, 6, 10, batch_size=4, seed=5)), a)
    assert not torch.equal(tokens_of(self_written(model, 6, 10, batch_size=4, seed=6)), a)
    assert model.training


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_text_has_the_models_distribution(temperature):
    generator = torch.Generator().manual_seed(0)
    table = 1.5 * torch.randn(5, 5, generator=generator)
    buffer = self_written(
        Bigrams(table), 400, 30, start=0, burn_in=2, batch_size=100, temperature=temperature
    )
    tokens = tokens_of(buffer)
    counts = torch.zeros(5, 5)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0), True)
    expected = torch.softmax(table / temperature, -1)
    rows = counts.sum(1, keepdim=True)
    deviation = (counts / rows - expected).abs()
    assert bool((deviation < 5 * (expected * (1 - expected) / rows).sqrt()).all())


def test_nothing_of_the_users_changes():
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    self_written(model, 3, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


class Tokenizer:
    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]


def test_prompts_by_turns_and_by_length():
    model = gpt2()
    buffer = self_written(
        model, 7, 9, prompts=["abc", torch.tensor([5]), [6, 7, 8]], tokenizer=Tokenizer()
    )
    begins = sorted(tuple(row[:3].tolist()) for row in tokens_of(buffer))
    assert begins.count((0, 1, 2)) == 3
    assert begins.count((6, 7, 8)) == 2
    assert sum(row[0] == 5 for row in begins) == 2
    assert tokens_of(buffer).shape == (7, 9)


def test_burn_in_is_left_out():
    model = gpt2()
    whole = tokens_of(self_written(model, 4, 12, seed=1))
    late = tokens_of(self_written(model, 4, 8, burn_in=4, seed=1))
    assert torch.equal(whole[:, 4:], late)


def test_old_outputs_stand_beside_it(tmp_path):
    model = gpt2()
    buffer = self_written(model, 6, 8, top=5, path=tmp_path / "own", seed=2)
    buffer.close()
    with ReplayBuffer(6, path=tmp_path / "own", read_only=True) as again:
        drawn = again.sample(4)
    exact = top_k(model.eval()(drawn["input_ids"]).logits, 5)
    for part, expected in zip(drawn["old"], exact, strict=True):
        torch.testing.assert_close(part, expected, rtol=2e-3, atol=1e-3)
    logits = gpt2(1).eval()(drawn["input_ids"]).logits
    loss = distillation_loss(logits, drawn["old"])
    full = distillation_loss(logits, OldModel(gpt2(1), model)(drawn["input_ids"]).logits)
    assert 0 < float(loss.detach()) <= float(full.detach()) + 1e-3


def test_it_is_data_for_the_fisher_information():
    model = gpt2()
    buffer = self_written(model, 8, 6)
    importance = cl_optim.estimate_fisher(
        model, [buffer.sample(4), buffer.sample(4)], "sample", structure="kronecker"
    )
    assert importance.samples == 8
    assert set(importance.factors)


# --- refusals -------------------------------------------------------------------------------------

BAD = [
    ("sequences", {"sequences": 0}, ValueError, "^sequences must be"),
    ("length", {"length": 0}, ValueError, "^length must be"),
    ("batch_size", {"batch_size": 0}, ValueError, "^batch_size must be"),
    ("burn_in", {"burn_in": -1}, ValueError, "^burn_in must be at least 0"),
    ("temperature", {"temperature": 0.0}, ValueError, "^temperature must be positive"),
    ("temperature NaN", {"temperature": math.nan}, ValueError, "^temperature must be positive"),
    ("positions", {"burn_in": 10}, ValueError, "^burn_in . length is 18, and the model has 16"),
    ("no prompt", {"prompts": []}, ValueError, "^prompts must have at least one"),
    ("empty prompt", {"prompts": [[]]}, ValueError, "^a prompt has 0 tokens"),
    ("long prompt", {"prompts": [[1] * 8]}, ValueError, "^a prompt has 8 tokens"),
    ("foreign prompt", {"prompts": [[V]]}, ValueError, "^a prompt has tokens beyond"),
    ("text", {"prompts": ["abc"]}, ValueError, "^prompts that are texts need a tokenizer"),
    ("both", {"prompts": [[1]], "start": 1}, ValueError, "^give prompts or start, not both"),
    ("start", {"start": -1}, ValueError, "^a prompt has tokens beyond"),
    ("top", {"top": 0}, ValueError, "^k must be"),
    ("no start", {"model": Bigrams(torch.zeros(3, 3))}, ValueError, "^start must be given"),
    ("one token", {"model": Bigrams(torch.tensor([[1e4, 0.0], [1e4, 0.0]])), "start": 0},
     ValueError, "^all that the model wrote is token 0"),
    ("NaN", {"model": Bigrams(torch.full((3, 3), math.nan)), "start": 0}, ValueError,
     "^the model's logits must not be NaN"),
    ("no logits", {"model": nn.Embedding(3, 3), "logits": lambda m, x: m(x).sum(1), "start": 0},
     TypeError, r"^the model must return logits \[n, t, V\] of tokens"),
]  # fmt: skip


@each_of(BAD)
def test_refused(given, error, message):
    with refused(error, message):
        self_written(**{"model": gpt2(), "sequences": 4, "length": 8, **given})


def test_a_buffer_of_another_call_is_not_mixed_with_this_ones(tmp_path):
    model, path = gpt2(), tmp_path / "own"
    self_written(model, 6, 8, path=path, seed=2).close()
    with ReplayBuffer(6, path=path, read_only=True) as buffer:
        before = tokens_of(buffer)
    with pytest.raises(ValueError, match=r"own' has 6 samples already.* another path, remove it"):
        self_written(model, 6, 8, path=path, seed=2)
    with ReplayBuffer(6, path=path, read_only=True) as buffer:
        assert torch.equal(tokens_of(buffer), before)
