"""What has been summed, and of how many samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_optim.distributed import Together, here, is_dtensor, like, reshard
from cl_optim.fisher.checks import Number
from cl_optim.fisher.kronecker.structure import Structure
from cl_optim.fisher.kronecker.sums import FactorSums, Matrices
from cl_optim.fisher.kronecker.terms import Units, factors
from cl_optim.fisher.model import provenance, trained
from cl_optim.fisher.observe.refusals import Policy
from cl_optim.fisher.observe.squares import Into
from cl_optim.fisher.spread import Open, Spread
from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.importance import KroneckerImportance

_LOGGER = logging.getLogger(__name__)


class _Squares(dict[str, Tensor]):
    """Sums of squares, made of zeros when they are first asked for.

    A parameter that has Kronecker factors needs none.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parameters = parameters

    def __missing__(self, name: str) -> Tensor:
        return self.make(name)

    def make(self, name: str) -> Tensor:
        """Make zeros."""
        parameter = self.parameters[name]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        part = here(parameter)  # of what is spread over processes
        self[name] = torch.zeros(part.shape, dtype=dtype, device=part.device)
        return self[name]


class _Process(NamedTuple):
    """What each process tells the others of its sums."""

    policy: Policy
    sums: list[str]
    batches: int
    samples: int | float
    tokens: int | float | None
    dropped: int | float


class _Batches:
    """What has been summed, and of how many samples; kept in the units of the last batch's loss.

    A loss is usually a mean, perhaps scaled. Its squared gradients are summed as they come and the
    whole multiplied when the factor changes, since a product with each gradient would cost more.

    Args:
        parameters: Those that have sums, by name.
        spread: What is known of those that are spread over processes.
        matrices: What takes the place of some of them.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], spread: Spread, matrices: Matrices | None = None
    ) -> None:
        self.spread = spread
        self.sums = _Squares(parameters)
        self.open = Open(self.sums, parameters, spread)
        self.matrices = matrices
        if matrices is None:
            for name in parameters:
                self.sums.make(name)
        self.empty()

    @property
    def into(self) -> Into:
        """What batches are added to."""
        return Into(self.open, self.matrices)

    @property
    def factors(self) -> FactorSums | None:
        """The sums of Kronecker factors, if there are some."""
        return self.matrices if isinstance(self.matrices, FactorSums) else None

    def tensors(self) -> list[tuple[str, Tensor]]:
        """List all sums, with their parameters' names."""
        return [*self.sums.items(), *(self.matrices.named() if self.matrices else ())]

    def clear(self) -> None:
        """Set all sums to zero."""
        self.open.whole.clear()
        with torch.no_grad():
            for _, total in self.tensors():
                total.zero_()

    def empty(self) -> None:
        """Forget all batches."""
        self.clear()
        self.batches = 0
        self.samples: Number = 0
        self.tokens: Number | None = None
        self.unit: Number | None = None  # what the sums are to be multiplied by
        self.remains = 1.0  # and those of inputs, which know no loss
        self.spread_remains = 1.0  # and those over processes, each of which has another unit

    def begin(self, factor: Number) -> Into:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that.

        Of a batch without terms, whose targets are all ignored, gradients are 0: the unit stays.
        """
        unit, before = factor * factor, 1.0 if self.unit is None else self.unit
        if isinstance(unit, Tensor):
            unit = torch.where(unit == 0.0, before, unit)
        elif unit == 0.0:
            unit = before
        self.use(unit)
        return self.into

    def use(self, unit: Number) -> None:
        """Keep the sums in that unit."""
        if self.unit is not None and (
            isinstance(unit, Tensor) or isinstance(self.unit, Tensor) or unit != self.unit
        ):
            gradients = self.factors.gradients() if self.factors else []
            own = [total for name, total in self.sums.items() if not self.open.is_spread(name)]
            squares = [*own, *self.open.whole.values()]
            _scale([*squares, *gradients], self.unit / unit)
        self.unit = unit
        if self.factors and self.remains != 1.0:
            _scale(self.factors.counts(), self.remains)
            self.remains = 1.0

    def reduce(self, name: str) -> None:
        """Add up over processes what has been squared of a parameter that is spread over them.

        Each process does so at the same time, whether it has squared something or not.
        """
        with torch.no_grad():
            unit = 1.0 if self.unit is None else self.unit
            self.sums[name] += self.open.take(name, unit) / self.spread_remains

    def unit_of(self, name: str) -> Number:
        """Return what a parameter's sums are to be multiplied by."""
        if self.open.is_spread(name):
            return self.spread_remains
        return 1.0 if self.unit is None else self.unit

    def finite(self) -> Tensor:
        """Return whether all sums are finite, on the device."""
        each = [total.isfinite().all() for _, total in self.tensors()]
        return torch.stack([one.to(each[0].device) for one in each]).all()

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Follow parameters to the devices that they were moved to."""
        self.sums.parameters = parameters
        self.open.follow(parameters)
        for name, total in list(self.sums.items()):
            self.sums[name] = total.to(parameters[name].device)
        if self.factors is not None:
            for name, parameter in parameters.items():
                self.factors.to(name, parameter.device)

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
        matrices: What takes the place of squares for some parameters.
        reduce_dtype: In which sums are sent to the processes that they are spread over.

    Attributes:
        decay: As given.
        shapes: Of the parameters.
        spread: What is known of it where it is spread over processes.
        staged: Batches that are not yet known to be finite, or what their loss was divided by.
        dropping: Whether what is staged and not finite is dropped, and counted.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 1.0,
        matrices: Matrices | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        spread = Spread(model, reduce_dtype)
        if matrices is not None and spread.is_parallel:
            raise NotImplementedError(
                "structure='kronecker' needs whole matrices, and under tensor parallelism each "
                "process has a part: use structure='diagonal'."
            )
        parameters = trained(model)
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} must be of a real floating-point dtype, not "
                    f"{parameter.dtype}."
                )
        if not parameters:
            raise ValueError("model has no parameters that require gradients.")
        super().__init__(parameters, spread, matrices)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.decay = decay
        self.broken = False
        self.staged: _Batches | None = None
        self.dropping = False
        self._dropped: Number = 0
        self._said = False

    @property
    def device(self) -> torch.device:
        """Where counts are kept: with the first parameter."""
        return next(iter(self.sums.parameters.values())).device

    def state_dict(self) -> dict[str, Any]:
        """Return all but what is being observed."""
        self._check_whole()
        self.reduce_all()
        parameters = self.sums.parameters
        return {
            **self._factors_state(),
            "sums": {name: like(parameters[name], total) for name, total in self.sums.items()},
            "batches": self.batches,
            "samples": self.samples,
            "tokens": self.tokens,
            "unit": self.unit,
            "spread_remains": self.spread_remains,
            "dropped": self._dropped,
        }

    def _factors_state(self) -> dict[str, Any]:
        if self.factors is None:
            return {}
        structure = self.factors.structure.state_dict()
        return {
            "kronecker": {
                "structure": structure,
                "sums": self.factors.state_dict(),
                "remains": self.remains,
            }
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, in the tensors that there are."""
        with torch.no_grad():
            for name in {**self.sums, **state_dict["sums"]}:
                if name in state_dict["sums"]:
                    saved = here(state_dict["sums"][name], self.sums.parameters[name])
                    self.sums[name].copy_(saved)
                else:
                    del self.sums[name]
        if self.factors is not None:
            state = state_dict["kronecker"]
            self.factors.structure.load_state_dict(state["structure"])
            self.factors.load_state_dict(state["sums"], self.sums.parameters)
            self.remains = state["remains"]
        if self.staged is not None:
            self.staged.empty()
        self.broken = False
        self.batches = state_dict["batches"]
        counts: list[Any] = [
            value.to(self.device, copy=True) if isinstance(value, Tensor) else value
            for value in map(state_dict.get, ("samples", "tokens", "unit", "dropped"))
        ]
        self.samples, self.tokens, self.unit, self._dropped = counts
        self.spread_remains = state_dict.get("spread_remains", 1.0)  # earlier versions had none

    def _check_whole(self) -> None:
        if self.broken:
            raise RuntimeError(
                "an observe() failed after its backward pass had begun, so that the sums hold a "
                "part of a batch; make a new FisherEstimator."
            )

    def stage(self) -> None:
        """Keep batches apart until :meth:`commit`, from now on."""
        if self.staged is None:
            factors = self.factors
            matrices = None if factors is None else FactorSums(factors.structure)
            self.staged = _Batches(self.sums.parameters, self.spread, matrices)

    def unstage(self) -> None:
        """Add batches as they come, from now on."""
        self.staged = None

    def seen(self) -> int:
        """Return the number of batches that were observed to their end."""
        return self.batches + (0 if self.staged is None else self.staged.batches)

    def begin(self, factor: Number) -> Into:
        """Return what a batch is to be added to, whose gradients are to be multiplied by that."""
        return super().begin(factor) if self.staged is None else self.staged.begin(factor)

    def count(self, samples: Number, tokens: Number | None, batches: int = 1) -> None:
        """Count batches that were observed to their end."""
        if self.staged is None:
            super().count(samples, tokens, batches)
        else:
            self.staged.count(samples, tokens, batches)

    def reduce_batch(self, name: str) -> None:
        """Do what :meth:`reduce` does, where batches are added to now."""
        (self if self.staged is None else self.staged).reduce(name)

    def are_open(self) -> bool:
        """Tell whether there are squares that have not been added up over processes."""
        return bool(self.open.whole or (self.staged and self.staged.open.whole))

    def reduce_all(self) -> None:
        """Add up over processes all that was squared, where that is to be done."""
        for batches in (self, self.staged):
            if batches is not None and self.spread:
                # The same ones in the same order in all processes.
                everywhere = set().union(*self.spread.together.gather(set(batches.open.whole)))
                for name in filter(everywhere.__contains__, self.spread.layouts):
                    batches.reduce(name)

    def begin_anew(self) -> None:
        """Forget the first batch, of which a part was added, and what it decided."""
        self.clear()
        if self.factors is not None:
            self.factors.forget()

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
        self.reduce_all()
        self.use(staged.unit / (scale * scale))
        finite = staged.finite() if self.dropping else None
        if finite is not None and self.spread:  # sums are of all processes
            finite = torch.tensor(all(self.spread.together.gather(bool(finite))))
        with torch.no_grad():
            for name, value in staged.sums.items():
                where = None if finite is None else finite.to(value.device)
                if self.open.is_spread(name):
                    value = value / (scale * scale * self.spread_remains)
                self.sums[name] += value if where is None else torch.where(where, value, 0)
            if self.factors is not None and staged.factors is not None:
                self.factors.add_(staged.factors, finite)
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
        self.remains *= self.decay
        self.spread_remains *= self.decay
        if self.spread_remains < 2.0**-20:
            _scale([self.sums[name] for name in self.spread.layouts if name in self.sums],
                   self.spread_remains)  # fmt: skip
            self.spread_remains = 1.0
        self.samples = self.samples * self.decay
        self.tokens = None if self.tokens is None else self.tokens * self.decay

    def overflowed(self) -> bool:
        """Return whether some sum is not finite, in any process; waits for the device once."""
        each = [total.sum().float().to(self.device) for _, total in self.tensors()]
        found = bool(each) and not bool(torch.stack(each).isfinite().all())
        return any(self.spread.together.gather(found))

    def non_finite(self) -> list[str]:
        """Name the parameters whose sums hold a NaN or an infinity."""
        found = [
            name
            for name, total in self.tensors()
            # The sum is the faster look; it may also overflow where no entry does.
            if not (torch.isfinite(total.sum()) or torch.isfinite(total).all())
        ]
        everywhere = self.spread.together.gather(found)
        return list(dict.fromkeys(name for names in everywhere for name in names))

    def importance(
        self,
        model: nn.Module,
        policy: Policy,
        matrices: Mapping[str, Factors] | None = None,
        **metadata: Any,
    ) -> Importance:
        """Return a copy of the sums as an importance.

        Args:
            model: The model.
            policy: What was done with unsupported parameters.
            matrices: The matrices' factors, where they are known; else they are made of the sums.
            metadata: What is to be said besides.
        """
        with self.spread.together.agreeing():
            self._check_whole()
        if self.batches == 0:
            raise RuntimeError("nothing was observed: finalize() needs at least one observe().")
        skipped = policy.left if policy.mode == "skip" else {}
        if names := [name for name in self.non_finite() if name not in skipped]:
            raise ValueError(
                f"the squared gradients of parameter {names[0]!r} are not finite ({len(names)} of "
                f"{len(self.shapes)} parameters): an observed loss overflowed or was NaN."
            )
        if float(self.samples) == 0.0:
            raise ValueError("every batch overflowed and was dropped; nothing was observed.")
        self.spread.require_alike(self.sums, float(self.samples))
        if self.factors is not None and matrices is None:
            matrices = self.made_factors(policy)
        inside = {
            name: weight
            for weight, one in (matrices or {}).items()
            for name in (weight, one.layout.bias)
        }
        rest = [name for name in self.shapes if name not in skipped and name not in inside]
        parameters = self.sums.parameters
        sums = {name: like(parameters[name], self.sums[name] * self.unit_of(name)) for name in rest}
        tokens = None if self.tokens is None else _plain(self.tokens)
        if skipped:
            metadata["skipped"] = dict(skipped)
        if self.dropping:
            metadata["dropped_samples"] = _plain(self._dropped)
        common = {"sample": "sequence", **provenance(model, trained(model))}
        samples = _plain(self.samples)
        if self.factors is None or matrices is None:
            return Importance(sums, samples, tokens, {**metadata, **common})
        signed = dict.fromkeys(policy.left, "not supported: random signs")
        reasons = {name: signed.get(name) or self.factors.structure.why(name) for name in rest}
        said = self._say(self.factors.structure, matrices, reasons)
        return KroneckerImportance(matrices, sums, samples, tokens, {**said, **metadata, **common})

    def over(self, together: Together, policy: Policy) -> tuple[Totals, Policy]:
        """Return the sums over several processes, and what was left out in any; all call it.

        Raises:
            RuntimeError: An ``observe()`` failed in one of them.
            ValueError: They observe other parameters.
            NotImplementedError: They use a parameter in other ways.
        """
        with together.agreeing():
            self._check_whole()
        self.reduce_all()
        own = _Process(
            policy, list(self.sums), self.batches, _plain(self.samples),
            None if self.tokens is None else _plain(self.tokens), _plain(self._dropped),
        )  # fmt: skip
        structure = None if self.factors is None else self.factors.structure.options
        together.require_same(
            (self.shapes, self.decay, structure),
            "the processes observe other parameters, or in another way: give each the same model, "
            "with the same parameters frozen, and the same decay and structure.",
        )
        all_ = together.gather(own)
        whole, unit = copy(self), 1.0 if self.unit is None else float(self.unit)
        whole.staged, whole.unit, whole.remains, whole.spread_remains = None, 1.0, 1.0, 1.0
        whole.batches = sum(one.batches for one in all_)
        whole.samples = sum(one.samples for one in all_)
        whole._dropped = sum(one.dropped for one in all_)
        tokens = [one.tokens for one in all_ if one.batches]
        whole.tokens = None if None in tokens else sum(filter(None, tokens))
        named = {name for one in all_ for name in one.sums}
        whole.sums = _Squares(self.sums.parameters)
        whole.open = Open(whole.sums, self.sums.parameters, self.spread)
        for name in self.shapes:  # in the same order everywhere
            if name in self.sums:
                whole.sums[name] = self.sums[name] * self.unit_of(name)
            elif name in named:
                whole.sums.make(name)
        together.sum_(t for name, t in whole.sums.items() if name not in self.spread.layouts)
        if self.factors is not None:
            parameters = self.sums.parameters
            whole.matrices = self.factors.over(together, unit, self.remains, parameters)
        everyones = replace(
            policy,
            left={name: why for one in all_ for name, why in one.policy.left.items()},
            shared={name: how for one in all_ for name, how in one.policy.shared.items()},
        )
        return whole, everyones

    def made_factors(self, policy: Policy) -> dict[str, Factors]:
        """Make the Kronecker factors of the sums."""
        assert self.factors is not None
        skipped = policy.left if policy.mode == "skip" else {}
        unit = 1.0 if self.unit is None else float(self.unit)
        units = Units(unit, self.remains)
        return factors(self.factors, units, float(self.samples), skipped)

    def _say(
        self, structure: Structure, matrices: Mapping[str, Factors], reasons: Mapping[str, str]
    ) -> dict[str, Any]:
        """Say which parameters have no factors, and why, and of which not all is known."""
        sides = {name: (one.output, one.input) for name, one in matrices.items()}
        blocked = {
            name: [side.blocks for side in both]
            for name, both in sides.items()
            if any(side.blocks != 1 and side.size > 1 for side in both)
        }
        if not self._said:
            self._said = True
            _LOGGER.info(
                "Kronecker factors of %d matrices; the diagonal of %d parameters: %s; sides that "
                "are cut into blocks, or diagonal (0): %s.",
                len(matrices), len(reasons), reasons, blocked,
            )  # fmt: skip
        return {
            "structure": "kronecker",
            "scale": "product",
            "block": structure.block,
            "energy": structure.energy,
            "max_rank": structure.max_rank,
            "reduction": "expand",
            "diagonal": dict(reasons),
            "blocked": blocked,
        }

    def check_unchanged(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Refuse parameters other than those at the start; follow those that were moved."""
        if self.spread:
            reshard(model)
        parameters = trained(model)
        shapes = self.shapes
        for name in {**shapes, **parameters}:
            if name not in parameters or parameters[name].shape != shapes.get(name):
                raise ValueError(
                    f"parameter {name!r} was added, removed, frozen, unfrozen or reshaped after "
                    f"the FisherEstimator was made; make a new one."
                )
            if is_dtensor(parameters[name]) != (name in self.spread.parts):
                raise ValueError(
                    f"parameter {name!r} was spread over processes after the FisherEstimator was "
                    f"made, or gathered; make a new one."
                )
        for batches in (self, self.staged):
            if batches is not None:
                batches.follow(parameters)
        return parameters


def _scale(tensors: list[Tensor], factor: Number) -> None:
    """Multiply all tensors in place."""
    if not tensors:
        return
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
