"""FisherEstimator attached to ordinary training."""

import contextlib
import copy
import gc
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import (
    CLASSES,
    NoSynchronisation,
    assert_sums,
    attached,
    batches,
    data_labels,
    decayed,
    largest_error,
    mlp,
    oracle,
)
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from cl_optim import GEM, EWCAdamW, FisherEstimator, estimate_fisher


def of_batch(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return oracle(model, x, data_labels(y))


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "EWCAdamW": lambda model: EWCAdamW(model.named_parameters(), lr=1e-2),
}


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_attached(optimizer, decay):
    """Sums and counts decay once per step; the training itself is what it would be without."""
    model, plain = mlp(), None
    plain = copy.deepcopy(model)
    steps, other = OPTIMIZERS[optimizer](model), OPTIMIZERS[optimizer](plain)
    fisher = FisherEstimator(model, during_training=True, decay=decay)
    fisher.attach(steps)
    parts = []
    for x, y in batches(5):
        parts.append(of_batch(model, x, y))
        for m, o in ((model, steps), (plain, other)):
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    importance = fisher.finalize()
    assert_sums(importance, decayed(parts, decay), 2e-5)
    assert importance.samples == pytest.approx(6 * sum(decay**k for k in range(1, 6)))
    assert importance.metadata["decay"] == decay
    assert importance.metadata["during_training"] is True
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_accumulation():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=True, decay=0.5)
    fisher.attach(optimizer, accumulation_steps=2)
    parts = []
    for _ in range(3):
        data = batches(2, size=4)
        both = [of_batch(model, x, y) for x, y in data]
        parts.append({name: both[0][name] + both[1][name] for name in both[0]})
        for x, y in data:
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_sums(fisher.finalize(), decayed(parts, 0.5), 1e-5)
    assert fisher.finalize().samples == 8 * (0.5 + 0.25 + 0.125)


def test_loss_terms_vary():
    """Sums are kept in the units of the last batch, whatever a batch's loss was divided by."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=True)
    divisors = iter([3.0, torch.tensor(1e4), 1e-3, torch.tensor(2.0)])
    used: list = []

    def terms(args, kwargs):
        used.append(next(divisors))
        return used[-1]

    parts = []
    with fisher.attach(optimizer, loss_terms=terms):
        for x, y in batches(4):
            parts.append(of_batch(model, x, y))
            loss = F.cross_entropy(model(x), y, reduction="sum") / used[-1]
            optimizer.zero_grad()
            loss.backward()
            for p in model.parameters():
                p.grad.mul_(float(used[-1]) / 6)
            optimizer.step()
    assert_sums(fisher.finalize(), decayed(parts), 1e-5)


def test_autocast():
    """Backward under autocast, too, which torch does not recommend."""
    model = mlp()
    x, y = batches(1, size=16)[0]
    expected = of_batch(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for verify, inside in ((True, False), (False, True)):
        fisher = FisherEstimator(model, during_training=True, verify=verify)
        with fisher.attach(optimizer):
            context = torch.autocast("cpu", torch.bfloat16)
            with context:
                loss = F.cross_entropy(model(x).float(), y)
            with context if inside else contextlib.nullcontext():
                loss.backward()
            optimizer.step()
        assert_sums(fisher.finalize(), expected, 5e-2)
        assert all(value.dtype == torch.float32 for value in fisher.finalize().values())


def test_grad_scaler():
    """An overflowed batch is dropped whole, on the device, and counted; the scale may change."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    fisher = FisherEstimator(model, during_training=True, decay=0.5, verify=False)
    fisher.attach(optimizer, scaler=scaler)
    parts = []
    for k, (x, y) in enumerate(batches(6)):
        part = of_batch(model, x, y)
        with NoSynchronisation():
            loss = F.cross_entropy(model(x), y)
            if k in (1, 4):
                loss = loss * 1e38  # the scaled gradients overflow
            scaler.scale(loss).backward()
        weights = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        stepped = not all(map(torch.equal, weights, model.parameters()))
        assert stepped == (k not in (1, 4))
        if stepped:
            parts.append(part)
    importance = fisher.finalize()
    assert_sums(importance, decayed(parts, 0.5), 2e-5)
    assert importance.samples == pytest.approx(6 * sum(0.5**k for k in range(1, 5)))
    assert importance.metadata["dropped_samples"] == 12


def test_a_state_brings_everything_back():
    """Also into an estimator in the middle of a batch, with a scaler, attached."""

    def begin():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        fisher = FisherEstimator(model, during_training=True, decay=0.5)
        fisher.attach(optimizer, scaler=scaler)
        return model, optimizer, scaler, fisher

    def train(model, optimizer, scaler, data):
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()

    data = batches(6)
    model, optimizer, scaler, fisher = begin()
    train(model, optimizer, scaler, data[:3])
    state = copy.deepcopy(fisher.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, scaler, data[3:])
    expected = fisher.finalize()

    other, optimizer, scaler, resumed = begin()
    other.load_state_dict(weights)
    x, y = data[0]
    F.cross_entropy(other(x), y).backward()  # was begun, and is dropped
    resumed.load_state_dict(state)
    train(other, optimizer, scaler, data[3:])
    found = resumed.finalize()
    for estimator in (fisher, resumed):
        estimator.detach()
    assert found.samples == expected.samples
    assert all(torch.equal(found.sums[name], value) for name, value in expected.sums.items())


def test_no_state_in_the_middle_of_a_batch():
    model, (x, y) = mlp(), batches(1)[0]
    fisher = FisherEstimator(model)
    with fisher.observe(batch_size=len(x)):
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(RuntimeError, match=r"inside observe\(\) there is no state"):
            fisher.state_dict()
        with pytest.raises(RuntimeError, match=r"cannot be loaded inside observe"):
            fisher.load_state_dict({"sums": fisher._totals.sums})
    assert fisher.state_dict()["batches"] == 1


def test_memories_of_gem_are_not_counted():
    model = mlp()
    alone, ((old_x, old_y), *data) = copy.deepcopy(model), batches(4)
    found = []
    for each, remembers in ((alone, False), (model, True)):
        optimizer = GEM(EWCAdamW(each.named_parameters(), lr=0.0, weight_decay=0.0))
        fisher = FisherEstimator(each, during_training=True)
        fisher.attach(optimizer)
        if remembers:
            optimizer.remember("old", lambda: F.cross_entropy(model(3 * old_x), old_y).backward())
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(each(x), y).backward()
            optimizer.step()
        found.append(fisher.finalize())
        fisher.detach()
    assert found[1].samples == found[0].samples == 18
    for name, value in found[0].sums.items():
        torch.testing.assert_close(found[1].sums[name], value)


def test_only_overflows():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=True, verify=False)
    fisher.attach(optimizer, scaler=torch.amp.GradScaler("cpu"))
    x, y = batches(1)[0]
    (F.cross_entropy(model(x), y) * math.inf).backward()
    with pytest.raises(ValueError, match="every batch overflowed and was dropped"):
        fisher.finalize()


def test_observing_does_not_wait_for_the_device():
    """Tied embedding and head, positions, convolutions: none needs a value on the host."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(4)
            self.head = nn.Linear(4, 9)
            self.head.weight = self.token.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.token(tokens) + self.position(torch.arange(5))
            return self.head(self.norm(self.conv(x.mT).mT))

    model, tokens = Model(), torch.randint(0, 9, (3, 5))
    fisher = FisherEstimator(model, verify=False)
    with NoSynchronisation():
        for scale in (1.0, torch.tensor(8.0)):
            with fisher.observe(3, loss_terms=torch.tensor(15), loss_scale=scale):
                (F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()) * scale).backward()
        fisher.apply_decay()
    assert fisher.finalize().samples == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Model(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 9), nn.Linear(9, CLASSES)
            self.block = nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(2):  # the block is used twice
                if self.checkpointed:
                    x = checkpoint(self.block, x, use_reentrant=reentrant)
                else:
                    x = self.block(x)
            return self.last(x)

    model, plain = Model(True), Model(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=True)
    parts = []
    with fisher.attach(optimizer):
        for x, y in batches(3):
            plain.load_state_dict(model.state_dict())
            parts.append(of_batch(plain, x, y))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert_sums(fisher.finalize(), decayed(parts), 1e-5)


class TokenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor, labels: Tensor | None = None, num_items_in_batch=None):
        logits = self.head(self.body(ids).tanh())
        if labels is None:
            return logits
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (
            (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        )


def test_mean_over_tokens():
    """As the losses in transformers are; ``num_items_in_batch`` is what the Trainer divides by."""
    model = TokenModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ids, labels = torch.randint(0, 9, (4, 6)), torch.randint(0, 9, (4, 6))
    labels[torch.rand(4, 6) < 0.3] = -100
    expected = of_batch(model, ids, labels)
    for items in (None, 7):
        fisher = FisherEstimator(model, during_training=True)
        with fisher.attach(optimizer, loss_terms="tokens"):
            model(ids, labels=labels, num_items_in_batch=items).backward()
            optimizer.step()
        assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.mark.parametrize("terms", ["tokens", lambda args, kw: int((kw["labels"] != -100).sum())])
@pytest.mark.parametrize("place", [0, 1])
def test_a_batch_without_a_target_adds_nothing(place, terms):
    """Its loss is 0/0, and its gradients are 0: a truncated prompt, say."""
    model = TokenModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ids, labels = torch.randint(0, 9, (2, 4, 6)), torch.randint(0, 9, (2, 4, 6))
    nothing = torch.full_like(labels[0], -100)
    given = [*zip(ids, labels, strict=True)]
    expected: dict[str, Tensor] = {}
    for x, y in given:
        for name, value in of_batch(model, x, y).items():
            expected[name] = expected.get(name, 0.0) + value
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer, loss_terms=terms):
        for x, y in [*given[:place], (ids[0], nothing), *given[place:]]:
            optimizer.zero_grad()
            model(x, labels=y).backward()
            optimizer.step()
    assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.fixture(autouse=True, scope="module")
def nothing_of_other_files():
    gc.collect()


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


@pytest.mark.parametrize("until", ["the forward pass", "the backward pass", "a step"])
def test_dropped_before_its_end(until):
    """Nothing global is left of an estimator that nobody has, though it was never detached."""

    def begin() -> None:
        model = nn.Sequential(Normalised(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        FisherEstimator(model, during_training=True).attach(optimizer)
        loss = model(torch.randn(6, 5)).square().mean()
        assert torch_module._global_forward_hooks
        if until != "the forward pass":
            loss.backward()
        if until == "a step":
            optimizer.step()

    begin()
    gc.collect()
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


def test_leaves_nothing_behind():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=True)
    x, y = batches(1)[0]
    handle = fisher.attach(optimizer)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    F.cross_entropy(model(x), y).backward()
    for other in copies:  # copies of the model are not observed
        F.cross_entropy(other(x), y).backward()
    handle.remove()
    fisher.detach()
    assert fisher.finalize().samples == 6
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    optimizer.step()


def test_forward_passes_without_a_backward_pass():
    """A forward pass with gradients whose loss is not used; an error in the forward pass."""
    model = mlp()
    fisher, optimizer = attached(model)
    x, y = batches(1)[0]
    model(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(6, 3))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batch(model, x, y), 1e-5)
    assert fisher.finalize().samples == 6


def test_an_attached_estimator_is_used_alone():
    model, (x, y) = mlp(), batches(1)[0]
    fisher, optimizer = attached(model)
    with pytest.raises(RuntimeError, match="attached already"):
        fisher.attach(optimizer)
    with (
        pytest.raises(RuntimeError, match=r"inside another observe\(\), or att"),
        fisher.observe(6),
    ):
        pass
    with pytest.raises(RuntimeError, match="no batch was observed before it: call"):
        optimizer.step()
    loss = F.cross_entropy(model(x), y)
    fisher.detach()
    with pytest.raises(RuntimeError, match=r"after the observe\(\) of its forward pass had"):
        loss.backward()


def test_double_backward():
    model = mlp()
    x, y = batches(1)[0]
    fisher = FisherEstimator(model)
    message = r"reached parameters '4\.weight', '4\.bias' has create_graph=True: squared gradients"
    with pytest.raises(NotImplementedError, match=message), fisher.observe(6):
        F.cross_entropy(model(x), y).backward(create_graph=True)


def test_skip():
    """What is not supported is left out, and listed; the gradients are as without."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.odd = mlp(), nn.Parameter(torch.randn(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return torch.logaddexp(self.body(x), self.odd) + self.odd

    model, (x, y) = Odd(), batches(1)[0]
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    fisher = FisherEstimator(model, unsupported="skip")
    for _ in range(2):
        model.zero_grad()
        with fisher.observe(6):
            F.cross_entropy(model(x), y).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    importance = fisher.finalize()
    assert set(importance.metadata["skipped"]) == {"odd"}
    assert "torch.logaddexp uses parameter 'odd'" in importance.metadata["skipped"]["odd"]
    expected = of_batch(model, x, y)
    assert expected.pop("odd").any()
    assert_sums(importance, {name: 2 * value for name, value in expected.items()}, 1e-5)


def test_step_by_hand():
    """observe() with decay: one step() per optimizer step."""
    model = mlp()
    fisher = FisherEstimator(model, decay=0.25)
    parts = []
    for x, y in batches(3):
        parts.append(of_batch(model, x, y))
        with fisher.observe(6):
            F.cross_entropy(model(x), y).backward()
        fisher.apply_decay()
    assert_sums(fisher.finalize(), decayed(parts, 0.25), 1e-5)


def test_compiled_models():
    """They are run uncompiled while they are observed, and compiled again afterwards."""
    model, (x, y) = mlp(), batches(1)[0]
    expected = of_batch(model, x, y)
    runs: list[int] = []

    def backend(graph, inputs):
        return lambda *args: (runs.append(1), graph(*args))[1]

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    assert runs == [1]
    fisher = FisherEstimator(model)
    with fisher.observe(6):
        F.cross_entropy(compiled(x), y).backward()
    assert_sums(fisher.finalize(), expected, 1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = FisherEstimator(compiled, during_training=True)
    with fisher.attach(optimizer):
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    assert runs == [1]
    own = estimate_fisher(compiled, [(x, y)], "empirical", verify=False)
    for importance in (fisher.finalize(), own):
        sums = {name.removeprefix("_orig_mod."): total for name, total in importance.sums.items()}
        assert largest_error(sums, expected) <= 1e-5
    assert runs == [1]
    compiled.train()(x)
    assert runs == [1, 1]


def test_a_model_compiled_in_place():
    model, (x, y) = mlp(), batches(1)[0]
    expected = of_batch(model, x, y)
    runs: list[int] = []
    model.compile(backend=lambda graph, inputs: lambda *args: (runs.append(1), graph(*args))[1])
    model(x)
    once = list(runs)  # torch 2.10 does not compile a Sequential
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_sums(fisher.finalize(), expected, 1e-5)
    assert runs == once
    model(x)
    assert runs == once + once


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_after_attach_is_refused(in_place):
    model, (x, _) = mlp(), batches(1)[0]
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(torch.optim.SGD(model.parameters(), lr=0.0)):
        if in_place:
            model.compile(backend="eager")
        compiled = model if in_place else torch.compile(model, backend="eager")
        with pytest.raises(RuntimeError, match=r"what torch\.compile returned"):
            compiled(x)


def test_a_compiled_model_around_the_observed_one_is_refused():
    """When it is called, or, where its code was made without the hooks, at the step."""
    model, (x, y) = mlp(), batches(1)[0]
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def train() -> None:
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()

    fisher = FisherEstimator(model, during_training=True)
    match = r"what torch\.compile returned"
    with fisher.attach(optimizer), pytest.raises(RuntimeError, match=match):
        train()
