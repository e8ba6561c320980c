"""Kronecker factors against sums over rows by hooks on modules, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from fisher_cases import CLASSES, mlp
from kronecker_rows import (
    assert_factors,
    class_losses,
    data_losses,
    exact_scales,
    sums_of,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from cl_optim import FisherEstimator, estimate_fisher
from cl_optim.importance.kronecker.importance import KroneckerImportance

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
transformers.utils.logging.set_verbosity_error()

VOCABULARY, WIDTH, LENGTH = 13, 16, 8
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "pad_token_id": 0}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}


def kronecker(model: nn.Module, data, labels="empirical", **arguments) -> KroneckerImportance:
    arguments = {"energy": 1.0, "max_samples": None, **arguments}
    found = estimate_fisher(model, data, labels, structure="kronecker", **arguments)
    assert isinstance(found, KroneckerImportance)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


# --- models ---------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    """Groups, strides, dilation, a convolution of sequences, a depthwise one."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.Tanh(),
        nn.Conv2d(6, 4, 2, dilation=2), nn.Tanh(), nn.Flatten(2),
        nn.Conv1d(4, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 9, CLASSES),
    )  # fmt: skip


CLASSIFIERS = {"mlp": (mlp, (5, 7)), "cnn": (cnn, (4, 4, 14, 14))}


@pytest.mark.parametrize("scale", ["product", "exact"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind, scale):
    """With the expectation over labels: G adds over all backward passes, A and rows do not."""
    make, shape = CLASSIFIERS[kind]
    model, x = make(), torch.randn(shape)
    found = kronecker(model, [x[:3], x[3:]], "exact", scale=scale)
    expected = class_losses(x)
    if scale == "product":
        assert_factors(found, sums_of(model.eval(), expected, len(x)), len(x))
    else:
        assert_scales(found, model.eval(), expected, len(x))
    diagonal = estimate_fisher(model, [x], "exact")
    rest = {name: diagonal.sums[name] for name in found.unfactored}
    assert_sums_of(found.unfactored, rest)
    assert found.metadata["scale"] == scale
    assert found.metadata["reduction"] == "expand"


def assert_sums_of(found, expected) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def assert_scales(found: KroneckerImportance, model, expected, samples: int) -> None:
    scales = exact_scales(model, expected, samples, dict(found.factors))
    for name, scale in scales.items():
        kept = found.factors[name].scale[:-1, :-1]
        error = (kept - scale).norm() / scale.norm().clamp_min(1e-12)
        assert float(error) <= 1e-5, (name, float(error))


def test_what_is_not_kept_has_the_scale_of_the_product():
    model, x = mlp(), torch.randn(9, 7)
    product, exact = (
        kronecker(model, [x], "exact", energy=0.8, scale=s) for s in ("product", "exact")
    )
    assert_scales(exact, model.eval(), class_losses(x), len(x))
    for name, one in exact.factors.items():
        other = product.factors[name].scale
        assert one.input.rest
        torch.testing.assert_close(one.scale[-1], other[-1])
        torch.testing.assert_close(one.scale[:, -1], other[:, -1])
        assert not torch.allclose(one.scale, other)
    assert exact.metadata["tail"] == "product"
    assert "tail" not in product.metadata


def test_no_more_directions_than_are_wanted():
    model, x = mlp(), torch.randn(9, 7)
    whole = kronecker(model, [x], "exact", max_rank=None)
    few = kronecker(model, [x], "exact", max_rank=2)
    assert (whole.metadata["max_rank"], few.metadata["max_rank"]) == (None, 2)
    for name, one in few.factors.items():
        of_all = whole.factors[name]
        assert one.output.kept == min(2, of_all.output.kept)
        assert one.input.kept == 2
        assert one.trace() == pytest.approx(of_all.trace(), rel=1e-5)
        torch.testing.assert_close(one.input.values, of_all.input.values[:2])


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=WIDTH, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **COMMON,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_key_value_heads=1, intermediate_size=12, bos_token_id=0, eos_token_id=0,
        **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    """Its head is its table of words, with a bias."""
    config = transformers.BertConfig(
        intermediate_size=12, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def lora() -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "lora": lora}


def sequence_losses(kind: str, tokens: Tensor, lengths: Tensor):
    def loss(model: nn.Module, n: int) -> Tensor:
        part = tokens[n : n + 1, : lengths[n]]
        logits = model(input_ids=part).logits
        if kind == "bert":
            return F.cross_entropy(logits[0], part[0], reduction="sum")
        return F.cross_entropy(logits[0, :-1], part[0, 1:], reduction="sum")

    return data_losses(loss)


class WideRMSNorm(nn.Module):
    """transformers' RMSNorm without its rounding to float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def widened(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, WideRMSNorm(child))
    return model


@pytest.mark.parametrize("scale", ["product", "exact"])
@pytest.mark.parametrize("kind", MODELS)
def test_language_models(kind, scale):
    """A padded batch against the sequences alone; tied heads, Conv1D, LoRA's A and B."""
    model = MODELS[kind]().eval()
    tokens, lengths = torch.randint(1, VOCABULARY, (3, 6)), torch.tensor([6, 3, 5])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    ids = tokens.masked_fill(~mask, 0)
    data = {"input_ids": ids, "attention_mask": mask.long(),
            "labels": ids.masked_fill(~mask, -100)}  # fmt: skip
    found = kronecker(model, [data], scale=scale)
    expected = sequence_losses(kind, tokens, lengths)
    if scale == "product":
        assert_factors(found, sums_of(widened(model), expected, 3), 3)
        reasons = found.metadata["diagonal"]
        assert all("norm" in name.lower() or "ln_" in name for name in reasons), reasons
    else:
        assert_scales(found, widened(model), expected, 3)
    if kind == "bert":
        layout = found.factors["bert.embeddings.word_embeddings.weight"].layout
        assert layout.bias == "cls.predictions.bias"
        assert not layout.transposed


# --- nn.TransformerEncoder ------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """What nn.MultiheadAttention does, by linear layers."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.batch_first = True
        self.heads, self.out_proj = attention.num_heads, attention.out_proj
        self.in_proj = nn.Linear(1, 1)
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias

    def forward(self, query, key, value, attn_mask, key_padding_mask, need_weights, is_causal):
        q, k, v = self.in_proj(query).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)),)


class Encoder(nn.Module):
    """Reads classes off a mean over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        y = self.body(x, src_key_padding_mask=src_key_padding_mask)
        if src_key_padding_mask is None:
            return self.head(y.mean(1))
        y = y.masked_fill(src_key_padding_mask.unsqueeze(-1), 0.0)
        return self.head(y.sum(1) / (~src_key_padding_mask).sum(1, keepdim=True))


def test_transformer_encoder():
    """in_proj is one matrix; padding is told by True."""
    model = Encoder()
    x, lengths = torch.randn(4, 5, 8), torch.tensor([5, 2, 4, 3])
    mask = torch.arange(5) >= lengths.unsqueeze(1)
    y = torch.randint(0, CLASSES, (4,))
    found = kronecker(model, [({"x": x, "src_key_padding_mask": mask}, y)])
    plain = copy.deepcopy(model)
    for layer in plain.body.layers:
        layer.self_attn = PlainAttention(layer.self_attn)

    def loss(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x[n : n + 1, : lengths[n]].double()), y[n : n + 1])

    expected = {
        name.replace("in_proj.weight", "in_proj_weight"): sums
        for name, sums in sums_of(plain.train(), data_losses(loss), 4).items()
    }
    assert_factors(found, expected, 4)
    layout = found.factors["body.layers.0.self_attn.in_proj_weight"].layout
    assert layout.bias == "body.layers.0.self_attn.in_proj_bias"


# --- padding --------------------------------------------------------------------------------------


class Both(nn.Module):
    """Two sequences of one length, of which each may have a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(
        self, src: Tensor, tgt: Tensor, src_key_padding_mask=None, tgt_key_padding_mask=None
    ) -> Tensor:
        return self.source(src).sum(1) + self.target(tgt).sum(1)


MASK = torch.tensor([[False, False, True], [False, True, True]])


@pytest.mark.parametrize(
    ("masks", "rows"),
    [
        ({}, 6),
        ({"src_key_padding_mask": MASK}, 6),  # which says nothing of tgt
        ({"src_key_padding_mask": MASK, "tgt_key_padding_mask": MASK}, 3),
        ({"src_key_padding_mask": MASK, "tgt_key_padding_mask": MASK.flip(0)}, 4),
        ({"src_key_padding_mask": MASK[:, :2], "tgt_key_padding_mask": MASK}, 3),
        ({"src_key_padding_mask": MASK, "tgt_key_padding_mask": torch.zeros(2, 3)}, 6),
        ({"src_key_padding_mask": torch.zeros(2, 3).masked_fill(MASK, -torch.inf),
          "tgt_key_padding_mask": MASK}, 3),
    ],
)  # fmt: skip
def test_masks(masks, rows):
    """By shape; where two differ, padding is what is padding in both. Also attached."""
    model = Both()
    x, y = torch.randn(2, 3, 3), torch.tensor([0, 1])
    found = kronecker(model, [({"src": x, "tgt": x, **masks}, y)])
    fisher = FisherEstimator(model, structure="kronecker", energy=1.0, during_training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fisher.attach(optimizer):
        F.cross_entropy(model(x, tgt=x, **masks), y).backward()
        optimizer.step()
    for one in (found.factors, fisher.finalize().factors):
        scale = one["target.weight"]
        a, g = (side.matrix()[0].trace() for side in (scale.input, scale.output))
        # S sums to tr(Σ ããᵀ) tr(Σ bbᵀ) / (rows · samples): rows²/(rows · samples) of the means.
        assert float(scale.scale.sum() / (a * g) * 2) == pytest.approx(rows, rel=1e-5)


def test_the_check_sees_a_wrong_rule(monkeypatch):
    """What was captured is compared with autograd's gradients, of matrices too."""
    from cl_optim.fisher.per_sample.matrices import Outer

    right = Outer.sum
    monkeypatch.setattr(Outer, "sum", lambda self, *args: right(self, *args) * 1.5)
    with pytest.raises(ValueError, match=r"the self-check failed .* parameter '\d.weight'"):
        kronecker(mlp(), [(torch.randn(4, 7), torch.zeros(4, dtype=torch.long))])
