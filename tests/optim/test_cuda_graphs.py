"""Steps in CUDA graphs: what a replay would not do again is refused, and the rest is replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, Problem, make_params, protect
from optimizer_cases import assert_refused
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import GEM, EWCAdamW, FisherEstimator

SHAPES = [(500,), (31, 5), (4100,)]
REMEDY = r"take one step before the capture, as in the usual warm-up on a side stream\.$"


# --- what is refused ------------------------------------------------------------------------------


class OnGPU(nn.Parameter):
    """A parameter that passes for one on a GPU."""

    is_cuda = True


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Lets torch say that a graph is being captured, or is not any more."""

    def say(whether: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: whether)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: whether)

    yield say
    monkeypatch.undo()


def make(count: int = 2, **options: Any) -> tuple[list[nn.Parameter], EWCAdamW]:
    weights = [OnGPU(torch.full((3,), 1.0 + i)) for i in range(count)]
    named = [(f"w{i}", weight) for i, weight in enumerate(weights)]
    optimizer = EWCAdamW(named, lr=0.1, **options)
    for weight in weights:
        weight.grad = torch.ones(3)
    return weights, optimizer


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def test_a_first_step(capturing):
    weights, optimizer = make()
    capturing(True)
    assert_refused(
        optimizer,
        optimizer.step,
        RuntimeError,
        rf"^the state of parameter w0 would begin inside the CUDA graph.*: {REMEDY}",
    )
    assert not optimizer.state
    capturing(False)
    optimizer.step()
    capturing(True)
    optimizer.step()
    optimizer.step()
    assert int(optimizer.state[weights[0]]["step"]) == 3


def test_a_parameter_that_comes_late(capturing):
    weights, optimizer = make()
    weights[1].grad = None
    for _ in range(4):  # by a plan at last
        optimizer.step()
    weights[1].grad = torch.ones(3)
    capturing(True)
    assert_refused(
        optimizer, optimizer.step, RuntimeError, f"the state of parameter w1 would begin.*{REMEDY}"
    )
    weights[1].grad = None
    optimizer.step()


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("what", ["amsgrad", "kahan", "reset", "sums"])
def test_state_that_begins_later(what, planned, capturing):
    weights, optimizer = make(track_penalty=what == "sums")
    if what == "kahan":
        for weight in weights:
            weight.data, weight.grad = weight.data.bfloat16(), weight.grad.bfloat16()
    for _ in range(4 if planned else 1):
        optimizer.step()
    if what == "amsgrad":
        optimizer.param_groups[0]["amsgrad"] = True
    elif what == "kahan":
        optimizer.param_groups[0]["rounding"] = "kahan"
    else:
        optimizer.consolidate(None, reset_state=what == "reset")
    capturing(True)
    assert_refused(
        optimizer, optimizer.step, RuntimeError, f"the state of parameter w0 would begin.*{REMEDY}"
    )
    capturing(False)
    optimizer.step()
    capturing(True)
    optimizer.step()


def test_protection_alone_begins_nothing(capturing):
    _, optimizer = make()
    optimizer.step()
    optimizer.consolidate(None)
    capturing(True)
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 4])
def test_a_parameter_on_the_host(steps, capturing):
    _, optimizer = make()
    host = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("host", host)]})
    host.grad = torch.ones(3)
    for _ in range(steps):
        optimizer.step()
    if not steps:
        optimizer.param_groups.reverse()
    capturing(True)
    assert_refused(
        optimizer,
        optimizer.step,
        RuntimeError,
        "^parameter host is on cpu, .* outside of the graph.$",
    )


@pytest.mark.parametrize("kind", ["scheduled", "tensor"])
def test_a_learning_rate_that_will_not_change(kind, capturing):
    _, optimizer = make()
    optimizer.step()
    if kind == "scheduled":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    capturing(True)
    with pytest.warns(UserWarning, match="learning rate of group 0 is on the host.*lr=torch.tens"):
        optimizer.step()


def test_what_replaces_tensors_of_a_captured_step(capturing):
    _, optimizer = make()
    optimizer.step()
    optimizer.consolidate(None)  # before the capture, so that there is nothing to say
    saved = copy.deepcopy(optimizer.state_dict())
    for change in (lambda: optimizer.consolidate(None), lambda: optimizer.load_state_dict(saved)):
        capturing(True)
        optimizer.step()
        capturing(False)
        with pytest.warns(UserWarning, match="captured in a CUDA graph before.*the step anew.$"):
            change()
        change()  # once is enough
        optimizer.step()


@pytest.mark.parametrize("inner", ["EWCAdamW", "SGD"])
def test_gem(inner, capturing):
    weights, wrapped = make()
    if inner == "SGD":
        wrapped = torch.optim.SGD(weights, lr=0.1)
    optimizer = GEM(wrapped)
    capturing(True)
    assert_refused(
        optimizer,
        optimizer.step,
        RuntimeError,
        "^a step of GEM cannot be captured .* outside of the graph.$",
    )
    capturing(False)
    optimizer.remember("a", lambda: (weights[0].sum() + weights[1].sum()).backward())
    optimizer.step()
    capturing(True)
    assert_refused(
        optimizer,
        optimizer.step,
        RuntimeError,
        "^a step of GEM cannot be captured .* outside of the graph.$",
    )
    capturing(False)
    optimizer.step()


def test_the_fisher(capturing):
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    fisher = FisherEstimator(model, during_training=True)
    message = r"^a batch cannot be observed while a CUDA graph .*detach\(\) before the capture\.$"

    def train() -> None:
        F.cross_entropy(model(x), y).backward()

    capturing(True)
    with pytest.raises(RuntimeError, match=message), fisher.observe(4):
        train()
    capturing(False)
    optimizer = EWCAdamW(model.named_parameters())
    with fisher.attach(optimizer):
        train()
        optimizer.step()
        capturing(True)
        with pytest.raises(RuntimeError, match=message):
            train()
        capturing(False)
    assert fisher.finalize().samples == 4


# --- what is replayed -----------------------------------------------------------------------------


def warm_up(device: str, step: Callable[[], None], times: int) -> None:
    """Some steps, on a GPU on a side stream as torch's documentation has it."""
    if device == "cpu":
        for _ in range(times):
            step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(device: str, step: Callable[[], None]) -> Callable[[], None]:
    """What replays the step; on a CPU, the step itself."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Side:
    """A problem, its optimizer, and gradients that stay in their places."""

    def __init__(self, problem: Problem, dtype: torch.dtype, **options: Any) -> None:
        self.problem, self.dtype = problem, dtype
        self.device = problem.params[0].device
        named = [(f"p{i}", p) for i, p in enumerate(problem.params)]
        self.optimizer = EWCAdamW(named, fused=True, **{**OFF_DEFAULT, **options})
        self.lr = torch.tensor(3e-3, device=self.device)
        self.optimizer.param_groups[0]["lr"] = self.lr
        protect(self.optimizer, problem)
        self.problem.set_gradients(0, dtype)
        self.grads = [p.grad for p in problem.params]

    def prepare(self, number: int) -> None:
        """Another learning rate and other gradients, in the same memory."""
        self.lr.fill_(3e-3 / (1 + number % 7))
        self.problem.set_gradients(number, self.dtype)
        for grad, p in zip(self.grads, self.problem.params, strict=True):
            p.grad = grad.copy_(p.grad)

    def everything(self) -> list[Tensor]:
        return flat([self.problem.params, [self.optimizer.state[p] for p in self.problem.params]])


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {"penalty": "proximal", "amsgrad": True}),
    "codes": (torch.float32, {"importance_dtype": "log8", "state_dtype": "8bit"}),
    "kahan": (torch.bfloat16, {"rounding": "kahan", "penalty": "decoupled"}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
}


@pytest.fixture
def sides(request: pytest.FixtureRequest, device: str) -> tuple[Side, Side]:
    """The same twice: one to be captured, one that is not."""
    dtype, options = getattr(request, "param", FORMATS["float32"])
    start = Problem.of(make_params(SHAPES, dtype))
    captured, eager = (Side(start.copy(dtype, device), dtype, **options) for _ in range(2))
    return captured, eager


@pytest.mark.parametrize("warm", [1, 3])  # 3: the captured step is a plan's
@pytest.mark.parametrize("sides", FORMATS.values(), ids=FORMATS, indirect=True)
def test_a_hundred_replays_are_a_hundred_steps(sides, warm, device):
    captured, eager = sides
    for side in sides:
        warm_up(device, side.optimizer.step, warm)
    replay = capture(device, captured.optimizer.step)
    for number in range(100):
        for side in sides:
            side.prepare(number)
        replay()
        eager.optimizer.step()
    for a, b in zip(captured.everything(), eager.everything(), strict=True):
        assert torch.equal(a, b)
    assert int(captured.optimizer.state[captured.problem.params[0]]["step"]) == warm + 100


@pytest.mark.parametrize("sides", [(torch.float32, {"track_penalty": True})], indirect=True)
def test_tracked_sums_are_of_each_replay(sides, device):
    captured, eager = sides
    for side in sides:
        warm_up(device, side.optimizer.step, 1)
    replay = capture(device, captured.optimizer.step)
    seen = set()
    for number in range(6):
        for side in sides:
            side.prepare(number)
        expected = captured.optimizer.penalty()  # as the step is going to meet it
        replay()
        eager.optimizer.step()
        penalty = captured.optimizer.last_penalty
        assert torch.equal(penalty, eager.optimizer.last_penalty)
        assert torch.equal(captured.optimizer.last_drift, eager.optimizer.last_drift)
        torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=0)
        seen.add(penalty.item())
    assert len(seen) == 6


def test_scale_and_overflow_are_read_in_each_replay(sides, device):
    captured, eager = sides
    for side in sides:
        side.optimizer.grad_scale = torch.ones((), device=device)
        side.optimizer.found_inf = torch.zeros((), device=device)
        warm_up(device, side.optimizer.step, 1)
    replay = capture(device, captured.optimizer.step)
    for number in range(8):
        for side in sides:
            side.prepare(number)
            side.optimizer.grad_scale.fill_(2.0**number)
            side.optimizer.found_inf.fill_(float(number % 3 == 1))
        before = [t.clone() for t in captured.everything()]
        replay()
        eager.optimizer.step()
        unchanged = [torch.equal(*pair) for pair in zip(before, captured.everything(), strict=True)]
        assert all(unchanged) == (number % 3 == 1)
        for a, b in zip(captured.everything(), eager.everything(), strict=True):
            assert torch.equal(a, b)
    assert int(captured.optimizer.state[captured.problem.params[0]]["step"]) == 1 + 8 - 3


@pytest.mark.gpu
def test_refusals_in_a_capture():
    """Raised where a graph is really being captured, which goes on without harm."""
    weight = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = EWCAdamW([("w", weight)], lr=torch.tensor(0.1, device="cuda"), fused=True)
    gem = GEM(torch.optim.SGD([weight], lr=0.1))
    fisher = FisherEstimator(nn.Linear(3, 2).cuda())
    weight.grad = torch.ones_like(weight)
    counter = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter += 1  # a graph without work would be worth a warning
        with pytest.raises(RuntimeError, match=REMEDY):
            optimizer.step()
        with pytest.raises(RuntimeError, match="a step of GEM cannot be captured"):
            gem.step()
        with pytest.raises(RuntimeError, match="a batch cannot be observed"), fisher.observe(2):
            pass
    assert not optimizer.state
    graph.replay()
    assert counter == 1
    assert (weight == 1).all()


@pytest.mark.gpu
def test_a_whole_training_step():
    """Forward, backward and step in one graph, as torch's documentation has it."""
    x, y = torch.randn(16, 6, device="cuda"), torch.randn(16, 2, device="cuda")
    models, losses = [], []
    for is_captured in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).cuda()
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = EWCAdamW(model.named_parameters(), lr=lr, fused=True)
        optimizer.consolidate(None)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loss = torch.zeros((), device="cuda")

        def step(model=model, optimizer=optimizer, loss=loss) -> None:
            optimizer.zero_grad(set_to_none=True)
            value = F.mse_loss(model(x), y)
            value.backward()
            optimizer.step()
            loss.copy_(value.detach())

        warm_up("cuda", step, 3)
        run = capture("cuda", step) if is_captured else step
        for _ in range(20):
            run()
            scheduler.step()
        models.append(model)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
