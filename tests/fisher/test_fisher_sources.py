"""Other ways to an importance: random signs, MAS, reversed logits, Adam, other libraries'."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import Opaque, all_labels, assert_sums, data_labels, loop, oracle
from torch import Tensor, nn

from cl_optim import EWCAdamW
from cl_optim.fisher import (
    convert_lambda,
    estimate_fisher,
    importance_from_adam,
    published_fisher,
)
from cl_optim.fisher.conventions import CONVENTIONS

CLASSES = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, CLASSES))


def data(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 5), torch.randint(0, CLASSES, (count,))


class Odd(nn.Module):
    """Parameters that no rule covers, one of them used in a way that has a rule as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.odd = nn.Parameter(torch.randn(CLASSES))
        self.both = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + self.both
        return torch.logaddexp(torch.hypot(y, self.odd), self.both)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- parameters without a rule --------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["exact", "empirical"])
def test_random_signs(labels):
    """Unbiased: many draws come close to the exact sums, within what their number allows."""
    model, (x, y) = Odd(), data()
    expected = oracle(model, x, all_labels if labels == "exact" else data_labels(y))
    draws = 400
    importance = estimate_fisher(
        model, [(x[:8], y[:8]), (x[8:], y[8:])], labels, unsupported="sign", sign_draws=draws,
        generator=generator(),
    )  # fmt: skip
    assert set(importance.metadata["sign"]["parameters"]) == {"odd", "both"}
    assert importance.metadata["sign"]["draws"] == draws
    exact = {name: value for name, value in importance.sums.items() if name.startswith("body")}
    assert_sums_of(exact, expected)
    for name in ("odd", "both"):
        error = (importance.sums[name].double() / expected[name] - 1).abs().max()
        assert error < 5 * (2 / draws) ** 0.5, (name, float(error))  # five standard deviations
    assert all(p.grad is None for p in model.parameters())


def assert_sums_of(sums: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=1e-7)


def test_random_signs_with_a_loss_of_its_own():
    model, (x, y) = Odd(), data()

    def losses(model: nn.Module, batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    importance = estimate_fisher(
        model, [(x, y)], "empirical", per_sample_loss=losses, unsupported="sign",
        sign_draws=400, generator=generator(),
    )  # fmt: skip
    expected = oracle(model, x, data_labels(y))
    error = (importance.sums["odd"].double() / expected["odd"] - 1).abs().max()
    assert error < 5 * (2 / 400) ** 0.5


class Hidden(nn.Module):
    """Its odd parameter is seen only when its gradient comes, after all others' if it is first."""

    def __init__(self, first: bool, late: bool) -> None:
        super().__init__()
        self.body, self.odd = mlp(), nn.Parameter(torch.randn(5 if first else CLASSES))
        self.first, self.late = first, late

    def forward(self, x: Tensor) -> Tensor:
        hidden = not self.late or float(x[0, 0]) == 9.0
        use = Opaque.apply if hidden else torch.mul
        return self.body(use(x, self.odd)) if self.first else use(self.body(x), self.odd)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("unsupported", ["sign", "skip"])
def test_found_in_the_backward_pass(unsupported, late, first):
    model, (x, y) = Hidden(first, late), data()
    x[8:, 0] = 9.0
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    arguments = {"labels": "empirical", "unsupported": unsupported, "sign_draws": 300}
    if late and (unsupported == "sign" or first):  # earlier batches lack it, or this one is mixed
        message = r"parameter 'odd' received a gradient .* first met in batch 1, when it had been"
        with pytest.raises(NotImplementedError, match=message):
            estimate_fisher(model, batches, **arguments)
        return
    importance = estimate_fisher(model, batches, generator=generator(), **arguments)
    expected = oracle(model, x, data_labels(y))
    assert_sums_of({n: v for n, v in importance.sums.items() if n != "odd"}, expected)
    if unsupported == "sign":
        error = (importance.sums["odd"].double() / expected["odd"] - 1).abs().max()
        assert error < 5 * (2 / 300) ** 0.5
    else:
        assert "odd" not in importance
        reason = importance.metadata["skipped"]["odd"]
        assert "received a gradient from a use that was not seen" in reason


# --- labels ---------------------------------------------------------------------------------------


def test_exact_is_the_limit_of_sample_and_the_mean_of_signs():
    """The same Fisher information three ways, on a model that is not linear."""
    model, x = mlp(), torch.randn(6, 5)
    exact = estimate_fisher(model, [x], "exact")
    assert_sums(exact, oracle(model, x, all_labels), 1e-5)
    draws = 3000
    sampled = estimate_fisher(
        model, [x.repeat(500, 1)] * (draws // 500), "sample", max_samples=None,
        generator=generator(),
    )  # fmt: skip
    for name, value in exact.items():
        # The relative deviation of a mean over so many draws is about 2 %.
        error = float((sampled[name] - value).norm() / value.norm())
        assert error < 0.1, (name, error)
    odd = Odd()
    signed = estimate_fisher(
        odd, [x], "exact", unsupported="sign", sign_draws=2000, generator=generator()
    )
    expected = oracle(odd, x, all_labels)
    for name in ("odd", "both"):
        error = float((signed.sums[name].double() - expected[name]).norm() / expected[name].norm())
        assert error < 0.1, (name, error)


def test_logits_reversal():
    model, (x, y) = mlp(), data()
    for labels in ("auto", "empirical", "predicted"):
        targets = model(x).argmax(-1) if labels == "predicted" else y

        def one(model: nn.Module, n: int, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy(-model(x[n : n + 1].double()), targets[n : n + 1])

        importance = estimate_fisher(model, [(x, y)], labels, kind="logits_reversal")
        assert_sums(importance, loop(model, one, len(x)), 1e-5)
        assert importance.metadata["kind"] == "logits_reversal"
    # It does not vanish for a confident model, where the Fisher information does.
    confident = copy.deepcopy(model)
    with torch.no_grad():
        confident[3].weight.mul_(1e3)
    sure = confident(x).argmax(-1)
    plain = estimate_fisher(confident, [(x, sure)], "empirical")["3.bias"].sum()
    reversed_ = estimate_fisher(confident, [(x, sure)], kind="logits_reversal")["3.bias"].sum()
    assert plain < 1e-3 < 0.1 < reversed_


@pytest.mark.parametrize("sequences", [False, True])
def test_memory_aware_synapses(sequences):
    """Σ_n |∂‖f(x_n)‖²/∂θ|, with a convolution, a table, a view, and a weight used twice."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 4, 3, padding=1, groups=2)
            self.twice, self.bare = nn.Linear(4, 4), nn.Parameter(torch.randn(6, 4))
            self.head = nn.Linear(4, 9)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.conv(self.table(tokens).mT).mT
            x = self.twice(self.twice(x).tanh()) * (1 + self.bare[1])
            y = self.head(x)
            return y if sequences else y.mean(1)

    model, tokens = Model(), torch.randint(0, 9, (7, 5))
    importance = estimate_fisher(model, [tokens[:4], tokens[4:]], kind="mas")
    wide = copy.deepcopy(model).double()
    named = dict(wide.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(7):
        loss = wide(tokens[n : n + 1]).square().sum()
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            expected[name] += g.abs()
    assert_sums(importance, expected, 1e-5)
    assert importance.metadata["kind"] == "mas"


def test_importance_from_adam():
    model, (x, y) = mlp(), data()
    model[0].bias.requires_grad_(False)
    for make in (torch.optim.Adam, torch.optim.AdamW, EWCAdamW):
        optimizer = make(model.parameters(), lr=0.0, betas=(0.9, 0.5))
        squares = []
        for k in (0, 4, 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x[k : k + 4]), y[k : k + 4]).backward()
            squares.append({n: p.grad**2 for n, p in model.named_parameters() if p.requires_grad})
            optimizer.step()
        importance = importance_from_adam(optimizer, model, batch_size=4)
        for name, value in importance.items():
            a, b, c = (square[name] for square in squares)
            torch.testing.assert_close(value, 4 * (a / 8 + b / 4 + c / 2) / (7 / 8))
        assert set(importance) == set(squares[0])
        assert importance.metadata["estimator"] == "importance_from_adam"


@pytest.mark.parametrize(("state_dtype", "rtol"), [("bfloat16", 0.01), ("8bit", 0.125)])
def test_importance_from_narrow_moments(state_dtype, rtol):
    model = nn.Linear(64, 64)  # 8-bit moments are for 4 096 elements and more
    optimizer = EWCAdamW(model.parameters(), betas=(0.9, 0.5), state_dtype=state_dtype)
    model(torch.randn(16, 64)).square().mean().backward()
    optimizer.step()
    expected = model.weight.grad**2
    found = importance_from_adam(optimizer, model)["weight"]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0)


# --- other libraries ------------------------------------------------------------------------------


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def accumulated(terms) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, grads in terms:
        for name, g in grads.items():
            total[name] = total.get(name, 0.0) + weight * g**2
    return total


def test_published_fishers():
    """Against each library's loop, written out again."""
    model, (x, y) = mlp().double(), data(10)
    x = x.double()
    batches = list(zip(x.split(4), y.split(4), strict=True))  # the last one is short

    avalanche = accumulated(
        (1 / 3, gradients(model, F.cross_entropy(model(a), b))) for a, b in batches
    )

    def mammoth_terms():
        for n in range(10):
            loss = -F.log_softmax(model(x[n : n + 1]), 1)[0, y[n]]
            yield float(torch.exp(-loss.detach())) / (3 * 4), gradients(model, loss)

    def van_de_ven_terms(samples: int, divisor: int):
        for n in range(samples):
            log_p = F.log_softmax(model(x[n : n + 1]), 1)[0]
            for c in range(CLASSES):
                yield float(log_p[c].detach().exp()) / divisor, gradients(model, -log_p[c])

    cases = {
        ("avalanche", None): avalanche,
        ("mammoth", None): accumulated(mammoth_terms()),
        ("van_de_ven", None): accumulated(van_de_ven_terms(10, 9)),
        ("van_de_ven", 6): accumulated(van_de_ven_terms(6, 6)),
        ("van_de_ven", 10): accumulated(van_de_ven_terms(10, 9)),
    }
    for (convention, limit), expected in cases.items():
        found = published_fisher(model, batches, convention, max_samples=limit)
        assert found.metadata["convention"] == convention
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=f"{convention} {limit} {name}")
    limited = published_fisher(model, batches, "avalanche", max_samples=5)
    assert limited.samples == 2


def test_convert_lambda():
    assert convert_lambda(100.0, "kirkpatrick") == 50.0
    assert convert_lambda(50.0, "cl_optim", "van_de_ven") == 100.0
    assert convert_lambda(1.0, "avalanche", batch_size=256) == 1 / 256
    assert convert_lambda(400.0, "trace", batch_size=8) == 25.0
    assert convert_lambda(1.0, "mammoth") == 1.0
    for source in CONVENTIONS:
        for target in CONVENTIONS:
            there = convert_lambda(3.0, source, target, batch_size=16)
            assert convert_lambda(there, target, source, batch_size=16) == pytest.approx(3.0)
    # Gradients of mean zero: Avalanche's F is smaller by the batch size.
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(4000, 3, generator=generator).double()
    with torch.no_grad():
        model.weight.zero_()
    y = torch.randint(0, 2, (4000,), generator=generator)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    theirs = published_fisher(model, batches, "avalanche")["weight"].sum()
    ours = estimate_fisher(model, batches, "empirical", max_samples=None)["weight"].sum()
    a = 7.0 * theirs
    b = convert_lambda(7.0, "avalanche", batch_size=20) * ours
    assert abs(float(a / b) - 1) < 0.15


def test_verify_each_batch():
    """A wrong axis that only a later batch has is found with verify=True alone."""

    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == x.shape[1]:
                return self.head(self.body(x.mT).mT)
            return self.head(self.body(x))

    model = Later()
    batches = [torch.randn(3, 4, 4), torch.randn(4, 4, 4).mT]
    estimate_fisher(model, batches, "predicted")

    class Swapped(Later):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == x.shape[1]:
                return self.head(self.body(x.transpose(0, 1)).transpose(0, 1))
            return self.head(self.body(x))

    model = Swapped()
    estimate_fisher(model, batches, "predicted")
    with pytest.raises(ValueError, match=r"^the self-check failed in batch 1: .*'body\."):
        estimate_fisher(model, batches, "predicted", verify=True)
