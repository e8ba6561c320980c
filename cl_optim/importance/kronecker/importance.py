"""KroneckerImportance: what an importance is, with the correlations within each matrix."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_optim.importance import statistics
from cl_optim.importance.importance import Importance, check_reduced, merged_metadata
from cl_optim.importance.kronecker import disk
from cl_optim.importance.kronecker.factors import Factors, Layout
from cl_optim.importance.kronecker.side import ENERGY, Side, partition
from cl_optim.importance.names import Lazy, match_names, renamed
from cl_optim.ops.checks import check_fraction, listed

_LOGGER = logging.getLogger(__name__)


class KroneckerImportance(Importance, file_format="cl_optim.KroneckerImportance/1"):
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

    Attributes:
        structure: ``"kronecker"``.

    Raises:
        TypeError: As for :class:`cl_optim.Importance`; or something is no ``Factors``.
        ValueError: Factors are not finite and at least 0, their directions are not orthonormal, or
            a parameter is in two of them.

    References:
        Martens & Grosse 2015, arXiv:1503.05671 (K-FAC); George et al. 2018, arXiv:1806.03884
        (EKFAC); Ritter et al. 2018, arXiv:1805.07810 (Kronecker-factored Laplace approximations
        against forgetting).
    """

    structure: ClassVar[str] = "kronecker"

    def __init__(
        self,
        factors: Mapping[str, Factors],
        sums: Mapping[str, Tensor],
        samples: float,
        tokens: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(sums, samples, tokens, metadata)
        for weight, one in factors.items():
            if not isinstance(weight, str) or not isinstance(one, Factors):
                raise TypeError(f"factors[{weight!r}] must be Factors, with a text as its name.")
            check_factors(one, weight)
        self._keep(dict(factors), {weight: one.layout for weight, one in factors.items()})

    @classmethod
    def lazy(
        cls,
        sums: Mapping[str, Tensor],
        samples: float,
        tokens: float | None,
        metadata: Mapping[str, Any],
        factors: Mapping[str, Factors] = MappingProxyType({}),
        layouts: Mapping[str, Layout] | None = None,
    ) -> KroneckerImportance:
        """Make one whose sums and factors are read only when asked for; they are not checked.

        Args:
            sums: As for :meth:`cl_optim.Importance.lazy`.
            samples: As for the class.
            tokens: As for the class.
            metadata: As for the class.
            factors: A mapping that makes its factors on access.
            layouts: Those of the factors, if asking for them would read.
        """
        importance = cls({}, {}, samples, tokens, metadata)
        importance._sums = sums
        if layouts is None:
            layouts = {weight: one.layout for weight, one in factors.items()}
        importance._keep(factors, layouts)
        return importance

    def _keep(self, factors: Mapping[str, Factors], layouts: Mapping[str, Layout]) -> None:
        self._factors = factors
        self._layouts = layouts
        self._homes: dict[str, str] = {}  # of each parameter in a matrix: its weight
        for weight, layout in layouts.items():
            for name in _parameters(weight, layout):
                if name in self._homes or name in self._sums:
                    raise ValueError(f"parameter {name!r} has importance twice.")
                self._homes[name] = weight

    def _with(
        self, factors: Mapping[str, Factors], sums: Mapping[str, Tensor]
    ) -> KroneckerImportance:
        """Return the same with other tensors."""
        return KroneckerImportance.lazy(sums, self.samples, self.tokens, self.metadata, factors)

    def _with_sums(self, sums: Mapping[str, Tensor]) -> KroneckerImportance:
        return self._with(self._factors, sums)

    @property
    def factors(self) -> Mapping[str, Factors]:
        """Name of a weight → its Kronecker factors (not a copy).

        Of a log's record they are read whenever they are asked for.
        """
        return MappingProxyType(self._factors)

    @property
    def unfactored(self) -> Mapping[str, Tensor]:
        """Name of a parameter without factors → its raw sum of squares (not a copy)."""
        return MappingProxyType(self._sums)

    # --- as a mapping -----------------------------------------------------------------------------

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Parameter name → the diagonal times the number of samples, made when asked for."""
        return Lazy(self, self._sum)

    def _sum(self, name: str) -> Tensor:
        return self[name] * self.samples if name in self._homes else self._sums[name]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Parameter name → shape."""
        return Lazy(self, self._shape)

    def _shape(self, name: str) -> torch.Size:
        if name not in self._homes:
            return self._sums[name].shape
        layout = self._layouts[self._homes[name]]
        return torch.Size([layout.outputs] if name == layout.bias else layout.shape)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._homes:
            return super().__getitem__(name)
        factors = self._factors[self._homes[name]]
        is_bias = name == factors.layout.bias
        value = (factors.bias_diagonal() if is_bias else factors.diagonal()[0]).contiguous()
        # Not a view of the scale, which that of two sides without bases would be.
        return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()

    def __iter__(self) -> Iterator[str]:
        yield from self._homes
        yield from self._sums

    def __len__(self) -> int:
        return len(self._homes) + len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._sums

    # --- as another importance --------------------------------------------------------------------

    def diagonal(self) -> Importance:
        """Return the diagonal alone, as an :class:`cl_optim.Importance` with tensors of its own."""
        made = self.sums
        sums = {name: made[name] if name in self._homes else made[name].clone() for name in self}
        return Importance(sums, self.samples, self.tokens, {**self.metadata, "reduced": "diagonal"})

    def to(self, device: torch.device | str) -> KroneckerImportance:
        """Return the same importance with its tensors on ``device``."""
        factors = {weight: one.to(device) for weight, one in self._factors.items()}
        return self._with(factors, {name: value.to(device) for name, value in self._sums.items()})

    def renamed(self, names: Mapping[str, str]) -> KroneckerImportance:
        """Return a view under other names; a parameter that is not in ``names`` keeps its own."""
        layouts = {
            names.get(weight, weight): layout._replace(
                bias=None if layout.bias is None else names.get(layout.bias, layout.bias)
            )
            for weight, layout in self._layouts.items()
        }
        old = {names.get(weight, weight): weight for weight in self._layouts}
        factors = Lazy(old, lambda new: replace(self._factors[old[new]], layout=layouts[new]))
        counts = (self.samples, self.tokens, self.metadata)
        return KroneckerImportance.lazy(renamed(self._sums, names), *counts, factors, layouts)

    def merge(
        self,
        other: Mapping[str, Tensor],
        decay: float = 1.0,
        strict: bool = True,
        energy: float = ENERGY,
    ) -> KroneckerImportance:
        """Return ``decay`` × this + the other: what online EWC protects after both tasks.

        As :meth:`cl_optim.Importance.merge`; of a matrix, in bases of the sums of both tasks'
        factors, which take as much memory as before.

        Args:
            other: The newer importance, Kronecker-factored for the same matrices.
            decay: What remains of this one, in [0, 1].
            strict: A parameter of two shapes is an error; ``False`` keeps its newer importance
                alone, and that of its matrix, and logs which it is.
            energy: The share of the sums' traces that the merged bases hold, in (0, 1].

        Raises:
            ValueError: As for :meth:`cl_optim.Importance.merge`; a parameter has factors in one of
                the two alone, or is in another matrix; or both were made with different ``block``.
        """
        check_fraction("decay", decay)
        check_reduced(self)
        check_reduced(other)
        self._check_structure(other)
        assert isinstance(other, KroneckerImportance)
        newer = other.renamed(match_names(other, self))
        # What a task does not use, such as another task's head, has no factors, and nothing to add.
        unused = self._unused(newer) | self._resized(newer, strict)
        newer_unused = newer._unused(self)
        kept = {name for name in self if name not in unused}
        for name in newer:
            if (
                name in kept
                and name not in newer_unused
                and self._matrix(name) != newer._matrix(name)
            ):
                raise ValueError(
                    f"{name!r} cannot be merged: its Kronecker factors are of another matrix, or "
                    "in one of the two importances alone; merge what .diagonal() returns of both."
                )
        factors, sums = {}, {}
        for weight in dict.fromkeys([*self._layouts, *newer._layouts]):
            if weight not in self._layouts or weight not in kept:
                if weight in newer._layouts:
                    factors[weight] = newer._factors[weight]
                continue
            one = self._factors[weight]
            if weight in newer._layouts:
                factors[weight] = one.merged(newer._factors[weight], decay, energy, weight)
            else:
                factors[weight] = one.decayed(decay)
        newer_sums = [name for name in newer._sums if name not in newer_unused]
        for name in dict.fromkeys([*self._sums, *newer_sums]):
            if name not in self._sums or name not in kept:
                if name in newer_sums:
                    sums[name] = newer[name]
                continue
            total = decay * self[name]
            sums[name] = total + newer[name].to(total.device) if name in newer_sums else total
        metadata = merged_metadata(self, decay, other)
        return KroneckerImportance.lazy(sums, 1, None, metadata, factors)

    def _unused(self, other: KroneckerImportance) -> set[str]:
        """Return what has factors there, and here none and an importance of 0."""
        shared = [name for name in self._sums if name in other._homes]
        return {name for name in shared if not bool(self._sums[name].any())}

    def _matrix(self, name: str) -> tuple[str, Layout] | None:
        """Return the matrix that a parameter is in, by its weight; None where it has no factors."""
        weight = self._homes.get(name)
        return None if weight is None else (weight, self._layouts[weight])

    def _resized(self, newer: KroneckerImportance, strict: bool) -> set[str]:
        """Return the parameters that have got another shape, and those in one matrix with them."""
        resized = []
        for name, shape in newer.shapes.items():
            if name in self and self.shapes[name] != shape:
                if strict:
                    shapes = f"{tuple(self.shapes[name])} and {tuple(shape)}"
                    raise ValueError(
                        f"{name!r} cannot be merged: its shapes are {shapes} (strict=False keeps "
                        "the newer importance alone)."
                    )
                resized.append(name)
        if resized:
            _LOGGER.warning("Merged with strict=False: new shapes of %s", listed(resized))
        weights = {self._homes[name] for name in resized if name in self._homes}
        of_matrices = {name for name, weight in self._homes.items() if weight in weights}
        return of_matrices.union(resized)

    def normalize(self) -> KroneckerImportance:
        """Return the same importance on the scale where the mean weight has 1.

        As :meth:`cl_optim.Importance.normalize`; the factors are scaled with it.

        Raises:
            ValueError: All of it is 0.
        """
        weights = max(sum(shape.numel() for shape in self.shapes.values()), 1)
        means = {name: value / self.samples for name, value in self._sums.items()}
        mean = sum(statistics.sum_over(value, weights) for value in means.values())
        mean += sum(one.trace() / weights for one in self._factors.values())
        if not mean > 0:
            raise ValueError("an importance that is 0 everywhere cannot be normalized.")
        factors = {weight: one.scaled(1 / mean) for weight, one in self._factors.items()}
        sums = {name: (value.double() / mean).to(value.dtype) for name, value in means.items()}
        metadata = {**self.metadata, "normalized_by": mean}
        return KroneckerImportance.lazy(sums, 1, None, metadata, factors)

    # --- statistics -------------------------------------------------------------------------------

    def effective_ranks(self) -> dict[str, tuple[float, float]]:
        """Return how many directions of its outputs and of its inputs matter in each matrix.

        Returns:
            Name of a weight → exp(entropy) of the eigenvalues' shares, of output and input.

        References:
            Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
        """
        return {
            weight: (one.output.effective_rank(), one.input.effective_rank())
            for weight, one in self._factors.items()
        }

    # In several passes over what is made anew when it is asked for: made once for them.

    def top(self, fraction: float) -> dict[str, Tensor]:
        """Return masks of the most important fraction, as :meth:`cl_optim.Importance.top`."""
        return self.diagonal().top(fraction)

    def quantile(self, q: float) -> float:
        """Return a quantile of the diagonal, as :meth:`cl_optim.Importance.quantile`."""
        return self.diagonal().quantile(q)

    def overlap(self, other: Mapping[str, Tensor], fraction: float = 0.05) -> dict[str, float]:
        """Return what two diagonals have in common, as :meth:`cl_optim.Importance.overlap`."""
        return self.diagonal().overlap(other, fraction)

    # --- on disk ----------------------------------------------------------------------------------

    def _to_file(self) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        tensors = {f"sum/{name}": value for name, value in self._sums.items()}
        described = {}
        for weight, one in self._factors.items():
            described[weight] = disk.description(one)
            tensors |= {f"{part}/{weight}": value for part, value in disk.tensors(one).items()}
        return tensors, {"factors": json.dumps(described)}

    @classmethod
    def _from_file(
        cls,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, str],
        samples: float,
        tokens: float | None,
        metadata: Mapping[str, Any],
    ) -> KroneckerImportance:
        described = json.loads(header["factors"])

        def assembled(weight: str) -> Factors:
            return disk.assembled(described[weight], lambda part: tensors[f"{part}/{weight}"])

        factors = {weight: assembled(weight) for weight in described}
        sums = {key[4:]: value for key, value in tensors.items() if key.startswith("sum/")}
        return cls(factors, sums, samples, tokens, metadata)


def _parameters(weight: str, layout: Layout) -> list[str]:
    return [weight] if layout.bias is None else [weight, layout.bias]


def check_factors(factors: Factors, name: str) -> None:
    """Raise ValueError where factors are no Fisher information of the matrix that they name."""
    of = f"of the Kronecker factors of {name!r}"
    layout = factors.layout
    if layout.transposed and len(layout.shape) != 2:
        raise ValueError(f"the layout {of} must be a matrix's to be transposed: {layout.shape}.")
    check_side(factors.output, layout.outputs, "output", name)
    check_side(factors.input, layout.inputs, "input", name)
    shape = (factors.output.rank + 1, factors.input.rank + 1)
    if factors.scale.shape != shape:
        raise ValueError(
            f"the scale {of} must have shape {shape}, one more for the tails, not "
            f"{tuple(factors.scale.shape)}."
        )
    check_finite(factors.scale, f"the scale of {name!r}")


def check_side(side: Side, size: int, which: str, name: str) -> None:
    """Raise ValueError where the ``which`` side of the factors of ``name`` is none of ``size``."""
    of = f"of the Kronecker factors of {name!r}"
    if side.size != size:
        raise ValueError(f"the {which} side {of} must have size {size}, not {side.size}.")
    _check_directions(side, f"the {which} directions {of}")
    check_finite(side.values, f"the {which} eigenvalues of {name!r}")
    if not 0.0 <= side.tail < math.inf:  # true for NaN as well
        raise ValueError(f"the {which} tail {of} must be finite and at least 0: {side.tail}.")


def _check_directions(side: Side, what: str) -> None:
    if side.basis is None:
        if side.values.shape != (side.size,) or side.kept != side.size:
            raise ValueError(
                f"{what} must be {side.size}, with as many eigenvalues, not {side.rank} and "
                f"{side.kept} that are kept."
            )
        return
    fits = side.basis.dim() == 3
    if fits:
        blocks, width, rank = side.basis.shape
        fits = blocks > 0 and partition(side.size, width) == (blocks, width)
        fits = fits and side.values.shape == (blocks * rank,)
    if not fits:
        raise ValueError(
            f"{what} must be [blocks, widest block, rank], for {side.size} coordinates and "
            f"{side.rank} eigenvalues, not {list(side.basis.shape)}."
        )
    error = departure(side)
    if not error <= 1e-3:  # true for NaN as well
        raise ValueError(
            f"{what} must be orthonormal; they are off by {error:.1g}: the file or the state that "
            "they are from is damaged."
        )
    if bool(side.basis.flatten(0, 1)[side.size :].any()):
        raise ValueError(f"{what} must be 0 beyond its {side.size} coordinates.")
    used = int(side.counts()[:-1].sum())
    if side.kept != used:
        raise ValueError(f"{what} must be as many as are kept, {side.kept}, not {used}.")


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
