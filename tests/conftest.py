import sys
from pathlib import Path

import pytest
import torch

# For `bench.retention`; at the end, so that a cl_optim that is installed comes first.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are not collected where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if item not in gpu]
    config.hook.pytest_deselected(items=gpu)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
