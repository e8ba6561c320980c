"""Families of torch functions that are treated alike, whether they have a rule or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def named(*names: str) -> set[Callable[..., Any]]:
    """Return the functions and methods of torch that have one of these names."""
    found: set[Callable[..., Any]] = set()
    for name in names:
        for home in (torch, Tensor, F):
            function = getattr(home, name, None)
            if callable(function):
                found.add(function)
    return found


# Elementwise, with broadcasting: a parameter that takes part is expanded to the output's shape
# first, and its per-sample gradients are sums over parts of the gradient of that.
ELEMENTWISE = named(
    *("add", "add_", "sub", "sub_", "rsub", "subtract", "mul", "mul_", "multiply", "div", "div_"),
    *("divide", "true_divide", "where", "maximum", "minimum", "lerp", "addcmul", "pow", "atan2"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__"),
    *("__imul__", "__truediv__", "__rtruediv__", "__itruediv__", "__div__", "__rdiv__"),
    *("__pow__", "__rpow__"),
)

# Those of them that change their first argument.
IN_PLACE = named("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__") | named(
    "__itruediv__"
)

# Functions of each element alone: what they make of a parameter may be used in its place.
UNARY = ELEMENTWISE | named(
    *("exp", "log", "sqrt", "rsqrt", "square", "neg", "abs", "sigmoid", "tanh", "softplus", "relu"),
    *("reciprocal", "clamp", "clamp_min", "clamp_max", "negative", "__neg__", "exp2", "log1p"),
    *("expm1", "elu", "gelu", "silu", "to", "type_as", "float", "double", "half", "bfloat16"),
    *("clone", "contiguous", "detach_copy"),
)
# Those of them whose derivative is 1.
CASTS = named("to", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous")

TRANSPOSES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__}  # type: ignore[attr-defined]

# What returns views, if it can; a view of a parameter keeps the form that its gradients have.
VIEWS = (
    named(
        *("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "t", "transpose"),
        *("permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "chunk", "split"),
        *("split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit"),
        *("unbind", "select", "narrow", "unsqueeze", "squeeze", "diagonal", "as_strided", "ravel"),
        *("__getitem__", "expand", "expand_as", "broadcast_to", "detach"),
    )
    | TRANSPOSES
)

# What may put samples and tokens into one dimension.
RESHAPES = named("view", "reshape", "flatten", "view_as", "reshape_as")

# Copies along a new leading dimension, as of a class token: each sample's copy has its gradient.
EXPANSIONS = named("expand", "expand_as", "broadcast_to", "repeat", "tile")

# Products of two stacks of matrices.
BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}

PRODUCTS = BATCHED | {torch.functional.einsum, F.scaled_dot_product_attention}

# What autocast computes in a lower precision.
LOWERED = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm} | {
    torch.addmm, Tensor.addmm, F.conv1d, F.conv2d, F.conv3d, torch.bmm, Tensor.bmm,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
