"""The streaming Fisher on each device, and in the threads in which autograd runs backward passes.

A backward pass through tensors of a GPU runs in a thread of autograd's own, with the calling
thread's modes but none of its Python state. On a CPU, one that is nested deeply does, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CLASSES, NoSynchronisation, decayed, largest_error, loop
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cl_optim import GEM, EWCAdamW, FisherEstimator, estimate_fisher
from cl_optim.fisher import totals
from cl_optim.fisher.observe.self_check import SelfCheck
from cl_optim.fisher.observe.squares import Squares
from cl_optim.fisher.samples import Samples

N, TOKENS, VOCABULARY = 6, 7, 11
# cuDNN convolves float32 in TF32 unless told otherwise.
TOLERANCE = {"cpu": 2e-5, "cuda": 5e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# --- models ---------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of two narrow ones."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class Transformer(nn.Module):
    """Tokens and positions, attention, a head tied to the tokens, perhaps checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, 8), nn.Embedding(TOKENS, 8)
        layers = [nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, VOCABULARY)
        self.head.weight = self.token.weight
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant, preserve_rng_state=False)
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2),
        nn.Flatten(), nn.Linear(6 * 9, CLASSES),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (9,)),
    "cnn": (cnn, (3, 8, 8)),
    "lora": (lambda: nn.Sequential(LoRA(9, 8), nn.Tanh(), LoRA(8, CLASSES)), (9,)),
    "transformer": (Transformer, ()),
    "checkpointed": (lambda: Transformer(False), ()),
    "checkpointed, reentrant": (lambda: Transformer(True), ()),
}
of_each_model = pytest.mark.parametrize("kind", MODELS)


def make(kind: str, device: str) -> tuple[nn.Module, nn.Module]:
    """The model on its device, and the same in float64 on the host, without checkpoints."""
    model = MODELS[kind][0]()
    twin = Transformer() if isinstance(model, Transformer) else copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    return model.to(device), twin.double()


def batch(kind: str, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs, and a class for each sample or token."""
    generator = torch.Generator().manual_seed(seed)
    if shape := MODELS[kind][1]:
        x, classes = torch.randn(N, *shape, generator=generator), CLASSES
        y = torch.randint(0, classes, (N,), generator=generator)
    else:
        x, y = torch.randint(0, VOCABULARY, (2, N, TOKENS), generator=generator).unbind(0)
    return x.to(device), y.to(device)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of the sum over tokens."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum") / len(y)


def expected(twin: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Σ_n g_n² by single samples, in float64 on the host."""
    x, y = x.cpu(), y.cpu()
    x = x.double() if x.is_floating_point() else x
    return loop(twin, lambda m, n: cross_entropy(m(x[n : n + 1]), y[n : n + 1]), len(x))


def assert_right(fisher: Any, right: dict[str, Tensor], tolerance: float) -> None:
    importance = fisher.finalize() if isinstance(fisher, FisherEstimator) else fisher
    sums = {name: value.cpu() for name, value in importance.sums.items()}
    assert largest_error(sums, right) <= tolerance


@contextlib.contextmanager
def not_waiting(device: str) -> Iterator[None]:
    """Refuse what makes the host wait."""
    if device == "cpu":
        with NoSynchronisation():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- threads --------------------------------------------------------------------------------------


class Nested(torch.autograd.Function):
    """The identity of a loss, whose own backward pass runs inside that of this, so many deep."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, run: Callable[[Tensor], None], depth: int) -> Tensor:
        ctx.run, ctx.depth = run, depth
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.depth == 0:
            ctx.run(grad)
        else:
            with torch.enable_grad():
                leaf = torch.ones((), device=grad.device, requires_grad=True)
                Nested.apply(leaf, ctx.run, ctx.depth - 1).backward(grad)
        return None, None, None


def in_another_thread(loss: Tensor) -> Tensor:
    """A loss whose backward pass autograd continues in a thread of its own, from 60 levels on."""
    leaf = loss.detach().requires_grad_()
    run = functools.partial(torch.autograd.backward, loss, retain_graph=True)
    nested: Tensor = Nested.apply(leaf, run, 62)
    return nested


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The threads in which gradients are squared."""
    idents: set[int] = set()
    capture = Squares.capture

    def recorded(self: Squares, *args: Any) -> Any:
        idents.add(threading.get_ident())
        return capture(self, *args)

    monkeypatch.setattr(Squares, "capture", recorded)
    return idents


@of_each_model
def test_observed_in_a_thread_of_autograd(kind, device, threads):
    model, twin = make(kind, device)
    fisher = FisherEstimator(model)
    batches = [batch(kind, seed, device) for seed in range(2)]
    for x, y in batches:
        with fisher.observe(N):
            in_another_thread(cross_entropy(model(x), y)).backward()
    assert_right(fisher, decayed(expected(twin, *each) for each in batches), TOLERANCE[device])
    assert fisher.finalize().samples == 2 * N
    assert threads
    assert threading.get_ident() not in threads


@of_each_model
def test_attached_in_a_thread_of_autograd(kind, device, threads):
    """Beside a memory of GEM, whose backward passes run in such a thread, too, and do not count."""
    model, twin = make(kind, device)
    optimizer = GEM(EWCAdamW(model.named_parameters(), lr=1e-2))
    fisher = FisherEstimator(model, during_training=True, decay=0.7)
    fisher.attach(optimizer)
    old = batch(kind, 99, device)

    def remember() -> None:
        in_another_thread(cross_entropy(model(old[0]), old[1])).backward()

    optimizer.remember("old", remember)
    parts = []
    for seed in range(3):
        x, y = batch(kind, seed, device)
        twin.load_state_dict(model.state_dict())
        parts.append(expected(twin, x, y))
        optimizer.zero_grad()
        in_another_thread(cross_entropy(model(x), y)).backward()
        optimizer.step()
    assert_right(fisher, decayed(parts, 0.7), TOLERANCE[device])
    assert threads
    assert threading.get_ident() not in threads


def test_a_failure_in_a_thread_of_autograd(device):
    """The error arrives where backward was called, and the estimator knows of it."""
    model, _ = make("mlp", device)
    fisher = FisherEstimator(model)
    x, y = batch("mlp", 0, device)

    def twice() -> None:
        loss = cross_entropy(model(x), y)
        for _ in range(2):
            in_another_thread(loss).backward()

    with pytest.raises(RuntimeError, match="a second backward pass"), fisher.observe(N):
        twice()
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()


def test_two_threads_of_one_backward_pass(monkeypatch):
    """As where a model is on two devices: none adds before the sums are in the batch's units."""
    towers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    x = torch.randn(N, 3)

    def losses(m: nn.Module, x: Tensor) -> list[Tensor]:
        return [tower(x).square().sum() for tower in m]

    right = loop(towers, lambda m, n: sum(losses(m, x[n : n + 1].double())), N)
    fisher = FisherEstimator(towers)
    with fisher.observe(N, loss_terms=1):
        sum(losses(towers, x)).backward()
    scale, scaling, go_on = totals._scale, threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        scaling.set()
        go_on.wait(0.2)  # time for the other thread to add, if it does not wait
        scale(*arguments)

    monkeypatch.setattr(totals, "_scale", slowly)
    with fisher.observe(N, loss_terms=1, loss_scale=8.0):
        first, second = (8 * loss for loss in losses(towers, x))
        thread = threading.Thread(target=first.backward)
        thread.start()
        assert scaling.wait(10)
        second.backward()
        go_on.set()
        thread.join()
    assert_right(fisher, decayed([right, right]), 1e-5)


def test_packed_samples_on_two_devices():
    samples = Samples(2, [0, 1, 3])
    for device in ("cpu", "meta"):
        rows = torch.ones(3, 4, device=device)
        assert samples.sum(rows, 1).device == rows.device
        assert samples.cu_seqlens(rows).device == rows.device


# --- the device -----------------------------------------------------------------------------------


@of_each_model
def test_observed(kind, device):
    """From the second batch on without waiting; the gradients are those of training without."""
    model, twin = make(kind, device)
    plain = copy.deepcopy(model)
    fisher = FisherEstimator(model)
    batches = [batch(kind, seed, device) for seed in range(3)]
    for number, (x, y) in enumerate(batches):
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.grad = None
        with not_waiting(device) if number else contextlib.nullcontext(), fisher.observe(N):
            cross_entropy(model(x), y).backward()
        cross_entropy(plain(x), y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None
            else:
                scale = float(q.grad.abs().max())
                torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-3 * scale + 1e-7)
    assert_right(fisher, decayed(expected(twin, *each) for each in batches), TOLERANCE[device])


@of_each_model
def test_attached(kind, device):
    """Once the first step has shown what the loss is multiplied by, nothing waits."""
    model, twin = make(kind, device)
    optimizer = EWCAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    fisher = FisherEstimator(model, during_training=True, decay=0.9)
    parts = []
    with fisher.attach(optimizer):
        for seed in range(4):
            x, y = batch(kind, seed, device)
            twin.load_state_dict(model.state_dict())
            parts.append(expected(twin, x, y))
            optimizer.zero_grad()
            with not_waiting(device) if seed else contextlib.nullcontext():
                cross_entropy(model(x), y).backward()
                if device == "cuda":  # a step on the host may read what it likes
                    optimizer.step()
            if device == "cpu":
                optimizer.step()
    assert_right(fisher, decayed(parts, 0.9), TOLERANCE[device])


@of_each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_scaler(kind, dtype, device):
    """An overflowed batch is dropped, on the device; the rest is right within the dtype."""
    model, twin = make(kind, device)
    optimizer = EWCAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**7, enabled=dtype == torch.float16)
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer, scaler=scaler if scaler.is_enabled() else None)
    parts = []
    for seed in range(4):
        x, y = batch(kind, seed, device)
        twin.load_state_dict(model.state_dict())
        overflows = seed == 2 and scaler.is_enabled()
        if not overflows:
            parts.append(expected(twin, x, y))
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            logits = model(x)
        loss = cross_entropy(logits, y)
        scaler.scale(loss * torch.inf if overflows else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    importance = fisher.finalize()
    assert_right(importance, decayed(parts), {torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype])
    assert importance.samples == len(parts) * N
    assert importance.metadata.get("dropped_samples", 0) == (4 - len(parts)) * N
    assert all(value.dtype == torch.float32 for value in importance.values())


@of_each_model
@pytest.mark.parametrize("labels", ["empirical", "predicted", "sample"])
def test_estimated(kind, labels, device):
    model, twin = make(kind, device)
    batches = [batch(kind, seed, device) for seed in range(2)]
    generator = torch.Generator().manual_seed(7)
    options = {"labels": labels, "max_samples": N + 2, "generator": generator}
    importance = estimate_fisher(model, batches, **options)
    assert importance.samples == N + 2
    model.eval()
    twin.eval()
    generator.manual_seed(7)
    parts = []
    for x, y in [batches[0], (batches[1][0][:2], batches[1][1][:2])]:
        # Of this very model, so that rounding decides nothing.
        p = model(x).detach().softmax(-1).cpu()
        if labels == "predicted":
            y = p.argmax(-1)
        elif labels == "sample":
            y = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(y.shape)
        parts.append(expected(twin, x, y))
    assert_right(importance, decayed(parts), TOLERANCE[device])


def test_exact_labels(device):
    model, twin = make("mlp", device)
    x, _ = batch("mlp", 0, device)
    p = twin(x.cpu().double()).detach().softmax(-1)
    right: dict[str, Tensor] = {}
    for n in range(N):
        for label in range(CLASSES):
            y = torch.full((1,), label)
            for name, value in expected(twin, x[n : n + 1], y).items():
                right[name] = right.get(name, 0.0) + p[n, label] * value
    assert_right(estimate_fisher(model, [x], "exact"), right, TOLERANCE[device])


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_packed(kind, device):
    """Sequences of different lengths, one after the other."""
    lengths = [3, 1, 0, 4]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    if kind == "mlp":
        model, x = mlp(), torch.randn(1, 8, 9)
    else:
        model = nn.Sequential(nn.Embedding(VOCABULARY, 9), mlp())
        x = torch.randint(0, VOCABULARY, (1, 8))
    y = torch.randint(0, 5, (8,))
    wide = x.double() if x.is_floating_point() else x

    def of(m: nn.Module, n: int) -> Tensor:
        part = slice(offsets[n], offsets[n + 1])
        return F.cross_entropy(m(wide[:, part])[0], y[part], reduction="sum")

    right = loop(model, of, 4)
    model = model.to(device)
    fisher = FisherEstimator(model)
    x, y = x.to(device), y.to(device)
    for number in range(2):
        reads_offsets = number == 0 or device == "cpu"
        with (
            contextlib.nullcontext() if reads_offsets else not_waiting(device),
            fisher.observe(cu_seqlens=offsets, loss_terms=1),
        ):
            F.cross_entropy(model(x)[0], y, reduction="sum").backward()
    assert_right(fisher, decayed([right, right]), TOLERANCE[device])


# --- what a GPU rounds ----------------------------------------------------------------------------


@pytest.fixture
def convolve_in() -> Iterator[Callable[[str], None]]:
    """Sets in what a GPU convolves float32, for the time of a test."""
    conv = torch.backends.cudnn.conv  # its attributes are not ones that monkeypatch can undo
    before = conv.fp32_precision
    yield lambda precision: setattr(conv, "fp32_precision", precision)
    conv.fp32_precision = before


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_self_check_knows_of_tf32(precision, convolve_in):
    """Ten times its rounding is allowed, and no more; a GPU's tensor need only be looked at."""
    convolve_in(precision)
    with FakeTensorMode():
        on_gpu = torch.ones(3, device="cuda")
    errors = {"rounded": 3e-3, "wrong": 2e-2, "small": 0.1}
    for tensor, allowed in ((on_gpu, precision == "tf32"), (torch.ones(3), False)):
        check = SelfCheck()
        for name, error in errors.items():
            grad, noise = torch.randn(2, 64, 80) * (1e-3 if name == "small" else 1.0)
            check.lower(name, tensor)
            check.receive(name, grad)
            check.capture(name, grad + error * noise, grad.norm())
        assert set(check.finish()) == ({"wrong"} if allowed else set(errors))
