"""FisherEstimator and estimate_fisher against a float64 loop over single samples.

The loop is plain autograd on a float64 copy of the model and shares no code with the package.
"""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import (
    TOLERANCE,
    Opaque,
    all_labels,
    assert_sums,
    data_labels,
    mean_loss,
    oracle,
    predicted_labels,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim.fisher import FisherEstimator, estimate_fisher
from cl_optim.fisher.objective import _log_once

CLASSES = 5
VOCABULARY = 13


# --- models ---------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(7, 11),
            nn.LayerNorm(11, eps=0.3),
            nn.ReLU(inplace=True),
            nn.Linear(11, 9, bias=False),
            nn.LayerNorm(9, elementwise_affine=False),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Transformer(nn.Module):
    """One block; positions are looked up per sample."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(VOCABULARY, width, padding_idx=2)
        self.position = nn.Embedding(16, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, VOCABULARY)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.normal_(1, 0.5)
                norm.weight[0] = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        x = self.token(tokens) + self.position(positions)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        causal = torch.full((tokens.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal).softmax(-1)
        x = x + self.o((attention @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x)


def mlp_case() -> tuple[nn.Module, Tensor, Tensor]:
    return MLP(), torch.randn(12, 7), torch.randint(0, CLASSES, (12,))


def transformer_case() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (10, 6))
    tokens[:, 3] = tokens[:, 1]  # a token occurs twice in a sample
    return Transformer(), tokens, torch.randint(0, VOCABULARY, (10, 6))


CASES = {"mlp": mlp_case, "transformer": transformer_case}


# --- FisherEstimator ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_observe(case, dtype):
    model, inputs, targets = CASES[case]()
    model = model.to(dtype).eval()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    fisher = FisherEstimator(model)
    with fisher.observe(batch_size=len(inputs)):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()

    assert_sums(importance, oracle(model, inputs, data_labels(targets)), TOLERANCE[dtype])
    assert importance.samples == len(inputs)
    assert importance.tokens == (inputs.numel() if case == "transformer" else None)
    assert all(value.dtype == dtype for value in importance.values())


@pytest.mark.parametrize("case", CASES)
def test_grad_is_bit_identical(case):
    model, inputs, targets = CASES[case]()
    plain = copy.deepcopy(model)
    for seed in (1, 2):  # into an empty grad, and on top of one
        torch.manual_seed(seed)  # dropout
        mean_loss(plain(inputs), targets).backward()
        torch.manual_seed(seed)
        with FisherEstimator(model).observe(len(inputs)):
            mean_loss(model(inputs), targets).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
            assert p.grad.stride() == q.grad.stride()


@pytest.mark.parametrize(
    ("reduction", "loss_terms", "scale"),
    [("mean", None, 1.0), ("sum", 1, 1.0), ("tokens", 60, 1.0), ("mean", None, 2.0**16)],
)
def test_reductions_and_loss_scale(reduction, loss_terms, scale):
    model, inputs, targets = transformer_case()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs), loss_terms=loss_terms, loss_scale=scale, tokens=42):
        total = mean_loss(model(inputs), targets) * len(inputs)
        divisor = {"mean": len(inputs), "sum": 1, "tokens": targets.numel()}[reduction]
        (total / divisor * scale).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)
    assert fisher.finalize().tokens == 42


@pytest.mark.parametrize("case", CASES)
def test_several_batches(case):
    """Of unequal sizes, with gradient accumulation; finalize gives copies in between."""
    model, inputs, targets = CASES[case]()
    model.eval()
    fisher = FisherEstimator(model)
    earlier = []
    for x, y in zip(inputs.split(7), targets.split(7), strict=True):
        with fisher.observe(batch_size=len(x), loss_scale=0.5):
            (mean_loss(model(x), y) * 0.5).backward()
        earlier.append(fisher.finalize())
    expected = oracle(model, inputs, data_labels(targets))
    assert_sums(fisher.finalize(), expected, 1e-5)
    assert [importance.samples for importance in earlier] == [7, len(inputs)]
    assert_sums(earlier[0], oracle(model, inputs[:7], data_labels(targets)), 1e-5)


def test_bfloat16():
    """Against batches of one in bfloat16: the products and sums are float32."""
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 5))
    model = model.bfloat16()
    x, y = torch.randn(20, 3, 16).bfloat16(), torch.randint(0, 5, (20, 3))
    fisher = FisherEstimator(model)
    with fisher.observe(20, loss_terms=1):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    expected = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
    for n in range(20):
        model.zero_grad()
        F.cross_entropy(model(x[n : n + 1])[0], y[n], reduction="sum").backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.double() ** 2
    assert all(value.dtype == torch.float32 for value in fisher.finalize().values())
    assert_sums(fisher.finalize(), expected, 2e-2)


def test_float16_loss_scale():
    """Gradients whose squares float16 cannot hold."""
    weight = nn.Linear(4, 3, bias=False).half()
    x = torch.randn(5, 4).half()
    seed = torch.full((5, 3), 2.0**-10).half()
    fisher = FisherEstimator(weight)
    with fisher.observe(5, loss_terms=1, loss_scale=2.0**4):
        weight(x).backward(seed)
    expected = (seed.double().square().T @ x.double().square()) / 2.0**8
    assert_sums(fisher.finalize(), {"weight": expected}, 1e-6)


def test_autocast():
    model, inputs, targets = mlp_case()
    model.eval()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)), torch.autocast("cpu", torch.bfloat16):
        mean_loss(model(inputs), targets).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 5e-2)


def test_more_dimensions():
    """[N, H, W, C]: all between samples and features are tokens; LayerNorm over two dimensions."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((5, 4)), nn.Flatten(), nn.Linear(40, 2))
    with torch.no_grad():
        model[1].weight.normal_()
    inputs, targets = torch.randn(6, 2, 5, 3), torch.randint(0, 2, (6,))
    fisher = FisherEstimator(model)
    with fisher.observe(6):
        mean_loss(model(inputs), targets).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)
    assert fisher.finalize().tokens == 60


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_embedding(padding_idx):
    table = nn.Parameter(torch.randn(4, 3))
    indices = torch.tensor([[0, 0, 3], [3, 1, 3], [0, 3, 3]])
    weights = torch.randn(3, 3, 3)
    model = nn.ParameterDict({"table": table})
    fisher = FisherEstimator(model)
    with fisher.observe(3, loss_terms=1):
        (F.embedding(indices, table, padding_idx) * weights).sum().backward()
    expected = torch.zeros(4, 3).double()
    for n in range(3):
        g = torch.zeros(4, 3).double()
        for t in range(3):
            if indices[n, t] != padding_idx % 4:
                g[indices[n, t]] += weights[n, t]
        expected += g**2
    assert_sums(fisher.finalize(), {"table": expected}, 1e-6)


class Functional(MLP):
    """No module is called, arguments are named, and a module is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, head = self.body[0], self.head
        x = F.linear(x, bias=first.bias, weight=first.weight)[:, :9]
        return F.linear(input=x, weight=head.weight, bias=head.bias)


def test_functional_and_frozen_and_unused():
    model = Functional()
    model.body[0].weight.requires_grad_(False)
    inputs, targets = torch.randn(6, 7), torch.randint(0, CLASSES, (6,))
    fisher = FisherEstimator(model)
    with fisher.observe(6):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()
    assert "body.0.weight" not in importance
    assert importance["extra.weight"].count_nonzero() == 0
    assert_sums(importance, oracle(model, inputs, data_labels(targets)), 1e-5)


def test_harmless_uses():
    """Reading a parameter, and forward passes without gradients, are no uses."""
    model, inputs, targets = mlp_case()
    model.eval()
    p = model.head.weight
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)):
        with torch.no_grad():
            model(inputs)
            p.mul_(1.0).norm()
        assert p.shape == p.detach().shape
        assert p.requires_grad
        assert p.data_ptr() != 0
        p.requires_grad_()
        torch.zeros_like(p)
        torch.stack([p.data, p.detach()])
        copy.deepcopy(p)
        inputs.clone().requires_grad_().type_as(p)
        loss = mean_loss(model(inputs), targets)
        torch.autograd.grad(loss, list(model.parameters()))
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)


def test_per_token_and_metadata():
    model, inputs, targets = transformer_case()
    fisher = FisherEstimator(model)
    with fisher.observe(10):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()
    name = "up.weight"
    torch.testing.assert_close(importance.per_token()[name] * 6, importance[name])
    metadata = importance.metadata
    assert (metadata["estimator"], metadata["labels"]) == ("FisherEstimator", "empirical")
    assert metadata["torch"] == torch.__version__
    assert metadata["model"]["class"].endswith("Transformer")
    assert metadata["model"]["parameters"][name] == {"shape": [24, 8], "dtype": "float32"}


# --- what observe refuses -------------------------------------------------------------------------


def run(fisher: FisherEstimator, batch_size: int, *steps) -> None:
    """Take the steps inside observe()."""
    with fisher.observe(batch_size):
        for step in steps:
            step()


class Uses(nn.Module):
    """A linear layer, and one more use of a parameter."""

    def __init__(self, use, **parameters: nn.Parameter) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = nn.ParameterDict(parameters)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))


P = nn.Parameter
NO_RULE = {
    "list": (
        lambda m, x: x + torch.stack([x[0], m.extra.p]).sum(),
        r"^torch\.stack uses parameter 'extra\.p'",
    ),
    "cat": (
        lambda m, x: torch.cat([x[1:], m.extra.p[None]]),
        r"^torch\.cat uses parameter 'extra\.p'",
    ),
    "as input": (
        lambda m, x: F.linear(m.linear.weight, x),
        r"functional\.linear uses parameter 'linear\.weight'",
    ),
    "left factor": (
        lambda m, x: m.linear.weight @ x,
        r"matmul.* uses parameter 'linear\.weight'",
    ),
    "alpha": (
        lambda m, x: torch.addmm(m.extra.p, x, m.linear.weight, alpha=2),
        r"addmm uses parameters 'extra\.p', 'linear\.weight' in a way.*alpha = 2",
    ),
}


@pytest.mark.parametrize("kind", NO_RULE)
@pytest.mark.parametrize("own_pass", [False, True])
def test_function_without_a_rule(kind, own_pass):
    use, message = NO_RULE[kind]
    model = Uses(use, p=P(torch.randn(4)))
    fisher = FisherEstimator(model)
    x = torch.randn(4, 4)
    with pytest.raises(NotImplementedError, match=message):
        _ = estimate_fisher(model, [x]) if own_pass else run(fisher, 4, lambda: model(x))


def test_a_parameter_changed_in_place():
    model = Uses(lambda m, x: m.extra.p[:].mul_(x), p=P(torch.randn(4)))
    message = r"mul_ uses parameter 'extra\.p' in a way .* changed in place"
    with pytest.raises(NotImplementedError, match=message):
        run(FisherEstimator(model), 4, lambda: model(torch.randn(4, 4)))


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.ConvTranspose1d(4, 4, 1), (4, 5), "conv_transpose1d uses .*must have 3 dimensions"),
        (nn.Conv1d(4, 4, 1), (4, 5), "conv1d uses .*must have 3 dimensions, the first for sam"),
        (nn.BatchNorm1d(4), (3, 4), "batch_norm in training mode"),
        (nn.BatchNorm1d(4, affine=False), (3, 4), "batch_norm in training mode"),
        (nn.Bilinear(4, 4, 2), (3, 4), r"bilinear uses parameters '0\.weight', '0\.bias'"),
    ],
)  # fmt: skip
def test_module_without_a_rule(module, shape, message):
    model = nn.ModuleList([module, nn.Linear(4, 4)])
    x = torch.randn(shape, requires_grad=True)
    with (
        pytest.raises((NotImplementedError, ValueError), match=message),
        FisherEstimator(model).observe(3),
    ):
        module(x, x) if isinstance(module, nn.Bilinear) else module(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": True}, "sparse"),
    ],
)
def test_embedding_options(options, message):
    model = nn.Embedding(5, 3, **options)
    with (
        pytest.raises(
            NotImplementedError, match=f"embedding uses parameter 'weight' in a.*{message}"
        ),
        FisherEstimator(model).observe(2),
    ):
        model(torch.tensor([[1], [2]]))


UNSEEN = {
    "alone": (lambda m, x: Opaque.apply(x, m.extra.p), r"^parameter 'extra\.p' received"),
    "beside a seen one": (lambda m, x: Opaque.apply(x, m.linear.bias), r"^parameter 'linear\.b"),
    "reentrant": (
        lambda m, x: checkpoint(F.linear, x, m.extra.w, use_reentrant=True),
        r"^parameter 'extra\.w' received",
    ),
    "non-reentrant": (
        lambda m, x: checkpoint(F.linear, x, m.extra.w, use_reentrant=False),
        "^a function inside an activation checkpoint uses parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_use(kind):
    """Found when its gradient comes. The sums may be spoilt by then, and finalize says so."""
    use, message = UNSEEN[kind]
    model = Uses(use, p=P(torch.randn(4)), w=P(torch.randn(4, 4)))
    fisher = FisherEstimator(model)
    with pytest.raises(NotImplementedError, match=message), fisher.observe(3):
        model(torch.randn(3, 4)).square().sum().backward()
    spoilt = kind != "non-reentrant"  # which fails before it has reached a parameter
    with pytest.raises(RuntimeError, match="backward pass had begun" if spoilt else "nothing was"):
        fisher.finalize()


@pytest.mark.parametrize("kind", ["alone", "beside a seen one"])
def test_unseen_use_in_its_own_pass(kind):
    use, message = UNSEEN[kind]
    model = Uses(use, p=P(torch.randn(4)), w=P(torch.randn(4, 4)))
    with pytest.raises(NotImplementedError, match=message):
        estimate_fisher(model, [torch.randn(3, 4)])
    assert all(p.grad is None for p in model.parameters())


def features(*first: nn.Module) -> nn.Module:
    """Classes of inputs [4, 4]."""
    return nn.Sequential(*first, nn.Flatten(), nn.LazyLinear(3))


REFUSED = {
    "no rule": lambda: features(Uses(lambda m, x: torch.cdist(x, m.extra.w),
                                     w=P(torch.randn(4, 4)))),
    "several at once": lambda: features(Uses(lambda m, x: F.bilinear(x, x, m.extra.w, m.extra.p),
                                             w=P(torch.randn(4, 4, 4)), p=P(torch.randn(4)))),
    "not supported": lambda: features(Uses(NO_RULE["alpha"][0], p=P(torch.randn(4)))),
    "unseen": lambda: features(Uses(UNSEEN["alone"][0], p=P(torch.randn(4)))),
    "beside a seen one": lambda: features(Uses(UNSEEN["beside a seen one"][0])),
    "rows of samples": lambda: Uses(lambda m, x: torch.cat(
        [F.linear(x[:3], m.extra.w), F.linear(x[3:], m.extra.w)]), w=P(torch.randn(4, 4))),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_ends_in_its_remedy(kind):
    """Each names the parameter, and random signs then find what a loop over samples does."""
    model = REFUSED[kind]()
    x = torch.randn(4, 4)
    model(x)  # how many features there are
    freeze = "or freeze what should be left out with requires_grad_(False)."
    with pytest.raises((NotImplementedError, ValueError), match=r"parameters? '") as refused:
        estimate_fisher(model, [x])
    sentence = str(refused.value)
    assert sentence.endswith(f"; estimate it by random signs with unsupported='sign', {freeze}")
    with pytest.raises(type(refused.value)) as refused, FisherEstimator(model).observe(4):
        model(x).square().sum().backward()
    how = "estimate_fisher(..., unsupported='sign')"
    assert str(refused.value).endswith(f"; estimate it by random signs with {how}, {freeze}")
    signed = estimate_fisher(
        model, [x], "predicted", unsupported="sign", sign_draws=1000,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = oracle(model, x, predicted_labels)
    left = signed.metadata["sign"]["parameters"]
    assert next(iter(left)) in sentence
    for name, value in signed.sums.items():
        if name in left:
            assert abs(float(value.sum() / expected[name].sum()) - 1) < 0.1, name
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)


class Standardised(nn.Conv1d):
    """As timm standardises weights: in any mode, with a batch_norm of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).view_as(self.weight)
        return F.conv1d(x, weight, self.bias)


def test_a_batch_norm_of_a_weight():
    model, x = nn.Sequential(Standardised(4, 3, 2), nn.Flatten()), torch.randn(5, 4, 6)
    importance = estimate_fisher(model, [x], "predicted")
    assert_sums(importance, oracle(model, x, predicted_labels), 1e-5)


def test_the_remedy_for_magnitudes_and_packed_sequences():
    """Random signs estimate squares, of samples with losses of their own."""
    model = Uses(lambda m, x: torch.cdist(x, m.linear.weight))
    message = r"'linear\.weight'.*; leave it out with unsupported='skip', or freeze what"
    with pytest.raises(NotImplementedError, match=message):
        estimate_fisher(model, [torch.randn(4, 4)], kind="mas")
    with (
        pytest.raises(NotImplementedError, match=r"'linear\.weight'.*takes one\); freeze what"),
        FisherEstimator(model).observe(cu_seqlens=[0, 1, 4]),
    ):
        model(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("shape", "batch_size", "message"),
    [
        ((5, 7), 4, r"^parameter 'body\.0\.weight' met an input of shape \[5, 7\].* is 5, but "
                    "batch_size is 4"),
        ((7,), 7, r"^parameter 'body\.0\.weight' met an input of shape \[7\], which has no dim"),
    ],
)  # fmt: skip
def test_wrong_leading_dimension(shape, batch_size, message):
    fisher = FisherEstimator(MLP())
    with pytest.raises(ValueError, match=message), fisher.observe(batch_size):
        fisher._model(torch.randn(shape))


class WithPositions(nn.Module):
    """Looks positions up once for all samples, as many published models do."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, width), nn.Embedding(9, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.token(tokens) + self.position(torch.arange(tokens.shape[1])))


def test_positions_or_samples():
    """As many indices as samples, and sequences as long: the shape does not tell."""
    model = WithPositions()
    tokens = torch.randint(0, 9, (4, 4))
    message = r"^parameter 'position\.weight' met 4 indices, which may be samples or positions"
    with pytest.raises(ValueError, match=message), FisherEstimator(model).observe(4):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, [tokens], labels="sample")
    # After a batch of another size it is known.
    batches = [torch.randint(0, 9, (5, 4)), tokens]
    importance = estimate_fisher(model, batches, labels="predicted")
    assert_sums(importance, oracle(model, torch.cat(batches), predicted_labels), 1e-5)


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.transpose(0, 1)).transpose(0, 1))


def test_samples_must_be_independent():
    x = torch.randn(5, 5, 4)
    message = r"^the self-check failed in batch 0: .*parameter 'body\.(weight|bias)' differs"
    with pytest.raises(ValueError, match=message):
        estimate_fisher(TokensFirst(), [x], labels="sample")
    mixing = Uses(lambda m, x: x - x.mean(0))
    with pytest.raises(ValueError, match=r"batch 0: .*'linear\..* samples are not independent"):
        estimate_fisher(mixing, [x[0]])


def test_misuse_of_observe():
    """Errors before the backward pass leave the sums as they were."""
    model, inputs, targets = mlp_case()
    model.eval()
    n = len(inputs)
    fisher = FisherEstimator(model)
    with pytest.raises(RuntimeError, match="nothing was observed"):
        fisher.finalize()
    with pytest.raises(RuntimeError, match="cannot be used inside another"):
        run(fisher, n, lambda: run(fisher, n))
    with pytest.raises(RuntimeError, match="no gradient reached a watched parameter"):
        run(fisher, n, lambda: model(inputs))
    with pytest.raises(ZeroDivisionError):
        run(fisher, n, lambda: model(inputs), lambda: 1 / 0)
    with fisher.observe(n):
        loss = mean_loss(model(inputs), targets)
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"after the observe\(\) of its forward pass had ended"):
        loss.backward()
    assert fisher.finalize().samples == n
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)


def test_an_error_in_the_backward_pass_is_remembered():
    model, inputs, targets = mlp_case()
    fisher = FisherEstimator(model)

    def step() -> None:
        loss = mean_loss(model(inputs), targets)
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(RuntimeError, match="a second backward pass reached parameters 'head"):
        run(fisher, len(inputs), step)
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()


def test_an_input_changed_in_place_is_noticed():
    """Also where nothing but the estimator has kept it."""
    model, inputs, targets = mlp_case()

    def loss(model: nn.Module, batch) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        batch[0].add_(1)
        return losses

    with pytest.raises(RuntimeError, match="inplace operation"):
        estimate_fisher(model, [(inputs, targets)], "empirical", per_sample_loss=loss)


def test_keeps_no_input_of_a_frozen_weight():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    inputs = torch.randn(3, 4)
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(FisherEstimator(model), 3, lambda: model(inputs).square().sum().backward())
    assert kept
    assert inputs.data_ptr() not in kept


def test_leaves_no_hooks():
    model, inputs, targets = mlp_case()
    run(FisherEstimator(model), len(inputs), lambda: mean_loss(model(inputs), targets).backward())
    estimate_fisher(model, [inputs])
    assert not any(p._backward_hooks for p in model.parameters())


def test_not_finite():
    model, inputs, targets = mlp_case()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)):
        (mean_loss(model(inputs), targets) * math.inf).backward()
    with pytest.raises(ValueError, match=r"squared gradients of parameter .* are not finite"):
        fisher.finalize()


def test_parameters_changed():
    model, inputs, _ = mlp_case()
    fisher = FisherEstimator(model)
    model.head.bias.requires_grad_(False)
    message = r"^parameter 'head\.bias' was added, removed, frozen"
    with pytest.raises(ValueError, match=message), fisher.observe(len(inputs)):
        pass


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "^batch_size must be at least 1, not 0", {"batch_size": 0}),
        (TypeError, "^batch_size must be an integer, not float", {"batch_size": 2.0}),
        (ValueError, "^loss_terms must be positive and finite, not 0", {"loss_terms": 0}),
        (TypeError, "^loss_terms must be a number, not str", {"loss_terms": "mean"}),
        (ValueError, "^loss_scale must be positive and finite, not nan", {"loss_scale": math.nan}),
        (ValueError, "^tokens must be at least 0", {"tokens": -1}),
    ],
)
def test_bad_arguments_of_observe(error, message, arguments):
    fisher = FisherEstimator(MLP())
    with pytest.raises(error, match=message), fisher.observe(**{"batch_size": 4, **arguments}):
        pass


def test_bad_models():
    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module"):
        FisherEstimator(3)
    with pytest.raises(ValueError, match="model has no parameters that require gradients"):
        FisherEstimator(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="parameter 'weight' must be of a real float"):
        FisherEstimator(nn.Linear(2, 2, dtype=torch.cfloat))


# --- estimate_fisher ------------------------------------------------------------------------------


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    p = logits.softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("case", "labels"),
    [
        ("mlp", "exact"),
        ("mlp", "sample"),
        ("mlp", "predicted"),
        ("mlp", "empirical"),
        ("transformer", "sample"),
        ("transformer", "predicted"),
        ("transformer", "empirical"),
    ],
)
def test_estimate(case, labels, dtype):
    model, inputs, targets = CASES[case]()
    model = model.to(dtype)  # in training mode
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    importance = estimate_fisher(
        model, batches, labels=labels, generator=torch.Generator().manual_seed(1)
    )
    if labels == "sample":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            targets = torch.cat(
                [draw(copy.deepcopy(model).eval()(x), generator) for x, _ in batches]
            )
    expected = oracle(
        model,
        inputs,
        {"exact": all_labels, "predicted": predicted_labels}.get(labels, data_labels(targets)),
    )
    assert_sums(importance, expected, TOLERANCE[dtype])
    assert importance.samples == len(inputs)
    assert importance.tokens == (inputs.numel() if case == "transformer" else None)
    assert importance.metadata["labels"] == labels
    assert importance.metadata["estimator"] == "estimate_fisher"


AUTOMATIC = {
    "100 classes": (lambda: (nn.Linear(4, 100), torch.randn(6, 4)), "exact", None),
    "101 classes": (lambda: (nn.Linear(4, 101), torch.randn(6, 4)), "sample", "of 101 classes"),
    "sequences": (lambda: transformer_case()[:2], "sample", "of sequences"),
}


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_labels_are_chosen(kind, caplog):
    """Exact to 100 classes, else drawn as torch.manual_seed says, and that is said once."""
    make, labels, said = AUTOMATIC[kind]
    model, inputs = make()
    _log_once.cache_clear()
    found = []
    for chosen in ("auto", labels, "auto"):
        torch.manual_seed(3)
        found.append(estimate_fisher(model, inputs.split(4), chosen))
    for importance in found:
        assert importance.metadata["labels"] == labels
        for name, value in found[0].sums.items():
            assert torch.equal(importance.sums[name], value)
    assert [i.metadata.get("labels_chosen") for i in found] == ["auto", None, "auto"]
    sentence = (
        f"labels='auto' is labels='sample' for logits {said}: labels are drawn from the model, "
        f"since labels='exact' is for [N, C] with at most 100 classes."
    )
    assert caplog.messages == ([] if said is None else [sentence])


def test_closed_form():
    """Softmax regression: E_y[(∂ log p(y) / ∂W_ci)²] = x_i² p_c (1 − p_c), for one sample."""
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    p = model(x).softmax(-1).detach()
    bias = p * (1 - p)
    expected = {"weight": bias.T @ x**2, "bias": bias.sum(0)}
    assert_sums(estimate_fisher(model, [x]), expected, 1e-12)

    # Sampled labels converge to it; 20 000 draws per sample leave an error of about 1 %.
    repeated = x.repeat(20_000, 1).split(10_000)
    sampled = estimate_fisher(
        model, repeated, "sample", max_samples=None, generator=torch.Generator().manual_seed(0)
    )
    for name, value in sampled.sums.items():
        torch.testing.assert_close(value / 20_000, expected[name], rtol=0.05, atol=0)


def test_ignored_targets():
    """Ignored tokens have no loss in any mode; samples of nothing else are not counted."""
    model, inputs, targets = transformer_case()
    targets[torch.rand(targets.shape) < 0.4] = -100
    targets[3] = -100
    counted = int((targets != -100).sum())
    labelled = {
        "empirical": targets,
        "predicted": torch.where(targets == -100, -100, model(inputs).argmax(-1)),
    }
    for labels, y in labelled.items():
        importance = estimate_fisher(model, [(inputs, targets)], labels=labels)
        assert (importance.samples, importance.tokens) == (9, counted)
        assert_sums(importance, oracle(model, inputs, data_labels(y)), 1e-5)

    model, inputs, targets = mlp_case()
    targets[::3] = -100
    for labels, y in (("empirical", data_labels(targets)), ("exact", all_labels)):
        importance = estimate_fisher(model, [(inputs, targets)], labels, max_samples=7)
        assert importance.samples == 7
        kept = (targets != -100).nonzero().squeeze(1)[:7]
        label = y if labels == "exact" else data_labels(targets[kept])
        assert_sums(importance, oracle(model, inputs[kept], label), 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_target_dtypes(dtype):
    model = nn.Linear(3, 200)
    inputs, targets = torch.randn(4, 3), torch.tensor([1, 156, 199, 0])  # 156 is −100 in uint8
    importance = estimate_fisher(model, [(inputs, targets.to(dtype))], "empirical")
    assert importance.samples == 4
    assert_sums(importance, oracle(model, inputs, data_labels(targets)), 1e-5)


@pytest.mark.parametrize("as_dict", [False, True])
def test_per_sample_loss(as_dict):
    model, inputs, targets = mlp_case()

    def loss(model: nn.Module, batch) -> Tensor:
        x, y = (batch["x"], batch["more"][0]) if as_dict else batch
        return F.cross_entropy(model(x), y, reduction="none")

    batches = list(zip(inputs.split(5), targets.split(5), strict=True))
    if as_dict:
        batches = [{"x": x, "more": [y], "note": "kept"} for x, y in batches]
    importance = estimate_fisher(model, batches, "empirical", max_samples=8, per_sample_loss=loss)
    assert importance.samples == 8
    assert_sums(importance, oracle(model, inputs[:8], data_labels(targets)), 1e-5)


@pytest.mark.parametrize(("limit", "samples", "taken"), [(7, 7, 2), (8, 8, 2), (None, 12, 3)])
def test_max_samples(limit, samples, taken):
    model, inputs, targets = mlp_case()
    yielded = []

    def batches():
        for batch in zip(inputs.split(4), targets.split(4), strict=True):
            yielded.append(batch)
            yield batch

    importance = estimate_fisher(model, batches(), max_samples=limit)
    assert importance.samples == samples
    assert len(yielded) == taken
    assert_sums(importance, oracle(model, inputs[:samples], all_labels), 1e-5)


class NormedMLP(MLP):
    """Has a buffer that training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(0, nn.BatchNorm1d(7, affine=False))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_alone(fails):
    model, (_, inputs, targets) = NormedMLP(), mlp_case()
    model.body[1].eval()  # flags that differ
    model.body[4].weight.requires_grad_(False)
    mean_loss(model(inputs), targets).backward()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters]
    values = [None if g is None else g.clone() for g in grads]
    requires = [p.requires_grad for p in parameters]

    with torch.no_grad():
        if fails:
            with pytest.raises(ValueError, match="targets must be in"):
                estimate_fisher(model, [(inputs, targets + 9)], "empirical")
        else:
            estimate_fisher(model, [(inputs, targets)])
        assert not torch.is_grad_enabled()

    assert flags == [module.training for module in model.modules()]
    assert requires == [p.requires_grad for p in parameters]
    for p, grad, value in zip(parameters, grads, values, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_computes_no_gradients_of_parameters():
    """The backward pass goes to activations only."""
    model, inputs, _ = mlp_case()
    seen = []
    for p in model.parameters():
        p.register_hook(seen.append)
    estimate_fisher(model, [inputs], verify=False)
    assert seen == []


def test_masked_classes():
    """A logit of −∞ is a class that cannot be; it is no error."""
    model = Uses(lambda m, x: x.masked_fill(torch.tensor([False, False, False, True]), -math.inf))
    x = torch.randn(5, 4)
    p = F.linear(x, model.linear.weight, model.linear.bias)[:, :3].softmax(-1).detach()
    expected = {"linear.bias": F.pad((p * (1 - p)).sum(0), (0, 1)),
                "linear.weight": F.pad((p * (1 - p)).T @ x**2, (0, 0, 0, 1))}  # fmt: skip
    assert_sums(estimate_fisher(model, [x]), expected, 1e-5)


def test_progress_bar(capsys):
    model, inputs, _ = mlp_case()
    estimate_fisher(model, [inputs], progress=False)
    estimate_fisher(model, [inputs])  # not a terminal
    assert capsys.readouterr().err == ""
    estimate_fisher(model, [inputs], progress=True)
    shown = capsys.readouterr().err
    assert "Fisher" in shown
    assert "12/12" in shown


def test_no_progress_bar_without_rich(monkeypatch):
    model, inputs, _ = mlp_case()
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    estimate_fisher(model, [inputs])
    with pytest.raises(ModuleNotFoundError, match=r'needs rich: pip install "cl-optim\[cli\]"$'):
        estimate_fisher(model, [inputs], progress=True)


X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)
NAN_BATCH = torch.full((4, 7), math.nan)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "^labels must be one of .*'auto', 'exact'.* not 'mc'", {"labels": "mc"}),
        (
            TypeError,
            "^batches must be an iterable of batches, not a float32 tensor",
            {"batches": X},
        ),
        (TypeError, "^batches must be an iterable of batches, not a int", {"batches": 3}),
        (ValueError, "^batches has no samples", {"batches": []}),
        (ValueError, "^batches has no samples", {"batches": [X[:0], (X[:0], Y[:0])]}),
        (
            ValueError,
            "^batch 0 must be .inputs, targets., but has 3 parts",
            {"batches": [(X, Y, Y)]},
        ),
        (ValueError, "^batch 0 must have a tensor", {"batches": [("text", Y)]}),
        (ValueError, "^max_samples must be at least 1, or None, not 0", {"max_samples": 0}),
        (TypeError, "^max_samples must be an integer or None", {"max_samples": 1.5}),
        (ValueError, "^per_sample_loss needs labels='empirical'", {"per_sample_loss": mean_loss}),
        (ValueError, r"^labels='empirical' needs \(inputs, targets\)", {"labels": "empirical"}),
        (
            ValueError,
            r"^targets must be in \[0, 5\) or -100, but there is 5 in batch 1",
            {"labels": "empirical", "batches": [(X, Y), (X, Y + 5)]},
        ),
        (
            ValueError,
            r"^targets must have shape \[4\].* not a int64 tensor of shape \[4, 1\], in batch 0",
            {"labels": "empirical", "batches": [(X, Y.unsqueeze(1))]},
        ),
        (ValueError, "^the loss is not finite in batch 1", {"batches": [X, NAN_BATCH]}),
    ],
)
def test_bad_arguments_of_estimate(error, message, arguments):
    with pytest.raises(error, match=message):
        estimate_fisher(MLP(), **{"batches": [X], **arguments})


@pytest.mark.parametrize(
    ("use", "labels", "message"),
    [
        (lambda m, x: x.sum(1), "exact", r"must return floating-point logits \[4, C\] or .* shape"),
        (lambda m, x: {"logits": x}, "exact", "must return .* but returned a dict in batch 0"),
        (lambda m, x: x.unsqueeze(1), "exact", "^labels='exact' is for .* use labels='sample'"),
        (
            lambda m, x: x.repeat(1, 26),
            "exact",
            r"at most 100 classes, not \[4, 104\]; use labels=",
        ),
        (lambda m, x: torch.zeros(4, 3), "exact", "does not depend on any trained parameter"),
        (
            lambda m, x: x + (x - x.detach()) * 1e30,
            "exact",
            r"^the gradient of parameter 'linear.* in batch 0",
        ),
    ],
)
def test_bad_outputs(use, labels, message):
    with pytest.raises(ValueError, match=message):
        estimate_fisher(Uses(use), [torch.randn(4, 4)], labels)


def test_bad_losses():
    model = MLP()
    for loss, message in (
        (lambda m, b: m(b[0]).sum(), r"one loss per sample, shape \[4\], but returned a float32"),
        (lambda m, b: m(b[0]).sum(1) / 0, "not finite in batch 0"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_fisher(model, [(X, Y)], "empirical", per_sample_loss=loss)
