"""The fused step does not depend on how tensors lie in memory."""

from __future__ import annotations

import torch
from ewc_adamw_cases import PENALTIES, Problem, Setting, make_optimizer, make_params
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=4), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    penalty=st.sampled_from(PENALTIES),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e18]),
)
def test_any_shapes_strides_and_scales(shapes, order, penalty, scale):
    """Dense in any order of dimensions, with gaps, and gradients laid out unlike the weights."""

    def strided(shape: tuple[int, ...], kind: int) -> torch.Tensor:
        dims = list(range(len(shape)))
        order.shuffle(dims)
        step = 2 if kind else 1
        memory = torch.zeros([shape[d] * step for d in dims])
        view = memory[tuple(slice(None, None, step) for _ in dims)]
        return view.permute([dims.index(d) for d in range(len(shape))])

    start = Problem.of(make_params([tuple(shape) for shape in shapes], torch.float32))
    plain, odd = start.copy(torch.float32), start.copy(torch.float32)
    odd.params = [
        torch.nn.Parameter(strided(tuple(p.shape), order.randint(0, 1)).copy_(p.detach()))
        for p in odd.params
    ]
    setting = Setting(penalty, amsgrad=True)
    optimizers = [make_optimizer(side, setting, fused=True) for side in (plain, odd)]
    for step in range(3):
        for side, optimizer in zip((plain, odd), optimizers, strict=True):
            side.set_gradients(step, torch.float32)
            for p in side.params:
                p.grad = strided(tuple(p.shape), 1).copy_(p.grad * scale)
            optimizer.step()
    for a, b in zip(plain.params, odd.params, strict=True):
        assert torch.equal(a, b)
