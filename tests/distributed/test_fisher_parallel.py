"""The Fisher information under tensor parallelism, alone and beside fully_shard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import results_of
from shared_fisher import all_said, observed_by_two, same, told
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from cl_optim import EWCAdamW, FisherEstimator, ImportanceLog, estimate_fisher
from cl_optim.distributed import whole
from cl_optim.fisher.observe.parts import refuse_context_parallelism

VOCABULARY, WIDTH, LENGTH = 12, 8, 8


class Scale(nn.Module):
    """RMS norm as model codebases write it, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)  # of which a softmax has no gradient
        self.between = Scale()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            each(h).unflatten(-1, (-1, 2)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Language(nn.Module):
    """A small language model."""

    def __init__(self, checkpoints: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
        self.block = Block()
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self._checkpoints = checkpoints

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self._checkpoints else self.block(x)
        return self.head(self.norm(x))


# Weights by columns, then rows; norms are plain parameters that each process has.
PLAN = {
    "table": RowwiseParallel(input_layouts=Replicate()),
    **{f"block.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{f"block.{name}": RowwiseParallel() for name in ("o", "down")},
    "head": ColwiseParallel(output_layouts=Replicate()),
}
# Between them, sequences are spread, and norms are of a part of each.
SEQUENCES = {
    "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
BLOCK = {
    **{name: SequenceParallel() for name in ("before", "between")},
    **{name: ColwiseParallel(input_layouts=Shard(1)) for name in ("q", "k", "v", "up")},
    **{name: RowwiseParallel(output_layouts=Shard(1)) for name in ("o", "down")},
}
COLUMNS = {**PLAN, "table": ColwiseParallel(output_layouts=Replicate())}
PLANS = {
    "tensors": PLAN,
    "columns": COLUMNS,
    "sequences": {**SEQUENCES, **{f"block.{name}": how for name, how in BLOCK.items()}},
}


def language(**options: Any) -> Language:
    torch.manual_seed(0)
    return Language(**options)


def parallel(plan: str, shape: tuple[int, ...], **options: Any) -> tuple[Language, Any]:
    """Return a model whose mesh ends with tensor parallelism, and that mesh.

    Dimensions before that one are of fully_shard, or of replicas and it.
    """
    names = {1: ("tp",), 2: ("dp", "tp"), 3: ("replicas", "dp", "tp")}[len(shape)]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = language(**options)
    parallelize_module(model, mesh["tp"], PLANS[plan])
    if len(shape) > 1:
        data = mesh[names[:-1]] if len(names) > 2 else mesh["dp"]
        for module in (model.block, model):
            fully_shard(module, mesh=data)
    return model, mesh


def tokens(stream: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + stream)
    return torch.randint(0, VOCABULARY, (2 + stream, LENGTH), generator=generator)


def loss_of(logits: Tensor, x: Tensor) -> Tensor:
    """Return the mean over samples of the sum over tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum") / len(
        x
    )


def observe(model: nn.Module, stream: int, fisher: FisherEstimator, every: int = 3) -> list[Tensor]:
    """Observe three batches; return the gradients of the last, where they are whole."""
    for step in range(every):
        model.zero_grad()
        x = tokens(stream, step)
        with fisher.observe(len(x)):
            loss_of(model(x), x).backward()
    return [whole(p.grad) for p in model.parameters() if p.grad is not None]


def alone(streams: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what one process finds that has all samples, and its last gradients' mean."""
    model = language()
    fisher = FisherEstimator(model, verify=True)
    grads: list[list[Tensor]] = []
    for stream in range(streams):
        grads.append([g.clone() for g in observe(model, stream, fisher)])
    mean = [torch.stack(each).mean(0) for each in zip(*grads, strict=True)]
    return told(fisher.finalize(ranks="own")), mean


def observed(rank: int, plan: str, shape: tuple[int, ...], **options: Any) -> Any:
    verify = options.pop("verify", True)
    model, mesh = parallel(plan, shape, **options)
    fisher = FisherEstimator(model, verify=verify)
    streams = mesh.size() // mesh["tp"].size()
    grads = observe(model, rank // mesh["tp"].size(), fisher)
    return (told(fisher.finalize()), grads), alone(streams)


OBSERVED: dict[str, Callable[[int], Any]] = {
    f"{plan}, {name}": partial(observed, plan=plan, shape=shape, **options)
    for plan in PLANS
    for name, shape, options in (
        ("parallel", (4,), {"verify": "first"}),
        ("sharded", (2, 2), {}),
        ("checkpoints", (2, 2), {"checkpoints": True, "verify": "first"}),
        ("replicas", (2, 1, 2), {"verify": "first"}),
    )
    if plan != "columns" or name == "sharded"
}


def in_a_pass_of_its_own(rank: int) -> list[Any]:
    """Estimate where logits are DTensors, too, from the data's labels."""
    found = []
    for shape in ((4,), (2, 2)):
        model, mesh = parallel("sequences", shape)
        tp = mesh["tp"].size()
        model.head.register_forward_hook(
            lambda module, args, out, mesh=mesh: DTensor.from_local(out, mesh["tp"], [Replicate()])
        )
        batches = [(x, x) for x in (tokens(rank // tp, step) for step in range(3))]
        options: dict[str, Any] = {"labels": "empirical", "max_samples": None, "verify": True}
        every = [(x, x) for stream in range(4 // tp) for x in (tokens(stream, s) for s in range(3))]
        found.append(
            (
                told(estimate_fisher(model, batches, **options)),
                told(estimate_fisher(language(), every, ranks="own", **options)),
            )
        )
    return found


def trained_on(rank: int, folder: str = "") -> list[Any]:
    """Attach to training with loss_parallel, consolidate, and record what was found."""
    model, _ = parallel("sequences", (2, 2))
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer):
        for step in range(3):
            optimizer.zero_grad()
            x = tokens(rank // 2, step)
            loss_of(model(x), x).backward()
            optimizer.step()
    importance = fisher.finalize()
    optimizer.consolidate(importance)
    log = ImportanceLog(f"{folder}/log")
    log.record("a", importance, model, dict(model.named_parameters()))
    read = ImportanceLog(f"{folder}/log", mode="r").load("a")
    same_ = [torch.equal(whole(importance[name]).float(), read[name]) for name in importance]
    return [told(importance), alone(2)[0], all(same_), optimizer.penalty().item()]


def logits_in_parts(rank: int) -> list[Any]:
    """Observe a loss of logits whose vocabulary is spread."""
    plan = {**PLAN, "head": ColwiseParallel(use_local_output=False)}
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    model = language()
    parallelize_module(model, mesh, plan)
    fisher = FisherEstimator(model)
    for step in range(3):
        x = tokens(0, step)
        with loss_parallel(), fisher.observe(len(x), loss_terms=x.numel()):
            F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    other = language()
    expected = FisherEstimator(other)
    for step in range(3):
        x = tokens(0, step)
        with expected.observe(len(x), loss_terms=x.numel()):
            F.cross_entropy(other(x).flatten(0, 1), x.flatten()).backward()
    attached = FisherEstimator(model, during_training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with loss_parallel(), attached.attach(optimizer, loss_terms="tokens"):
        for step in range(3):
            optimizer.zero_grad()
            x = tokens(0, step)
            F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
    found = told(fisher.finalize()), told(attached.finalize())
    return [*found, told(expected.finalize(ranks="own"))]


def tied(rank: int) -> list[Any]:
    """Use one table at both ends, whose rows are spread."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, other = language(), language()
    parallelize_module(model, mesh["tp"], PLAN)
    model.head.weight = model.table.weight
    other.head.weight = other.table.weight
    fully_shard(model, mesh=mesh["dp"])
    fisher, expected = FisherEstimator(model, verify=True), FisherEstimator(other)
    observe(model, rank // 2, fisher)
    for stream in range(2):
        observe(other, stream, expected)
    return [told(fisher.finalize()), told(expected.finalize(ranks="own"))]


def resumed(rank: int) -> list[Any]:
    """Go on in another estimator from a state."""
    model, _ = parallel("sequences", (2, 2))
    batches = [(tokens(rank // 2, step),) for step in range(3)]
    found = observed_by_two(model, batches, lambda batch: loss_of(model(batch[0]), batch[0]))
    return [found, alone(2)[0]]


def overflowed(rank: int) -> list[Any]:
    """Let the loss of one group overflow: its step is left out in all."""
    found = []
    for shape in ((4,), (2, 2)):
        model, mesh = parallel("sequences", shape)
        stream = rank // mesh["tp"].size()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        fisher = FisherEstimator(model, during_training=True)
        with fisher.attach(optimizer, scaler=scaler):
            for step in (0, 5, 1, 2):
                optimizer.zero_grad()
                x = tokens(stream, step)
                loss = loss_of(model(x), x)
                scaler.scale(loss * (float("inf") if (step, stream) == (5, 0) else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        importance = fisher.finalize()
        dropped = importance.metadata["dropped_samples"]
        found.append((told(importance), alone(4 // mesh["tp"].size())[0], dropped))
    return found


def mixed_precision(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = language()
    parallelize_module(model, mesh["tp"], PLAN)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    fisher = FisherEstimator(model)
    for step in range(3):
        x = tokens(rank // 2, step)
        with fisher.observe(len(x)):
            loss_of(model(x).float(), x).backward()
    with pytest.raises(ValueError, match=r"ranks must be 'sum', or be left out"):
        fisher.finalize(ranks=mesh["tp"].get_group())
    return [told(fisher.finalize(ranks=mesh["dp"].get_group())), alone(2)[0]]


def replicas(rank: int) -> list[Any]:
    """Let two groups of tensor parallelism see other samples, which nothing reduces for them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = language()
    parallelize_module(model, mesh["tp"], PLAN)
    fisher = FisherEstimator(model)
    observe(model, rank // 2, fisher)
    found: list[Any] = [told(fisher.finalize(ranks=mesh["dp"].get_group())), alone(2)[0]]
    unsaid = told(fisher.finalize())
    found.append({key: unsaid[key] for key in ("ranks", "rank")})
    for wrong in ("sum", mesh["tp"].get_group()):
        with pytest.raises(ValueError, match=r"must not be of processes that have the same sam"):
            fisher.finalize(ranks=wrong)
    return found


def refused(rank: int) -> list[str]:
    said = []

    def note(error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        said.append(str(caught.value))

    # Processes that were given other samples.
    model, mesh = parallel("tensors", (4,))
    fisher = FisherEstimator(model)
    mine = tokens(0, int(rank < 2))
    note(ValueError, lambda: _observe(fisher, model, mine))
    note(ValueError, lambda: estimate_fisher(model, [(mine, mine)], "empirical", None))
    # A norm, by the plan a whole parameter, that meets a part of each sequence.
    model = language()
    plan = {k: v for k, v in PLANS["sequences"].items() if k != "norm"}
    plan["block.down"] = RowwiseParallel(output_layouts=Shard(1), use_local_output=True)
    parallelize_module(model, mesh, plan)
    model.norm.register_forward_pre_hook(lambda module, args: (_local(args[0]),))
    fisher = FisherEstimator(model, verify=False)
    observe(model, 0, fisher, 1)
    note(ValueError, fisher.finalize)
    # Factors of matrices.
    model, mesh = parallel("tensors", (4,))
    note(NotImplementedError, lambda: FisherEstimator(model, structure="kronecker"))
    # As many tokens as sequences: these may be positions.
    fisher = FisherEstimator(model, verify=False)
    square = torch.arange(16).view(4, 4) % VOCABULARY
    note(NotImplementedError, lambda: _observe(fisher, model, square))
    # A function of a matrix that has no rule for parts.
    model = language()
    model.head.forward = lambda x: F.linear(x, model.head.weight * 2.0)  # type: ignore[method-assign]
    parallelize_module(model, mesh, PLAN)
    fisher = FisherEstimator(model, verify=False)
    note(NotImplementedError, lambda: _observe(fisher, model, tokens(0, 0)))
    # Parts of sequences.
    model = language()
    fisher = FisherEstimator(model, verify=False)
    heads, tokens_ = (
        DTensor.from_local(torch.ones(2, 2, 4, 3), mesh, [Shard(dim)]) for dim in (1, 2)
    )
    refuse_context_parallelism([heads])
    with pytest.raises(NotImplementedError, match=r"a part of each sequence"):
        refuse_context_parallelism([heads, tokens_])
    part = tokens(0, 0)[:, :4].repeat(1, 4)
    with context_parallel(mesh, buffers=[part], buffer_seq_dims=[1]):
        note(NotImplementedError, lambda: _observe(fisher, model, part))
    return said


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _observe(fisher: FisherEstimator, model: nn.Module, x: Tensor) -> None:
    with fisher.observe(len(x)):
        loss_of(model(x), x).backward()


SCENES = (
    in_a_pass_of_its_own,
    logits_in_parts,
    tied,
    resumed,
    overflowed,
    mixed_precision,
    replicas,
    refused,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    scenes: dict[str, Any] = dict(OBSERVED)
    for scene in SCENES:
        scenes[scene.__name__] = scene
    scenes["trained_on"] = partial(trained_on, folder=str(folder))
    return results_of(scenes, 4, folder)


@pytest.mark.parametrize("way", OBSERVED)
def test_observed_in_training(results, way):
    for (found, grads), (expected, others) in results[way]:
        same(found, expected, None if "parallel" in way else 2)
        assert len(found["parts"]) >= 13
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_in_a_pass_of_its_own(results):
    for one in results["in_a_pass_of_its_own"]:
        for (found, expected), ranks in zip(one, (None, 2), strict=True):
            same(found, expected, ranks)


def test_attached_consolidated_and_recorded(results):
    for found, expected, is_recorded, penalty in results["trained_on"]:
        same(found, expected, 2)
        assert is_recorded
        assert penalty == 0.0


def test_of_logits_whose_vocabulary_is_spread(results):
    for found, attached, expected in results["logits_in_parts"]:
        same(found, expected, None)
        same(attached, expected, None)


@pytest.mark.parametrize("way", ["tied", "resumed"])
def test_in_other_loops(results, way):
    for found, expected in results[way]:
        same(found, expected, 2)


def test_an_overflow_is_dropped_in_all(results):
    for one in results["overflowed"]:
        for (found, expected, dropped), ranks in zip(one, (None, 2), strict=True):
            same(found, expected, ranks)
            assert dropped == (2 if ranks is None else 5)


def test_in_mixed_precision(results):
    for found, expected in results["mixed_precision"]:
        same(found, expected, 2, 0.1)


def test_replicas_that_nothing_reduces(results):
    for rank, (found, expected, alone_) in enumerate(results["replicas"]):
        same(found, expected, 2)
        assert alone_ == {"ranks": None, "rank": {"rank": rank, "of": 4}}


SAID = (
    r"tensor parallelism were given other inputs: .* \(verify=False turns the check off\)",
    r"tensor parallelism were given other inputs: .* \(verify=False turns the check off\)",
    r"have seen other samples, or parts of a sequence.*SequenceParallel\(\)",
    r"structure='kronecker' needs whole matrices, .* use structure='diagonal'",
    r"parameter 'table.weight' met indices \[4, 4\], which are, or may be, positions",
    r"uses parameter 'head.weight', and there is no rule for that",
    r"context parallelism.* Estimate the Fisher information of whole sequences",
)


@pytest.mark.parametrize("index", range(len(SAID)))
def test_what_is_refused(results, index):
    all_said(results["refused"], index, SAID[index])
