"""How other libraries normalise the Fisher information and what they multiply the penalty by.

For comparison and for settings found in papers: none of this is a better Fisher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import nn

from cl_optim.fisher import batches as data
from cl_optim.fisher import nested
from cl_optim.fisher.checks import check_model
from cl_optim.fisher.estimate import estimate
from cl_optim.fisher.model import evaluating, provenance, trained
from cl_optim.fisher.objective import Objective
from cl_optim.fisher.observe.refusals import Policy
from cl_optim.fisher.totals import Totals
from cl_optim.importance.importance import Importance

Published: TypeAlias = Literal["avalanche", "van_de_ven", "mammoth"]


@dataclass(frozen=True)
class _Convention:
    """What stands before Σ F (θ − θ*)² besides λ, and what F is next to the mean over samples.

    Attributes:
        half: Whether the penalty has a ½.
        of_batches: Whether F squares batch means: smaller by about the batch size.
        note: Where that is.
    """

    half: bool
    of_batches: bool
    note: str


CONVENTIONS = {
    "cl_optim": _Convention(False, False, "λ Σ F Δ², F the mean over samples"),
    "kirkpatrick": _Convention(True, False, "½ λ Σ F Δ², arXiv:1612.00796"),
    "van_de_ven": _Convention(True, False, "GMvandeVen/continual-learning"),
    "mammoth": _Convention(False, False, "ewc_on; its F is weighted by p(y|x) besides"),
    "facil": _Convention(True, False, "squared batch means times the batch size"),
    "avalanche": _Convention(False, True, "EWCPlugin"),
    "gem": _Convention(False, True, "model/ewc.py of GradientEpisodicMemory, one batch"),
    "trace": _Convention(True, True, "EWC.py of TRACE"),
    "llm_ewc": _Convention(True, True, "Neurotechnology/LLM_EWC"),
}


def convert_lambda(
    ewc_lambda: float, source: str, target: str = "cl_optim", *, batch_size: int = 1
) -> float:
    """Return the λ that in ``target`` pulls about as hard as ``ewc_lambda`` does in ``source``.

    Two things move λ between libraries: a ½, which is exact, and whether gradients are squared per
    sample or per batch. A squared mean over b independent gradients of mean zero is smaller by b;
    where gradients have a common direction, by less, so that conversion is only a starting point.

    Args:
        ewc_lambda: λ ≥ 0.
        source: ``"cl_optim"``, ``"kirkpatrick"``, ``"van_de_ven"``, ``"mammoth"``, ``"facil"``,
            ``"avalanche"``, ``"gem"``, ``"trace"`` or ``"llm_ewc"``.
        target: One of the same.
        batch_size: That of the Fisher pass where gradients are squared per batch.

    Raises:
        ValueError: A name is unknown, ``ewc_lambda`` is negative, or ``batch_size`` is below 1.

    Example:
        >>> convert_lambda(100.0, "kirkpatrick")
        50.0
        >>> convert_lambda(1.0, "avalanche", batch_size=256)
        0.00390625
    """
    for argument, name in (("source", source), ("target", target)):
        if name not in CONVENTIONS:
            raise ValueError(f"{argument} must be one of {list(CONVENTIONS)}, not {name!r}.")
    if not ewc_lambda >= 0:
        raise ValueError(f"ewc_lambda must be at least 0, not {ewc_lambda}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")

    def strength(name: str) -> float:
        convention = CONVENTIONS[name]
        return (0.5 if convention.half else 1.0) / (batch_size if convention.of_batches else 1)

    return ewc_lambda * strength(source) / strength(target)


def published_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    convention: Published,
    max_samples: int | None = None,
) -> Importance:
    """Compute the Fisher information as another library does, for comparison only.

    ``"avalanche"``
        The squared gradient of each batch's *mean* loss, with the data's labels, averaged over
        batches (``EWCPlugin``). Smaller than the Fisher information by about the batch size.
    ``"van_de_ven"``
        Exact labels, per sample, divided by the last index: N − 1 where all data were used
        (GMvandeVen/continual-learning, ``fisher_labels="all"``).
    ``"mammoth"``
        The data's labels, per sample, each square weighted by p(y|x), divided by the number of
        batches times the size of the first (``ewc_on``). The original leaves the model in training
        mode; here it is in eval mode.

    Args:
        model: Returns logits [N, C].
        batches: Yields ``(inputs, targets)``, as :func:`estimate_fisher` takes them.
        convention: As above.
        max_samples: Stop after so many samples (for ``"avalanche"``, with the batch that reaches
            them).

    Returns:
        An importance that reads as that library's F; its ``samples`` is the library's divisor.

    Raises:
        ValueError: ``convention`` is unknown, or as for :func:`estimate_fisher`.
    """
    check_model(model)
    if convention not in get_args(Published):
        raise ValueError(f"convention must be one of {get_args(Published)}, not {convention!r}.")
    if convention == "avalanche":
        return _of_batch_means(model, batches, max_samples)
    sizes: list[int] = []
    ended = False

    def counted() -> Any:
        nonlocal ended
        for batch in batches:
            sizes.append(data.leading(batch, f"batch {len(sizes)}"))
            yield batch
        ended = True

    mammoth = convention == "mammoth"
    objective = Objective("empirical" if mammoth else "exact", by_probability=mammoth)
    fisher = estimate(model, counted(), objective, max_samples, Policy())
    divisor = len(sizes) * sizes[0] if mammoth else fisher.samples
    if not mammoth and (ended or sum(sizes) <= fisher.samples):
        divisor -= 1
    metadata = {**fisher.metadata, "convention": convention}
    return Importance(fisher.sums, divisor, fisher.tokens, metadata)


def _of_batch_means(
    model: nn.Module, batches: Iterable[Any], max_samples: int | None
) -> Importance:
    totals = Totals(model)
    parameters = trained(model)
    device = next(model.parameters()).device
    if totals.spread:
        raise NotImplementedError(
            "convention='avalanche' squares the gradient of a batch, which is another one where a "
            "model is spread over processes: use estimate_fisher."
        )
    samples = count = 0
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            where = f"batch {count}"
            batch = nested.map_tensors(lambda tensor: tensor.to(device), batch)
            labelled = data.read(batch, model, "empirical", False, where)
            size = data.leading(labelled.inputs, where)
            logits = data.check_logits(labelled.logits(model), size, "empirical", where)
            data.check_targets(labelled.targets, logits, where)
            assert labelled.targets is not None
            loss = F.cross_entropy(logits.flatten(0, -2), labelled.targets.flatten())
            torch.autograd.backward(loss)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    totals.sums[name] += parameter.grad.to(totals.sums[name].dtype).square()
                    parameter.grad = None
            count, samples = count + 1, samples + size
            if max_samples is not None and samples >= max_samples:
                break
    if count == 0:
        raise ValueError("batches has no samples.")
    metadata = {
        "estimator": "published_fisher",
        "convention": "avalanche",
        "labels": "empirical",
        "sample": "batch",
        **provenance(model, parameters),
    }
    return Importance(totals.sums, count, None, metadata)
