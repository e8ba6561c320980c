"""What a rule is, and which function has which.

A rule is called with the arguments of its torch function and describes that call as a :class:`Use`:
how an output gradient becomes per-sample gradients of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_optim.fisher.per_sample.base import PerSample
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
# Functions that have no rule, but do what others that have one do together: those are called.
TAKEN_APART: dict[Callable[..., Any], Callable[..., Any]] = {}


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


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Return a decorator that registers the rule of these functions of torch."""

    def register(rule: Rule) -> Rule:
        for function in functions:
            register_fisher_rule(function, rule)
        return rule

    return register


def if_trained(tensor: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return what only the gradient of ``parameter`` needs: it is not kept for a frozen one."""
    return tensor if parameter is not None and parameter.requires_grad else None


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums are formed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def channels_last(tensor: Tensor) -> Tensor:
    """Return [N, C, *spatial] as [N, *spatial, C]."""
    return tensor.movedim(1, -1)


def refuse_packed(samples: Samples, function: str) -> None:
    """Refuse samples that are not along a dimension of their own."""
    if samples.packed:
        raise UnsupportedUseError(
            f"{function} cannot tell the samples of a packed batch, or of gathered rows, apart"
        )
