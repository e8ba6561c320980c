"""The tiles of `squared_grad_triton`: how large, by which shapes, and which program computes them.

Tiles are dealt in waves, one to each multiprocessor. Where the last wave is not full, several
programs share a tile of it and take different samples: squares add, but the tokens of one sample
must never be split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Precision = Literal["half", "tf32", "ieee"]


@dataclass(frozen=True)
class Config:
    """A tile of the result, and how it is computed.

    Attributes:
        block_out: Rows of the tile.
        block_in: Columns of the tile.
        block_tokens: Tokens multiplied at once.
        warps: Warps of a program.
        stages: Depth of the pipeline of loads.
        descriptors: Whether to load through tensor descriptors (compute capability 9 or later).
    """

    block_out: int
    block_in: int
    block_tokens: int
    warps: int
    stages: int
    descriptors: bool = False


_LARGE = Config(128, 128, 64, warps=8, stages=4)
_LARGE_DESCRIPTORS = Config(128, 128, 64, warps=8, stages=4, descriptors=True)
_LARGE_SHORT = Config(128, 128, 32, warps=8, stages=4)
_NARROW_IN = Config(128, 64, 64, warps=8, stages=4)
_NARROW_OUT = Config(64, 128, 64, warps=8, stages=4)
_SMALL = Config(64, 64, 64, warps=4, stages=4)
_LARGE_TF32 = Config(128, 128, 32, warps=8, stages=3)
_SMALL_TF32 = Config(64, 64, 32, warps=4, stages=3)
_IEEE = Config(64, 64, 32, warps=4, stages=3)

# What is summed: a result of more than 64 rows and columns, of samples of any length, of at least
# 512 tokens through tensor descriptors, of at most 32, or packed; or one that is narrow.
Kind = Literal["wide", "long", "short", "packed", "narrow out", "narrow in", "narrow"]


class Choice(NamedTuple):
    """A configuration, and how fast it is estimated to be.

    Attributes:
        config: The configuration.
        percent: From and to, of the rate of cuBLAS's product dW: estimated, not measured. From
            samples of 128 tokens to 512 and more; "short": of 16 to 32.
    """

    config: Config
    percent: tuple[int, int]


# The choice by compute capability and precision.
#
# A tile of m × n does 2mn FLOPs a token for 2(m + n) bytes of bfloat16: 64 FLOPs a byte for
# 128 × 128, 43 for 128 × 64, 32 for 64 × 64 (half of it for float32). So the largest one is taken
# where the result fills it: 8 warps, with three tiles of sums in their registers, one program a
# multiprocessor. A trial kernel with this tile reached 73 to 85 % of cuBLAS on an H100. The other
# figures scale that by the squares of each sample, which no product hides: about 400 clocks a tile,
# where its products take 15 a token on an A100, 7.5 on an H100 and 4 on a B200.
#
# On 8.0 the factors of a product pass through registers, too: for packed sequences, whose bounds
# the loop keeps as well, 32 tokens at once fit, for the same FLOPs a byte, and 64 spill. From 9.0
# on, products of TF32 want both factors transposed, which Triton copies 4 bytes at a time.
TABLE: dict[tuple[int, Precision], dict[Kind, Choice]] = {
    (80, "half"): {
        "wide": Choice(_LARGE, (65, 85)),
        "short": Choice(_LARGE_SHORT, (25, 50)),
        "packed": Choice(_LARGE_SHORT, (60, 85)),
        "narrow out": Choice(_NARROW_OUT, (50, 80)),
        "narrow in": Choice(_NARROW_IN, (50, 80)),
        "narrow": Choice(_SMALL, (40, 75)),
    },
    (90, "half"): {
        "wide": Choice(_LARGE, (60, 87)),
        "long": Choice(_LARGE_DESCRIPTORS, (80, 88)),
        "short": Choice(_LARGE_SHORT, (15, 40)),
        "packed": Choice(_LARGE, (55, 85)),
        "narrow out": Choice(_NARROW_OUT, (45, 80)),
        "narrow in": Choice(_NARROW_IN, (45, 80)),
        "narrow": Choice(_SMALL, (35, 75)),
    },
    (100, "half"): {
        "wide": Choice(_LARGE, (45, 75)),
        "long": Choice(_LARGE_DESCRIPTORS, (65, 80)),
        "short": Choice(_LARGE_SHORT, (10, 25)),
        "packed": Choice(_LARGE, (40, 75)),
        "narrow out": Choice(_NARROW_OUT, (35, 70)),
        "narrow in": Choice(_NARROW_IN, (35, 70)),
        "narrow": Choice(_SMALL, (30, 65)),
    },
    (80, "tf32"): {"wide": Choice(_LARGE_TF32, (65, 85)), "narrow": Choice(_SMALL_TF32, (40, 75))},
    (90, "tf32"): {"wide": Choice(_LARGE_TF32, (40, 75)), "narrow": Choice(_SMALL_TF32, (30, 60))},
    (100, "tf32"): {"wide": Choice(_LARGE_TF32, (30, 65)), "narrow": Choice(_SMALL_TF32, (25, 55))},
    (80, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
    (90, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
    (100, "ieee"): {"wide": Choice(_IEEE, (40, 70))},
}

# The row of the table by compute capability, without what follows the point. Others take that of
# 8.0, which needs nothing that they lack: 12 has neither 9's products nor 10's, and less memory.
_ROWS = {8: 80, 9: 90, 10: 100, 11: 100}

# With less shared memory; bench/gpu/squared_grad.py times these, too.
_CANDIDATES: dict[Precision, tuple[Config, ...]] = {
    "half": (
        Config(128, 128, 64, warps=8, stages=3),
        Config(128, 128, 64, warps=8, stages=3, descriptors=True),
    ),
    "tf32": (),
    "ieee": (),
}

# All that tests compile and bench/gpu/squared_grad.py times; `choose` takes one from the table.
CONFIGS: dict[Precision, tuple[Config, ...]] = {
    precision: tuple(
        dict.fromkeys(
            choice.config
            for (_, of_row), row in TABLE.items()
            if of_row == precision
            for choice in row.values()
        )
    )
    + candidates
    for precision, candidates in _CANDIDATES.items()
}

_DESCRIPTOR_TOKENS = 512  # of a sample; a trial kernel gained nothing with fewer
_SHARE_BLOCKS = 8  # blocks of tokens for which a program of its own is worth a partial sum


def choose(
    precision: Precision,
    out_features: int,
    in_features: int,
    tokens: int | None,
    *,
    capability: int,
    descriptors: bool,
) -> Config:
    """Return the configuration for a shape, from ``TABLE``.

    Args:
        precision: ``"half"`` for bfloat16 and float16; for float32 what the products may do.
        out_features: Rows of the result.
        in_features: Columns of the result.
        tokens: Tokens per sample; ``None`` for packed sequences.
        capability: The GPU's compute capability, without what follows the point.
        descriptors: Whether GPU and tensors allow tensor descriptors.
    """
    kinds: list[Kind] = ["wide"]  # the most particular one last
    if tokens is None:
        kinds.append("packed")
    elif tokens <= _LARGE_SHORT.block_tokens:
        kinds.append("short")
    elif descriptors and tokens >= _DESCRIPTOR_TOKENS:
        kinds.append("long")
    narrow_out, narrow_in = out_features <= 64, in_features <= 64
    if narrow_out or narrow_in:
        kinds.append("narrow")
    if narrow_out != narrow_in:
        kinds.append("narrow out" if narrow_out else "narrow in")
    row = TABLE[_ROWS.get(capability, 80), precision]
    return next(row[kind] for kind in reversed(kinds) if kind in row).config


@dataclass(frozen=True)
class Schedule:
    """Which program computes what.

    Attributes:
        whole: Tiles with a program of their own; the first programs take them.
        shared: Tiles that come after, each computed by ``shares`` programs.
        shares: Programs per shared tile.
    """

    whole: int
    shared: int
    shares: int

    @property
    def programs(self) -> int:
        """Return the number of programs to launch."""
        return self.whole + self.shared * self.shares


def schedule(tiles: int, samples: int, blocks: int, processors: int) -> Schedule:
    """Fill the last wave of programs by sharing its tiles, where that pays.

    Args:
        tiles: Tiles of the result.
        samples: Samples; a share is at least one.
        blocks: Blocks of tokens in all samples.
        processors: Multiprocessors of the GPU; each runs one program at a time.
    """
    shared = tiles % processors
    if shared == 0:
        return Schedule(tiles, 0, 1)
    shares = min(processors // shared, samples, blocks // _SHARE_BLOCKS)
    if shares < 2:
        return Schedule(tiles, 0, 1)
    return Schedule(tiles - shared, shared, shares)
