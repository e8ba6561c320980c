"""The Fisher information of several processes: that of one process with all samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import results_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cl_optim import (
    EWCAdamW,
    FisherEstimator,
    Importance,
    ImportanceLog,
    InputProjection,
    estimate_fisher,
)
from cl_optim.retention import interpolate
from cl_optim.retention.adapters import LoRAPenalty

COUNT = 3
SAMPLES = (5, 3, 0)  # of each process


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(sum(SAMPLES), 6, generator=draw)
    return inputs, torch.randint(4, (len(inputs),), generator=draw)


def batches(rank: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return a process's samples in batches of 2, or all of them in one batch."""
    if rank is None:
        return [data()]
    start = sum(SAMPLES[:rank])
    mine = [part[start : start + SAMPLES[rank]] for part in data()]
    return list(zip(*(torch.split(part, 2) for part in mine), strict=True)) if SAMPLES[rank] else []


def values(importance: Importance) -> dict[str, Tensor]:
    return dict(importance.items())


def said_by(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# --- what each process does -----------------------------------------------------------------------

ESTIMATES: dict[str, dict[str, Any]] = {
    "diagonal": {},
    "sampled with empirical labels": {"labels": "empirical"},
    "product": {"structure": "kronecker"},
    "exact": {"structure": "kronecker", "scale": "exact"},
}


def estimated(rank: int) -> dict[str, Any]:
    found = {}
    for name, options in ESTIMATES.items():
        importance = estimate_fisher(make_model(), batches(rank), ranks="sum", **options)
        counts = importance.samples, importance.metadata["ranks"], importance.metadata["labels"]
        found[name] = (values(importance), counts)
    return found


def in_a_group(rank: int) -> dict[str, Tensor] | None:
    group: Any = torch.distributed.new_group([0, 1])
    if rank == 2:
        return None
    return values(estimate_fisher(make_model(), batches(rank), ranks=group))


def trained(rank: int) -> tuple[dict[str, Tensor], Any]:
    """Observe two steps of training, with two of four samples in each of two processes."""
    group: Any = torch.distributed.new_group([0, 1])
    if rank == 2:
        return {}, None
    model = make_model()
    parallel = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    estimator = FisherEstimator(model, during_training=True)
    with estimator.attach(optimizer):
        for inputs, targets in zip(*(torch.split(part, 4) for part in data()), strict=True):
            mine = slice(2 * rank, 2 * rank + 2)
            optimizer.zero_grad()
            F.cross_entropy(parallel(inputs[mine]), targets[mine]).backward()
            optimizer.step()
        importance = estimator.finalize(ranks=group)
        again = estimator.finalize(ranks=group)  # it only looks
    assert all(torch.equal(importance[name], again[name]) for name in importance)
    return values(importance), importance.samples


def lora_penalty(importance: Importance) -> LoRAPenalty:
    import peft

    config = peft.LoraConfig(target_modules=["0", "3"], r=2)
    return LoRAPenalty(peft.get_peft_model(make_model(), config), importance)


class UnsendableError(Exception):
    def __init__(self, message: str, module: nn.Module) -> None:
        super().__init__(message)
        self.hook = lambda: module


def broken(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch, and fail in one process with what does not go through a pickle."""
    yield data()
    if rank == 1:
        raise UnsendableError("the disk is gone", make_model())


def observed(decay: float = 1.0, **options: Any) -> FisherEstimator:
    model = make_model()
    estimator = FisherEstimator(model, decay=decay, during_training=True, **options)
    inputs, targets = data()
    with estimator.observe(batch_size=len(inputs)):
        F.cross_entropy(model(inputs), targets).backward()
    return estimator


def resumed(rank: int) -> dict[str, Any]:
    """Go on with the state of this rank, of another, and of one process alone."""
    first = observed()
    here = first.state_dict()
    there: list[Any] = [None] * COUNT
    torch.distributed.all_gather_object(there, here)
    alone = {key: value for key, value in here.items() if key != "rank"}
    second = observed()
    found: dict[str, Any] = {
        "of another": said_by(lambda: second.load_state_dict(there[(rank + 1) % COUNT])),
        "of one process": said_by(lambda: second.load_state_dict(alone)),
    }
    second.load_state_dict(there[rank])
    both = (first.finalize(ranks="own"), second.finalize(ranks="own"))
    found["own"] = all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    return found


def refusals(rank: int) -> dict[str, str]:
    model = make_model()
    some = [data()]
    alone = estimate_fisher(model, some)
    own = estimate_fisher(model, some, ranks="own")
    whole = estimate_fisher(model, some, ranks="sum")
    optimizer = EWCAdamW(model.named_parameters())
    inputs = InputProjection(torch.optim.SGD(model.parameters(), lr=0.1))
    factors = estimate_fisher(model, some, structure="kronecker")
    bad = [(torch.full((2, 6), float("nan")), torch.zeros(2).long())] if rank == 1 else some
    other = nn.Sequential(nn.Linear(6, 7 if rank == 1 else 8))

    def observe_and_fail() -> None:
        estimator = FisherEstimator(model)
        with estimator.observe(batch_size=8):
            F.cross_entropy(model(some[0][0]), some[0][1]).backward()
        estimator._totals.broken = rank == 1
        estimator.finalize(ranks="sum")

    return {
        "consolidated": said_by(lambda: optimizer.consolidate(alone)),
        "merged": said_by(lambda: whole.merge(alone)),
        "normalized and consolidated": said_by(lambda: optimizer.consolidate(alone.normalize())),
        "inputs": said_by(lambda: inputs.consolidate(factors, model=model)),
        "factors merged": said_by(lambda: factors.merge(factors)),
        "adapters": said_by(lambda: lora_penalty(alone)),
        "diagonal of factors": said_by(lambda: optimizer.consolidate(factors.diagonal())),
        "interpolated": said_by(
            lambda: interpolate(model, make_model().state_dict(), 0.5, importance=(alone, alone))
        ),
        "own": said_by(lambda: optimizer.consolidate(own)),
        "whole": said_by(lambda: optimizer.consolidate(whole.merge(own))),
        "wrapped": said_by(lambda: estimate_fisher(DistributedDataParallel(model), some)),
        "not finite in one": said_by(lambda: estimate_fisher(model, bad, ranks="sum")),
        "other models": said_by(lambda: estimate_fisher(other, [], ranks="sum")),
        "no samples": said_by(lambda: estimate_fisher(model, [], ranks="sum")),
        "failed in one": said_by(observe_and_fail),
        "an error that cannot be sent": said_by(
            lambda: estimate_fisher(model, broken(rank), ranks="sum")
        ),
        "other labels": said_by(
            lambda: estimate_fisher(model, some, ("exact", "empirical")[rank == 1], ranks="sum")
        ),
        "other decay": said_by(lambda: observed(0.9 if rank == 1 else 1.0).finalize(ranks="sum")),
        "other structure": said_by(
            lambda: observed(structure=("diagonal", "kronecker")[rank == 1]).finalize(ranks="sum")
        ),
    }


def kept(rank: int) -> tuple[str, str]:
    """Save what is of one rank, load it, and record it."""
    import tempfile

    alone = estimate_fisher(make_model(), [data()])
    with tempfile.TemporaryDirectory() as folder:
        alone.save(f"{folder}/importance.safetensors")
        loaded = Importance.load(f"{folder}/importance.safetensors")
        optimizer = EWCAdamW(make_model().named_parameters())
        log = ImportanceLog(folder + "/log")
        return said_by(lambda: optimizer.consolidate(loaded)), said_by(
            lambda: log.record("task", loaded)
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    functions = {f.__name__: f for f in (estimated, in_a_group, trained, refusals, kept, resumed)}
    return results_of(functions, COUNT, tmp_path_factory.mktemp("ranks"))


# --- what is to come of it ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_is_that_of_all_samples(results, name):
    expected = estimate_fisher(make_model(), batches(), **ESTIMATES[name])
    for found, (samples, ranks, labels) in (one[name] for one in results["estimated"]):
        assert (samples, ranks, labels) == (8, COUNT, expected.metadata["labels"])
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-5, atol=1e-9)
            assert torch.equal(found[parameter], results["estimated"][0][name][0][parameter])


def test_an_estimate_of_a_group(results):
    expected = estimate_fisher(make_model(), batches())
    for found in results["in_a_group"][:2]:
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-5, atol=1e-9)


def test_training_in_parallel_is_observed_as_by_one_process(results):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    estimator = FisherEstimator(model, during_training=True)
    with estimator.attach(optimizer):
        for inputs, targets in zip(*(torch.split(part, 4) for part in data()), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        expected = estimator.finalize()
    assert "rank" not in expected.metadata
    for found, samples in results["trained"][:2]:
        assert samples == expected.samples == 8
        for parameter, value in expected.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-5, atol=1e-9)
            assert torch.equal(found[parameter], results["trained"][0][0][parameter])


UNREDUCED = r"ValueError: the importance is of rank {} of 3, not reduced: .* ranks='own'\."
SENTENCES = {
    "consolidated": UNREDUCED,
    "merged": UNREDUCED,
    "normalized and consolidated": UNREDUCED,
    "inputs": UNREDUCED,
    "factors merged": UNREDUCED,
    "adapters": UNREDUCED,
    "diagonal of factors": UNREDUCED,
    "interpolated": UNREDUCED,
    "own": "nothing",
    "whole": "nothing",
    "wrapped": "ValueError: model must be the bare model, .* model.module, and ranks='sum'",
    "not finite in one": "ValueError: .*not finite in batch 0",
    "other models": "ValueError: the processes observe other parameters, .* each the same model",
    "no samples": "ValueError: batches has no samples",
    "failed in one": "RuntimeError: an observe.. failed after",
    "an error that cannot be sent": "(RuntimeError: )?UnsendableError: the disk is gone",
    "other labels": "ValueError: the processes estimate in other ways: give each the same arg",
    "other decay": "ValueError: the processes observe other .* the same decay and structure",
    "other structure": "ValueError: the processes observe other .* the same decay and structure",
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_is_refused_is_refused_by_all(results, case):
    for rank, said in enumerate(one[case] for one in results["refusals"]):
        assert re.match(SENTENCES[case].format(rank), said), said


def test_what_is_of_one_rank_stays_so_on_disk(results):
    for rank, both in enumerate(results["kept"]):
        for said in both:
            assert re.match(UNREDUCED.format(rank), said), said


def test_a_state_is_loaded_by_the_rank_that_saved_it(results):
    for rank, found in enumerate(results["resumed"]):
        other = f"the state is of rank {(rank + 1) % COUNT} of 3, and this is rank {rank} of 3"
        assert re.match(
            f"ValueError: {other}: samples .* merge what comes after", found["of another"]
        )
        assert "the state is of one process alone, and this is rank" in found["of one process"]
        assert found["own"]


def test_bad_input():
    for ranks in ("all", 2, True):
        with pytest.raises(ValueError, match=r"^ranks must be 'sum', 'own', a process group"):
            estimate_fisher(make_model(), batches(), ranks=ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", ["sum", "own", None])
def test_one_process_needs_no_ranks(ranks):
    importance = estimate_fisher(make_model(), batches(), ranks=ranks)
    assert not {"rank", "ranks"} & importance.metadata.keys()
