"""What is said, and done, where a parameter is used in a way that is not supported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.overrides import resolve_name
from torch.utils.checkpoint import CheckpointError

from cl_optim.fisher.samples import Samples

FREEZE = "freeze what should be left out with requires_grad_(False)."


class RestartError(Exception):
    """A parameter was found to be unsupported while it was already taken to be supported."""


@dataclass
class Policy:
    """What is done with parameters that are used in an unsupported way; kept between batches.

    Attributes:
        mode: ``"error"``, ``"skip"`` or ``"sign"``.
        left: Names of such parameters, and why they are left out of what is observed.
        shared: Names of tables, and whether they are looked up once for all samples.
    """

    mode: str = "error"
    left: dict[str, str] = field(default_factory=dict)
    shared: dict[str, bool] = field(default_factory=dict)

    def leave_out(self, refused: RefusedError, help_: str, *, restart: bool) -> None:
        """Raise, or leave parameters out from now on.

        Args:
            refused: Says which, and why.
            help_: What helps.
            restart: Begin the batch anew without them.
        """
        if self.mode == "error":
            raise type(refused.error)(f"{refused}; {help_}") from None
        for name in refused.names:
            self.left[name] = str(refused.error)
        if restart:
            raise RestartError from None


class RefusedError(Exception):
    """A use that is not supported.

    The error says what is wrong; :func:`remedy` says what to do, and is added where it is raised.

    Args:
        error: What to raise.
        names: The parameters it is about.
        of_data: Whether what else took part must be taken to be data.
    """

    def __init__(self, error: Exception, names: Sequence[str], of_data: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.names, self.of_data = error, list(dict.fromkeys(names)), of_data


def remedy(own_pass: bool, magnitudes: bool, packed: bool) -> str:
    """Say what helps where a use of a parameter is not supported."""
    if packed:  # there are no losses of single samples
        return FREEZE
    if magnitudes:  # random signs give squares
        return f"leave it out with unsupported='skip', or {FREEZE}"
    how = "unsupported='sign'" if own_pass else "estimate_fisher(..., unsupported='sign')"
    return f"estimate it by random signs with {how}, or {FREEZE}"


def listed(names: Iterable[str]) -> str:
    """Name parameters in a sentence."""
    unique = list(dict.fromkeys(names))
    return ("parameter " if len(unique) == 1 else "parameters ") + ", ".join(map(repr, unique))


def describe(func: Callable[..., Any]) -> str:
    """Return a function's name, with what it belongs to."""
    return resolve_name(func) or str(getattr(func, "__name__", func))


def not_supported(
    names: Iterable[str], func: Callable[..., Any], error: Exception
) -> NotImplementedError:
    """Return the error for a function whose rule does not cover this call."""
    return NotImplementedError(
        f"{describe(func)} uses {listed(names)} in a way that is not supported: {error}"
    )


def no_rule(names: Sequence[str], func: Callable[..., Any]) -> RefusedError:
    """Return the refusal of a function without a rule."""
    return RefusedError(
        NotImplementedError(
            f"{describe(func)} uses {listed(names)}, and there is no rule for that "
            f"(cl_optim.register_fisher_rule takes one)"
        ),
        names,
    )


def not_the_samples(names: Sequence[str]) -> ValueError:
    """Return the error for inputs with as many rows as samples that are something else."""
    return ValueError(
        f"{listed(names)} met inputs whose rows are as many as the samples, but are not in reverse "
        f"where the samples are: positions may come first, in sequences as long as the batch, rows "
        f"of an expert may be as many by chance, or samples depend on one another. Let the leading "
        f"dimension run over the samples, or use verify=False if they are reversed in what the "
        f"model is not called with"
    )


def unknown_rows(shape: list[int], name: str) -> str:
    """Say that it is not known which row is of which sample."""
    return (
        f"parameter {name!r} met rows of shape {shape} that were gathered from several samples, "
        f"and which row is of which sample is not known"
    )


def no_samples(shape: list[int], samples: Samples, name: str) -> str:
    """Say that something has no dimension for samples."""
    return (
        f"parameter {name!r} met an input of shape {shape}, which has no dimension for samples: it "
        f"must begin with batch_size = {samples.count} samples"
    )


def not_the_batch(shape: list[int], samples: Samples, name: str) -> str:
    """Say that something does not begin with the batch's samples."""
    if samples.offsets is not None:
        return (
            f"parameter {name!r} met an input of shape {shape}, which does not begin with the "
            f"{samples.offsets[-1]} tokens that cu_seqlens counts"
        )
    return (
        f"parameter {name!r} met an input of shape {shape}, whose leading dimension is "
        f"{shape[0]}, but batch_size is {samples.count}: the leading dimension must run "
        f"over the samples (rows of unknown samples, as some mixtures of experts make them, "
        f"are not supported)"
    )


def unseen(names: Sequence[str]) -> NotImplementedError:
    """Return the error for a gradient that no function accounts for."""
    return NotImplementedError(
        f"{listed(names)} received a gradient from a use that was not seen (an autograd.Function, "
        f"a hook that replaces the gradient, a function called inside a checkpoint without a "
        f"module)"
    )


@contextmanager
def refusing_checkpointed_functions() -> Iterator[None]:
    """Say what helps where a recomputation, whose uses are not seen, is not what the pass was."""
    try:
        yield
    except CheckpointError as error:
        raise NotImplementedError(
            "a function inside an activation checkpoint uses parameters in a way that cannot be "
            "seen when it runs again in the backward pass: checkpoint a module, not a function "
            "that uses parameters itself."
        ) from error
