"""Trainers of other packages in several processes."""

from __future__ import annotations

import re
import tempfile
from typing import Any

import pytest
import torch
from processes import results_of
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import one_epoch, tiny_llama

from cl_optim import EWCAdamW, FisherEstimator, Importance, estimate_fisher
from cl_optim.distributed import is_dtensor, whole

SETTINGS = {
    f"{average} {accumulation}": (average, accumulation)
    for average in (True, False)
    for accumulation in (1, 2)
}


def train(
    folder: str, average: bool, accumulation: int, verify: Any = "first"
) -> dict[str, Tensor]:
    model, data = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = one_epoch(
        folder, model, data, optimizer, accumulation, average_tokens_across_devices=average
    )
    fisher = FisherEstimator(model, during_training=True, verify=verify)
    with fisher.attach(optimizer, loss_terms="tokens"):
        trainer.train()
    importance = fisher.finalize(ranks="sum")
    assert importance.samples == 8
    return dict(importance.items())


def trained(rank: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            name: train(folder, *setting) for name, setting in SETTINGS.items()
        }
        try:
            train(folder, average=True, accumulation=1, verify=False)
        except RuntimeError as error:
            found["unverified"] = str(error)
    return found


def scaled(rank: int) -> list[dict[str, Tensor]]:
    """Multiply a loss as the Trainer does, and by a GradScaler that is given, or is found."""
    found = []
    for is_given in (True, False):
        model, data = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        fisher = FisherEstimator(model, during_training=True)
        given = scaler if is_given else None
        with fisher.attach(optimizer, loss_terms="tokens", scaler=given):
            for step in range(2):
                both = stacked(data[4 * step : 4 * step + 4])
                mine = {key: value[2 * rank : 2 * rank + 2] for key, value in both.items()}
                total = (both["labels"] != -100).sum()
                optimizer.zero_grad()
                loss = 2 * model(**mine, num_items_in_batch=total).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        found.append(dict(fisher.finalize(ranks="sum").items()))
    return found


def prepared(rank: int) -> dict[str, Any]:
    """Let Accelerate shard a model, which exchanges the optimizer's parameters; save and load."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    # On a CPU it would not shard, though all that it does for this would work there.
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model, data = tiny_llama()
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    model, wrapped = accelerator.prepare(model, optimizer)
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer, loss_terms="tokens"):
        for step in range(2):
            rows = data[4 * step + 2 * rank : 4 * step + 2 * rank + 2]
            wrapped.zero_grad()
            accelerator.backward(model(**stacked(rows)).loss)
            wrapped.step()
    importance = fisher.finalize()
    optimizer.consolidate(importance)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.1
    penalties = [optimizer.penalty().item()]
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)
        accelerator.save_state(folder[0])
        optimizer.consolidate(None)
        penalties.append(optimizer.penalty().item())
        accelerator.load_state(folder[0])
        torch.distributed.barrier()
    penalties.append(optimizer.penalty().item())
    return {
        "F": {name: whole(value) for name, value in importance.items()},
        "spread": all(map(is_dtensor, optimizer.param_groups[0]["params"])),
        "penalties": penalties,
    }


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def expected() -> Importance:
    model, data = tiny_llama()

    def loss(each: nn.Module, batch: Any) -> Tensor:
        logits = each(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        return losses.sum(1)

    return estimate_fisher(model, [stacked(data)], "empirical", per_sample_loss=loss)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    functions = {"trained": trained, "scaled": scaled, "prepared": prepared}
    return results_of(functions, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trainer_of_transformers(results, name):
    """It divides by all processes' tokens, and multiplies by their number, or does neither."""
    for found in results["trained"]:
        for parameter, value in expected().items():
            torch.testing.assert_close(found[name][parameter], value, rtol=1e-4, atol=1e-8)


def test_a_scaler_beside_it(results):
    for both in results["scaled"]:
        for found in both:
            for parameter, value in expected().items():
                torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-8)


def test_a_loss_that_cannot_be_seen_is_refused(results):
    for found in results["trained"]:
        assert re.match(
            ".*num_items_in_batch in one of 2 processes.* to False", found["unverified"]
        )


def test_a_model_that_accelerate_has_sharded(results):
    for found in results["prepared"]:
        assert found["spread"]
        for parameter, value in expected().items():
            torch.testing.assert_close(found["F"][parameter], value, rtol=1e-4, atol=1e-8)
        before, other, after = found["penalties"]
        assert before == after > 0.0
        assert other == 0.0
