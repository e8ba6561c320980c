"""The pull alone: the kernel against the reference, and both against float64 by hand."""

from __future__ import annotations

import pytest
import torch

from cl_optim.ops import ewc_adamw, formats, library
from cl_optim.ops.ewc_adamw_arguments import Hyperparameters, State
from cl_optim.ops.ewc_pull import NO_NUMBERS, Numbers, Options, Pulled, foreach, fused

assert library.available("cpu")  # which loads the kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PENALTIES = ("gradient", "decoupled", "proximal")
SHAPES = ((), (1,), (7,), (255,), (3, 100), (0,), (2, 513), (70000,))


def tensors(dtype, importance="float32", anchor=None, frozen=False, seed=0):
    """Weights after a step, gradients, weights before; F of magnitudes up to 1e8."""
    draw = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    after, beside = ([normal(shape) for shape in SHAPES] for _ in range(2))
    anchors, importances = [], []
    for param in after:
        anchor_dtype = formats.anchor_dtype(param, anchor)
        anchors.append(normal(param.shape).to(anchor_dtype))
        f = formats.like(param).copy_(normal(param.shape)).exp() * 1e3
        f = torch.where(torch.rand(param.shape, generator=draw) < 0.2, 0.0, f)
        f = torch.where(torch.rand(param.shape, generator=draw) < 0.05, 1e8, f).to(f.dtype)
        stored = formats.store_importance(f, param, importance)
        if frozen:
            formats.mark_frozen_(stored, torch.rand(param.shape, generator=draw) < 0.3)
        importances.append(stored)
    return after, beside, importances, anchors


def by_hand(target, beside, importance, anchor, options, grad_scale=1.0):
    """In float64."""
    f, frozen = formats.load_importance(importance, target)
    f, theta, star = f.double(), target.double(), anchor.double()
    c = 2.0 * options.ewc_lambda * f * (1.0 if options.penalty == "gradient" else options.lr)
    if options.penalty == "proximal":
        pulled = star + (theta - star) / (1.0 + c)
    else:
        drift = c * (beside.double() - star)
        sign = -1.0 if options.maximize else 1.0
        pulled = theta + sign * grad_scale * drift if options.penalty == "gradient" else (
            theta - drift
        )  # fmt: skip
    return torch.where(frozen, theta, pulled)


def pulled_by(function, dtype, options, numbers=NO_NUMBERS, steps=None, **stored):
    after, beside, importances, anchors = tensors(dtype, **stored)
    targets = [t.clone() for t in after]
    has_beside = options.penalty != "proximal"
    pulled = Pulled(targets, beside if has_beside else [], importances, anchors, steps or [])
    function(pulled, options, numbers)
    return targets, (after, beside, importances, anchors)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [fused, foreach])
def test_it_is_the_formula(function, dtype, penalty):
    options = Options(1e-3, 0.3, penalty)
    targets, (after, beside, importances, anchors) = pulled_by(function, dtype, options)
    for target, *given in zip(targets, after, beside, importances, anchors, strict=True):
        expected = by_hand(*given, options)
        # Terms may cancel: in units of the largest.
        terms = (given[0].double(), expected - given[0].double(), given[3].double())
        size = torch.stack([term.abs() for term in terms]).amax(0)
        limits = torch.finfo(dtype)
        inside = expected.abs() < limits.max
        error = (target.double() - expected).abs()
        allowed = 8 * limits.eps * size + limits.smallest_normal
        assert bool((error <= allowed)[inside].all())
        assert bool((target.double().abs() >= limits.max)[~inside].all())


@pytest.mark.parametrize("stored", [
    {"importance": "bfloat16"}, {"importance": "log8"}, {"anchor": "bfloat16"}, {"frozen": True},
    {"importance": "log8", "anchor": "bfloat16", "frozen": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_the_reference(dtype, penalty, stored):
    options = Options(1e-3, 0.3, penalty)
    one, (after, *_) = pulled_by(fused, dtype, options, **stored)
    other, _ = pulled_by(foreach, dtype, options, **stored)
    for a, b, before in zip(one, other, after, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        if before.numel() > 1000:
            moved = (a != before).float().mean()
            assert 0.1 < moved < 0.95  # F = 0 for a fifth, and frozen ones


@pytest.mark.parametrize("stored", [{}, {"importance": "log8"}, {"anchor": "float32"}], ids=str)
def test_stochastic_rounding_is_right_on_average_and_alike_in_both(stored):
    options = Options(1e-6, 0.3, stochastic=True)
    sums = [torch.zeros(70000, dtype=torch.float64) for _ in range(2)]
    steps = {f: [torch.zeros(()) for _ in SHAPES] for f in (fused, foreach)}
    for _ in range(64):
        for total, function in zip(sums, (fused, foreach), strict=True):
            targets, given = pulled_by(
                function, torch.bfloat16, options, steps=steps[function], **stored
            )
            total += targets[-1].double()
    differ = (sums[0] != sums[1]).double().mean()
    assert differ < 0.01  # where a sum before rounding is another in its last bit
    assert [int(step) for step in steps[fused]] == [64] * len(SHAPES)
    after, beside, importances, anchors = given
    expected = by_hand(after[-1], beside[-1], importances[-1], anchors[-1], options)
    error = (sums[0] / 64 - expected) / torch.maximum(after[-1].abs(), expected.abs())
    assert error.mean().abs() < 2e-6
    nearest, _ = pulled_by(fused, torch.bfloat16, Options(1e-6, 0.3), **stored)
    lost = (nearest[-1].double() - expected) / after[-1].double().abs().clamp(min=1e-3)
    assert (sums[0] / 64 - expected).abs().mean() < (nearest[-1].double() - expected).abs().mean()
    assert lost.abs().mean() > 0.0


def test_numbers_on_the_device_take_the_place_of_options():
    options, other = Options(1e-3, 0.3), Options(0.0, 0.3)
    lr = torch.tensor(1e-3)
    for function in (fused, foreach):
        expected, _ = pulled_by(function, torch.float32, options)
        found, (after, *_) = pulled_by(function, torch.float32, other, Numbers(lr=lr))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        skipped, _ = pulled_by(function, torch.float32, options, Numbers(found_inf=torch.ones(1)))
        assert all(map(torch.equal, skipped, after))
        kept, _ = pulled_by(function, torch.float32, options, Numbers(found_inf=torch.zeros(1)))
        assert all(map(torch.equal, kept, expected))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("function", [fused, foreach])
def test_a_scaled_gradient_gets_a_scaled_pull(function, maximize):
    options = Options(1e-3, 0.3, "gradient", maximize=maximize)
    scale = Numbers(grad_scale=torch.tensor(1024.0))
    targets, given = pulled_by(function, torch.float32, options, scale)
    for target, *one in zip(targets, *given, strict=True):
        expected = by_hand(*one, options, 1024.0)
        torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("function", [fused, foreach])
def test_tensors_in_other_orders(function):
    draw = torch.Generator().manual_seed(0)
    square = torch.rand(4, 64, 64, generator=draw)
    target, anchor = square[0].t(), square[1][:, :]
    importance, gap = square[2].t(), torch.rand(64, 128, generator=draw)[:, ::2]
    options = Options(0.1, 1.0)
    for theta, f in ((target, importance), (gap, square[3])):
        expected = by_hand(theta, theta, f, anchor, options)
        function(Pulled([theta], [], [f], [anchor]), options, NO_NUMBERS)
        torch.testing.assert_close(theta.double(), expected, rtol=1e-6, atol=1e-7)
    codes = formats.store_importance(square[3].contiguous(), square[3], "log8")
    theta = square[0].t()
    expected = by_hand(theta, theta, codes, anchor, options)
    function(Pulled([theta], [], [codes], [anchor]), options, NO_NUMBERS)
    torch.testing.assert_close(theta.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_pull_of_the_adamw_step(dtype):
    """With a gradient of 0 Adam does nothing; the pull's arithmetic is the same, bit for bit."""
    after, _, importances, anchors = tensors(dtype, "float32")
    by_adamw, alone = ([t.clone() for t in after] for _ in range(2))
    zeros = [[torch.zeros_like(t) for t in after] for _ in range(3)]
    steps = [torch.zeros(()) for _ in after]
    hyper = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.0, 0.3, penalty="proximal")
    state = State(zeros[0], zeros[1], [], importances, anchors, [], steps)
    ewc_adamw.fused(by_adamw, zeros[2], state, hyper)
    fused(Pulled(alone, [], importances, anchors), Options(1e-3, 0.3))
    assert all(map(torch.equal, by_adamw, alone))


def test_an_infinite_pull_goes_to_the_anchor_and_leaves_what_has_no_importance():
    after, _, importances, anchors = tensors(torch.float32)
    for function in (fused, foreach):
        targets = [t.clone() for t in after]
        options = Options(1e30, 1e30)
        function(Pulled(targets, [], importances, anchors), options, NO_NUMBERS)
        for target, before, f, anchor in zip(targets, after, importances, anchors, strict=True):
            torch.testing.assert_close(
                target, torch.where(f > 0, anchor, before), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize(("given", "message"), [
    ({"lr": -1.0}, "lr must be finite and at least 0"),
    ({"ewc_lambda": float("nan")}, "ewc_lambda must be finite"),
    ({"penalty": "none"}, "penalty must be one of"),
], ids=str)  # fmt: skip
def test_options_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"lr": 1.0, "ewc_lambda": 1.0, **given})


def test_the_operator_refuses_what_does_not_fit():
    after, beside, importances, anchors = tensors(torch.float32)
    options = Options(0.1, 1.0)
    for pulled, message in (
        (Pulled(after, beside, importances, anchors), "beside must hold 0 tensors"),
        (Pulled(after, [], importances[1:], anchors), "importances must hold 8 tensors, not 7"),
        (Pulled(after, [], importances[::-1], anchors), r"importances\[0\] must have the shape"),
        (Pulled(after, [], importances, [a.double() for a in anchors]), "anchors"),
    ):
        before = [t.clone() for t in after]
        with pytest.raises(RuntimeError, match=message):
            fused(pulled, options)
        assert all(map(torch.equal, after, before))
    with pytest.raises(RuntimeError, match="steps must hold 8 tensors, not 0"):
        fused(Pulled(after, [], importances, anchors), Options(0.1, 1.0, stochastic=True))


def test_writing_is_seen_by_autograd():
    weight = torch.ones(3, requires_grad=True)
    product = (weight * weight).sum()
    with torch.no_grad():
        fused(Pulled([weight], [], [torch.ones(3)], [torch.zeros(3)]), Options(0.1, 1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [{}, {"importance": "log8"}, {"anchor": "bfloat16"}], ids=str)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_computes_the_same(dtype, penalty, stored):
    if dtype == torch.float64 and stored:
        stored = {}  # which has one format
    options = Options(1e-3, 0.3, penalty)
    expected, given = pulled_by(fused, dtype, options, **stored)
    after, beside, importances, anchors = ([t.cuda() for t in part] for part in given)
    pulled = Pulled(after, beside if penalty != "proximal" else [], importances, anchors)
    fused(pulled, options)
    for a, b in zip(after, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
