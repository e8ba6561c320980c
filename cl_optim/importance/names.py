"""Parameter names across the wrappers that change them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from cl_optim.ops.checks import listed

# Path segments that DataParallel and DDP, torch.compile, FSDP, activation checkpointing and PEFT's
# adapted layers put into names.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",
}
_PEFT_PREFIX = ["base_model", "model"]

_T = TypeVar("_T")


def canonical_name(name: str) -> str:
    """Return the name that a parameter has in the bare model.

    Example:
        >>> canonical_name("module._orig_mod.layers.0.weight")
        'layers.0.weight'
        >>> canonical_name("base_model.model.lm_head.base_layer.weight")
        'lm_head.weight'
    """
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    if segments[:2] == _PEFT_PREFIX:
        segments = segments[2:]
    return ".".join(segments)


def match_names(given: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Find which known name each given name means: the same, or the same without wrappers.

    Returns:
        A known name for each given name that has one.

    Raises:
        ValueError: A name could mean two, or two mean the same one; the message lists them.
    """
    known = list(known)
    exact = set(known)
    by_canonical: dict[str, list[str]] = defaultdict(list)
    for name in known:
        by_canonical[canonical_name(name)].append(name)
    meanings: dict[str, str] = {}
    givens: dict[str, str] = {}
    for name in given:
        candidates = [name] if name in exact else by_canonical.get(canonical_name(name), [])
        if not candidates:
            continue
        if len(candidates) > 1:
            raise ValueError(f"the name {name!r} is ambiguous: it could mean {candidates}.")
        (meaning,) = candidates
        if meaning in givens:
            raise ValueError(f"the names {givens[meaning]!r} and {name!r} both mean {meaning!r}.")
        meanings[name] = meaning
        givens[meaning] = name
    return meanings


class Lazy(Mapping[str, _T]):
    """Tensors, or what is made of them, by name, each made whenever it is asked for.

    Args:
        names: Their names.
        read: Makes the one of a name.
    """

    # Mapping's == compares values with ==, which has no truth value for tensors.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, names: Collection[str], read: Callable[[str], _T]) -> None:
        self._names = names
        self._read = read

    def __getitem__(self, name: str) -> _T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def renamed(values: Mapping[str, _T], names: Mapping[str, str]) -> Lazy[_T]:
    """Return a view of a mapping under other names; what is not in ``names`` keeps its own."""
    old = {names.get(name, name): name for name in values}
    return Lazy(old, lambda name: values[old[name]])


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names of the bare model, by name; where two would be one, they stay."""
    bare = {name: canonical_name(name) for name in names}
    times = Counter(bare.values())
    return {name: new for name, new in bare.items() if new and times[new] == 1}


def without_wrappers(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a mapping under the names of the bare model (:func:`bare_names`)."""
    return renamed(values, bare_names(values))


def named_like(values: Mapping[str, Tensor], known: Iterable[str]) -> Mapping[str, Tensor]:
    """Return a mapping under the known names that its names mean (:func:`match_names`).

    Raises:
        ValueError: A name is ambiguous.
    """
    return renamed(values, match_names(values, known))


class NameMatch(NamedTuple):
    """How the names of an importance meet those of a model that has changed since.

    Attributes:
        matching: The model's name of each parameter that has an importance.
        new: The model's parameters without importance.
        vanished: The importance's names that mean no parameter of the model.
        resized: Of those that match, the model's names of parameters that have another shape now,
            where shapes have been compared.
    """

    matching: list[str]
    new: list[str]
    vanished: list[str]
    resized: Sequence[str] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.matching)} parameters match"]
        parts += [f"{len(self.new)} are new: {listed(self.new)}"] if self.new else []
        if self.vanished:
            parts.append(f"{len(self.vanished)} have vanished: {listed(self.vanished)}")
        if self.resized:
            parts.append(f"{len(self.resized)} have another shape: {listed(self.resized)}")
        return "; ".join(parts) + "."


def compare_names(given: Iterable[str], known: Iterable[str]) -> NameMatch:
    """Say which parameters have an importance, which are new, which have vanished.

    Args:
        given: The names of an importance: ``log.merge()``.
        known: The names of a model: ``dict(model.named_parameters())``.

    Raises:
        ValueError: A name is ambiguous.

    Example:
        >>> str(compare_names(["a.weight", "old"], ["module.a.weight", "b"]))
        "1 parameters match; 1 are new: 'b'; 1 have vanished: 'old'."
    """
    given, known = list(given), list(known)
    meanings = match_names(given, known)
    found = set(meanings.values())
    return NameMatch(
        matching=[name for name in known if name in found],
        new=[name for name in known if name not in found],
        vanished=[name for name in given if name not in meanings],
    )
