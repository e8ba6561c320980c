"""The plugins in Avalanche's strategies, or in what stands in for them where it is not installed.

``make bench-avalanche`` runs these with Avalanche itself.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import avalanche_cases
import pytest
import torch
from avalanche_cases import Grown, Heads, Naive, benchmark, mlp, split_online_stream, strategy
from paths import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

import cl_optim
from cl_optim import EWC, GEM, EWCAdamW
from cl_optim.integrations.avalanche import EWCPlugin, GEMPlugin

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:avalanche"),
    pytest.mark.filterwarnings("ignore:No loggers specified"),
]
needs_avalanche = pytest.mark.skipif(
    not avalanche_cases.IS_REAL, reason="Avalanche is not installed: make bench-avalanche"
)
MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "EWCAdamW": lambda m: EWCAdamW(
        m.named_parameters(), lr=1e-2, penalty="proximal", strength=0.1, every=4
    ),
    "EWC": lambda m: EWC(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), strength=0.01),
    "GEM": lambda m: GEM(
        EWCAdamW(m.parameters(), lr=1e-2, penalty="proximal", strength=0.1, every=4)
    ),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def samples(experience: Any) -> tuple[Tensor, Tensor]:
    rows = [experience.dataset[index] for index in range(len(experience.dataset))]
    return torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])


def importance_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    found = {one.param: one.importance for one in optimizer.protected()}
    return {name: found[param] for name, param in model.named_parameters() if param in found}


# --- EWC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_each_experience_is_consolidated_once(make, structure):
    model, stream = mlp(), benchmark().train_stream
    plugin = EWCPlugin(structure, max_samples=None)
    one = strategy(model, make(model), plugin)
    one.train(stream[0])
    expected = cl_optim.estimate_fisher(
        model, [samples(stream[0])], max_samples=None, structure=structure
    )
    found = importance_of(one.optimizer, model)
    assert list(found) == list(dict(model.named_parameters()))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)
    anchors = [protected.anchor for protected in one.optimizer.protected()]
    assert same(anchors, weights(model))
    one.train([stream[1], stream[2]])
    (group,) = one.optimizer.param_groups
    assert (group["consolidations"], group["tasks"]) == (3, 3.0)
    assert same([p.anchor for p in one.optimizer.protected()], weights(model))


@pytest.mark.parametrize(
    ("structure", "keeping"),
    [
        ("diagonal", {}),
        ("diagonal", {"anchors": "exact", "decay": 0.5, "reset_state": True}),
        ("kronecker", {"decay": 0.5}),
    ],
)
def test_it_is_what_a_loop_of_ones_own_does(structure, keeping):
    """Of whole batches, so that the order of samples says nothing but how sums are rounded."""
    torch.set_default_dtype(torch.float64)
    try:
        model, stream = mlp(), benchmark().train_stream
        twin = copy.deepcopy(model)
        one = strategy(
            model,
            MAKERS["EWCAdamW"](model),
            EWCPlugin(structure, None, **keeping),
            train_mb_size=48,
        )
        optimizer = MAKERS["EWCAdamW"](twin)
        for experience in stream:
            one.train(experience)
            x, y = samples(experience)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(twin(x), y).backward()
                optimizer.step()
            optimizer.consolidate(
                cl_optim.estimate_fisher(twin, [(x, y)], max_samples=None, structure=structure),
                **keeping,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, by_hand in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_heads_are_protected_by_their_own_experience(make, structure):
    data, model = benchmark(), Heads()
    one = strategy(model, make(model), EWCPlugin(structure, max_samples=None))
    heads = ("head.classifiers.0", "head.classifiers.1", "head.classifiers.2")
    kept: dict[str, Tensor] = {}
    for number, experience in enumerate(data.train_stream):
        one.train(experience)
        one.eval(data.test_stream)  # which makes heads of tasks that are still to come
        found = importance_of(one.optimizer, model)
        for name, value in kept.items():
            if structure == "diagonal":  # factors of sums are merged, and rounded
                assert torch.equal(found[name], value)
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
        for later in heads[number + 1 :]:
            assert not any(v.any() for name, v in found.items() if name.startswith(later))
        own = {n: v for n, v in found.items() if n.startswith(heads[number])}
        assert len(own) == 2
        assert all(value.any() for value in own.values())
        kept |= own

        class OfOneTask(nn.Module):
            def __init__(self, inner: nn.Module, label: int) -> None:
                super().__init__()
                self.module, self.label = inner, label

            def forward(self, x: Tensor) -> Tensor:
                return self.module(x, torch.full((len(x),), self.label))

        alone = cl_optim.estimate_fisher(
            OfOneTask(model, number), [samples(experience)], max_samples=None, structure=structure
        )
        for name, value in own.items():
            torch.testing.assert_close(value, alone[f"module.{name}"], rtol=1e-3, atol=1e-6)


def test_names_follow_parameters_that_are_added():
    data, model = benchmark(), Heads()
    one = strategy(model, MAKERS["EWCAdamW"](model), EWCPlugin())
    for experience in data.train_stream:
        one.train(experience)
    named = {param: name for name, param in model.named_parameters()}
    (group,) = one.optimizer.param_groups
    assert group["param_names"] == [named[param] for param in group["params"]]
    assert len(group["params"]) == 8
    fresh = EWCAdamW(model.named_parameters(), lr=1e-2, penalty="proximal", strength=0.1)
    fresh.load_state_dict(one.optimizer.state_dict())  # by name
    for name, value in importance_of(fresh, model).items():
        assert torch.equal(value, importance_of(one.optimizer, model)[name])


def test_samples_are_drawn_once_and_from_all_of_the_experience():
    seen: list[list[int]] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[1].tolist())
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    x, y = torch.randn(48, 6), torch.arange(48) // 12  # sorted by class
    data = avalanche_cases.tensors_benchmark(
        train_tensors=[(x, y)], test_tensors=[(x, y)], task_labels=[0]
    )
    model = mlp(classes=4)
    plugin = EWCPlugin(
        "kronecker", 24, batch_size=8, labels="empirical", per_sample_loss=loss, verify=False,
        scale="exact",
    )  # fmt: skip
    strategy(model, MAKERS["EWCAdamW"](model), plugin).train(data.train_stream[0])
    first, second = seen[:3], seen[3:]
    assert first == second  # each of the two passes
    drawn = [label for batch in first for label in batch]
    assert len(drawn) == 24
    assert set(drawn) == {0, 1, 2, 3}


def test_what_the_optimizer_knew_before_is_kept():
    """Avalanche resets it when a strategy first trains."""
    stream = benchmark().train_stream
    for plugins in ([], [EWCPlugin()]):
        model = mlp()
        optimizer = MAKERS["EWCAdamW"](model)
        F.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
        optimizer.consolidate(None)
        one = strategy(model, optimizer, *plugins, train_epochs=1)
        one.train(stream[0])
        steps = {float(state["step"]) for state in optimizer.state.values()}
        (group,) = optimizer.param_groups
        if plugins:
            assert steps == {7.0}
            assert group["consolidations"] == 2
            (total,) = {float(p.importance.min() >= 1.0) for p in optimizer.protected()}
            assert total == 1.0  # L2-SP's F = 1 is still in it
        else:
            assert steps == {6.0}
            assert not [*optimizer.protected()]  # which is what is to be avoided


def test_what_is_due_is_taken_before_an_evaluation():
    data, model = benchmark(), mlp()
    one = strategy(model, MAKERS["EWCAdamW"](model), EWCPlugin("kronecker"))
    one.train(data.train_stream[0])
    x, y = samples(data.train_stream[1])
    for _ in range(3):  # of 4
        one.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        one.optimizer.step()
    ahead = weights(model)
    one.eval(data.test_stream)
    settled = weights(model)
    assert not same(ahead, settled)
    one.optimizer.settle()
    assert same(settled, weights(model))


def test_training_flags_are_left_as_they_are():
    data, model = benchmark(), mlp()
    one = strategy(model, MAKERS["EWCAdamW"](model), EWCPlugin())
    one.train(data.train_stream[0])
    assert all(module.training for module in model.modules())


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Unnamed(Heads):
    """Takes whatever comes."""

    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


def _with_another_optimizer(one: Naive) -> None:
    one.optimizer = MAKERS["EWCAdamW"](one.model)
    one.train(benchmark().train_stream[1])


def _with_another_layer(one: Naive) -> None:
    one.model[2] = nn.Linear(8, 2)
    one.train(benchmark().train_stream[1])


REFUSED: dict[str, tuple[Callable[[], Naive], Callable[[Naive], object], str]] = {
    "another optimizer": (
        lambda: strategy((m := mlp()), _sgd(m), EWCPlugin()),
        lambda one: one.train(benchmark().train_stream[0]),
        r"not SGD: give it cl_optim\.EWCAdamW\(.*\), or cl_optim\.EWC\(.*one that it has\.$",
    ),
    "GEM without EWC": (
        lambda: strategy((m := mlp()), GEM(_sgd(m)), EWCPlugin()),
        lambda one: one.train(benchmark().train_stream[0]),
        r"not GEM: give it cl_optim\.EWCAdamW",
    ),
    "a loss of its own": (
        lambda: strategy(
            (m := mlp()), MAKERS["EWC"](m), EWCPlugin(), criterion=nn.MultiMarginLoss()
        ),
        lambda one: one.train(benchmark().train_stream[0]),
        r"loss is MultiMarginLoss: use nn\.CrossEntropyLoss, or .*per_sample_loss=…\)\.$",
    ),
    "an online stream": (
        lambda: strategy((m := mlp()), MAKERS["EWC"](m), EWCPlugin()),
        lambda one: one.train(
            next(iter(split_online_stream(benchmark().train_stream, experience_size=8)))
        ),
        r"part of a task.*: train on the stream that it was split from, or call .* task ends\.$",
    ),
    "a head that grows": (
        lambda: strategy((m := Grown()), MAKERS["EWCAdamW"](m), EWCPlugin()),
        lambda one: [one.train(e) for e in benchmark(grows=True).train_stream],
        r"'head\.classifier\.weight' was protected with the shape \(2, 8\) .* \(3, 8\).*: give the "
        r"head all its outputs from the start .* one of its own \(MultiHeadClassifier\)\.$",
    ),
    "its state is reset": (
        lambda: strategy((m := mlp()), MAKERS["EWCAdamW"](m), EWCPlugin()),
        lambda one: [
            one.train(e, reset_optimizer_state=True) for e in benchmark().train_stream[:2]
        ],
        r"protects nothing any more, and 4 parameters were.*\. Load .* begin anew with a new",
    ),
    "a new optimizer": (
        lambda: strategy((m := mlp()), MAKERS["EWCAdamW"](m), EWCPlugin()),
        lambda one: (one.train(benchmark().train_stream[0]), _with_another_optimizer(one)),
        r"protects nothing any more, and 4 parameters were.*begin anew with a new EWCPlugin\.$",
    ),
    "another layer": (
        lambda: strategy((m := mlp()), MAKERS["EWCAdamW"](m), EWCPlugin()),
        lambda one: (one.train(benchmark().train_stream[0]), _with_another_layer(one)),
        r"'2\.weight', '2\.bias' was protected and has been exchanged .*: let the model keep its",
    ),
    "another layer, under EWC": (
        lambda: strategy((m := mlp()), MAKERS["EWC"](m), EWCPlugin()),
        lambda one: (one.train(benchmark().train_stream[0]), _with_another_layer(one)),
        r"'2\.weight', '2\.bias' was protected and has been exchanged .*: let the model keep its",
    ),
    "task labels without a name": (
        lambda: strategy((m := Unnamed()), MAKERS["EWC"](m), EWCPlugin()),
        lambda one: one.train(benchmark().train_stream[0]),
        r"Unnamed its inputs and task labels by their names, .*: declare it as forward\(self, x, "
        r"task_labels\)\.$",
    ),
    "GEM: another optimizer": (
        lambda: strategy((m := mlp()), _sgd(m), GEMPlugin(8)),
        lambda one: one.train(benchmark().train_stream[0]),
        r"which SGD does not: give the strategy cl_optim\.GEM\(optimizer\) around .* it has\.$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_would_be_quietly_wrong(case):
    make, action, match = REFUSED[case]
    one = make()
    with pytest.raises(ValueError, match=match):
        action(one)


def test_refuses_before_anything_is_trained():
    for case in ("another optimizer", "a loss of its own", "GEM: another optimizer"):
        make, action, match = REFUSED[case]
        one = make()
        before = weights(one.model)
        with pytest.raises(ValueError, match=match):
            action(one)
        assert same(before, weights(one.model))


def test_a_head_with_all_outputs_does_not_grow():
    """What the refusal of one that does says to do."""
    model = Grown()
    model.head = avalanche_cases.IncrementalClassifier(8, initial_out_features=4)
    one = strategy(model, MAKERS["EWCAdamW"](model), EWCPlugin())
    one.train([*benchmark(grows=True).train_stream])
    assert one.optimizer.param_groups[0]["consolidations"] == 3


def test_moments_alone_are_reset_if_asked_for():
    model, stream = mlp(), benchmark().train_stream
    one = strategy(model, MAKERS["EWCAdamW"](model), EWCPlugin(reset_state=True))
    one.train(stream[0])
    assert len([*one.optimizer.protected()]) == 4
    assert not any("step" in state for state in one.optimizer.state.values())


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "structure": (
        lambda: EWCPlugin("full"),
        r"structure must be 'diagonal' or 'kronecker', not 'full'\.",
    ),
    "max_samples": (lambda: EWCPlugin(max_samples=0), r"max_samples must be a whole number"),
    "batch_size": (lambda: EWCPlugin(batch_size=0), r"batch_size must be a whole number"),
    "decay": (lambda: EWCPlugin(decay=2.0), r"decay must be in \[0, 1\], not 2\.0\."),
    "anchors": (lambda: EWCPlugin(anchors="last"), r"anchors must be one of .* not 'last'\."),
    "patterns": (lambda: GEMPlugin(0), r"patterns_per_experience must be a whole number"),
    "refresh_every": (lambda: GEMPlugin(8, 0), r"refresh_every must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_arguments(case):
    make, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        make()


def test_says_how_avalanche_is_installed():
    code = "import sys; sys.modules['avalanche'] = None; import cl_optim.integrations.avalanche"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: cl_optim.integrations.avalanche needs avalanche: pip install "
        '"cl-optim[avalanche]"'
    )


# --- GEM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_each_experience_is_remembered(average):
    data, model = benchmark(), Heads()
    plugin = GEMPlugin(20, refresh_every=2)
    gem = GEM(_sgd(model), average=average)
    one = strategy(model, gem, plugin)
    for experience in data.train_stream:
        one.train(experience)
    assert gem.memories == ("experience 0", "experience 1", "experience 2")
    assert [refresh for _, refresh in gem.closures.values()] == [2, 2, 2]
    for number, experience in enumerate(data.train_stream):
        x, y = plugin.memory_x[number], plugin.memory_y[number]
        labels = plugin.memory_tid[number]
        assert (len(x), len(y), len(labels)) == (20, 20, 20)
        assert labels.unique().tolist() == [number]
        known = {(*row.tolist(), int(label)) for row, label in zip(*samples(experience))}  # noqa: B905
        drawn = {(*row.tolist(), int(label)) for row, label in zip(x, y)}  # noqa: B905
        assert len(drawn) == 20  # none twice
        assert drawn <= known
        model.zero_grad()
        gem.closures[f"experience {number}"][0]()
        found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        expected = torch.autograd.grad(
            F.cross_entropy(model(x, labels), y), [*model.parameters()], allow_unused=True
        )
        for one_grad, other in zip(found, expected, strict=True):
            assert (one_grad is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(one_grad, other)


def test_fewer_samples_than_patterns_are_all_kept():
    data, model = benchmark(samples=12), mlp()
    plugin = GEMPlugin(500)
    strategy(model, GEM(_sgd(model)), plugin).train(data.train_stream[0])
    assert len(plugin.memory_y[0]) == 12


def test_no_step_raises_an_old_loss():
    """To first order, as GEM reports of each update: its products with the rows, −lr·g̃ᵀg_k."""
    data, model = benchmark(), mlp()
    gem = GEM(_sgd(model), track_update=True)
    products: list[float] = []

    def look(optimizer: GEM, *_: Any) -> None:
        if optimizer.memories:
            products.append(float(optimizer.last_projection.update_dot.max()))

    gem.register_step_post_hook(look)
    strategy(model, gem, GEMPlugin(16)).train([*data.train_stream])
    assert len(products) == 2 * 12
    assert max(products) < 1e-6


def test_rows_follow_a_model_that_grows():
    model = Grown()
    gem = GEM(_sgd(model))
    one = strategy(model, gem, GEMPlugin(8))
    one.train([*benchmark(grows=True).train_stream])
    assert gem.memories == ("experience 0", "experience 1", "experience 2")
    assert model.head.classifier.out_features == 4
    assert len(gem.conflicts()) == 2  # of the last step, before the third was remembered


def test_a_new_optimizer_gets_the_memories():
    data, model = benchmark(), mlp()
    one = strategy(model, GEM(_sgd(model)), GEMPlugin(8))
    one.train(data.train_stream[0])
    one.optimizer = GEM(_sgd(model))
    one.train(data.train_stream[1])
    assert one.optimizer.memories == ("experience 0", "experience 1")


def test_rows_without_their_samples_are_refused():
    """As after a load by hand, of the optimizer's state dict alone."""
    data, model = benchmark(), mlp()
    one = strategy(model, GEM(_sgd(model)), GEMPlugin(8))
    one.train(data.train_stream[0])
    gem = GEM(_sgd(model))
    gem.load_state_dict(one.optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"'experience 0' has no closure.*, or forget it\.$"):
        strategy(model, gem, GEMPlugin(8)).train(data.train_stream[1])


def test_memories_of_others_are_left_alone():
    data, model = benchmark(), mlp()
    gem = GEM(_sgd(model))

    def before() -> None:
        model(torch.ones(2, 6)).sum().backward()

    gem.remember("experience 0", before)
    plugin = GEMPlugin(8)
    strategy(model, gem, plugin).train([*data.train_stream[:2]])
    assert gem.memories == ("experience 0", "experience 1", "experience 2")
    assert gem.closures["experience 0"][0] is before
    assert [*plugin.memory_x] == [1, 2]


def test_an_experience_that_is_trained_again_is_one_more():
    data, model = benchmark(), mlp()
    gem = GEM(MAKERS["EWCAdamW"](model))
    one = strategy(model, gem, GEMPlugin(8), EWCPlugin())
    for _ in range(2):
        one.train(data.train_stream[0])
    assert gem.memories == ("experience 0", "experience 1")
    assert gem.param_groups[0]["consolidations"] == 2


def test_a_checkpoint_goes_on_as_if_nothing_had_been():
    """A strategy with all that it has, in one pickle, as Avalanche's checkpoints hold it."""
    data, model = benchmark(), Heads()
    one = strategy(model, GEM(MAKERS["EWCAdamW"](model)), EWCPlugin("kronecker"), GEMPlugin(16, 3))
    one.train(data.train_stream[0])
    other = pickle.loads(pickle.dumps(one))
    for started in (one, other):
        torch.manual_seed(1)
        started.train(data.train_stream[1])
        started.train(data.train_stream[2])
    assert same(weights(model), weights(other.model))
    assert other.optimizer.memories == ("experience 0", "experience 1", "experience 2")
    assert other.model is not model


# --- against Avalanche itself ---------------------------------------------------------------------


@needs_avalanche
def test_avalanche_keeps_the_same_samples():
    from avalanche.training.plugins import GEMPlugin as Theirs

    memories = []
    for plugin, around in ((GEMPlugin(20), GEM), (Theirs(20, 0.0), lambda optimizer: optimizer)):
        torch.manual_seed(0)
        model = mlp()
        one = strategy(model, around(_sgd(model)), plugin)
        one.train(benchmark().train_stream[0])
        memories.append((plugin.memory_x[0], plugin.memory_y[0], plugin.memory_tid[0]))
    for ours, theirs in zip(*memories, strict=True):
        assert torch.equal(ours, theirs)


@needs_avalanche
@pytest.mark.parametrize("memory_strength", [0.0, 0.5])
def test_avalanche_takes_the_same_steps_of_gem(memory_strength):
    """But for the 1e-3 that it adds to the Gram matrix."""
    from avalanche.training.plugins import GEMPlugin as Theirs

    ends = {}
    for kind in ("ours", "theirs", "none"):
        torch.manual_seed(0)
        model = mlp()
        for param in model.parameters():
            param.data *= 3.0  # large gradients, to which 1e-3 is little
        optimizer = _sgd(model)
        plugins = {"ours": [GEMPlugin(20)], "theirs": [Theirs(20, memory_strength)], "none": []}
        around = GEM(optimizer, memory_strength) if kind == "ours" else optimizer
        one = strategy(model, around, *plugins[kind])
        for number, experience in enumerate(benchmark().train_stream):
            torch.manual_seed(number)
            one.train(experience)
        ends[kind] = torch.cat([value.flatten() for value in weights(model)])
    away = (ends["none"] - ends["theirs"]).norm()
    assert (ends["ours"] - ends["theirs"]).norm() < 0.02 * away


@needs_avalanche
def test_a_checkpoint_of_avalanche_is_loaded(tmp_path):
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint

    data, path = benchmark(), tmp_path / "checkpoint"

    def fresh() -> Naive:
        torch.manual_seed(0)
        model = Heads()
        gem = GEM(MAKERS["EWCAdamW"](model))
        return strategy(model, gem, EWCPlugin(), GEMPlugin(16, 3))

    one = fresh()
    one.train(data.train_stream[0])
    save_checkpoint(one, path)
    other, number = maybe_load_checkpoint(fresh(), path)
    assert number == 1
    for started in (one, other):
        torch.manual_seed(1)
        started.train(data.train_stream[1])
    assert same(weights(one.model), weights(other.model))
    assert other.optimizer.memories == ("experience 0", "experience 1")


@needs_avalanche
def test_experiences_may_have_no_task_labels():
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import make_avalanche_dataset

    x, y = torch.randn(48, 6), torch.arange(48) % 2
    plain = make_avalanche_dataset(torch.utils.data.TensorDataset(x, y))
    stream = benchmark_from_datasets(train=[plain, plain]).train_stream
    assert not hasattr(next(iter(stream)), "task_labels")
    model, plugin = mlp(), GEMPlugin(8)
    one = strategy(model, GEM(MAKERS["EWC"](model)), EWCPlugin(), plugin)
    for experience in stream:
        one.train(experience)
    assert one.optimizer.param_groups[0]["consolidations"] == 2
    assert not plugin.memory_tid
    assert [len(kept) for kept in plugin.memory_y.values()] == [8, 8]


@needs_avalanche
def test_samples_that_are_replayed_count_for_nothing():
    """The importance is of the experience alone, the batches of training are of two tasks."""
    from avalanche.training.plugins import ReplayPlugin

    data, model = benchmark(), Heads()
    one = strategy(model, MAKERS["EWC"](model), ReplayPlugin(24), EWCPlugin(max_samples=None))
    one.train(data.train_stream[0])
    before = importance_of(one.optimizer, model)["head.classifiers.0.classifier.weight"]
    one.train(data.train_stream[1])
    after = importance_of(one.optimizer, model)["head.classifiers.0.classifier.weight"]
    assert before.any()
    assert torch.equal(before, after)
