"""Importance: sums of squared per-sample gradients, how many samples, and how they were made."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "cl_optim.Importance/1"


class _Means(Mapping[str, Tensor]):
    """Sums, read as means over ``count``."""

    # Mapping's == compares values with ==, which has no truth value for tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, sums: Mapping[str, Tensor], count: float) -> None:
        self._sums = dict(sums)
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

    Raises:
        TypeError: A sum is not a float32 or float64 tensor, a count is not a number, or the
            metadata is not JSON.
        ValueError: A count is not positive and finite.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756 (the ways to
        compute the Fisher information, and that they differ).
    """

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
        _check_count("samples", samples)
        if tokens is not None:
            _check_count("tokens", tokens)
        super().__init__(sums, samples)
        self._tokens = tokens
        try:
            self._metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata or {})))
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata must be what JSON can hold: {error}.") from None

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Parameter name → the raw sum of squared per-sample gradients (not a copy)."""
        return dict(self._sums)

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

    def per_token(self) -> Mapping[str, Tensor]:
        """Read the same sums as means over tokens.

        The square is still that of a whole sequence's gradient; only the divisor differs.

        Raises:
            ValueError: There is no token count.
        """
        if self._tokens is None:
            raise ValueError("per_token() needs a sequence model: this importance has no tokens.")
        return _Means(self._sums, self._tokens)

    def to(self, device: torch.device | str) -> Importance:
        """Return the same importance with its tensors on ``device``."""
        sums = {name: value.to(device) for name, value in self._sums.items()}
        return Importance(sums, self.samples, self._tokens, self._metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sums, counts and metadata to a safetensors file.

        The file appears whole or not at all: it is written beside its place and moved there.

        Raises:
            OSError: The folder does not exist or cannot be written to.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path {str(path)!r} is in a folder that does not exist.")
        header = {
            "format": _FORMAT,
            "samples": json.dumps(self.samples),
            "tokens": json.dumps(self._tokens),
            "metadata": json.dumps(self._metadata),
        }
        # A tensor may appear twice or be a view; safetensors wants each with a memory of its own.
        tensors = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self._sums.items()
        }
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Importance:
        """Read what :meth:`save` wrote, with the tensors on ``device``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not such a file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path {str(path)!r} is not a file.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path {str(path)!r} is not a safetensors file: {error}.") from None
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"path {str(path)!r} was not written by Importance.save: its format is "
                f"{header.get('format')!r}, not {_FORMAT!r}."
            )
        return cls(
            sums,
            samples=json.loads(header["samples"]),
            tokens=json.loads(header["tokens"]),
            metadata=json.loads(header["metadata"]),
        )

    def __repr__(self) -> str:
        weights = sum(value.numel() for value in self._sums.values())
        counts = f"{self.samples:,} samples"
        if self._tokens is not None:
            counts += f" of {self._tokens:,} tokens in all"
        labels = f", labels={self._metadata['labels']!r}" if "labels" in self._metadata else ""
        return f"Importance({len(self)} parameters with {weights:,} weights, {counts}{labels})"


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}.")
