"""Two texts as bytes, each with held-out parts."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_optim.demo.scenarios import DataError

_BLOCK = 4096  # the text is held out in blocks of this many bytes, spread over all of it
_HELD_OUT_EVERY = 10
_CODE_BYTES = 1_500_000
SMALLEST = 20 * _BLOCK


@dataclass(frozen=True)
class Corpus:
    """A text.

    Attributes:
        name: In tables.
        train: uint8, what is learned.
        held_out: uint8, what is measured on.
    """

    name: str
    train: Tensor
    held_out: Tensor

    def windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw random windows of the training text, [count, length] int64."""
        starts = torch.randint(len(self.train) - length, (count, 1), generator=generator)
        return self.train[starts + torch.arange(length)].long()

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """Return at most so many windows of the held-out text, evenly spread, [n, length] int64."""
        starts = torch.arange(0, len(self.held_out) - length, length)
        chosen = starts[torch.linspace(0, len(starts) - 1, min(count, len(starts))).long()]
        return self.held_out[chosen[:, None] + torch.arange(length)].long()


def english() -> Corpus:
    """Read the help texts of CPython's own ``pydoc_data.topics``."""
    from pydoc_data.topics import topics

    return corpus("English", "\n\n".join(topics[key] for key in sorted(topics)).encode())


def python_code() -> Corpus:
    """Read the standard library's modules, the first 1.5 MB in alphabetical order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise DataError("the standard library's source is not there: give two text files.")
    text = b"\n".join(path.read_bytes() for path in files)
    return corpus("Python", text[:_CODE_BYTES])


def from_file(path: Path) -> Corpus:
    """Read any file; its bytes need not be UTF-8.

    Raises:
        DataError: It cannot be read, or is too short.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read text {path}: {error.strerror}.") from None
    return corpus(path.name, content)


def corpus(name: str, content: bytes) -> Corpus:
    """Hold out every tenth block.

    Raises:
        DataError: The text is too short to hold anything out.
    """
    if len(content) < SMALLEST:
        raise DataError(
            f"text {name} must have at least {SMALLEST:,} bytes to learn from and to measure on; "
            f"it has {len(content):,}."
        )
    blocks = np.arange(len(content)) // _BLOCK
    data = np.frombuffer(content, dtype=np.uint8)
    held_out = blocks % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    return Corpus(name, torch.from_numpy(data[~held_out]), torch.from_numpy(data[held_out]))
