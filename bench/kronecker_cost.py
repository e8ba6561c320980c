"""What Kronecker importance costs: the factors' pass, the pull, and bytes of state; on the CPU.

    python bench/kronecker_cost.py --json FILE [--max-rank 64] [--length 256] [--turns 5]

GPT-2 small with random weights on random tokens: its time, not its directions, is that of a trained
one, so that ranks are printed, too. A step without a pull and one with every weight protected by
the diagonal take turns; the pull is timed beside them, and a tenth of it counts (every=10).
The demo's steps with diagonal and with Kronecker importance take turns first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import cost_figures
import records
import torch
from torch import Tensor
from training_step import adamw, step
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW, KroneckerImportance, estimate_fisher
from cl_optim.demo.experiments import EWC_KRONECKER, EWC_PROXIMAL, PERMUTED_DIGITS
from cl_optim.demo.methods import Learner
from cl_optim.demo.scenarios import digits, permuted
from cl_optim.demo.train import network, one_thread
from cl_optim.importance.kronecker import factors

_EVERY = 10


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def importance(model: GPT2LMHeadModel, tokens: Tensor, **options: Any) -> Any:
    batches = [{"input_ids": part} for part in tokens.split(2)]
    return estimate_fisher(model, batches, "sample", progress=False, verify=False, **options)


def timed_decompositions() -> list[float]:
    """Return where the seconds of each decomposition of a factor will stand."""
    found: list[float] = []
    leading = factors.leading

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        side = leading(*args, **options)
        found.append(time.perf_counter() - start)
        return side

    factors.leading = timed
    return found


def state_bytes(optimizer: EWCAdamW) -> dict[str, float]:
    """Return bytes per weight of what protects, by what it is."""
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    found: dict[str, float] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in ("step", "exp_avg", "exp_avg_sq"):
                found[key] = found.get(key, 0.0) + value.nbytes / weights
    return found


def ranks(found: KroneckerImportance) -> Mapping[str, tuple[int, int]]:
    return {name: (one.output.kept, one.input.kept) for name, one in found.factors.items()}


def demo_steps(turns: int = 40) -> dict[str, list[float]]:
    """Time a hundred of the demo's steps of each structure in turns: seconds of a step."""
    data, config = digits(), PERMUTED_DIGITS.config
    scenario = permuted(data, 2, 0)
    learners = {}
    for method in (EWC_PROXIMAL, EWC_KRONECKER):
        learner = method.learner(network(scenario, config.hidden, 0))
        x, y = scenario.tasks[0].train
        for _ in range(100):
            train_one(learner, x[:32], y[:32])
        learner.end_task(scenario.tasks[0].train)
        learners[method.label] = learner
    found: dict[str, list[float]] = {label: [] for label in learners}
    x, y = scenario.tasks[1].train
    for turn in range(turns + 1):
        for label, learner in learners.items():
            start = time.perf_counter()
            for begin in range(100):
                train_one(learner, x[begin : begin + 32], y[begin : begin + 32])
            if turn > 0:
                found[label].append((time.perf_counter() - start) / 100)
    return found


def train_one(learner: Learner, x: Tensor, y: Tensor) -> None:
    learner.optimizer.zero_grad()
    torch.autograd.backward(learner.loss(x, y))
    learner.optimizer.step()


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--energy", type=float, default=0.99)
    parser.add_argument("--max-rank", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8, help="sequences of the Fisher")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    with one_thread():
        demo = demo_steps()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    tokens = torch.randint(50257, (arguments.samples, arguments.length))

    passes: dict[str, list[float]] = {"diagonal": [], "kronecker": []}
    made: dict[str, Any] = {}
    decomposing = timed_decompositions()
    for _ in range(2):
        for structure, times in passes.items():
            options: dict[str, Any] = {"structure": structure}
            if structure == "kronecker":
                options.update(energy=arguments.energy, max_rank=arguments.max_rank)
            decomposing.clear()
            start = time.perf_counter()
            made[structure] = importance(model, tokens, **options)
            times.append(time.perf_counter() - start - sum(decomposing))
    kept = ranks(made["kronecker"])

    one = tokens[:1]
    plain = adamw(model)
    protected = EWCAdamW(model.named_parameters(), lr=1e-5, penalty="proximal", every=10**6)
    # Two optimizers on one model: what they write is of no interest here.
    protected.consolidate(made["kronecker"])
    found: dict[str, list[float]] = {"AdamW fused": [], "Kronecker, no pull": [], "pull": []}
    for turn in range(arguments.turns + 1):
        times = (
            seconds(lambda: step(model, plain, one)),
            seconds(lambda: step(model, protected, one)),
            seconds(protected.settle),
        )
        if turn > 0:
            for name, taken in zip(found, times, strict=True):
                found[name].append(taken)
    figures = {
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "demo": demo,
        "passes": passes,
        "decompositions": sum(decomposing),
        "every": _EVERY,
        "seconds": found,
        "ranks": kept,
        "bytes_per_weight": state_bytes(protected),
    }
    cost_figures.show(cost_figures.kronecker(figures))
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
