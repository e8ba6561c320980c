"""What the step does to gradients on their way in: GEM's rows, GradScaler's scale and overflow."""

from __future__ import annotations

import pytest
import torch
from ewc_adamw_cases import SETTINGS, Problem, Setting, make_optimizer, make_params
from torch import Tensor

from cl_optim import EWCAdamW
from cl_optim.ops.gram import combine_

SHAPES = [(0,), (1,), (2049,), (37, 53), (2, 3, 5, 7), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def memory_of(problem: Problem, rows: int, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    memory = {}
    for param in problem.params:
        memory[param] = torch.stack([torch.empty_like(param, dtype=dtype) for _ in range(rows)])
        if not param.is_contiguous():
            memory[param] = memory[param].mT.contiguous().mT
        memory[param].copy_(torch.randn(memory[param].shape))
    return memory


def check_equal(ours: Problem, expected: Problem) -> None:
    for a, b in zip(ours.params, expected.params, strict=True):
        wide = a.dtype in (torch.float32, torch.float64)
        rtol = 1e-5 if a.dtype == torch.float32 else 1e-12 if wide else 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projected_step_is_projection_and_step(dtype, setting, implementation, device):
    start = Problem.of(make_params(SHAPES, dtype, transposed=True))
    ours, expected = start.copy(dtype, device), start.copy(dtype, device)
    optimizers = [make_optimizer(side, setting, **implementation) for side in (ours, expected)]
    for step in range(4):
        for side in (ours, expected):
            side.set_gradients(step, dtype)
        memory = memory_of(ours, 3, torch.bfloat16 if step % 2 else dtype)
        coefficients = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, device=device)
        before = [p.grad.clone() for p in ours.params]
        optimizers[0].step_projected(memory, dict.fromkeys(ours.params, coefficients))
        assert all(torch.equal(p.grad, g) for p, g in zip(ours.params, before, strict=True))
        grads = [p.grad for p in expected.params]
        rows = [memory[p] for p in ours.params]
        combine_(grads, rows, coefficients[None], [0] * len(grads))
        optimizers[1].step()
    check_equal(ours, expected)


def test_rows_that_take_no_part_change_nothing(implementation, device):
    start = Problem.of(make_params(SHAPES, torch.float32))
    ours, expected = start.copy(torch.float32, device), start.copy(torch.float32, device)
    setting = Setting("gradient")
    optimizers = [make_optimizer(side, setting, **implementation) for side in (ours, expected)]
    for step in range(3):
        for side in (ours, expected):
            side.set_gradients(step, torch.float32)
        memory = {p: rows.fill_(torch.nan) for p, rows in memory_of(ours, 2, torch.float32).items()}
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        optimizers[0].step_projected(memory, dict.fromkeys(ours.params, nothing))
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(ours.params, expected.params, strict=True))


def test_the_opposite_gradient_is_projected_to_exactly_nothing(device):
    weight = torch.nn.Parameter(torch.randn(1000, device=device))
    before = weight.detach().clone()
    optimizer = EWCAdamW([weight], weight_decay=0.0, fused=True)
    weight.grad = torch.randn(1000, device=device)
    one = torch.ones(1, dtype=torch.float64, device=device)
    optimizer.step_projected({weight: -weight.grad[None]}, {weight: one})
    assert torch.equal(weight, before)
    assert not optimizer.state[weight]["exp_avg"].any()


def test_rows_must_fit(device):
    weight = torch.nn.Parameter(torch.randn(4, 3, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = EWCAdamW([weight], fused=True)
    before = weight.detach().clone()
    two = torch.zeros(2, dtype=torch.float64, device=device)
    rows = torch.zeros(2, 4, 3, device=device)
    for memory, coefficients, message in (
        (rows[:, :3], two, r"memories\[0\] must be rows of the shape and strides of params\[0\]"),
        (rows.mT.contiguous().mT, two, r"must be rows of the shape and strides"),
        (rows.double(), two, r"memories\[0\] may be float64 only where params\[0\] is"),
        (rows, two.float(), r"coefficients\[0\] must be contiguous float64, one for each row"),
        (rows, two[:1], r"coefficients\[0\] must be contiguous float64, one for each row"),
    ):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step_projected({weight: memory}, {weight: coefficients})
    assert torch.equal(weight, before)


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_unscaled_in_the_step(maximize, implementation, device):
    start = Problem.of(make_params(SHAPES, torch.float32))
    ours, expected = start.copy(torch.float32, device), start.copy(torch.float32, device)
    setting = Setting("gradient", maximize=maximize)
    optimizers = [make_optimizer(side, setting, **implementation) for side in (ours, expected)]
    for step in range(4):
        for side in (ours, expected):
            side.set_gradients(step, torch.float32)
        for p in ours.params:
            p.grad.mul_(1024.0)
        optimizers[0].grad_scale = torch.tensor(1024.0, device=device)
        optimizers[0].found_inf = torch.tensor(0.0, device=device)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.params, expected.params, strict=True))


def test_an_overflow_skips_the_step(implementation, device):
    problem = Problem.of(make_params(SHAPES, torch.float32)).copy(torch.float32, device)
    optimizer = make_optimizer(problem, Setting("gradient", amsgrad=True), **implementation)
    for step in range(6):  # with and without a plan, with and without a scale
        problem.set_gradients(step, torch.float32)
        optimizer.found_inf = torch.tensor(float(step % 2), device=device)
        optimizer.grad_scale = torch.tensor(8.0, device=device) if step > 3 else None
        before = [p.detach().clone() for p in problem.params]
        optimizer.step()
        same = [torch.equal(p, b) for p, b in zip(problem.params, before, strict=True)]
        assert all(same) == (step % 2 == 1)
        counts = {optimizer.state[p]["step"].item() for p in problem.params}
        assert counts == {step // 2 + 1.0}


def test_under_grad_scaler_it_is_adamw(implementation, device):
    results = []
    for make in (
        lambda params: EWCAdamW(params, **implementation),
        lambda params: torch.optim.AdamW(params, fused=True),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 3).to(device)
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=3)
        scales = []
        for step in range(8):
            loss = model(torch.randn(16, 20).to(device)).square().mean()
            scaler.scale(loss * (torch.inf if step == 4 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        assert scales[4] < scales[3]  # the overflow was seen
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_with_clipping(unscale, implementation):
    """After `scaler.unscale_` the step unscales no more."""
    model = torch.nn.Linear(5, 2)
    optimizer = EWCAdamW(model.parameters(), **implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loss = model(torch.ones(1, 5)).sum()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(
        optimizer.state[model.bias]["exp_avg"], torch.full((2,), 0.1), rtol=1e-6, atol=0
    )


@pytest.mark.gpu
def test_neither_rows_nor_scaling_wait_for_the_gpu():
    problem = Problem.of(make_params(SHAPES, torch.float32)).copy(torch.float32, "cuda")
    optimizer = make_optimizer(problem, Setting("gradient"), fused=True)
    memory = memory_of(problem, 2, torch.float32)
    coefficients = torch.ones(2, dtype=torch.float64, device="cuda")
    problem.set_gradients(0, torch.float32)
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step_projected(memory, dict.fromkeys(problem.params, coefficients))
    finally:
        torch.cuda.set_sync_debug_mode("default")
