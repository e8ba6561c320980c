"""GEM as a torch.optim.Optimizer around another one: projection, memories, state."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from gem_cases import Memory, backward, make_model, problem, published
from optimizer_cases import plain, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cl_optim import GEM, EWCAdamW
from cl_optim.ops.nnqp import Status

Optimizer = torch.optim.Optimizer

INNER: dict[str, Callable[..., Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "sgd-fused": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw-foreach": functools.partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "ewc-gradient": functools.partial(EWCAdamW, lr=0.01, penalty="gradient"),
    "ewc-proximal": functools.partial(EWCAdamW, lr=0.01, penalty="proximal"),
}
FORWARDED = (
    "consolidate",
    "freeze",
    "unfreeze",
    "penalty",
    "protected",
    "suggest_lambda",
    "last_penalty",
    "last_drift",
)
# Found out by the wrapped optimizer itself, or by the wrapper reading a number.
SKIPPING = pytest.mark.parametrize("inner", ["sgd", "sgd-fused", "adamw-fused", "ewc-gradient"])


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int = 1000) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        Memory(model, seed + step)()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def same(model: nn.Module, other: nn.Module | list[Tensor]) -> bool:
    others = other.parameters() if isinstance(other, nn.Module) else other
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), others, strict=True))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def one_weight(grad: Tensor, rows: Tensor, **options: object) -> tuple[GEM, nn.Parameter]:
    """A GEM with SGD (lr 1) whose gradient and rows are given."""
    weight = nn.Parameter(torch.zeros_like(grad))
    optimizer = GEM(torch.optim.SGD([weight], lr=1.0), **options)
    for k, row in enumerate(rows):
        optimizer.remember(f"task {k}", functools.partial(give, weight, row), refresh_every=None)
    weight.grad = grad.clone()
    return optimizer, weight


def give(weight: nn.Parameter, row: Tensor) -> None:
    (weight * row).sum().backward()


class TestProjection:
    @pytest.mark.parametrize("margin", [0.0, 0.5])
    @pytest.mark.parametrize("rows", [1, 3, 6])
    def test_as_published(self, rows, margin):
        for seed in range(4):
            grad, memory = problem(rows, 50, seed)
            optimizer, weight = one_weight(grad, memory, memory_strength=margin)
            optimizer.step()
            expected = published(grad, memory, margin).float()
            torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(weight.detach(), -expected, rtol=0, atol=1e-5)
            assert optimizer.last_projection.status.tolist() == [Status.SOLVED]

    @pytest.mark.parametrize("inner", INNER)
    @pytest.mark.parametrize("strength", [0.0, 0.5])
    def test_nothing_violated_nothing_changed(self, model, inner, strength):
        twin = copy.deepcopy(model)
        bare = INNER[inner](twin.parameters())
        optimizer = GEM(INNER[inner](model.parameters()), memory_strength=strength)
        for step in range(3):
            for side in (model, twin):
                backward(side, seed=step)
            grads = [param.grad for param in model.parameters()]
            optimizer.remember("the same", Memory(model, seed=step))
            optimizer.step()
            bare.step()
            assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
            assert same(model, twin)
            assert optimizer.last_projection.status.tolist() == [Status.INACTIVE]
            assert optimizer.last_projection.v.tolist() == [[0.0]]

    def test_an_opposite_row_leaves_exactly_nothing(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        memory = Memory(model, seed=1)
        before = weights(model)

        def opposite() -> None:
            (-memory.loss()).backward()

        optimizer.remember("opposite", opposite)
        for _ in range(2):
            model.zero_grad()
            memory()
            optimizer.step()
            assert all((param.grad == 0).all() for param in model.parameters())
            assert same(model, before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_no_product_is_negative(self, model, dtype):
        model.to(dtype)
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), track_update=True)
        memories = [Memory(model, seed) for seed in range(4)]
        for k, memory in enumerate(memories):
            optimizer.remember(f"task {k}", memory)
        statuses = set()
        slack = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
        for step in range(10):
            backward(model, seed=100 + step)
            params = list(model.parameters())
            rows = torch.stack([flat(m.gradient(params)).double() for m in memories])
            norm = flat([p.grad for p in params]).double().norm()
            optimizer.step()
            dots = rows @ flat([p.grad for p in params]).double()
            assert (dots >= -slack * rows.norm(dim=1) * norm).all()
            # Plain SGD follows the gradient, so the update raises no old loss either.
            update_dot = optimizer.last_projection.update_dot
            assert (update_dot <= 0.1 * slack * rows.norm(dim=1) * norm).all()
            statuses |= set(optimizer.last_projection.status.tolist())
        assert Status.SOLVED in statuses

    def test_average_is_a_gem(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), average=True)
        memories = [Memory(model, seed) for seed in range(3)]
        for k, memory in enumerate(memories):
            optimizer.remember(f"task {k}", memory)
        projected = 0
        for step in range(20):
            backward(model, seed=100 + step)
            params = list(model.parameters())
            g = flat([p.grad for p in params])
            row = torch.stack([flat(m.gradient(params)) for m in memories]).mean(0)
            expected = g - min(0.0, (g @ row / (row @ row)).item()) * row
            projected += not torch.equal(expected, g)
            optimizer.step()
            torch.testing.assert_close(flat([p.grad for p in params]), expected)
            assert optimizer.last_projection.v.shape == (1, 1)
        assert projected > 2

    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("blocks", ["group", "tensor"])
    def test_blocks_are_problems_of_their_own(self, blocks, average):
        """Each block alone in an optimizer gets the same gradient."""
        options = {"memory_strength": 0.3, "average": average}
        model = make_model()
        grads = [torch.randn_like(p) for p in model.parameters()]
        rows = [[torch.randn_like(g) - 0.5 * g for g in grads] for _ in range(3)]

        def groups(params: list[nn.Parameter]) -> list[dict[str, object]]:
            return [{"params": params[:1]}, {"params": params[1:], "lr": 0.01}]

        def step(model: nn.Module, optimizer: GEM, chosen: list[int]) -> Iterator[Tensor]:
            params = [list(model.parameters())[i] for i in chosen]
            for k in range(3):
                pairs = [(p, rows[k][i]) for i, p in zip(chosen, params, strict=True)]

                def closure(pairs: list[tuple[nn.Parameter, Tensor]] = pairs) -> None:
                    sum((p * row).sum() for p, row in pairs).backward()

                optimizer.remember(f"task {k}", closure)
            for i, p in zip(chosen, params, strict=True):
                p.grad = grads[i].clone()
            optimizer.step()
            return (p.grad for p in params)

        optimizer = GEM(
            torch.optim.SGD(groups(list(model.parameters())), lr=0.1), blocks=blocks, **options
        )
        together = list(step(model, optimizer, [0, 1, 2, 3]))
        report = optimizer.last_projection
        alone: list[Tensor] = []
        parts = [[0], [1, 2, 3]] if blocks == "group" else [[0], [1], [2], [3]]
        for number, part in enumerate(parts):
            twin = make_model()
            params = [list(twin.parameters())[i] for i in part]
            single = GEM(torch.optim.SGD(params, lr=0.1), **options)
            alone += step(twin, single, part)
            for ours, its in zip(report[:6], single.last_projection[:6], strict=True):
                torch.testing.assert_close(ours[number], its[0])
            torch.testing.assert_close(optimizer.conflicts()[number], single.conflicts())
        for ours, its in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, its)
        assert report.status.tolist().count(Status.SOLVED) > 0
        assert tuple(report.v.shape) == (len(parts), 1 if average else 3)

    @pytest.mark.parametrize("blocks", ["global", "group", "tensor"])
    def test_unused_heads(self, blocks):
        """They keep None, do not move, and take no part in the products."""
        trunk, heads = nn.Linear(5, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
        groups = [
            {"params": list(part.parameters())} for part in (heads[2], trunk, heads[0], heads[1])
        ]
        optimizer = GEM(torch.optim.AdamW(groups, lr=0.01), blocks=blocks)
        kept = [Memory(nn.Sequential(trunk, head), seed) for seed, head in enumerate(heads[:2])]
        optimizer.remember("0", kept[0], refresh_every=2)
        optimizer.remember("1", kept[1], refresh_every=3)
        unused = [weights(heads[0]), weights(heads[2])]
        net = nn.Sequential(trunk, heads[1])
        solved = 0
        for step in range(8):
            backward(net, seed=step)
            g = [p.grad.clone() for p in trunk.parameters()]
            optimizer.step()
            assert all(p.grad is None for i in (0, 2) for p in heads[i].parameters())
            if blocks == "global":
                solved += optimizer.last_projection.status.item() == Status.SOLVED
                norm = flat([*g, *(p.grad for p in heads[1].parameters())]).norm()
                assert optimizer.last_projection.projected_norm.item() <= norm * 1.5
            elif blocks == "group":
                assert optimizer.last_projection.status[[0, 2]].tolist() == [Status.INACTIVE] * 2
                assert (optimizer.conflicts()[[0, 2]] == 0).all()
        assert solved > 0 or blocks != "global"
        for i, before in zip((0, 2), unused, strict=True):
            assert same(heads[i], before)
            assert not any(p in optimizer.state for p in heads[i].parameters())

    def test_products_are_over_the_parameters_with_gradients(self, model):
        """Q, kept between steps, is summed over those of this step."""
        params = list(model.parameters())
        optimizer = GEM(torch.optim.SGD(params, lr=0.0))
        memories = [Memory(model, seed) for seed in range(3)]
        for k, memory in enumerate(memories):
            optimizer.remember(f"task {k}", memory, refresh_every=k + 2)
        for step, used in enumerate([(0, 1, 2, 3), (2, 3), (0, 3), (1,), (0, 1, 2, 3), (0,)]):
            backward(model, seed=50 + step)
            for i in set(range(4)) - set(used):
                params[i].grad = None
            grad = flat([params[i].grad for i in used])
            rows = torch.stack([flat([m.gradient(params)[i] for i in used]) for m in memories])
            optimizer.step()
            expected = published(grad, rows).float()
            actual = flat([params[i].grad for i in used])
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("memory_dtype", [None, "float", "float32", torch.bfloat16, "float64"])
    def test_memory_dtype(self, model, memory_dtype):
        optimizer = GEM(torch.optim.SGD(model.parameters()), memory_dtype=memory_dtype)
        optimizer.remember("a", Memory(model, 1))
        narrow, wide = torch.float32, torch.float64
        expected = {"float": narrow, "float32": narrow, "float64": wide}
        dtype = expected.get(memory_dtype, memory_dtype or torch.float32)
        rows = optimizer.state_dict()["gem"]["rows"]
        grads = Memory(model, 1).gradient(list(model.parameters()))
        for row, grad in zip(rows.values(), grads, strict=True):
            assert row.dtype == dtype
            assert torch.equal(row[0], grad.to(dtype))

    def test_rows_are_laid_out_like_the_parameter(self):
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        x = torch.randn(2, 3, 5, 5)
        optimizer.remember("a", lambda: model(x).square().sum().backward())
        optimizer.remember("b", lambda: model(-x).square().sum().backward())
        rows = optimizer.state_dict()["gem"]["rows"][0]
        assert rows.shape == (2, 4, 3, 3, 3)
        assert rows[1].stride() == model.weight.stride()
        model(x).sum().backward()
        optimizer.step()
        assert optimizer.last_projection.status.item() >= 0

    def test_parameters_without_elements_or_gradients(self, model):
        empty = nn.Parameter(torch.empty(0, 3))
        fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        optimizer = GEM(torch.optim.SGD([empty, *model.parameters(), fixed]), blocks="tensor")
        optimizer.remember("a", Memory(model, 1))
        optimizer.remember("b", Memory(model, 2))
        backward(model, 3)
        empty.grad = torch.empty(0, 3)
        optimizer.step()
        assert optimizer.last_projection.status.shape == (5,)
        other = GEM(torch.optim.SGD([empty, *model.parameters(), fixed]))
        other.load_state_dict(optimizer.state_dict())
        assert other.memories == ("a", "b")


class TestMemories:
    def test_the_row_is_the_mean_over_backward_passes(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        memory = Memory(model, 1, batches=3)
        optimizer.remember("a", memory)
        for index, grad in enumerate(memory.gradient(list(model.parameters()))):
            torch.testing.assert_close(optimizer.state_dict()["gem"]["rows"][index][0], grad)

    def test_a_parameter_of_some_passes_only(self):
        """Passes are counted over all parameters: a missing gradient is a zero."""
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = GEM(torch.optim.SGD([a, b]))

        def closure() -> None:
            optimizer.zero_grad()  # before the first pass this is harmless
            (a * 4).sum().backward()
            (a * b).sum().backward()

        optimizer.remember("a", closure)
        rows = optimizer.state_dict()["gem"]["rows"]
        assert [rows[i].tolist() for i in (0, 1)] == [[[2.5, 2.5]], [[0.5, 0.5]]]

    def test_a_closure_may_thaw_a_parameter_for_the_next_one(self):
        """Passes are counted through what is trained when a closure begins."""
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = GEM(torch.optim.SGD([a, b], lr=0.0))

        def first() -> None:
            (a * 2).sum().backward()
            b.requires_grad_(True)

        def second() -> None:
            (b * 4).sum().backward()
            (b * 2).sum().backward()

        optimizer.remember("first", first)
        optimizer.remember("second", second)
        b.requires_grad_(False)
        a.grad = torch.ones(2)
        optimizer.step()
        rows = optimizer.state_dict()["gem"]["rows"]
        assert rows[0].tolist() == [[2.0, 2.0], [0.0, 0.0]]
        assert rows[1].tolist() == [[0.0, 0.0], [3.0, 3.0]]

    @pytest.mark.parametrize(
        ("refresh_every", "calls"),
        [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 1, 1, 2, 2, 2, 3]), (None, [1] * 7)],
    )
    @pytest.mark.parametrize("average", [False, True])
    def test_refresh(self, model, refresh_every, calls, average):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), average=average)
        memory = Memory(model, 1)
        optimizer.remember("a", memory, refresh_every)
        counted = []
        for step in range(7):
            train(model, optimizer, 1, seed=step)
            counted.append(memory.calls)
        assert counted == calls

    def test_rows_are_of_the_weights_before_the_step(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        memories = [Memory(model, seed) for seed in (1, 2)]
        optimizer.remember("a", memories[0])
        optimizer.remember("b", memories[1], refresh_every=2)
        for step in range(4):
            params = list(model.parameters())
            fresh = [memory.gradient(params) for memory in memories]
            train(model, optimizer, 1, seed=step)
            for i, rows in optimizer.state_dict()["gem"]["rows"].items():
                assert torch.equal(rows[0], fresh[0][i])
                assert torch.equal(rows[1], fresh[1][i]) == (step % 2 == 0)

    def test_partial_refresh_gives_the_same_as_a_full_one(self, model):
        twin = copy.deepcopy(model)
        results = []
        for side, intervals in ((model, (1, 1, 1)), (twin, (1, 2, 1))):
            optimizer = GEM(torch.optim.SGD(side.parameters(), lr=0.0))
            for k, interval in enumerate(intervals):
                optimizer.remember(f"task {k}", Memory(side, k), interval)
            train(side, optimizer, 4)
            results.append(optimizer.last_projection)
        for a, b in zip(results[0][2:6], results[1][2:6], strict=True):
            torch.testing.assert_close(a, b)

    def test_gradients_stay_the_same_objects(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        backward(model, 0)
        params = list(model.parameters())
        params[1].grad = None
        grads = [p.grad for p in params]
        values = [None if g is None else g.clone() for g in grads]

        def unchanged() -> bool:
            return all(
                p.grad is g and (g is None or torch.equal(g, value))
                for p, g, value in zip(params, grads, values, strict=True)
            )

        optimizer.remember("a", Memory(model, 1, batches=2))
        assert unchanged()

        def fails() -> None:
            Memory(model, 1)()
            raise ZeroDivisionError("in the closure")

        for name in ("a", "b"):
            before = snapshot(optimizer)
            with pytest.raises(ZeroDivisionError, match="in the closure"):
                optimizer.remember(name, fails)
            assert unchanged()
            assert snapshot(optimizer) == before
            assert optimizer.memories == ("a",)

    @pytest.mark.parametrize("average", [False, True])
    def test_a_closure_that_raises_in_a_step(self, model, average):
        optimizer = GEM(torch.optim.SGD(model.parameters()), average=average)
        memory = Memory(model, 2)
        fail = False

        def sometimes() -> None:
            if fail:
                raise ZeroDivisionError
            memory()

        optimizer.remember("a", Memory(model, 1), refresh_every=2)
        optimizer.remember("b", sometimes, refresh_every=2)
        train(model, optimizer, 2)
        backward(model, 0)
        before, fail = weights(model), True
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert same(model, before)
        fail = False
        params = list(model.parameters())
        fresh = [m.gradient(params) for m in (Memory(model, 1), memory)]
        optimizer.step()
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            expected = torch.stack([row[i] for row in fresh])
            expected = expected.mean(0, keepdim=True) if average else expected
            torch.testing.assert_close(rows, expected)

    def test_hooks_of_the_parameters_are_removed(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        optimizer.remember("a", Memory(model, 1))
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        with pytest.raises(RuntimeError, match="left no gradient"):
            optimizer.remember("b", lambda: None)
        train(model, optimizer, 2)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def test_remember_replaces(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        first, second = Memory(model, 1), Memory(model, 2)
        optimizer.remember("a", first)
        optimizer.remember("b", Memory(model, 3))
        optimizer.remember("a", second, refresh_every=None)
        assert optimizer.memories == ("a", "b")
        params = list(model.parameters())
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            assert torch.equal(rows[0], second.gradient(params)[i])
        train(model, optimizer, 2)
        assert (first.calls, second.calls) == (1, 1)

    def test_forget(self, model):
        twin = copy.deepcopy(model)
        optimizers = []
        for side in (model, twin):
            optimizer = GEM(torch.optim.SGD(side.parameters(), lr=0.1))
            for name in "abc" if side is model else "ac":
                optimizer.remember(name, Memory(side, ord(name)), refresh_every=2)
            optimizers.append(optimizer)
        optimizers[0].forget("b")
        for side, optimizer in zip((model, twin), optimizers, strict=True):
            train(side, optimizer, 3)
            assert optimizer.memories == ("a", "c")
        assert same(model, twin)
        for name in "ac":
            optimizers[0].forget(name)
        assert optimizers[0].memories == ()
        bare = torch.optim.SGD(twin.parameters(), lr=0.1)
        train(model, optimizers[0], 2)
        train(twin, bare, 2)
        assert same(model, twin)

    def test_forget_from_an_average(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.0), average=True)
        memories = {name: Memory(model, ord(name)) for name in "abc"}
        for name, memory in memories.items():
            optimizer.remember(name, memory, refresh_every=None)
        assert [memory.calls for memory in memories.values()] == [3, 2, 1]
        optimizer.forget("b")
        train(model, optimizer, 2)
        assert [memory.calls for memory in memories.values()] == [4, 2, 2]
        params = list(model.parameters())
        grads = [memories[name].gradient(params) for name in "ac"]
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            torch.testing.assert_close(rows[0], (grads[0][i] + grads[1][i]) / 2)
        for name in "ac":
            optimizer.forget(name)
        assert optimizer.state_dict()["gem"]["rows"][0].shape[0] == 0
        optimizer.remember("d", memories["b"])
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            torch.testing.assert_close(rows[0], memories["b"].gradient(params)[i])

    @pytest.mark.parametrize("average", [False, True])
    def test_capacity(self, model, average):
        def fill(evict: str) -> GEM:
            optimizer = GEM(
                torch.optim.SGD(model.parameters()), capacity=2, evict=evict, average=average
            )
            for name in "ab":
                optimizer.remember(name, Memory(model, ord(name)))
            return optimizer

        optimizer = fill("error")
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"capacity of 2 memories is reached, by a, b: forg"):
            optimizer.remember("c", Memory(model, 3))
        assert snapshot(optimizer) == before
        optimizer.remember("b", Memory(model, 4))  # one of those that are there
        optimizer.forget("a")
        optimizer.remember("c", Memory(model, 3))
        assert optimizer.memories == ("b", "c")

        optimizer = fill("oldest")
        for name in "cd":
            optimizer.remember(name, Memory(model, ord(name)))
        assert optimizer.memories == ("c", "d")
        params = list(model.parameters())
        grads = [Memory(model, ord(name)).gradient(params) for name in "cd"]
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            expected = torch.stack([grad[i] for grad in grads])
            expected = expected.mean(0, keepdim=True) if average else expected
            torch.testing.assert_close(rows, expected)
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match="left no gradient"):
            optimizer.remember("e", lambda: None)
        assert snapshot(optimizer) == before

    @pytest.mark.parametrize("through", ["wrapper", "inner"])
    def test_a_group_that_comes_later(self, model, through):
        late = nn.Linear(3, 2)
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        x = torch.randn(4, 5)

        def closure() -> None:
            late(model(x)).square().sum().backward()

        optimizer.remember("a", closure, refresh_every=3)
        target = optimizer if through == "wrapper" else optimizer.optimizer
        target.add_param_group({"params": late.parameters(), "lr": 0.01})
        for step in range(4):
            late.zero_grad()
            backward(model, seed=step)
            late(model(x)).sum().backward()
            optimizer.step()
            rows = optimizer.state_dict()["gem"]["rows"]
            assert (rows[4] == 0).all() == (step < 3)
            assert rows[5].shape == (1, 2)

    def test_rows_of_lazily_negated_gradients(self, model):
        rows = []
        for lazily in (False, True):
            hooks = [
                p.register_hook(lambda grad: torch._neg_view(grad.neg()))
                for p in model.parameters()
                if lazily
            ]
            optimizer = GEM(torch.optim.SGD(model.parameters()))
            optimizer.remember("a", Memory(model, 1))
            rows.append(flat([*optimizer.state_dict()["gem"]["rows"].values()]))
            for hook in hooks:
                hook.remove()
        assert rows[0].any()
        assert torch.equal(*rows)


class TestReports:
    def test_conflicts_are_cosines(self, model):
        for blocks in ("global", "tensor"):
            optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), blocks=blocks)
            memories = [Memory(model, seed) for seed in range(3)]
            for k, memory in enumerate(memories):
                optimizer.remember(f"task {k}", memory)
            for step in range(3):
                backward(model, seed=100 + step)
                params = list(model.parameters())
                rows = [memory.gradient(params) for memory in memories]
                grads = [p.grad.clone() for p in params]
                optimizer.step()
                if blocks == "global":
                    expected = torch.stack(
                        [F.cosine_similarity(flat(row), flat(grads), dim=0) for row in rows]
                    )
                else:
                    expected = torch.stack(
                        [
                            torch.stack(
                                [
                                    F.cosine_similarity(row[i].flatten(), grad.flatten(), dim=0)
                                    for row in rows
                                ]
                            )
                            for i, grad in enumerate(grads)
                        ]
                    )
                torch.testing.assert_close(optimizer.conflicts(), expected.double())

    def test_a_zero_has_no_direction(self):
        optimizer, _ = one_weight(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 0.0], [-2.0, 0.0]]))
        optimizer.step()
        assert optimizer.conflicts().tolist() == [0.0, -1.0]

    def test_scales(self):
        """The squares of such norms are beyond float32."""
        optimizer, weight = one_weight(
            torch.tensor([1e20, 1e20]), torch.tensor([[-1e-15, 0.0], [0.0, -1e25]])
        )
        optimizer.step()
        torch.testing.assert_close(
            optimizer.conflicts(), torch.full((2,), -(0.5**0.5), dtype=torch.float64)
        )
        assert weight.grad.abs().max() <= 1e14
        assert optimizer.last_projection.status.item() == Status.SOLVED

    @pytest.mark.parametrize("strength", [0.0, 0.5])
    def test_last_projection(self, strength):
        grad, memory = problem(4, 30, seed=3, pull=-0.2)
        optimizer, weight = one_weight(grad, memory, memory_strength=strength)
        optimizer.step()
        report = optimizer.last_projection
        assert report.v.dtype == report.gap.dtype == torch.float64
        assert torch.equal(report.active, report.v > 0)
        assert (report.v >= strength).all()
        torch.testing.assert_close(report.grad_norm, grad.double().norm()[None])
        torch.testing.assert_close(
            report.projected_norm, weight.grad.double().norm()[None], rtol=1e-5, atol=0
        )
        moved = grad.double() + memory.double().T @ report.v[0]
        torch.testing.assert_close(weight.grad.double(), moved, rtol=1e-5, atol=1e-5)
        assert report.update_dot is None

    @pytest.mark.parametrize("inner", INNER)
    def test_update_dot(self, model, inner):
        optimizer = GEM(INNER[inner](model.parameters()), track_update=True, average=False)
        for k in range(3):
            optimizer.remember(f"task {k}", Memory(model, k))
        for step in range(4):
            backward(model, seed=100 + step)
            before = flat(list(model.parameters()))
            optimizer.step()
            moved = flat(list(model.parameters())) - before
            rows = optimizer.state_dict()["gem"]["rows"]
            expected = torch.stack([flat([r[k] for r in rows.values()]) @ moved for k in range(3)])
            actual = optimizer.last_projection.update_dot
            torch.testing.assert_close(actual, expected.double(), rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("blocks", ["global", "group", "tensor"])
    @pytest.mark.parametrize("refresh_every", [1, None])
    def test_is_of_its_step_whenever_it_is_read(self, model, blocks, refresh_every):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), blocks=blocks)
        for k in range(3):
            optimizer.remember(f"task {k}", Memory(model, k), refresh_every)
        for step in range(2):  # Q of the second is the first one's, where rows are kept
            backward(model, seed=100 + step)
            uphill = Memory(model, 0).gradient(list(model.parameters()))
            for param, grad in zip(model.parameters(), uphill, strict=True):
                param.grad.copy_(-grad)
            optimizer.step()
        read = [value.clone() for value in optimizer.last_projection[:6]]
        read.append(optimizer.conflicts().clone())
        assert read[2].any()
        optimizer.remember("task 0", Memory(model, 7), refresh_every)
        optimizer.forget("task 1")
        for rows in optimizer.state_dict()["gem"]["rows"].values():
            rows.fill_(9.0)
        optimizer.state_dict()["gem"]["gram"].fill_(9.0)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
                param.grad.fill_(9.0)
        again = [*optimizer.last_projection[:6], optimizer.conflicts()]
        for before, after in zip(read, again, strict=True):
            assert torch.equal(before, after)

    def test_nothing_to_report(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        train(model, optimizer, 1)
        optimizer.remember("a", Memory(model, 1))
        for report in (optimizer.conflicts, lambda: optimizer.last_projection):
            with pytest.raises(RuntimeError, match="no projection to report"):
                report()
        train(model, optimizer, 1)
        assert optimizer.conflicts().shape == (1,)
        model.zero_grad()
        optimizer.step()  # without any gradient
        with pytest.raises(RuntimeError, match="no projection to report"):
            optimizer.conflicts()


def with_ewc(model: nn.Module, inner: str) -> Optimizer:
    """The inner optimizer; EWCAdamW protects earlier weights, so that its penalty counts."""
    if not inner.startswith("ewc"):
        return INNER[inner](model.named_parameters())
    optimizer = INNER[inner](model.named_parameters(), ewc_lambda=3.0)
    generator = torch.Generator().manual_seed(7)
    optimizer.consolidate(
        {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    )
    return optimizer


class TestState:
    INTERVALS: tuple[int | None, ...] = (1, 2, 3, None)

    def remember(self, optimizer: GEM, model: nn.Module) -> None:
        for k, interval in enumerate(self.INTERVALS):
            memory = Memory(model, k)
            memory.y += 2.0  # pulls elsewhere than what is trained on
            optimizer.remember(f"task {k}", memory, interval)

    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("inner", INNER)
    def test_resume_is_bit_for_bit(self, model, inner, average):
        options = {"memory_strength": 0.1, "memory_dtype": "bfloat16", "average": average}
        optimizer = GEM(with_ewc(model, inner), **options)
        train(model, optimizer, 2)
        self.remember(optimizer, model)
        train(model, optimizer, 4, seed=50)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        twin = copy.deepcopy(model)
        active = 0
        for step in range(13):
            train(model, optimizer, 1, seed=60 + step)
            active += optimizer.last_projection.active.sum().item()
        assert active > 0

        file.seek(0)
        resumed = GEM(INNER[inner](twin.named_parameters()))
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.memories == optimizer.memories
        assert resumed.memory_strength == 0.1
        assert resumed.memory_dtype == torch.bfloat16
        self.remember(resumed, twin)
        train(twin, resumed, 13, seed=60)
        assert same(model, twin)
        for key in ("state", "gem"):
            assert plain(resumed.state_dict()[key]) == plain(optimizer.state_dict()[key])
        report, its = optimizer.last_projection, resumed.last_projection
        assert all(torch.equal(a, b) for a, b in zip(report[:6], its[:6], strict=True))

    def test_a_load_copies(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        self.remember(optimizer, model)
        saved = copy.deepcopy(optimizer.state_dict())
        other = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        other.load_state_dict(saved)
        self.remember(other, model)
        before = copy.deepcopy(saved)
        train(model, other, 3)
        for i, rows in saved["gem"]["rows"].items():
            assert torch.equal(rows, before["gem"]["rows"][i])

    def without_closures(self, model: nn.Module, **options: object) -> GEM:
        """Memories of a state dict whose names are unknown here."""
        saved = GEM(torch.optim.SGD(model.parameters(), lr=0.1), **options)
        self.remember(saved, model)
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        return optimizer

    def test_a_step_without_closures(self, model):
        optimizer = self.without_closures(model)
        backward(model, 1)
        before = snapshot(optimizer)
        for k in range(3):
            with pytest.raises(
                RuntimeError, match=rf"'task {k}' has no closure.*remember\('task {k}', closure\)"
            ):
                optimizer.step()
            assert snapshot(optimizer) == before
            if k < 2:
                optimizer.remember(f"task {k}", Memory(model, k), self.INTERVALS[k])
            else:
                optimizer.forget(f"task {k}")
        optimizer.step()  # the last row is never recomputed, so it needs no closure

    def test_a_mean_without_closures(self, model):
        optimizer = self.without_closures(model, average=True)
        with pytest.raises(RuntimeError, match="'task 0' has no closure"):
            optimizer.remember("new", Memory(model, 9))
        optimizer.forget("task 0")
        optimizer.forget("task 3")
        backward(model, 1)
        with pytest.raises(RuntimeError, match="'task 1' has no closure"):
            optimizer.step()
        memories = [Memory(model, 1), Memory(model, 2)]
        for k, memory in enumerate(memories, start=1):
            optimizer.remember(f"task {k}", memory)
        params = list(model.parameters())
        grads = [memory.gradient(params) for memory in memories]
        optimizer.step()
        for i, rows in optimizer.state_dict()["gem"]["rows"].items():
            torch.testing.assert_close(rows[0], (grads[0][i] + grads[1][i]) / 2)

    def test_attaching_does_not_recompute(self, model):
        optimizer = self.without_closures(model)
        memory = Memory(model, 2)
        optimizer.remember("task 1", memory, refresh_every=2)
        assert memory.calls == 0
        optimizer.remember("task 1", memory, refresh_every=2)
        assert memory.calls == 1

    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("inner", INNER)
    def test_a_load_leaves_the_closures(self, model, inner, average):
        """A state dict that goes round in mid-training changes nothing, at no refresh's expense."""
        twin = copy.deepcopy(model)
        sides = []
        for side in (model, twin):
            optimizer = GEM(with_ewc(side, inner), average=average)
            memories = [Memory(side, k) for k in range(3)]
            for k, memory in enumerate(memories):
                memory.y += 2.0
                optimizer.remember(f"task {k}", memory, (2, 3, None)[k])
            sides.append((optimizer, memories))
        (optimizer, memories), (other, its) = sides
        active = 0
        for step in range(7):
            other.load_state_dict(copy.deepcopy(other.state_dict()))
            assert other.closures == {f"task {k}": (its[k], (2, 3, None)[k]) for k in range(3)}
            train(model, optimizer, 1, seed=50 + step)
            train(twin, other, 1, seed=50 + step)
            active += optimizer.last_projection.active.sum().item()
        assert active > 0
        assert same(model, twin)
        assert [memory.calls for memory in its] == [memory.calls for memory in memories]
        assert max(memory.calls for memory in its) > 2
        assert plain(other.state_dict()) == plain(optimizer.state_dict())

    def test_what_is_loaded_and_what_stays(self, model):
        """Row, age and interval are the state dict's, the closure is the one that is here."""
        saved = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        for name in "abc":
            saved.remember(name, Memory(model, ord(name)), refresh_every=3)
        train(model, saved, 2)
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        here = {name: Memory(model, ord(name)) for name in "dcb"}
        for name, memory in here.items():
            optimizer.remember(name, memory, refresh_every=7)
        message = r"does not have are forgotten: d\. Call remember\(\) after the load"
        with pytest.warns(UserWarning, match=message) as caught:
            optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert [warning.filename for warning in caught] == [__file__]
        assert optimizer.memories == ("a", "b", "c")
        assert optimizer.closures == {"b": (here["b"], 3), "c": (here["c"], 3)}
        assert plain(optimizer.state_dict()) == plain(saved.state_dict())
        backward(model, 1)
        with pytest.raises(RuntimeError, match="'a' has no closure"):
            optimizer.step()
        first = Memory(model, ord("a"))
        optimizer.remember("a", first, refresh_every=3)
        train(model, optimizer, 2)
        assert [m.calls for m in (first, here["b"], here["c"], here["d"])] == [1, 2, 2, 1]

    @pytest.mark.parametrize("inner", ["sgd", "adamw-fused", "ewc-gradient"])
    def test_a_bare_optimizer_can_be_wrapped(self, model, inner):
        twin = copy.deepcopy(model)
        bare = INNER[inner](model.parameters())
        train(model, bare, 3)
        wrapped = GEM(INNER[inner](twin.parameters()), blocks="group")
        wrapped.load_state_dict(copy.deepcopy(bare.state_dict()))
        assert wrapped.memories == ()
        assert wrapped.blocks == "group"
        twin.load_state_dict(model.state_dict())
        train(model, bare, 3)
        train(twin, wrapped, 3)
        assert same(model, twin)
        # And back: what it does not know, a bare optimizer ignores.
        bare.load_state_dict(wrapped.state_dict())

    def test_state_dict_hooks(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        seen = []
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre save"))
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
        optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append(s["extra"]))
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post load"))
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        assert seen == ["pre save", 1, "post load"]
        assert "extra" in saved

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_have_rows_and_no_closures(self, model, how):
        optimizer = GEM(torch.optim.AdamW(model.parameters(), lr=0.01), memory_strength=0.5)
        optimizer.register_step_post_hook(lambda *args: None)
        optimizer.remember("a", lambda: Memory(model, 1)(), refresh_every=2)
        train(model, optimizer, 2)
        model.zero_grad()  # a copy has none
        pair = (model, optimizer)
        twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert snapshot(other) == snapshot(optimizer)
        backward(twin, 3)
        with pytest.raises(RuntimeError, match="'a' has no closure"):
            other.step()
        other.remember("a", Memory(twin, 1), refresh_every=2)
        before = weights(model)
        train(twin, other, 3)
        assert same(model, before)
        train(model, optimizer, 3)
        assert same(model, twin)


class TestTorchOptimContract:
    def test_without_memories_it_is_the_bare_optimizer(self):
        for inner in INNER:
            model = make_model()
            twin = copy.deepcopy(model)
            train(model, GEM(INNER[inner](model.parameters())), 5)
            train(twin, INNER[inner](twin.parameters()), 5)
            assert same(model, twin)

    def test_what_is_the_wrapped_optimizers(self, model):
        inner = torch.optim.AdamW(model.parameters())
        before = copy.deepcopy(inner.defaults)
        optimizer = GEM(inner)
        assert inner.defaults == before
        assert isinstance(optimizer, Optimizer)
        assert optimizer.optimizer is inner
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(inner, name)
        optimizer.load_state_dict(inner.state_dict())  # rebinds them
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(inner, name)
            setattr(optimizer, name, copy.copy(getattr(inner, name)))
            assert getattr(optimizer, name) is getattr(inner, name)
        optimizer.remember("task A", Memory(model, 1))
        assert "GEM (memories: 'task A'; memory_strength=0.0, blocks='global'" in repr(optimizer)
        assert "AdamW" in repr(optimizer)
        assert not hasattr(optimizer, "_step_supports_amp_scaling")

    def test_adam_still_starts_its_state(self, model):
        """It asks whether its state is empty, so nothing of ours may be in it."""
        optimizer = GEM(torch.optim.Adam(model.parameters()))
        optimizer.remember("a", Memory(model, 1))
        train(model, optimizer, 1)
        assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}

    def test_closure_runs_once_with_gradients_and_returns_its_loss(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.remember("a", Memory(model, 1))
        memory = Memory(model, 2)
        calls = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = memory.loss()
            loss.backward()
            calls.append(loss)
            return loss

        losses = [optimizer.step(closure) for _ in range(2)]
        assert [id(loss) for loss in losses] == [id(loss) for loss in calls]
        assert optimizer.conflicts().shape == (1,)

    @pytest.mark.parametrize("around", ["wrapper", "inner"])
    def test_schedulers(self, around):
        optimizer, weight = one_weight(torch.tensor([1.0, 0.0]), torch.tensor([[-1.0, 1.0]]))
        target = optimizer if around == "wrapper" else optimizer.optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(target, lambda epoch: 0.5**epoch)
        for _ in range(3):
            weight.grad = torch.tensor([1.0, 0.0])
            optimizer.step()
            scheduler.step()
        torch.testing.assert_close(weight.detach(), -1.75 * torch.tensor([0.5, 0.5]))
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
        optimizer.step()
        one_cycle.step()

    def test_step_hooks(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.remember("a", Memory(model, 1))
        order = []
        optimizer.register_step_pre_hook(lambda *args: order.append("before"))
        optimizer.optimizer.register_step_pre_hook(lambda *args: order.append("inner"))
        optimizer.register_step_post_hook(lambda *args: order.append("after"))
        train(model, optimizer, 2)
        assert order == ["before", "inner", "after"] * 2

    @pytest.mark.parametrize("inner", ["adamw-foreach", "ewc-gradient"])
    def test_global_hooks_are_called_once_for_each_step(self, model, inner):
        """For the object whose step was called, with the gradient before its projection."""
        calls = []
        before = register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: calls.append(("before", optimizer, grad()))
        )
        after = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: calls.append(("after", optimizer, weights(model)))
        )

        def grad() -> list[Tensor]:
            return [param.grad.clone() for param in model.parameters()]

        optimizer = GEM(INNER[inner](model.parameters()))
        try:
            for memories in (0, 1):
                backward(model, seed=memories)
                raw, old = grad(), weights(model)
                optimizer.step()
                assert [(c[0], c[1] is optimizer) for c in calls] == [
                    ("before", True), ("after", True),
                ]  # fmt: skip
                assert plain(calls[0][2]) == plain(raw)
                assert plain(calls[1][2]) == plain(weights(model)) != plain(old)
                calls.clear()
                optimizer.remember("a", lambda: (-Memory(model, 1).loss()).backward())
            optimizer.optimizer.step()  # on its own it has them again
            assert [(c[0], c[1] is optimizer.optimizer) for c in calls] == [
                ("before", True), ("after", True),
            ]  # fmt: skip
            calls.clear()
            other = nn.Linear(2, 2)
            inside = torch.optim.SGD(other.parameters(), lr=0.1)
            handle = optimizer.optimizer.register_step_post_hook(lambda *_: inside.step())
            train(model, optimizer, 1)
            assert [c[1] for c in calls] == [optimizer, inside, inside, optimizer]
            handle.remove()
        finally:
            before.remove()
            after.remove()
        calls.clear()
        train(model, optimizer, 1)
        assert calls == []

    @pytest.mark.parametrize("inner", ["adamw-foreach", "ewc-gradient"])
    def test_hooks_of_the_wrapped_optimizer_find_the_projected_gradient(self, model, inner):
        """And what they make of it is what is stepped with."""
        twin = copy.deepcopy(model)
        optimizer, bare = GEM(INNER[inner](model.parameters())), INNER[inner](twin.parameters())
        memory = Memory(model, 1)
        optimizer.remember("a", lambda: (-memory.loss()).backward())
        seen = []

        def halve(inner: Optimizer, args: object, kwargs: object) -> None:
            seen.append(flat([param.grad for param in model.parameters()]))
            for param in model.parameters():
                param.grad.mul_(0.5)

        optimizer.optimizer.register_step_pre_hook(halve)
        for step in range(3):
            backward(model, seed=1)
            for param in model.parameters():
                param.grad.add_(step * 0.01)
            row = -flat(memory.gradient(list(model.parameters()))).double()
            g = flat([param.grad for param in model.parameters()]).double()
            expected = g - min(0.0, (g @ row / (row @ row)).item()) * row
            optimizer.step()
            assert optimizer.conflicts() < -0.9
            torch.testing.assert_close(seen[-1].double(), expected, rtol=0, atol=1e-6)
            sizes = [param.numel() for param in twin.parameters()]
            for param, half in zip(twin.parameters(), seen[-1].split(sizes), strict=True):
                param.grad = 0.5 * half.view_as(param)
            bare.step()
            assert same(model, twin)

    def test_schedulers_know_whether_a_step_was_taken(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.remember("a", Memory(model, 1))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train(model, optimizer, 1)
        scheduler.step()

    def test_what_protects_is_reached_through_it(self, model):
        inner = EWCAdamW(model.named_parameters(), lr=0.01, ewc_lambda=2.0, track_penalty=True)
        optimizer = GEM(inner)
        for name in FORWARDED:
            assert hasattr(optimizer, name)
        optimizer.consolidate({n: torch.rand_like(p) for n, p in model.named_parameters()})
        assert optimizer.freeze(0.5) == inner.freeze(0.5) > 0
        train(model, optimizer, 2)
        assert optimizer.penalty() == inner.penalty() > 0
        assert optimizer.last_penalty == inner.last_penalty > 0
        assert torch.equal(optimizer.last_drift, inner.last_drift)
        assert optimizer.suggest_lambda(drift=0.1) == inner.suggest_lambda(drift=0.1)
        assert [p.name for p in optimizer.protected()] == [n for n, _ in model.named_parameters()]
        optimizer.unfreeze()
        assert not any(p.frozen.any() for p in inner.protected())
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert twin.penalty() == optimizer.penalty()
            assert twin.penalty.__self__ is twin.optimizer

    @pytest.mark.parametrize("name", FORWARDED)
    def test_what_another_optimizer_does_not_have(self, model, name):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        assert not hasattr(optimizer, name)
        message = f"^'{name}' is the wrapped optimizer's, and SGD has none: wrap a cl_optim.EWCAd"
        with pytest.raises(AttributeError, match=message):
            getattr(optimizer, name)

    def test_what_is_forwarded_is_documented(self):
        for name in FORWARDED:
            assert f"``{name}``" in GEM.__doc__
        for name in FORWARDED[:-2]:  # the methods
            assert getattr(GEM, name).__doc__ == getattr(EWCAdamW, name).__doc__

    def test_zero_grad(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        backward(model, 1)
        optimizer.zero_grad(set_to_none=False)
        assert all((p.grad == 0).all() for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("inner", ["sgd", "adamw-fused", "ewc-gradient"])
    def test_gradient_scaler(self, model, inner):
        """A scaled run with one overflow is the unscaled run without that step."""
        twin = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = GEM(INNER[inner](model.parameters()))
        plain = GEM(INNER[inner](twin.parameters()))
        memories = [Memory(side, 1) for side in (model, twin)]
        optimizer.remember("a", memories[0], refresh_every=2)
        plain.remember("a", memories[1], refresh_every=2)
        for step in range(5):
            optimizer.zero_grad()
            loss = Memory(model, 10 + step).loss() * (torch.inf if step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if step != 2:
                train(twin, plain, 1, seed=10 + step)
                torch.testing.assert_close(optimizer.conflicts(), plain.conflicts())
            assert all(
                torch.allclose(p, q, atol=1e-6)
                for p, q in zip(model.parameters(), twin.parameters(), strict=True)
            )
        assert scaler.get_scale() == 512.0
        assert memories[0].calls == memories[1].calls == 2

    def test_a_model_that_is_moved_to_another_dtype(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.remember("a", Memory(model, 1), refresh_every=2)
        train(model, optimizer, 1)
        model.bfloat16()
        train(model, optimizer, 3)
        assert optimizer.last_projection.status.item() >= 0


class TestInvalid:
    """NaN in the gradient, or in a row."""

    @SKIPPING
    @pytest.mark.parametrize("where", ["gradient", "row"])
    @pytest.mark.parametrize("warm", [False, True])
    def test_skip(self, model, inner, where, warm):
        optimizer = GEM(INNER[inner](model.parameters()))
        twin = copy.deepcopy(model)
        bare = INNER[inner](twin.parameters())
        if warm:
            for side, each in ((model, optimizer), (twin, bare)):
                train(side, each, 2)
        memory = Memory(model, 1)
        optimizer.remember("a", memory)
        if where == "row":
            memory.x[0, 0, 0] = torch.nan
            optimizer.remember("a", memory)
        backward(model, 2)
        if where == "gradient":
            model[0].weight.grad[0, 0] = torch.inf
        before = weights(model)
        optimizer.step()
        assert same(model, before)
        assert optimizer.last_projection.status.tolist() == [Status.INVALID]
        assert optimizer.last_projection.v.tolist() == [[0.0]]
        assert not hasattr(optimizer.optimizer, "found_inf")
        assert not hasattr(optimizer.optimizer, "grad_scale")
        # It is as if the step had not been.
        optimizer.forget("a")
        train(model, optimizer, 3, seed=70)
        train(twin, bare, 3, seed=70)
        assert same(model, twin)

    @SKIPPING
    def test_a_row_that_recovers(self, model, inner):
        optimizer = GEM(INNER[inner](model.parameters()))
        memory = Memory(model, 1)
        value = memory.x[0, 0, 0].clone()
        memory.x[0, 0, 0] = torch.nan
        optimizer.remember("a", memory, refresh_every=2)
        optimizer.remember("b", Memory(model, 2), refresh_every=3)
        memory.x[0, 0, 0] = value
        statuses = []
        for step in range(4):
            train(model, optimizer, 1, seed=step)
            statuses.append(optimizer.last_projection.status.item() >= 0)
        assert statuses == [False, False, True, True]

    @pytest.mark.parametrize("inner", ["sgd", "adamw-fused"])
    def test_raw(self, model, inner):
        twin = copy.deepcopy(model)
        optimizer = GEM(INNER[inner](model.parameters()), on_invalid="raw")
        memory = Memory(model, 1)
        memory.x[0, 0, 0] = torch.nan
        optimizer.remember("a", memory)
        train(model, optimizer, 2)
        train(twin, INNER[inner](twin.parameters()), 2)
        assert same(model, twin)

    def test_a_block_of_its_own(self):
        weights_ = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizer = GEM(torch.optim.SGD(weights_, lr=1.0), blocks="tensor", on_invalid="raw")
        bad = torch.tensor([torch.nan, 1.0])

        def closure() -> None:
            (weights_[0] * bad - weights_[1]).sum().backward()

        optimizer.remember("a", closure)
        for weight in weights_:
            weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        assert [w.tolist() for w in weights_] == [[-1.0, 0.0], [-0.5, 0.5]]
        assert optimizer.last_projection.status.tolist() == [Status.INVALID, Status.SOLVED]
        norms = optimizer.last_projection.projected_norm
        torch.testing.assert_close(norms, torch.tensor([1.0, 0.5**0.5], dtype=torch.float64))

    @SKIPPING
    def test_raise(self, model, inner):
        """On the CPU at once."""
        optimizer = GEM(INNER[inner](model.parameters()), on_invalid="raise")
        optimizer.remember("a", Memory(model, 1))
        backward(model, 2)
        model[0].weight.grad[0, 0] = torch.nan
        before = weights(model)
        with pytest.raises(RuntimeError, match="NaN or Inf in the gradient or in a memory row"):
            optimizer.step()
        assert same(model, before)
        train(model, optimizer, 1)
        assert not same(model, before)


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.fixture
    def model(self) -> nn.Sequential:
        return make_model().cuda()

    @pytest.fixture
    def no_sync(self) -> Iterator[Callable[[], None]]:
        """From the call on, waiting for the GPU is an error."""
        yield lambda: torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")

    def memory(self, model: nn.Module, seed: int) -> Memory:
        memory = Memory(model, seed)
        memory.x, memory.y = memory.x.cuda(), memory.y.cuda()
        return memory

    @pytest.mark.parametrize("blocks", ["global", "group", "tensor"])
    @pytest.mark.parametrize("average", [False, True])
    @pytest.mark.parametrize("inner", ["sgd-fused", "adamw-fused", "ewc-gradient"])
    def test_no_synchronisation(self, model, no_sync, inner, average, blocks):
        on_invalid = "raw" if inner.startswith("ewc") else "skip"
        optimizer = GEM(
            INNER[inner](model.parameters()),
            blocks=blocks,
            average=average,
            on_invalid=on_invalid,
            track_update=True,
        )
        for k, interval in enumerate((1, 2, None)):
            optimizer.remember(f"task {k}", self.memory(model, k), interval)
        batch = self.memory(model, 9)
        for step in range(6):
            if step == 2:
                no_sync()
            optimizer.zero_grad()
            batch()
            if step == 4:
                model[0].bias.grad = None
            optimizer.step()
            cosines = optimizer.conflicts()
        torch.cuda.set_sync_debug_mode("default")
        assert cosines.is_cuda
        assert (optimizer.last_projection.status >= 0).all()

    def test_equal_to_the_cpu(self, model):
        twin = copy.deepcopy(model).cpu()
        sides = []
        for side in (model, twin):
            optimizer = GEM(torch.optim.SGD(side.parameters(), lr=0.1))
            make = self.memory if side is model else Memory
            for k in range(3):
                optimizer.remember(f"task {k}", make(side, k), refresh_every=2)
            for step in range(5):
                optimizer.zero_grad()
                make(side, 100 + step)()
                optimizer.step()
            sides.append(optimizer)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)
        # float64, of gradients in float32
        cosines = [side.conflicts().cpu() for side in sides]
        torch.testing.assert_close(*cosines, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("inner", ["sgd-fused", "adamw-fused"])
    def test_raise_is_deferred(self, model, no_sync, inner):
        optimizer = GEM(INNER[inner](model.parameters()), on_invalid="raise")
        optimizer.remember("a", self.memory(model, 1))
        batch = self.memory(model, 2)
        batch()
        optimizer.step()
        model[0].weight.grad[0, 0] = torch.nan
        before = weights(model)
        no_sync()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert same(model, before)
        with pytest.raises(RuntimeError, match="NaN or Inf in the gradient or in a memory row"):
            optimizer.step()
        optimizer.zero_grad()
        batch()
        optimizer.step()
        assert not same(model, before)


class TestFusedWithEWCAdamW:
    """The rows go into EWCAdamW's step, and `.grad` stays as it was."""

    def make(self, model: nn.Module, **options: object) -> GEM:
        inner = EWCAdamW(model.named_parameters(), lr=0.01, ewc_lambda=2.0, fused=True)
        optimizer = GEM(inner, **options)
        optimizer.remember("a", Memory(model, 1), refresh_every=2)
        optimizer.remember("b", Memory(model, 2), refresh_every=3)
        inner.consolidate(None)
        return optimizer

    def conflict(self, model: nn.Module, seed: int) -> None:
        """A gradient against memory a's."""
        backward(model, seed)
        params = list(model.parameters())
        for param, row in zip(params, Memory(model, 1).gradient(params), strict=True):
            param.grad -= 2 * row

    @pytest.mark.parametrize(
        "options", [{}, {"blocks": "tensor"}, {"memory_strength": 0.3}], ids=str
    )
    def test_equals_projection_and_step(self, options, monkeypatch):
        fused, apart = make_model(), make_model()
        optimizer = self.make(fused, **options)
        for seed in range(8):
            self.conflict(fused, seed)
            before = [p.grad.clone() for p in fused.parameters()]
            optimizer.step()
            assert all(
                torch.equal(p.grad, g) for p, g in zip(fused.parameters(), before, strict=True)
            )
            assert optimizer.optimizer.backend == "cpu"
            assert optimizer.last_projection.active.any()
        monkeypatch.setattr(GEM, "_is_fused", lambda self: False)
        optimizer = self.make(apart, **options)
        for seed in range(8):
            self.conflict(apart, seed)
            optimizer.step()
        for a, b in zip(weights(fused), weights(apart), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_rows_wider_than_the_arithmetic_are_added_before(self, model):
        optimizer = self.make(model, memory_dtype=torch.float64)
        self.conflict(model, 0)
        before = flat([p.grad for p in model.parameters()])
        optimizer.step()
        assert optimizer.last_projection.active.any()
        assert not torch.equal(flat([p.grad for p in model.parameters()]), before)

    def test_an_invalid_step_is_skipped_by_the_kernel(self, model):
        optimizer = self.make(model)
        train(model, optimizer, 1)
        before = weights(model)
        backward(model, 0)
        model[0].weight.grad[0, 0] = torch.nan
        optimizer.step()
        assert same(model, before)
        assert optimizer.last_projection.status[0] == Status.INVALID
        assert optimizer.state[model[0].weight]["step"] == 1

    def test_parameters_without_elements(self):
        model = make_model()
        model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
        optimizer = self.make(model)
        backward(model, 0)
        model.empty.grad = torch.empty(0, 3)
        optimizer.step()
        assert optimizer.optimizer.backend == "cpu"


def test_rows_follow_the_names_of_the_parameters():
    def make(names):
        params = {
            name: nn.Parameter(torch.zeros(size))
            for name, size in zip("xyz", (3, 3, 0), strict=True)
        }
        return params, GEM(EWCAdamW([(name, params[name]) for name in names], lr=0.1))

    params, optimizer = make("xyz")
    optimizer.remember("a", lambda: (params["x"].sum() + 2 * params["y"].sum()).backward(), None)
    (params["x"].sum() - 3 * params["y"].sum()).backward()
    optimizer.step()
    others, again = make("zyx")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in "xy":
        others[name].data.copy_(params[name])
        for param in (params[name], others[name]):
            param.grad = torch.full((3,), 1.0 if name == "x" else -3.0)
    optimizer.step()
    again.step()
    torch.testing.assert_close(again.conflicts(), optimizer.conflicts())
    for name in "xy":
        torch.testing.assert_close(others[name], params[name])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_dict_that_was_not_fused(model, kind):
    bare = kind(model.parameters(), lr=0.1)
    memory = Memory(model, 1)
    memory()
    bare.step()
    optimizer = GEM(kind(model.parameters(), lr=0.1, fused=True))
    optimizer.load_state_dict(bare.state_dict())
    optimizer.remember("a", memory)
    optimizer.step()
    assert optimizer.last_projection.status.item() == Status.INACTIVE


def test_a_compiled_step_reports(model):
    optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
    memory = Memory(model, 1)
    optimizer.remember("a", memory)
    memory()
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer.conflicts().item() == pytest.approx(1)


@pytest.mark.parametrize("average", [False, True])
def test_a_bare_optimizers_state_dict_leaves_the_memories(average):
    """Their rows are those of the weights that are loaded, but where they are stored once."""
    model = make_model()
    optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1), average=average)
    memories = {name: Memory(model, ord(name)) for name in "ab"}
    optimizer.remember("a", memories["a"], refresh_every=100)
    optimizer.remember("b", memories["b"], refresh_every=None)
    old = memories["b"].gradient(list(model.parameters()))
    calls = [memory.calls for memory in memories.values()]
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.5).state_dict())
    model.load_state_dict(make_model(seed=1).state_dict())  # before or after the optimizer
    assert optimizer.memories == ("a", "b")
    assert optimizer.param_groups[0]["lr"] == 0.5
    fresh = {name: memory.gradient(list(model.parameters())) for name, memory in memories.items()}
    train(model, optimizer, 3)
    new_calls = [memory.calls for memory in memories.values()]
    assert new_calls == [calls[0] + 1, calls[1] + average]
    for i, rows in optimizer.state_dict()["gem"]["rows"].items():
        if average:
            torch.testing.assert_close(rows[0], (fresh["a"][i] + fresh["b"][i]) / 2)
        else:
            assert torch.equal(rows[0], fresh["a"][i])
            assert torch.equal(rows[1], old[i])


def test_a_closure_that_forgets_its_own_memory(model):
    optimizer = GEM(torch.optim.SGD(model.parameters(), lr=0.1))
    other = Memory(model, 2)
    first = Memory(model, 1)

    def once() -> None:
        first()
        if "b" in optimizer.memories:
            optimizer.forget("a")

    optimizer.remember("a", once)
    optimizer.remember("b", other, refresh_every=None)
    rows = [row.clone() for row in optimizer.state_dict()["gem"]["rows"].values()]
    for _ in range(2):
        first.loss().backward()
        optimizer.step()
    assert list(optimizer.memories) == ["b"]
    for row, before in zip(optimizer.state_dict()["gem"]["rows"].values(), rows, strict=True):
        assert torch.equal(row, before[1:])


def test_the_solver_begins_where_it_ended(monkeypatch):
    """Between refreshes Q is the same; a refresh, or other gradients, begin anew."""
    from cl_optim.ops import nnqp

    model, known = make_model(), []
    solve = nnqp.nnqp

    def spy(*args: object, state: Tensor, **options: object) -> nnqp.Solution:
        known.append(bool(state.any()))
        return solve(*args, state=state, **options)

    monkeypatch.setattr(nnqp, "nnqp", spy)
    optimizer = GEM(torch.optim.SGD(model.parameters(), lr=1e-3))
    optimizer.remember("a", Memory(model, 1), refresh_every=3)
    optimizer.remember("b", Memory(model, 2), refresh_every=3)
    for step in range(6):
        optimizer.zero_grad()
        Memory(model, 1)()
        for param in model.parameters():
            param.grad.neg_()  # against "a", so that there is something to solve in each step
        if step == 5:
            model[0].bias.grad = None
        optimizer.step()
    assert known == [False, True, True, False, True, False]


class TestDistributedCheckpoint:
    """torch.distributed.checkpoint.state_dict begins the state by a step, and drops the rows."""

    @pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
    @pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW, EWCAdamW])
    def test_beginning_the_state_is_no_step(self, model, inner, lr):
        optimizer = GEM(inner(model.parameters(), lr=lr, weight_decay=0.1))
        memory = Memory(model, 1)
        optimizer.remember("a", memory)
        before, saved = weights(model), plain(optimizer.state_dict()["gem"])
        get_optimizer_state_dict(model, optimizer)
        assert bool(optimizer.state) == (inner is not torch.optim.SGD)
        assert same(model, before)
        assert memory.calls == 1
        assert plain(optimizer.state_dict()["gem"]) == saved

    def test_a_first_step_of_a_warm_up_is_projected(self, model):
        """Its learning rate is 0, but its gradient goes into the moments."""
        optimizer = GEM(torch.optim.AdamW(model.parameters(), lr=0.0))
        memory = Memory(model, 1)
        optimizer.remember("a", lambda: (-memory.loss()).backward())
        memory()
        optimizer.step()
        assert optimizer.conflicts().item() == pytest.approx(-1)
        assert (optimizer.state[model[0].weight]["exp_avg"] == 0).all()

    @pytest.mark.parametrize("flatten", [False, True])
    def test_the_memories_stay_through_a_resume(self, model, flatten):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        optimizer = GEM(torch.optim.AdamW(model.parameters(), lr=0.01))
        optimizer.remember("a", Memory(model, 1))
        train(model, optimizer, 3)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        twin = make_model(seed=1)
        resumed = GEM(torch.optim.AdamW(twin.parameters(), lr=0.5))
        resumed.remember("a", Memory(twin, 1))
        set_optimizer_state_dict(twin, resumed, saved, options=options)
        twin.load_state_dict(model.state_dict())
        for side, each in ((model, optimizer), (twin, resumed)):
            train(side, each, 3, seed=50)
        assert same(model, twin)
        assert torch.equal(resumed.conflicts(), optimizer.conflicts())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("refresh_every", [5, None])
def test_rows_of_parameters_that_were_exchanged(refresh_every, average):
    """Rows of weights that are gone would be zeros of the new ones, and protect nothing."""
    first, second = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    used = [first]
    optimizer = GEM(torch.optim.SGD([first], lr=0.1), average=average)
    optimizer.remember(
        "a", lambda: (used[0] * torch.tensor([0.0, 1.0])).sum().backward(), refresh_every
    )
    first.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    used[0] = second
    optimizer.optimizer.param_groups[0]["params"] = [second]
    second.grad = torch.tensor([1.0, -1.0])
    if refresh_every is None and not average:
        with pytest.raises(RuntimeError, match=r"exchanged .* memory 'a' is never refreshed"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"exchanged .* memory 'a' is never refreshed"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match=r"forget\('a'\), and remember\(\) it again"):
            optimizer.remember("b", second.sum().backward)
        assert torch.equal(second.detach(), torch.tensor([1.0, 2.0]))
        optimizer.forget("a")
        optimizer.remember("a", lambda: (second * torch.tensor([0.0, 1.0])).sum().backward(), None)
    optimizer.step()
    assert optimizer.last_projection.v.item() == pytest.approx(1.0)
    torch.testing.assert_close(second.detach(), torch.tensor([0.9, 2.0]))


def test_hooks_that_write_into_gradients_are_no_resets():
    """Such as clipping parameter by parameter."""
    param = nn.Parameter(torch.ones(2))

    def clip(param):
        param.grad.clamp_(max=4.0)

    param.register_post_accumulate_grad_hook(clip)
    optimizer = GEM(torch.optim.SGD([param], lr=0.1))

    def closure():
        for factor in (1.0, 2.0):
            (param * factor).sum().backward()

    optimizer.remember("a", closure)
    assert optimizer.state_dict()["gem"]["rows"][0].tolist() == [[1.5, 1.5]]


def test_a_gradient_that_has_become_zero_is_a_row():
    """Of a loss with a margin, say, that is clipped in the closure."""
    param, margin = nn.Parameter(torch.ones(2)), [3.0]
    optimizer = GEM(torch.optim.SGD([param], lr=0.1))

    def closure():
        (margin[0] - param).clamp(min=0.0).sum().backward()
        nn.utils.clip_grad_norm_([param], 1.0)

    optimizer.remember("a", closure)
    margin[0] = 0.0
    for _ in range(2):
        param.grad = torch.ones(2)
        optimizer.step()
    assert not optimizer.state_dict()["gem"]["rows"][0].any()


def test_a_state_dict_in_memory_stays_whole():
    """Its tensors are the optimizer's own: rows of now go with products of now."""
    param, scale = nn.Parameter(torch.zeros(2)), [1.0]
    optimizer = GEM(torch.optim.SGD([param], lr=0.0))
    optimizer.remember("a", lambda: (param * scale[0]).sum().backward(), refresh_every=4)

    def step():
        param.grad = -torch.ones(2)
        optimizer.step()

    for _ in range(2):
        step()
    kept = optimizer.state_dict()
    scale[0] = 10.0
    for _ in range(3):
        step()  # in one of them the row is made anew
    optimizer.load_state_dict(kept)
    step()
    assert param.grad.abs().max() < 1e-6
