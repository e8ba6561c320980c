"""Progressive networks: the formula, and that what is old stays bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from bad_input import each_of, refused
from torch import nn
from torch.nn import functional as F

import cl_optim
from cl_optim.retention import ProgressiveNetwork


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


CASES = {
    "mlp": (mlp, ["4"], (6,)),
    "cnn": (cnn, ["2", "5"], (2, 7, 7)),
    "none": (mlp, [], (6,)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


def learn(net, shape, steps=4):
    optimizer = cl_optim.EWCAdamW(net.new_parameters(), lr=1e-2, weight_decay=0.1)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(16, *shape)), torch.randint(3, (16,))).backward()
        optimizer.step()
    return optimizer


def test_old_columns_stay_bit_for_bit(case):
    factory, lateral, shape = case
    net, x = ProgressiveNetwork(factory, lateral), torch.randn(32, *shape)
    logits, states = [], []
    for task in range(4):
        assert len(net) == task + 1
        learn(net, shape)
        net.eval()
        logits.append(net(x).detach().clone())
        states.append({k: v.clone() for k, v in net.columns[task].state_dict().items()})
        assert net.add_column() == task + 1
        learn(net, shape)  # with weight decay, and batch norm and dropout in training mode
        for mode in (True, False):
            net.train(mode)
            for old in range(task + 1):
                assert torch.equal(net(x, task=old), logits[old])
                assert not net(x, task=old).requires_grad
        for old, state in enumerate(states):
            for name, value in net.columns[old].state_dict().items():
                assert torch.equal(value, state[name])


def test_every_new_parameter_learns_and_no_other(case):
    factory, lateral, shape = case
    net = ProgressiveNetwork(factory, lateral)
    net.add_column()
    net.add_column()
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    new = {name for name, _ in net.new_parameters()}
    learn(net, shape)
    moved = {n for n, param in net.named_parameters() if not torch.equal(param, before[n])}
    assert moved == new
    assert all(name.startswith(("columns.2.", "adapters.2.")) for name in new)
    assert sum("adapters" in name for name in new) == 4 * len(lateral)


def test_formula():
    torch.manual_seed(0)
    net, x = ProgressiveNetwork(mlp, ["4"]).eval(), torch.randn(5, 6)
    net.add_column()
    net.add_column()
    net.eval()
    hidden = [column[:4](x) for column in net.columns]
    for task in (0, 1, 2):
        expected = net.columns[task][4](hidden[task])
        if task:
            (adapter,) = net.adapters[task]
            scaled = torch.cat([0.1 * hidden[j] for j in range(task)], dim=1)
            v, u = adapter.project, adapter.up
            inner = torch.relu(scaled @ v.weight.T + v.bias)
            expected = expected + inner @ u.weight.T
        torch.testing.assert_close(net(x, task=task), expected)


def test_what_old_columns_compute_matters():
    torch.manual_seed(0)
    net, x = ProgressiveNetwork(cnn, ["2"]), torch.randn(5, 2, 7, 7)
    net.add_column()
    before = net(x)
    with torch.no_grad():
        net.columns[0][0].weight.mul_(2)
    assert not torch.equal(net(x), before)


def test_state_dict_brings_its_columns(case):
    factory, lateral, shape = case
    net, x = ProgressiveNetwork(factory, lateral), torch.randn(3, *shape)
    for _ in range(2):
        net.add_column()
        learn(net, shape)
    net.eval()
    fresh = ProgressiveNetwork(factory, lateral).eval()
    fresh.load_state_dict(net.state_dict())
    nested = nn.ModuleDict({"net": ProgressiveNetwork(factory, lateral)}).eval()
    nested.load_state_dict({f"net.{name}": value for name, value in net.state_dict().items()})
    for other in (fresh, nested["net"], copy.deepcopy(net)):
        assert len(other) == 3
        for task in range(3):
            assert torch.equal(other(x, task=task), net(x, task=task))
        assert [n for n, _ in other.new_parameters()] == [n for n, _ in net.new_parameters()]
    smaller = ProgressiveNetwork(factory, lateral).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(smaller)


def test_ewc_on_the_newest_column():
    torch.manual_seed(0)
    net, x = ProgressiveNetwork(cnn, ["2", "5"]), torch.randn(24, 2, 7, 7)
    net.add_column()
    optimizer = learn(net, (2, 7, 7))
    importance = cl_optim.estimate_fisher(net, x.split(8), labels="exact", progress=False)
    names = {name for name, _ in net.new_parameters()}
    assert names <= set(importance)
    optimizer.consolidate({name: importance[name] for name in names})
    assert optimizer.penalty() == 0
    learned = dict(net.new_parameters())
    with torch.no_grad():
        for param in learned.values():
            param.add_(0.1)
    by_hand = sum(0.01 * importance[name].double().sum() for name in names)
    assert optimizer.penalty().item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_growth():
    net = ProgressiveNetwork(mlp, ["4"])
    net.add_column()
    net.add_column()
    column = 6 * 8 + 8 + 16 + 8 * 3 + 3
    adapter = [0, 8 * 8 + 8 + 8 * 3 + 1, 16 * 8 + 8 + 8 * 3 + 2]
    rows = net.growth()
    assert [(g.column, g.weights, g.lateral) for g in rows] == [
        (k, column, adapter[k]) for k in range(3)
    ]
    assert rows[-1].total == 3 * column + sum(adapter) == sum(p.numel() for p in net.parameters())


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(input=x)


def test_columns_follow_the_network_and_layers_may_be_called_by_keyword():
    net = ProgressiveNetwork(ByKeyword, ["layer"]).double()
    net.add_column()
    assert {param.dtype for param in net.parameters()} == {torch.float64}
    assert net(torch.zeros(3, 4, dtype=torch.float64)).shape == (3, 2)
    with torch.inference_mode():
        net(torch.zeros(3, 4, dtype=torch.float64))


class Twice(nn.Module):
    def __init__(self, uses):
        super().__init__()
        self.layer, self.uses = nn.Linear(4, 4), uses

    def forward(self, x):
        for _ in range(self.uses):
            x = self.layer(x)
        return x


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.sub_(1))


LATERAL = r"lateral must name .*\['0', '4'\], but "
BAD = [
    *((f"layer {name!r}", lambda name=name: ProgressiveNetwork(mlp, [name]),
       ValueError, f"{LATERAL}{name!r} is {what}")
      for name, what in {"7": "not in it", "1": "a BatchNorm1d", "": "a Sequential"}.items()),
    *((f"task {task}", lambda task=task: ProgressiveNetwork(mlp, [])(torch.zeros(2, 6), task=task),
       ValueError, f"task must be a column from 0 to 0, not {task}") for task in (-1, 1)),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence(given, error, message):
    with refused(error, message):
        given()


@pytest.mark.parametrize("uses", [0, 2])
def test_a_layer_is_used_once(uses):
    net = ProgressiveNetwork(lambda: Twice(uses), ["layer"])
    with refused(RuntimeError, f"'layer' must be used once .* not {uses} times"):
        net(torch.zeros(2, 4))
    assert not net.columns[0].layer._forward_hooks


def test_a_column_does_not_change_its_input():
    net = ProgressiveNetwork(lambda: InPlace(4, 2), [])
    net(torch.zeros(2, 4))  # nobody else gets it
    net.add_column()
    with refused(RuntimeError, "column 0 must not change its input in place"):
        net(torch.zeros(2, 4))


def test_a_factory_that_changes_its_mind_changes_nothing():
    makers = iter([mlp, cnn])
    net = ProgressiveNetwork(lambda: next(makers)(), ["4"])
    with refused(ValueError, "'4' is a Flatten"):
        net.add_column()
    assert len(net) == 1
    assert all(param.requires_grad for param in net.parameters())
