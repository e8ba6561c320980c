"""Importance: sums of squared per-sample gradients, how many samples, and how they were made."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cl_optim import distributed
from cl_optim.importance import sealed_safetensors, statistics
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.files import whole
from cl_optim.importance.names import Lazy, named_like
from cl_optim.importance.statistics import Summaries, Summary
from cl_optim.ops.checks import check_fraction, check_positive, listed
from cl_optim.ops.warn import warn

_FORMAT = "cl_optim.Importance/2"
_UNSEALED_FORMAT = "cl_optim.Importance/1"
_LOGGER = logging.getLogger(__name__)

_Kind = TypeVar("_Kind", bound="Importance")


class _Means(Mapping[str, Tensor]):
    """Sums, read as means over ``count``."""

    # Mapping's == compares values with ==, which has no truth value for tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, sums: Mapping[str, Tensor], count: float) -> None:
        self._sums = sums
        self._count = count

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name] / self._count

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums


class Importance(_Means):
    """The diagonal Fisher information of a model: a read-only mapping from parameter name to F.

    ``importance[name]`` is a new tensor of the parameter's shape, the mean over samples of the
    squared per-sample gradient, in units of (loss / weight)². What is kept are the raw sums, so
    that two of them can be merged and either normalisation read.

    Args:
        sums: Parameter name → sum of squared per-sample gradients, float32 or float64. The tensors
            are kept, not copied.
        samples: Number of samples in the sums (of a sequence model: sequences); not an integer
            where sums and counts have decayed.
        tokens: Number of tokens in the sums, or ``None`` where a sample is not a sequence.
        metadata: How the sums were made; whatever JSON can hold.

    Attributes:
        structure: What is known of a weight's matrix: ``"diagonal"``, each element's importance.

    Raises:
        TypeError: A sum is not a float32 or float64 tensor, a count is not a number, or the
            metadata is not JSON.
        ValueError: A count is not positive and finite.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756 (the ways to
        compute the Fisher information, and that they differ).
    """

    structure: ClassVar[str] = "diagonal"
    _format: ClassVar[str] = _FORMAT
    _of_format: ClassVar[dict[str, type[Importance]]] = {}  # the classes that have files

    def __init_subclass__(cls, file_format: str | None = None) -> None:
        super().__init_subclass__()
        if file_format is not None:
            cls._format = file_format
            Importance._of_format[file_format] = cls

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        samples: float,
        tokens: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in sums.items():
            if not isinstance(name, str):
                raise TypeError(f"sums must have parameter names as keys, not {name!r}.")
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"sums[{name!r}] must be a float32 or float64 tensor, not {found}.")
        check_positive("samples", samples)
        if tokens is not None:
            check_positive("tokens", tokens)
        super().__init__(dict(sums), samples)
        self._tokens = tokens
        try:
            self._metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata must be what JSON can hold: {error}.") from None

    @classmethod
    def lazy(
        cls,
        sums: Mapping[str, Tensor],
        samples: float,
        tokens: float | None,
        metadata: Mapping[str, Any],
    ) -> Importance:
        """Make one whose sums are read only when they are asked for; they are not checked.

        Args:
            sums: A mapping that makes its tensors on access, such as a file's.
            samples: As for the class.
            tokens: As for the class.
            metadata: As for the class.
        """
        importance = cls({}, samples=samples, tokens=tokens, metadata=metadata)
        importance._sums = sums
        return importance

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Parameter name → the raw sum of squared per-sample gradients (not a copy).

        Of a log's record a tensor is read whenever it is asked for.
        """
        return MappingProxyType(self._sums)

    @property
    def samples(self) -> float:
        """Number of samples in the sums."""
        return self._count

    @property
    def tokens(self) -> float | None:
        """Number of tokens in the sums; ``None`` where a sample is not a sequence."""
        return self._tokens

    @property
    def metadata(self) -> dict[str, Any]:
        """How the sums were made: estimator, labels, versions, time, the model's parameters."""
        return self._metadata

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Parameter name → shape."""
        return Lazy(self, lambda name: self._sums[name].shape)

    def per_token(self) -> Mapping[str, Tensor]:
        """Read the same sums as means over tokens.

        The square is still that of a whole sequence's gradient; only the divisor differs.

        Raises:
            ValueError: There is no token count.
        """
        if self._tokens is None:
            raise ValueError("per_token() needs a sequence model: this importance has no tokens.")
        return _Means(self.sums, self._tokens)

    def to(self, device: torch.device | str) -> Importance:
        """Return the same importance with its tensors on ``device``."""
        return self._with_sums({name: value.to(device) for name, value in self._sums.items()})

    def whole(self) -> Importance:
        """Return the same importance with whole tensors on the CPU, where they are DTensors.

        What a model that is spread over processes has is spread as it is. All processes call it;
        then one of them saves it, or looks at its ranks.
        """
        return self._with_sums(
            {name: distributed.whole(value).cpu() for name, value in self._sums.items()}
        )

    def _with_sums(self, sums: Mapping[str, Tensor]) -> Importance:
        """Return the same with other tensors."""
        return Importance(sums, self.samples, self._tokens, self._metadata)

    def diagonal(self) -> Importance:
        """Return the importance of each element alone: of a diagonal importance, itself."""
        return self

    # --- arithmetic -------------------------------------------------------------------------------

    def merge(
        self, other: Mapping[str, Tensor], decay: float = 1.0, strict: bool = True
    ) -> Importance:
        """Return ``decay`` × this + the other: what online EWC protects after both tasks.

        A parameter that only one of them knows has only that one's importance; names match without
        what wrappers put into them. Means over samples are added, not raw sums: the result does not
        depend on how many samples each was made of.

        Args:
            other: The newer importance; any mapping.
            decay: What remains of this one, in [0, 1].
            strict: A parameter of two shapes is an error; ``False`` keeps its newer importance
                alone, and logs which it is.

        Raises:
            ValueError: ``decay`` is out of range, a name is ambiguous, a parameter has two shapes,
                or one of the two is Kronecker-factored and the other is not.
        """
        check_fraction("decay", decay)
        self._check_structure(other)
        for one in (self, other):
            check_reduced(one)
        newer = named_like(other, self)
        merged: dict[str, Tensor] = {}
        resized = []
        for name in dict.fromkeys([*self, *newer]):
            old = decay * self[name] if name in self else None
            new = newer.get(name)
            if old is not None and new is not None and old.shape != new.shape:
                if strict:
                    shapes = f"{tuple(old.shape)} and {tuple(new.shape)}"
                    raise ValueError(
                        f"{name!r} cannot be merged: its shapes are {shapes} (strict=False keeps "
                        "the newer importance alone)."
                    )
                resized.append(name)
                old = None
            if old is None:
                total = newer[name].clone()
            else:
                total = old if new is None else old + new.to(old.device)
            merged[name] = total if total.dtype == torch.float64 else total.float()
        if resized:
            _LOGGER.warning("Merged with strict=False: new shapes of %s", listed(resized))
        return Importance(merged, samples=1, metadata=merged_metadata(self, decay, other))

    def _check_structure(self, other: Mapping[str, Tensor]) -> None:
        """Raise ValueError where two importances do not know the same of their matrices."""
        theirs = other.structure if isinstance(other, Importance) else Importance.structure
        if theirs != self.structure:
            raise ValueError(
                "a diagonal and a Kronecker-factored importance cannot be merged: reduce the "
                'latter with its .diagonal(), or estimate every task with structure="kronecker".'
            )

    def normalize(self) -> Importance:
        """Return the same importance on the scale where the mean weight has 1.

        Estimators differ by orders of magnitude, and the best λ with them; on this scale it moves
        less. The factor is in the metadata, as ``"normalized_by"``.

        Raises:
            ValueError: All of it is 0.
        """
        weights = sum(value.numel() for value in self.values())
        mean = sum(statistics.sum_over(value, max(weights, 1)) for value in self.values())
        if not mean > 0:
            raise ValueError("an importance that is 0 everywhere cannot be normalized.")
        # In float64: float32 may hold neither the mean nor its inverse.
        sums = {name: (value.double() / mean).to(value.dtype) for name, value in self.items()}
        return Importance(sums, samples=1, metadata={**self._metadata, "normalized_by": mean})

    def top(self, fraction: float) -> dict[str, Tensor]:
        """Return masks of the most important fraction of all weights.

        Args:
            fraction: In [0, 1]; rounded to a number of weights. Ties go to those that come first.

        Returns:
            Parameter name → bool tensor of its shape, on the CPU.
        """
        return statistics.top_masks(self, fraction)

    def quantile(self, q: float) -> float:
        """Return the smallest importance that at least a fraction ``q`` of all does not exceed."""
        return statistics.quantile(self, q)

    def overlap(self, other: Mapping[str, Tensor], fraction: float = 0.05) -> dict[str, float]:
        """Return how much this importance and another have in common, each from 0 to 1.

        Args:
            other: Any mapping; a parameter that it does not know counts as 0. Names match without
                what wrappers put into them.
            fraction: Of the most important weights, for ``"jaccard"``.

        Returns:
            ``"jaccard"``: common weights of both top sets by all in either; ``"cosine"``;
            ``"fisher"``: Σ √(F̂₁F̂₂) with each F̂ scaled to sum 1.

        References:
            Kirkpatrick et al. 2017, arXiv:1612.00796, §4.3 (Fisher overlap).
        """
        if isinstance(other, Importance):
            other = other.diagonal()  # once, not in each of several passes
        found = statistics.overlap([self, named_like(other, self)], fraction)
        return {name: value[0, 1].item() for name, value in found._asdict().items()}

    def per_layer(self) -> dict[str, Summary]:
        """Describe each layer's importance; a layer is a parameter's name up to its last dot.

        Returns:
            For each layer weights, mean, maximum, quantiles and the fractions of its weights that
            carry 50, 90 and 99 % of its importance.
        """
        summaries = Summaries()
        for name, value in self.items():
            summaries.add(name, value)
        return summaries.layers()

    # --- on disk ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums, counts and metadata to a safetensors file, every byte with a checksum.

        The file appears whole or not at all: it is written beside its place and moved there.

        Raises:
            OSError: The folder does not exist or cannot be written to.
            ValueError: A parameter has the name ``"__metadata__"``, which is safetensors' own, or
                is spread over processes: see :meth:`whole`.
        """
        if isinstance(self._sums, dict):
            distributed.refuse_parts(self._sums.values())
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path {str(path)!r} is in a folder that does not exist.")
        header = {
            "format": self._format,
            "samples": json.dumps(self.samples),
            "tokens": json.dumps(self._tokens),
            "metadata": json.dumps(self._metadata),
        }
        tensors, more = self._to_file()
        with whole(path) as file:
            sealed_safetensors.save(tensors, file, header | more)

    def _to_file(self) -> tuple[Mapping[str, Tensor], dict[str, str]]:
        """Return the tensors of a file, and what its header holds besides the counts."""
        return self._sums, {}

    @classmethod
    def _from_file(
        cls,
        tensors: Mapping[str, Tensor],
        header: Mapping[str, str],
        samples: float,
        tokens: float | None,
        metadata: Mapping[str, Any],
    ) -> Importance:
        """Make and check the importance of a file."""
        return cls(tensors, samples, tokens, metadata)

    @classmethod
    def load(
        cls: type[_Kind], path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> _Kind:
        """Read and verify what :meth:`save` wrote, with the tensors on ``device``.

        What a :class:`KroneckerImportance` has written comes back as one. A file that an earlier
        version wrote has no checksums; a warning says so.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not such a file; or it is damaged (``errors.DamagedError``).
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path {str(path)!r} is not a file.")
        sums, header, is_verified = sealed_safetensors.load(path, device)
        format_ = header.get("format", "")
        if format_ not in (*cls._of_format, _UNSEALED_FORMAT):
            raise ValueError(
                f"path {str(path)!r} was not written by Importance.save: its format is "
                f"{format_!r}, not {_FORMAT!r}."
            )
        kind: Any = cls._of_format.get(format_, Importance)
        if kind._format == cls._format:
            kind = cls
        if not issubclass(kind, cls):
            raise ValueError(
                f"path {str(path)!r} holds a {kind.structure} importance, not a "
                f"{cls.structure} one: load it with {kind.__name__}.load."
            )
        if is_verified != (format_ != _UNSEALED_FORMAT):
            raise DamagedError(f"the file {str(path)!r} is damaged: it has lost its checksums.")
        if not is_verified:
            warn(
                f"{str(path)!r} has no checksums: an earlier version wrote it, and damage would "
                "not be noticed. Save it again to give it some."
            )
        try:
            samples, tokens, metadata = (
                json.loads(header[key]) for key in ("samples", "tokens", "metadata")
            )
            found: _Kind = kind._from_file(sums, header, samples, tokens, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the file {str(path)!r} is damaged: {error}.") from None
        return found

    def __repr__(self) -> str:
        size = f"{len(self)} parameters"
        if isinstance(self._sums, dict):  # others would be read for it
            size += f" with {sum(shape.numel() for shape in self.shapes.values()):,} weights"
        counts = f"{self.samples:,} samples"
        if self._tokens is not None:
            counts += f" of {self._tokens:,} tokens in all"
        labels = f", labels={self._metadata['labels']!r}" if "labels" in self._metadata else ""
        return f"{type(self).__name__}({size}, {counts}{labels})"


Importance._of_format[_FORMAT] = Importance


def check_reduced(importance: object) -> None:
    """Raise ValueError where an importance is of one process's samples, and there are others'."""
    if isinstance(importance, Importance) and "rank" in importance.metadata:
        rank = importance.metadata["rank"]
        raise ValueError(
            f"the importance is of rank {rank['rank']} of {rank['of']}, not reduced: it knows the "
            "samples of one process alone, and the others would protect other weights. Make it "
            "with ranks='sum', or where each process sees all samples, with ranks='own'."
        )


def merged_metadata(
    importance: Mapping[str, Tensor], decay: float, newer: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the metadata of ``decay`` × an importance + a newer one: of what it was merged."""
    return {"merged": [*_sources(importance, decay), *_sources(newer, 1.0)]}


def tasks_in(importance: object) -> float:
    """Return of how many tasks an importance is a sum; what has decayed counts for less."""
    metadata = importance.metadata if isinstance(importance, Importance) else {}
    return sum((source["weight"] for source in metadata.get("merged", ())), start=0.0) or 1.0


def _sources(importance: Mapping[str, Tensor], weight: float) -> list[dict[str, Any]]:
    """Return of what an importance was merged, with their weights."""
    metadata = importance.metadata if isinstance(importance, Importance) else {}
    if "merged" in metadata:
        return [{**source, "weight": weight * source["weight"]} for source in metadata["merged"]]
    source: dict[str, Any] = {"weight": weight}
    if isinstance(importance, Importance):
        source["samples"] = importance.samples
    source |= {key: metadata[key] for key in ("task", "labels", "estimator") if key in metadata}
    return [source]
