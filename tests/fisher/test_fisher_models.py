"""Whole models of transformers and peft, made at random, against a loop over single samples."""

import copy
import gc
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from fisher_cases import assert_sums, largest_error, loop
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim.fisher import FisherEstimator, estimate_fisher
from cl_optim.fisher.language import _UNPREPARED as UNPREPARED
from cl_optim.fisher.language import loss_tokens, predicts_next

# Of the libraries' own making.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
transformers.utils.logging.set_verbosity_error()

VOCABULARY, WIDTH, LENGTH = 17, 32, 12
COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "pad_token_id": 0}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}


def gpt2() -> nn.Module:
    """Tied head; Conv1D is addmm on [N·T, in]; positions are looked up as [1, T]."""
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
    """Its key biases have a Fisher information of zero."""
    config = transformers.BertConfig(
        intermediate_size=12, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def lora() -> nn.Module:
    return get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    )


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "lora": lora}


class WideRMSNorm(nn.Module):
    """transformers' RMSNorm without its rounding to float32, for the loop in float64."""

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


def make(kind: str) -> nn.Module:
    model = MODELS[kind]().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "lora_B" in name:  # biases and lora_B are 0 at first
                p.add_(torch.randn_like(p) * 0.2)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens [4, 6], and for each sequence how many of them it has."""
    return torch.randint(1, VOCABULARY, (4, 6)), torch.tensor([6, 4, 2, 5])


def target_loss(kind: str, logits: Tensor, tokens: Tensor) -> Tensor:
    """Of one unpadded sequence: the sum over its tokens."""
    if kind == "bert":
        return F.cross_entropy(logits[0], tokens[0], reduction="sum")
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")


def sequences(kind: str, model: nn.Module, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """The float64 loop, over sequences without padding."""

    def one(model: nn.Module, n: int) -> Tensor:
        part = tokens[n : n + 1, : lengths[n]]
        return target_loss(kind, model(input_ids=part).logits, part)

    return loop(widened(model), one, len(tokens))


def padded(tokens: Tensor, lengths: Tensor, side: str) -> dict[str, Tensor]:
    """A batch as transformers takes it."""
    longest = tokens.shape[1]
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    ids = tokens.masked_fill(~mask, 0)
    if side == "left":
        shifts = [longest - int(length) for length in lengths]
        ids = torch.stack([row.roll(by) for row, by in zip(ids, shifts, strict=True)])
        mask = torch.stack([row.roll(by) for row, by in zip(mask, shifts, strict=True)])
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": positions,
        "labels": ids.masked_fill(~mask, -100),
    }


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_against_the_loop(kind, side):
    model = make(kind).eval()
    tokens, lengths = batch()
    if side == "none":
        lengths = torch.full((4,), 6)
    expected = sequences(kind, model, tokens, lengths)
    data = padded(tokens, lengths, side)
    if side == "none":
        data = {"input_ids": tokens, "labels": tokens}
    importance = estimate_fisher(model, [data], "empirical")
    assert_sums(importance, expected, 1e-5)
    counted = int(lengths.sum()) - (0 if kind == "bert" else 4)
    assert (importance.samples, importance.tokens) == (4, counted)
    assert importance.metadata["loss"] == ("cross_entropy" if kind == "bert" else "causal_lm")

    # In training, the model's own loss is a mean over all tokens that have a label.
    labels = data["labels"].clone()
    if side == "left" and kind != "bert":
        labels.scatter_(1, (6 - lengths).unsqueeze(1), -100)  # predicted from padding
    fisher = FisherEstimator(model)
    with fisher.observe(4, loss_terms=counted):
        model(**{**data, "labels": labels}).loss.backward()
    assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16(kind):
    """Against batches of one in bfloat16, whose own gradients are rounded by up to 1 %."""
    model = make(kind).eval().bfloat16()
    tokens, _ = batch()

    def one(model: nn.Module, n: int) -> Tensor:
        part = tokens[n : n + 1]
        return target_loss(kind, model(input_ids=part).logits.float(), part)

    expected = loop(model, one, 4, double=False)
    importance = estimate_fisher(model, [{"input_ids": tokens, "labels": tokens}], "empirical")
    assert all(value.dtype == torch.float32 for value in importance.values())
    assert_sums(importance, expected, 1e-2)


def test_the_check_in_float64():
    """A gradient that is zero, and parts that are computed in float32, are no failures of it."""
    model = make("bert").double()  # softmax does not see a key's bias
    tokens = torch.randint(1, VOCABULARY, (32, LENGTH))
    data = [{"input_ids": tokens, "labels": tokens}]
    estimate_fisher(model, data, "empirical")
    with FisherEstimator(model).observe(32, loss_terms=tokens.numel()):
        model(**data[0]).loss.backward()

    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=4, num_hidden_layers=1, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    mamba = transformers.MambaForCausalLM(config).double().eval()
    tokens, _ = batch()
    expected = sequences("mamba", mamba, tokens, torch.full((4,), 6))
    signed = estimate_fisher(
        mamba, [{"input_ids": tokens, "labels": tokens}], "empirical", unsupported="sign",
        sign_draws=300, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for name, value in signed.sums.items():
        assert abs(float(value.sum() / expected[name].sum()) - 1) < 0.2, name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora"])
def test_exact_is_refused(kind):
    message = r"^labels='exact' is for logits \[N, C\] .*; use labels='sample'"
    with pytest.raises(ValueError, match=message):
        estimate_fisher(make(kind), [{"input_ids": batch()[0]}], "exact")


@pytest.mark.parametrize("kind", MODELS)
def test_the_shortest_call(kind):
    importance = estimate_fisher(make(kind), [{"input_ids": batch()[0]}])
    assert (importance.metadata["labels"], importance.metadata["labels_chosen"]) == (
        "sample",
        "auto",
    )
    assert all(value.isfinite().all() for value in importance.values())


def test_a_class_for_each_text_is_refused():
    tokens, lengths = batch()
    with pytest.raises(ValueError, match=r"targets must have shape \[4, 6\].* of shape \[4\]"):
        estimate_fisher(make("gpt2"), [(tokens, lengths)], "empirical")


def test_sampled_labels_of_a_language_model():
    """Labels are drawn for the tokens that have one; several passes average to the mean."""
    model = make("gpt2").eval()
    tokens, lengths = batch()
    data = padded(tokens, lengths, "right")
    one = estimate_fisher(model, [data], "sample", generator=torch.Generator().manual_seed(1))
    assert (one.samples, one.tokens) == (4, int(lengths.sum()) - 4)
    # Without labels, the tokens themselves say what is predicted.
    del data["labels"]
    same = estimate_fisher(model, [data], "sample", generator=torch.Generator().manual_seed(1))
    for name, value in one.sums.items():
        torch.testing.assert_close(same.sums[name], value)
    # Drawn labels: E (Σ_t g_t)² = Σ_t E g_t², the gradients of different tokens are uncorrelated.
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)

    def position(t: int) -> dict[str, Tensor]:
        only = torch.full_like(data["labels"], -100)
        only[:, t] = data["labels"][:, t]
        return {**data, "labels": only}

    draws = 40
    many = estimate_fisher(
        model, [data] * draws, "sample", max_samples=None,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    single = estimate_fisher(
        model, [position(t) for t in range(1, 6)] * draws, "sample", max_samples=None,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"):
        a, b = many.sums[name].sum() / draws, single.sums[name].sum() / draws
        assert abs(float(a / b) - 1) < 0.15, name


# --- activation checkpointing ---------------------------------------------------------------------

ENTRY_POINTS = {
    "Tensor.backward": lambda loss, model: loss.backward(),
    "autograd.backward": lambda loss, model: torch.autograd.backward(loss),
    "autograd.grad": lambda loss, model: torch.autograd.grad(loss, list(model.parameters())),
}


class Checkpointed(nn.Module):
    """Blocks with attention, views and a tied parameter, each perhaps in a checkpoint."""

    def __init__(self, reentrant: bool | None, early_stop: bool = True) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 8, 8))
        layers = [nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layers)
        self.layers[2].linear1.weight = self.layers[0].linear1.weight
        self.head = nn.Linear(8, 9)
        self.head.weight = self.token.weight
        self.reentrant, self.early_stop = reentrant, early_stop

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[:, : tokens.shape[1]]
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                with torch.utils.checkpoint.set_checkpoint_early_stop(self.early_stop):
                    x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("how", [(False, True), (False, False), (True, True)])
def test_activation_checkpointing(how, entry, verify):
    reentrant, early_stop = how
    model = Checkpointed(reentrant, early_stop)
    tokens = torch.randint(0, 9, (4, 5))
    plain = Checkpointed(None)
    plain.load_state_dict(model.state_dict())
    expected = loop(plain, lambda m, n: m(tokens[n : n + 1]).tanh().sum(), 4)
    fisher = FisherEstimator(model, verify=verify)
    if reentrant and entry == "autograd.grad":  # torch does not do that either
        with pytest.raises(RuntimeError, match=r"incompatible with .*grad\(\)"), fisher.observe(4):
            ENTRY_POINTS[entry](model(tokens).tanh().sum(), model)
        return
    with fisher.observe(4, loss_terms=1):
        ENTRY_POINTS[entry](model(tokens).tanh().sum(), model)
    assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_in_a_pass_of_its_own(reentrant):
    model = Checkpointed(reentrant)
    tokens = torch.randint(0, 9, (4, 5))
    plain = Checkpointed(None)
    plain.load_state_dict(model.state_dict())
    for labels in ("predicted", "sample"):
        found, expected = (
            estimate_fisher(m, [tokens], labels, generator=torch.Generator().manual_seed(0))
            for m in (model, plain)
        )
        for name, value in expected.sums.items():
            torch.testing.assert_close(found.sums[name], value, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_of_transformers(kind, reentrant):
    model = make(kind)
    tokens, _ = batch()
    expected = sequences(kind, model, tokens, torch.full((4,), 6))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if kind == "lora" and reentrant:
        model.enable_input_require_grads()
    fisher = FisherEstimator(model)
    for verified in (True, False):
        with fisher.observe(4, loss_terms=24 if kind == "bert" else 20):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        importance = fisher.finalize()
        halved = {name: total / (1 if verified else 2) for name, total in importance.sums.items()}
        assert largest_error(halved, expected) <= 1e-5


# --- the loss that a model computes ---------------------------------------------------------------

LAYERS = {
    f"{part}_{key}": value
    for part in ("encoder", "decoder")
    for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 12))
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "d_model": WIDTH, "dropout": 0.0, "init_std": 0.15,
    "max_position_embeddings": 4 * LENGTH, **LAYERS,
}  # fmt: skip
BERT = {
    "intermediate_size": 12, "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, **COMMON, **SMALL,
}  # fmt: skip
AUDIO = {
    "num_feat_extract_layers": 2, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0,
    "feat_proj_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "intermediate_size": 12,
    **SMALL,
}  # fmt: skip
IMAGES = {"image_size": 8, "patch_size": 4, "intermediate_size": 12, **SMALL}
PIXELS = {"pixel_values": (3, 8, 8)}


def encoder_decoder() -> nn.Module:
    """Its decoder alone is a causal language model. The first token that it is given is padding."""
    whole = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**BERT), transformers.BertConfig(**BERT),
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.EncoderDecoderModel(whole)


def vision_encoder_decoder() -> nn.Module:
    """As TrOCR and captioning models are."""
    whole = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**IMAGES), transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=WIDTH, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
            add_cross_attention=True, **COMMON,
        ), pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.VisionEncoderDecoderModel(whole)


def speech_encoder_decoder() -> nn.Module:
    whole = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.Wav2Vec2Config(**AUDIO), transformers.BertConfig(**BERT),
        pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.SpeechEncoderDecoderModel(whole)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=12, num_layers=1, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def fsmt() -> nn.Module:
    """Given labels, it makes the decoder's inputs of the encoder's; without, it is not causal."""
    sizes = {name: value for name, value in SEQ2SEQ.items() if name != "vocab_size"}
    return transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(
            langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, **sizes
        )
    )


def llava() -> nn.Module:
    """Named as encoder-decoders are, but a causal language model."""
    text = transformers.LlamaConfig(
        num_key_value_heads=1, intermediate_size=12, bos_token_id=0, eos_token_id=0,
        **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(projection_dim=WIDTH, **IMAGES),
            text_config=text, image_token_index=16, vision_feature_layer=-1,
        )
    )  # fmt: skip


TRANSLATION = {"input_ids": 6}
LABELLED = {
    "encoder-decoder": (encoder_decoder, TRANSLATION),
    "vision": (vision_encoder_decoder, PIXELS),
    "speech": (speech_encoder_decoder, {"input_values": (64,)}),
    "t5": (t5, TRANSLATION),
    "fsmt": (fsmt, TRANSLATION),
    "llava": (llava, {"input_ids": 5, **PIXELS}),
    # without prepare_decoder_input_ids_from_labels
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                num_mel_bins=4, max_source_positions=8, max_target_positions=LENGTH, **SEQ2SEQ
            )
        ),
        {"input_features": (4, 16)},
    ),
    "m2m100": (
        lambda: transformers.M2M100ForConditionalGeneration(
            transformers.M2M100Config(encoder_layerdrop=0.0, decoder_layerdrop=0.0, **SEQ2SEQ)
        ),
        TRANSLATION,
    ),
    "blenderbot": (
        lambda: transformers.BlenderbotForConditionalGeneration(
            transformers.BlenderbotConfig(**SEQ2SEQ)
        ),
        TRANSLATION,
    ),
    # whose labels are not shifted
    "bart-decoder": (
        lambda: transformers.BartForCausalLM(transformers.BartConfig(**SEQ2SEQ)), {"input_ids": 5}
    ),
    "xlnet": (
        lambda: transformers.XLNetLMHeadModel(
            transformers.XLNetConfig(
                d_model=WIDTH, n_layer=1, n_head=2, d_inner=12, dropout=0.0, **COMMON
            )
        ),
        {"input_ids": 5},
    ),
}  # fmt: skip


# Trained in the tests: the rest has uses that no rule covers.
TRAINED = {
    "fsmt": "embed_tokens",  # its layers see [T, N, D]
    "speech": "^decoder",
    "t5": "^(?!.*relative_attention_bias)",
    "whisper": "^(?!.*embed_positions)",
    "xlnet": "^lm_loss.bias",
}


def labelled(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and a batch with labels [4, 5] of which some have no loss."""
    make, shapes = LABELLED[kind]
    model = make().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1)
            p.requires_grad_(re.search(TRAINED.get(kind, ""), name) is not None)
    data = {
        name: torch.randint(1, 16, (4, shape)) if isinstance(shape, int) else torch.randn(4, *shape)
        for name, shape in shapes.items()
    }
    data["labels"] = torch.randint(1, 16, (4, 5))
    data["labels"][1, 3:] = -100
    if kind == "llava":
        data["input_ids"][:, :4] = 16  # where the image is
        data["labels"][1, 3:] = 7
        data["labels"][1, :2] = -100
    return model, data


def own_loss(data: dict[str, Tensor], shifted: bool = False):
    """What the model computes of one sample, as a sum over its tokens."""

    def one(model: nn.Module, n: int) -> Tensor:
        part = {
            name: value[n : n + 1].to(model.dtype)
            if value.is_floating_point()
            else value[n : n + 1]
            for name, value in data.items()
        }
        targets = part["labels"][:, 1:] if shifted else part["labels"]
        if "FSMT" in type(model).__name__:  # its data collator does that
            prepare = model.prepare_decoder_input_ids_from_labels
            part["decoder_input_ids"] = prepare(part["labels"].clone())  # it changes them
        return model(**part).loss * (targets != -100).sum()

    return one


@pytest.mark.parametrize("kind", LABELLED)
def test_the_models_own_loss(kind):
    model, data = labelled(kind)
    shifted = kind == "llava"
    # FSMT masks with a number that only float32 has.
    expected = loop(model, own_loss(data, shifted), 4, double=kind != "fsmt")
    importance = estimate_fisher(model, [data], "empirical")
    assert largest_error(importance.sums, expected) <= 1e-4
    assert importance.metadata["loss"] == ("causal_lm" if shifted else "cross_entropy")
    counted = int((data["labels"][:, 1:] if shifted else data["labels"]).ne(-100).sum())
    assert importance.tokens == counted
    sampled = estimate_fisher(model, [data])
    assert (sampled.samples, sampled.tokens) == (4, counted)
    # What an attached estimator takes the model's mean to be over.
    assert int(loss_tokens(model, (), data)) == counted


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("length", [5, 6])
def test_encoder_decoder(length, wrapped):
    """Not even where labels are as long as inputs does the decoder get the encoder's tokens."""
    config = transformers.BartConfig(**SEQ2SEQ)
    model = transformers.BartForConditionalGeneration(config).eval()
    tokens, _ = batch()
    labels = torch.randint(1, VOCABULARY, (4, length))
    labels[1, 3:] = -100
    data = {"input_ids": tokens, "labels": labels}
    expected = loop(model, own_loss(data), 4)
    observed = torch.nn.parallel.DataParallel(model) if wrapped else model
    for given in (data, ({"input_ids": tokens}, labels)):
        importance = estimate_fisher(observed, [given], "empirical")
        sums = {name.removeprefix("module."): total for name, total in importance.sums.items()}
        assert largest_error(sums, expected) <= 1e-5
        assert importance.tokens == (labels != -100).sum()
    message = r"^the decoder of an encoder-decoder is given the labels.* batch 0 does not name its"
    with pytest.raises(ValueError, match=message):
        estimate_fisher(observed, [(tokens, labels)], "empirical")


@pytest.mark.parametrize(("kind", "asked"), [("gpt2", "causal_lm"), ("bert", "cross_entropy")])
def test_another_loss_of_the_models_own(kind, asked):
    """A model that computes something else of its labels is refused, unless it is asked for."""
    model = make(kind)

    def add(module: nn.Module, args, output) -> None:
        if output.loss is not None:
            output.loss = output.loss + 0.1  # as routers of experts do

    model.register_forward_hook(add)
    data = {"input_ids": batch()[0], "labels": batch()[0]}
    message = f"^in batch 0, the loss that the model computes .* with loss='{asked}' is .*per_sampl"
    for labels in ("empirical", "auto"):
        with pytest.raises(ValueError, match=message):
            estimate_fisher(model, [data], labels)
        estimate_fisher(model, [data], labels, loss=asked)


class Tagger(nn.Module):
    """Classifies tokens by what the decoder of an encoder-decoder makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = transformers.BartModel(transformers.BartConfig(**SEQ2SEQ))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids).last_hidden_state)


def test_an_encoder_decoder_as_part_of_another_model():
    """Its labels are not its decoder's; MAS, which has none, asks for no loss, either."""
    model = Tagger().eval()
    tokens, labels = batch()[0], torch.randint(0, 5, (4, 6))

    def one(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(tokens[n : n + 1])[0], labels[n], reduction="sum")

    expected = loop(model, one, 4)
    for given in ((tokens, labels), ({"input_ids": tokens}, labels)):
        importance = estimate_fisher(model, [given], "empirical")
        assert largest_error(importance.sums, expected) <= 1e-5
    data = {"input_ids": tokens, "labels": tokens}
    model = make("gpt2")
    model.loss_function = lambda **_: tokens.double().mean()
    assert estimate_fisher(model, [data], kind="mas").samples == 4


AUTO = transformers.models.auto.modeling_auto
CLASSES = sorted(
    {
        name
        for mapping in (
            AUTO.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            AUTO.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            AUTO.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            AUTO.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            AUTO.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
        for names in mapping.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    # These compute no loss.
    - {
        "Gemma4AssistantForCausalLM",
        "Gemma4UnifiedAssistantForCausalLM",
        "PI0ForConditionalGeneration",
    }
    - {"DiffusionGemmaForBlockDiffusion"}
    # The logits of these are of codebooks, [N·K, T, V], and refused.
    - {"DiaForConditionalGeneration", "MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
)
# The source of their forward does not say whether labels are shifted.
DELEGATES = {
    "BlipForConditionalGeneration": True, "Kosmos2ForConditionalGeneration": True,
    "Kosmos2_5ForConditionalGeneration": True, "Pix2StructForConditionalGeneration": False,
    "FlaubertWithLMHeadModel": False, "XLMWithLMHeadModel": False,
    "ProphetNetForCausalLM": False, "ProphetNetForConditionalGeneration": False,
    "GitForCausalLM": True,
}  # fmt: skip


def loss_type_of(cls: type) -> str | None:
    """As the constructor finds it."""
    assigned = re.search(r'self\.loss_type = "(\w+)"', inspect.getsource(cls.__init__))
    known = transformers.loss.loss_utils.LOSS_MAPPING
    if assigned or cls.__name__ in known:
        return assigned[1] if assigned else cls.__name__
    return next(iter(re.findall(f"({'|'.join(known)})", cls.__name__)), None)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_transformers(name):
    """Whether it shifts its labels is known, and its decoder is given them."""
    cls = getattr(transformers, name)
    code = re.sub(r'""".*?"""', "", inspect.getsource(cls.forward), flags=re.S)
    kind, whole = loss_type_of(cls), cls.config_class.is_encoder_decoder
    if re.search(r"is_encoder_decoder = False", inspect.getsource(cls.__init__)):
        whole = False
    if name in DELEGATES:
        expected = DELEGATES[name]
    elif "self.loss_function" in code:
        computed = transformers.loss.loss_utils.LOSS_MAPPING[kind or "ForCausalLM"]
        expected = computed.__name__ == "ForCausalLMLoss" and "shift_labels" not in code
    else:
        expected = bool(re.search(r"labels\[\.\.\., 1:\]", code))
    assert predicts_next(name, kind, whole) == expected
    if whole:
        shifts = re.search(r"(shift_tokens_right|_shift_right|_from_labels)\(\s*labels", code)
        its_own = name == "PPFormulaNetForConditionalGeneration"  # its input_ids are the decoder's
        assert (shifts is None) == (name in UNPREPARED or its_own)


# --- mixtures of experts --------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 5, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_relative_attention_bias(attention, length):
    """Batches of as many samples as there are tokens included: here [T, T] begins with N."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=12, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=6,
        attn_implementation=attention,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens, labels = torch.randint(1, VOCABULARY, (4, length)), torch.randint(1, VOCABULARY, (4, 5))

    def one(model: nn.Module, n: int) -> Tensor:
        return model(input_ids=tokens[n : n + 1], labels=labels[n : n + 1]).loss * 5

    expected = loop(model, one, 4)
    importance = estimate_fisher(model, [{"input_ids": tokens, "labels": labels}], "empirical")
    assert largest_error(importance.sums, expected) <= 1e-5
    fisher = FisherEstimator(model, verify=False)
    with fisher.observe(4, loss_terms=20):
        model(input_ids=tokens, labels=labels).loss.backward()
    assert largest_error(fisher.finalize().sums, expected) <= 1e-5


def mixtral(experts: str) -> nn.Module:
    """Each expert: a gate and an up projection in one, and a down projection."""
    config = transformers.MixtralConfig(
        num_key_value_heads=1, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2,
        experts_implementation=experts, **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def qwen2_moe(experts: str) -> nn.Module:
    """Beside an expert that all tokens share."""
    config = transformers.Qwen2MoeConfig(
        num_key_value_heads=1, intermediate_size=12, moe_intermediate_size=12, num_experts=3,
        num_experts_per_tok=2, shared_expert_intermediate_size=20, experts_implementation=experts,
        **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss(experts: str) -> nn.Module:
    """Experts with biases, and matrices the other way round."""
    config = transformers.GptOssConfig(
        num_key_value_heads=1, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2,
        head_dim=16, experts_implementation=experts, **COMMON, **SMALL,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def spread(model: nn.Module) -> nn.Module:
    """With biases other than 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


# The second and third have as many rows as there are samples, times a number of tokens.
@pytest.mark.parametrize("shape", [(4, 6), (3, 4), (6, 3)])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", [mixtral, qwen2_moe, gpt_oss])
def test_mixture_of_experts(make, experts, shape):
    """Rows keep their samples through the router's sort and back."""
    torch.manual_seed(0)
    model = spread(make(experts))
    plain = make("eager").eval()
    plain.load_state_dict(model.state_dict())
    samples, length = shape
    tokens = torch.randint(1, VOCABULARY, shape)

    def one(model: nn.Module, n: int) -> Tensor:
        part = tokens[n : n + 1]
        return target_loss("gpt2", model(input_ids=part).logits, part)

    # grouped_mm has no float64, and the norms round to float32.
    expected = loop(plain, one, samples, double=False)
    importance = estimate_fisher(model, [{"input_ids": tokens, "labels": tokens}], "empirical")
    assert largest_error(importance.sums, expected) <= 2e-5
    for verify in (True, False):
        fisher = FisherEstimator(model, verify=verify)
        with fisher.observe(samples, loss_terms=samples * (length - 1)):
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert largest_error(fisher.finalize().sums, expected) <= 2e-5


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_mixture_of_experts_in_a_checkpoint(experts):
    torch.manual_seed(0)
    model = spread(mixtral(experts)).train()
    tokens, _ = batch()
    terms = tokens[:, 1:].numel()
    with_them, without = FisherEstimator(model), FisherEstimator(model)
    with without.observe(4, loss_terms=terms):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with with_them.observe(4, loss_terms=terms):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {name: value.double() for name, value in without.finalize().sums.items()}
    assert largest_error(with_them.finalize().sums, expected) <= 1e-5


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(work) -> int:
    """The most bytes allocated on the CPU at once, beyond those there were, by the profiler."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak


@pytest.mark.parametrize("verify", ["first", False])
def test_memory_of_a_pass(verify):
    """At most an ordinary backward pass, a float32 copy of the parameters and two chunks.

    With the self-check, too: it holds one set of gradients, which an ordinary pass does as well.
    """
    width, vocabulary = 256, 2000
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_layer=4, n_head=4, n_embd=width, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, vocabulary, (4, 64))
    data = {"input_ids": tokens, "labels": tokens}
    parameters = sum(p.numel() for p in model.parameters()) * 4
    largest = max(p.numel() for p in model.parameters()) * 4
    chunks = 2 * (2**18 + largest)  # one product of a sample, and the square or sum made of it

    def ordinary() -> None:
        model(**data).loss.backward()
        model.zero_grad(set_to_none=True)

    def fisher() -> None:
        estimate_fisher(model, [data], "empirical", verify=verify, progress=False)

    ordinary()  # warm up
    fisher()
    plain, ours = peak_bytes(ordinary), peak_bytes(fisher)
    assert ours <= plain + parameters + chunks


def test_padding_is_left_out_without_labels_too():
    """Of a model that predicts each token, whose labels are drawn."""
    model = make("bert").eval()
    tokens, lengths = batch()
    data = padded(tokens, lengths, "right")
    given = estimate_fisher(model, [data], "sample", generator=torch.Generator().manual_seed(1))
    del data["labels"]
    found = estimate_fisher(model, [data], "sample", generator=torch.Generator().manual_seed(1))
    assert found.tokens == given.tokens == int(lengths.sum())
    for name, value in given.sums.items():
        torch.testing.assert_close(found.sums[name], value)


class Decodes(nn.Module):
    """Takes an encoder's mask, and a decoder's, of sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None,
                decoder_attention_mask=None):  # fmt: skip
        return self.head(self.body(decoder_input_ids) + self.body(input_ids).mean(1, keepdim=True))


@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_of_a_decoder_is_its_own(has_mask):
    ids = torch.randint(0, 9, (2, 4, 6))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 2:] = 0
    data = {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1]}
    if has_mask:
        data["decoder_attention_mask"] = torch.ones(4, 6, dtype=torch.long)
        data["decoder_attention_mask"][0, 5:] = 0
    found = estimate_fisher(Decodes(), [data], "sample")
    assert found.tokens == (23 if has_mask else 24)
