"""A model beside what it was: bits per byte against a loop of one token at a time; the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bad_input import Row, each_of, refused
from torch.nn import functional as F

from cl_optim import cli
from cl_optim.retention import compare_models

ALPHABET = ["<s>", "<unk>", "?", *"abcdefgh ", "ä"]
DOCUMENTS = ["abc bad egg fed a bead", "h"]


def tokenizer(*, bos: bool = True, more: tuple[str, ...] = ()):
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*ALPHABET, *more])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>" if bos else None)


def language(seed: int = 0, size: int = len(ALPHABET)):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@torch.no_grad()
def brute_force(model, windows: list[tuple[list[int], int]]) -> tuple[float, float, list]:
    """Nats and hits of each predicted token, by a pass of its own; and log-probabilities."""
    nats, right, probabilities = 0.0, 0, []
    for tokens, begin in windows:
        for at in range(begin, len(tokens)):
            log_probs = F.log_softmax(model(torch.tensor([tokens[:at]])).logits[0, -1].double(), -1)
            nats -= float(log_probs[tokens[at]])
            right += int(log_probs.argmax() == tokens[at])
            probabilities.append(log_probs)
    return nats, right, probabilities


def ids(text: str) -> list[int]:
    return [ALPHABET.index(letter) for letter in text]


@pytest.mark.parametrize("bos", [True, False])
def test_bits_accuracy_and_divergence(bos):
    text = "abc bäd egg fed"
    if bos:  # windows of 8 tokens, of which one is BOS
        windows = [([0, *ids(text[at : at + 7])], 1) for at in range(0, len(text), 7)]
        size = len(text.encode())
    else:
        windows = [(ids(text[at : at + 8]), 1) for at in range(0, len(text), 8)]
        size = len(text.encode()) - 2  # the first letters of the two
    base, tuned = language(0), language(1)
    found = compare_models(base, tuned, tokenizer(bos=bos), {"x": [text]}, length=8).rows[0]
    expected = [brute_force(model, windows) for model in (base, tuned)]
    count = sum(len(tokens) - begin for tokens, begin in windows)
    assert found.tokens == count
    for which, (nats, right, _) in enumerate(expected):
        assert found.bits[which] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found.accuracy[which] == right / count
    each = [
        float((p.exp() * (p - q)).sum())
        for p, q in zip(expected[0][2], expected[1][2], strict=True)
    ]
    assert found.divergence == pytest.approx(sum(each) / count, rel=1e-4)
    assert found.loss == pytest.approx(expected[1][0] / expected[0][0] - 1, rel=1e-4)


def test_of_a_prompt_and_an_answer_only_the_answer_counts():
    base, tuned = language(0), language(1)
    pairs = [("abc", "de"), ("abcdefgh abc", "h")]
    windows = [([0, *ids("abcde")], 4), ([0, *ids("h abch")], 6)]  # the second prompt is cut
    found = compare_models(base, tuned, tokenizer(), {"x": pairs}, length=7).rows[0]
    nats = brute_force(tuned, windows)[0]
    assert found.tokens == 3
    assert found.bits[1] == pytest.approx(nats / math.log(2) / 3, rel=1e-5)


def test_a_long_answer_goes_on_in_further_windows():
    base, tuned = language(0), language(1)
    windows = [([0, *ids("abcdef")], 1), ([0, *ids("ghabcd")], 1), ([0, *ids("ef")], 1)]
    found = compare_models(base, tuned, tokenizer(), {"x": [("h", "abcdefghabcdef")]}, length=7)
    row = found.rows[0]
    assert row.tokens == 14
    nats = brute_force(tuned, windows)[0]
    assert row.bits[1] == pytest.approx(nats / math.log(2) / 14, rel=1e-5)


def test_the_same_model_has_forgotten_nothing():
    base = language()
    found = compare_models(base, base, tokenizer(), {"x": DOCUMENTS, "y": ["ab"]}, budget=0.01)
    assert [row.name for row in found.rows] == ["x", "y"]
    assert [row.loss for row in found.rows] == [0.0, 0.0]
    assert all(abs(row.divergence) < 1e-6 for row in found.rows)
    assert found.breached == ()
    assert "Nothing lost more than 1.0%" in str(found)


def test_modes_and_gradients_are_left_alone():
    base, tuned = language(0).train(), language(1)
    compare_models(base, tuned, tokenizer(), {"x": DOCUMENTS})
    assert base.training
    assert not tuned.training
    assert all(p.grad is None for p in base.parameters())


def test_a_tuned_model_that_is_nan_is_forgotten_whatever_the_budget():
    tuned = language(1)
    with torch.no_grad():
        tuned.lm_head.weight.fill_(math.nan)
    found = compare_models(language(0), tuned, tokenizer(), {"x": DOCUMENTS})
    assert found.breached == ("x",)
    assert "not finite" in str(found)
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown["texts"][0]["bits_per_byte"]["tuned"] is None
    assert shown["breached"] == ["x"]


def ruined(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    return model


REFUSED: list[Row] = [
    ("budget", {"budget": 1.0}, ValueError, "budget must be between 0 and 1"),
    ("length", {"length": 1}, ValueError, "length must be a whole number of at least 2"),
    ("no texts", {"texts": {}}, ValueError, "give one name, at least"),
    ("empty", {"texts": {"x": [""]}}, ValueError, "x: there is no token to predict"),
    ("vocabularies", {"tuned": language(0, 20)}, ValueError, "has 13 classes and the tuned one 20"),
    ("NaN", {"base": ruined(language())}, ValueError, "base model's logits must not be NaN"),
]


@each_of(REFUSED)
def test_it_refuses(given, error, message):
    arguments = {"base": language(0), "tuned": language(1), "texts": {"x": DOCUMENTS}, **given}
    with refused(error, message):
        compare_models(arguments.pop("base"), arguments.pop("tuned"), tokenizer(), **arguments)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, seed in (("base", 0), ("tuned", 1)):
        language(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "a.txt").write_text("abc bad\n\negg", encoding="utf-8-sig")
    rows = [{"prompt": "a b", "answer": "cd"}, {"text": "fed"}, {"text": "egg", "label": "x"}, "h"]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command(folder, capsys):
    assert cli.main(["check", "base", "tuned", "--texts", "a.txt", "b.jsonl", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = compare_models(
        language(0), language(1), tokenizer(),
        {"a.txt": ["abc bad\n\negg"], "b.jsonl": [("a b", "cd"), "fed", "egg", "h"]},
    ).to_json()  # fmt: skip
    for ours, theirs in zip(shown["texts"], expected["texts"], strict=True):
        assert ours["texts"] == theirs["texts"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)


def test_above_a_budget_it_exits_with_2(folder, capsys):
    assert cli.main(["check", "base", "tuned", "--texts", "a.txt", "--budget", "0.01"]) == 3
    assert "Forgotten beyond 1.0%: a.txt." in capsys.readouterr().out
    assert cli.main(["check", "base", "base", "--texts", "a.txt", "--budget", "0.01"]) == 0
    assert "a.txt" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft's
def test_an_adapter_is_checked(folder, capsys):
    import peft

    adapted = peft.get_peft_model(
        language(0), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    assert cli.main(["check", "base", "adapter", "--texts", "a.txt", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["texts"][0]
    assert row["divergence_nats"] > 1e-6


SENTENCES = [
    ("check base tuned", "required: --texts"),
    ("check base tuned --texts none.txt", "none.txt"),
    ("check base nowhere/at/all --texts a.txt", "nowhere/at/all"),
    ("check base tuned --texts a.txt --budget 7", "budget must be between 0 and 1"),
    ("check base tuned --texts a.txt --length 1", "length must be a whole number"),
    ("check base tuned --texts latin.txt", "latin.txt: must be UTF-8, but has the byte 0xe4."),
    ("check base other --texts a.txt", "the tokenizers of base and other differ (13 and 14"),
]


@pytest.mark.parametrize(("command", "message"), SENTENCES, ids=lambda value: value[-24:])
def test_the_command_refuses_in_a_sentence(folder, capsys, command, message):
    (folder / "latin.txt").write_bytes("bäd".encode("latin-1"))
    tokenizer(more=("!",)).save_pretrained(folder / "other")
    with pytest.raises(SystemExit) as exit_:
        cli.main(command.split())
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
