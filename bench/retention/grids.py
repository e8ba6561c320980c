"""What each sweep chooses from: the candidates of every method of an experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.retention import experiments as further
from cl_optim.demo import experiments as demo
from cl_optim.demo.methods import Method, Projecting, Protected


def powers(first: int, last: int) -> tuple[float, ...]:
    """Return powers of √10 from √10^first to √10^last, to two digits."""
    return tuple(float(f"{10 ** (k / 2):.2g}") for k in range(first, last + 1))


@dataclass(frozen=True)
class Grid:
    """The candidates of one method.

    Attributes:
        method: What is varied.
        lrs: Learning rates.
        lambdas: Values of λ; empty for a method that has none.
        strengths: Of strengths, in place of λ.
    """

    method: Method
    lrs: tuple[float, ...]
    lambdas: tuple[float, ...] = ()
    strengths: tuple[float, ...] = ()

    def candidates(self) -> list[Method]:
        """Return the method with each combination of values."""
        method = self.method
        if self.strengths and isinstance(method, (Protected, Projecting)):
            return [
                replace(method, lr=lr, strength=value)
                for lr in self.lrs
                for value in self.strengths
            ]
        if not isinstance(method, Protected):
            return [replace(method, lr=lr) for lr in self.lrs]
        return [
            replace(method, lr=lr, ewc_lambda=value) for lr in self.lrs for value in self.lambdas
        ]


# By the experiment's key. The formats have none: their settings are those of Permuted-Digits.
GRIDS = {
    demo.PERMUTED_DIGITS.key: (
        Grid(demo.ADAMW, powers(-10, -4)),
        Grid(demo.L2_SP, powers(-7, -4), powers(-6, -1)),
        Grid(demo.EWC_GRADIENT, powers(-6, -3), powers(1, 6)),
        Grid(demo.EWC_DECOUPLED, powers(-7, -4), powers(4, 9)),
        Grid(demo.EWC_PROXIMAL, powers(-6, -3), powers(6, 11)),
        Grid(demo.EWC_KRONECKER, powers(-6, -3), strengths=powers(-3, 0)),
        Grid(demo.INPUT_PROJECTION, powers(-6, -3), strengths=powers(0, 3)),
        Grid(demo.GEM_10, powers(-7, -3)),
        Grid(demo.A_GEM_10, powers(-7, -3)),
        Grid(demo.JOINT, powers(-8, -4)),
    ),
    demo.SPLIT_DIGITS.key: (
        Grid(demo.ADAMW, powers(-8, -4)),
        Grid(demo.L2_SP, powers(-6, -3), powers(-7, -2)),
        Grid(demo.EWC_GRADIENT, powers(-6, -3), powers(-2, 5)),
        Grid(demo.EWC_EXACT, powers(-6, -3), powers(-2, 5)),
        Grid(demo.EWC_KRONECKER, powers(-6, -3), strengths=powers(-4, 0)),
        Grid(demo.INPUT_PROJECTION, powers(-6, -3), strengths=powers(-1, 3)),
        Grid(demo.JOINT, powers(-7, -3)),
    ),
    further.GEM_DIGITS.key: (
        Grid(demo.ADAMW, powers(-10, -4)),
        Grid(demo.EWC_GRADIENT, powers(-6, -3), powers(1, 6)),
        Grid(further.GEM_1, powers(-7, -3)),
        Grid(demo.GEM_10, powers(-7, -3)),
        Grid(demo.A_GEM_10, powers(-7, -3)),
        Grid(further.GEM_ONCE, powers(-8, -4)),
        Grid(further.SGD, powers(-4, 0)),
        Grid(further.SGD_GEM_1, powers(-4, 0)),
        Grid(further.SGD_GEM_10, powers(-4, 0)),
        Grid(further.SGD_A_GEM_10, powers(-4, 0)),
        Grid(further.SGD_GEM_ONCE, powers(-4, 0)),
        Grid(demo.JOINT, powers(-8, -4)),
    ),
    further.RETENTION_DIGITS.key: (
        Grid(demo.ADAMW, powers(-7, -4)),
        Grid(demo.L2_SP, powers(-6, -4), powers(-6, -4)),
        Grid(demo.EWC_GRADIENT, powers(-6, -4), powers(1, 4)),
        Grid(further.GEM_FEW, powers(-6, -4)),
        Grid(further.A_GEM_FEW, powers(-6, -4)),
        Grid(further.REPLAY, powers(-6, -4)),
        Grid(further.EWC_REPLAY, powers(-6, -4), powers(-1, 3)),
        Grid(further.PROGRESSIVE, powers(-6, -1)),
        Grid(demo.JOINT, powers(-5, -2)),
    ),
    further.PERMUTED_FASHION.key: (
        Grid(demo.ADAMW, powers(-8, -5)),
        Grid(demo.EWC_GRADIENT, powers(-6, -4), powers(0, 3)),
        Grid(demo.EWC_EXACT, powers(-6, -4), powers(0, 3)),
        Grid(demo.JOINT, powers(-6, -4)),
    ),
    further.SPLIT_FASHION.key: (
        Grid(demo.ADAMW, powers(-8, -5)),
        Grid(demo.EWC_GRADIENT, powers(-6, -3), powers(4, 9)),
        Grid(demo.EWC_EXACT, powers(-6, -3), powers(4, 9)),
        Grid(demo.JOINT, powers(-7, -5)),
    ),
    further.RETENTION_FASHION.key: (
        Grid(demo.ADAMW, powers(-8, -5)),
        Grid(demo.L2_SP, powers(-6, -4), powers(-4, -2)),
        Grid(demo.EWC_GRADIENT, powers(-6, -4), powers(5, 8)),
        Grid(further.GEM_FEW, powers(-7, -5)),
        Grid(further.A_GEM_FEW, powers(-7, -5)),
        Grid(further.REPLAY, powers(-7, -4)),
        Grid(further.EWC_REPLAY, powers(-6, -4), powers(2, 6)),
        Grid(further.PROGRESSIVE, powers(-7, -4)),
        Grid(demo.JOINT, powers(-7, -5)),
    ),
}
_SEEDS = {
    demo.SPLIT_DIGITS.key: 6,
    further.PERMUTED_FASHION.key: 1,
    further.RETENTION_FASHION.key: 2,
}


def sweep_seeds(experiment: demo.Experiment) -> int:
    """Return how many seeds every candidate is trained with."""
    return _SEEDS.get(experiment.key, 3)
