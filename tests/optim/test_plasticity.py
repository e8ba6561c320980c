"""Frozen weights, importance damping, and the penalty that a step sums as it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, PENALTIES, Problem, make_params
from torch import Tensor, nn

from cl_optim import EWCAdamW

IMPORTANCE = ("float32", "bfloat16", "log8")
SHAPES = [(300,), (71, 73), (), (0,), (257,)]


def make(
    problem: Problem, *, groups: int = 1, consolidated: bool = True, **options: Any
) -> EWCAdamW:
    named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
    split = [{"params": named[i::groups]} for i in range(groups)]
    optimizer = EWCAdamW(split, **{**OFF_DEFAULT, **options})
    if consolidated:
        optimizer.consolidate(
            {name: f for (name, _), f in zip(named, problem.importances, strict=True)}
        )
    return optimizer


def run(problem: Problem, optimizer: EWCAdamW, steps: int, begin: int = 0) -> None:
    for number in range(begin, begin + steps):
        problem.set_gradients(number, torch.float32)
        optimizer.step()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


class TestFreeze:
    @pytest.mark.parametrize("penalty", PENALTIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    def test_frozen_weights_keep_their_bits(
        self, importance_dtype, dtype, penalty, implementation, device
    ):
        problem = Problem.of(make_params(SHAPES, torch.float32)).copy(dtype, device)
        rounding = "kahan" if dtype == torch.bfloat16 else "nearest"
        options = {"importance_dtype": importance_dtype, "penalty": penalty, "rounding": rounding}
        optimizer = make(problem, **options, **implementation)
        run(problem, optimizer, 3)
        count = optimizer.freeze(0.1)
        assert count == round(0.1 * sum(p.numel() for p in problem.params))
        before = [bits(p) for p in problem.params]
        run(problem, optimizer, 20, begin=3)
        frozen = [protected.frozen for protected in optimizer.protected()]
        assert sum(int(f.sum()) for f in frozen) == count
        for p, old, keeps in zip(problem.params, before, frozen, strict=True):
            assert torch.equal(bits(p)[keeps], old[keeps])
            if dtype == torch.float32:
                assert (bits(p)[~keeps] != old[~keeps]).all()

    def test_the_most_important_ones_of_all_parameters(self):
        problem = Problem.of(make_params(SHAPES, torch.float32))
        problem.importances = [10 ** torch.randn(p.shape) for p in problem.params]
        optimizer = make(problem, groups=2)
        count = optimizer.freeze(0.07)
        everything = torch.cat([f.flatten() for f in problem.importances])
        threshold = everything.sort(descending=True).values[count - 1]
        for protected in optimizer.protected():
            expected = problem.importances[int(protected.name[1:])] >= threshold
            assert torch.equal(protected.frozen, expected)

    def test_of_equal_ones_the_first(self):
        problem = Problem.of(make_params([(5, 3), (10,)], torch.float32))
        problem.importances = [torch.ones(5, 3), torch.ones(10)]
        optimizer = make(problem)
        assert optimizer.freeze(0.72) == 18
        first, second = (protected.frozen for protected in optimizer.protected())
        assert first.all()
        assert second.tolist() == [True] * 3 + [False] * 7

    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    def test_those_frozen_before_count(self, importance_dtype):
        problem = Problem.of(make_params(SHAPES, torch.float32))
        optimizer = make(problem, importance_dtype=importance_dtype)
        ten = optimizer.freeze(0.1)
        first = [protected.frozen for protected in optimizer.protected()]
        assert optimizer.freeze(0.05) == ten
        assert optimizer.freeze(0.1) == ten
        assert all(
            torch.equal(protected.frozen, before)
            for protected, before in zip(optimizer.protected(), first, strict=True)
        )
        twenty = optimizer.freeze(0.2)
        assert twenty == pytest.approx(2 * ten, abs=1)
        for protected, before in zip(optimizer.protected(), first, strict=True):
            assert (protected.frozen | ~before).all()

    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    def test_unfrozen_weights_are_as_important_as_before(self, importance_dtype, implementation):
        problem = Problem.of(make_params(SHAPES, torch.float32))
        optimizer = make(problem, importance_dtype=importance_dtype, **implementation)
        before = [protected.importance for protected in optimizer.protected()]
        for fraction in (0.1, 1.0):
            optimizer.freeze(fraction)
            for protected, old in zip(optimizer.protected(), before, strict=True):
                assert torch.equal(protected.importance, old)
        optimizer.unfreeze()
        for protected, old in zip(optimizer.protected(), before, strict=True):
            assert torch.equal(protected.importance, old)
            assert not protected.frozen.any()
        weights = [p.detach().clone() for p in problem.params]
        run(problem, optimizer, 1)
        for p, old in zip(problem.params, weights, strict=True):
            assert (p != old).all()

    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    def test_weights_of_ones_own_choice(self, importance_dtype, implementation):
        problem = Problem.of(make_params(SHAPES, torch.float32))
        optimizer = make(problem, importance_dtype=importance_dtype, **implementation)
        masks = {f"p{i}": torch.rand(p.shape) < 0.3 for i, p in enumerate(problem.params[:2])}
        half = {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in masks.items()}
        assert optimizer.freeze(masks=half) == sum(int(mask.sum()) for mask in half.values())
        assert optimizer.freeze(masks=masks) == sum(int(mask.sum()) for mask in masks.values())
        for protected in optimizer.protected():
            expected = masks.get(protected.name, torch.zeros_like(protected.frozen))
            assert torch.equal(protected.frozen, expected)
        before = [bits(p) for p in problem.params]
        run(problem, optimizer, 2)
        for p, old, protected in zip(problem.params, before, optimizer.protected(), strict=True):
            assert torch.equal(bits(p)[protected.frozen], old[protected.frozen])

    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    def test_merging_keeps_them_frozen(self, importance_dtype):
        problem = Problem.of(make_params(SHAPES, torch.float32))
        optimizer = make(problem, importance_dtype=importance_dtype)
        optimizer.freeze(0.1)
        before = [protected.frozen for protected in optimizer.protected()]
        for anchors in ("latest", "exact"):
            optimizer.consolidate(
                {f"p{i}": f.flip(0) if f.dim() else f for i, f in enumerate(problem.importances)},
                anchors=anchors,
            )
            for protected, frozen in zip(optimizer.protected(), before, strict=True):
                assert torch.equal(protected.frozen, frozen)

    def test_they_are_left_out_of_the_penalty(self, implementation):
        problem = Problem.of(make_params([(100,)], torch.float32))
        problem.importances = [torch.arange(1.0, 101.0)]
        optimizer = make(problem, track_penalty=True, **implementation)
        optimizer.freeze(0.1)  # those of 91 ... 100
        with torch.no_grad():
            problem.params[0].add_(0.5)
        expected = OFF_DEFAULT["ewc_lambda"] * 0.25 * sum(range(1, 91))
        assert float(optimizer.penalty()) == pytest.approx(expected, rel=1e-5)
        run(problem, optimizer, 1)
        assert float(optimizer.last_penalty) == pytest.approx(expected, rel=1e-5)
        assert float(optimizer.last_drift) == pytest.approx(0.5 * 10, rel=1e-5)

    def test_nothing_to_unfreeze(self):
        make(Problem.of(make_params([(3,)], torch.float32)), consolidated=False).unfreeze()

    @pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
    def test_float64_importance_is_ranked_in_float64(self, scale):
        """Beyond float32, and closer together than float32 tells apart."""
        wide = nn.Parameter(torch.randn(3, 400, dtype=torch.float64))
        narrow = nn.Parameter(torch.randn(300))
        torch.manual_seed(5)
        importance = {
            "wide": (1 + 1e-9 * torch.randperm(1200).double().view(3, 400)) * scale,
            "narrow": torch.rand(300),
        }
        optimizer = EWCAdamW([("wide", wide), ("narrow", narrow)])
        optimizer.consolidate(importance)
        assert optimizer.freeze(0.2) == 300
        every = torch.cat([value.double().reshape(-1) for value in importance.values()])
        expected = torch.zeros(1500, dtype=torch.bool)
        expected[every.argsort(descending=True)[:300]] = True
        found = torch.cat([each.frozen.reshape(-1) for each in optimizer.protected()])
        assert torch.equal(found, expected)


class TestDamping:
    def test_adams_own_step_is_divided(self, implementation):
        """In the decoupled form the pull shows apart: it is not damped."""
        results = {}
        for damping in (0.0, 0.6):
            problem = Problem.of(make_params([(200,)], torch.float32))
            optimizer = make(
                problem,
                penalty="decoupled",
                importance_damping=damping,
                weight_decay=0.0,
                **implementation,
            )
            with torch.no_grad():
                problem.params[0].add_(1.0)
            before = problem.params[0].detach().double()
            run(problem, optimizer, 1)
            results[damping] = problem.params[0].detach().double() - before
        (importance,) = problem.importances
        pull = -OFF_DEFAULT["lr"] * 2 * OFF_DEFAULT["ewc_lambda"] * importance.double()
        expected = (results[0.0] - pull) / (1 + 0.6 * importance / importance.mean()) + pull
        torch.testing.assert_close(results[0.6], expected, rtol=1e-4, atol=2e-7)

    def test_the_mean_is_over_what_is_not_frozen_and_stays(self):
        problem = Problem.of(make_params([(100,), (50, 2)], torch.float32))
        problem.importances = [torch.arange(1.0, 101.0), torch.full((50, 2), 3.0)]
        optimizer = make(problem, groups=2, importance_damping=1.0)
        everything = [g["importance_mean"] for g in optimizer.param_groups]
        assert everything == [pytest.approx((5050 + 300) / 200)] * 2
        optimizer.freeze(0.05)  # 91 ... 100
        assert [g["importance_mean"] for g in optimizer.param_groups] == everything
        optimizer.consolidate({"p0": torch.zeros(100), "p1": torch.zeros(50, 2)})
        rest = (sum(range(1, 91)) + 300) / 190
        assert optimizer.param_groups[0]["importance_mean"] == pytest.approx(rest)
        fresh = make(problem, groups=2, consolidated=False)
        fresh.load_state_dict(optimizer.state_dict())
        assert fresh.param_groups[1]["importance_mean"] == pytest.approx(rest)
        assert fresh.param_groups[1]["importance_damping"] == 1.0

    def test_no_importance_no_damping(self, implementation):
        for importance in (torch.zeros(100), None):
            results = []
            for damping in (0.0, 5.0):
                problem = Problem.of(make_params([(100,)], torch.float32))
                options = {"importance_damping": damping, **implementation}
                optimizer = make(problem, consolidated=False, **options)
                if importance is not None:
                    optimizer.consolidate({"p0": importance})
                run(problem, optimizer, 3)
                results.append(problem.params[0].detach())
            assert torch.equal(*results)

    def test_the_mean_of_float64_importance_near_its_limit(self):
        weight = nn.Parameter(torch.zeros(100, dtype=torch.float64))
        optimizer = EWCAdamW([("w", weight)], importance_damping=1.0)
        optimizer.consolidate({"w": torch.full((100,), 1e308, dtype=torch.float64)})
        optimizer.freeze(masks={"w": torch.arange(100) < 50})
        optimizer.consolidate({"w": torch.zeros(100, dtype=torch.float64)})
        assert optimizer.param_groups[0]["importance_mean"] == pytest.approx(1e308)


class TestTracking:
    @pytest.mark.parametrize("importance_dtype", IMPORTANCE)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_the_sums_are_those_before_the_step(
        self, dtype, importance_dtype, implementation, device
    ):
        problem = Problem.of(make_params([(5, 7), (70_000,), (33,)], torch.float32))
        problem = problem.copy(dtype, device)
        optimizer = make(
            problem,
            groups=2,
            importance_dtype=importance_dtype,
            track_penalty=True,
            **implementation,
        )
        optimizer.param_groups[1]["ewc_lambda"] = 0.2
        for number in range(3):
            with torch.no_grad():
                for p in problem.params:
                    p.add_(torch.randn(p.shape).to(p))
            penalty, drift = optimizer.penalty().double(), self.drift(optimizer)
            run(problem, optimizer, 1, begin=number)
            torch.testing.assert_close(optimizer.last_penalty, penalty, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(optimizer.last_drift, drift, rtol=1e-6, atol=0.0)

    @staticmethod
    def drift(optimizer: EWCAdamW) -> Tensor:
        return torch.stack(
            [
                torch.stack(
                    [
                        (p.double() - optimizer.state[p]["anchor"].double()).square().sum()
                        for p in group["params"]
                    ]
                )
                .sum()
                .sqrt()
                for group in optimizer.param_groups
            ]
        ).detach()

    def test_a_penalty_beyond_float32(self, implementation):
        """F Δ², and Δ² alone."""
        param = nn.Parameter(torch.zeros(6_000, 1000))
        options = {"track_penalty": True, "lr": 0.0, "ewc_lambda": 3.0, **implementation}
        optimizer = EWCAdamW([("w", param)], **options)
        optimizer.consolidate({"w": torch.full((6_000, 1000), 1e30)})
        with torch.no_grad():
            param.fill_(1e25)
        param.grad = torch.zeros_like(param)
        penalty, drift = optimizer.penalty(), self.drift(optimizer)
        optimizer.step()
        expected = (
            3 * param.numel() * torch.tensor(1e30).double() * torch.tensor(1e25).double() ** 2
        )
        torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(optimizer.last_penalty, expected, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(optimizer.last_drift, drift, rtol=1e-12, atol=0.0)

    def test_the_same_numbers_with_any_number_of_threads(self):
        start = Problem.of(make_params([(300_000,), (999,)], torch.float32))
        noise = [torch.randn(p.shape) for p in start.params]
        numbers = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                problem = start.copy(torch.float32)
                optimizer = make(problem, track_penalty=True, fused=True)
                with torch.no_grad():
                    for p, addend in zip(problem.params, noise, strict=True):
                        p.add_(addend)
                run(problem, optimizer, 1)
                numbers.append(optimizer.last_penalty.item())
        finally:
            torch.set_num_threads(before)
        assert len(set(numbers)) == 1

    def test_the_weights_do_not_notice(self, implementation):
        results = []
        for track in (False, True):
            problem = Problem.of(make_params([(5, 7), (7000,)], torch.float32))
            optimizer = make(problem, track_penalty=track, **implementation)
            run(problem, optimizer, 5)
            results.append([p.detach() for p in problem.params])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_an_overflow_leaves_them(self, implementation):
        problem = Problem.of(make_params([(50,)], torch.float32))
        optimizer = make(problem, track_penalty=True, **implementation)
        run(problem, optimizer, 2)
        before = optimizer.last_penalty.item()
        assert before > 0
        optimizer.found_inf = torch.tensor(1.0)
        with torch.no_grad():
            problem.params[0].add_(1.0)
        run(problem, optimizer, 1)
        assert optimizer.last_penalty.item() == before

    def test_before_there_is_anything(self):
        problem = Problem.of(make_params([(50,), (3,)], torch.float32))
        optimizer = make(problem, groups=2, consolidated=False, track_penalty=True)
        run(problem, optimizer, 1)
        assert optimizer.last_penalty == 0
        assert optimizer.last_drift.tolist() == [0, 0]

    def test_only_what_the_last_step_updated(self, implementation):
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": [param]} for param in params]
        optimizer = EWCAdamW(groups, track_penalty=True, lr=0.1, **implementation)
        optimizer.consolidate(None)
        for number in range(6):
            for param in params:
                param.grad = torch.ones(2)
            if number > 3:
                params[1].grad = None
            optimizer.step()
            assert (optimizer.last_drift > 0).tolist() == [number > 0, 0 < number <= 3]
        optimizer.consolidate(None)
        assert optimizer.last_penalty == 0
        assert optimizer.last_drift.tolist() == [0, 0]

    def test_not_asked_for(self):
        problem = Problem.of(make_params([(50,)], torch.float32))
        optimizer = make(problem)
        for name in ("last_penalty", "last_drift"):
            with pytest.raises(RuntimeError, match=f"{name} needs an optimizer made with track"):
                getattr(optimizer, name)
