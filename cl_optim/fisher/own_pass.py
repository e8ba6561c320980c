"""A pass of its own over batches: forward, and a backward pass for each gradient of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.distributed import here, is_dtensor
from cl_optim.fisher import batches as data
from cl_optim.fisher import nested
from cl_optim.fisher.checks import Verify
from cl_optim.fisher.language import is_causal_lm
from cl_optim.fisher.model import eagerly, trained
from cl_optim.fisher.objective import IGNORED, Labels, Objective
from cl_optim.fisher.observe.observation import Observation
from cl_optim.fisher.observe.refusals import (
    FREEZE,
    Policy,
    RestartError,
    refusing_checkpointed_functions,
)
from cl_optim.fisher.observe.self_check import SelfCheck
from cl_optim.fisher.observe.squares import Squares
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.totals import Totals


class OwnPass:
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
        """The labels that are taken; since the first batch, no longer ``"auto"``."""
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
                    self._totals.begin_anew()

    def _add_labelled(self, batch: Any, limit: int | None, where: str) -> int:
        """Add with the loss −log p(y)."""
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
            logits = _whole(labelled.logits(self._model))
            logits = data.check_logits(logits, samples, self._objective.labels, where)
            self._objective = self._objective.decided(logits)
            return logits

        def make_seeds(logits: Tensor) -> Iterator[Tensor]:
            nonlocal aligned
            empirical = self._objective.labels == "empirical"
            if empirical:
                data.check_targets(aligned, logits, where)
            elif self._objective.labels is None:  # of no loss
                aligned = None
            elif aligned is not None:
                data.check_shape(aligned, logits, where)
            else:
                aligned = labelled.padding(logits)
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
        """Add with the user's loss."""
        per_sample_loss = self._objective.per_sample_loss
        assert per_sample_loss is not None
        samples = data.leading(batch, where)
        batch = data.take(batch, torch.arange(samples, device="cpu")[:limit], samples)
        samples = samples if limit is None else min(samples, limit)
        if samples == 0:
            return 0

        def run() -> Tensor:
            losses = _whole(per_sample_loss(self._model, batch))
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
        """Run a forward pass, and a backward pass for each seed; return the outputs, detached."""
        totals = self._totals
        own = totals.check_unchanged(self._model)
        parameters: dict[str, Tensor] = dict(own)
        into = totals.begin(1.0)
        samples = Samples(count)
        for tensor in nested.tensors(inputs):
            samples.see(tensor.shape)
        check, first, signs = None, None, None
        if self._is_verified():
            totals.spread.require_same_inputs(inputs)
            device = next(iter(parameters.values())).device
            # Not from the user's generator: labels are drawn alike whether it is checked or not.
            signs = _signs(count, device, torch.Generator().manual_seed(totals.batches))
            check = SelfCheck()
            first = self._without_interception(run, make_seeds, signs, check, where)
        squares = Squares(
            parameters,
            into,
            self._policy,
            own_pass=True,
            magnitudes=self._objective.kind == "mas",
            check=check,
            weights=signs,
        )
        squares.hear_parameters()
        observation = Observation(parameters, samples, self._policy, squares)
        observation.watch = totals.spread.watch(observation.meet)
        hook = self._model.register_forward_pre_hook(observation.call_with, with_kwargs=True)
        try:
            with eagerly(), refusing_checkpointed_functions(), observation:
                outputs = run()
                if not outputs.requires_grad:
                    raise _independent(where)
                signed = self._policy.mode == "sign" and bool(self._policy.left)
                several = self._objective.labels == "exact"
                # Drawn labels must be those of the pass that it is compared with.
                known = None if several or first is None else [first]
                for seed in known or make_seeds(outputs):
                    _backward(outputs, seed, several or signed)
                    squares.settle()
                    if wrong := squares.end_check():
                        raise _failed(wrong, where)
                if signed:
                    squares.capturing = False
                    self._draw_signs(outputs, make_seeds, into.squares, own)
        finally:
            self._spoilt = squares.changed
            hook.remove()
            observation.close()
            for parameter in (*own.values(), *parameters.values()):
                parameter.grad = None
        totals.reduce_all()
        return samples, outputs.detach()

    def _without_interception(
        self,
        run: Callable[[], Tensor],
        make_seeds: Callable[[Tensor], Iterator[Tensor]],
        signs: Tensor,
        check: SelfCheck,
        where: str,
    ) -> Tensor:
        """Tell ``check`` the gradients of Σ_n s_n ℓ_n; return the outputs' gradient, unsigned."""
        met: dict[str, Tensor] = {}
        watch = self._totals.spread.watch(met.__setitem__)
        try:
            with self._same_draws():
                outputs = run()
        finally:
            watch.remove()

        # Where they are spread over processes, those of this one's samples come before the sum.
        def receive(name: str, parameter: Tensor, grad: Tensor) -> None:
            check.receive(name, here(grad, parameter))

        hooks = [
            parameter.register_hook(partial(receive, name, parameter))  # type: ignore[no-untyped-call]
            for name, parameter in met.items()
            if name not in self._policy.left
        ]
        if not outputs.requires_grad:
            raise _independent(where)
        seed = next(iter(make_seeds(outputs)))
        each = signs.to(seed).view(-1, *[1] * (seed.dim() - 1))
        try:
            _backward(outputs, seed.mul_(each), False)
        finally:
            for hook in hooks:
                hook.remove()
        seed.mul_(each)  # as it was, without a copy of something as large as the logits
        for name, parameter in trained(self._model).items():
            grad, parameter.grad = parameter.grad, None
            if name not in self._policy.left and grad is not None:
                check.lower(name, parameter)
                if name not in met:
                    receive(name, parameter, grad)
        return seed

    def _is_verified(self) -> bool:
        """Return whether the next batch is checked."""
        return self._verify is True or (self._verify == "first" and self._totals.batches == 0)

    def _same_draws(self) -> AbstractContextManager[None]:
        """Draw after it what is drawn within it once more."""
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


def _whole(outputs: Any) -> Any:
    """Return all of what a model has returned: under tensor parallelism that may be a DTensor."""
    if isinstance(outputs, Tensor) and is_dtensor(outputs):
        return outputs.full_tensor()  # type: ignore[attr-defined]
    return outputs


def _signs(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw ±1 for each sample."""
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
