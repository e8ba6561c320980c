"""KroneckerImportance: what an importance is, with the correlations within each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.side import Side
from cl_optim.importance.names import Lazy


class KroneckerImportance(Importance):
    """The Fisher information of a model, Kronecker-factored for the weights of linear maps.

    As a mapping it is the diagonal of what it represents: ``importance[name]`` is a new tensor of
    the parameter's shape, the mean over samples, made of the factors when it is asked for.
    Parameters that have no factors have their diagonal itself. Make one with
    ``estimate_fisher(..., structure="kronecker")``.

    Args:
        factors: Of each linear map, by the name of its weight; kept, not copied.
        sums: Of the parameters without factors, as for :class:`cl_optim.Importance`.
        samples: Number of samples.
        tokens: Number of tokens, or ``None`` where a sample is not a sequence.
        metadata: How it was made; whatever JSON can hold.

    Raises:
        TypeError: As for :class:`cl_optim.Importance`.
        ValueError: Factors are not finite and at least 0, their directions are not orthonormal, or
            a parameter is in two of them.

    References:
        Martens & Grosse 2015, arXiv:1503.05671 (K-FAC); George et al. 2018, arXiv:1806.03884
        (EKFAC); Ritter et al. 2018, arXiv:1805.07810 (Kronecker-factored Laplace approximations
        against forgetting).
    """

    def __init__(
        self,
        factors: Mapping[str, Factors],
        sums: Mapping[str, Tensor],
        samples: float,
        tokens: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(sums, samples, tokens, metadata)
        self._factors = dict(factors)
        self._homes: dict[str, str] = {}  # of each parameter in a matrix: its weight
        for weight, one in self._factors.items():
            check_factors(one, weight)
            for name in (weight, one.layout.bias):
                if name is None:
                    continue
                if name in self._homes or name in self._sums:
                    raise ValueError(f"parameter {name!r} has importance twice.")
                self._homes[name] = weight

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Name of a weight → its Kronecker factors (not a copy)."""
        return MappingProxyType(self._factors)

    @property
    def unfactored(self) -> Mapping[str, Tensor]:
        """Name of a parameter without factors → its raw sum of squares (not a copy)."""
        return MappingProxyType(self._sums)

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Parameter name → the diagonal times the number of samples, made when asked for."""
        return Lazy(dict.fromkeys(self), lambda name: self[name] * self.samples)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._homes:
            return super().__getitem__(name)
        weight, bias = self._factors[self._homes[name]].diagonal()
        found = weight if name in self._factors else bias
        assert found is not None
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._homes
        yield from self._sums

    def __len__(self) -> int:
        return len(self._homes) + len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._sums

    def diagonal(self) -> Importance:
        """Return the diagonal alone, as an :class:`cl_optim.Importance`."""
        sums = {name: value.clone() for name, value in self.sums.items()}
        return Importance(sums, self.samples, self.tokens, self.metadata)

    def to(self, device: torch.device | str) -> KroneckerImportance:
        """Return the same importance with its tensors on ``device``."""
        factors = {name: one.to(device) for name, one in self._factors.items()}
        sums = {name: value.to(device) for name, value in self._sums.items()}
        return KroneckerImportance(factors, sums, self.samples, self.tokens, self.metadata)


def check_factors(factors: Factors, name: str) -> None:
    """Raise ValueError where factors are no Fisher information of the matrix that they name."""
    sides = {"output": factors.output, "input": factors.input}
    sizes = {"output": factors.layout.outputs, "input": factors.layout.inputs}
    for which, side in sides.items():
        if side.size != sizes[which]:
            raise ValueError(
                f"the {which} side of the Kronecker factors of {name!r} must have size "
                f"{sizes[which]}, not {side.size}."
            )
        check_finite(side.values, f"the {which} eigenvalues of {name!r}")
        error = departure(side)
        if not error <= 1e-3:  # true for NaN as well
            raise ValueError(
                f"the {which} directions of the Kronecker factors of {name!r} must be orthonormal; "
                f"they are off by {error:.1g}: the file or the state that they are from is damaged."
            )
    if factors.scale.shape != (factors.output.rank, factors.input.rank):
        raise ValueError(
            f"the scale of the Kronecker factors of {name!r} must have shape "
            f"{(factors.output.rank, factors.input.rank)}, not {tuple(factors.scale.shape)}."
        )
    check_finite(factors.scale, f"the scale of {name!r}")


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError where values are not finite and at least 0."""
    if values.numel() == 0:
        return
    low, high = (bound.item() for bound in values.detach().aminmax())  # NaN shows in both
    if not (low >= 0.0 and high < float("inf")):
        raise ValueError(f"{what} must be finite and at least 0; they reach from {low} to {high}.")


def departure(side: Side) -> float:
    """Return how far the directions are from orthonormal: max |UᵀU − I|, but for zero columns."""
    if side.basis is None or side.basis.numel() == 0:
        return 0.0
    basis = side.basis.double()
    gram = basis.mT @ basis
    used = (basis != 0).any(1).to(gram.dtype)  # [k, r]
    return float((gram - torch.diag_embed(used)).abs().max())
