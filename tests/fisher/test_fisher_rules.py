"""Each way of using a parameter, in training and in a pass of its own, against batches of one."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import Uses, assert_sums, loop, losses, oracle, predicted_labels, randn
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cl_optim
from cl_optim.fisher import FisherEstimator, UnsupportedUseError, Use, estimate_fisher
from cl_optim.fisher.per_sample.views import Geometry

N = 3


def check(model: nn.Module, x: Tensor, loss=losses, tolerance: float = 1e-5) -> None:
    """Training twice (verified, then with the gradients made by us), and a pass of its own."""
    model.eval()

    def one(model: nn.Module, n: int) -> Tensor:
        part = x[n : n + 1]
        return loss(model, part.double() if part.is_floating_point() else part)[0]

    expected = loop(model, one, len(x))
    plain = copy.deepcopy(model)
    loss(plain, x).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for verify in (True, False):
        model.zero_grad()
        fisher = FisherEstimator(model, verify=verify)
        with fisher.observe(len(x), loss_terms=1):
            loss(model, x).sum().backward()
        assert_sums(fisher.finalize(), expected, tolerance)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and verify:
                torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=2e-6)
            elif p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=2e-6 * largest)
    model.zero_grad()
    importance = estimate_fisher(model, [x], "empirical", per_sample_loss=loss)
    assert_sums(importance, expected, tolerance)
    assert all(p.grad is None for p in model.parameters())


# --- layers ---------------------------------------------------------------------------------------


class Spatial(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def spoilt(norm: nn.Module) -> nn.Module:
    """A normalisation with some weights far from 1, and one of 0."""
    with torch.no_grad():
        norm.weight.normal_(1, 0.5)
        norm.weight.view(-1)[0] = 0.0
        if norm.bias is not None:
            norm.bias.normal_()
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "groups, dilation, stride": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(2, 1), padding=(1, 2), groups=2),
        (4, 7, 5),
    ),
    "depthwise, no bias": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "same, even kernel": (nn.Conv2d(4, 2, (4, 3), padding="same", dilation=(1, 2)), (4, 5, 6)),
    "valid": (nn.Conv2d(4, 2, 2, padding="valid"), (4, 3, 3)),
    "reflect": (nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect"), (4, 5, 4)),
    "circular same": (nn.Conv1d(4, 2, 3, padding="same", padding_mode="circular"), (4, 5)),
    "1 x 1": (nn.Conv2d(4, 5, 1), (4, 3, 2)),
    "1-d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 9)),
    "3-d": (nn.Conv3d(4, 2, (2, 3, 2), padding=1, groups=2, dilation=(1, 1, 2)), (4, 3, 4, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind):
    layer, shape = CONVOLUTIONS[kind]
    first = type(layer)(shape[0], shape[0], 1)
    check(Spatial(first, copy.deepcopy(layer)), torch.randn(N, *shape))


TRANSPOSED = {
    "1-d": (nn.ConvTranspose1d(4, 6, 3), (4, 5)),
    "stride, padding": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), bias=False), (4, 5, 7)),
    "output_padding": (
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, output_padding=(1, 2), groups=2),
        (4, 5, 7),
    ),
    "more of it than stride": (
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=3, dilation=4, groups=2),
        (4, 5),
    ),
    "3-d": (
        nn.ConvTranspose3d(
            4, 2, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 3)
        ),
        (4, 3, 5, 6),
    ),
}


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_convolution(kind):
    layer, shape = TRANSPOSED[kind]
    first = getattr(nn, f"Conv{len(shape) - 1}d")(4, 4, 1)
    check(Spatial(first, copy.deepcopy(layer)), torch.randn(N, *shape))


def test_convolution_in_chunks(monkeypatch):
    """As it would be if the windows of one sample filled a chunk."""
    monkeypatch.setattr("cl_optim.fisher.per_sample.base.CHUNK_BYTES", 1)
    for kind in ("plain", "groups, dilation, stride"):
        layer, shape = CONVOLUTIONS[kind]
        check(Spatial(copy.deepcopy(layer)), torch.randn(N, *shape))


def test_frames():
    """[N, T, C, H, W]: what a sample's frames give adds before the square."""

    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), spoilt(nn.GroupNorm(2, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x.flatten(0, 1)))
            return self.head(y.movedim(1, -1).flatten(0, -2)).view(len(x), -1, 2)

    check(Video(), torch.randn(N, 5, 2, 4, 4))


def test_cnn_with_normalisation():
    model = Spatial(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        spoilt(nn.BatchNorm2d(4)),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, stride=2, padding=2),
        spoilt(nn.GroupNorm(3, 6)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 5),
    )
    check(model, torch.randn(N, 3, 8, 8))


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("eps", [1e-6, None])
def test_rms_norm(shape, eps):
    norm = nn.RMSNorm(shape, eps=eps)
    with torch.no_grad():
        norm.weight.normal_()
        norm.weight.view(-1)[0] = 0
    # eps=None depends on the dtype, so that the loop in float64 has another one
    tolerance = 1e-5 if eps is not None else 1e-4
    check(Uses(lambda m, x: m.norm(x), norm=norm), torch.randn(N, 3, 4), tolerance=tolerance)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 2)])
@pytest.mark.parametrize("count", [1, 4])
def test_prelu(count, shape):
    prelu = nn.PReLU(count)
    nn.init.normal_(prelu.weight)
    first = {1: nn.Linear(4, 4), 2: nn.Conv1d(4, 4, 1), 3: nn.Conv2d(4, 4, 1)}[len(shape)]
    check(nn.Sequential(first, prelu), torch.randn(N, *shape))
    if len(shape) == 2 and count == 1:
        check(Uses(lambda m, x: m.a(x), a=prelu), torch.randn(N, 5, 4))


EINSUMS = {
    "bti,io->bto": (4, 7),
    "bti,oi->bto": (7, 4),
    "...i,oi->...o": (7, 4),
    "bti,ihd->bhtd": (4, 2, 3),
    "bti,hid->bthd": (2, 4, 3),
    "bti,i->bti": (4,),
    "bti,i->bt": (4,),
    "bti,ti->bt": (5, 4),
    "bti,tio->bto": (5, 4, 7),
    "bti,ito->bto": (4, 5, 7),
    "bti,to": (5, 7),
    "bti,sij->bj": (2, 4, 3),
    "bti,eio->ebto": (2, 4, 7),
    "bti,c->bcti": (7,),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation, swapped):
    terms, arrow, output = equation.partition("->")
    a, b = terms.split(",")
    turned = f"{b},{a}{arrow}{output}"

    def use(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.einsum(turned, [m.p[0], x]) if swapped else torch.einsum(equation, x, m.p[0])
        return y.transpose(0, 1) if output[:1] == "e" else y

    model = Uses(use, randn(*EINSUMS[equation]))
    if not output:  # sorted: b, i, o
        assert model(torch.randn(N, 5, 4)).shape == (N, 4, 7)
    x = torch.randn(N, 5, 4)
    with FisherEstimator(model).observe(N):
        found = model(x)
        found.sum().backward()
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
    check(model, x)


def test_einsum_of_experts():
    def use(m: nn.Module, x: Tensor) -> Tensor:
        each = x.flatten(0, 1).unsqueeze(0).expand(2, -1, -1)
        return torch.einsum("eti,eio->teo", each, m.p[0]).unflatten(0, (-1, 5))

    check(Uses(use, randn(2, 4, 7)), torch.randn(N, 5, 4))


class Twice(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.use, self.w, self.v = use, randn(1, 4, 4), randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x).tanh()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.einsum("bti,i->bti", x, m.v),
        lambda m, x: torch.einsum("bti,eio->bto", x, m.w),
        lambda m, x: torch.bmm(x.flatten(0, 1)[None, torch.arange(len(x) * 5)], m.w).view_as(x),
    ],
)
def test_products_in_checkpoints(use, reentrant):
    """Uses that only the recomputation sees are added up before the square."""
    block = Twice(use)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y = model.first(x)
        for _ in range(2):
            if y.dtype == torch.float64:  # the loop
                y = model.block(y)
            else:
                y = checkpoint(model.block, y, use_reentrant=reentrant)
        return y.flatten(1).sum(1)

    check(Uses(None, block=block), torch.randn(N, 5, 4), loss)


class Block(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention.batch_first:
            return self.attention(x, x, x)[0]
        y = x.transpose(0, 1)
        return self.attention(y, y, y)[0].transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_multi_head_attention(batch_first, options):
    model = nn.Sequential(nn.Linear(8, 8), Block(batch_first=batch_first, **options))
    check(model, torch.randn(N, 5, 8))


class Crossed(nn.Module):
    """Queries, keys and values from different tensors, of different widths, with masks."""

    def __init__(self, separate: bool, causal: bool, need_weights: bool) -> None:
        super().__init__()
        widths = {"kdim": 6, "vdim": 5} if separate else {}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.key = nn.Linear(8, 6 if separate else 8)
        self.value = nn.Linear(8, 5 if separate else 8)
        self.causal, self.need_weights = causal, need_weights

    def forward(self, x: Tensor) -> Tensor:
        key, value = (self.key(x), self.value(x)) if self.key.out_features == 6 else (x, x)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if self.causal else None
        return self.attention(
            x[:, :5], key, value,
            key_padding_mask=padding, attn_mask=mask, need_weights=self.need_weights,
        )[0]  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_cross_attention_with_masks(separate, causal, need_weights):
    model = nn.Sequential(nn.Linear(8, 8), Crossed(separate, causal, need_weights))
    for p in model[1].parameters():
        p.requires_grad_(p is not model[1].key.weight or separate)
    check(model, torch.randn(N, 5, 8))


def test_attention_gives_what_torch_gives():
    """Also the weights, averaged or not, and a mask of floats for each head."""
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    x = torch.randn(5, N, 8)
    mask = torch.randn(2 * N, 5, 5)
    for average in (True, False):
        options = {"attn_mask": mask, "average_attn_weights": average}
        expected = attention(x, x, x, **options)
        fisher = FisherEstimator(attention)
        with fisher.observe(N):
            found = attention(x, x, x, **options)
            found[0].sum().backward()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder(training, padded):
    """In eval mode torch has a fused path for it, which must not bypass the rules."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.encoder = nn.Linear(4, 8), encoder

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            kept = kept if padded else torch.zeros_like(kept)
            y = self.encoder(self.first(x), src_key_padding_mask=kept if padded else None)
            return y.masked_fill(kept.unsqueeze(-1), 0.0).tanh()

    model, x = Model().train(training), torch.randn(N, 5, 4)
    expected = loop(model, lambda m, n: m(x[n : n + 1].double(), padding[n : n + 1]).sum(), N)
    fisher = FisherEstimator(model)
    with fisher.observe(N, loss_terms=1):
        model(x, padding).sum().backward()
    assert_sums(fisher.finalize(), expected, 1e-5)


RECURRENT = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, all options": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "LSTM, no bias": (nn.LSTM, {"bias": False, "num_layers": 2, "batch_first": True}),
    "GRU": (nn.GRU, {}),
    "GRU, all options": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "RNN": (nn.RNN, {"bidirectional": True}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "num_layers": 3, "batch_first": True}),
}


class Recurrent(nn.Module):
    """A recurrent network whose first states are given, or not, and whose last ones are used."""

    def __init__(self, kind: str, given: bool) -> None:
        super().__init__()
        make, options = RECURRENT[kind]
        self.first, self.rnn = nn.Linear(4, 3), make(3, 6, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.sizes = self.rnn.num_layers * directions, 6
        self.state = nn.Linear(4, self.sizes[0] * 6) if given else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) if self.rnn.batch_first else self.first(x).transpose(0, 1)
        if self.state is None:
            out, last = self.rnn(y)
        else:
            h = self.state(x[:, 0]).unflatten(-1, self.sizes).transpose(0, 1)
            out, last = self.rnn(y, (h, h.tanh()) if isinstance(self.rnn, nn.LSTM) else h)
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        ends = last[0] * last[1] if isinstance(last, tuple) else last
        return out.flatten(1).sum(1, keepdim=True) * ends.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent(kind, given):
    """N samples of 5 steps: no two dimensions are equal."""
    model = Recurrent(kind, given)
    x = torch.randn(N, 5, 4)
    with FisherEstimator(model).observe(N):
        found = model(x)
        found.sum().backward()
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)
    check(model, 0.5 * x)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cell(cell):
    def steps(m: nn.Module, x: Tensor) -> Tensor:
        state = None
        for y in x.unbind(1):
            state = m.cell(y, state)
        return state[1] if isinstance(state, tuple) else state

    check(Uses(steps, cell=cell(4, 6)), torch.randn(N, 5, 4))


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_recurrent_dropout():
    """Between layers, not after the last one; only in training."""
    model = nn.LSTM(4, 6, num_layers=3, dropout=1.0, batch_first=True)
    x = torch.randn(N, 5, 4)
    for training in (True, False):
        expected = model.train(training)(x)[0]
        with FisherEstimator(model).observe(N):
            found = model(x)[0]
            found.sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, model.train()(x)[0])


# --- bare parameters, views, functions of parameters ----------------------------------------------


BARE = {
    "added": (lambda m, x: x + m.p[0], (4,)),
    "added in place": (lambda m, x: x.clone().add_(m.p[0]), (4,)),
    "from the left": (lambda m, x: m.p[0] - x, (4,)),
    "multiplied": (lambda m, x: x * m.p[0], (4,)),
    "divided by": (lambda m, x: x / (m.p[0].exp() + 1), (4,)),
    "positions [1, T, D]": (lambda m, x: x + m.p[0], (1, 5, 4)),
    "positions [T, D]": (lambda m, x: x + m.p[0], (5, 4)),
    "per token": (lambda m, x: x * m.p[0], (5, 1)),
    "a scalar": (lambda m, x: m.p[0] * x, ()),
    "a scalar, squared": (lambda m, x: m.p[0] ** 2 * x, ()),
    "torch.where": (lambda m, x: torch.where(x > 0, x, m.p[0]), (4,)),
    "lerp": (lambda m, x: torch.lerp(x, m.p[0], 0.3), (4,)),
    "both ends": (lambda m, x: torch.addcmul(m.p[0], x, m.p[0]), (4,)),
    "one plus": (lambda m, x: x * (1.0 + m.p[0].float()), (4,)),
    "a power": (lambda m, x: x * (2.0 ** m.p[0]), (4,)),
    "matmul": (lambda m, x: x @ m.p[0], (4, 3)),
    "torch.matmul": (lambda m, x: torch.matmul(x, m.p[0]), (4, 3)),
    "transposed": (lambda m, x: x @ m.p[0].t(), (3, 4)),
    "mT": (lambda m, x: x @ m.p[0].mT, (3, 4)),
    "mm": (lambda m, x: torch.mm(x.flatten(0, 1), m.p[0]).view(len(x), -1), (4, 3)),
    "part of a matrix": (lambda m, x: F.linear(x, m.p[0][1:3]), (6, 4)),
    "columns": (lambda m, x: F.linear(x, m.p[0][:, 2:6]), (3, 8)),
    "part of a transpose": (lambda m, x: x @ m.p[0].t()[:, :2], (3, 4)),
    "every second row": (lambda m, x: F.linear(x, m.p[0][::2]), (5, 4)),
    "chunks": (lambda m, x: sum(F.linear(x, w).tanh() for w in m.p[0].chunk(3)), (9, 4)),
    "columns apart": (lambda m, x: sum(F.linear(x, w) for w in m.p[0].split(4, 1)), (3, 8)),
    "overlapping parts": (
        lambda m, x: F.linear(x, m.p[0][:3]) + F.linear(x, m.p[0][2:]).tanh(),
        (5, 4),
    ),
    "the whole and a part": (
        lambda m, x: F.linear(x, m.p[0])[..., :2] + F.linear(x, m.p[0][2:4]),
        (5, 4),
    ),
    "matrix and transpose": (lambda m, x: F.linear(F.linear(x, m.p[0]).tanh(), m.p[0].t()), (3, 4)),
    "rows as positions": (lambda m, x: x + m.p[0][:5], (9, 4)),
    "selected": (lambda m, x: x * m.p[0][1], (3, 4)),
    "diagonal": (lambda m, x: x * m.p[0].diagonal(), (4, 4)),
    "reshaped": (lambda m, x: x + m.p[0].view(5, 4), (20,)),
    "in another dtype": (lambda m, x: F.linear(x.double(), m.p[0].double()).to(x), (3, 4)),
    "a class token": (lambda m, x: torch.cat([m.p[0].expand(len(x), -1, -1), x], 1), (1, 1, 4)),
    "queries": (lambda m, x: m.p[0].expand(len(x), 2, 4) @ x.mT, (2, 4)),
    "repeated": (lambda m, x: torch.cat([m.p[0].repeat(len(x), 1, 1), x], 1), (1, 2, 4)),
    "prelu by hand": (lambda m, x: torch.where(x > 0, x, m.p[0] * x), (1,)),
    "scaled twice": (lambda m, x: (x * m.p[0]).tanh() * m.p[0], (4,)),
}


def standardized(weight: Tensor) -> Tensor:
    """As for weight standardisation, by hand: its mean is used twice."""
    centred = weight - weight.mean((1, 2), keepdim=True)
    return centred / (centred.square().mean((1, 2), keepdim=True) + 1e-3).sqrt()


MASK = (torch.arange(28).view(7, 4) % 3 > 0).float()
PLACES = torch.arange(10.0).view(1, 5, 2) / 10

FUNCTIONS = {
    "cosine head": (
        lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.p[0], dim=1)),
        [(7, 4)],
    ),
    "normalised by hand": (
        lambda m, x: F.linear(x, m.p[0] / m.p[0].norm(dim=1, keepdim=True)),
        [(7, 4)],
    ),
    "of a view": (lambda m, x: F.linear(x, F.normalize(m.p[0].t()[1:], dim=1)), [(4, 7)]),
    "standardised": (
        lambda m, x: F.conv1d(x.mT, standardized(m.p[0]), padding=1).mT,
        [(7, 4, 3)],
    ),
    "cat of biases": (
        lambda m, x: F.linear(x, m.p[0], torch.cat([m.p[1], torch.zeros(2), m.p[2]])),
        [(7, 4), (2,), (3,)],
    ),
    "stacked": (lambda m, x: F.linear(x, torch.stack([m.p[0], m.p[1].exp()])), [(4,), (4,)]),
    "a product": (lambda m, x: F.linear(x, m.p[2] + 2 * m.p[0] @ m.p[1]), [(7, 2), (2, 4), (7, 4)]),
    "masked": (lambda m, x: F.linear(x, m.p[0] * MASK), [(7, 4)]),
    "mixed": (lambda m, x: sum(w * x**i for i, w in enumerate(m.p[0].softmax(0))), [(3,)]),
    "rows in another order": (lambda m, x: F.linear(x, m.p[0][[2, 0, 0, 5]]), [(7, 4)]),
    "a sum of squares": (lambda m, x: x + 0.1 * (m.p[0] ** 2).sum(), [(7,)]),
    "overlapping": (lambda m, x: F.linear(x, m.p[0].unfold(0, 4, 2)), [(12,)]),
    "network of constants": (
        lambda m, x: x + F.linear(F.linear(PLACES.to(x), m.p[0]).tanh(), m.p[1]),
        [(7, 2), (4, 7)],
    ),
    "a view of it": (lambda m, x: F.linear(x, F.normalize(m.p[0], dim=0)[1:4].exp()), [(7, 4)]),
    "twice": (
        lambda m, x: F.linear(F.linear(x, w := F.normalize(m.p[0], dim=1)).tanh(), w.t()),
        [(7, 4)],
    ),
    "beside itself": (
        lambda m, x: F.linear(x, m.p[0]).tanh() + F.linear(x, F.normalize(m.p[0], dim=1)),
        [(7, 4)],
    ),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_function_of_parameters(kind):
    use, shapes = FUNCTIONS[kind]
    check(Uses(use, *(randn(*shape) for shape in shapes)), torch.randn(N, 5, 4))


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


def reparametrised(kind: str, layer: nn.Module) -> nn.Module:
    if kind == "weight_norm, hook":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.utils.weight_norm(layer, dim=1)
    if kind == "weight_norm":
        return nn.utils.parametrizations.weight_norm(layer, dim=0)
    if kind == "spectral_norm":
        return nn.utils.parametrizations.spectral_norm(layer)
    return prune.random_unstructured(layer, "weight", amount=0.4)


@pytest.mark.parametrize("kind", ["weight_norm, hook", "weight_norm", "spectral_norm", "pruned"])
def test_reparametrised_module(kind):
    torch.manual_seed(0)
    convolution = reparametrised(kind, nn.Conv1d(4, 6, 3, groups=2)).eval()
    linear = reparametrised(kind, nn.Linear(6, 7)).eval()
    for p in (*convolution.parameters(), *linear.parameters()):
        nn.init.normal_(p)  # as made, the norm of the weight is what it is divided by
    with torch.no_grad():  # hooks keep the weight, which could not be copied with its history
        convolution(torch.randn(N, 4, 5))
        linear(torch.randn(N, 6))
    model = Uses(lambda m, x: m.b(m.a(x.mT).mT.tanh()), a=convolution, b=linear)
    check(model, torch.randn(N, 5, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_function_of_parameters_in_a_checkpoint(reentrant):
    """The functions' own graphs are not recomputed, and are used more than once."""
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)]
    body = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[0])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = model.first(x)
        if x.dtype == torch.float64:  # the loop
            return model.body(x).tanh().flatten(1).sum(1)
        y = checkpoint(model.body, x, use_reentrant=reentrant)
        return y.tanh().flatten(1).sum(1)

    check(Uses(None, body=body), torch.randn(N, 5, 4), loss)


def test_function_of_parameters_is_called_once():
    """In training and in a pass of its own: random numbers are drawn as they would be without."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        y = F.linear(model.first(x), F.dropout(model.p[0], 0.4))
        return (y * torch.rand(7)).flatten(1).sum(1)

    check(Uses(None, randn(7, 4)), torch.randn(N, 5, 4), loss)


def test_parameters_changed_before_their_gradient():
    model = Uses(lambda m, x: F.linear(x, F.normalize(m.p[0], dim=1)), randn(7, 4))
    message = r"'p\.0' was changed in place between the forward and the backward pass"

    def run() -> None:
        loss = losses(model, torch.randn(N, 5, 4)).sum()
        with torch.no_grad():
            model.p[0].mul_(2)
        loss.backward()

    with pytest.raises(RuntimeError, match=message), FisherEstimator(model).observe(N):
        run()


def test_left_out_with_what_it_is_used_with():
    """A weight whose scale has a use of its own that is not supported is left to random signs."""

    def use(model: nn.Module, x: Tensor) -> Tensor:
        y = F.linear(x, torch._weight_norm(model.p[0], model.p[1], 0))
        return torch.logaddexp(y, model.p[1].squeeze(1))

    model, x = Uses(use, randn(7, 4), randn(7, 1)), torch.randn(N, 5, 4)
    expected = loop(model, lambda m, n: losses(m, x[n : n + 1].double())[0], N)
    signed = estimate_fisher(
        model, [x], "empirical", per_sample_loss=losses, unsupported="sign", sign_draws=400,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert set(signed.metadata["sign"]["parameters"]) == {"p.0", "p.1"}
    for name in ("p.0", "p.1"):
        assert abs(float(signed.sums[name].sum() / expected[name].sum()) - 1) < 0.2
    skipped = estimate_fisher(model, [x], "empirical", per_sample_loss=losses, unsupported="skip")
    assert set(skipped.metadata["skipped"]) >= {"p.1"}
    fisher = FisherEstimator(model, unsupported="skip")
    with fisher.observe(N, loss_terms=1):
        losses(model, x).sum().backward()
    importance = fisher.finalize()
    for name, value in importance.sums.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", BARE)
def test_bare_parameter(kind):
    use, shape = BARE[kind]
    check(Uses(use, randn(*shape)), torch.randn(N, 5, 4))


def test_bare_scalar_keeps_the_dtype():
    """A scalar parameter takes no part in type promotion."""
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0))})
    x = torch.randn(N, 4).bfloat16()
    with FisherEstimator(model).observe(N):
        y = x * model.scale
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, x * 2)
        y.sum().backward()


def test_geometry():
    """Which views of a [4, 6] matrix share elements; compared with counting."""
    base = torch.arange(24).view(4, 6)
    views = [
        base, base[:2], base[2:], base[:, :3], base[:, 3:], base[:, ::2], base[:, 1::2], base[0],
        base[1], base.t(), base.t()[:3], base[1:3, 2:4], base.diagonal(), base[:, 0], base[:, 5],
    ]  # fmt: skip
    geometries = [Geometry(tuple(v.shape), v.stride(), v.storage_offset()) for v in views]
    assert all(geometry.is_injective() for geometry in geometries)
    assert not Geometry((3, 2), (0, 1), 0).is_injective()
    assert not Geometry((3, 2), (1, 1), 0).is_injective()
    apart = 0
    for a, x in zip(geometries, views, strict=True):
        assert torch.equal(a.of(base), x)
        for b, y in zip(geometries, views, strict=True):
            shared = not set(x.flatten().tolist()).isdisjoint(y.flatten().tolist())
            assert not (a.is_apart_from(b) and shared)
            apart += a.is_apart_from(b)
    assert apart >= 16  # of 34; it may be unsure


# --- several uses ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head is its embedding; ``mixing`` makes samples' gradients dense."""

    def __init__(self, bias: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=padding_idx)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh())


@pytest.mark.parametrize("options", [{}, {"bias": True, "padding_idx": 2}])
def test_tied_embedding_and_head(options):
    tokens = torch.tensor([[1, 2, 1, 5, 2], [3, 3, 3, 3, 3], [0, 8, 2, 0, 1]])
    check(Tied(**options), tokens)


# Without a fixed order on CUDA whatever torch is told, as its documentation has them.
UNORDERED = {
    "bincount", "cumsum", "histc", "kthvalue", "median", "put_", "scatter_reduce",
    "scatter_reduce_", "segment_reduce",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Notes which operations run, in the backward pass as well."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("use", ["embedding", "tied", "bag"])
def test_the_same_bits_each_time_where_torch_is_told_so(use, device, monkeypatch):
    """Else, rows of tables are added in any order on a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for then
    models = {
        "embedding": lambda: nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 9)),
        "tied": Tied,
        "bag": lambda: Bags(flat=False, last=False, weighted=False),
    }
    model = models[use]().to(device)
    tokens = torch.randint(0, 9, (8, 300)).to(device)
    operations, found = Operations(), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(4):
            model.zero_grad()
            fisher = FisherEstimator(model, verify=False)
            with operations, fisher.observe(len(tokens), loss_terms=1):
                losses(model, tokens).sum().backward()
            found.append(fisher.finalize().sums)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in found[0].items():
        assert value.isfinite().all()
        assert all(torch.equal(value, again[name]) for again in found[1:]), name
    assert not operations.names & UNORDERED
    assert "index_add_" in operations.names


def test_tied_squares_stay_positive():
    """Where embedding and head nearly cancel, rounding must not leave a square below 0."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = randn(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            looked_up = F.embedding(torch.zeros(len(x), 1, dtype=torch.long), self.w)
            return (F.linear(x, self.w)[..., 0] - (looked_up * x.detach()).sum(-1)) * 1e3

    model = Cancelling()
    fisher = FisherEstimator(model, verify=False)
    with fisher.observe(50):
        model(torch.randn(50, 1, 4)).sum().backward()
    value = fisher.finalize()["w"]
    assert (value >= 0).all()
    assert value.max() < 1e-4 * 50 * 1e6  # in place of squares of that size


def test_reused_modules():
    """Cross terms: all uses of a sample add before the square."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
    twice = Uses(lambda m, x: m.body(m.body(x) + x), body=model)
    check(twice, torch.randn(N, 5, 4))
    convolution = nn.Conv1d(4, 4, 3, padding=1)
    check(Uses(lambda m, x: m.c(m.c(x.mT).tanh()).mT, c=convolution), torch.randn(N, 5, 4))
    tokens = torch.randint(0, 5, (N, 6))
    table = nn.Embedding(5, 4)
    check(nn.Sequential(table, Uses(lambda m, x: x * m.e(tokens), e=table)), tokens, one_by_one)


def one_by_one(model: nn.Module, tokens: Tensor) -> Tensor:
    """For the model above, whose second lookup must be of the same samples."""
    x = model[0](tokens)
    return (model[1].first(x) * model[1].e(tokens)).tanh().flatten(1).sum(1)


def test_tied_weight_and_bias():
    model = nn.LayerNorm(4)
    model.bias = model.weight
    check(model, torch.randn(N, 5, 4))
    model = nn.Linear(4, 4)
    model.bias = nn.Parameter(torch.randn(4))
    other = nn.LayerNorm(4)
    other.weight = model.bias
    check(nn.Sequential(model, other), torch.randn(N, 5, 4))


def test_a_use_without_gradient():
    """It is not waited for longer than the batch."""
    check(Uses(lambda m, x: m.first(x) + 0 * m.first(x).detach()), torch.randn(N, 4))


def test_two_forward_passes_of_the_same_samples():
    """As for two views of the same data: one observe(), one backward pass."""
    model, x = nn.Linear(4, 3), torch.randn(N, 4)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x).tanh() * model(2 * x)).sum(-1)

    check(model, x, loss)


def test_functional_call():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    named = dict(model.named_parameters())

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        parameters = named if m is model else dict(m.named_parameters())
        return torch.func.functional_call(m, parameters, (x,)).tanh().sum(-1)

    check(model, torch.randn(N, 4), loss)


def test_flattened_tokens():
    """[N·T, in], where T is known from another tensor."""
    layers = nn.Linear(4, 4), nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (N, 5))
    model = nn.Sequential(*layers)
    alone = copy.deepcopy(model)
    alone[3] = nn.Unflatten(0, (1, 5))
    x = torch.randn(N, 5, 4)
    expected = loop(alone, lambda m, n: m(x[n : n + 1].double()).tanh().sum(), N)
    fisher = FisherEstimator(model)
    with fisher.observe(N, loss_terms=1):
        model(x).tanh().sum().backward()
    assert_sums(fisher.finalize(), expected, 1e-5)


# --- tables ---------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Looks positions up once for all samples, as many published models do."""

    def __init__(self, shape: tuple[int, ...], function=lambda x: x) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 4), nn.Embedding(9, 4, padding_idx=1)
        self.head = nn.Linear(4, 3)
        self.indices, self.function = torch.tensor([0, 3, 3, 1, 2]).view(shape), function

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.token(tokens) + self.function(self.position(self.indices)))


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_positions(shape):
    tokens = torch.randint(0, 9, (N, 5))
    check(Positions(shape), tokens)
    check(Positions(shape, lambda x: (2 * x[..., :4]).exp()), tokens)


def test_positions_or_samples():
    """As many indices as samples, and sequences as long: the shape does not tell."""
    model = Positions((5,))
    tokens = torch.randint(0, 9, (5, 5))
    message = r"^parameter 'position\.weight' met 5 indices, which may be samples or positions"
    with pytest.raises(ValueError, match=message), FisherEstimator(model).observe(5):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, [tokens], labels="sample")
    # After a batch of another size it is known.
    batches = [torch.randint(0, 9, (6, 5)), tokens]
    importance = estimate_fisher(model, batches, labels="predicted")
    assert_sums(importance, oracle(model, torch.cat(batches), predicted_labels), 1e-5)


def test_a_table_by_sample():
    """One index per sample, as for a class."""

    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label, self.body = nn.Embedding(3, 4), nn.Linear(4, 4)

        def forward(self, labels: Tensor) -> Tensor:
            return self.body(self.label(labels))

    check(Conditional(), torch.tensor([2, 0, 2]))


class Relative(nn.Module):
    """Attention with a bias for each distance, looked up for all samples at once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.token, self.bias = nn.Embedding(9, 8), nn.Embedding(11, 2)
        self.qkv, self.kind = nn.Linear(8, 24), kind

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.token(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        length = tokens.shape[1]
        distance = torch.arange(length)[None] - torch.arange(length)[:, None] + 5
        if self.kind == "swin":
            bias = self.bias.weight[distance.view(-1)].view(length, length, 2).permute(2, 0, 1)
            return (((q @ k.mT) + bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        bias = self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        if self.kind == "t5":
            return ((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        bias = torch.where(causal, bias, -1e4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [3, 5, 6])  # as long as the batch; a multiple of it
@pytest.mark.parametrize("kind", ["t5", "swin", "sdpa"])
def test_relative_positions(kind, length):
    check(Relative(kind), torch.randint(0, 9, (N, length)))


class Bag(nn.Module):
    """Tokens whose embeddings are viewed in some way at once."""

    def __init__(self, view) -> None:
        super().__init__()
        self.token, self.head, self.view = nn.Embedding(9, 4), nn.Linear(4, 2), view

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.view(self.token(tokens))
        assert x.size(-1) == 4
        return self.head(x).view(len(tokens), -1)


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:, -1], lambda x: x.flatten(0, 1), lambda x: x.sum(1)]
)
def test_as_many_tokens_as_samples(view):
    """[N, N] indices of tokens are no pairs of positions."""
    check(Bag(view), torch.randint(0, 9, (N, N)))


def test_as_many_tokens_as_samples_in_attention():
    """Which swaps [N, T] at once, and back."""
    check(nn.Sequential(nn.Embedding(9, 8), Block(batch_first=True)), torch.randint(0, 9, (N, N)))


def test_table_by_index():
    """As an embedding: of samples, of positions, and with one number for each row."""
    labels = torch.tensor([2, -1, 2])

    def loss(model: nn.Module, pair: Tensor) -> Tensor:
        y = model.first(pair[:, 1:].to(model.first.weight.dtype)).unsqueeze(1)
        chosen = labels[pair[:, 0].long()]
        y = (y * model.p[0][chosen].unsqueeze(1) + model.p[1][[0, 3, 3, 1, -1]]).tanh()
        return (y * model.p[2][chosen].view(-1, 1, 1)).flatten(1).sum(1)

    x = torch.cat([torch.arange(3.0).unsqueeze(1), torch.randn(N, 4)], 1)
    check(Uses(None, randn(5, 4), randn(6, 4), randn(7)), x, loss)


class Bags(nn.Module):
    """Bags of words, each followed by a linear layer; as [N, L] or one after another."""

    def __init__(self, flat: bool, last: bool, weighted: bool, **options) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(9, 4, include_last_offset=last, **options)
        self.head, self.flat, self.last, self.weighted = nn.Linear(4, 3), flat, last, weighted

    def forward(self, tokens: Tensor) -> Tensor:
        """Of each row of tokens, those that are not −1."""
        weights = (0.3 + tokens.to(self.head.weight.dtype) / 5) if self.weighted else None
        if self.flat:
            kept = tokens >= 0
            offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
            offsets = offsets if self.last else offsets[:-1]
            weights = None if weights is None else weights[kept]
            return self.head(self.table(tokens[kept], offsets, weights))
        return self.head(self.table(tokens.clamp_min(0), per_sample_weights=weights))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding_idx", [None, -2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_embedding_bag(mode, padding_idx, last, flat):
    """With an empty bag, words that are there twice, and a bag of padding."""
    options = {"mode": "sum" if mode == "weighted" else mode, "padding_idx": padding_idx}
    model = Bags(flat, last, mode == "weighted", **options)
    tokens = torch.tensor([[1, 7, 1, 5, 3], [-1, -1, -1, -1, -1], [7, 7, -1, -1, -1]])
    tokens = torch.cat([tokens, torch.tensor([[0, 8, 7, -1, -1]])])
    with FisherEstimator(model).observe(4):
        found = model(tokens)
        found.sum().backward()
    torch.testing.assert_close(found, model(tokens))
    check(model, tokens)


def test_large_table_stays_sparse():
    """Nothing of size N × V × D is formed: here that would be 26 GB."""
    table = nn.Embedding(400_000, 4)
    tokens = torch.randint(0, 400_000, (64, 64))
    fisher = FisherEstimator(table, verify=False)
    with fisher.observe(64):
        table(tokens).square().sum().backward()
    assert fisher.finalize().sums["weight"].count_nonzero() > 0


# --- rows of several samples ---------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts of a mixture, of which each token has one; written in some way."""

    def __init__(self, use) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(2)
        )
        self.w, self.v = randn(2, 4, 6), randn(2, 6, 4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        scores = self.router(x.flatten(0, 1)).softmax(-1)
        return self.use(self, x.flatten(0, 1), scores).view_as(x) + x


def by_index_select(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        rows = (scores.argmax(-1) == e).nonzero().squeeze(1)
        y = expert(x.index_select(0, rows)) * scores.index_select(0, rows)[:, e : e + 1]
        out.index_add_(0, rows, y)
    return out


def by_index(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """As in transformers 4."""
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        (top_x,) = torch.where(scores.argmax(-1) == e)
        chosen = x[None, top_x].reshape(-1, 4)
        y = expert(chosen) * scores[top_x, e, None]
        out = out.index_add(0, top_x, y)
    return out


def by_mask(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = scores.argmax(-1) == e
        out[mask] = expert(x[mask]) * scores[mask][:, e].unsqueeze(-1)
    return out


def by_capacity(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """Into a buffer of as many rows as there are tokens, for each expert a part."""
    order = scores.argmax(-1).argsort()
    half = len(order) // 2
    buffer = torch.zeros(2, half, 4).to(x)
    buffer[torch.arange(2 * half) // half, torch.arange(2 * half) % half] = x[order[: 2 * half]]
    y = torch.bmm(torch.bmm(buffer, m.w).tanh(), m.v).flatten(0, 1)
    out = torch.zeros_like(x)
    return out.index_add(0, order[: 2 * half], y)


def for_all(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """Each expert has all tokens, weighted by its scores before it."""
    each = x.repeat(2, 1) * scores.t().reshape(-1, 1)
    y = torch.bmm(torch.bmm(each.view(2, -1, 4), m.w).tanh(), m.v)
    return y.sum(0)


def expanded(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    y = (x.unsqueeze(0).expand(2, -1, -1) @ m.w).tanh() @ m.v
    return (y * scores.t().unsqueeze(-1)).sum(0)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "use", [by_index_select, by_index, by_mask, by_capacity, for_all, expanded]
)
def test_experts(use, length):
    """Lengths at which some expert has as many rows as there are samples, too."""
    torch.manual_seed(length)
    model, x = Routed(use), torch.randn(N, length, 4)
    if use is by_capacity:  # which rows an expert has depends on the batch
        check_losses_apart(model, x)
    else:
        check(model, x)


def check_losses_apart(model: nn.Module, x: Tensor) -> None:
    """Where a sample cannot be had alone: against the gradient of each one's loss in the batch."""
    named = dict(model.named_parameters())
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    wide = copy.deepcopy(model).double()
    for n in range(len(x)):
        wide.zero_grad()
        losses(wide, x.double())[n].backward()
        for name, p in wide.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad**2
    fisher = FisherEstimator(model, verify=False)
    with fisher.observe(len(x), loss_terms=1):
        losses(model, x).sum().backward()
    assert_sums(fisher.finalize(), expected, 1e-5)
    importance = estimate_fisher(model, [x], "empirical", per_sample_loss=losses)
    assert_sums(importance, expected, 1e-5)


def chosen(m: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """A matrix for each row, in the order of the experts."""
    expert, order = scores.argmax(-1).sort()
    y = torch.bmm(x[order].unsqueeze(1), m.w[expert]).tanh()
    v = m.v[expert]
    y = (v.mT @ y.mT).squeeze(-1) * v[:, 0] * F.normalize(m.w[:, :, 0], dim=1)[expert]
    return torch.zeros_like(x).index_add(0, order, y)


@pytest.mark.parametrize("use", [for_all, chosen])
def test_experts_in_other_sums(use, monkeypatch):
    """Σ|g|, and Σg² where a sample's gradients fill a chunk."""
    model, x = Routed(use).eval(), torch.randn(N, 5, 4)
    monkeypatch.setattr("cl_optim.fisher.per_sample.base.CHUNK_BYTES", 1)
    check(model, x)
    wide = copy.deepcopy(model).double()
    named = dict(wide.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(N):
        loss = wide(x[n : n + 1].double()).square().sum()
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, g in zip(named, grads, strict=True):
            expected[name] += 0.0 if g is None else g.abs()
    assert_sums(estimate_fisher(model, [x], kind="mas"), expected, 1e-5)


def test_gathered_rows():
    """One token of each sample, and those that are masked, as in heads of language models."""
    place = torch.tensor([4, 0, 2])
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)

    def loss(model: nn.Module, x: Tensor, n: slice = slice(None)) -> Tensor:
        y = model.first(x)
        pooled = model.p[0] * y[torch.arange(len(y)), place[n]]
        rows = F.layer_norm(y[mask[n]] @ model.p[1], (4,), model.p[2])
        sample = torch.arange(len(y)).unsqueeze(1).expand_as(mask[n])[mask[n]]
        ends = torch.zeros(len(y), 4).to(y).index_add(0, sample, rows.tanh())
        return (pooled.tanh() * ends).sum(1)

    model, x = Uses(None, randn(4), randn(4, 4), randn(4)), torch.randn(N, 5, 4)
    expected = loop(model, lambda m, n: loss(m, x[n : n + 1].double(), slice(n, n + 1))[0], N)
    fisher = FisherEstimator(model)
    with fisher.observe(N, loss_terms=1):
        loss(model, x).sum().backward()
    assert_sums(fisher.finalize(), expected, 1e-5)
    assert_sums(estimate_fisher(model, [x], "empirical", per_sample_loss=loss), expected, 1e-5)


@pytest.mark.parametrize("repeat", ["method", "function", "dim"])
def test_rows_repeated_by_lengths(repeat):
    """The sample of each row of a ragged batch, as models make it from lengths."""
    lengths = torch.tensor([2, 1, 3])

    def loss(model: nn.Module, x: Tensor, n: slice = slice(None)) -> Tensor:
        order = torch.arange(len(x))
        sample = {
            "method": lambda: order.repeat_interleave(lengths[n]),
            "function": lambda: torch.repeat_interleave(order, lengths[n]),
            "dim": lambda: order.repeat_interleave(lengths[n], dim=-1),
        }[repeat]()
        rows = (model.first(x)[sample] @ model.p[0]).tanh()
        return torch.zeros(len(x), 4).to(rows).index_add(0, sample, rows).square().sum(1)

    model, x = Uses(None, randn(4, 4)), torch.randn(N, 4)
    expected = loop(model, lambda m, n: loss(m, x[n : n + 1].double(), slice(n, n + 1))[0], N)
    fisher = FisherEstimator(model)
    with fisher.observe(N, loss_terms=1):
        loss(model, x).sum().backward()
    assert_sums(fisher.finalize(), expected, 1e-5)


def test_mixed_samples():
    """Each sample with part of another: they remain samples, and convolutions have them, too."""

    model, x = Uses(None, c=nn.Conv1d(4, 4, 3)), torch.randn(N, 5, 4)
    model.use = lambda m, y: m.c(y.mT).mT
    fisher = FisherEstimator(model)
    with fisher.observe(N, loss_terms=1):
        y = 0.7 * x + 0.3 * x[torch.tensor([2, 0, 1])]
        losses(model, y).sum().backward()
    expected = loop(model, lambda m, n: losses(m, y[n : n + 1].double())[0], N)
    assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.mark.parametrize(
    "move",
    [lambda x: x[[2, 0, 1]].transpose(0, 1), lambda x: x.gather(0, torch.ones_like(x).long())],
)
def test_rows_of_unknown_samples_are_refused(move):
    """Even where their number would suit."""
    model, x = Uses(lambda m, x: F.linear(move(x), m.p[0]), randn(2, 4)), torch.randn(N, N, 4)
    message = r"'p\.0' met rows of shape \[3, 3, 4\] .*not known; estimate .*False\)\.$"
    with pytest.raises(ValueError, match=message), FisherEstimator(model).observe(N):
        model(x)
    skipped = estimate_fisher(
        model, [x], "empirical", per_sample_loss=losses, unsupported="skip", verify=False
    )
    assert set(skipped.metadata["skipped"]) == {"p.0"}


# --- packed batches -------------------------------------------------------------------------------


class Packed(nn.Module):
    """A language model over packed sequences; attention stays within each."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.scale = nn.LayerNorm(4), randn(4)
        self.head = nn.Linear(4, 9)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, positions: Tensor, sample: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(positions)
        q, v = self.q(self.norm(x)), self.v(x) * self.scale
        scores = (q @ q.mT).masked_fill(sample[:, None] != sample[None], -torch.inf)
        return self.head(x + scores.softmax(-1) @ v)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("leading", [True, False])
def test_packed(tied, leading):
    """[1, ΣT] or [ΣT], against each sequence alone."""
    lengths = [4, 1, 7, 3]
    offsets = [0, 4, 5, 12, 15]
    model = Packed(tied)
    tokens = torch.randint(0, 9, (15,))
    positions = torch.cat([torch.arange(t) for t in lengths])
    sample = torch.arange(4).repeat_interleave(torch.tensor(lengths))

    def one(model: nn.Module, n: int) -> Tensor:
        part = slice(offsets[n], offsets[n + 1])
        return model(tokens[part], positions[part], sample[part]).tanh().sum()

    expected = loop(model, one, 4)
    for cu_seqlens in (offsets, torch.tensor(offsets, dtype=torch.int32)):
        fisher = FisherEstimator(model)
        with fisher.observe(cu_seqlens=cu_seqlens, loss_terms=1):
            if leading:
                y = model(tokens[None], positions[None], sample)
            else:
                y = model(tokens, positions, sample)
            y.tanh().sum().backward()
        importance = fisher.finalize()
        assert_sums(importance, expected, 1e-5)
        assert (importance.samples, importance.tokens) == (4, 15)


# --- rules of one's own ---------------------------------------------------------------------------


def scaled(input: Tensor, weight: Tensor, power: float = 1.0) -> Tensor:
    """A function of one's own that modes can see."""
    if torch.overrides.has_torch_function((input, weight)):
        return torch.overrides.handle_torch_function(
            scaled, (input, weight), input, weight, power=power
        )
    return torch.einsum("...d,d->...d", input, weight)


def rule(input: Tensor, weight: Tensor, power: float = 1.0) -> Use:
    if power != 1.0:
        raise UnsupportedUseError(f"power = {power} is not supported")

    def gradients(samples, grad_output, input):
        return [samples.sum(grad_output * input, features=1)]

    return Use(input, features=1, parameters=(weight,), saved=(input,), gradients=gradients)


def test_register_fisher_rule(monkeypatch):
    monkeypatch.setattr(
        "cl_optim.fisher.rules.registry.RULES", dict(cl_optim.fisher.rules.registry.RULES)
    )
    monkeypatch.setattr(
        "cl_optim.fisher.observe.observation.RULES", cl_optim.fisher.rules.registry.RULES
    )
    model = Uses(lambda m, x: scaled(x, m.p[0]), randn(4))
    x = torch.randn(N, 5, 4)
    message = r"scaled uses parameter 'p\.0', and there is no rule for that .*takes one"
    with pytest.raises(NotImplementedError, match=message), FisherEstimator(model).observe(N):
        model(x)
    cl_optim.register_fisher_rule(scaled, rule)
    check(model, x)
    model.use = lambda m, x: scaled(x, m.p[0], power=2.0)
    message = r"scaled uses parameter 'p\.0' in a way that is not supported: power = 2"
    with pytest.raises(NotImplementedError, match=message), FisherEstimator(model).observe(N):
        model(x)


@pytest.mark.parametrize("own_pass", [False, True])
def test_a_wrong_rule_is_caught(monkeypatch, own_pass):
    rules = dict(cl_optim.fisher.rules.registry.RULES)
    monkeypatch.setattr("cl_optim.fisher.observe.observation.RULES", rules)

    def wrong(input: Tensor, weight: Tensor, power: float = 1.0) -> Use:
        use = rule(input, weight)
        forget = lambda samples, grad, input: [samples.sum(grad, features=1)]  # noqa: E731
        return Use(use.input, 1, use.parameters, use.saved, forget)

    rules[scaled] = wrong
    model = Uses(lambda m, x: scaled(x, m.p[0]), randn(4))
    x = torch.randn(N, 5, 4)
    message = r"self-check failed.* parameter 'p\.0' differs from its gradient by"
    if own_pass:
        with pytest.raises(ValueError, match=message):
            estimate_fisher(model, [x], "empirical", per_sample_loss=losses)
    else:
        with pytest.raises(RuntimeError, match=message), FisherEstimator(model).observe(N):
            losses(model, x).sum().backward()
