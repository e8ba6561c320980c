"""Optimizers in several processes: what would go wrong without a word is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from processes import results_of
from torch import nn

from cl_optim import EWCAdamW


def sharded_state(rank: int) -> tuple[str, str]:
    """Step by ZeroRedundancyOptimizer, which copies its own options over the optimizer's."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=EWCAdamW, lr=0.1)
    importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    optimizer.optim.consolidate(importance, model=model, strict=False)
    said = []
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        try:
            optimizer.step()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said[0], said[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return results_of({"sharded_state": sharded_state}, 2, tmp_path_factory.mktemp("ranks"))


def test_zero_redundancy_is_refused_where_it_takes_options_back(results):
    for both in results["sharded_state"]:
        for said in both:
            assert re.search("'consolidations' is 0, .* as ZeroRedundancyOptimizer does", said), (
                said
            )
