"""InputProjection against its definition in float64, and as an optimizer around others."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import plain
from projection_cases import factors, hard, importance, low_rank, rows, second_moment, soft, stacked
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.testing._internal.common_optimizers import optim_db

from cl_optim import GEM, EWCAdamW, ImportanceLog, InputProjection, estimate_fisher
from cl_optim.importance.kronecker.factors import Layout
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.optim.settling import settle_before

INFOS = {info.optim_cls.__name__: info for info in optim_db}
INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: AdamW(params, lr=0.05, weight_decay=0.1),
    "adamw-fused": lambda params: AdamW(params, lr=0.05, fused=True),
    "ewc": lambda params: EWCAdamW(params, lr=0.05, penalty="proximal"),
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5)).to(dtype)


INPUTS = {"0.weight": rows(6, 40, 3, seed=1), "2.weight": rows(5, 40, 2, seed=2)}


def backward(model: nn.Module, seed: int, size: int = 6) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, size, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    out = model(x)
    (out - torch.randn(out.shape, generator=generator).to(out.dtype)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        backward(model, 100 * seed + step)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(model: nn.Module, other: nn.Module | list[Tensor]) -> bool:
    others = weights(other) if isinstance(other, nn.Module) else other
    return plain(weights(model)) == plain(others)


def projected(model: nn.Module, inner: str = "sgd", **options: Any) -> InputProjection:
    optimizer = InputProjection(INNER[inner](model.named_parameters()), **options)
    optimizer.consolidate(importance(model, INPUTS))
    return optimizer


# --- the definition -------------------------------------------------------------------------------


class TestDefinition:
    @pytest.mark.parametrize(
        "options", [{"strength": 3.0}, {"mode": "hard", "energy": 0.9}], ids=str
    )
    @pytest.mark.parametrize("inner", INNER)
    def test_equals_the_wrapped_update_times_a_matrix(self, inner, options):
        """A twin takes the same wrapped step from the same weights, with the same state."""
        model = make_model()
        optimizer = InputProjection(INNER[inner](model.named_parameters()), **options)
        second = {"0.weight": rows(6, 30, 2, seed=3), "2.weight": rows(5, 30, 1, seed=4)}
        optimizer.consolidate(importance(model, INPUTS), inner=inner_of(model, inner))
        optimizer.consolidate(importance(model, second), decay=0.5, inner=inner_of(model, inner))
        matrix = {}
        for name in INPUTS:
            a = low_rank(0.5 * second_moment(INPUTS[name]) + second_moment(second[name]))
            matrix[name] = soft(a, 3.0) if "strength" in options else hard(a, 0.9)
        for step in range(4):
            twin, bare = copy.deepcopy((model, optimizer.optimizer))
            before = copy.deepcopy(model)
            for side, each in ((model, optimizer), (twin, bare)):
                backward(side, step)
                each.step()
            for index in (0, 2):
                old, free, found = (stacked(net[index]) for net in (before, twin, model))
                expected = old + (free - old) @ matrix[f"{index}.weight"]
                assert (free - old).abs().max() > 1e-3
                assert (free - found).abs().max() > 1e-4
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)
            assert torch.equal(model[3].weight, twin[3].weight)
            assert torch.equal(model[3].bias, twin[3].bias)

    @pytest.mark.parametrize("strength", [0.5, 20.0])
    def test_outputs_on_old_inputs_change_by_a_factor_per_direction(self, strength):
        model = nn.Linear(6, 4).double()
        x = rows(6, 40, 4, seed=1)
        optimizer = InputProjection(SGD(model.named_parameters(), lr=0.1), strength=strength)
        optimizer.consolidate(importance(model, {"weight": x}))
        values, vectors = torch.linalg.eigh(second_moment(x))
        before, twin = stacked(model), copy.deepcopy(model)
        for side, each in ((model, optimizer), (twin, SGD(twin.parameters(), lr=0.1))):
            backward(side, 1)
            each.step()
        free, found = (stacked(twin) - before) @ vectors, (stacked(model) - before) @ vectors
        factor = 1 / (1 + strength * values / values.mean())
        torch.testing.assert_close(found, free * factor, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("energy", [0.6, 0.9])
    def test_beside_the_directions_that_are_kept_the_mean_counts(self, energy):
        x = rows(8, 40, 8, seed=1) * torch.linspace(0.3, 1, 9)
        params = {"w": nn.Parameter(torch.zeros(5, 8)), "b": nn.Parameter(torch.zeros(5))}
        kept = factors(Layout((5, 8), False, "b"), x, energy=energy)
        assert kept.input.tail > 0
        free, got = one_step(params, {"w": kept}, strength=2.0)
        a = low_rank(second_moment(x), energy)
        whole = torch.cat([free["w"], free["b"].unsqueeze(1)], 1).double()
        expected = whole @ soft(a, 2.0)
        torch.testing.assert_close(got["w"].double(), expected[:, :-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(got["b"].double(), expected[:, -1], rtol=0, atol=1e-6)
        free, got = one_step(params, {"w": kept}, mode="hard", energy=energy)
        whole = torch.cat([free["w"], free["b"].unsqueeze(1)], 1).double()
        expected = whole @ hard(second_moment(x), energy)
        torch.testing.assert_close(got["w"].double(), expected[:, :-1], rtol=0, atol=1e-6)

    def test_hard_with_more_energy_than_the_default(self):
        """The sum of tasks keeps as many directions as that needs."""
        model = nn.Linear(8, 4).double()
        optimizer = InputProjection(
            SGD(model.named_parameters(), lr=1.0), mode="hard", energy=1 - 1e-9
        )
        old = [rows(8, 40, 2, seed=seed) * (1e-3 if seed == 1 else 1.0) for seed in (1, 2)]
        for x in old:
            optimizer.consolidate(importance(model, {"weight": x}))
        before = stacked(model)
        model.weight.grad, model.bias.grad = torch.randn(4, 8).double(), torch.randn(4).double()
        optimizer.step()
        moved = stacked(model) - before
        for x in old:
            assert (moved @ x.T).abs().max() < 1e-4 * x.abs().max()
        assert moved.abs().max() > 0.1

    def test_hard_with_all_energy_keeps_old_outputs(self):
        model = make_model(dtype=torch.float64)
        optimizer = projected(model, "adamw", mode="hard", energy=1.0)
        before = stacked(model[0]) @ INPUTS["0.weight"].T
        train(model, optimizer, 5)
        after = stacked(model[0]) @ INPUTS["0.weight"].T
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
        assert (model[0].weight - make_model(dtype=torch.float64)[0].weight).abs().max() > 0.01

    def test_nothing_is_projected_at_strength_0(self):
        model, twin = make_model(), make_model()
        train(model, projected(model, "adamw", strength=0.0), 3)
        train(twin, INNER["adamw"](twin.named_parameters()), 3)
        assert same(model, twin)

    def test_nothing_is_projected_without_an_importance(self):
        model, twin = make_model(), make_model()
        train(model, InputProjection(INNER["adamw"](model.named_parameters())), 3)
        train(twin, INNER["adamw"](twin.named_parameters()), 3)
        assert same(model, twin)

    def test_an_importance_may_be_given_at_once(self):
        model, twin = make_model(), make_model()
        given = importance(model, INPUTS)
        train(model, InputProjection(SGD(model.named_parameters(), lr=0.1), given, 5.0), 3)
        train(twin, projected(twin, strength=5.0), 3)
        assert same(model, twin)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_parameters_are_rounded_once(self, dtype):
        """In float32, and to the nearest of the parameter's dtype."""
        model = make_model(dtype=dtype)
        optimizer = projected(model, strength=3.0)
        twin, bare = copy.deepcopy((model, optimizer.optimizer))
        before = stacked(model[0])
        for side, each in ((model, optimizer), (twin, bare)):
            backward(side, 1)
            each.step()
        free = stacked(twin[0])
        exact = before + (free - before) @ soft(second_moment(INPUTS["0.weight"]), 3.0)
        error = (stacked(model[0]) - exact).abs()
        assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
        assert model[0].weight.dtype == dtype


def inner_of(model: nn.Module, inner: str) -> Any:
    """What EWCAdamW is consolidated with: nothing that pulls on one side only."""
    ones = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    return ones if inner == "ewc" else "same"


# --- layouts --------------------------------------------------------------------------------------


def one_step(
    params: dict[str, nn.Parameter], found: dict[str, Any], **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Displacements of SGD with lr = 1 and random gradients: free, and projected."""
    sums = {n: torch.ones(p.shape) for n, p in params.items() if n not in covered_by(found)}
    optimizer = InputProjection(SGD(list(params.items()), lr=1.0), **options)
    optimizer.consolidate(KroneckerImportance(found, sums, samples=1))
    old, free = {}, {}
    generator = torch.Generator().manual_seed(5)
    for name, param in params.items():
        old[name] = param.detach().clone()
        param.grad = torch.randn(param.shape, generator=generator).to(param)
        free[name] = -param.grad
    optimizer.step()
    return free, {name: param.detach() - old[name] for name, param in params.items()}


def covered_by(found: dict[str, Any]) -> set[str]:
    return {*found} | {one.layout.bias for one in found.values() if one.layout.bias}


class TestLayouts:
    @pytest.mark.parametrize("bias", [True, False])
    def test_transposed(self, bias):
        """GPT-2's Conv1D: [in, out]."""
        x = rows(6, 20, 3, seed=1, bias=bias)
        params = {"w": nn.Parameter(torch.zeros(6, 4)), "b": nn.Parameter(torch.zeros(4))}
        found = {"w": factors(Layout((6, 4), True, "b" if bias else None), x)}
        free, got = one_step(params, found, strength=2.0)
        matrix = soft(second_moment(x), 2.0)
        whole = free["w"].T.double()
        whole = torch.cat([whole, free["b"].unsqueeze(1).double()], 1) if bias else whole
        expected = whole @ matrix
        torch.testing.assert_close(got["w"].T.double(), expected[:, :6], rtol=0, atol=1e-6)
        expected_bias = expected[:, 6] if bias else free["b"].double()
        torch.testing.assert_close(got["b"].double(), expected_bias, rtol=0, atol=1e-6)

    def test_convolution(self):
        x = rows(3 * 2 * 2, 50, 5, seed=1)
        weight = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
        params = {"w": nn.Parameter(weight), "b": nn.Parameter(torch.zeros(4))}
        free, got = one_step(
            params, {"w": factors(Layout((4, 3, 2, 2), False, "b"), x)}, strength=2.0
        )
        whole = torch.cat([free["w"].flatten(1), free["b"].unsqueeze(1)], 1).double()
        expected = whole @ soft(second_moment(x), 2.0)
        torch.testing.assert_close(
            got["w"].flatten(1).double(), expected[:, :-1], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(got["b"].double(), expected[:, -1], rtol=0, atol=1e-6)

    def test_rows_of_frequent_tokens_move_less(self):
        tokens = torch.tensor([0, 0, 0, 1, 4, 4])
        x = nn.functional.one_hot(tokens, 6).double()
        params = {"w": nn.Parameter(torch.zeros(6, 4))}
        found = {"w": factors(Layout((6, 4), True), x, block=0)}
        free, got = one_step(params, found, strength=2.0)
        share = x.mean(0)
        kept = 1 / (1 + 2.0 * share * 6)
        torch.testing.assert_close(got["w"], free["w"] * kept.float().unsqueeze(1))
        free, got = one_step(params, found, mode="hard", energy=0.8)
        assert (got["w"][[0, 4]] == 0).all()  # 5 of 6, and bit for bit
        torch.testing.assert_close(got["w"][[1, 2, 3, 5]], free["w"][[1, 2, 3, 5]])

    def test_blocks(self):
        """Correlations within blocks only: 7 inputs in blocks of 3, 3 and 1."""
        x = rows(6, 40, 4, seed=1)
        params = {"w": nn.Parameter(torch.zeros(5, 6)), "b": nn.Parameter(torch.zeros(5))}
        free, got = one_step(
            params, {"w": factors(Layout((5, 6), False, "b"), x, block=3)}, strength=2.0
        )
        a = second_moment(x)
        blocks = torch.block_diag(a[:3, :3], a[3:6, 3:6], a[6:, 6:])
        whole = torch.cat([free["w"], free["b"].unsqueeze(1)], 1).double()
        expected = whole @ soft(blocks, 2.0)
        torch.testing.assert_close(got["w"].double(), expected[:, :-1], rtol=0, atol=1e-6)
        torch.testing.assert_close(got["b"].double(), expected[:, -1], rtol=0, atol=1e-6)

    def test_matrices_of_one_shape_are_computed_together(self):
        """With different ranks, and of two dtypes."""
        params, found, inputs = {}, {}, {}
        for number in range(5):
            dtype = torch.float64 if number == 3 else torch.float32
            name = f"{number}"
            inputs[name] = rows(6, 40, number + 1, seed=number, bias=False)
            params[name] = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
            found[name] = factors(Layout((4, 6)), inputs[name])
        free, got = one_step(params, found, strength=2.0)
        for name, x in inputs.items():
            expected = free[name].double() @ soft(second_moment(x), 2.0)
            torch.testing.assert_close(got[name].double(), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("which", ["absent", "fixed", "weight fixed", "no gradient"])
    def test_what_cannot_move_does_not(self, which):
        """The others are protected among themselves."""
        x = rows(6, 20, 3, seed=1)
        model = nn.Linear(6, 4)
        given = importance(model, {"weight": x})
        named = list(model.named_parameters())
        if which == "absent":
            named = named[:1]
        elif which == "fixed":
            model.bias.requires_grad_(False)
        elif which == "weight fixed":
            model.weight.requires_grad_(False)
        optimizer = InputProjection(SGD(named, lr=1.0), given, strength=2.0)
        backward(model, 1)
        if which == "no gradient":
            model.bias.grad = None
        before = copy.deepcopy(model)
        optimizer.step()
        a = second_moment(x)
        kappa = 2.0 * 7 / a.trace()
        if which == "weight fixed":
            assert torch.equal(model.weight, before.weight)
            expected = before.bias - before_grad(model.bias) / (1 + kappa * a[6, 6]).float()
            torch.testing.assert_close(model.bias, expected)
            return
        assert torch.equal(model.bias, before.bias)
        moved = (model.weight - before.weight).double().detach()
        inner = torch.linalg.inv(torch.eye(6, dtype=torch.float64) + kappa * a[:6, :6])
        if which == "no gradient":  # as if the bias had been written back
            inner = soft(a, 2.0)[:6, :6]
        torch.testing.assert_close(moved, -model.weight.grad.double() @ inner, rtol=0, atol=1e-5)

    def test_tied_weights_are_one(self):
        model = nn.Module()
        model.tokens, model.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        model.head.weight = model.tokens.weight
        x = rows(4, 20, 2, seed=1, bias=False)
        optimizer = InputProjection(SGD(model.named_parameters(), lr=1.0), strength=2.0)
        optimizer.consolidate(
            KroneckerImportance({"tokens.weight": factors(Layout((9, 4)), x)}, {}, samples=1)
        )
        before = model.tokens.weight.detach().clone()
        model.tokens.weight.grad = torch.randn(9, 4)
        optimizer.step()
        expected = -model.tokens.weight.grad.double() @ soft(second_moment(x), 2.0)
        moved = (model.head.weight - before).double().detach()
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def before_grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


# --- every k steps --------------------------------------------------------------------------------


class TestEvery:
    def test_equals_every_step_where_gradients_are_constant(self):
        """SGD on a linear loss: the displacement of k steps is the sum."""
        found = []
        for every in (1, 3):
            model = make_model(dtype=torch.float64)
            optimizer = projected(model, every=every, strength=2.0)
            for _ in range(6):
                for param in model.parameters():
                    param.grad = torch.full_like(param, 0.3)
                model[0].weight.grad[1] = -1.0
                optimizer.step()
            found.append(weights(model))
        for one, three in zip(*found, strict=True):
            torch.testing.assert_close(one, three, rtol=0, atol=1e-14)

    def test_is_close_else(self):
        """Displacements on old inputs are as small at the end, on the way they are not."""
        drift = {}
        for every in (1, 5, 1000):
            model = make_model()
            before = stacked(model[0])
            optimizer = projected(model, "adamw", every=every, strength=100.0)
            train(model, optimizer, 10)
            drift[every] = float(((stacked(model[0]) - before) @ INPUTS["0.weight"].T).norm())
        assert drift[5] < 1.5 * drift[1]
        assert drift[5] < 0.1 * drift[1000]

    def test_settle(self):
        model, twin = make_model(), make_model()
        optimizer, often = projected(model, every=4), projected(twin, every=3)
        train(model, optimizer, 3)
        optimizer.settle()
        train(twin, often, 3)
        assert same(model, twin)
        settled = weights(model)
        optimizer.settle()  # nothing is due
        assert same(model, settled)
        train(model, optimizer, 3, seed=1)
        assert not same(model, settled)

    @pytest.mark.parametrize("through", ["InputProjection", "GEM", "function"])
    def test_settle_before(self, through):
        model, twin = make_model(), make_model()
        optimizer, other = projected(model, every=100), projected(twin, every=100)
        if through == "InputProjection":
            handle = optimizer.settle_before(model)
        else:
            handle = settle_before(GEM(optimizer) if through == "GEM" else optimizer, model)
            if through == "GEM":  # which nothing else keeps alive
                handle.remove()
                gem = GEM(optimizer)
                handle = settle_before(gem, model)
        x = torch.randn(2, 6)
        looks = [
            lambda: model.eval()(x),
            lambda: model.state_dict(),
            lambda: model.load_state_dict({}, strict=False),
        ]
        for seed, look in enumerate(looks):
            for side, each in ((model.train(), optimizer), (twin, other)):
                train(side, each, 2, seed)
            model(x)  # in training: not settled
            assert same(model, twin)
            look()
            assert not same(model, twin)
            other.settle()
            assert same(model, twin)
        clone, clone_too = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        train(model.train(), optimizer, 2)
        displaced = weights(model)
        for each in (clone, clone_too):
            each.eval()(x)
        assert same(model, displaced)
        handle.remove()
        model.eval()(x)
        model.state_dict()
        assert same(model, displaced)

    def test_nothing_keeps_the_optimizer(self):
        model = make_model()
        settle_before(projected(model, every=5), model)
        model.eval()(torch.randn(2, 6))

    def test_an_evaluation_within_a_closure_settles_nothing(self):
        model = make_model()
        optimizer = projected(model, every=5)
        optimizer.settle_before(model)
        train(model, optimizer, 1)
        displaced = weights(model)

        def closure() -> float:
            model.eval()(torch.randn(2, 6))
            assert same(model, displaced)
            model.train()
            return 1.0

        assert optimizer.step(closure) == 1.0

    def test_what_others_write_is_not_projected(self):
        """Between steps, with nothing due and with something due, which warns once."""
        model = make_model()
        optimizer = projected(model, every=2, mode="hard", energy=1.0)
        train(model, optimizer, 2)
        new = make_model(seed=5).state_dict()
        model.load_state_dict(new)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.step()
        assert same(model, list(new.values()))
        train(model, optimizer, 1)
        model.load_state_dict(new)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        with pytest.warns(UserWarning, match="4 parameters were written between"):
            optimizer.step()
        assert same(model, list(new.values()))

    def test_data_that_is_written_before_each_step(self):
        """With every=1 through ``.data``, too."""
        model = make_model()
        optimizer = projected(model, mode="hard", energy=1.0)
        for param in model.parameters():
            param.data = torch.ones_like(param)
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for param in model.parameters():
            param.data.mul_(2.0)
        optimizer.step()
        assert all((param == 2.0).all() for param in model.parameters())


# --- what keeps its bits --------------------------------------------------------------------------


class TestFrozen:
    @pytest.mark.parametrize("importance_dtype", ["float32", "log8"])
    def test_frozen_weights_keep_their_bits(self, importance_dtype):
        model = make_model()
        inner = EWCAdamW(model.named_parameters(), lr=0.05, importance_dtype=importance_dtype)
        optimizer = InputProjection(inner, strength=5.0)
        ones = {name: torch.rand_like(param) for name, param in model.named_parameters()}
        optimizer.consolidate(importance(model, INPUTS), inner=ones)
        assert optimizer.freeze(0.5) > 0
        masks = [one.frozen for one in optimizer.protected()]
        before = weights(model)
        train(model, optimizer, 3)
        for old, param, mask in zip(before, model.parameters(), masks, strict=True):
            assert torch.equal(param[mask], old[mask])
            assert not torch.equal(param[~mask], old[~mask])
        optimizer.unfreeze()
        train(model, optimizer, 1)
        assert not torch.equal(model[0].weight[masks[0]], before[0][masks[0]])

    def test_freezing_settles_first(self):
        model = make_model()
        optimizer = InputProjection(EWCAdamW(model.named_parameters(), lr=0.05), every=10)
        ones = {name: torch.rand_like(param) for name, param in model.named_parameters()}
        optimizer.consolidate(importance(model, INPUTS), inner=ones)
        for change in (optimizer.freeze, optimizer.unfreeze):
            train(model, optimizer, 2)
            displaced = weights(model)
            change()
            assert not same(model, displaced)
            settled = weights(model)
            optimizer.settle()
            assert same(model, settled)

    @pytest.mark.parametrize("every", [1, 3])
    def test_what_has_no_gradient_does_not_move(self, every):
        model = make_model()
        optimizer = projected(model, "momentum", every=every)
        before = weights(model)
        for step in range(3):
            backward(model, step)
            model[0].weight.grad = model[0].bias.grad = None
            optimizer.step()
        assert same(model[0], before[:2])
        assert not torch.equal(model[2].weight, before[2])


# --- state ----------------------------------------------------------------------------------------


class TestState:
    @pytest.mark.parametrize("through", ["file", "deepcopy", "pickle"])
    @pytest.mark.parametrize("inner", ["momentum", "adamw", "ewc"])
    def test_resume_is_bit_for_bit(self, inner, through):
        """In the middle of three steps, after two tasks."""
        model = make_model()
        optimizer = projected(model, inner, every=3, strength=4.0)
        second = {name: rows(x.shape[1] - 1, 30, 1, seed=9) for name, x in INPUTS.items()}
        optimizer.consolidate(importance(model, second))
        train(model, optimizer, 5)
        if through == "deepcopy":
            twin, resumed = copy.deepcopy((model, optimizer))
        elif through == "pickle":
            twin, resumed = pickle.loads(pickle.dumps((model, optimizer)))
        else:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            twin = make_model(seed=3)
            resumed = InputProjection(INNER[inner](twin.named_parameters()), mode="hard")
            resumed.check_state_dict(saved[1])
            resumed.load_state_dict(saved[1])
            twin.load_state_dict(saved[0])
        assert resumed._options() == optimizer._options()
        for side, each in ((model, optimizer), (twin, resumed)):
            train(side, each, 5, seed=1)
        assert same(model, twin)
        third = {name: rows(x.shape[1] - 1, 30, 1, seed=8) for name, x in INPUTS.items()}
        for side, each in ((model, optimizer), (twin, resumed)):
            each.consolidate(importance(side, third))
            train(side, each, 4, seed=2)
        assert same(model, twin)
        assert plain(optimizer.state_dict()) == plain(resumed.state_dict())

    def test_a_log_stands_for_all_its_tasks(self, tmp_path):
        model, twin = make_model(), make_model()
        second = {name: rows(x.shape[1] - 1, 30, 2, seed=9) for name, x in INPUTS.items()}
        log = ImportanceLog(tmp_path)
        one_by_one = InputProjection(SGD(twin.named_parameters(), lr=0.1))
        for task, inputs in (("a", INPUTS), ("b", second)):
            log.record(task, importance(model, inputs))
            one_by_one.consolidate(importance(model, inputs))
        optimizer = InputProjection(SGD(model.named_parameters(), lr=0.1))
        optimizer.consolidate(log)
        for side, each in ((model, optimizer), (twin, one_by_one)):
            train(side, each, 3)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_directions_are_in_memory_once(self):
        optimizer = projected(make_model())
        for one in optimizer._subspaces():
            (stack,) = [
                s for s in optimizer._displacements._stacks if any(s_ is one for s_ in s.subspaces)
            ]
            assert one.side.basis.untyped_storage().data_ptr() == (
                stack._basis.untyped_storage().data_ptr()
            )

    @pytest.mark.parametrize("every", [1, 3])
    def test_a_bare_optimizers_state_dict_leaves_inputs(self, every):
        model, twin = make_model(), make_model()
        optimizer, other = (
            projected(model, "adamw", every=every),
            projected(twin, "adamw", every=every),
        )
        bare = INNER["adamw"](make_model().named_parameters())
        for each in (optimizer, other):
            each.load_state_dict(bare.state_dict())
        train(model, optimizer, 3)
        train(twin, other, 3)
        assert same(model, twin)
        assert len(optimizer._subspaces()) == 2
        bare.load_state_dict(
            {k: v for k, v in optimizer.state_dict().items() if k != "input_projection"}
        )

    def test_parameters_follow_their_names(self):
        """As EWCAdamW matches them."""
        model, twin = make_model(), make_model()
        optimizer = projected(model, "ewc", every=2)
        train(model, optimizer, 3)
        named = [*twin.named_parameters()][::-1]
        resumed = InputProjection(INNER["ewc"](named))
        resumed.load_state_dict(optimizer.state_dict())
        twin.load_state_dict(model.state_dict())
        for side, each in ((model, optimizer), (twin, resumed)):
            train(side, each, 4, seed=1)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)

    def test_rows_of_a_gem_around_follow_the_names(self):
        model, twin = make_model(), make_model()
        optimizer = GEM(projected(model, "ewc"))
        optimizer.remember("a", lambda: backward(model, 7), None)
        train(model, optimizer, 2)
        again = GEM(InputProjection(INNER["ewc"]([*twin.named_parameters()][::-1])))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.load_state_dict(model.state_dict())
        for side, each in ((model, optimizer), (twin, again)):
            train(side, each, 2, seed=1)
        torch.testing.assert_close(again.conflicts(), optimizer.conflicts())

    def test_distributed_checkpoint(self):
        """It begins the state by an idle step, and drops inputs."""
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        model = make_model()
        optimizer = projected(model, "adamw", every=2)
        before = weights(model)
        saved = get_optimizer_state_dict(model, optimizer)
        optimizer.settle()
        assert same(model, before)
        set_optimizer_state_dict(model, optimizer, saved)
        assert len(optimizer._subspaces()) == 2

    def test_state_dict_hooks(self):
        model = make_model()
        optimizer = projected(model)
        order = []
        optimizer.register_state_dict_pre_hook(lambda *args: order.append("pre"))
        optimizer.register_state_dict_post_hook(lambda *args: order.append("post"))
        optimizer.register_load_state_dict_pre_hook(lambda *args: order.append("load pre"))
        optimizer.register_load_state_dict_post_hook(lambda *args: order.append("load post"))
        optimizer.load_state_dict(optimizer.state_dict())
        assert order == ["pre", "post", "load pre", "load post"]

    @pytest.mark.parametrize("every", [1, 3])
    def test_a_model_that_is_cast(self, every):
        model = make_model()
        optimizer = projected(model, every=every)
        train(model, optimizer, 3)
        model.double()
        before = stacked(model[0])
        twin = copy.deepcopy(model)
        bare = SGD(twin.parameters(), lr=0.1)
        for side, each in ((model, optimizer), (twin, bare)):
            backward(side, 1)
            each.step()
        optimizer.settle()
        expected = (stacked(twin[0]) - before) @ soft(second_moment(INPUTS["0.weight"]), 10.0)
        torch.testing.assert_close(stacked(model[0]) - before, expected, rtol=0, atol=1e-6)

    def test_a_bias_that_is_fixed_later(self):
        model = make_model()
        optimizer = projected(model, "momentum", every=2)
        train(model, optimizer, 3)
        model[0].bias.requires_grad_(False)
        fixed = model[0].bias.detach().clone()
        optimizer.settle()
        assert not torch.equal(model[0].bias, fixed)  # what was due is its own
        fixed = model[0].bias.detach().clone()
        for step in range(3):
            backward(model, step)
            model[0].bias.grad = None
            optimizer.step()
        optimizer.settle()
        assert torch.equal(model[0].bias, fixed)


# --- an optimizer ---------------------------------------------------------------------------------


class TestTorchOptimContract:
    def test_lbfgs(self):
        model = make_model()
        inner = torch.optim.LBFGS(model.parameters(), max_iter=3)
        optimizer = InputProjection(inner, mode="hard", energy=1.0)
        optimizer.consolidate(importance(model, INPUTS), model=model)
        before = stacked(model[0])
        x, y, calls = torch.randn(8, 6), torch.randn(8, 5), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            calls.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == calls[0]
        assert len(calls) > 1
        moved = stacked(model[0]) - before
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(
            moved @ INPUTS["0.weight"].T, torch.zeros(5, 40).double(), atol=1e-4, rtol=0
        )

    @pytest.mark.parametrize("inner", ["sgd", "adamw-fused", "ewc"])
    def test_gradient_scaler(self, inner):
        """A scaled run with one overflow is the unscaled run without that step."""
        model, twin = make_model(), make_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer, plainly = projected(model, inner), projected(twin, inner)
        for step in range(5):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 6, generator=generator)
            y = torch.randn(8, 5, generator=generator)
            loss = (model(x) - y).square().mean() * (torch.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if step != 2:
                backward(twin, step)
                plainly.step()
        assert scaler.get_scale() == 512.0
        assert not hasattr(optimizer.optimizer, "found_inf")
        assert optimizer._step_supports_amp_scaling == (inner != "sgd")
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", [*INFOS])
    def test_every_optimizer_of_torch(self, name):
        """With its defaults: what it would do, and nothing of it on old inputs."""
        kind = INFOS[name].optim_cls
        x = rows(6, 40, 3, seed=1, bias=False)
        moved = []
        for around in (False, True):
            torch.manual_seed(0)
            weight = nn.Parameter(torch.randn(5, 6))
            before = weight.detach().clone()
            optimizer = kind([("weight", weight)], lr=0.1)
            if around:
                given = KroneckerImportance({"weight": factors(Layout((5, 6)), x)}, {}, samples=1)
                optimizer = InputProjection(optimizer, given, mode="hard", energy=1 - 1e-9)

            def closure(weight: Tensor = weight) -> Tensor:
                weight.grad = torch.linspace(-1, 2, 30).view(5, 6)
                weight.grad = weight.grad.to_sparse() if name == "SparseAdam" else weight.grad
                return weight.detach().sum()

            loss = optimizer.step(closure)
            assert loss == before.sum()
            moved.append((weight - before).detach())
        projector = hard(second_moment(x), 1 - 1e-9)
        torch.testing.assert_close(
            moved[1].double(), moved[0].double() @ projector, rtol=0, atol=1e-6
        )
        assert moved[0].abs().max() > 1e-4

    def test_schedulers(self):
        model = make_model()
        optimizer = projected(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        train(model, optimizer, 1)
        scheduler.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == 0.05

    def test_step_hooks(self):
        """Those of all optimizers once, and after the projection."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        model = make_model()
        optimizer = projected(model)
        order, found = [], []
        optimizer.register_step_pre_hook(lambda *args: order.append("before"))
        optimizer.optimizer.register_step_post_hook(lambda *args: order.append("inner"))
        optimizer.register_step_post_hook(lambda *args: found.append(weights(model)))
        handle = register_optimizer_step_post_hook(lambda opt, *args: order.append(type(opt)))
        try:
            train(model, optimizer, 1)
        finally:
            handle.remove()
        assert order == ["before", "inner", InputProjection]
        assert same(model, found[0])

    def test_a_group_that_comes_later(self):
        model = make_model()
        optimizer = InputProjection(SGD(model[0].named_parameters(), lr=0.1), strength=5.0)
        optimizer.consolidate(importance(model[0], {"weight": INPUTS["0.weight"]}))
        optimizer.add_param_group({"params": [*model[2].named_parameters(prefix="2")]})
        train(model, optimizer, 2)
        optimizer.consolidate(importance(model, INPUTS), model=None, strict=False)
        assert len(optimizer._subspaces()) == 2

    def test_names_of_wrappers(self):
        model = make_model()
        optimizer = InputProjection(
            SGD([(f"module.{n}", p) for n, p in model.named_parameters()], lr=0.1), strength=5.0
        )
        optimizer.consolidate(importance(model, INPUTS))
        twin = make_model()
        train(model, optimizer, 2)
        train(twin, projected(twin, strength=5.0), 2)
        assert same(model, twin)

    def test_repr(self):
        optimizer = projected(make_model(), strength=2.0)
        assert repr(optimizer).startswith("InputProjection (2 matrices; strength=2.0, mode='soft'")

    def test_what_is_not_projected_is_logged_once(self, caplog):
        with caplog.at_level(logging.INFO, "cl_optim"):
            projected(make_model())
        (record,) = caplog.records
        assert "2 parameters are not projected" in record.getMessage()
        assert "'3.weight', '3.bias'" in record.getMessage()

    @pytest.mark.parametrize("used", [False, True])
    def test_what_is_used_and_not_projected_is_a_warning(self, used, caplog):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        x, y = torch.randn(8, 4), torch.arange(8) % 3
        found = estimate_fisher(
            model if used else nn.Sequential(model[0], model[2]),
            [(x, y)],
            "empirical",
            structure="kronecker",
        )
        if not used:
            found = found.renamed({"1.weight": "2.weight", "1.bias": "2.bias"})
        with caplog.at_level(logging.INFO, "cl_optim"):
            InputProjection(SGD(model.named_parameters(), lr=0.1), found)
        (record,) = [r for r in caplog.records if "not projected" in r.getMessage()]
        assert record.levelno == (logging.WARNING if used else logging.INFO)

    def test_a_compiled_step(self):
        model, twin = make_model(), make_model()
        optimizer, other = projected(model), projected(twin)
        backward(model, 1)
        torch.compile(optimizer.step, backend="eager")()
        backward(twin, 1)
        other.step()
        assert same(model, twin)

    def test_no_step_is_captured(self, monkeypatch):
        model = make_model()
        optimizer = projected(model)
        backward(model, 1)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        before = weights(model)
        with pytest.raises(RuntimeError, match="cannot be captured"):
            optimizer.step()
        assert same(model, before)


class TestAroundAndInside:
    def test_a_gem_around_projects_gradients_first(self):
        model, twin = make_model(), make_model()
        optimizer, other = GEM(projected(model)), GEM(SGD(twin.named_parameters(), lr=0.1))
        for side, each in ((model, optimizer), (twin, other)):
            each.remember("a", lambda side=side: (-side(torch.ones(2, 6)).sum()).backward())
        before = stacked(model[0])
        for side, each in ((model, optimizer), (twin, other)):
            backward(side, 1)
            each.step()
        expected = (stacked(twin[0]) - before) @ soft(second_moment(INPUTS["0.weight"]), 10.0)
        torch.testing.assert_close(stacked(model[0]) - before, expected, rtol=0, atol=1e-6)
        optimizer.consolidate(importance(model, INPUTS))
        assert len(optimizer.optimizer._subspaces()) == 2

    def test_a_gem_inside_is_the_same(self):
        model, twin = make_model(), make_model()
        outside = GEM(projected(model))
        inside = InputProjection(GEM(SGD(twin.named_parameters(), lr=0.1)))
        inside.consolidate(importance(twin, INPUTS))
        outside.remember("a", lambda: (-model(torch.ones(2, 6)).sum()).backward())
        inside.optimizer.remember("a", lambda: (-twin(torch.ones(2, 6)).sum()).backward())
        train(model, outside, 3)
        train(twin, inside, 3)
        assert same(model, twin)
        saved = copy.deepcopy(inside.state_dict())
        assert {"gem", "input_projection"} < {*saved}
        inside.load_state_dict(saved)
        assert {"gem", "input_projection"} < {*outside.state_dict()}

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_an_invalid_step_of_a_gem_around(self, momentum):
        """torch's fused SGD must not leave out its very first step with momentum."""
        model = make_model()
        inner = SGD(model.named_parameters(), lr=0.1, momentum=momentum, fused=True)
        optimizer = GEM(InputProjection(inner, importance(model, INPUTS)))
        optimizer.remember("a", lambda: backward(model, 5))
        before = weights(model)
        for step in range(2):
            backward(model, step)
            if step == 0:
                model[0].weight.grad.fill_(torch.nan)
            optimizer.step()
            assert same(model, before) == (step == 0)
        assert all(torch.isfinite(param).all() for param in model.parameters())

    def test_ewc_is_consolidated_with_settled_weights(self):
        model = make_model()
        optimizer = InputProjection(EWCAdamW(model.named_parameters(), lr=0.05), every=10)
        given = importance(model, INPUTS)
        optimizer.consolidate(given, inner=given.diagonal(), anchors="latest")
        train(model, optimizer, 5)
        displaced = weights(model)
        optimizer.consolidate(given, inner=given.diagonal(), decay=0.5)
        assert not same(model, displaced)
        protected = [*optimizer.protected()]
        assert all(torch.equal(one.anchor, one.param) for one in protected)
        torch.testing.assert_close(protected[0].importance, 1.5 * given["0.weight"])
        assert optimizer.penalty() == 0


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("every", [1, 2])
    @pytest.mark.parametrize("inner", ["sgd", "adamw-fused", "ewc"])
    def test_equal_to_the_cpu_without_waiting(self, inner, every):
        models, found = [make_model(), make_model().cuda()], []
        for model in models:
            optimizer = projected(model, inner, every=every, strength=3.0)
            gradients = torch.Generator().manual_seed(1)
            for step in range(6):
                for param in model.parameters():
                    grad = torch.randn(param.shape, generator=gradients)
                    param.grad = grad.to(param.device)
                if step == 2 and param.is_cuda:
                    torch.cuda.set_sync_debug_mode("error")
                optimizer.step()
                torch.cuda.set_sync_debug_mode("default")
            optimizer.settle()
            found.append([param.detach().cpu() for param in model.parameters()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- retention ------------------------------------------------------------------------------------


def test_an_old_task_is_kept_where_adamw_forgets_it():
    """Two regressions on inputs of different subspaces, a hidden layer between."""
    torch.manual_seed(0)
    tasks = []
    for seed in (1, 2):
        x = rows(12, 64, 4, seed=seed, bias=False).float()
        tasks.append((x, torch.sin(x.sum(1, keepdim=True) + seed)))

    def loss(model: nn.Module, task: int) -> Tensor:
        x, y = tasks[task]
        return nn.functional.mse_loss(model(x), y)

    start = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1))
    adamw = AdamW(start.parameters(), lr=0.01)
    for _ in range(150):
        adamw.zero_grad()
        loss(start, 0).backward()
        adamw.step()
    old = loss(start, 0).item()
    results = {}
    x = tasks[0][0]
    hidden = start[:2](x).detach().double()
    ones = torch.ones(64, 1, dtype=torch.float64)
    inputs = {
        "0.weight": torch.cat([x.double(), ones], 1), "2.weight": torch.cat([hidden, ones], 1),
    }  # fmt: skip
    for name in ("adamw", "soft", "hard", "every 10"):
        model = copy.deepcopy(start)
        optimizer: torch.optim.Optimizer = AdamW(model.named_parameters(), lr=0.01)
        if name != "adamw":
            optimizer = InputProjection(
                optimizer, importance(model, inputs), strength=1000.0,
                mode="hard" if name == "hard" else "soft", energy=0.999,
                every=10 if name == "every 10" else 1,
            )  # fmt: skip
        for _ in range(100):
            optimizer.zero_grad()
            loss(model, 1).backward()
            optimizer.step()
        results[name] = loss(model, 0).item() - old, loss(model, 1).item()
    assert results["adamw"][0] > 0.2
    first = loss(start, 1).item()
    for name in ("soft", "hard", "every 10"):
        assert results[name][0] < 0.1 * results["adamw"][0], results
        assert results[name][1] < 0.7 * first, (first, results)


def test_parameters_that_were_exchanged_are_not_left_unprojected_in_silence():
    model = make_model()
    optimizer = projected(model)
    train(model, optimizer, 2)
    others = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    optimizer.optimizer.param_groups[0]["params"] = others
    for other in others:
        other.grad = torch.ones_like(other)
    with pytest.raises(RuntimeError, match=r"^2 matrices .* not the optimizer's any more"):
        optimizer.step()
    assert plain([other.detach() for other in others]) == plain(weights(model))


def test_a_copy_that_has_settled_begins_at_the_weights_of_then():
    """As the original does: what is written after it is nobody's displacement."""
    model = make_model()
    optimizer = projected(model, every=3)
    train(model, optimizer, 2)
    twins = [(model, optimizer), copy.deepcopy((model, optimizer))]
    loaded = make_model()
    other = projected(loaded, every=3)
    loaded.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins.append((loaded, other))
    for one, of in twins:
        of.settle()
        with torch.no_grad():
            for param in one.parameters():
                param.fill_(3.0)
        for _ in range(3):
            for param in one.parameters():
                param.grad = torch.zeros_like(param)
            of.step()
        assert all((param == 3.0).all() for param in one.parameters())


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_what_is_due_is_of_the_weights_that_are_loaded(order):
    """With a model that settles before it is loaded into."""
    model = make_model()
    optimizer = projected(model, every=3)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = make_model(1)
    other = projected(again, every=3)
    settle_before(other, again)
    loads = [lambda: again.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for load in loads if order == "model first" else reversed(loads):
        load()
    for one, of in ((model, optimizer), (again, other)):
        train(one, of, 2, seed=5)
        of.settle()
    assert same(model, again)


def test_a_model_that_settles_is_saved_with_nothing_due():
    model = make_model()
    optimizer = projected(model, every=3)
    settling = optimizer.settle_before(model)
    train(model, optimizer, 2)
    saved = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
    assert saved["optimizer"]["input_projection"]["due"] == 0
    settling.remove()
    train(model, optimizer, 2)
    assert optimizer.state_dict()["input_projection"]["due"] == 2


def test_inputs_of_matrices_that_were_exchanged_are_not_forgotten_in_silence():
    model = make_model()
    optimizer = projected(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(RuntimeError, match=r"are not the optimizer's any more.* stay protected"):
        optimizer.consolidate(importance(model, INPUTS))
    optimizer.consolidate(importance(model, INPUTS), decay=0.0)
    train(model, optimizer, 1)
