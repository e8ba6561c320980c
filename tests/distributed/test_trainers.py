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

from cl_optim import FisherEstimator, estimate_fisher

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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of({"trained": trained}, 2, tmp_path_factory.mktemp("ranks"))["trained"]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_trainer_of_transformers(results, name):
    """It divides by all processes' tokens, and multiplies by their number, or does neither."""
    model, data = tiny_llama()

    def loss(each: nn.Module, batch: Any) -> Tensor:
        logits = each(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        return losses.sum(1)

    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    expected = estimate_fisher(model, [batch], "empirical", per_sample_loss=loss)
    for found in results:
        for parameter, value in expected.items():
            torch.testing.assert_close(found[name][parameter], value, rtol=1e-4, atol=1e-8)


def test_a_loss_that_cannot_be_seen_is_refused(results):
    for found in results:
        assert re.match(
            ".*num_items_in_batch in one of 2 processes.* to False", found["unverified"]
        )
