"""``torch.einsum`` of data and a weight, taken apart into functions that have rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.rules.registry import (
    UnsupportedUseError,
)


def einsum(equation: Any, *operands: Any, is_weight: Callable[[Tensor], bool]) -> Tensor:
    """Do what ``torch.einsum`` does of data and a weight, by linear maps and permutations.

    With labels as ``bthd,ehd->bthe``: h runs over several weights [e, d], d is summed over.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise UnsupportedUseError("only an equation of two operands is supported")
    terms, output = _labels(equation, [operand.dim() for operand in operands])
    first = 0 if is_weight(operands[0]) else 1
    (weight, w), (x, a) = ((operands[i], terms[i]) for i in (first, 1 - first))
    if is_weight(x):
        raise UnsupportedUseError("both operands depend on parameters, and one on data, too")
    for labels in (a, w):
        if len(set(labels)) < len(labels):
            raise UnsupportedUseError("a label that an operand has twice is not supported")
    x, a = _summed(x, a, w + output)
    weight, w = _summed(weight, w, a + output)
    summed = [i for i in w if i not in output]
    shared = [i for i in w if i in a and i in output]
    new = [i for i in w if i not in a]
    tokens = [i for i in a if i not in w]
    sizes = {**dict(zip(w, weight.shape, strict=True)), **dict(zip(a, x.shape, strict=True))}
    if a and a[0] not in tokens:
        if a[0] in summed or shared != [a[0]]:
            raise UnsupportedUseError("the first dimension of what it meets has to be the samples'")
        left = _ordered(x, a, shared + tokens + summed)
        left = left.reshape(sizes[a[0]], -1, _product(sizes, summed))
        right = _ordered(weight, w, shared + summed + new)
        right = right.reshape(sizes[a[0]], left.shape[2], _product(sizes, new))
        made_of = shared + tokens + new
        product = torch.bmm(left, right).reshape([sizes[i] for i in made_of])
        return _ordered(product, made_of, output)
    if not summed and not new:
        product = _ordered(x, a, tokens + shared) * _ordered(weight, w, shared)
        return _ordered(product, tokens + shared, output)
    x = _ordered(x, a, tokens + shared + summed)
    x = x.reshape(*(sizes[i] for i in tokens), -1, _product(sizes, summed))
    if w[: len(shared)] == shared and w == shared + summed + new:
        stack = weight.reshape(-1, _product(sizes, summed), _product(sizes, new))
        products = [x[..., i, :] @ matrix for i, matrix in enumerate(stack.unbind(0))]
    else:
        stack = _ordered(weight, w, shared + new + summed)
        stack = stack.reshape(-1, _product(sizes, new), _product(sizes, summed))
        products = [F.linear(x[..., i, :], matrix) for i, matrix in enumerate(stack.unbind(0))]
    product = torch.stack(products, -2) if shared else products[0]
    made_of = tokens + shared + new
    return _ordered(product.reshape([sizes[i] for i in made_of]), made_of, output)


def _labels(equation: str, dimensions: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return those of the operands and of the output; numbers are what ``...`` stands for."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = []
    for term, dimension in zip(inputs.split(","), dimensions, strict=True):
        before, dots, after = term.partition("...")
        more = dimension - len(before) - len(after) if dots else 0
        terms.append([*before, *(str(i) for i in range(-more, 0)), *after])
    numbers = sorted({i for term in terms for i in term if len(i) > 1}, key=int)
    if not arrow:
        letters = [i for term in terms for i in term if len(i) == 1]
        once = sorted(i for i in set(letters) if letters.count(i) == 1)
        return terms, numbers + once
    before, dots, after = output.partition("...")
    return terms, [*before, *(numbers if dots else []), *after]


def _summed(tensor: Tensor, labels: list[str], kept: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Sum over the dimensions that only this tensor has, and the output has not."""
    alone = [i for i, label in enumerate(labels) if label not in kept]
    if not alone:
        return tensor, labels
    return tensor.sum(alone), [label for label in labels if label in kept]


def _ordered(tensor: Tensor, labels: list[str], order: list[str]) -> Tensor:
    """Return the tensor with its dimensions in that order."""
    return tensor if labels == order else tensor.permute([labels.index(i) for i in order])


def _product(sizes: dict[str, int], labels: list[str]) -> int:
    return math.prod(sizes[i] for i in labels)
