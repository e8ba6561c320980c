"""Which rows of a batch are padding, by the masks among the model's arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cl_optim.fisher.language import is_encoder_decoder

# By the shape of rows' leading dimensions, [N, T], which of the rows are no padding.
Kept: TypeAlias = Mapping[tuple[int, ...], Tensor]

# Of transformers: 0 is padding. Of torch.nn: True is, or −∞ where the mask is added to the scores.
_KEEPING = ("attention_mask", "decoder_attention_mask")
_LEAVING_OUT = (
    "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "key_padding_mask",
)  # fmt: skip
# What has a mask of its own, and no padding without one: it may be as long as what has another.
_OWN = {
    "decoder_input_ids": "decoder_attention_mask",
    "decoder_inputs_embeds": "decoder_attention_mask",
    "tgt": "tgt_key_padding_mask",
}


def kept_rows(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kept:
    """Return which rows of what a model is called with are no padding.

    Where two masks have one shape, as those of an encoder and a decoder may, padding is what is
    padding in both.
    """
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given: dict[str, Any] = {}
    for name, value in bound.items():  # what is in **kwargs is among them by its own name
        given |= value if isinstance(value, Mapping) else {name: value}
    kept: dict[tuple[int, ...], Tensor] = {}
    for name in (*_KEEPING, *_LEAVING_OUT):
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            _join(kept, mask != 0 if name in _KEEPING else ~_is_padding(mask))
    for name, own in _OWN.items():
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > 1 and given.get(own) is None:
            _join(kept, torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device))
    labels = given.get("labels")  # the decoder's inputs may be made of them
    decoded = isinstance(labels, Tensor) and labels.dim() == 2 and is_encoder_decoder(model)
    if decoded and given.get("decoder_attention_mask") is None:
        assert isinstance(labels, Tensor)
        _join(kept, torch.ones_like(labels, dtype=torch.bool))
    for size, mask in list(kept.items()):
        if size[0] == 1:  # a packed batch
            kept[size[1:]] = mask[0]
    return kept


def _is_padding(mask: Tensor) -> Tensor:
    return mask == -math.inf if mask.is_floating_point() else mask.bool()


def _join(kept: dict[tuple[int, ...], Tensor], mask: Tensor) -> None:
    shape = tuple(mask.shape)
    kept[shape] = kept[shape] | mask if shape in kept else mask
