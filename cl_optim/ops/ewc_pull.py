"""The pull of EWC alone, in place, over lists of tensors: beside the step of any optimizer.

With Δ = θ − θ* and c = 2·lr·λ·F:

- gradient: g ← g + 2λFΔ, before the step;
- decoupled: θ ← θ′ − cΔ, where θ′ is what the step has left of θ;
- proximal: θ ← θ* + (θ′ − θ*)/(1 + c).

:func:`fused` is the compiled operator ``torch.ops.cl_optim.ewc_pull_``, :func:`foreach` the
reference; both are those of :mod:`cl_optim.ops.ewc_adamw` without Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cl_optim.ops import formats, library
from cl_optim.ops import importance_codec as codec
from cl_optim.ops.ewc_adamw_arguments import PENALTIES, Hyperparameters, TensorList
from cl_optim.ops.ewc_adamw_reference import proximal_

library.define(
    "ewc_pull_(Tensor(a!)[] targets, Tensor[] beside, Tensor[] importances, Tensor[] anchors, "
    "Tensor(b!)[] steps, Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf, *, float lr, "
    "float ewc_lambda, str penalty, bool maximize, bool stochastic) -> ()",
    cpu="compiled",
    cuda="compiled",
)


@dataclass(frozen=True)
class Options:
    """What all tensors of a pull share; checked on construction.

    Attributes:
        lr: The learning rate, or of several steps their sum.
        ewc_lambda: λ.
        penalty: A form of :data:`cl_optim.ops.ewc_adamw_arguments.PENALTIES`.
        maximize: The optimizer ascends its gradients, which the pull must not.
        stochastic: bfloat16 weights are rounded stochastically.

    Raises:
        ValueError: A value is outside its range; the message names it.
    """

    lr: float
    ewc_lambda: float
    penalty: str = "proximal"
    maximize: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "ewc_lambda"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, not {value}.")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {PENALTIES}, not {self.penalty!r}.")

    def hyper(self) -> Hyperparameters:
        """Return the options as a plan takes them (:mod:`cl_optim.ops.ewc_adamw_plan`)."""
        return Hyperparameters(
            lr=self.lr,
            beta1=0.0,
            beta2=0.0,
            eps=0.0,
            weight_decay=0.0,
            ewc_lambda=self.ewc_lambda,
            penalty=self.penalty,
            maximize=self.maximize,
            stochastic=self.stochastic,
        )


class Pulled(NamedTuple):
    """The tensors of a pull, in lists of one order.

    Attributes:
        targets: The gradients (``"gradient"``), else the weights; written.
        beside: The weights (``"gradient"``); as they were before the step (``"decoupled"``); or
            empty.
        importances: F; where it marks a weight as frozen, the target stays.
        anchors: θ*.
        steps: With stochastic rounding the number of pulls before, one float32 number each, which
            is advanced; else empty.
    """

    targets: TensorList
    beside: TensorList
    importances: TensorList
    anchors: TensorList
    steps: TensorList = ()


class Numbers(NamedTuple):
    """Numbers that may be on a device, and are not read on the host; float32.

    Attributes:
        lr: In place of the option.
        grad_scale: The gradients are this times too large (``torch.amp.GradScaler``).
        found_inf: Not 0: nothing is written.
    """

    lr: Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_NUMBERS = Numbers()

Pull: TypeAlias = Callable[[Pulled, Options, Numbers], None]


def fused(pulled: Pulled, options: Options, numbers: Numbers = NO_NUMBERS) -> None:
    """Take a pull by the compiled operator; all tensors are on one device that has kernels."""
    torch.ops.cl_optim.ewc_pull_(*pulled, *numbers, **vars(options))
    torch.autograd.graph.increment_version(pulled.targets)


def foreach(pulled: Pulled, options: Options, numbers: Numbers = NO_NUMBERS) -> None:
    """Take a pull in plain PyTorch, on any device."""
    lr, grad_scale, found_inf = numbers
    if found_inf is not None and found_inf.item() != 0.0:
        return
    for i, target in enumerate(pulled.targets):
        importance, frozen = formats.load_importance(pulled.importances[i], target)
        value = target.to(formats.arithmetic_dtype(target), copy=True)
        anchor = pulled.anchors[i].to(value.dtype)
        pull = _pull(value.dtype, options, lr)
        if options.penalty == "proximal":
            proximal_([value], [importance], [anchor], [pull])
        else:
            drift = (pulled.beside[i].to(value.dtype) - anchor) * importance * pull
            if options.penalty == "decoupled":
                value -= drift
            else:
                sign = -1.0 if options.maximize else 1.0
                factor = sign if grad_scale is None else sign * grad_scale.double()
                value += drift * factor
        random = None
        if options.stochastic:
            pulled.steps[i].add_(1.0)
            random = partial(_random, pulled.anchors[i], pulled.steps[i], pulled.importances[i])
        _store(target, value, frozen, random)


def _pull(dtype: torch.dtype, options: Options, lr: Tensor | None) -> float | Tensor:
    pull: float | Tensor = 2.0 * options.ewc_lambda
    if options.penalty != "gradient":
        pull = pull * (options.lr if lr is None else lr.double())
    largest = torch.finfo(dtype).max
    return pull.clamp(max=largest) if isinstance(pull, Tensor) else min(pull, largest)


def _random(anchor: Tensor, step: Tensor, importance: Tensor) -> Tensor:
    wide = torch.empty_like(anchor, dtype=torch.float32).copy_(anchor)
    if formats.is_codes(importance):
        wide = wide.contiguous()
    return codec.hashed(wide, step.item() if step.is_cpu else step.double())


def _store(
    target: Tensor, value: Tensor, frozen: Tensor, random: Callable[[], Tensor] | None
) -> None:
    rounds = random is not None and target.dtype == torch.bfloat16
    narrow = codec.stochastic_bfloat16(value, random()) if rounds and random else value
    target.copy_(torch.where(frozen, target, narrow.to(target.dtype)))
