"""The exact per-sample Fisher of a batch on the CPU, against the ways there are."""

from __future__ import annotations

from collections.abc import Callable

from fisher_contenders import CONTENDERS, PROBLEMS
from peers import asdl, backpack, opacus
from suite import Contender, Question

LOOP, PLAIN = "loop of batch size 1", "forward + backward"
KINDS = {
    PLAIN: "floor",
    "cl_optim, a pass of its own": "ours",
    "cl_optim, during training": "variant",
    LOOP: "peer",
    "torch.func.vmap(grad)": "peer",
}
QUESTION = Question(
    problems={f"Fisher: {name}": (make, 5) for name, make in PROBLEMS.items()},
    contenders={
        **{
            name: Contender(make, KINDS[name], rounds=1 if name == LOOP else None)
            for name, make in CONTENDERS.items()
        },
        "Opacus": Contender(opacus.fisher, "peer", "opacus"),
        "BackPACK": Contender(backpack.fisher, "peer", "backpack"),
        "ASDL": Contender(asdl.fisher, "peer", "asdl"),
    },
    reference=LOOP,
    base=LOOP,
)


def test_fisher(ask: Callable[[], None]) -> None:
    ask()
