"""Optimizers on each device: steps left out, scaled gradients, streams, several devices at once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, Problem, make_params, protect
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import GEM, EWCAdamW, FisherEstimator, estimate_fisher

INNER: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "EWCAdamW": lambda model: EWCAdamW(model.named_parameters(), lr=1e-2, fused=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


def make_model(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 70), nn.Tanh(), nn.Linear(70, 4)).to(device)


def data(seed: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 6, generator=generator), torch.randint(0, 4, (12,), generator=generator)
    return x.to(device), y.to(device)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def remember(optimizer: GEM, model: nn.Module, device: str, tasks: int = 2) -> None:
    for task in range(tasks):
        batch = data(1000 + task, device)
        optimizer.remember(str(task), lambda batch=batch: loss_of(model, batch).backward())


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and state."""
    params = list(model.parameters())
    states = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*params, *states)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@contextlib.contextmanager
def not_waiting(device: str) -> Iterator[None]:
    """On a GPU it is an error to wait for it."""
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")


# --- steps that are left out, and scaled gradients ------------------------------------------------


@pytest.mark.parametrize("where", ["gradient", "row"])
@pytest.mark.parametrize("planned", [False, True])
def test_gem_leaves_out_an_invalid_step_of_ewc_adamw(planned, where, device):
    """It is as if it had not been, and nothing waits."""
    results = []
    for invalid in (True, False):
        model = make_model(device)
        inner = INNER["EWCAdamW"](model)
        inner.consolidate(None)
        optimizer = GEM(inner, on_invalid="skip")
        remember(optimizer, model, device)
        factor = torch.ones((), device=device)
        batch = data(2000, device)
        optimizer.remember("x", lambda m=model, f=factor, b=batch: (f * loss_of(m, b)).backward())
        for seed in range(4 if planned else 1):
            optimizer.zero_grad()
            loss_of(model, data(seed, device)).backward()
            optimizer.step()
        if invalid:
            optimizer.zero_grad()
            loss_of(model, data(50, device)).backward()
            if where == "gradient":
                model[0].weight.grad[0, 0] = torch.nan
            else:
                factor.fill_(torch.inf)
            before = everything(model, optimizer)
            with not_waiting(device):
                optimizer.step()
            assert same(everything(model, optimizer), before)
            assert (optimizer.last_projection.status < 0).all()
            factor.fill_(1.0)
        for seed in range(10, 13):
            optimizer.zero_grad()
            loss_of(model, data(seed, device)).backward()
            with not_waiting(device):
                optimizer.step()
            assert (optimizer.last_projection.status >= 0).all()
        results.append(everything(model, optimizer))
    assert same(*results)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_a_scaler_around_gem(inner, unscale, device):
    """Rows are not scaled, and what is projected is unscaled; an overflow leaves the step out."""
    results = []
    for scaled in (True, False):
        model = make_model(device)
        optimizer = GEM(INNER[inner](model), memory_strength=0.1)
        remember(optimizer, model, device)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=2, enabled=scaled)
        active = 0
        for seed in range(7):
            optimizer.zero_grad()
            loss = -loss_of(model, data(seed, device))  # against the memories
            if seed == 3:
                if not scaled:
                    continue
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            before = everything(model, optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert same(everything(model, optimizer), before) == (seed == 3)
            active += int(optimizer.last_projection.active.sum()) if seed != 3 else 0
        assert active > 0
        if scaled:
            assert scaler.get_scale() == 2.0**12 * 2 / 2 * 2
        results.append(everything(model, optimizer))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- streams --------------------------------------------------------------------------------------


@contextlib.contextmanager
def late_on_a_side_stream(device: str) -> Iterator[None]:
    """On a GPU, let what is begun here run on another stream, and not before others use memory."""
    if device == "cpu":
        yield
        return
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(60_000_000)  # some 30 ms
        yield
    # What was allocated for this stream, and freed while work on the other waits, would be hit.
    for size in (64, 1024, 2**14, 2**18, 2**21):
        for _ in range(4):
            torch.empty(size, device=device).fill_(torch.nan)
    here.wait_stream(stream)


@pytest.mark.parametrize("inner", ["EWCAdamW", "SGD"])
@pytest.mark.parametrize("gem", [False, True])
def test_steps_on_a_side_stream(gem, inner, device):
    """Each second step, with its backward pass, that of the memories, and the Fisher's sums."""
    results = []
    for aside in (False, True):
        model = make_model(device)
        optimizer = INNER[inner](model)
        if inner == "EWCAdamW":
            optimizer.consolidate(None)
        if gem:
            optimizer = GEM(optimizer, track_update=True)
            remember(optimizer, model, device)
        fisher = FisherEstimator(model)
        for seed in range(8):
            batch = data(seed, device)
            optimizer.zero_grad()
            with late_on_a_side_stream(device) if aside and seed % 2 else contextlib.nullcontext():
                with fisher.observe(12):
                    loss_of(model, batch).backward()
                optimizer.step()
        sums = list(fisher.finalize().sums.values())
        results.append([*everything(model, optimizer), *sums])
        if gem:
            results[-1] += [optimizer.last_projection.update_dot, optimizer.conflicts()]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- several devices ------------------------------------------------------------------------------

OTHER_GPU = pytest.param(
    "cuda:1",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), OTHER_GPU])
def test_it_does_not_matter_which_device_is_the_current_one(device):
    """Everything as on the host, where the parameters may be on a GPU that is not the current."""
    results = []
    for place in (device, "cpu"):
        model = make_model(place)
        inner = INNER["EWCAdamW"](model)
        batches = [data(seed, place) for seed in range(6)]
        inner.consolidate(estimate_fisher(model, batches[:2], "exact"))
        optimizer = GEM(inner, track_update=True)
        remember(optimizer, model, place)
        fisher = FisherEstimator(model, during_training=True, decay=0.9)
        fisher.attach(optimizer)
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        projection = optimizer.last_projection
        assert projection.v.device == next(model.parameters()).device
        sums = fisher.finalize().sums.values()
        values = [*everything(model, optimizer), *sums, optimizer.penalty(), projection.update_dot]
        results.append([value.cpu() for value in values])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("second", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
def test_two_devices_in_one_optimizer(implementation, second):
    """Steps, scale, overflow, tracked sums, state dicts: as with all on the host."""
    start = Problem.of(make_params([(100,), (9, 7), (5000,)], torch.float32))
    results = []
    for devices in (("cpu", second, second), ("cpu",) * 3):
        problem = start.copy(torch.float32)
        for lists in (problem.params, problem.importances, problem.anchors):
            lists[:] = [t.detach().to(d) for t, d in zip(lists, devices, strict=True)]
        problem.params[:] = [nn.Parameter(p) for p in problem.params]

        def make(problem: Problem = problem) -> EWCAdamW:
            named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
            return EWCAdamW(named, **OFF_DEFAULT, **implementation, track_penalty=True)

        optimizer = make()
        protect(optimizer, problem)
        for step in range(6):
            if step == 4:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make()
                optimizer.load_state_dict(saved)
            problem.set_gradients(step, torch.float32)
            optimizer.grad_scale = torch.tensor(2.0**step, device=devices[step % 2])
            optimizer.found_inf = torch.tensor(float(step == 2), device=devices[step % 2])
            optimizer.step()
        assert [optimizer.state[p]["step"].device for p in problem.params] == [
            p.device for p in problem.params
        ]
        numbers = [optimizer.penalty(), optimizer.last_penalty, optimizer.last_drift]
        results.append([t.cpu() for t in (*problem.params, *numbers)])
        assert [int(optimizer.state[p]["step"]) for p in problem.params] == [5, 5, 5]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
