"""nn.MultiheadAttention, taken apart into functions that have rules.

``F.multi_head_attention_forward`` reaches a function mode as one call, and works in [T, N, E].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.rules.registry import TAKEN_APART, UnsupportedUseError


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do what ``F.multi_head_attention_forward`` does, with the samples in front inside."""
    if query.dim() != 3:
        raise UnsupportedUseError("its input must have a dimension for samples")
    if static_k is not None or static_v is not None:
        raise UnsupportedUseError("static_k and static_v are not supported")
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask, which must be given, too.")
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        assert in_proj_weight is not None
        weights = list(in_proj_weight.chunk(3))
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    # [T, N, E] → [N, T, E]. One input is transposed once: autograd then adds up its gradients in
    # one place, as it does in the original.
    first = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    inputs = [first[id(x)] for x in (query, key, value)]
    if not use_separate_proj_weight and query is key and key is value:
        q, k, v = F.linear(inputs[0], in_proj_weight, in_proj_bias).chunk(3, -1)  # type: ignore[arg-type]
    else:
        q, k, v = (
            F.linear(x, weight, bias)  # type: ignore[arg-type]
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
    samples, _, width = q.shape
    added = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(samples, 1, width)], 1)
        v = torch.cat([v, bias_v.expand(samples, 1, width)], 1)
        added += 1
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        added += 1
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    mask = _mask(q, k, attn_mask, key_padding_mask, added)
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.mT
        weight = (scores if mask is None else scores + mask).softmax(-1)
        weight = F.dropout(weight, dropout) if dropout > 0.0 else weight
        attended = weight @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    attended = attended.transpose(1, 2).flatten(2)
    output = F.linear(attended, out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return output, None
    return output, weight.mean(1) if average_attn_weights else weight


def _mask(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    added: int,
) -> Tensor | None:
    """Return both masks as one term of the scores, [N or 1, heads or 1, T, S]."""
    samples, heads, targets, _ = q.shape
    terms = []
    if attn_mask is not None:
        term = _additive(F.pad(attn_mask, (0, added)), q.dtype)
        terms.append(term if term.dim() == 2 else term.view(samples, heads, targets, -1))
    if key_padding_mask is not None:
        term = _additive(F.pad(key_padding_mask, (0, added)), q.dtype)
        terms.append(term.view(samples, 1, 1, k.shape[2]))
    return None if not terms else sum(terms[1:], terms[0])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to the scores: True is −∞."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


TAKEN_APART[F.multi_head_attention_forward] = multi_head_attention
