"""Contexts of the three types of incremental learning, and the network that learns them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_optim.demo.scenarios import Scenario, Split, Task, permuted, split

Name = Literal["task", "domain", "class", "permuted"]

SPLITS: tuple[Name, ...] = ("task", "domain", "class")
NAMES: tuple[Name, ...] = (*SPLITS, "permuted")


@dataclass(frozen=True)
class Setting:
    """What all methods have in common; as published for the split protocol, but for the Fisher's n.

    Attributes:
        contexts: How many follow each other.
        hidden: Width of both hidden layers.
        lr: Adam's learning rate.
        batch: Samples of an iteration.
        iterations: Per context.
        fisher_samples: That the Fisher information of a context is estimated on. Published: all of
            the split protocol's, 1000 of the permuted one's.
    """

    contexts: int = 5
    hidden: int = 400
    lr: float = 1e-3
    batch: int = 128
    iterations: int = 2000
    fisher_samples: int = 1000


_PERMUTED = Setting(contexts=10, hidden=1000, lr=1e-4, iterations=5000)


def setting_of(
    name: Name,
    iterations: int | None = None,
    fisher_samples: int | None = None,
    contexts: int | None = None,
) -> Setting:
    """Return the published setting of a scenario, with what is given in its place."""
    given = {"iterations": iterations, "fisher_samples": fisher_samples, "contexts": contexts}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(_PERMUTED if name == "permuted" else Setting(), **changes)


def scenario_of(name: Name, data: Task, contexts: int, seed: int) -> Scenario:
    """Return the contexts of a seed, which draws the classes that go together, or permutations."""
    if name == "permuted":
        return permuted(data, contexts, seed)
    of_tasks = split(data, contexts, seed)
    if name == "task":
        return of_tasks
    if name == "domain":
        return replace(of_tasks, heads=1)

    def count_on(number: int, task: Task) -> Task:
        first = number * of_tasks.classes
        parts = (task.train, task.validation, task.test)
        return Task(*(Split(part.x, part.y + first) for part in parts))

    return replace(
        of_tasks,
        tasks=tuple(count_on(number, task) for number, task in enumerate(of_tasks.tasks)),
        classes=contexts * of_tasks.classes,
        heads=1,
    )


class Network(nn.Module):
    """An MLP with two hidden layers and one head, or one for each context.

    Attributes:
        context: Whose head is used: a number, or one for each sample.
        outputs: How many of a head can be told by now.
    """

    def __init__(self, scenario: Scenario, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(scenario.features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        heads = (nn.Linear(hidden, scenario.classes) for _ in range(scenario.heads))
        self.heads = nn.ModuleList(heads)
        self.context: int | Tensor = 0
        self.outputs = scenario.classes

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [samples, outputs]."""
        hidden = self.body(x)
        if len(self.heads) == 1:
            logits: Tensor = self.heads[0](hidden)
        elif isinstance(self.context, Tensor):
            each = torch.stack([head(hidden) for head in self.heads], dim=1)
            logits = each[torch.arange(len(x)), self.context]
        else:
            logits = self.heads[self.context](hidden)
        return logits[:, : self.outputs]
