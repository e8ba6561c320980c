"""What a language model's batch says of its loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.fisher import nested
from cl_optim.fisher.objective import IGNORED

# Models of transformers named like causal language models, whose own loss compares the logits at t
# with the label at t: decoders of encoder-decoders, and some of the oldest.
_ALIGNED = frozenset(
    {f"{name}ForCausalLM" for name in (
        "Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian",
        "Mvp", "PLBart", "Pegasus", "ProphetNet", "TrOCR", "Whisper",
    )}
    | {"FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel"}
)  # fmt: skip
# Causal language models whose class is named in another way.
_NEXT = (
    *("LMHeadModel", "WithLMHead", "BertGenerationDecoder", "Text2Text"),
    "NemotronH_Omni_Reasoning_V3",
)
# Encoder-decoders that, given labels, do not make the decoder's inputs of them.
_UNPREPARED = frozenset({"FSMTForConditionalGeneration"})


def is_causal_lm(model: nn.Module) -> bool:
    """Return whether a model of transformers, perhaps wrapped, predicts the next token.

    Its logits at position t are then about the label at t + 1. That is for the whole to say: the
    decoder of an encoder-decoder may be a causal language model, but is given its labels shifted.
    """
    whole: Any = _outermost(model)
    if whole is None:
        names = (type(module).__name__ for module in model.modules())
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return predicts_next(type(whole).__name__, whole.loss_type, is_encoder_decoder(whole))


def predicts_next(name: str, loss_type: str | None, encoder_decoder: bool) -> bool:
    """Return whether the loss of a model of transformers, by its class, is of the next token."""
    if encoder_decoder or name in _ALIGNED:
        return False
    if loss_type is None:  # what these compute then is the loss of a causal language model
        return name.endswith(_NEXT)
    return loss_type.endswith(("ForCausalLM", "ForConditionalGeneration"))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model of transformers, perhaps wrapped, has a decoder with inputs."""
    whole: Any = _outermost(model)
    return whole is not None and bool(whole.config.is_encoder_decoder)


def _outermost(model: nn.Module) -> nn.Module | None:
    """Return the model of transformers in what wraps it."""
    return next((module for module in model.modules() if "loss_type" in vars(module)), None)


def computes_loss(model: nn.Module) -> bool:
    """Return whether a model of transformers, perhaps wrapped, computes a loss of its labels."""
    whole = _outermost(model)
    return whole is not None and "labels" in inspect.signature(whole.forward).parameters


def decodes_labels(model: nn.Module) -> bool:
    """Return whether a model of transformers, perhaps wrapped, gives its decoder the labels."""
    return is_encoder_decoder(model) and computes_loss(model)


def with_labels(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return an encoder-decoder's inputs with its labels among them, as it is trained.

    It then gives its decoder the labels, shifted by one in its own way; without them it would give
    it something else: BART the encoder's tokens.
    """
    inputs = {**inputs, "labels": labels}
    whole: Any = _outermost(model)
    given = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    if not given and type(whole).__name__ in _UNPREPARED:
        prepared = whole.prepare_decoder_input_ids_from_labels(labels.clone())  # it changes them
        inputs["decoder_input_ids"] = prepared
    return inputs


def loss_tokens(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int | Tensor:
    """Return how many tokens a mean loss is over; a tensor, if the host does not know it."""
    if kwargs.get("num_items_in_batch") is not None:
        items: int | Tensor = kwargs["num_items_in_batch"]
        return items
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor):
        first = next(t for t in nested.tensors((args, kwargs)) if t.dim() > 0)
        return first[..., 0].numel() if first.is_floating_point() else first.numel()
    if is_causal_lm(model):
        labels = labels[:, 1:]
    return (labels != IGNORED).sum()


def next_token_targets(
    labels: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Align labels [N, T] with the logits that predict them; −100 where there is no loss.

    What has another shape is returned as it is, for others to refuse.

    Args:
        labels: Labels at the positions of the tokens, as transformers takes them. Default: the
            tokens themselves.
        input_ids: The tokens.
        attention_mask: Padding, where it is 0, is never predicted, nor the token after it, which
            nothing precedes.
    """
    given = labels if labels is not None else input_ids
    if given is None or given.dim() != 2:
        return given
    targets = torch.full_like(given, IGNORED, dtype=torch.long)
    targets[:, :-1] = given[:, 1:]
    if attention_mask is not None and attention_mask.shape == given.shape:
        kept = attention_mask.bool()
        both = torch.zeros_like(kept)
        both[:, :-1] = kept[:, 1:] & kept[:, :-1]
        targets = targets.masked_fill(~both, IGNORED)
    return targets
