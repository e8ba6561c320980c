"""How each torch function turns an output gradient into per-sample gradients of its parameters.

A rule is called with the arguments of its torch function and describes that call as a :class:`Use`.
To support another function, write a rule for it and pass it to :func:`register_fisher_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_optim.fisher.per_sample.base import (
    Convolution,
    Convolved,
    Dense,
    Experts,
    Outer,
    PerSample,
    Rows,
)
from cl_optim.fisher.samples import Samples

Gradients: TypeAlias = Sequence["PerSample | Tensor | None"]


class UnsupportedUseError(NotImplementedError):
    """A rule does not cover this way of calling its function; the message says which."""


@dataclass(frozen=True)
class Use:
    """One call of a torch function that has parameters among its arguments.

    Attributes:
        input: The argument whose leading dimension runs over the samples. What lies between that
            and its feature dimensions are tokens of one sample.
        features: Number of trailing feature dimensions of ``input``.
        parameters: The arguments that may be parameters.
        saved: What ``gradients`` needs of the forward pass.
        gradients: Called in backward as ``gradients(samples, grad_output, *saved)``. Returns, for
            each of ``parameters``, the gradients of the N samples' losses with respect to it,
            [N, *shape], or ``None``. Of ``samples``, ``samples.sum(x, features)`` sums
            [N, ..., *features] over each sample's tokens, and ``samples.split(x, features)`` views
            it as [N, T, *features]. Must not hold a tensor of the forward pass itself: activation
            checkpointing frees only what is ``saved``.
    """

    input: Tensor
    features: int
    parameters: tuple[Tensor | None, ...]
    saved: tuple[Tensor | None, ...]
    gradients: Callable[..., Gradients]


Rule: TypeAlias = Callable[..., Use]

RULES: dict[Callable[..., Any], Rule] = {}


def register_fisher_rule(function: Callable[..., Any], rule: Rule) -> None:
    """Teach the Fisher how a function of your own uses parameters.

    ``function`` must be one that PyTorch's function modes see: a function of torch, or one that
    calls ``torch.overrides.handle_torch_function`` (see ``torch.overrides``). Its gradient is left
    to autograd; the rule only says what each sample's part in it is.

    .. code-block:: python

        def scaled(input, weight):                       # input [N, T, D] * weight [D]
            if torch.overrides.has_torch_function((input, weight)):
                return torch.overrides.handle_torch_function(
                    scaled, (input, weight), input, weight)
            return my_kernel(input, weight)

        def rule(input, weight):
            def gradients(samples, grad_output, input):
                return [samples.sum(grad_output * input, features=1)]       # [N, D]
            return Use(input, features=1, parameters=(weight,), saved=(input,),
                       gradients=gradients)

        cl_optim.register_fisher_rule(scaled, rule)

    Args:
        function: The function, as a mode gets it. A rule that it had is replaced.
        rule: Called with the function's own arguments; returns a ``cl_optim.fisher.Use``, or raises
            ``cl_optim.fisher.UnsupportedUseError`` where it does not cover a call.

    Raises:
        TypeError: ``function`` or ``rule`` is not callable.
    """
    for name, value in (("function", function), ("rule", rule)):
        if not callable(value):
            raise TypeError(f"{name} must be callable, not {type(value).__name__}.")
    RULES[function] = rule


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for function in functions:
            register_fisher_rule(function, rule)
        return rule

    return register


def named(*names: str) -> set[Callable[..., Any]]:
    """The functions and methods of torch that have one of these names."""
    found: set[Callable[..., Any]] = set()
    for name in names:
        for home in (torch, Tensor, F):
            function = getattr(home, name, None)
            if callable(function):
                found.add(function)
    return found


def _if_trained(tensor: Tensor, parameter: Tensor | None) -> Tensor | None:
    """What only the gradient of ``parameter`` needs: not kept for a frozen one."""
    return tensor if parameter is not None and parameter.requires_grad else None


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are formed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _outer(samples: Samples, inputs: Tensor, grads: Tensor) -> Outer:
    inputs, grads = samples.split(inputs, 1), samples.split(grads, 1)
    cu_seqlens = samples.cu_seqlens(inputs)
    pad = None if cu_seqlens is None else samples.pad
    return Outer(inputs, grads, samples.count, cu_seqlens, pad)


# --- matrices -------------------------------------------------------------------------------------


@_rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    """``torch.nn.functional.linear``."""
    if weight.dim() != 2:
        raise UnsupportedUseError(f"its weight must have 2 dimensions, not {weight.dim()}")

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        outer = None if input is None else _outer(samples, input, grad)
        return outer, samples.sum(grad, 1, _wide(grad)) if bias_trained else None

    bias_trained = bias is not None and bias.requires_grad
    return Use(input, 1, (weight, bias), (_if_trained(input, weight),), gradients)


@_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(input: Tensor, other: Tensor, **options: Any) -> Use:
    """``input @ weight``."""
    _refuse_options(options)
    if other.dim() != 2 or input.dim() < 2:
        raise UnsupportedUseError(
            f"only [..., in] @ [in, out] is supported, not {list(input.shape)} @ "
            f"{list(other.shape)}"
        )

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        return (_outer(samples, grad, input),)

    return Use(input, 1, (other,), (input,), gradients)


def einsum(equation: Any, *operands: Any, is_weight: Callable[[Tensor], bool]) -> Tensor:
    """``torch.einsum`` of data and a weight, as linear maps, products and permutations.

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
    """Of the operands and of the output; those that ``...`` stands for are numbers."""
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
    """Without the dimensions that only this tensor has, and the output has not."""
    alone = [i for i, label in enumerate(labels) if label not in kept]
    if not alone:
        return tensor, labels
    return tensor.sum(alone), [label for label in labels if label in kept]


def _ordered(tensor: Tensor, labels: list[str], order: list[str]) -> Tensor:
    """With its dimensions in that order."""
    return tensor if labels == order else tensor.permute([labels.index(i) for i in order])


def _product(sizes: dict[str, int], labels: list[str]) -> int:
    return math.prod(sizes[i] for i in labels)


@_rule(*named("_grouped_mm", "grouped_mm"))
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Use:
    """``torch.nn.functional.grouped_mm``: rows sorted by expert, times that expert's matrix.

    Where an expert's rows begin has to be known on the host, which waits for the device.
    """
    if offs is None or mat_a.dim() != 2 or mat_b.dim() != 3 or bias is not None:
        raise UnsupportedUseError("only [S, in] times [E, in, out] with offs, without bias, is")

    def gradients(samples: Samples, grad: Tensor, input: Tensor, offs: Tensor) -> Gradients:
        rows = torch.arange(len(input), device=input.device)
        expert = torch.searchsorted(offs.long(), rows, right=True)
        sample = samples.of_each(input, 1)
        return (Experts(input, grad, expert, sample, samples.count, len(offs)),)

    return Use(mat_a, 1, (mat_b,), (mat_a, offs), gradients)


def batched(input: Tensor, weight: Tensor, transposed: bool, rows: int) -> Use:
    """``bmm(input, weight)``, or if ``transposed`` the rows times the weight from the left.

    Args:
        input: [E, T, in], or, if transposed, [E, in, T].
        weight: [E, in, out], or, if transposed, [E, out, in].
        transposed: Whether the weight is the first factor.
        rows: How many leading dimensions of ``input`` run over rows whose samples are known.
    """

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        if transposed:
            input, grad = input.mT, grad.mT  # [E, T, in], [E, T, out]
        count, tokens = input.shape[:2]
        expert = torch.arange(count, device=input.device).repeat_interleave(tokens)
        sample = samples.of_each(input, input.dim() - rows) if rows == 2 else None
        if sample is None:
            sample = samples.of_each(input[:, 0], 1).repeat_interleave(tokens)
        left, right = (grad, input) if transposed else (input, grad)
        factors = (left.flatten(0, 1), right.flatten(0, 1))
        return (Experts(*factors, expert, sample.reshape(-1), samples.count, count),)

    return Use(input, input.dim() - rows, (weight,), (input,), gradients)


@_rule(torch.addmm, Tensor.addmm)
def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **options: Any
) -> Use:
    """``bias + input @ weight``."""
    _refuse_options(options)
    if beta != 1 or alpha != 1:
        raise UnsupportedUseError(f"beta = {beta} and alpha = {alpha} are not supported, only 1")
    if input.dim() != 1 or len(input) != mat2.shape[1]:
        raise UnsupportedUseError(
            f"what is added must have shape [{mat2.shape[1]}], not {list(input.shape)}"
        )

    bias_trained = input.requires_grad

    def gradients(samples: Samples, grad: Tensor, mat1: Tensor | None) -> Gradients:
        outer = None if mat1 is None else _outer(samples, grad, mat1)
        return samples.sum(grad, 1, _wide(grad)) if bias_trained else None, outer

    return Use(mat1, 1, (input, mat2), (_if_trained(mat1, mat2),), gradients)


def _refuse_options(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UnsupportedUseError(f"{given[0]} is not supported")


# --- tables ---------------------------------------------------------------------------------------


def check_embedding(
    max_norm: float | None = None, scale_grad_by_freq: bool = False, sparse: bool = False
) -> None:
    """Refuse what changes the table, or its gradient, by more than the lookup."""
    for option, given in (
        ("max_norm", max_norm is not None),
        ("scale_grad_by_freq", scale_grad_by_freq),
        ("sparse", sparse),
    ):
        if given:
            raise UnsupportedUseError(f"{option} is not supported")


def rows(
    samples: Samples, indices: Tensor, grads: Tensor, table: int, padding_idx: int | None
) -> Rows:
    """Gradients of a table from those of what was looked up; ``padding_idx`` has none."""
    indices, grads = samples.split(indices), samples.split(grads, 1)
    if samples.packed:  # what pads has no gradient
        indices, grads = samples.pad(indices), samples.pad(grads)
    if padding_idx is not None:
        padding = indices == padding_idx % table
        grads = grads.masked_fill(padding.unsqueeze(-1), 0.0)
    return Rows(indices.long(), grads, table)


@_rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use:
    """``torch.nn.functional.embedding``; ``padding_idx`` has no gradient."""
    check_embedding(max_norm, scale_grad_by_freq, sparse)
    table = len(weight)

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        return (rows(samples, input, grad, table, padding_idx),)

    return Use(input, 0, (weight,), (input,), gradients)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag`` as an embedding [B, L, D] and what is made of it.

    Bags that are given by offsets are padded, for which the host waits for the longest.
    """
    check_embedding(max_norm, scale_grad_by_freq, sparse)
    kept = torch.ones_like(input, dtype=torch.bool)
    if input.dim() == 1:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else F.pad(offsets[1:], (0, 1), value=len(input))
        lengths = ends - offsets[: len(ends)]
        kept = torch.arange(max(1, int(lengths.max())), device=input.device) < lengths.unsqueeze(1)
        input = torch.zeros_like(kept, dtype=input.dtype).masked_scatter(kept, input)
        if per_sample_weights is not None:
            spread = torch.zeros_like(kept, dtype=per_sample_weights.dtype)
            per_sample_weights = spread.masked_scatter(kept, per_sample_weights)
    if padding_idx is not None:
        kept = kept & (input != padding_idx % len(weight))
    looked_up = F.embedding(input, weight)
    if mode == "max":
        looked_up = looked_up.masked_fill(~kept.unsqueeze(-1), -math.inf)
        return torch.where(kept.any(1, keepdim=True), looked_up.max(1).values, 0.0)
    share = kept.to(looked_up.dtype)
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp_min(1.0)
    if per_sample_weights is not None:
        share = share * per_sample_weights
    return (looked_up * share.unsqueeze(-1)).sum(1)


def is_lookup(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is ``table[indices]`` with a tensor of integers."""
    if func is not Tensor.__getitem__ or not isinstance(args[1], Tensor):
        return False
    table, indices = args
    integers = not indices.is_floating_point() and indices.dtype not in (torch.bool, torch.uint8)
    return table.dim() in (1, 2) and indices.dim() > 0 and integers


def is_choice_of_matrices(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is ``matrices[indices]`` with a tensor of integers [R]."""
    if func is not Tensor.__getitem__ or not isinstance(args[1], Tensor):
        return False
    matrices, indices = args
    integers = not indices.is_floating_point() and indices.dtype not in (torch.bool, torch.uint8)
    return matrices.dim() == 3 and indices.dim() == 1 and integers


def lookup(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]`` as an embedding."""
    indices = indices.long() % len(table)  # they may count from the end
    if table.dim() == 1:
        return F.embedding(indices, table.unsqueeze(1)).squeeze(-1)
    return F.embedding(indices, table)


# --- normalisation --------------------------------------------------------------------------------

# x̂ is computed anew: inverting (output − bias) / weight breaks where the weight is 0.


def _affine(
    samples: Samples, grad: Tensor, normalized: Tensor | None, features: int
) -> tuple[Tensor | None, Tensor]:
    """Per-sample gradients of weight and bias in x̂·weight + bias."""
    dtype = _wide(grad)
    weight = None
    if normalized is not None:
        weight = samples.sum(grad.to(dtype) * normalized, features, dtype)
    return weight, samples.sum(grad, features, dtype)


@_rule(F.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use:
    """``torch.nn.functional.layer_norm``."""
    shape = tuple(normalized_shape)

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        normalized = None
        if input is not None:
            normalized = F.layer_norm(input.to(_wide(grad)), shape, eps=eps)
        return _affine(samples, grad, normalized, len(shape))

    saved = (_if_trained(input, weight),)
    return Use(input, len(shape), (weight, bias), saved, gradients)


@_rule(F.rms_norm)
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Use:
    """``torch.nn.functional.rms_norm``."""
    shape = tuple(normalized_shape)
    # The default depends on the input's dtype, not on the wider one used below.
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        normalized = F.rms_norm(input.to(_wide(grad)), shape, eps=epsilon)
        return _affine(samples, grad, normalized, len(shape))[:1]

    return Use(input, len(shape), (weight,), (input,), gradients)


def _channels_last(tensor: Tensor) -> Tensor:
    """[N, C, *spatial] → [N, *spatial, C]."""
    return tensor.movedim(1, -1)


@_rule(F.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Use:
    """``torch.nn.functional.group_norm``."""

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        _refuse_packed(samples, "group_norm")
        normalized = None
        if input is not None:
            normalized = F.group_norm(input.to(_wide(grad)), num_groups, eps=eps)
            normalized = _channels_last(normalized)
        return _affine(samples, _channels_last(grad), normalized, 1)

    features = input.dim() - 1  # positions are no tokens: the statistics mix them
    return Use(input, features, (weight, bias), (_if_trained(input, weight),), gradients)


@_rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Use:
    """``torch.nn.functional.batch_norm`` with the running statistics."""

    def gradients(
        samples: Samples,
        grad: Tensor,
        input: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Gradients:
        _refuse_packed(samples, "batch_norm")
        normalized = None
        if input is not None and mean is not None and variance is not None:
            dtype = _wide(grad)
            scale = (variance.to(dtype) + eps).rsqrt()
            normalized = (_channels_last(input).to(dtype) - mean.to(dtype)) * scale
        return _affine(samples, _channels_last(grad), normalized, 1)

    # Copies: a later training pass updates the statistics in place.
    statistics = [None if s is None else s.detach().clone() for s in (running_mean, running_var)]
    saved = (_if_trained(input, weight), *statistics)
    return Use(input, input.dim() - 1, (weight, bias), saved, gradients)


def refuse_batch_statistics(
    packed: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    """Refuse a batch_norm that makes samples depend on one another.

    What has a leading dimension of 1 and no running statistics has no samples to mix: a weight that
    is standardised.
    """
    if training and (packed or running_mean is not None or len(input) > 1):
        raise ValueError(
            "batch_norm in training mode makes a sample's gradient depend on the whole batch; put "
            "the BatchNorm modules in eval mode, with track_running_stats=True."
        )


@_rule(*named("prelu"))
def prelu(input: Tensor, weight: Tensor) -> Use:
    """``torch.nn.functional.prelu``: one slope, or one for each channel."""
    channels = weight.numel() > 1

    def gradients(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
        slopes = grad * input.clamp(max=0)
        if not channels:
            return (samples.sum(slopes, 0, _wide(grad)).unsqueeze(1),)
        return (samples.sum(_channels_last(slopes), 1, _wide(grad)),)

    if channels and input.dim() > 2:  # [N, C, ...]: positions are no tokens

        def of_images(samples: Samples, grad: Tensor, input: Tensor) -> Gradients:
            _refuse_packed(samples, "prelu")
            return gradients(samples, grad, input)

        return Use(input, input.dim() - 1, (weight,), (input,), of_images)
    return Use(input, int(channels), (weight,), (input,), gradients)


# --- convolutions ---------------------------------------------------------------------------------


def _refuse_packed(samples: Samples, function: str) -> None:
    if samples.packed:
        raise UnsupportedUseError(
            f"{function} cannot tell the samples of a packed batch, or of gathered rows, apart"
        )


def _repeated(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


@_rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Use:
    """``torch.nn.functional.conv1d``, ``conv2d`` and ``conv3d``."""
    spatial = weight.dim() - 2
    if input.dim() != weight.dim():
        raise UnsupportedUseError(
            f"its input must have {weight.dim()} dimensions, the first for samples, not "
            f"{input.dim()}"
        )
    kernel = tuple(weight.shape[2:])
    dilations = _repeated(dilation, spatial)
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        around = tuple((r // 2, r - r // 2) for r in reach)
    elif isinstance(padding, str):  # "valid"
        around = ((0, 0),) * spatial
    else:
        around = tuple((p, p) for p in _repeated(padding, spatial))
    geometry = Convolution(kernel, _repeated(stride, spatial), around, dilations, groups)
    return _convolved(input, weight, bias, geometry, transposed=False)


@_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Use:
    """``conv_transpose1d`` to ``3d``: a convolution whose input and output change places."""
    spatial = weight.dim() - 2
    if input.dim() != weight.dim():
        raise UnsupportedUseError(
            f"its input must have {weight.dim()} dimensions, the first for samples, not "
            f"{input.dim()}"
        )
    # Without what output_padding adds, each position of the input has a window in the output.
    added = zip(_repeated(padding, spatial), _repeated(output_padding, spatial), strict=True)
    geometry = Convolution(
        tuple(weight.shape[2:]),
        _repeated(stride, spatial),
        tuple((p, p - more) for p, more in added),
        _repeated(dilation, spatial),
        groups,
    )
    return _convolved(input, weight, bias, geometry, transposed=True)


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Convolution, transposed: bool
) -> Use:
    bias_trained = bias is not None and bias.requires_grad

    def gradients(samples: Samples, grad: Tensor, input: Tensor | None) -> Gradients:
        _refuse_packed(samples, "a convolution")
        weights = None
        if input is not None:
            ends = (grad, input) if transposed else (input, grad)
            weights = Convolved(*ends, geometry, samples.count)
        if not bias_trained:
            return weights, None
        return weights, samples.sum(grad.flatten(2).sum(2, dtype=_wide(grad)), 1)

    saved = (_if_trained(input, weight),)
    return Use(input, input.dim() - 1, (weight, bias), saved, gradients)


# --- parameters that are added, multiplied, ... ---------------------------------------------------


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

# What returns views, if it can; a view of a parameter keeps the form that its gradients have.
VIEWS = named(
    *("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "t", "transpose"),
    *("permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "chunk", "split"),
    *("split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit"),
    *("unbind", "select", "narrow", "unsqueeze", "squeeze", "diagonal", "as_strided", "ravel"),
    *("__getitem__", "expand", "expand_as", "broadcast_to", "detach"),
) | {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__}  # type: ignore[attr-defined]

# What may put samples and tokens into one dimension.
RESHAPES = named("view", "reshape", "flatten", "view_as", "reshape_as")

# Copies along a new leading dimension, as of a class token: each sample's copy has its gradient.
EXPANSIONS = named("expand", "expand_as", "broadcast_to", "repeat", "tile")


def expand_gradient(samples: Samples, grad: Tensor, shape: Sequence[int]) -> Dense:
    """Per-sample gradients of a tensor of ``shape`` that was broadcast to the shape of ``grad``."""
    kept = list(shape)
    while kept and (kept[0] == 1 or len(kept) > grad.dim()):
        kept.pop(0)
    sums = samples.sum(grad, len(kept), _wide(grad))  # [N, *trailing dimensions of grad]
    broadcast = [i + 1 for i, size in enumerate(kept) if size == 1 and sums.shape[i + 1] != 1]
    if broadcast:
        sums = sums.sum(broadcast, keepdim=True)
    return Dense(sums.reshape(samples.count, *shape))


def features_after_broadcast(shape: Sequence[int], output: Sequence[int]) -> int:
    """How many trailing dimensions of ``output`` a tensor of ``shape`` has an extent in."""
    kept = list(shape)
    while kept and kept[0] == 1:
        kept.pop(0)
    if len(kept) > len(output):
        raise UnsupportedUseError(f"shape {list(shape)} does not broadcast to {list(output)}")
    return len(kept)
