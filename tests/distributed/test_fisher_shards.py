"""The Fisher information of models that are spread over processes, of all their samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import shared_fisher
import torch
import torch.nn.functional as F
from processes import results_of
from shared_fisher import all_said, observed_by_two, told
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cl_optim import (
    EWCAdamW,
    FisherEstimator,
    ImportanceLog,
    estimate_fisher,
)
from cl_optim.distributed import whole
from cl_optim.fisher.adam import importance_from_adam
from cl_optim.importance.errors import LogError


class Network(nn.Module):
    """Layers in modules of their own, one that is used twice, and one in the root itself."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh())
        self.again = nn.Linear(10, 10)
        self.last = nn.Linear(10, 3)
        self.scale = nn.Parameter(torch.ones(10))
        self._checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            if self._checkpoints:
                x = checkpoint(self.again, x, use_reentrant=False)
            else:
                x = self.again(x)
            x = x.tanh()
        return self.last(x * self.scale)


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options)


def spread(model: Network, layout: str = "fsdp", **options: Any) -> Network:
    shape, names = ((4,), ("shard",)) if layout == "fsdp" else ((2, 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in (model.first, model.again, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def samples(rank: int | None, step: int, size: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Return a rank's samples of a step, of which some have more than others; None: all."""
    parts = []
    for of in range(4) if rank is None else [rank]:
        generator = torch.Generator().manual_seed(100 * step + of)
        count = size(of)
        parts.append(
            (
                torch.randn(count, 6, generator=generator),
                torch.randint(0, 3, (count,), generator=generator),
            )
        )
    x, y = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(y)


def uneven(rank: int) -> int:
    return 2 + rank


def alone(size: Callable[[int], int] = uneven, **options: Any) -> dict[str, Any]:
    """Return what one process finds that has all samples of three steps."""
    batches = [samples(None, step, size) for step in range(3)]
    return told(estimate_fisher(network(), batches, "empirical", None, ranks="own", **options))


def observed(rank: int, layout: str, **options: Any) -> tuple[dict[str, Any], list[Tensor]]:
    model = spread(network(**options), layout)
    with torch.no_grad():  # what is not followed by a backward pass leaves parameters whole
        model(torch.ones(1, 6))
    fisher = FisherEstimator(model, verify=True)
    grads = []
    for step in range(3):
        x, y = samples(rank, step, uneven)
        with torch.no_grad():
            model(torch.ones(1, 6))
        with fisher.observe(len(x)):
            F.cross_entropy(model(x), y).backward()
        if step == 0:
            grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    return told(fisher.finalize()), grads


def plain_gradients(rank: int) -> list[Tensor]:
    """Return what the gradients are without an estimator."""
    model = spread(network(), "fsdp")
    x, y = samples(rank, 0, uneven)
    F.cross_entropy(model(x), y).backward()
    return [whole(p.grad) for p in model.parameters() if p.grad is not None]


def observing(rank: int) -> dict[str, Any]:
    return {
        "fsdp": observed(rank, "fsdp"),
        "hsdp": observed(rank, "hsdp"),
        "checkpoints": observed(rank, "fsdp", checkpoints=True),
        "gradients": plain_gradients(rank),
        "alone": alone(),
    }


def accumulated(rank: int) -> dict[str, Any]:
    """Add up gradients of two micro-batches before the processes' are."""
    model = spread(network(), "fsdp")
    fisher = FisherEstimator(model)
    for step in range(3):
        model.set_requires_gradient_sync(step == 1)  # and what comes last is never reduced
        x, y = samples(rank, step, uneven)
        with fisher.observe(len(x), loss_scale=0.5):
            (0.5 * F.cross_entropy(model(x), y)).backward()
    return told(fisher.finalize())


def attached(rank: int) -> dict[str, Any]:
    """Train, and let the estimator watch; the learning rate is 0, so that weights stay."""
    model = spread(network(), "fsdp")
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        x, y = samples(rank, step, uneven)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    fisher.detach()
    importance = fisher.finalize()
    optimizer.consolidate(importance)
    return {**told(importance), "penalty": optimizer.penalty().item()}


def decayed(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let sums decay so fast that what they are multiplied by would leave float32's range."""
    found = []
    for is_spread in (True, False):
        model = spread(network(), "hsdp") if is_spread else network()
        optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
        fisher = FisherEstimator(model, during_training=True, decay=0.001)
        with fisher.attach(optimizer):
            for step in range(14):
                optimizer.zero_grad()
                x, y = samples(rank if is_spread else None, step, uneven)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        importance = fisher.finalize(ranks=None if is_spread else "own")
        found.append({**told(importance), "samples": round(importance.samples, 9)})
    return found[0], found[1]


def overflowed(rank: int) -> dict[str, Any]:
    """Let the loss of one rank overflow: the step is left out, and its samples, in all."""
    model = spread(network(), "fsdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer, scaler=scaler):
        for step in (0, 5, 1, 2):
            optimizer.zero_grad()
            x, y = samples(rank, step, uneven)
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (float("inf") if (step, rank) == (5, 1) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    importance = fisher.finalize()
    return {**told(importance), "dropped": importance.metadata["dropped_samples"]}


class Sent(TorchDispatchMode):
    """Adds up the bytes of DTensor's own reductions: fully_shard's are other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("_c10d_functional.") and isinstance(args[0], Tensor):
            kind = name.split(".")[1]
            if kind not in ("wait_tensor", "_wrap_tensor_autograd"):
                sent = args[0].numel() * args[0].element_size()
                self.bytes[kind] = self.bytes.get(kind, 0) + sent
        return func(*args, **(kwargs or {}))


def sent(rank: int, **options: Any) -> tuple[list[dict[str, int]], dict[str, Any]]:
    """Count what an observed step sends besides what training does, and one that is not."""
    model = spread(network())
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True, **options)
    found = []
    with fisher.attach(optimizer, every=2):
        for step in range(4):
            optimizer.zero_grad()
            x, y = samples(rank, step, uneven)
            with Sent() as counting:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            found.append(counting.bytes)
    return found, told(fisher.finalize())


def recorded(rank: int, folder: str = "") -> list[Any]:
    """Write one record by all, read it in each, and consolidate what was read."""
    model = spread(network(), "hsdp")
    optimizer = EWCAdamW(model.named_parameters(), lr=0.01)
    x, y = samples(rank, 0, uneven)
    fisher = FisherEstimator(model)
    with fisher.observe(len(x)):
        F.cross_entropy(model(x), y).backward()
    importance = fisher.finalize()
    optimizer.consolidate(importance)
    optimizer.freeze(0.1)
    frozen = {one.name: one.frozen for one in optimizer.protected()}
    with pytest.raises(ValueError, match=r"spread over processes .* Importance.whole\(\)"):
        importance.top(0.1)
    with pytest.raises(ValueError, match=r"spread over processes .* Importance.whole\(\)"):
        importance.save(f"{folder}/one.safetensors")
    log = ImportanceLog(f"{folder}/log")
    anchors = dict(model.named_parameters())
    log.record("a", importance, model, MappingProxyType(anchors), frozen)
    with pytest.raises(LogError, match="task 'a' is in the log already"):
        log.record("a", importance, model, anchors, frozen)
    other = EWCAdamW(model.named_parameters(), lr=0.01)
    other.consolidate(ImportanceLog(f"{folder}/log", mode="r"))
    same_ = [
        torch.equal(whole(a.importance), whole(b.importance))
        and torch.equal(whole(a.frozen), whole(b.frozen))
        for a, b in zip(optimizer.protected(), other.protected(), strict=True)
    ]
    same_.append(log.tasks == ("a",) or list(log.tasks) == ["a"])
    adam = importance_from_adam(_stepped(model), model)
    same_ += [isinstance(value, DTensor) for value in adam.values()]
    same_ += [value.is_cpu and not isinstance(value, DTensor) for value in adam.whole().values()]
    return same_


def _stepped(model: nn.Module) -> EWCAdamW:
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    optimizer.step()
    return optimizer


def resumed(rank: int) -> dict[str, Any]:
    model = spread(network(), "fsdp")
    batches = [samples(rank, step, uneven) for step in range(3)]
    return observed_by_two(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))


def in_a_pass_of_its_own(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in OWN_PASS.items():
        batches = [samples(rank, step, uneven) for step in range(3)]
        parts = spread(network(), "hsdp")
        with torch.no_grad():
            parts(torch.ones(1, 6))
        found[name] = (
            told(estimate_fisher(parts, batches, max_samples=None, **options)),
            told(
                estimate_fisher(
                    network(),
                    [samples(None, step, uneven) for step in range(3)],
                    max_samples=None,
                    ranks="own",
                    **options,
                )
            ),
        )
        assert all(p.grad is None for p in parts.parameters())
    return found


OWN_PASS: dict[str, dict[str, Any]] = {
    "empirical": {"labels": "empirical", "verify": True},
    "exact": {"labels": "exact"},
    "mas": {"kind": "mas"},
    "kronecker": {"labels": "empirical", "structure": "kronecker"},
    "kronecker, exact scale": {
        "labels": "empirical", "structure": "kronecker", "scale": "exact", "verify": True
    },
}  # fmt: skip


def mixed_precision(rank: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = spread(network(), "fsdp", mp_policy=policy)
    fisher = FisherEstimator(model)
    for step in range(3):
        x, y = samples(rank, step, uneven)
        with fisher.observe(len(x)):
            F.cross_entropy(model(x).float(), y).backward()
    return told(fisher.finalize())


def without_sync(rank: int) -> dict[str, Any]:
    """Accumulate in the whole gradients, which hide while parameters are parts again."""
    found: dict[str, Any] = {}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, policy in (("float32", {}), ("mixed", {"mp_policy": half})):
        for steps in (2, None):
            model = spread(network(), "fsdp", **policy)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            fisher = FisherEstimator(model, during_training=True)
            try:
                with fisher.attach(optimizer, accumulation_steps=steps):
                    for step in range(4):
                        model.set_requires_gradient_sync(step % 2 == 1)
                        x, y = samples(rank, step % 3, uneven)
                        (0.5 * F.cross_entropy(model(x).float(), y)).backward()
                        if step % 2 == 1:
                            optimizer.step()
                            optimizer.zero_grad()
            except RuntimeError as error:
                found[f"{name}, {steps}"] = str(error)
            else:
                found[f"{name}, {steps}"] = told(fisher.finalize())
    batches = [samples(None, step, uneven) for step in (0, 1, 2, 0)]
    found["alone"] = told(estimate_fisher(network(), batches, "empirical", None, ranks="own"))
    return found


def refused(rank: int) -> list[str]:
    said = []

    def note(error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        said.append(str(caught.value))

    # Fewer batches on one rank.
    batches = [samples(rank, step, uneven) for step in range(2 if rank == 1 else 3)]
    parts = spread(network())
    note(ValueError, lambda: estimate_fisher(parts, batches, "empirical", None))
    note(ValueError, lambda: estimate_fisher(parts, batches[:1], "empirical", None, ranks="own"))
    note(
        NotImplementedError,
        lambda: estimate_fisher(parts, batches[:1], "empirical", None, unsupported="sign"),
    )
    # Spread when there is an estimator.
    late = network()
    early = FisherEstimator(late)
    spread(late)
    note(ValueError, lambda: _observe(early, late))
    return said


def _observe(fisher: FisherEstimator, model: nn.Module) -> None:
    x, y = samples(0, 0, uneven)
    with fisher.observe(len(x)):
        F.cross_entropy(model(x), y).backward()


SCENES = (
    *(
        decayed,
        overflowed,
        sent,
        observing,
        accumulated,
        attached,
        resumed,
        in_a_pass_of_its_own,
        mixed_precision,
        without_sync,
        refused,
    ),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    scenes: dict[str, Any] = {scene.__name__: scene for scene in SCENES}
    scenes["sent_in_bfloat16"] = partial(sent, reduce_dtype=torch.bfloat16)
    scenes["recorded"] = partial(recorded, folder=str(folder))
    return results_of(scenes, 4, folder)


same = partial(shared_fisher.same, ranks=4)


@pytest.mark.parametrize("way", ["fsdp", "hsdp", "checkpoints"])
def test_observed_in_training(results, way):
    for one in results["observing"]:
        found, grads = one[way]
        same(found, one["alone"])
        assert found["parts"] == list(found["F"])
        for a, b in zip(grads, one["gradients"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", ["accumulated", "resumed", "attached"])
def test_in_other_loops(results, way):
    for one, other in zip(results[way], results["observing"], strict=True):
        same(one, other["alone"])
    if way == "attached":
        assert len({one["penalty"] for one in results[way]}) == 1


@pytest.mark.parametrize("name", OWN_PASS)
def test_in_a_pass_of_its_own(results, name):
    for one in results["in_a_pass_of_its_own"]:
        found, expected = one[name]
        same(found, expected, tolerance=1e-5 if "kronecker" in name else 1e-6)


def test_what_decays(results):
    for found, expected in results["decayed"]:
        same(found, expected, tolerance=1e-5)


def test_an_overflow_on_one_rank_is_dropped_in_all(results):
    for one, other in zip(results["overflowed"], results["observing"], strict=True):
        same(one, other["alone"])
        assert one["dropped"] == 14


def test_an_observed_step_sends_one_reduction(results):
    padded = sum(
        4 * param.numel() // len(param) * (-(-len(param) // 4) * 4)
        for param in network().parameters()
    )
    for (whole_, _), (half, _) in zip(results["sent"], results["sent_in_bfloat16"], strict=True):
        for (first, second, third, fourth), size in ((whole_, padded), (half, padded // 2)):
            assert first == third == {"reduce_scatter_tensor": size}
            assert second == fourth == {}


def test_what_is_sent_in_bfloat16_is_rounded_a_little(results):
    for (_, expected), (_, found) in zip(results["sent"], results["sent_in_bfloat16"], strict=True):
        same(found, expected, tolerance=4 * 2.0**-8)
        assert any(
            not torch.equal(found["F"][name], value) for name, value in expected["F"].items()
        )


def test_one_record_is_written_by_all(results):
    assert results["recorded"] == [[True] * len(results["recorded"][0])] * 4


def test_in_mixed_precision(results):
    for one, other in zip(results["mixed_precision"], results["observing"], strict=True):
        same(one, other["alone"], tolerance=0.1)


@pytest.mark.parametrize("policy", ["float32", "mixed"])
def test_accumulation_without_sync_is_seen(results, policy):
    for one in results["without_sync"]:
        assert "2 backward passes came before this step" in one[f"{policy}, None"]
        tolerance = 0.1 if policy == "mixed" else 1e-6
        same(one[f"{policy}, 2"], one["alone"], tolerance=tolerance)


SAID = (
    r"process 1 has no batch after 2, .* max_samples=None",
    r"ranks must be 'sum', or be left out, where the model is spread over 4 processes",
    r"unsupported='sign' is not for a model that is spread",
    r"was spread over processes after the FisherEstimator was made",
)


@pytest.mark.parametrize("index", range(len(SAID)))
def test_what_is_refused(results, index):
    all_said(results["refused"], index, SAID[index])
