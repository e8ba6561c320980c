"""EWC-AdamW as the papers write it, one tensor and one formula at a time.

Slow on purpose: this is what the tests compare every faster implementation with. It shares no code
with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ReferenceEWCAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the three forms of the EWC penalty.

    Importance and anchors are given as lists in the order of the parameters; the arithmetic is in
    the parameters' dtype.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ewc_lambda: float = 1.0,
        penalty: str = "gradient",
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ewc_lambda": ewc_lambda,
            "penalty": penalty,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def set_importance(self, importances: Iterable[Tensor], anchors: Iterable[Tensor]) -> None:
        """Protect the parameters from here on: F and θ*, in the order of the parameters."""
        params = [p for group in self.param_groups for p in group["params"]]
        for param, importance, anchor in zip(params, importances, anchors, strict=True):
            self.state[param].update(importance=importance, anchor=anchor)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, self.state[param], group)

    @staticmethod
    def _update(theta: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lr, lambda_, penalty = group["lr"], group["ewc_lambda"], group["penalty"]
        if "t" not in state:
            state.update(t=0, m=torch.zeros_like(theta), v=torch.zeros_like(theta))
            state["v_max"] = torch.zeros_like(theta)
        state["t"] += 1
        t = state["t"]
        old = theta.clone()
        anchor = state.get("anchor", theta)
        fisher = state.get("importance", torch.zeros_like(theta))

        assert theta.grad is not None
        g = -theta.grad if group["maximize"] else theta.grad
        if penalty == "gradient":
            g = g + 2 * lambda_ * fisher * (old - anchor)

        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * g**2
        m_hat = state["m"] / (1 - beta1**t)
        v = state["v"]
        if group["amsgrad"]:
            state["v_max"] = v = torch.maximum(state["v_max"], v)
        v_hat = v / (1 - beta2**t)
        new = old - lr * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * old)
        # AdamW decays the old weight and adds Adam's step; both are in the line above.

        if penalty == "decoupled":
            new = new - lr * 2 * lambda_ * fisher * (old - anchor)
        if penalty == "proximal":
            c = 2 * lr * lambda_ * fisher
            new = anchor + (new - anchor) / (1 + c)
        theta.copy_(new)
