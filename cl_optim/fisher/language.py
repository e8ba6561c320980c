"""What a language model's batch says of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.fisher import nested
from cl_optim.fisher.labels import IGNORED


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model of transformers, perhaps wrapped, predicts the next token.

    Its logits at position t are then about the label at t + 1.
    """
    for module in model.modules():
        name, kind = type(module).__name__, getattr(module, "loss_type", None)
        if isinstance(kind, str):
            return kind == "ForCausalLM"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return True
    return False


def decoder_inputs(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder of transformers is given with these labels.

    Without labels such a model makes it of something else: BART of the encoder's tokens. Empty for
    any other model.
    """
    for module in model.modules():
        prepare = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None:
            return {"decoder_input_ids": prepare(labels)}
    return {}


def loss_tokens(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int | Tensor:
    """The number of tokens that a mean loss is over; a tensor, if the host does not know it."""
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
    """Labels [N, T] aligned with the logits that predict them; −100 where there is no loss.

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
