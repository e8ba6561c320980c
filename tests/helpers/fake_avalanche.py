"""What stands in for Avalanche where it is not installed, as in the project's CI.

It is heavy, with 28 packages that nothing else here needs. This is the part of avalanche-lib 0.6.0
that its plugins meet, written anew after its source: in which order a strategy calls them; how it
resets the optimizer the first time, adds new parameters to it and exchanges those that have grown;
heads by task, and heads that grow. Metrics, loggers, workers, transforms and devices are left out.
The same tests run with Avalanche itself under ``make bench-avalanche``, which is what says that it
behaves so.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

# --- core and benchmarks --------------------------------------------------------------------------


class SupervisedPlugin:
    """Calls that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("before_", "after_")):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


class TaskDataset(Dataset):
    """Samples as Avalanche has them: input, target, task label."""

    def __init__(self, x: Tensor, y: Tensor, label: int) -> None:
        self.x, self.y, self.label = x, y, label

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.x[index], int(self.y[index]), self.label


class Experience:
    def __init__(self, number: int, dataset: TaskDataset) -> None:
        self.current_experience = number
        self.dataset = dataset
        self.task_labels = [dataset.label]
        self.classes_in_this_experience = sorted(set(dataset.y.tolist()))


class OnlineCLExperience(Experience):
    pass


def tensors_benchmark(
    train_tensors: Sequence[tuple[Tensor, Tensor]],
    test_tensors: Sequence[tuple[Tensor, Tensor]],
    task_labels: Sequence[int],
) -> SimpleNamespace:
    def stream(tensors: Sequence[tuple[Tensor, Tensor]]) -> list[Experience]:
        pairs = zip(tensors, task_labels, strict=True)
        return [Experience(i, TaskDataset(*pair, label)) for i, (pair, label) in enumerate(pairs)]

    return SimpleNamespace(train_stream=stream(train_tensors), test_stream=stream(test_tensors))


def split_online_stream(
    stream: Iterable[Experience], experience_size: int
) -> list[OnlineCLExperience]:
    parts = []
    for one in stream:
        data = one.dataset
        for x, y in zip(data.x.split(experience_size), data.y.split(experience_size), strict=True):
            parts.append(OnlineCLExperience(len(parts), TaskDataset(x, y, data.label)))
    return parts


# --- models ---------------------------------------------------------------------------------------


class DynamicModule(nn.Module):
    def adaptation(self, experience: Experience) -> None:
        pass


class MultiTaskModule(DynamicModule):
    def __init__(self) -> None:
        super().__init__()
        self.max_class_label = 0

    def adaptation(self, experience: Experience) -> None:
        most = max(experience.classes_in_this_experience) + 1
        self.max_class_label = max(self.max_class_label, most)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        out = torch.zeros(len(x), self.max_class_label)
        for label in task_labels.unique():
            rows = task_labels == label
            of_task = self.forward_single_task(x[rows], int(label))
            out[rows, : of_task.shape[1]] = of_task
        return out


class IncrementalClassifier(DynamicModule):
    def __init__(self, in_features: int, initial_out_features: int = 2) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_features, initial_out_features)

    @torch.no_grad()
    def adaptation(self, experience: Experience) -> None:
        old = self.classifier
        classes = max(old.out_features, max(experience.classes_in_this_experience) + 1)
        if classes == old.out_features:
            return
        self.classifier = nn.Linear(old.in_features, classes)
        self.classifier.weight[: old.out_features] = old.weight
        self.classifier.bias[: old.out_features] = old.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


class MultiHeadClassifier(MultiTaskModule):
    def __init__(self, in_features: int, initial_out_features: int = 2) -> None:
        super().__init__()
        self.shape = (in_features, initial_out_features)
        self.max_class_label = initial_out_features
        self.classifiers = nn.ModuleDict({"0": nn.Linear(*self.shape)})

    def adaptation(self, experience: Experience) -> None:
        super().adaptation(experience)
        for label in map(str, experience.task_labels):
            if label not in self.classifiers:
                self.classifiers[label] = nn.Linear(*self.shape)

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        return self.classifiers[str(task_label)](x)


def is_multi_task_module(model: nn.Module) -> bool:
    return isinstance(model, MultiTaskModule)


# --- the strategy ---------------------------------------------------------------------------------


def update_optimizer(
    optimizer: torch.optim.Optimizer,
    new: dict[str, nn.Parameter],
    old: dict[str, nn.Parameter] | None,
    reset_state: bool,
) -> dict[str, nn.Parameter]:
    """Add new parameters to the first group, put others in place of those that were exchanged."""
    places = {
        id(param): (group["params"], place)
        for group in optimizer.param_groups
        for place, param in enumerate(group["params"])
    }
    for name, param in new.items():
        before = (old or {}).get(name, param)
        if id(before) not in places:
            optimizer.param_groups[0]["params"].append(param)
            optimizer.state[param] = {}
        elif before is not param:
            params, place = places[id(before)]
            params[place] = param
            if before in optimizer.state:
                optimizer.state.pop(before)
                optimizer.state[param] = {}
    if reset_state:
        optimizer.state = defaultdict(dict)
    return new


class Naive:
    """A strategy that trains on one experience after another."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int = 1,
        plugins: Sequence[SupervisedPlugin] = (),
        evaluator: object = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._criterion = criterion or nn.CrossEntropyLoss()
        self.train_mb_size, self.train_epochs, self.eval_mb_size = (
            train_mb_size, train_epochs, eval_mb_size,
        )  # fmt: skip
        self.plugins = list(plugins)
        self.device = torch.device("cpu")
        self.clock = SimpleNamespace(train_exp_counter=0)
        self.experience: Experience | None = None
        self.optimized_param_id: dict[str, nn.Parameter] | None = None

    def _trigger(self, event: str, **kwargs: Any) -> None:
        for plugin in self.plugins:
            getattr(plugin, event)(self, **kwargs)

    def _adapt(self) -> None:
        for module in [*self.model.modules()]:
            if isinstance(module, DynamicModule):
                module.adaptation(self.experience)

    def _make_optimizer(self, reset_optimizer_state: bool, **kwargs: Any) -> None:
        self.optimized_param_id = update_optimizer(
            self.optimizer,
            dict(self.model.named_parameters()),
            self.optimized_param_id,
            reset_optimizer_state,
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.model(x, labels) if is_multi_task_module(self.model) else self.model(x)

    def train(self, experiences: Any, **kwargs: Any) -> None:
        self.model.train()
        self._trigger("before_training", **kwargs)
        for self.experience in experiences if isinstance(experiences, list) else [experiences]:
            if self.optimized_param_id is None:
                self._make_optimizer(True)
            self._adapt()
            self._make_optimizer(**{"reset_optimizer_state": False, **kwargs})
            self._trigger("before_training_exp", **kwargs)
            for _ in range(self.train_epochs):
                self._epoch()
            self._trigger("after_training_exp", **kwargs)
            self.clock.train_exp_counter += 1
        self._trigger("after_training", **kwargs)
        self.experience = None

    def _epoch(self) -> None:
        for x, y, labels in DataLoader(self.experience.dataset, self.train_mb_size, shuffle=True):
            self._trigger("before_training_iteration")
            self.optimizer.zero_grad()
            self._criterion(self.forward(x, labels), y).backward()
            self._trigger("after_backward")
            self.optimizer.step()

    @torch.no_grad()
    def eval(self, experiences: Any) -> None:
        before = self.experience
        self.model.eval()
        self._trigger("before_eval")
        for self.experience in experiences if isinstance(experiences, list) else [experiences]:
            self._adapt()
            for x, _, labels in DataLoader(self.experience.dataset, self.eval_mb_size):
                self.forward(x, labels)
        self._trigger("after_eval")
        self.experience = before
        self.model.train()


_MODULES = {
    "avalanche": (),
    "avalanche.core": (SupervisedPlugin,),
    "avalanche.benchmarks": (OnlineCLExperience, split_online_stream, tensors_benchmark),
    "avalanche.models": (IncrementalClassifier, MultiHeadClassifier, MultiTaskModule),
    "avalanche.models.utils": (is_multi_task_module,),
    "avalanche.training": (),
    "avalanche.training.supervised": (Naive,),
}


def install() -> None:
    """Let ``import avalanche`` find this."""
    for name, members in _MODULES.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
