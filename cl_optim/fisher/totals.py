"""What has been summed, and of how many samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.fisher.checks import Number
from cl_optim.fisher.model import provenance, trained
from cl_optim.fisher.observe.refusals import Policy
from cl_optim.importance.importance import Importance


class _Batches:
    """What has been summed, and of how many samples; kept in the units of the last batch's loss.

    A loss is usually a mean, perhaps scaled. Its squared gradients are summed as they come and the
    whole multiplied when the factor changes, since a product with each gradient would cost more.
    """

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self.sums = sums
        self.empty()

    def empty(self) -> None:
        """Forget all batches."""
        with torch.no_grad():
            for total in self.sums.values():
                total.zero_()
        self.batches = 0
        self.samples: Number = 0
        self.tokens: Number | None = None
        self.unit: Number | None = None  # what the sums are to be multiplied by

    def begin(self, factor: Number) -> Mapping[str, Tensor]:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        self.use(factor * factor)
        return self.sums

    def use(self, unit: Number) -> None:
        """Keep the sums in that unit."""
        if self.unit is not None and (
            isinstance(unit, Tensor) or isinstance(self.unit, Tensor) or unit != self.unit
        ):
            _scale(list(self.sums.values()), self.unit / unit)
        self.unit = unit

    def finite(self) -> Tensor:
        """Return whether all sums are finite, on the device."""
        device = next(iter(self.sums.values())).device
        each = [total.isfinite().all().to(device) for total in self.sums.values()]
        return torch.stack(each).all()

    def count(self, samples: Number, tokens: Number | None, batches: int = 1) -> None:
        """Count batches that were observed to their end."""
        if self.batches == 0:
            self.tokens = tokens
        elif tokens is None or self.tokens is None:
            self.tokens = None
        else:
            self.tokens = self.tokens + tokens
        self.batches += batches
        self.samples = self.samples + samples


class Totals(_Batches):
    """The sums of an estimator.

    Args:
        model: Its parameters that require gradients have sums.
        decay: What remains of them after each step.

    Attributes:
        decay: As given.
        staged: Batches that are not yet known to be finite, or what their loss was divided by.
        dropping: Whether what is staged and not finite is dropped, and counted.
    """

    def __init__(self, model: nn.Module, decay: float = 1.0) -> None:
        sums: dict[str, Tensor] = {}
        for name, parameter in trained(model).items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be of a real floating-point dtype, not "
                    f"{parameter.dtype}."
                )
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            sums[name] = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        if not sums:
            raise ValueError("model has no parameters that require gradients.")
        super().__init__(sums)
        self.decay = decay
        self.broken = False
        self.staged: _Batches | None = None
        self.dropping = False
        self._dropped: Number = 0

    def state_dict(self) -> dict[str, Any]:
        """Return all but what is being observed."""
        self._check_whole()
        return {
            "sums": dict(self.sums),
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "unit": self.unit,
            "dropped": self._dropped,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, in the tensors that there are."""
        with torch.no_grad():
            for name, total in self.sums.items():
                total.copy_(state_dict["sums"][name])
        if self.staged is not None:
            self.staged.empty()
        self.broken = False
        self.batches = state_dict["batches"]
        device = next(iter(self.sums.values())).device
        counts: list[Any] = [
            value.to(device, copy=True) if isinstance(value, Tensor) else value
            for value in map(state_dict.get, ("samples", "tokens", "unit", "dropped"))
        ]
        self.samples, self.tokens, self.unit, self._dropped = counts

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError(
                "an observe() failed after its backward pass had begun, so that the sums hold a "
                "part of a batch; make a new FisherEstimator."
            )

    def stage(self) -> None:
        """Keep batches apart until :meth:`commit`, from now on."""
        if self.staged is None:
            self.staged = _Batches({name: torch.zeros_like(t) for name, t in self.sums.items()})

    def unstage(self) -> None:
        """Add batches as they come, from now on."""
        self.staged = None

    def seen(self) -> int:
        """Return the number of batches that were observed to their end."""
        return self.batches + (0 if self.staged is None else self.staged.batches)

    def begin(self, factor: Number) -> Mapping[str, Tensor]:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        return super().begin(factor) if self.staged is None else self.staged.begin(factor)

    def count(self, samples: Number, tokens: Number | None, batches: int = 1) -> None:
        """Count batches that were observed to their end."""
        if self.staged is None:
            super().count(samples, tokens, batches)
        else:
            self.staged.count(samples, tokens, batches)

    def discard(self) -> None:
        """Forget the batches that are staged; where there is no stage, the sums hold them."""
        if self.staged is None:
            self.broken = True
        else:
            self.staged.empty()

    def commit(self, scale: Number = 1.0) -> None:
        """Add what is staged, whose loss was multiplied by ``scale`` besides."""
        staged = self.staged
        if staged is None or staged.batches == 0:
            return
        assert staged.unit is not None
        self.use(staged.unit / (scale * scale))
        finite = staged.finite() if self.dropping else None
        with torch.no_grad():
            for total, value in zip(self.sums.values(), staged.sums.values(), strict=True):
                total += value if finite is None else torch.where(finite.to(value.device), value, 0)
        kept: Number = 1 if finite is None else finite.double()
        self._dropped = self._dropped + staged.samples * (1 - kept)
        tokens = None if staged.tokens is None else staged.tokens * kept
        super().count(staged.samples * kept, tokens, staged.batches)
        staged.empty()

    def apply_decay(self) -> None:
        """Multiply sums and counts; the sums together with the next change of units."""
        if self.decay == 1.0:
            return
        self.unit = None if self.unit is None else self.unit * self.decay
        self.samples = self.samples * self.decay
        self.tokens = None if self.tokens is None else self.tokens * self.decay

    def overflowed(self) -> bool:
        """Return whether some sum is not finite; waits for the device once."""
        device = next(iter(self.sums.values())).device
        wholes = torch.stack([total.sum().float().to(device) for total in self.sums.values()])
        return not bool(wholes.isfinite().all())

    def non_finite(self) -> list[str]:
        """Name the parameters whose sums hold a NaN or an infinity."""
        return [
            name
            for name, total in self.sums.items()
            # The sum is the faster look; it may also overflow where no entry does.
            if not (torch.isfinite(total.sum()) or torch.isfinite(total).all())
        ]

    def importance(self, model: nn.Module, policy: Policy, **metadata: Any) -> Importance:
        """Return a copy of the sums as an importance."""
        self._check_whole()
        if self.batches == 0:
            raise RuntimeError("nothing was observed: finalize() needs at least one observe().")
        skipped = policy.left if policy.mode == "skip" else {}
        if names := [name for name in self.non_finite() if name not in skipped]:
            raise ValueError(
                f"the squared gradients of parameter {names[0]!r} are not finite ({len(names)} of "
                f"{len(self.sums)} parameters): an observed loss overflowed or was NaN."
            )
        if float(self.samples) == 0.0:
            raise ValueError("every batch overflowed and was dropped; nothing was observed.")
        unit = 1.0 if self.unit is None else self.unit
        sums = {k: total * unit for k, total in self.sums.items() if k not in skipped}
        tokens = None if self.tokens is None else _plain(self.tokens)
        if skipped:
            metadata["skipped"] = dict(skipped)
        if self.dropping:
            metadata["dropped_samples"] = _plain(self._dropped)
        common = {"sample": "sequence", **provenance(model, trained(model))}
        return Importance(sums, _plain(self.samples), tokens, {**metadata, **common})

    def check_unchanged(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Refuse parameters other than those at the start; follow those that were moved."""
        parameters = trained(model)
        shapes = {name: total.shape for name, total in self.sums.items()}
        for name in {**shapes, **parameters}:
            if name not in parameters or parameters[name].shape != shapes.get(name):
                raise ValueError(
                    f"parameter {name!r} was added, removed, frozen, unfrozen or reshaped after "
                    f"the FisherEstimator was made; make a new one."
                )
        for name, parameter in parameters.items():
            self.sums[name] = self.sums[name].to(parameter.device)
            if self.staged is not None:
                self.staged.sums[name] = self.staged.sums[name].to(parameter.device)
        return parameters


def _scale(tensors: list[Tensor], factor: Number) -> None:
    """Multiply all tensors in place."""
    with torch.no_grad():
        if isinstance(factor, Tensor):
            for tensor in tensors:
                tensor.mul_(factor.to(tensor.device))
        else:
            torch._foreach_mul_(tensors, factor)


def _plain(number: Number) -> int | float:
    """Return a number that JSON holds; whole ones as integers."""
    value = float(number)
    return int(value) if value == int(value) else value
