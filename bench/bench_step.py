"""One protected optimizer step on the CPU, against torch's fused AdamW and penalties of others.

Gradients are there already; each contender does all that its method needs in a step. Many small
tensors are measured twice: step after step, and with other memory read before each, as by a model's
forward and backward pass. Peers are those whose weights are EWCAdamW's after three steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from contenders import CONTENDERS, Problem, compilable_foreach, gpt2_shapes
from peers import avalanche, mammoth, optimizers, van_de_ven
from suite import Contender, Kind, NotHereError, Question, Work
from torch import Tensor

SMALL: list[tuple[int, ...]] = [(64,)] * 1000
MLP, LARGE = "MLP 64-256-256-10", "GPT-2 144 tensors 85 M"
WARM, COLD = "1000 tensors of 64", "1000 tensors of 64, not in the cache"
SETS: dict[str, tuple[list[tuple[int, ...]], int]] = {
    # name: shapes, steps of a turn
    MLP: ([(256, 64), (256,), (256, 256), (256,), (10, 256), (10,)], 200),
    LARGE: (gpt2_shapes(), 4),
    WARM: (SMALL, 30),
    COLD: (SMALL, 30),
}
OTHER_MEMORY = torch.zeros(16_000_000)  # 64 MB, twice the third-level cache


def compiled(problem: Problem) -> Callable[[], None]:
    """What torch.compile makes of the penalty by hand and AdamW."""
    if len(problem.params) > 200:
        raise NotHereError(f"to compile a step of {len(problem.params)} tensors takes many minutes")
    return torch.compile(compilable_foreach(problem))


def three_steps(problem: Problem, step: Work) -> list[Tensor]:
    """Return the moves of the weights; each step begins with the same gradients."""
    before = [p.detach().clone() for p in problem.params]
    grads = [grad.clone() for grad in problem.grads]
    for _ in range(3):
        torch._foreach_copy_(problem.grads, grads)
        step()
    return torch._foreach_sub([p.detach() for p in problem.params], before)


OURS, BASE = "EWCAdamW gradient", "AdamW fused"
# Of ours and torch's; the others are ours with another penalty, or in other formats.
KINDS: dict[str, Kind] = {
    OURS: "ours",
    BASE: "other",
    "AdamW fused + autograd penalty": "peer",
    "AdamW fused + foreach penalty": "peer",
    "36 B per parameter in place": "floor",
    "36 B per parameter copied": "floor",
}
QUESTION = Question(
    # 85 M weights are shared, else 20 GB would not do.
    problems={name: (partial(Problem, shapes), steps) for name, (shapes, steps) in SETS.items()},
    once=(LARGE,),
    contenders={
        **{name: Contender(make, KINDS.get(name, "variant")) for name, make in CONTENDERS.items()},
        "AdamW + foreach penalty, compiled": Contender(compiled, "peer"),
        "Avalanche's penalty": Contender(avalanche.penalty, "peer", "avalanche"),
        "van de Ven's penalty": Contender(van_de_ven.penalty, "peer"),
        "Mammoth's penalty": Contender(mammoth.penalty, "peer"),
        "optimi AdamW + foreach penalty": Contender(optimizers.optimi, "other", "optimi"),
        "AdamWScheduleFree + foreach penalty": Contender(
            optimizers.schedulefree, "other", "schedulefree"
        ),
        "bitsandbytes AdamW8bit + foreach penalty": Contender(
            optimizers.bitsandbytes, "other", "bitsandbytes", rounds=1
        ),
    },
    reference=OURS,
    base=BASE,
    outcome=three_steps,
    before={COLD: OTHER_MEMORY.sum},
)


def test_step(ask: Callable[[], None]) -> None:
    ask()
