"""What the demo runs: tasks, methods, and the settings that a sweep chose for each.

In a checkout of the source, ``python -m bench.retention sweep permuted split`` finds every lr and λ
below; bench/retention/sweep.py has the rule, bench/results/sweep-*.md the grids. The sweep sees
neither the test split nor the seeds that are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cl_optim.demo.methods import Method, Projecting, Protected, Remembering
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
EWC_KRONECKER = Protected(
    "ewc-kronecker", "EWC, Kronecker", lr=1e-3, penalty="proximal", structure="kronecker",
    strength=0.1,
)  # fmt: skip
INPUT_PROJECTION = Projecting("input-projection", "Input projection", lr=1e-3, every=10)
GEM_10 = Remembering("gem-10", "GEM every 10", lr=1e-3, refresh_every=10)
A_GEM_10 = Remembering("a-gem-10", "A-GEM every 10", lr=1e-3, refresh_every=10, average=True)
JOINT = Method("joint", "Joint training", lr=1e-3, joint=True)


@dataclass(frozen=True)
class Experiment:
    """A scenario on some data, and the methods compared on it.

    Attributes:
        name: As tables and pictures show it; in small letters, the name of its files.
        build: Makes the tasks from the data, their number and a seed.
        config: The network and the length of training.
        seeds: How many are reported: 0, 1, ...
        methods: With the chosen settings; AdamW first.
        learning_loss: The learning accuracy that a method may lose against AdamW's best.
        headline: The keys of the methods whose gain over AdamW is put into a sentence.
    """

    name: str
    build: Callable[[Task, int, int], Scenario]
    config: Config
    seeds: int
    methods: tuple[Method, ...]
    learning_loss: float = 0.05
    headline: tuple[str, ...] = (
        EWC_GRADIENT.key,
        EWC_EXACT.key,
        EWC_KRONECKER.key,
        INPUT_PROJECTION.key,
        GEM_10.key,
    )

    @property
    def scenario(self) -> str:
        """Return the first word of its name, in small letters: ``"permuted"`` or ``"split"``."""
        return self.key.partition("-")[0]

    @property
    def key(self) -> str:
        """Return its name in file names."""
        return self.name.lower()

    def resized(self, tasks: int | None, epochs: int | None) -> Experiment:
        """Return it with other numbers of tasks or epochs; None keeps its own."""
        given = {"tasks": tasks, "epochs": epochs}
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(self, config=replace(self.config, **changes))


PERMUTED_DIGITS = Experiment(
    name="Permuted-Digits",
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
        replace(EWC_KRONECKER, lr=3.2e-3, strength=0.1),
        replace(INPUT_PROJECTION, lr=1e-2, strength=32.0),
        replace(GEM_10, lr=3.2e-3),
        replace(A_GEM_10, lr=3.2e-3),
        replace(JOINT, lr=1e-3),
    ),
)

SPLIT_DIGITS = Experiment(
    name="Split-Digits",
    build=split,
    # Two classes are learned in a few steps; a small network trained for long forgets them.
    config=Config(epochs=30, hidden=32),
    seeds=20,
    methods=(
        replace(ADAMW, lr=3.2e-3),
        replace(L2_SP, lr=1e-2, ewc_lambda=0.0032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=32.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=32.0),
        replace(EWC_KRONECKER, lr=3.2e-2, strength=1.0),
        replace(INPUT_PROJECTION, lr=1e-2, strength=3.2),
        replace(JOINT, lr=1e-2),
    ),
    learning_loss=0.02,
)

EXPERIMENTS = (PERMUTED_DIGITS, SPLIT_DIGITS)
