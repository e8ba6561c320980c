"""The step: fused and foreach against the paper-literal reference, and edge cases of the forms."""

from __future__ import annotations

import pytest
import torch
from ewc_adamw_cases import (
    OFF_DEFAULT,
    PENALTIES,
    SETTINGS,
    Problem,
    Setting,
    make_optimizer,
    make_params,
    protect,
    reload,
    ulps,
)
from reference_optimizer import ReferenceEWCAdamW

from cl_optim import EWCAdamW
from cl_optim.ops import ewc_adamw_reference as ops

SHAPES = [(0,), (1,), (31,), (65_537,), (37, 53), (2, 3, 5, 7), ()]
IMPLEMENTATIONS = [{"fused": True}, {"foreach": True}]
LABELS = ["fused", "foreach"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STEPS = 100


def backend_of(implementation: dict[str, bool], device: str) -> str:
    return device if implementation.get("fused") else "foreach"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def run_reference(problem: Problem, setting: Setting, gradient_dtype: torch.dtype) -> list:
    optimizer = ReferenceEWCAdamW(problem.params, **setting.arguments())
    optimizer.set_importance(problem.importances, problem.anchors)
    for step in range(STEPS):
        problem.set_gradients(step, gradient_dtype)
        optimizer.step()
    return problem.params


def error(params: list, exact: list) -> float:
    return max(
        ((p.double().to(e.device) - e).norm() / e.norm()).item()
        for p, e in zip(params, exact, strict=True)
        if p.numel()
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=LABELS)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_float32_is_as_exact_as_the_reference(setting, transposed, implementation, device):
    start = Problem.of(make_params(SHAPES, torch.float32, transposed=transposed))
    exact = run_reference(start.copy(torch.float64), setting, torch.float32)
    literal = run_reference(start.copy(torch.float32), setting, torch.float32)

    problem = start.copy(torch.float32, device)
    optimizer = make_optimizer(problem, setting, **implementation)
    for step in range(STEPS):
        problem.set_gradients(step, torch.float32)
        optimizer.step()
        assert optimizer.backend == backend_of(implementation, device)
        if step == STEPS // 2:
            optimizer = reload(
                optimizer, lambda: make_optimizer(problem, setting, **implementation)
            )
    assert error(problem.params, exact) <= 4 * error(literal, exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=LABELS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_float64_computes_in_float64(setting, implementation, device):
    start = Problem.of(make_params(SHAPES, torch.float64))
    exact = run_reference(start.copy(torch.float64), setting, torch.float64)
    problem = start.copy(torch.float64, device)
    optimizer = make_optimizer(problem, setting, **implementation)
    for step in range(STEPS):
        problem.set_gradients(step, torch.float64)
        optimizer.step()
    assert error(problem.params, exact) <= 1e-13  # float32 would give 1e-6
    assert {value.dtype for value in optimizer.state[problem.params[3]].values()} == {
        torch.float64,
        torch.float32,  # the step count
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=LABELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_one_step_in_16_bits_is_the_rounded_exact_step(setting, dtype, implementation, device):
    start = Problem.of(make_params(SHAPES, dtype))
    exact = start.copy(torch.float64)
    problem = start.copy(dtype, device)
    reference = ReferenceEWCAdamW(exact.params, **setting.arguments())
    reference.set_importance(exact.importances, exact.anchors)
    optimizer = make_optimizer(problem, setting, **implementation)
    for side in (exact, problem):
        side.set_gradients(0, dtype)
    reference.step()
    optimizer.step()
    assert optimizer.backend == backend_of(implementation, device)
    for p, e in zip(problem.params, exact.params, strict=True):
        assert (ulps(p.cpu(), e.to(dtype)) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_100_steps_in_16_bits_fused_equals_foreach(setting, dtype, device):
    start = Problem.of(make_params(SHAPES, dtype, transposed=True))
    sides = [start.copy(dtype, device), start.copy(dtype, device)]
    optimizers = [
        make_optimizer(side, setting, **implementation)
        for side, implementation in zip(sides, IMPLEMENTATIONS, strict=True)
    ]
    for step in range(STEPS):
        for side, optimizer in zip(sides, optimizers, strict=True):
            side.set_gradients(step, dtype)
            optimizer.step()
    distance = torch.cat(
        [ulps(a, b).flatten() for a, b in zip(sides[0].params, sides[1].params, strict=True)]
    )
    assert (distance <= 2).float().mean() >= 0.999


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=LABELS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_before_consolidation_it_is_adamw(amsgrad, maximize, implementation, device):
    options = {key: OFF_DEFAULT[key] for key in ("lr", "betas", "eps", "weight_decay")}
    options |= {"amsgrad": amsgrad, "maximize": maximize}
    ours, theirs, exact = (
        Problem.of(make_params(SHAPES, torch.float32)).copy(dtype, device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    optimizers = [
        EWCAdamW(ours.params, **options, **implementation),
        torch.optim.AdamW(theirs.params, foreach=False, **options),
        torch.optim.AdamW(exact.params, foreach=False, **options),
    ]
    for step in range(200):
        for side, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            side.set_gradients(step, torch.float32)
            optimizer.step()
    assert optimizers[0].backend == backend_of(implementation, device)
    assert error(ours.params, exact.params) <= 4 * error(theirs.params, exact.params)


@pytest.mark.parametrize("count", [1, 2, 63, 500])  # a CUDA launch takes 384
def test_many_tensors_in_one_step(count, device):
    shapes = [(1 + 37 * i % 211,) for i in range(count)]
    setting = Setting("decoupled", amsgrad=True)
    start = Problem.of(make_params(shapes, torch.float32))
    sides = [start.copy(torch.float32, device), start.copy(torch.float32, device)]
    for side, implementation in zip(sides, IMPLEMENTATIONS, strict=True):
        optimizer = make_optimizer(side, setting, **implementation)
        for step in range(5):
            side.set_gradients(step, torch.float32)
            optimizer.step()
        assert optimizer.backend == backend_of(implementation, device)
    for a, b in zip(sides[0].params, sides[1].params, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_step_counts_may_stay_on_a_device(monkeypatch):
    """The reference on a GPU reads no step count: the same numbers with counts left in tensors."""
    setting = Setting("gradient", amsgrad=True)
    start = Problem.of(make_params([(50,), (3, 4)], torch.float32))
    results = []
    for count in (ops._count, lambda step: step.double()):
        monkeypatch.setattr(ops, "_count", count)
        problem = start.copy(torch.float32)
        optimizer = make_optimizer(problem, setting, foreach=True)
        for step in range(5):
            problem.set_gradients(step, torch.float32)
            optimizer.step()
        results.append(problem.params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def one_step(importance: float, lambda_: float, lr: float = 0.1, penalty: str = "proximal", **kw):
    """One step of a weight at 3 with anchor 2; its new value, and what AdamW alone makes of it."""
    results = []
    for f in (importance, 0.0):
        weight = torch.nn.Parameter(torch.tensor([3.0]))
        optimizer = EWCAdamW([("w", weight)], lr=lr, ewc_lambda=lambda_, penalty=penalty, **kw)
        problem = Problem([weight], [torch.tensor([f])], [torch.tensor([2.0])])
        protect(optimizer, problem)
        weight.grad = torch.tensor([0.5])
        optimizer.step()
        results.append(weight.item())
    return results


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=LABELS)
class TestStrongPulls:
    def test_proximal_stands_at_the_anchor(self, implementation):
        for importance in (2.0**25 / (0.2 * 1e12), 1.0, 1e30):
            value, _ = one_step(importance, 1e12, **implementation)
            assert abs(value - 2.0) <= 2.0**-25 * 1.1 + 2.0**-23  # an ulp of the anchor

    @pytest.mark.parametrize("lambda_", [1e12, 1e38, 1e300])
    def test_proximal_leaves_what_is_not_important(self, lambda_, implementation):
        value, adamw = one_step(0.0, lambda_, **implementation)
        assert value == adamw
        assert value != 3.0

    @pytest.mark.parametrize("lambda_", [1e38, 1e300])
    def test_overflow_is_the_anchor(self, lambda_, implementation):
        value, _ = one_step(1e10, lambda_, **implementation)
        assert value == 2.0

    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_no_learning_rate_no_step(self, penalty, implementation):
        value, _ = one_step(1.0, 1e12, lr=0.0, penalty=penalty, **implementation)
        assert value == 3.0

    def test_many_proximal_steps_stay_finite(self, implementation):
        setting = Setting("proximal", options={**OFF_DEFAULT, "ewc_lambda": 1e12})
        problem = Problem.of(make_params([(1000,)], torch.float32))
        optimizer = make_optimizer(problem, setting, **implementation)
        for step in range(50):
            problem.set_gradients(step, torch.float32)
            optimizer.step()
        (param,), (importance,), (anchor,) = problem.params, problem.importances, problem.anchors
        assert param.isfinite().all()
        held = 2 * setting.options["lr"] * 1e12 * importance >= 2**25
        assert held.sum() > 500
        torch.testing.assert_close(param[held], anchor[held], rtol=2**-23, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_conversions_round_as_torch_does(dtype):
    """An infinite pull stores the float32 anchor itself: every rounding case, and every value.

    But for those that are denormal in float32, which are 0.
    """
    from cl_optim import functional as F

    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    everything = everything[everything.isfinite()]
    between = torch.randint(-(2**31), 2**31 - 1, (200_000,)).to(torch.int32).view(torch.float32)
    ties = everything[:-1] / 2 + everything[1:] / 2  # half an ulp, exact in float32
    ties = torch.cat([ties, *(torch.nextafter(ties, torch.tensor(end)) for end in (-9e9, 9e9))])
    overflow = torch.tensor([65504.0, 65519.996, 65520.0, -65520.0, 3.3e38])
    anchor = torch.cat([everything, between[between.isfinite()], ties, overflow])

    def without_denormals(values):
        return values.where(values.abs() >= torch.finfo(torch.float32).tiny, 0.0)

    param = torch.zeros_like(anchor, dtype=dtype)
    zeros = [torch.zeros_like(anchor) for _ in range(2)]
    F.ewc_adamw_(
        [param],
        [torch.zeros_like(param)],
        [zeros[0]],
        [zeros[1]],
        [torch.full_like(anchor, 1e38)],
        [anchor],
        [torch.tensor(0.0)],
        lr=1.0,
        weight_decay=0.0,
        ewc_lambda=1e38,
        penalty="proximal",
        fused=True,
    )
    assert torch.equal(param, without_denormals(anchor).to(dtype))
    # And what is loaded is what was stored.
    before, after = without_denormals(everything).to(dtype), everything.to(dtype)
    zeros = [torch.zeros_like(everything) for _ in range(2)]
    F.ewc_adamw_(
        [after], [torch.zeros_like(after)], [zeros[0]], [zeros[1]], [], [], [torch.tensor(0.0)],
        lr=0.0, fused=True,
    )  # fmt: skip
    assert torch.equal(after, before)


def test_not_a_number_stays_where_it_is():
    for implementation in IMPLEMENTATIONS:
        for amsgrad in (False, True):
            problem = Problem.of(make_params([(100,)], torch.float32))
            optimizer = make_optimizer(problem, Setting("gradient", amsgrad), **implementation)
            for _ in range(2):
                problem.set_gradients(0, torch.float32)
                problem.params[0].grad[17] = torch.nan
                optimizer.step()
            assert problem.params[0].isnan().nonzero().tolist() == [[17]]


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("protected", [False, True])
    def test_a_step_does_not_wait_for_the_gpu(self, protected):
        problem = Problem.of(make_params(SHAPES, torch.float32)).copy(torch.float32, "cuda")
        for implementation in IMPLEMENTATIONS:
            named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
            optimizer = EWCAdamW(named, **implementation)
            if protected:
                protect(optimizer, problem)
            problem.set_gradients(0, torch.float32)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_unaligned_memory(self):
        """Views that begin where 16-byte accesses are not possible."""
        results = []
        for offset in (0, 1, 3):
            memory = torch.zeros(1000 + offset, device="cuda")
            weight = torch.nn.Parameter(memory[offset:])
            problem = Problem.of([torch.nn.Parameter(torch.ones(1000))]).copy(torch.float32, "cuda")
            problem.params = [weight]
            optimizer = make_optimizer(problem, Setting("proximal", amsgrad=True), fused=True)
            for step in range(3):
                problem.set_gradients(step, torch.float32)
                optimizer.step()
            results.append(weight.detach().clone())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_both_devices_in_one_optimizer(self):
        problem = Problem.of(make_params([(100,), (100,)], torch.float32))
        moved = problem.copy(torch.float32, "cuda")
        problem.params[1] = moved.params[1]
        problem.anchors[1] = moved.anchors[1]
        optimizer = make_optimizer(problem, Setting("gradient"))
        for step in range(3):
            problem.set_gradients(step, torch.float32)
            optimizer.step()
        devices = {p.device.type: optimizer.state[p]["step"].device.type for p in problem.params}
        assert devices == {"cpu": "cpu", "cuda": "cuda"}
