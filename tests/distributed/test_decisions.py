"""What each of several processes would decide for itself: GEM's rows, and a guard's actions."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import results_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cl_optim import GEM, EWCAdamW
from cl_optim.distributed import whole
from cl_optim.retention import Evaluation, RetentionGuard, interpolate


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def trained(rank: int, ranks: Any, seeds: tuple[int, ...]) -> list[torch.Tensor]:
    """Train on batches of the rank's own, with a memory of its own of samples of those seeds."""
    model = network()
    parallel = DistributedDataParallel(model)
    optimizer = GEM(torch.optim.SGD(model.named_parameters(), lr=0.1), ranks=ranks)

    def remember() -> None:
        x, y = (torch.cat(parts) for parts in zip(*map(batch, seeds), strict=True))
        F.mse_loss(model(x), y).backward()

    optimizer.remember("old", remember)
    for step in range(6):
        optimizer.zero_grad()
        x, y = batch(10 + 2 * step + rank)
        F.mse_loss(parallel(x), y).backward()
        optimizer.step()
    assert optimizer.last_projection.v.numel() == 1
    return [param.detach() for param in model.parameters()]


def same_samples(rank: int) -> list[torch.Tensor]:
    return trained(rank, None, (0, 1))


def with_uphill_steps(model: nn.Module, factor: float = 1.0) -> list[torch.Tensor]:
    """Steps against a memory, of the same samples in each process."""
    optimizer = GEM(torch.optim.SGD(model.named_parameters(), lr=0.1), memory_strength=0.5)
    x, y = batch(0)
    optimizer.remember("old", lambda: (F.mse_loss(model(x), y) * factor).backward())
    for _ in range(4):
        optimizer.zero_grad()
        gradients = torch.autograd.grad(-F.mse_loss(model(x), y), list(model.parameters()))
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.grad = gradient
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def almost_the_same(rank: int) -> list[torch.Tensor]:
    """As of kernels that add up in another order each time."""
    return with_uphill_steps(network(), 1 + 1e-4 * rank)


def but_for_a_last_bit(rank: int) -> list[torch.Tensor]:
    """Which norms in float32 do not show."""
    model = network()

    def nudge(param: torch.Tensor) -> None:
        assert param.grad is not None
        first = param.grad.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.full_like(first, 9.0)))

    if rank:
        model[0].weight.register_post_accumulate_grad_hook(nudge)
    return with_uphill_steps(model)


def mean_of_own_samples(rank: int) -> list[torch.Tensor]:
    return trained(rank, "mean", (rank,))


def mean_over_a_group(rank: int) -> list[torch.Tensor]:
    return trained(rank, torch.distributed.group.WORLD, (rank,))


def other_samples(rank: int) -> str:
    try:
        trained(rank, None, (rank,))
    except ValueError as error:
        return str(error)
    return "nothing"


def alone(rank: int) -> int:
    optimizer = GEM(torch.optim.SGD(network().named_parameters(), lr=0.1), ranks="own")
    model = optimizer.param_groups[0]["params"]
    optimizer.remember("old", lambda: (model[0].sum() * (rank + 1)).backward())
    return len(optimizer.memories)


def one_closure_fails(rank: int) -> str:
    model = network()
    optimizer = GEM(torch.optim.SGD(model.named_parameters(), lr=0.1), ranks="mean")

    def closure() -> None:
        if rank == 1:
            raise OSError("no samples")
        model(torch.ones(1, 4)).sum().backward()

    with pytest.raises(OSError, match="no samples") as caught:
        optimizer.remember("old", closure)
    assert optimizer.memories == ()
    return str(caught.value)


# --- the guard ------------------------------------------------------------------------------------


def raised_lambda(rank: int) -> tuple[float, float]:
    """Let one rank's part of the old samples be forgotten."""
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), lr=0.1)
    optimizer.consolidate(None)
    values = iter([1.0, 0.5 if rank else 1.0])
    guard = RetentionGuard(
        model, optimizer, [Evaluation("old", lambda model: next(values))], on_breach="raise_lambda"
    )
    guard.start()
    check = guard.check()
    return optimizer.param_groups[0]["ewc_lambda"], check.measured[0].value


def stopped_at(rank: int) -> int:
    """Let the numbers of one rank become NaN after two steps."""
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), lr=0.1)
    steps = [0]

    def measure(model: nn.Module) -> float:
        return float("nan") if rank == 1 and steps[0] >= 2 else 1.0

    guard = RetentionGuard(
        model, optimizer, [Evaluation("old", measure)], on_breach="stop", every=1
    )
    guard.start()
    while not guard.step():
        steps[0] += 1
        torch.distributed.barrier()  # where a rank that went on alone would hang
    return guard.steps


def other_baselines(rank: int) -> str:
    guard = RetentionGuard(
        network(),
        EWCAdamW(network().parameters()),
        [Evaluation("old", lambda model: 1.0)],
        on_breach="stop",
    )
    with pytest.raises(ValueError, match="same numbers in all processes") as caught:
        guard.start({"old": 1.0 + rank})
    return str(caught.value)


def failed_evaluation(rank: int) -> str:
    def measure(model: nn.Module) -> float:
        if rank == 0:
            raise OSError("no file")
        return 1.0

    guard = RetentionGuard(
        network(),
        EWCAdamW(network().parameters()),
        [Evaluation("old", measure)],
        on_breach="stop",
    )
    with pytest.raises(OSError, match="no file") as caught:
        guard.start()
    return str(caught.value)


def way_back(rank: int) -> tuple[float, list[torch.Tensor]]:
    """Go back towards the old weights, of which each rank measures something of its own."""
    model = network()
    old = {name: param.detach().clone() for name, param in model.named_parameters()}
    first = model[0]

    def measure(model: nn.Module) -> float:
        return 1.0 - (rank + 1) * float((first.weight - old["0.weight"]).detach().mean())

    guard = RetentionGuard(
        model, torch.optim.SGD(model.parameters()), [Evaluation("old", measure)], budget=0.3
    )
    guard.start()
    with torch.no_grad():
        first.weight += 1.0
    curve = guard.finish()
    assert curve is not None
    return curve.alpha, [param.detach() for param in model.parameters()]


def way_back_of_parts(rank: int) -> list[Any]:
    """Interpolate a model that is spread, by a guard and by hand; each rank measures its own."""
    found: list[Any] = []
    for by in ("guard", "hand", "anchors", "importance"):
        model = network()
        fully_shard(model)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        old = {name: torch.zeros(value.shape) for name, value in model.named_parameters()}
        optimizer = EWCAdamW(model.named_parameters())
        if by == "anchors":
            optimizer.consolidate(None)

        def measure(model: nn.Module) -> float:
            # What a forward pass sees where all weights are α: 8 α tanh α + α.
            return 1.0 - (rank + 1) * float(model(torch.zeros(1, 4)).mean()) / 9.0

        evaluation = Evaluation("old", measure)
        ones = {name: torch.ones_like(value) for name, value in old.items()}
        guard = RetentionGuard(model, optimizer, [evaluation], budget=0.3)
        guard.start()
        with torch.no_grad():
            for param in model.parameters():
                param += 1.0
        if by == "hand":
            curve = interpolate(model, old, evaluate=evaluation, budget=0.3)
        elif by == "importance":
            curve = interpolate(
                model, old, evaluate=evaluation, budget=0.3, importance=(ones, ones)
            )
        else:
            curve = guard.finish()
        moved = [whole(value) - old[name] for name, value in model.named_parameters()]
        found.append((curve.alpha, max(float((one - curve.alpha).abs().max()) for one in moved)))
    return found


def whose_numbers(rank: int) -> str:
    model = network()
    old = {name: value.detach().clone() + 1.0 for name, value in model.named_parameters()}
    evaluation = Evaluation("old", lambda model: 1.0)
    with pytest.raises(ValueError, match=r"^ranks must be 'mean' where 2 processes") as caught:
        interpolate(model, old, evaluate=evaluation, budget=0.1)
    interpolate(model, old, evaluate=evaluation, budget=0.1, ranks="own")
    interpolate(model, old, 0.5)
    return str(caught.value)


def own_numbers_of_parts(rank: int) -> list[str]:
    """Let each process decide for itself on a model that is spread, and that was evaluated."""
    model = network()
    fully_shard(model)
    old = {name: whole(value).clone() for name, value in model.named_parameters()}
    evaluation = Evaluation("old", lambda model: 1.0)
    with torch.no_grad():
        model(torch.ones(1, 4))  # leaves the weights gathered
    said = []
    for call in (
        lambda: RetentionGuard(
            model, EWCAdamW(model.parameters()), [evaluation], on_breach="stop", ranks="own"
        ),
        lambda: interpolate(model, old, evaluate=evaluation, budget=0.1, ranks="own"),
    ):
        with pytest.raises(ValueError, match=r"^ranks must be 'mean', not 'own'") as caught:
            call()
        said.append(str(caught.value))
        model(torch.ones(1, 4))
    return said


SCENES = (
    own_numbers_of_parts,
    *(way_back_of_parts, whose_numbers),
    *(same_samples, almost_the_same, but_for_a_last_bit, mean_of_own_samples, mean_over_a_group),
    *(other_samples, alone),
    *(one_closure_fails, raised_lambda, stopped_at, other_baselines, failed_evaluation, way_back),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    scenes = {scene.__name__: scene for scene in SCENES}
    return results_of(scenes, 2, tmp_path_factory.mktemp("ranks"))


class TestGEM:
    @pytest.mark.parametrize(
        "name",
        [
            "same_samples",
            "almost_the_same",
            "but_for_a_last_bit",
            "mean_of_own_samples",
            "mean_over_a_group",
        ],
    )
    def test_replicas_stay_the_same(self, results, name):
        first, second = results[name]
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_the_mean_over_ranks_is_the_gradient_of_all_samples(self, results):
        for name in ("mean_of_own_samples", "mean_over_a_group"):
            for a, b in zip(results[name][0], results["same_samples"][0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_other_samples_on_each_rank_are_refused(self, results):
        for said in results["other_samples"]:
            assert re.search("'old' has found another gradient in each of 2 .* ranks='mean'", said)

    def test_processes_that_train_alone_say_so(self, results):
        assert results["alone"] == [1, 1]

    def test_an_error_in_one_closure_is_raised_in_all(self, results):
        assert results["one_closure_fails"] == ["no samples"] * 2

    @pytest.mark.parametrize("ranks", ["sum", 3, "all"])
    def test_bad_ranks(self, ranks):
        with pytest.raises(ValueError, match=r"^ranks must be 'mean', 'own', a process group"):
            GEM(torch.optim.SGD(network().parameters(), lr=0.1), ranks=ranks)


class TestInterpolation:
    def test_parts_go_back_as_far_as_a_whole_model(self, results):
        for found in results["way_back_of_parts"]:
            assert found == results["way_back_of_parts"][0]
            for alpha, error in found:
                assert 8 * alpha * math.tanh(alpha) + alpha == pytest.approx(1.8, rel=0.05)
                assert error < 1e-6

    def test_what_all_have_a_part_of_all_decide_on(self, results):
        assert [len(said) for said in results["own_numbers_of_parts"]] == [2, 2]

    def test_it_must_be_said_whose_numbers_count(self, results):
        assert len(results["whose_numbers"]) == 2


class TestGuard:
    def test_all_raise_lambda_for_the_mean(self, results):
        assert results["raised_lambda"] == [(3.0, 0.75)] * 2

    def test_a_breach_on_one_rank_stops_all_at_the_same_step(self, results):
        assert results["stopped_at"] == [3, 3]

    def test_other_baselines_are_refused(self, results):
        assert len(results["other_baselines"]) == 2

    def test_an_error_in_one_evaluation_is_raised_in_all(self, results):
        assert results["failed_evaluation"] == ["no file"] * 2

    def test_all_go_back_as_far(self, results):
        (alpha, first), (other, second) = results["way_back"]
        assert alpha == other < 1.0
        # Half of the ranks lose α, half 2α: 30 % on average are α = 0.2.
        assert alpha == pytest.approx(0.2, abs=0.02)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
