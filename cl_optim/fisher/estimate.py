"""estimate_fisher: the Fisher information of a model on some data, in a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from cl_optim.distributed import Ranks, Together, check_ranks
from cl_optim.fisher import batches as data
from cl_optim.fisher import nested
from cl_optim.fisher.checks import (
    Verify,
    check_integer,
    check_model,
    check_structure,
    check_verify,
)
from cl_optim.fisher.kronecker.scales import Scales
from cl_optim.fisher.kronecker.structure import Scale, Structure
from cl_optim.fisher.kronecker.sums import FactorSums
from cl_optim.fisher.model import evaluating, trained
from cl_optim.fisher.objective import LABELS, Kind, Labels, Loss, Objective
from cl_optim.fisher.observe.refusals import Policy
from cl_optim.fisher.own_pass import OwnPass
from cl_optim.fisher.totals import Totals
from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker.side import BLOCK, ENERGY, MAX_RANK
from cl_optim.ops.progress import progress_bar

_NONE = object()  # in place of a batch

Unsupported: TypeAlias = Literal["error", "sign", "skip"]


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    labels: Labels = "auto",
    max_samples: int | None = 500,
    per_sample_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    loss: Loss = "auto",
    kind: Kind = "fisher",
    unsupported: Unsupported = "error",
    sign_draws: int = 16,
    verify: Verify = "first",
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    structure: Literal["diagonal", "kronecker"] = "diagonal",
    scale: Scale = "product",
    block: int = BLOCK,
    energy: float = ENERGY,
    max_rank: int | None = MAX_RANK,
    ranks: Ranks = None,
) -> Importance:
    r"""Compute the Fisher information of ``model`` on ``batches``: its diagonal, or its factors.

    :math:`F_i = \frac1N \sum_n E_y\left[(∂ \log p(y | x_n) / ∂θ_i)^2\right]`, exactly per sample.
    What y is, is ``labels``:

    ``"auto"`` (default)
        ``"exact"`` for up to 100 classes; for more, and for sequences, ``"sample"``, which is
        logged once. The importance's metadata says which it was.
    ``"exact"``
        The expectation over the model's own p(y | x): one backward pass per class, at most 100.
    ``"sample"``
        One label per sample (or token) drawn from the model: unbiased for ``"exact"``.
    ``"predicted"``
        The most probable label.
    ``"empirical"``
        The data's label.

    The model must return logits, or an output of transformers that has them: [N, C], or [N, T, C]
    for sequences. There, a sample is a sequence: its loss is the sum over tokens of −log p, its
    gradient is squared whole; ``importance.per_token()`` reads the sums per token. Of a causal
    language model the logits are compared with the next token; padding (``attention_mask`` 0) is
    never predicted, on whichever side it is.

    The model runs in eval mode and is left as it was: training flags, ``grad``, buffers. See
    :class:`FisherEstimator` for the layers that are supported, and for what on a GPU differs in
    rounding from run to run unless ``torch.use_deterministic_algorithms(True)``: embeddings.

    With ``structure="kronecker"`` the matrices of linear maps get Kronecker factors in place of
    their diagonal: of A = E[ããᵀ], where ã are a map's inputs, with a 1 for the bias that is added
    to it alone, and G = E[bbᵀ], where b are the gradients of its outputs. Each token, each position
    of a convolution and each lookup is a row (*expand*), and rows count as independent of one
    another, and inputs of gradients. Rows of padding are not counted, where ``attention_mask``,
    ``key_padding_mask`` or ``src_key_padding_mask`` (and those of a decoder) are among the model's
    arguments. Matrices are weights of linear (also ``@``, addmm and attention's fused projections),
    convolutions, embeddings, tied or used several times; everything else keeps the diagonal, as
    ``metadata["diagonal"]`` says for each parameter, and why. What is not known of a matrix is in
    ``metadata["blocked"]``: in how many blocks its output and its input side are (0: the diagonal
    alone, for vocabularies). Memory: the sums of each matrix, float64, of output width² + input
    width², in place of one tensor of its size.

    Args:
        model: The model; observed are its parameters that require gradients.
        batches: Yields ``(inputs, targets)``, or inputs alone where ``labels`` needs no targets; or
            mappings as transformers takes them, ``{"input_ids": …, "attention_mask": …,
            "labels": …}``, where a causal language model's labels default to its tokens, and an
            encoder-decoder's decoder is given its labels, shifted by one as the model does. Inputs
            are what ``model`` takes: a tensor, or tensors in a tuple, list or mapping, with the
            samples along their leading dimension; a mapping whose keys are arguments of the model's
            forward is passed as arguments. Targets are classes, [N] or [N, T]. What has target −100
            is left out in every mode, and not counted. Batches are moved to the model's device.
        labels: As above.
        max_samples: Stop after exactly so many samples; ``None``: take all.
        per_sample_loss: ``per_sample_loss(model, batch)`` returns losses [N] for a whole batch, in
            place of −log p; for ``labels="empirical"`` only.
        loss: How logits and targets go together. ``"cross_entropy"``: aligned. ``"causal_lm"``: the
            logits at t are about the token at t + 1. ``"auto"``: the latter for those models of
            transformers whose own loss is so; for their encoder-decoders, and for decoders whose
            labels must be given shifted (``BartForCausalLM``), the former.
        kind: What is summed. ``"fisher"``. ``"mas"``: Σ_n ∣∂‖logits‖²/∂θ∣, Memory Aware
            Synapses, which needs no labels. ``"logits_reversal"``: the Fisher information of
            −logits with the data's labels (or ``"predicted"`` ones), EWC-DR: it does not vanish
            where the model is confident.
        unsupported: What happens to a parameter that is used in an unsupported way. ``"error"``
            names it. ``"sign"`` estimates it by random signs, E[(Σ_n s_n g_n)²] = Σ_n g_n², with
            one backward pass per draw: unbiased for any use of a parameter. ``"skip"`` leaves it
            out. The importance's metadata lists both.
        sign_draws: Number K of draws: their relative deviation is at most √(2/K).
        verify: Check, in the ``"first"`` batch, in each (``True``) or not at all, that
            Σ_n s_n g_n, put together from what was captured, is the gradient of Σ_n s_n ℓ_n for
            random signs s_n, by a second forward and backward pass that nothing intercepts. It
            finds uses that were missed, wrong rules, samples that depend on one another, and
            tensors in which samples were looked for along a wrong dimension. With ``loss="auto"``,
            a model of transformers that computes a loss of token labels must say of them what is
            taken here, too.
        generator: Draws the labels of ``"sample"`` and the signs. Default: torch's own, so that
            they follow ``torch.manual_seed``.
        progress: Show a progress bar, by rich. Default: if it is installed and the standard error
            stream is a terminal.
        structure: ``"diagonal"``, or ``"kronecker"``; not for ``kind="mas"``, which has no factors.
        scale: What a pair of directions of a matrix weighs. ``"product"``: the product of what its
            two factors say (K-FAC), in one pass. ``"exact"``: the mean over samples of the squared
            per-sample gradient in these directions (EKFAC), by a second pass over ``batches``,
            which must be a list, a DataLoader or the like, and give the same samples again. Labels
            that are drawn are drawn anew in it, on from where ``generator`` is.
        block: The widest block of a factor. A wider side is cut into blocks, and correlations
            between them are left out; one that is wider than 16 blocks is diagonal.
        energy: The share of each factor's trace that its directions hold, in (0, 1]; the others
            have the mean importance of what is left.
        max_rank: The most directions of a block, whatever the share; None: as many as it takes.
        ranks: Of several processes of ``torch.distributed``, each with samples of its own:
            ``"sum"`` adds up all of theirs, or those of a process group, in one all-reduce
            that every process must call. ``"own"``: this one has seen all samples itself.
            ``None``: where there are others, the importance is marked as one rank's, and
            what would protect by it refuses it.

    Returns:
        An :class:`cl_optim.Importance`; with ``structure="kronecker"``, a ``KroneckerImportance``.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range; ``batches`` is empty; logits, targets or losses
            have a wrong shape or value; a loss or gradient is not finite; the self-check failed;
            with ``scale="exact"``, ``batches`` is an iterator, or gave other samples again.
        NotImplementedError: A parameter is used in a way that is not supported, or has Kronecker
            factors and is used otherwise in a later batch.
        RuntimeError: There is no memory for the Kronecker factors of a matrix.
        ModuleNotFoundError: ``progress=True`` where rich is not installed.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756, on how much
        the choice between these matters; Aljundi et al. 2018, arXiv:1711.09601 (MAS); Liu & Chang
        2026, arXiv:2603.18596 (EWC-DR). Kronecker factors: Martens & Grosse 2015, arXiv:1503.05671
        (K-FAC); Grosse & Martens 2016, arXiv:1602.01407 (of convolutions); George et al. 2018,
        arXiv:1806.03884 (EKFAC); Eschenhagen et al. 2023, arXiv:2311.00636 (weights that are
        shared: expand and reduce).
    """
    check_model(model)
    check_ranks(ranks)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model must be the bare model, which DistributedDataParallel would average the "
            "gradients of: give model.module, and ranks='sum' for the samples of all processes."
        )
    meant = _check_arguments(batches, labels, max_samples, per_sample_loss, loss, kind)
    if unsupported not in get_args(Unsupported):
        raise ValueError(
            f"unsupported must be one of {get_args(Unsupported)}, not {unsupported!r}."
        )
    if unsupported == "sign" and kind == "mas":
        raise ValueError("unsupported='sign' estimates sums of squares, which kind='mas' is not.")
    check_integer("sign_draws", sign_draws, 1)
    check_verify(verify)
    check_structure(structure, scale, block, energy, max_rank)
    kronecker = None
    if structure == "kronecker":
        if kind == "mas":
            raise ValueError(
                "kind='mas' sums magnitudes, which have no Kronecker factors: use "
                "structure='diagonal'."
            )
        if scale == "exact" and isinstance(batches, Iterator):
            raise ValueError(
                f"scale='exact' goes through batches twice, and a {type(batches).__name__} can be "
                f"iterated only once: give a list or a DataLoader."
            )
        kronecker = Structure(trained(model), block, energy, max_rank)
    return estimate(
        model,
        batches,
        Objective(meant, per_sample_loss, loss, kind, generator),
        max_samples,
        Policy(unsupported),
        sign_draws,
        verify,
        progress,
        kronecker,
        exact=scale == "exact",
        together=Together(ranks),
    )


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    max_samples: int | None,
    policy: Policy,
    sign_draws: int = 16,
    verify: Verify = "first",
    progress: bool | None = None,
    structure: Structure | None = None,
    exact: bool = False,
    together: Together | None = None,
) -> Importance:
    """Do what :func:`estimate_fisher` does, with its arguments checked."""
    totals = Totals(model, matrices=None if structure is None else FactorSums(structure))
    together = totals.spread.ranks(together or Together(None))
    if totals.spread and policy.mode == "sign":
        raise NotImplementedError(
            "unsupported='sign' is not for a model that is spread over processes, whose gradients "
            "are those of all samples: use unsupported='skip', or freeze the parameters."
        )
    together.require_same(
        (objective.kind, objective.labels, objective.loss, bool(objective.per_sample_loss),
         policy.mode, sign_draws, None if structure is None else structure.options, exact),
        "the processes estimate in other ways: give each the same arguments.",
    )  # fmt: skip
    one = OwnPass(model, totals, objective, policy, sign_draws, verify)
    with together.agreeing(), totals.spread.together.agreeing():
        batch_count = _add_all(model, batches, one, totals, max_samples, progress)
    here = totals.samples
    if together.size > 1:
        totals, policy = totals.over(together, policy)
    if totals.samples == 0:
        raise ValueError("batches has no samples.")
    # A process without samples has not decided on these.
    meant = together.gather((here, one.labels, one.loss))
    labels, loss = next((labels, loss) for samples, labels, loss in meant if samples)
    metadata: dict[str, Any] = {
        "estimator": "estimate_fisher",
        "kind": objective.kind,
        "labels": labels,
        "loss": "per_sample_loss" if objective.per_sample_loss else loss,
        "max_samples": max_samples,
        "batches": sum(together.gather(batch_count)),
        **together.metadata,
    }
    if objective.labels == "auto":
        metadata["labels_chosen"] = "auto"
    if policy.mode == "sign" and policy.left:
        metadata["sign"] = {"draws": sign_draws, "parameters": dict(policy.left)}
    matrices = None
    if exact:
        objective = replace(objective, labels=labels)
        scales = Scales(totals.made_factors(policy))
        with together.agreeing():
            _add_again(
                model, batches, scales, int(here), objective, policy, verify is True, progress
            )
        together.sum_(tensor for _, tensor in scales.named())
        matrices = scales.exact(float(totals.samples))
        metadata |= {"scale": "exact", "tail": "product"}
    return totals.importance(model, policy, matrices, **metadata)


def _add_again(
    model: nn.Module,
    batches: Iterable[Any],
    scales: Scales,
    samples: int,
    objective: Objective,
    policy: Policy,
    verify: bool,
    progress: bool | None,
) -> None:
    """Sum the exact scale, by a second pass over the samples of the first."""
    if samples == 0:
        return
    totals = Totals(model, matrices=scales)
    left = Policy("skip", dict(policy.left), dict(policy.shared))
    one = OwnPass(model, totals, objective, left, 1, verify)
    _add_all(model, batches, one, totals, samples, progress)
    if totals.samples != samples or left.left.keys() != policy.left.keys():
        raise ValueError(
            f"scale='exact' goes through batches twice, and they were others the second time: "
            f"{totals.samples} samples after {samples}; give a list or a DataLoader."
        )


def _add_all(
    model: nn.Module,
    batches: Iterable[Any],
    one: OwnPass,
    totals: Totals,
    max_samples: int | None,
    progress: bool | None,
) -> int:
    """Add batches, up to so many samples; return how many batches there were."""
    device = next(model.parameters()).device
    batch_count = 0
    with (
        evaluating(model),
        progress_bar(progress, "Fisher", max_samples) as advance,
        torch.enable_grad(),
    ):

        def has_enough() -> bool:
            return max_samples is not None and int(totals.samples) >= max_samples

        for batch in _in_step(batches, has_enough, totals.spread.together):
            where = f"batch {batch_count}"
            batch_count += 1
            batch = nested.map_tensors(lambda tensor: tensor.to(device), batch)
            left = None if max_samples is None else max_samples - int(totals.samples)
            samples = one.add(batch, left, where)
            if totals.overflowed() and (names := totals.non_finite()):
                raise ValueError(
                    f"the gradient of parameter {names[0]!r} is not finite in {where}; leave that "
                    f"batch out, or compute in a wider dtype."
                )
            advance(samples)
    return batch_count


def _in_step(
    batches: Iterable[Any], has_enough: Callable[[], bool], together: Together
) -> Iterator[Any]:
    """Yield batches until there are enough: as many in each process that a model is spread over.

    Raises:
        ValueError: One of them has none left before the others.
    """
    iterator, count = iter(batches), 0
    while True:
        batch = _NONE if has_enough() else next(iterator, _NONE)
        ended = together.gather(batch is _NONE)
        if all(ended):
            return
        if any(ended):
            raise ValueError(
                f"process {ended.index(True)} has no batch after {count}, where others have: a "
                "model that is spread over processes needs all of them in each forward pass. Give "
                "each the same number of batches, and max_samples=None."
            )
        count += 1
        yield batch


def _check_arguments(
    batches: object,
    labels: Labels,
    max_samples: object,
    per_sample_loss: object,
    loss: object,
    kind: object,
) -> Labels | None:
    """Return the labels that are meant."""
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, not {data.kind(batches)}.")
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}, not {labels!r}.")
    check_integer("max_samples", max_samples, 1, or_none=True)
    if loss not in get_args(Loss):
        raise ValueError(
            f"loss must be one of {get_args(Loss)}, not {loss!r}; a function of your own is "
            f"per_sample_loss."
        )
    if kind == "adam":
        raise ValueError("kind='adam' needs an optimizer: importance_from_adam(optimizer).")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, not {kind!r}.")
    if kind == "mas":
        if labels != "auto" or per_sample_loss is not None:
            raise ValueError("kind='mas' takes neither labels nor per_sample_loss.")
        return None
    if kind == "logits_reversal":
        if labels not in ("auto", "empirical", "predicted") or per_sample_loss is not None:
            raise ValueError(
                "kind='logits_reversal' needs labels='empirical' or 'predicted', and no "
                "per_sample_loss."
            )
        return "empirical" if labels == "auto" else labels
    if per_sample_loss is not None and labels != "empirical":
        raise ValueError(f"per_sample_loss needs labels='empirical', not {labels!r}.")
    return labels
