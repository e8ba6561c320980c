"""Optimizers of DTensors: each process steps its part, and the numbers are one process's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from processes import results_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import cl_optim
from cl_optim import EWC, EWCAdamW
from cl_optim.distributed import here, whole
from cl_optim.distributed import like as placed

LAYOUTS = ("fsdp", "hsdp", "fsdp and tp")


def network() -> nn.Module:
    """Make a network whose parts are uneven, and of whose last bias some ranks have nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 3))


def spread(model: nn.Module, layout: str) -> nn.Module:
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (4,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:  # the norm is on the mesh of data parallelism alone
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel()}
        parallelize_module(model, both["tp"], plan)
        mesh = both["dp"]
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def like(model: nn.Module, seed: int, positive: bool = False) -> dict[str, Tensor]:
    """Draw whole tensors of the parameters' shapes, the same in all processes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    return {name: value.square() if positive else value for name, value in drawn.items()}


def give(model: nn.Module, grads: dict[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        param.grad = placed(param, here(grads[name], param).clone())


def weights(model: nn.Module) -> list[Tensor]:
    return [whole(param.detach()) for param in model.parameters()]


def run(model: nn.Module, optimizer: Any, **options: Any) -> dict[str, Any]:
    """Step and protect, twice, and tell all that can be told."""
    told: dict[str, Any] = {}
    for step in range(3):
        give(model, like(model, step))
        optimizer.step()
    optimizer.consolidate(like(model, 10, positive=True), **options)
    for step in range(3, 6):
        give(model, like(model, step))
        optimizer.step()
    optimizer.consolidate(like(model, 11, positive=True), decay=0.5, **options)
    told["frozen"] = optimizer.freeze(0.3)
    give(model, like(model, 6))
    if hasattr(optimizer, "suggest_lambda"):
        told["lambda"] = optimizer.suggest_lambda()
    for step in range(6, 9):
        give(model, like(model, step))
        optimizer.step()
    if getattr(optimizer, "defaults", {}).get("track_penalty"):
        told["last penalty"] = optimizer.last_penalty.item()
        told["last drift"] = optimizer.last_drift.tolist()
    optimizer.settle()
    told["penalty"] = optimizer.penalty().item()
    told["mean"] = optimizer.param_groups[0]["importance_mean"]
    told["λ"] = optimizer.param_groups[0]["ewc_lambda"]
    told["weights"] = weights(model)
    told["which"] = [whole(one.frozen) for one in optimizer.protected()]
    return told


def both(layout: str, make: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a spread model tells, and what the same model tells that is whole."""
    parts, alone = spread(network(), layout), network()
    return run(parts, make(parts), **options), run(alone, make(alone), **options)


def ewc_adamw(**options: Any) -> Any:
    return lambda model: EWCAdamW(model.named_parameters(), lr=0.02, ewc_lambda=0.3, **options)


def ewc(**options: Any) -> Any:
    def make(model: nn.Module) -> EWC:
        inner = torch.optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
        return EWC(inner, ewc_lambda=0.3, **options)

    return make


EXACT = {
    "float32": ewc_adamw(),
    "proximal": ewc_adamw(penalty="proximal", amsgrad=True),
    "decoupled": ewc_adamw(penalty="decoupled", maximize=True),
    "tracked": ewc_adamw(track_penalty=True),
    "foreach": ewc_adamw(foreach=True),
    "around": ewc(),
    "around, gradient": ewc(penalty="gradient"),
    "around, decoupled": ewc(penalty="decoupled"),
    "around, every 2": ewc(every=2),
    "around, damped": ewc(importance_damping=0.5),
}
# Means over weights are added up in another order, and what is rounded at random in other places.
CLOSE = {
    "strength": (ewc_adamw(strength=0.1), 1e-6),
    "damped": (ewc_adamw(importance_damping=0.5), 1e-6),
    "bfloat16": (ewc_adamw(importance_dtype="bfloat16", anchor_dtype="bfloat16"), 5e-3),
    "log8": (ewc_adamw(importance_dtype="log8"), 3e-2),
    "bfloat16 moments": (ewc_adamw(state_dtype="bfloat16"), 1e-2),
}


def steps(rank: int) -> dict[str, Any]:
    told = {}
    for layout in LAYOUTS:
        for name, make in EXACT.items():
            told[layout, name] = both(layout, make)
        told[layout, "exact anchors"] = both(layout, ewc_adamw(), anchors="exact")
    for name, (make, _) in CLOSE.items():
        told["hsdp", name] = both("hsdp", make)
    return told


def equal_importance(rank: int) -> tuple[float, float]:
    penalties = []
    for model in (spread(network(), "hsdp"), network()):
        optimizer = ewc_adamw()(model)
        optimizer.consolidate(None)
        give(model, like(model, 0))
        optimizer.step()
        penalties.append(optimizer.penalty().item())
    return penalties[0], penalties[1]


def spread_importance(rank: int) -> list[float]:
    """Consolidate importance that is spread as the parameters are, and in another way."""
    penalties = []
    for placement in ("whole", "parts", "others"):
        model = spread(network(), "fsdp")
        importance = like(model, 10, positive=True)
        for name, param in model.named_parameters():
            part: Any = placed(param, here(importance[name], param))
            if placement == "others" and param.dim() == 2:
                part = part.redistribute(placements=[Shard(1)])
            if placement != "whole":
                importance[name] = part
        optimizer = ewc_adamw()(model)
        optimizer.consolidate(importance)
        give(model, like(model, 0))
        optimizer.step()
        penalties.append(optimizer.penalty().item())
    return penalties


def bad_importance(rank: int) -> tuple[str, int]:
    """Let the part of one rank alone have a NaN."""
    model = spread(network(), "fsdp")
    importance = like(model, 10, positive=True)
    importance["0.weight"][-1, 0] = float("nan")  # is the last rank's
    optimizer = ewc_adamw()(model)
    with pytest.raises(ValueError, match="must be finite and at least 0") as caught:
        optimizer.consolidate(importance)
    return str(caught.value), len(optimizer.state)


def no_importance(rank: int) -> tuple[str, int]:
    """Give what is no importance in one rank alone."""
    model = spread(network(), "fsdp")
    optimizer = ewc_adamw()(model)
    importance: Any = 3 if rank == 1 else like(model, 10, positive=True)
    with pytest.raises(TypeError, match="importance must be a mapping") as caught:
        optimizer.consolidate(importance)
    return str(caught.value), len(optimizer.state)


def settled_before(rank: int) -> bool:
    """Let an evaluation find what is due, where one before it has left weights gathered."""
    outputs = []
    for model in (spread(network(), "fsdp"), network()):
        optimizer = ewc(every=3)(model)
        optimizer.consolidate(like(model, 10, positive=True))
        optimizer.settle_before(model)
        x = torch.ones(2, 6)
        for step in range(4):
            give(model, like(model, step))
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            model(x).sum().backward()
            give(model, like(model, step))
            optimizer.step()
        model.eval()
        with torch.no_grad():
            outputs.append(model(x))
    return torch.allclose(*outputs, atol=1e-6)


def kronecker(rank: int) -> str:
    alone = network()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    fisher = cl_optim.estimate_fisher(
        alone, [(x, torch.arange(8) % 3)], loss="cross_entropy",
        structure="kronecker", ranks="own",
    )  # fmt: skip
    model = spread(network(), "fsdp")
    optimizer = EWCAdamW(model.named_parameters(), penalty="proximal")
    with pytest.raises(ValueError, match=r"Kronecker .* importance.diagonal\(\)") as caught:
        optimizer.consolidate(fisher)
    optimizer.consolidate(fisher.diagonal())
    return str(caught.value)


def first_step_of_checkpoints(rank: int) -> list[bool]:
    """Begin the state as torch does: by a step with learning rate 0 and gradients of 0."""
    untouched = []
    for form in ("gradient", "decoupled", "proximal"):
        model = spread(network(), "fsdp")
        optimizer = ewc_adamw(penalty=form)(model)
        optimizer.consolidate(like(model, 10, positive=True))
        with torch.no_grad():
            for param in model.parameters():
                param += 0.1
        before = weights(model)
        get_optimizer_state_dict(model, optimizer)
        same = (torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        untouched.append(all(same))
    return untouched


def overflow_on_one_rank(rank: int) -> list[bool]:
    """Let GradScaler see Inf in one rank's part of the gradient: all skip the step."""
    kept = []
    for make in (ewc_adamw(), ewc()):
        model = spread(network(), "fsdp")
        optimizer = make(model)
        optimizer.consolidate(like(model, 10, positive=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(1))
        grads = like(model, 0)
        give(model, {name: 4.0 * grad for name, grad in grads.items()})
        scaler.step(optimizer)
        scaler.update()
        moved = weights(model)
        grads["0.weight"][-1, 0] = float("inf")
        give(model, grads)
        scaler.step(optimizer)
        scaler.update()
        kept.append(all(torch.equal(a, b) for a, b in zip(moved, weights(model), strict=True)))
        kept.append(scaler.get_scale() == 2.0)
        alone = network()
        reference = make(alone)
        reference.consolidate(like(alone, 10, positive=True))
        give(alone, like(alone, 0))
        reference.step()
        kept.append(
            all(torch.allclose(a, b, atol=1e-6) for a, b in zip(moved, weights(alone), strict=True))
        )
    return kept


def exchanged(rank: int) -> list[bool | str]:
    """Exchange parameters for shards of them, as trainers do, before and after a consolidation."""
    outcome: list[bool | str] = []
    for protects in (False, True):
        model = network()
        optimizer = ewc_adamw()(model)
        if protects:
            optimizer.consolidate(like(model, 10, positive=True))
        else:
            give(model, like(model, 0))
            optimizer.step()
            optimizer.state.clear()
        spread(model, "fsdp")
        optimizer.param_groups[0]["params"] = list(model.parameters())
        before = weights(model)
        give(model, like(model, 1))
        try:
            optimizer.step()
        except RuntimeError as error:
            outcome.append(str(error))
        else:
            outcome.append(not torch.equal(before[0], weights(model)[0]))
    return outcome


def differentiable(rank: int) -> str:
    """Ask for a step that autograd sees; the first one finds out that there are DTensors."""
    model = spread(network(), "fsdp")
    optimizer = ewc_adamw(differentiable=True, foreach=True)(model)
    give(model, like(model, 0))
    before = weights(model)
    with pytest.raises(ValueError, match=r"^differentiable=True is not for DTensors") as caught:
        optimizer.step()
    assert all(map(torch.equal, before, weights(model)))
    return str(caught.value)


def moved_storage(rank: int) -> bool:
    """Give parameters other memory, as a move of the model does: state and steps follow."""
    parts, alone = spread(network(), "fsdp"), network()
    for model in (parts, alone):
        optimizer = ewc_adamw()(model)
        optimizer.consolidate(like(model, 10, positive=True))
        for step in range(4):
            give(model, like(model, step))
            optimizer.step()
            if model is parts:
                for param in model.parameters():
                    param._local_tensor = param._local_tensor.clone()
    return all(torch.equal(a, b) for a, b in zip(weights(parts), weights(alone), strict=True))


# --- GEM ------------------------------------------------------------------------------------------


def gem(model: nn.Module, optimizer: Any, forward: Any, **options: Any) -> dict[str, Any]:
    """Train beside two memories, whose losses the new one's gradient raises."""
    optimizer = cl_optim.GEM(optimizer(model), track_update=True, **options)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, 6, generator=generator)
    y = torch.randn(4, 8, 3, generator=generator)

    def loss(index: int, sign: float = 1.0) -> Any:
        return lambda: (sign * (forward(x[index]) - y[index]).square().mean()).backward()

    optimizer.remember("a", loss(0))
    optimizer.remember("b", loss(1), refresh_every=2)
    v = []
    for step in range(6):
        optimizer.zero_grad()
        loss(0 if step == 3 else 2, -1.0 if step == 3 else 1.0)()  # once exactly against a memory
        optimizer.step()
        v.append(optimizer.last_projection.v.clone())
    return {
        "weights": weights(model),
        "v": v,
        "update": optimizer.last_projection.update_dot,
        "cosines": optimizer.conflicts(),
        "rows": {k: whole(value) for k, value in optimizer.state_dict()["gem"]["rows"].items()},
    }


INNER = {
    "sgd": lambda model: torch.optim.SGD(model.named_parameters(), lr=0.05),
    "ewc_adamw": lambda model: EWCAdamW(model.named_parameters(), lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.01, fused=True),
}


def projections(rank: int) -> dict[str, Any]:
    told = {}
    for layout in LAYOUTS[:2]:
        for name, inner in INNER.items():
            for blocks in ("global", "tensor") if name == "sgd" else ("global",):
                parts, alone = spread(network(), layout), network()
                told[layout, name, blocks] = (
                    gem(parts, inner, parts, blocks=blocks),
                    gem(alone, inner, alone, blocks=blocks),
                )
    return told


def gem_elsewhere(rank: int) -> list[bool]:
    """Load memories of a whole model into parts; go on after the parameters' memory has moved."""
    alone, parts = network(), spread(network(), "hsdp")
    first = cl_optim.GEM(INNER["sgd"](alone))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    first.remember("a", lambda: alone(x).square().mean().backward(), refresh_every=None)
    second = cl_optim.GEM(INNER["sgd"](parts))
    second.load_state_dict(first.state_dict())
    kept = []
    for _ in range(2):
        for model, optimizer in ((alone, first), (parts, second)):
            give(model, {name: -row for name, row in like(model, 5).items()})
            optimizer.step()
        kept.append(torch.allclose(first.conflicts(), second.conflicts(), rtol=1e-6))
        for param in parts.parameters():
            param._local_tensor = param._local_tensor.clone()
    kept += [torch.allclose(a, b, atol=1e-6)
             for a, b in zip(weights(alone), weights(parts), strict=True)]  # fmt: skip
    with pytest.raises(RuntimeError, match="a GEM of DTensors cannot be copied"):
        copy.deepcopy(second)
    return kept


def sent(rank: int) -> dict[str, list[int]]:
    """Count what an EWCAdamW, an EWC and a GEM around one send in each step, in bytes."""
    told: dict[str, list[int]] = {}
    model = spread(network(), "fsdp")
    adamw = ewc_adamw()(model)
    names = {"EWCAdamW": adamw, "EWC": ewc()(model), "GEM": cl_optim.GEM(INNER["ewc_adamw"](model))}
    for name, optimizer in names.items():
        if name == "GEM":
            for memory in "abc":
                optimizer.remember(memory, lambda: model(torch.ones(2, 6)).sum().backward(), None)
        else:
            optimizer.consolidate(like(model, 10, positive=True))
        give(model, like(model, 0))
        optimizer.step()
        told[name] = []
        for step in range(3):
            give(model, like(model, step))
            with counted() as calls, CommDebugMode() as traced:
                optimizer.step()
            told[name].append(sum(calls) + traced.get_total_counts() * (name != "GEM"))
    return told


@contextmanager
def counted() -> Iterator[list[int]]:
    """List the bytes of each collective operation that this process begins, as it sends them."""
    calls: list[int] = []
    names = [
        name for name in dir(torch.distributed) if name.startswith(("all_", "reduce_", "broad"))
    ]
    kept = {name: getattr(torch.distributed, name) for name in names}

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        tensor = next((x for x in args[::-1] if isinstance(x, Tensor)), torch.empty(0))
        calls.append(tensor.numel() * tensor.itemsize)
        return kept[name](*args, **kwargs)

    for name in names:
        setattr(torch.distributed, name, partial(counting, name))
    try:
        yield calls
    finally:
        for name, function in kept.items():
            setattr(torch.distributed, name, function)


SCENES = (
    *(projections, gem_elsewhere, sent),
    *(steps, equal_importance, spread_importance, bad_importance, kronecker),
    *(no_importance, settled_before),
    *(first_step_of_checkpoints, overflow_on_one_rank, exchanged, moved_storage, differentiable),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    scenes = {scene.__name__: scene for scene in SCENES}
    return results_of(scenes, 4, tmp_path_factory.mktemp("ranks"))


class TestSteps:
    @pytest.mark.parametrize("name", [*EXACT, "exact anchors"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_weights_are_the_same_bits_given_the_same_gradients(self, results, layout, name):
        for told in results["steps"]:
            parts, alone = told[layout, name]
            if name == "around, damped":  # the mean of F comes of a sum in another order
                close(parts, alone, 1e-6)
                continue
            assert all(map(torch.equal, parts["weights"], alone["weights"]))
            assert all(map(torch.equal, parts["which"], alone["which"]))
            assert parts["frozen"] == alone["frozen"] > 0

    @pytest.mark.parametrize("name", [*EXACT, "exact anchors"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_sums_over_all_weights_are_the_same(self, results, layout, name):
        for told in results["steps"]:
            parts, alone = told[layout, name]
            for key in alone.keys() - {"weights", "which"}:
                assert parts[key] == pytest.approx(alone[key], rel=1e-6), key
            assert alone["penalty"] > 0.0
            assert ("last penalty" in alone) == (name == "tracked")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_sums_are_the_same_bits_in_all_processes(self, results, layout):
        for name in EXACT:
            told = [one[layout, name][0] for one in results["steps"]]
            for key in told[0].keys() - {"weights", "which"}:
                assert len({str(one[key]) for one in told}) == 1, key

    @pytest.mark.parametrize("name", CLOSE)
    def test_formats(self, results, name):
        for told in results["steps"]:
            parts, alone = told["hsdp", name]
            close(parts, alone, CLOSE[name][1])
        first, *others = (told["hsdp", name][0]["weights"] for told in results["steps"])
        for other in others:
            assert all(map(torch.equal, first, other))


def close(parts: dict[str, Any], alone: dict[str, Any], tolerance: float) -> None:
    for a, b in zip(parts["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)
    assert parts["penalty"] == pytest.approx(alone["penalty"], rel=max(30 * tolerance, 1e-5))
    assert parts["λ"] == pytest.approx(alone["λ"], rel=max(tolerance, 1e-6))


class TestProtection:
    def test_equal_importance(self, results):
        for parts, alone in results["equal_importance"]:
            assert parts == pytest.approx(alone, rel=1e-6)
            assert alone > 0.0

    def test_importance_may_be_whole_or_spread_in_any_way(self, results):
        for whole_, parts, others in results["spread_importance"]:
            assert whole_ == parts == others > 0.0

    def test_a_nan_on_one_rank_is_the_same_error_in_all(self, results):
        sentences = {said for said, _ in results["bad_importance"]}
        assert len(sentences) == 1
        assert "'0.weight'" in sentences.pop()
        assert all(count == 0 for _, count in results["bad_importance"])

    def test_what_is_no_importance_on_one_rank_is_refused_in_all(self, results):
        assert results["no_importance"] == [results["no_importance"][0]] * 4
        assert results["no_importance"][0][1] == 0

    def test_an_evaluation_finds_settled_weights(self, results):
        assert results["settled_before"] == [True] * 4

    def test_kronecker_importance_needs_whole_matrices(self, results):
        assert len(set(results["kronecker"])) == 1

    def test_a_first_step_without_learning_rate_leaves_the_weights(self, results):
        assert results["first_step_of_checkpoints"] == [[True] * 3] * 4

    def test_an_overflow_on_one_rank_skips_the_step_on_all(self, results):
        assert results["overflow_on_one_rank"] == [[True] * 6] * 4

    def test_parameters_that_were_exchanged(self, results):
        for trained, refused in results["exchanged"]:
            assert trained is True
            assert "something has exchanged them" in refused

    def test_autograd_does_not_see_parts(self, results):
        assert len(results["differentiable"]) == 4

    def test_parameters_whose_memory_was_exchanged(self, results):
        assert results["moved_storage"] == [True] * 4


class TestGEM:
    CASES = (
        *((layout, "sgd", blocks) for layout in LAYOUTS[:2] for blocks in ("global", "tensor")),
        *((layout, name, "global") for layout in LAYOUTS[:2] for name in ("ewc_adamw", "adamw")),
    )

    @pytest.mark.parametrize("case", CASES, ids=" ".join)
    def test_parts_are_projected_as_the_whole(self, results, case):
        for told in results["projections"]:
            parts, alone = told[case]
            assert any(bool(v.any()) for v in alone["v"])
            for a, b in zip(parts["weights"], alone["weights"], strict=True):
                torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6)
            for key in ("cosines", "update"):
                torch.testing.assert_close(parts[key], alone[key], rtol=1e-4, atol=1e-6)
            for place, rows in alone["rows"].items():
                torch.testing.assert_close(parts["rows"][place], rows, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("case", CASES, ids=" ".join)
    def test_v_is_the_same_bits_in_all_processes(self, results, case):
        first, *others = (told[case][0]["v"] for told in results["projections"])
        for other in others:
            assert all(map(torch.equal, first, other))

    def test_bytes_that_a_step_sends(self, results):
        for told in results["sent"]:
            assert told == {
                "EWCAdamW": [0, 0, 0], "EWC": [0, 0, 0], "GEM": [8 * (3 + 1) ** 2] * 3
            }  # fmt: skip

    def test_state_of_the_whole_and_memory_that_moves(self, results):
        assert all(all(kept) for kept in results["gem_elsewhere"])
