"""Any sequence of what a user does with EWC around SGD, beside the formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cl_optim import EWC

NAMES = ("a", "b", "c")
SIZES = (5, 1, 300)  # less and more than a vector, one more than a unit


class ByHand:
    """The protection's formulas in float64: F, θ*, what is frozen, and what is due."""

    def __init__(self, weights: list[Tensor], lr: float, ewc_lambda: float, every: int) -> None:
        self.weights = weights
        self.lr, self.ewc_lambda, self.every = lr, ewc_lambda, every
        self.fisher: list[Tensor] | None = None
        self.anchors = [w.clone() for w in weights]
        self.frozen = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
        self.due, self.steps = [0.0] * len(weights), 0

    def pull(self) -> None:
        for i, w in enumerate(self.weights):
            if self.fisher is not None:
                pulled = self.anchors[i] + (w - self.anchors[i]) / (
                    1 + 2 * self.due[i] * self.fisher[i]
                )
                self.weights[i] = torch.where(self.frozen[i], w, pulled)
            self.due[i] = 0.0
        self.steps = 0

    def step(self, gradients: list[Tensor | None]) -> None:
        if self.fisher is not None and self.every == 1 and self.steps:
            raise AssertionError("the test settles before it changes every")
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                moved = self.weights[i] - self.lr * gradient
                self.weights[i] = torch.where(self.frozen[i], self.weights[i], moved)
                self.due[i] += self.ewc_lambda * self.lr
        if self.fisher is None:
            self.due = [0.0] * len(self.due)
            return
        if any(gradient is not None for gradient in gradients):
            self.steps += 1
            if self.steps >= self.every:
                self.pull()

    def consolidate(self, fisher: list[Tensor], decay: float) -> None:
        self.pull()
        old = self.fisher or [torch.zeros_like(f) for f in fisher]
        self.fisher = [decay * a + b for a, b in zip(old, fisher, strict=True)]
        self.anchors = [w.clone() for w in self.weights]

    def freeze(self, masks: list[Tensor]) -> None:
        self.pull()
        self.frozen = [a | b for a, b in zip(self.frozen, masks, strict=True)]

    def penalty(self) -> float:
        if self.fisher is None:
            return 0.0
        each = zip(self.weights, self.anchors, self.fisher, self.frozen, strict=True)
        return self.ewc_lambda * sum(
            float((f * (w - a).square()).masked_fill(z, 0.0).sum()) for w, a, f, z in each
        )


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 2 ** len(NAMES) - 1)),
        st.tuples(st.just("step"), st.just(2 ** len(NAMES) - 1)),
        st.tuples(st.just("consolidate"), st.sampled_from([0.0, 0.5, 1.0])),
        st.tuples(st.just("freeze"), st.integers(0, 9)),
        st.tuples(st.just("unfreeze"), st.none()),
        st.tuples(st.just("settle"), st.none()),
        st.tuples(st.just("lambda"), st.sampled_from([0.0, 0.1, 30.0])),
        st.tuples(st.just("rate"), st.sampled_from([0.0, 0.01, 1.0])),
        st.tuples(st.just("every"), st.integers(1, 3)),
        st.tuples(st.just("save"), st.none()),
        st.tuples(st.just("copy"), st.none()),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 3), st.booleans())
def test_any_sequence_is_what_the_formulas_say(operations, every, begin):
    draw = torch.Generator().manual_seed(0)

    def random(positive: bool = False) -> list[Tensor]:
        values = [torch.randn(n, generator=draw, dtype=torch.float64) for n in SIZES]
        return [value.exp() for value in values] if positive else values

    params = [nn.Parameter(value) for value in random()]
    hand = ByHand([p.detach().clone() for p in params], 0.1, 0.3, every)

    def made(of: list[nn.Parameter]) -> EWC:
        named = list(zip(NAMES, of, strict=True))
        return EWC(torch.optim.SGD(named, lr=0.1), ewc_lambda=0.3, every=every)

    ewc = made(params)
    todo: list[tuple[str, Any]] = [("consolidate", 1.0)] if begin else []
    for name, value in [*todo, *operations]:
        group = ewc.param_groups[0]
        if name == "step":
            gradients = [g if value >> i & 1 else None for i, g in enumerate(random())]
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = None if gradient is None else gradient.clone()
            ewc.step()
            hand.step(gradients)
        elif name == "consolidate":
            fisher = random(positive=True)
            ewc.consolidate(dict(zip(NAMES, fisher, strict=True)), decay=value)
            hand.consolidate(fisher, value)
        elif name == "freeze" and hand.fisher is not None:
            masks = [torch.rand(n, generator=draw) < value / 10 for n in SIZES]
            ewc.freeze(masks=dict(zip(NAMES, masks, strict=True)))
            hand.freeze(masks)
        elif name == "unfreeze":
            ewc.unfreeze()
            hand.pull()
            hand.frozen = [torch.zeros_like(z) for z in hand.frozen]
        elif name == "settle":
            ewc.settle()
            hand.pull()
        elif name == "lambda":
            group["ewc_lambda"] = hand.ewc_lambda = value
        elif name == "rate":
            group["lr"] = hand.lr = value
        elif name == "every":
            ewc.settle()
            hand.pull()
            group["every"] = hand.every = value
        elif name == "save":
            state_dict = copy.deepcopy(ewc.state_dict())
            hand.pull()
            ewc = made(params)
            ewc.load_state_dict(state_dict)
        elif name == "copy":
            params, ewc = copy.deepcopy((params, ewc))  # with what is due, in this order, too
        for param, expected in zip(params, hand.weights, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(float(ewc.penalty()), hand.penalty(), rtol=1e-7, atol=1e-7)
