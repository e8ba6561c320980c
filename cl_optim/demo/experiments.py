"""What the demo can run: data, tasks, methods, and the settings that the sweep chose for each.

Every lr and λ below is what ``cl-optim demo --sweep --out bench/results`` found for the experiment,
with ``--scenario`` and ``--data`` as in its key; sweep.py has the rule, bench/results/sweep-*.md the
grids. The sweep sees neither the test split nor the seeds that are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cl_optim.demo.methods import (
    Method,
    PlainSGD,
    Progressive,
    Protected,
    ProtectedReplaying,
    Remembering,
    Replaying,
)
from cl_optim.demo.scenarios import Scenario, Task, permuted, split
from cl_optim.demo.train import Config

ADAMW = Method("adamw", "AdamW", lr=1e-3)
# At the learning rate that is best for AdamW's ACC if learning less is no objection.
ADAMW_SLOW = Method("adamw-slow", "AdamW, small lr", lr=1e-4)
L2_SP = Protected("l2-sp", "L2-SP", lr=1e-3, importance="ones")
EWC_GRADIENT = Protected("ewc-gradient", "EWC, gradient", lr=1e-3, penalty="gradient")
EWC_DECOUPLED = Protected("ewc-decoupled", "EWC, decoupled", lr=1e-3, penalty="decoupled")
EWC_PROXIMAL = Protected("ewc-proximal", "EWC, proximal", lr=1e-3, penalty="proximal")
EWC_EXACT = Protected("ewc-exact", "EWC, exact anchors", lr=1e-3, anchors="exact")
SGD = PlainSGD("sgd", "SGD", lr=0.1)
GEM_1, GEM_10, A_GEM_10, GEM_ONCE = (
    Remembering("gem-1", "GEM each step", lr=1e-3, refresh_every=1),
    Remembering("gem-10", "GEM every 10", lr=1e-3, refresh_every=10),
    Remembering("a-gem-10", "A-GEM every 10", lr=1e-3, refresh_every=10, average=True),
    Remembering("gem-once", "GEM once", lr=1e-3, refresh_every=None),
)
SGD_GEM_1, SGD_GEM_10, SGD_A_GEM_10, SGD_GEM_ONCE = (
    replace(gem, key=f"sgd-{gem.key}", label=f"SGD, {gem.label}", lr=0.1, base="sgd")
    for gem in (GEM_1, GEM_10, A_GEM_10, GEM_ONCE)
)
# What is kept of a task of two classes, in all forms of memory that are compared there.
_FEW = 16
REPLAY = Replaying("replay", "Replay", lr=1e-3, samples=_FEW)
EWC_REPLAY = ProtectedReplaying("ewc-replay", "EWC + replay", lr=1e-3, samples=_FEW)
PROGRESSIVE = Progressive("progressive", "Progressive", lr=1e-3)
GEM_FEW, A_GEM_FEW = (replace(gem, samples=_FEW) for gem in (GEM_10, A_GEM_10))
JOINT = Method("joint", "Joint training", lr=1e-3, joint=True)


def powers(first: int, last: int) -> tuple[float, ...]:
    """Powers of √10 from √10^first to √10^last, to two digits."""
    return tuple(float(f"{10 ** (k / 2):.2g}") for k in range(first, last + 1))


@dataclass(frozen=True)
class Grid:
    """The candidates of one method.

    Attributes:
        method: What is varied.
        lrs: Learning rates.
        lambdas: Values of λ; empty for a method that has none.
    """

    method: Method
    lrs: tuple[float, ...]
    lambdas: tuple[float, ...] = ()

    def candidates(self) -> list[Method]:
        """The method with each combination of values."""
        method = self.method
        if not isinstance(method, Protected):
            return [replace(method, lr=lr) for lr in self.lrs]
        return [
            replace(method, lr=lr, ewc_lambda=value) for lr in self.lrs for value in self.lambdas
        ]


@dataclass(frozen=True)
class Experiment:
    """A scenario on some data, and the methods compared on it.

    Attributes:
        name: As tables and pictures show it; in small letters, the name of its files.
        data: ``"digits"`` or ``"fashion-mnist"``.
        build: Makes the tasks from the data, their number and a seed.
        config: The network and the length of training.
        seeds: How many are reported: 0, 1, ...
        methods: With the chosen settings; AdamW first.
        grids: What the sweep chose from; empty where the settings are another experiment's.
        sweep_seeds: How many seeds the sweep has.
        learning_loss: The learning accuracy that a method may lose against AdamW's best.
        headline: The keys of the methods whose gain over AdamW is put into a sentence.
    """

    name: str
    data: str
    build: Callable[[Task, int, int], Scenario]
    config: Config
    seeds: int
    methods: tuple[Method, ...]
    grids: tuple[Grid, ...]
    sweep_seeds: int = 3
    learning_loss: float = 0.05
    headline: tuple[str, ...] = (EWC_GRADIENT.key, EWC_EXACT.key, GEM_10.key)

    @property
    def scenario(self) -> str:
        """``"permuted"``, ``"split"``, ``"gem"``, ``"formats"`` or ``"retention"``."""
        return self.key.partition("-")[0]

    @property
    def key(self) -> str:
        """Its name in file names."""
        return self.name.lower()


PERMUTED_DIGITS = Experiment(
    name="Permuted-Digits",
    data="digits",
    build=permuted,
    config=Config(),
    seeds=5,
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(ADAMW_SLOW, lr=3.2e-5),
        replace(L2_SP, lr=1e-3, ewc_lambda=0.01),
        replace(EWC_GRADIENT, lr=1e-2, ewc_lambda=32.0),
        # An explicit step along the pull is stable while lr·2λF < 2: at three times this λ it
        # diverges.
        replace(EWC_DECOUPLED, lr=1e-3, ewc_lambda=3200.0),
        replace(EWC_PROXIMAL, lr=3.2e-3, ewc_lambda=32000.0),
        replace(GEM_10, lr=3.2e-3),
        replace(A_GEM_10, lr=3.2e-3),
        replace(JOINT, lr=1e-3),
    ),
    grids=(
        Grid(ADAMW, powers(-10, -4)),
        Grid(L2_SP, powers(-7, -4), powers(-6, -1)),
        Grid(EWC_GRADIENT, powers(-6, -3), powers(1, 6)),
        Grid(EWC_DECOUPLED, powers(-7, -4), powers(4, 9)),
        Grid(EWC_PROXIMAL, powers(-6, -3), powers(6, 11)),
        Grid(GEM_10, powers(-7, -3)),
        Grid(A_GEM_10, powers(-7, -3)),
        Grid(JOINT, powers(-8, -4)),
    ),
)

SPLIT_DIGITS = Experiment(
    name="Split-Digits",
    data="digits",
    build=split,
    # Two classes are learned in a few steps; a small network trained for long forgets them.
    config=Config(epochs=30, hidden=32),
    seeds=20,
    methods=(
        replace(ADAMW, lr=3.2e-3),
        replace(L2_SP, lr=1e-2, ewc_lambda=0.0032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=32.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=32.0),
        replace(JOINT, lr=1e-2),
    ),
    grids=(
        Grid(ADAMW, powers(-8, -4)),
        Grid(L2_SP, powers(-6, -3), powers(-7, -2)),
        Grid(EWC_GRADIENT, powers(-6, -3), powers(-2, 5)),
        Grid(EWC_EXACT, powers(-6, -3), powers(-2, 5)),
        Grid(JOINT, powers(-7, -3)),
    ),
    sweep_seeds=6,
    learning_loss=0.02,
)

_FASHION = Config(epochs=1, batch_size=256, hidden=256)

PERMUTED_FASHION = Experiment(
    name="Permuted-Fashion-MNIST",
    data="fashion-mnist",
    build=permuted,
    config=_FASHION,
    seeds=5,
    methods=(
        replace(ADAMW, lr=1e-3),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=10.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=10.0),
        replace(JOINT, lr=3.2e-3),
    ),
    grids=(
        Grid(ADAMW, powers(-8, -5)),
        Grid(EWC_GRADIENT, powers(-6, -4), powers(0, 3)),
        Grid(EWC_EXACT, powers(-6, -4), powers(0, 3)),
        Grid(JOINT, powers(-6, -4)),
    ),
    sweep_seeds=1,
)

SPLIT_FASHION = replace(
    PERMUTED_FASHION,
    name="Split-Fashion-MNIST",
    build=split,
    seeds=10,
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=3200.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=3200.0),
        replace(JOINT, lr=1e-3),
    ),
    grids=(
        Grid(ADAMW, powers(-8, -5)),
        Grid(EWC_GRADIENT, powers(-6, -3), powers(4, 9)),
        Grid(EWC_EXACT, powers(-6, -3), powers(4, 9)),
        Grid(JOINT, powers(-7, -5)),
    ),
    sweep_seeds=3,
    learning_loss=0.02,
)

GEM_DIGITS = replace(
    PERMUTED_DIGITS,
    name="GEM-Permuted-Digits",
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(ADAMW_SLOW, lr=3.2e-5),
        replace(EWC_GRADIENT, lr=1e-2, ewc_lambda=32.0),
        replace(GEM_1, lr=1e-2),
        replace(GEM_10, lr=3.2e-3),
        replace(A_GEM_10, lr=3.2e-3),
        replace(GEM_ONCE, lr=3.2e-4),
        replace(SGD, lr=3.2e-2),
        replace(SGD_GEM_1, lr=0.32),
        replace(SGD_GEM_10, lr=0.32),
        replace(SGD_A_GEM_10, lr=0.32),
        replace(SGD_GEM_ONCE, lr=3.2e-2),
        replace(JOINT, lr=1e-3),
    ),
    grids=(
        Grid(ADAMW, powers(-10, -4)),
        Grid(EWC_GRADIENT, powers(-6, -3), powers(1, 6)),
        Grid(GEM_1, powers(-7, -3)),
        Grid(GEM_10, powers(-7, -3)),
        Grid(A_GEM_10, powers(-7, -3)),
        Grid(GEM_ONCE, powers(-8, -4)),
        Grid(SGD, powers(-4, 0)),
        Grid(SGD_GEM_1, powers(-4, 0)),
        Grid(SGD_GEM_10, powers(-4, 0)),
        Grid(SGD_A_GEM_10, powers(-4, 0)),
        Grid(SGD_GEM_ONCE, powers(-4, 0)),
        Grid(JOINT, powers(-8, -4)),
    ),
)

# The same settings whatever the format: it is the formats that are compared.
_EWC = replace(EWC_GRADIENT, lr=1e-2, ewc_lambda=32.0)
_LOG8 = replace(_EWC, key="ewc-log8", label="EWC, log8", importance_dtype="log8")
FORMATS_DIGITS = replace(
    PERMUTED_DIGITS,
    name="Formats-Permuted-Digits",
    seeds=20,
    methods=(
        replace(ADAMW, lr=3.2e-4),
        _EWC,
        replace(_EWC, key="ewc-bf16", label="EWC, bfloat16", importance_dtype="bfloat16"),
        _LOG8,
        replace(_LOG8, key="ewc-log8-anchor", label="… bf16 anchors", anchor_dtype="bfloat16"),
        replace(_LOG8, key="ewc-log8-bf16", label="… bf16 moments", state_dtype="bfloat16"),
        replace(_LOG8, key="ewc-log8-8bit", label="… 8-bit moments", state_dtype="8bit"),
    ),
    grids=(),
)

RETENTION_DIGITS = replace(
    SPLIT_DIGITS,
    name="Retention-Split-Digits",
    methods=(
        replace(ADAMW, lr=1e-3),
        replace(L2_SP, lr=3.2e-3, ewc_lambda=0.0032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=32.0),
        replace(GEM_FEW, lr=3.2e-3),
        replace(A_GEM_FEW, lr=3.2e-3),
        replace(REPLAY, lr=3.2e-3),
        replace(EWC_REPLAY, lr=3.2e-3, ewc_lambda=1.0),
        replace(PROGRESSIVE, lr=1e-1),
        replace(JOINT, lr=3.2e-2),
    ),
    grids=(
        Grid(ADAMW, powers(-7, -4)),
        Grid(L2_SP, powers(-6, -4), powers(-6, -4)),
        Grid(EWC_GRADIENT, powers(-6, -4), powers(1, 4)),
        Grid(GEM_FEW, powers(-6, -4)),
        Grid(A_GEM_FEW, powers(-6, -4)),
        Grid(REPLAY, powers(-6, -4)),
        Grid(EWC_REPLAY, powers(-6, -4), powers(-1, 3)),
        Grid(PROGRESSIVE, powers(-6, -1)),
        Grid(JOINT, powers(-5, -2)),
    ),
    seeds=10,
    sweep_seeds=3,
    headline=(EWC_GRADIENT.key, REPLAY.key, EWC_REPLAY.key),
)

RETENTION_FASHION = replace(
    SPLIT_FASHION,
    name="Retention-Split-Fashion-MNIST",
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(L2_SP, lr=3.2e-3, ewc_lambda=0.032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=1000.0),
        replace(GEM_FEW, lr=1e-3),
        replace(A_GEM_FEW, lr=1e-3),
        replace(REPLAY, lr=3.2e-3),
        replace(EWC_REPLAY, lr=3.2e-3, ewc_lambda=100.0),
        replace(PROGRESSIVE, lr=3.2e-3),
        replace(JOINT, lr=1e-3),
    ),
    grids=(
        Grid(ADAMW, powers(-8, -5)),
        Grid(L2_SP, powers(-6, -4), powers(-4, -2)),
        Grid(EWC_GRADIENT, powers(-6, -4), powers(5, 8)),
        Grid(GEM_FEW, powers(-7, -5)),
        Grid(A_GEM_FEW, powers(-7, -5)),
        Grid(REPLAY, powers(-7, -4)),
        Grid(EWC_REPLAY, powers(-6, -4), powers(2, 6)),
        Grid(PROGRESSIVE, powers(-7, -4)),
        Grid(JOINT, powers(-7, -5)),
    ),
    seeds=10,
    sweep_seeds=2,
    headline=(EWC_GRADIENT.key, REPLAY.key, EWC_REPLAY.key),
)

EXPERIMENTS = (
    PERMUTED_DIGITS,
    SPLIT_DIGITS,
    GEM_DIGITS,
    FORMATS_DIGITS,
    RETENTION_DIGITS,
    PERMUTED_FASHION,
    SPLIT_FASHION,
    RETENTION_FASHION,
)
