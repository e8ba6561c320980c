"""estimate_fisher: the Fisher information of a model on some data, in a pass of its own."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from cl_optim.fisher import batches as data
from cl_optim.fisher import nested
from cl_optim.fisher.check import Check
from cl_optim.fisher.estimator import (
    Totals,
    Verify,
    check_integer,
    check_model,
    check_verify,
    eagerly,
    trained,
)
from cl_optim.fisher.labels import (
    IGNORED,
    LABELS,
    MAX_EXACT_CLASSES,
    Labels,
    has_exact,
    norm_seed,
    seeds,
)
from cl_optim.fisher.language import is_causal_lm
from cl_optim.fisher.observation import Observation
from cl_optim.fisher.refusals import FREEZE, Policy, RestartError
from cl_optim.fisher.samples import Samples
from cl_optim.importance.importance import Importance

Kind: TypeAlias = Literal["fisher", "mas", "logits_reversal"]
Loss: TypeAlias = Literal["auto", "cross_entropy", "causal_lm"]
Unsupported: TypeAlias = Literal["error", "sign", "skip"]

_LOGGER = logging.getLogger(__name__)


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
) -> Importance:
    r"""Compute the diagonal of the Fisher information of ``model`` on ``batches``.

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
        progress: Show a progress bar. Default: if the standard error stream is a terminal.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range; ``batches`` is empty; logits, targets or losses
            have a wrong shape or value; a loss or gradient is not finite; the self-check failed.
        NotImplementedError: A parameter is used in a way that is not supported.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756, on how much
        the choice between these matters; Aljundi et al. 2018, arXiv:1711.09601 (MAS); Liu & Chang
        2026, arXiv:2603.18596 (EWC-DR).
    """
    check_model(model)
    meant = _check_arguments(batches, labels, max_samples, per_sample_loss, loss, kind)
    if unsupported not in get_args(Unsupported):
        raise ValueError(
            f"unsupported must be one of {get_args(Unsupported)}, not {unsupported!r}."
        )
    if unsupported == "sign" and kind == "mas":
        raise ValueError("unsupported='sign' estimates sums of squares, which kind='mas' is not.")
    check_integer("sign_draws", sign_draws, 1)
    check_verify(verify)
    return estimate(
        model,
        batches,
        Objective(meant, per_sample_loss, loss, kind, generator),
        max_samples,
        Policy(unsupported),
        sign_draws,
        verify,
        progress,
    )


@dataclass(frozen=True)
class Objective:
    """What is differentiated."""

    labels: Labels | None
    per_sample_loss: Callable[[nn.Module, Any], Tensor] | None = None
    loss: Loss = "auto"
    kind: Kind = "fisher"
    generator: torch.Generator | None = None
    by_probability: bool = False

    def decided(self, logits: Tensor) -> Objective:
        """The same, with the labels that ``"auto"`` means for these logits."""
        if self.labels != "auto":
            return self
        if has_exact(logits):
            return replace(self, labels="exact")
        many = "of sequences" if logits.dim() == 3 else f"of {logits.shape[-1]} classes"
        _log_once(
            f"labels='auto' is labels='sample' for logits {many}: labels are drawn from the model, "
            f"since labels='exact' is for [N, C] with at most {MAX_EXACT_CLASSES} classes."
        )
        return replace(self, labels="sample")

    def seeds(self, logits: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        """The gradients of the losses with respect to the logits, one for each backward pass."""
        if self.labels is None:
            yield norm_seed(logits, targets)
        else:
            yield from seeds(
                self.labels,
                logits,
                targets,
                self.generator,
                reverse=self.kind == "logits_reversal",
                by_probability=self.by_probability,
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
) -> Importance:
    """:func:`estimate_fisher`, with its arguments checked."""
    totals = Totals(model)
    device = next(model.parameters()).device
    one = _Pass(model, totals, objective, policy, sign_draws, verify)
    batch_count = 0
    with evaluating(model), _progress_bar(progress, max_samples) as advance, torch.enable_grad():
        for batch in batches:
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
            if totals.samples == max_samples:
                break
    if totals.samples == 0:
        raise ValueError("batches has no samples.")
    metadata: dict[str, Any] = {
        "estimator": "estimate_fisher",
        "kind": objective.kind,
        "labels": one.labels,
        "loss": "per_sample_loss" if objective.per_sample_loss else one.loss,
        "max_samples": max_samples,
        "batches": batch_count,
    }
    if objective.labels == "auto":
        metadata["labels_chosen"] = "auto"
    if policy.mode == "sign" and policy.left:
        metadata["sign"] = {"draws": sign_draws, "parameters": dict(policy.left)}
    return totals.importance(model, policy, **metadata)


@functools.cache
def _log_once(sentence: str) -> None:
    _LOGGER.warning(sentence)


class _Pass:
    """Adds batches, one at a time."""

    def __init__(
        self,
        model: nn.Module,
        totals: Totals,
        objective: Objective,
        policy: Policy,
        sign_draws: int,
        verify: Verify,
    ) -> None:
        self._model = model
        self._totals = totals
        self._objective = objective
        self._policy = policy
        self._sign_draws = sign_draws
        self._verify = verify
        self._causal = objective.loss == "causal_lm" or (
            objective.loss == "auto" and is_causal_lm(model)
        )
        self.loss = "causal_lm" if self._causal else "cross_entropy"
        self._spoilt = False  # whether the sums have a part of the batch that is being added

    @property
    def labels(self) -> Labels | None:
        """Which labels are taken; since the first batch, no longer ``"auto"``."""
        return self._objective.labels

    def add(self, batch: Any, limit: int | None, where: str) -> int:
        """Add at most ``limit`` samples of a batch; return how many."""
        while True:
            begun = len(self._policy.left)
            try:
                if self._objective.per_sample_loss is None:
                    return self._add_labelled(batch, limit, where)
                return self._add_losses(batch, limit, where)
            except RestartError:
                # Some parameters are now known to be unsupported, and the batch is taken again.
                found = list(self._policy.left)[begun:]
                earlier = self._totals.batches > 0
                if earlier and (self._policy.mode == "sign" or self._spoilt):
                    raise NotImplementedError(
                        f"{self._policy.left[found[0]]}; it was first met in {where}, when it had "
                        f"been taken to be supported: put such a batch first."
                    ) from None
                if self._spoilt:
                    for total in self._totals.sums.values():
                        total.zero_()

    def _add_labelled(self, batch: Any, limit: int | None, where: str) -> int:
        """With the loss −log p(y)."""
        labelled = data.read(batch, self._model, self._objective.labels, self._causal, where)
        samples = data.leading(labelled.inputs, where)
        kept = labelled.counted(samples)[:limit]
        labelled = labelled.take(kept, samples)
        samples = len(kept)
        if samples == 0:
            return 0
        aligned = labelled.targets
        if self._objective.loss == "auto" and self.labels is not None and self._is_verified():
            with self._same_draws():
                data.check_own_loss(labelled, self._model, self._causal, where)

        def run() -> Tensor:
            logits = labelled.logits(self._model)
            logits = data.check_logits(logits, samples, self._objective.labels, where)
            self._objective = self._objective.decided(logits)
            return logits

        def make_seeds(logits: Tensor) -> Iterator[Tensor]:
            nonlocal aligned
            empirical = self._objective.labels == "empirical"
            if empirical:
                data.check_targets(aligned, logits, where)
            elif aligned is not None and aligned.shape != logits.shape[:-1]:
                aligned = None
            data.check_losses(logits, aligned if empirical else None, where)
            return self._objective.seeds(logits, aligned)

        observed, logits = self._observe(run, make_seeds, samples, labelled.inputs, where)
        tokens = observed.tokens
        if logits.dim() == 3:
            positions = logits[..., 0].numel()
            tokens = positions if aligned is None else int((aligned != IGNORED).sum())
        self._totals.count(samples, tokens)
        return samples

    def _add_losses(self, batch: Any, limit: int | None, where: str) -> int:
        """With the user's loss."""
        per_sample_loss = self._objective.per_sample_loss
        assert per_sample_loss is not None
        samples = data.leading(batch, where)
        batch = data.take(batch, torch.arange(samples, device="cpu")[:limit], samples)
        samples = samples if limit is None else min(samples, limit)
        if samples == 0:
            return 0

        def run() -> Tensor:
            losses = per_sample_loss(self._model, batch)
            if not isinstance(losses, Tensor) or losses.shape != (samples,):
                raise ValueError(
                    f"per_sample_loss must return one loss per sample, shape [{samples}], but "
                    f"returned {data.kind(losses)} in {where}."
                )
            if not torch.isfinite(losses).all():
                raise ValueError(
                    f"per_sample_loss returned a loss that is not finite in {where}; leave its "
                    f"sample out, or compute in a wider dtype."
                )
            return losses

        def make_seeds(losses: Tensor) -> Iterator[Tensor]:
            yield torch.ones_like(losses)

        observed, _ = self._observe(run, make_seeds, samples, batch, where)
        self._totals.count(samples, observed.tokens)
        return samples

    def _observe(
        self,
        run: Callable[[], Tensor],
        make_seeds: Callable[[Tensor], Iterator[Tensor]],
        count: int,
        inputs: Any,
        where: str,
    ) -> tuple[Samples, Tensor]:
        """One forward pass, and a backward pass for each seed; return the outputs, detached."""
        totals = self._totals
        parameters = totals.check_unchanged(self._model)
        sums = totals.begin(1.0)
        samples = Samples(count)
        for tensor in nested.tensors(inputs):
            samples.see(tensor.shape)
        check, first, signs = None, None, None
        if self._is_verified():
            device = next(iter(parameters.values())).device
            # Not from the user's generator: labels are drawn alike whether it is checked or not.
            signs = _signs(count, device, torch.Generator().manual_seed(totals.batches))
            check = Check()
            first = self._without_interception(run, make_seeds, signs, check, where)
        observation = Observation(
            parameters,
            sums,
            samples,
            self._policy,
            own_pass=True,
            magnitudes=self._objective.kind == "mas",
            check=check,
            weights=signs,
        )
        observation.open()
        try:
            with eagerly(), observation:
                outputs = run()
                if not outputs.requires_grad:
                    raise _independent(where)
                signed = self._policy.mode == "sign" and bool(self._policy.left)
                several = self._objective.labels == "exact"
                # Drawn labels must be those of the pass that it is compared with.
                known = None if several or first is None else [first]
                for seed in known or make_seeds(outputs):
                    _backward(outputs, seed, several or signed)
                    observation.settle()
                    if wrong := observation.end_check():
                        raise _failed(wrong, where)
                if signed:
                    observation.capturing = False
                    self._draw_signs(outputs, make_seeds, sums, parameters)
        finally:
            self._spoilt = observation.changed
            observation.close()
            for parameter in parameters.values():
                parameter.grad = None
        return samples, outputs.detach()

    def _without_interception(
        self,
        run: Callable[[], Tensor],
        make_seeds: Callable[[Tensor], Iterator[Tensor]],
        signs: Tensor,
        check: Check,
        where: str,
    ) -> Tensor:
        """Tell ``check`` the gradients of Σ_n s_n ℓ_n; return the outputs' gradient, unsigned."""
        with self._same_draws():
            outputs = run()
        if not outputs.requires_grad:
            raise _independent(where)
        seed = next(iter(make_seeds(outputs)))
        each = signs.to(seed).view(-1, *[1] * (seed.dim() - 1))
        _backward(outputs, seed.mul_(each), False)
        seed.mul_(each)  # as it was, without a copy of something as large as the logits
        for name, parameter in trained(self._model).items():
            grad, parameter.grad = parameter.grad, None
            if name not in self._policy.left and grad is not None:
                check.lower(name, parameter)
                check.receive(name, grad)
        return seed

    def _is_verified(self) -> bool:
        """Whether the next batch is checked."""
        return self._verify is True or (self._verify == "first" and self._totals.batches == 0)

    def _same_draws(self) -> AbstractContextManager[None]:
        """What is drawn within it is drawn again after it."""
        devices = {p.device for p in self._model.parameters() if p.device.type == "cuda"}
        return torch.random.fork_rng([device.index for device in devices])

    def _draw_signs(
        self,
        outputs: Tensor,
        make_seeds: Callable[[Tensor], Iterator[Tensor]],
        sums: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Add E[(Σ_n s_n g_n)²] = Σ_n g_n² for the parameters that are left to it."""
        left = {name: parameters[name] for name in self._policy.left}
        generator = self._objective.generator
        for parameter in left.values():
            parameter.grad = None
        for draw in range(self._sign_draws):
            # With labels="exact", each class of each sample has a sign of its own.
            seed = torch.zeros_like(outputs)
            for one in make_seeds(outputs):
                seed += _signed(one, _signs(len(outputs), outputs.device, generator))
            _backward(outputs, seed, draw + 1 < self._sign_draws)
            for name, parameter in left.items():
                if parameter.grad is not None:
                    grad = parameter.grad.to(sums[name].dtype)
                    sums[name].addcmul_(grad, grad, value=1 / self._sign_draws)
                    parameter.grad = None


def _signs(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """±1 for each sample."""
    home = "cpu" if generator is None else generator.device
    return (2 * torch.randint(0, 2, (count,), generator=generator, device=home) - 1).to(device)


def _signed(seed: Tensor, signs: Tensor) -> Tensor:
    return seed * signs.to(seed).view(-1, *[1] * (seed.dim() - 1))


def _backward(outputs: Tensor, seed: Tensor, retain_graph: bool) -> None:
    # autograd.grad would not go through reentrant activation checkpointing.
    with torch.autocast(outputs.device.type, enabled=False):
        torch.autograd.backward(outputs, seed.to(outputs.dtype), retain_graph=retain_graph)


def _independent(where: str) -> ValueError:
    return ValueError(
        f"the loss does not depend on any trained parameter in {where}; give those that it is "
        f"computed with requires_grad_(), and do not detach what they give."
    )


def _failed(wrong: Mapping[str, float], where: str) -> ValueError:
    name, error = max(wrong.items(), key=lambda item: item[1])
    return ValueError(
        f"the self-check failed in {where}: for losses with random signs, what was captured of "
        f"parameter {name!r} differs from its gradient by {error:.1g} of its size ({len(wrong)} "
        f"parameters differ). Either the samples are not independent (the leading dimension of "
        f"each layer's input must run over samples, not over positions, and no sample may depend "
        f"on another), or a rule is wrong; {FREEZE}"
    )


# --- checks ---------------------------------------------------------------------------------------


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
    if max_samples is not None:
        if not isinstance(max_samples, int) or isinstance(max_samples, bool):
            raise TypeError(
                f"max_samples must be an integer or None, not {data.kind(max_samples)}."
            )
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, or None, not {max_samples}.")
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


# --- around the pass ------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards each module's own flag is what it was."""
    training = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _ in grads:
            parameter.grad = None
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, grad in grads:
            parameter.grad = grad


@contextmanager
def _progress_bar(shown: bool | None, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar, or does nothing where none is shown."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda samples: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("Fisher"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Fisher", total=total)
        yield lambda samples: bar.advance(task, samples)
        bar.update(task, total=bar.tasks[0].completed)  # there may be fewer than max_samples
