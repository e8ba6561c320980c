"""Interpolation in weight space: a model between what it was and what it has become."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_optim.distributed import (
    MeanRanks,
    Together,
    check_ranks,
    here,
    is_spread,
    mesh_of,
    place,
    refuse_own,
    reshard,
)
from cl_optim.importance.importance import check_reduced
from cl_optim.importance.names import named_like
from cl_optim.ops.checks import listed
from cl_optim.ops.formats import arithmetic_dtype
from cl_optim.ops.warn import warn
from cl_optim.optim.settling import settle
from cl_optim.retention.guard.evaluation import Evaluation
from cl_optim.retention.guard.judge import Judge
from cl_optim.retention.interpolation.curve import Curve, Point, ascending
from cl_optim.retention.interpolation.old_weights import (
    Old,
    check_local,
    matched,
    old_weights,
    running_statistics,
)

_LOGGER = logging.getLogger(__name__)

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


class InterpolationWarning(UserWarning):
    """Something of a model cannot be interpolated as its weights can."""


def interpolate(
    model: nn.Module,
    old: Old,
    alpha: float | None = None,
    *,
    evaluate: Evaluation | Iterable[Evaluation] | None = None,
    budget: float | None = None,
    tolerance: float = 0.02,
    importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    recalibrate: Callable[[nn.Module], object] | None = None,
    strict: bool = True,
    baselines: Mapping[str, float] | None = None,
    ranks: MeanRanks = None,
) -> Curve:
    r"""Set a model's weights to θ* + α(θ − θ*), between the old ones and those that it has.

    Either α is given, or the largest one is looked for that loses no more than ``budget`` of any
    old task: by bisection, so that about 1 + log₂(1/(α·tolerance)) α's are evaluated. What the new
    weights lose no more than the budget of stays as it is. Of losses that do not rise all the way
    the result says so; the weights taken are always some that were measured to fit. (Where
    ``baselines`` are given that no weights on the way reach, those that lose least; it warns.)

    With ``importance`` of both, each weight has an α of its own, α·F/((1 − α)·F* + α·F): the
    weights at which the sum of the two quadratics is least.

    A tied weight is interpolated once. Of a LoRA model whose adapters began at 0 it is ΔW = s·BA
    that is scaled by α, exactly, by way of B. Floating-point buffers are interpolated; for running
    statistics of batch norms, which other weights do not have between the two, give
    ``recalibrate``. Everything is done tensor by tensor; the new weights are kept in memory while
    α is being looked for, and ``old`` is read when it is needed.

    Do it when training has ended, and after ``settle()`` of an optimizer that is not ``old``:
    moments, and what is due of a pull, are of the new weights.

    Args:
        model: Its parameters are written. If anything fails they are what they were.
        old: θ*: a state dict, a model, an optimizer with anchors (which is settled), a file of
            safetensors or ``torch.save``, a guard's checkpoint, or a folder of transformers'.
        alpha: In [0, 1].
        evaluate: What measures old tasks (``role="old"``, one at least) and, only to be shown,
            new ones.
        budget: The part of an old task that may be lost, in (0, 1), of what the old weights reach.
        tolerance: How exactly α is found, as a part of it, in (0, 1); below its square, α is 0.
        importance: F* of the old task and F of the new one, by parameter name.
        recalibrate: Runs the model on some batches. Batch norms average their statistics over
            these, at each α between the two ends; and at the old one where ``old`` has none.
        strict: Refuse names that only one of the two has; False leaves such weights as they are.
        baselines: What the budget is a part of, by an evaluation's name, in place of what the old
            weights reach.
        ranks: Where several processes train the model: ``"mean"``: all call it, and the mean of
            what they measure counts, as it does in any case where the model is of DTensors, each
            process on its part; a process group: its members do; ``"own"``: this one alone calls
            it, which has the whole model.

    Returns:
        The α of the weights that the model has now, and all that was measured on the way.

    Raises:
        TypeError: ``old`` is of an unknown kind.
        ValueError: α, the budget or the tolerance is out of range, or they do not go together;
            names or shapes differ; there are no anchors; the old weights' evaluation is not finite
            or 0; adapters did not begin at 0; or there are several processes, and ``ranks`` does
            not say whose numbers count.

    References:
        Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT); Matena & Raffel 2022, arXiv:2111.09832
        (Fisher-weighted).

    Example:
        .. code-block:: python

            english = Evaluation("English", bits_per_byte, higher_is_better=False)
            old = {name: value.clone() for name, value in model.state_dict().items()}
            train(model, optimizer, task_b)
            curve = interpolate(model, old, evaluate=english, budget=0.05)
            print(curve)
    """
    check_ranks(ranks, "mean")
    if (alpha is None) == (budget is None):
        raise ValueError("give either alpha or a budget, and evaluate= with the budget.")
    if alpha is not None and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}.")
    if budget is not None and not 0.0 < budget < 1.0:
        raise ValueError(f"budget must be between 0 and 1, both excluded, not {budget}.")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, both excluded, not {tolerance}.")
    if (budget is not None) != (evaluate is not None):
        raise ValueError("evaluate and budget go together: interpolation_curve() only measures.")
    line = _Line(
        model,
        old,
        importance,
        recalibrate,
        strict=strict,
        stays=alpha is None or recalibrate is not None,
        ranks=None if evaluate is None else _checked_ranks(model, ranks),
    )
    if alpha is not None:
        with line.or_back():
            line.go(alpha)
        return Curve((), alpha)
    assert evaluate is not None
    assert budget is not None
    with line.or_back():
        points = _Points(line, _all_of(evaluate), baselines)
        chosen = _largest(points, budget, tolerance)
        line.go(chosen)
    curve = Curve(points.found, chosen, budget)
    if points.at(chosen).loss > budget:
        warn(curve.sentence, InterpolationWarning)
    _LOGGER.info("%s", curve.sentence)
    return curve


def interpolation_curve(
    model: nn.Module,
    old: Old,
    evaluate: Evaluation | Iterable[Evaluation],
    alphas: Sequence[float] = ALPHAS,
    *,
    importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    recalibrate: Callable[[nn.Module], object] | None = None,
    strict: bool = True,
    ranks: MeanRanks = None,
) -> Curve:
    """Measure a model along the way from the old weights to its own, which it has afterwards.

    Args:
        model: As for :func:`interpolate`.
        old: Likewise.
        evaluate: What is measured; one has the role ``"old"``, at least.
        alphas: Where, each in [0, 1]; 0, which losses are relative to, is added.
        importance: Likewise.
        recalibrate: Likewise.
        strict: Likewise.
        ranks: Likewise.

    Returns:
        All points; ``print`` it, or ``curve.draw(path)``.

    Raises:
        TypeError: As for :func:`interpolate`.
        ValueError: Likewise; or there are no ``alphas``.
    """
    wanted = sorted({0.0, *map(float, alphas)})
    if len(wanted) < 2 or not all(0.0 <= alpha <= 1.0 for alpha in wanted):
        raise ValueError(f"alphas must be numbers in [0, 1], one above 0, not {list(alphas)}.")
    line = _Line(
        model,
        old,
        importance,
        recalibrate,
        strict=strict,
        stays=True,
        ranks=_checked_ranks(model, ranks),
    )
    with line.or_back():
        points = _Points(line, _all_of(evaluate))
        for alpha in wanted[1:]:
            points.at(alpha)
    line.go(1.0)
    return Curve(points.found, 1.0)


def check_between(model: nn.Module, old: Old) -> None:
    """Refuse old weights that a model cannot be interpolated with, before it is trained.

    Raises:
        TypeError: As for :func:`interpolate`.
        ValueError: Likewise.
    """
    reshard(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    check_local(tensors, parts=True)
    values, missing = matched(old_weights(old, model), model, strict=True)
    _check_adapters(tensors, values, Together(mesh=mesh_of(tensors.values())))
    _check_present([name for name in missing if not _is_adapter(name)])


def _check_present(missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"old has nothing for {listed(missing)}: give all the old weights, or strict=False "
            "to leave these as they are."
        )


def _all_of(evaluate: Evaluation | Iterable[Evaluation]) -> list[Evaluation]:
    return [evaluate] if isinstance(evaluate, Evaluation) else list(evaluate)


class _Points:
    """Measures a model on its way, and remembers what it has measured."""

    def __init__(
        self,
        line: _Line,
        evaluations: Sequence[Evaluation],
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        self._judge = Judge(evaluations, (), None, line.ranks)
        self._line = line
        line.go(0.0)
        values = self._judge.measure(line.model)
        self._baselines = self._judge.baselines(values, baselines)
        first = Point(0.0, self._judge.compare(values, self._baselines))
        self._found = {0.0: first}

    @property
    def found(self) -> tuple[Point, ...]:
        return ascending(list(self._found.values()))

    def at(self, alpha: float) -> Point:
        if alpha in self._found:
            return self._found[alpha]
        self._line.go(alpha)
        values = self._judge.measure(self._line.model)
        self._found[alpha] = Point(alpha, self._judge.compare(values, self._baselines))
        return self._found[alpha]


def _largest(points: _Points, budget: float, tolerance: float) -> float:
    """Return the largest α that was seen to lose no more than a budget."""
    if points.at(1.0).loss <= budget:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > tolerance * max(low, tolerance):
        middle = (low + high) / 2
        if points.at(middle).loss <= budget:
            low = middle
        else:
            high = middle
    if points.at(low).loss > budget:  # of baselines that the old weights do not reach either
        return min(points.found, key=lambda point: point.loss).alpha
    return low


# --- the way --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A tensor of the model on the way.

    Attributes:
        tensor: It is written.
        old: Reads θ*; None: of a LoRA adapter's B, that began at 0.
        new: θ; None where the tensor is left only once.
        ratio: F*/F of each weight, float32; None: all alike.
    """

    tensor: Tensor
    old: Callable[[], Tensor] | None
    new: Tensor | None
    ratio: tuple[Tensor, Tensor] | None


class _Line:
    """The weights between two ends; the model is at one point of it."""

    def __init__(
        self,
        model: nn.Module,
        old: Old,
        importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None,
        recalibrate: Callable[[nn.Module], object] | None,
        *,
        strict: bool,
        stays: bool,
        ranks: MeanRanks,
    ) -> None:
        reshard(model)
        self.model = model
        self._recalibrate = recalibrate
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        check_local(tensors, parts=True)
        self.together = Together(mesh=mesh_of(tensors.values()))
        self.ranks = ranks
        for one in importance or ():
            check_reduced(one)
        settle(old)
        values, missing = matched(old_weights(old, model), model, strict=strict)
        scaled = _check_adapters(tensors, values, self.together)
        missing = [name for name in missing if not _is_adapter(name)]
        if strict:
            _check_present(missing)
        if missing:
            _LOGGER.info("not interpolated, as there is nothing old of them: %s.", listed(missing))
        weights = None if importance is None else [named_like(one, tensors) for one in importance]
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        lacking = [name for name in running_statistics(model) if name not in values]
        if lacking and strict and (recalibrate is None or not self._norms):
            raise ValueError(
                f"old has no running statistics, of {len(lacking)} buffers ({listed(lacking, 1)}), "
                "as an optimizer's anchors have none: give the old weights as a state dict, or "
                "recalibrate= to estimate them anew, or strict=False to leave them as they are."
            )
        self._has_old_statistics = not lacking
        if self._norms and recalibrate is None:
            done = "left as they are" if lacking else "interpolated"
            warn(
                f"the running statistics of {len(self._norms)} batch norms are {done}, which are "
                "not those of the weights between: recalibrate= estimates them anew.",
                InterpolationWarning,
            )
        self._parts: list[_Part] = []
        for name, tensor in tensors.items():
            if name not in values and name not in scaled:
                continue
            read = None if name in scaled else values[name]
            part = here(tensor.detach())
            new = part.clone() if stays else None
            ratio = None if weights is None else _of_both(weights, name, tensor)
            self._parts.append(_Part(part, read, new, ratio))
        if not self._parts:
            raise ValueError("old has nothing that the model has: give the old weights of it.")
        # What recalibration writes and the way between the weights does not.
        counts = [module.num_batches_tracked for module in self._norms]
        written = [*(tensors[name] for name in lacking), *(c for c in counts if c is not None)]
        self._kept = [(tensor, tensor.clone()) for tensor in written]

    @torch.no_grad()
    def go(self, alpha: float) -> None:
        """Give the model the weights of α."""
        for part in self._parts:
            new = part.tensor if part.new is None else part.new
            part.tensor.copy_(_between(part, new, alpha))
        for tensor, kept in self._kept:
            tensor.copy_(kept)
        ends = (0.0, 1.0) if self._has_old_statistics else (1.0,)
        if self._norms and self._recalibrate is not None and alpha not in ends:
            self._average()

    def _average(self) -> None:
        assert self._recalibrate is not None
        flags = [(module, module.training) for module in self.model.modules()]
        kept = [(module.momentum, module) for module in self._norms]
        self.model.eval()
        for module in self._norms:
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
            module.training = True
        try:
            self._recalibrate(self.model)
        finally:
            for momentum, module in kept:
                module.momentum = momentum
            for any_module, flag in flags:
                any_module.training = flag
        unseen = [m for m in self._norms if int(m.num_batches_tracked or 0) == 0]
        if unseen:
            raise ValueError(
                f"recalibrate ran none of its batches through {len(unseen)} of the batch norms: "
                "let it call the model on batches of the new and the old task."
            )

    def or_back(self) -> _OrBack:
        """Return what goes back to the new weights if anything is raised inside."""
        return _OrBack(self)

    @torch.no_grad()
    def back(self) -> None:
        """Give the model its own weights."""
        for part in self._parts:
            if part.new is not None:
                part.tensor.copy_(part.new)
        for tensor, kept in self._kept:
            tensor.copy_(kept)


class _OrBack:
    def __init__(self, line: _Line) -> None:
        self._line = line

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, *rest: Any) -> None:
        if kind is not None:
            self._line.back()


def _between(part: _Part, new: Tensor, alpha: float) -> Tensor:
    """Return θ* + α(θ − θ*): at 0 and 1 bit for bit the ends, else rounded once."""
    if alpha == 1.0:
        return new
    dtype = arithmetic_dtype(new)
    if part.old is None:
        return new.to(dtype) * alpha
    old = part.old().to(new.device, dtype)
    if alpha == 0.0:
        return old
    if part.ratio is None:
        return torch.lerp(old, new.to(dtype), alpha)
    of_old, of_new = part.ratio
    total = (1 - alpha) * of_old + alpha * of_new
    own = torch.where(total > 0, alpha * of_new / total, alpha).to(dtype)
    return torch.lerp(old, new.to(dtype), own)


def _of_both(
    weights: Sequence[Mapping[str, Tensor]], name: str, tensor: Tensor
) -> tuple[Tensor, Tensor] | None:
    found = [one.get(name) for one in weights]
    if any(value is None for value in found):
        return None  # a buffer, or what one of the two has no importance of
    checked = []
    for value in found:
        assert value is not None
        if value.shape != tensor.shape:
            raise ValueError(
                f"the importance of {name!r} has shape {tuple(value.shape)}, and the parameter "
                f"{tuple(tensor.shape)}: estimate both with this model."
            )
        value = here(value.detach(), tensor).to(tensor.device, torch.float32)
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"the importance of {name!r} must be finite and at least 0.")
        checked.append(value)
    # Their products with α must not underflow; one scale for both does not change the ratio.
    largest = torch.maximum(*checked)
    scale = max(float(largest.max()) if largest.numel() else 0.0, torch.finfo(torch.float32).tiny)
    return checked[0] / scale, checked[1] / scale


def _checked_ranks(model: nn.Module, ranks: MeanRanks) -> MeanRanks:
    """Return whose numbers count; of DTensors those of all processes."""
    check_ranks(ranks, "mean")
    refuse_own(model, ranks)
    others = place()
    if ranks is None and is_spread(model):
        return "mean"
    if ranks is None and others is not None:
        raise ValueError(
            f"ranks must be 'mean' where {others[1]} processes have the model and all call this, "
            "or 'own' where this one alone does: if each measured for itself, they would go on "
            "with other weights."
        )
    return ranks


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _check_adapters(
    tensors: Mapping[str, Tensor],
    values: dict[str, Callable[[], Tensor]],
    together: Together,
) -> set[str]:
    """Return the names of LoRA's B that are to be scaled; A then stays as it is."""
    scaled = set()
    olds = {name: values.pop(name, None) for name in tensors if _is_adapter(name)}

    def began_at_0(name: str) -> bool:
        old = olds.get(name)
        return old is not None and not any(together.gather(bool(old().any())))

    for name, old in olds.items():
        if "lora_magnitude" in name:
            raise ValueError(f"{name!r} is of a DoRA adapter: merge it, and give merged weights.")
        if "lora_B" not in name and "lora_embedding_B" not in name:
            continue
        # Of an embedding's adapter it is A that peft begins with 0.
        other = name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
        if old is not None and not began_at_0(name) and not began_at_0(other):
            raise ValueError(
                f"the adapter of {name!r} did not begin at 0: what is between two of them has "
                "both their ranks. Merge both into the weights (merge_and_unload) and interpolate "
                "these."
            )
        scaled.add(name)
    return scaled
