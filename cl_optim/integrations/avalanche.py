"""EWC and GEM by the optimizers of this package, as plugins of Avalanche's strategies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from cl_optim.fisher import estimate_fisher
from cl_optim.ops.checks import check_fraction, check_whole, listed, require
from cl_optim.optim.ewc import EWC
from cl_optim.optim.ewc_adamw import EWCAdamW
from cl_optim.optim.gem import GEM
from cl_optim.optim.protecting import ANCHORS
from cl_optim.optim.wrapper import layers

require("avalanche", "avalanche", "cl_optim.integrations.avalanche")

from avalanche.benchmarks import OnlineCLExperience  # noqa: E402
from avalanche.core import SupervisedPlugin  # noqa: E402
from avalanche.models.utils import is_multi_task_module  # noqa: E402

Batch = tuple[Any, Tensor]


class EWCPlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is not there for mypy
    """Protects what each training experience taught, by the strategy's own optimizer.

    That is a :class:`cl_optim.EWCAdamW`, or an optimizer with a :class:`cl_optim.EWC` around it,
    with a ``strength`` (or ``ewc_lambda``) of its own; the penalty is in its step, and the loss
    stays as it is. At the end of each experience the plugin estimates the importance of all
    parameters, by :func:`cl_optim.estimate_fisher` on the data of the experience alone, and calls
    the optimizer's ``consolidate``. A model with heads by task label (``MultiTaskModule``) is given
    the labels, one task at a time; heads that later experiences bring are protected from their own
    experience on. An experience that is trained again counts as one more.

    It differs from ``avalanche.training.plugins.EWCPlugin`` in that gradients are squared sample by
    sample, over labels drawn or expected from the model, on ``max_samples`` samples that are drawn
    at random; and in that all experiences share one quadratic, so that memory and time do not grow
    with their number. λ is not the same number. BatchNorm's statistics are not changed.

    Avalanche resets an optimizer's state when a strategy first trains, and with it what was
    protected or loaded before: with this plugin it does not. The pull of Kronecker importance that
    is due is taken before each evaluation.

    Args:
        structure: Of the importance: ``"diagonal"``, or ``"kronecker"``, which keeps more and needs
            ``penalty="proximal"``.
        max_samples: How many samples of an experience it is estimated on; None: all.
        decay: What remains of earlier experiences' importance, in [0, 1]; 1 is a sum.
        anchors: ``"latest"`` or ``"exact"``, as for ``consolidate``. ``"exact"`` is the sum of a
            penalty for each experience, Avalanche's ``mode="separate"``.
        reset_state: Start the moments of an EWCAdamW anew after each experience.
        batch_size: Of the estimate, which does not depend on it; None: the strategy's in training.
        **options: Others of :func:`cl_optim.estimate_fisher`: ``labels``, ``scale``, ``energy``,
            ``per_sample_loss``, which gets the model and a batch of inputs and targets.

    Raises:
        ValueError: An argument is out of range. While a strategy trains: its optimizer has no EWC,
            its loss is no cross entropy, an experience is a part of an online stream, or
            protected parameters have lost their protection since. Nothing has been trained or
            consolidated by that experience then.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796 (EWC); Schwarz et al. 2018, arXiv:1805.06370
        (online EWC); Lomonaco et al. 2021, arXiv:2104.00405 (Avalanche).

    Example:
        .. code-block:: python

            optimizer = cl_optim.EWCAdamW(
                model.named_parameters(), lr=1e-3, penalty="proximal", strength=0.1
            )
            plugin = EWCPlugin(structure="kronecker")
            strategy = Naive(
                model=model, optimizer=optimizer, train_mb_size=4, plugins=[plugin], evaluator=None
            )
            for experience in benchmark.train_stream:
                strategy.train(experience)
    """

    def __init__(
        self,
        structure: Literal["diagonal", "kronecker"] = "diagonal",
        max_samples: int | None = 500,
        decay: float = 1.0,
        anchors: Literal["latest", "exact"] = "latest",
        *,
        reset_state: bool = False,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if structure not in ("diagonal", "kronecker"):
            raise ValueError(f"structure must be 'diagonal' or 'kronecker', not {structure!r}.")
        if max_samples is not None:
            check_whole("max_samples", max_samples, note=", or None")
        if batch_size is not None:
            check_whole("batch_size", batch_size, note=", or None")
        check_fraction("decay", decay)
        if anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {ANCHORS}, not {anchors!r}.")
        self.structure: Literal["diagonal", "kronecker"] = structure
        self.max_samples = max_samples
        self.decay = decay
        self.anchors: Literal["latest", "exact"] = anchors
        self.reset_state = reset_state
        self.batch_size = batch_size
        self.options = options
        # What is protected, by name, with the shape that it had: no parameter, so that it is seen
        # when one is another one.
        self._protected: dict[str, tuple[int, ...]] = {}

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keep Avalanche from resetting what the optimizer knows already."""
        self._check(strategy)
        self._protected.update(_protected(strategy))
        _keep_state(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what would leave earlier experiences unprotected, before anything is trained."""
        _name_parameters(strategy)
        self._check(strategy)
        self._refuse_lost(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Estimate the importance on the experience's data, and consolidate."""
        self._check(strategy)
        self._refuse_lost(strategy)
        importance = estimate_fisher(
            strategy.model,
            _Batches(
                strategy,
                self.batch_size or strategy.train_mb_size,
                self.max_samples,
                kwargs.get("num_workers", 0),
            ),
            max_samples=None,  # the batches have no more
            structure=self.structure,
            progress=self.options.get("progress", False),
            **{key: value for key, value in self.options.items() if key != "progress"},
        )
        strategy.optimizer.consolidate(
            importance,
            decay=self.decay,
            anchors=self.anchors,
            model=strategy.model,
            reset_state=self.reset_state,
        )
        self._protected = _protected(strategy)

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take the pull that is due, so that what is evaluated are the weights as they are."""
        settle = getattr(strategy.optimizer, "settle", None)
        if settle is not None:
            settle()

    def _check(self, strategy: Any) -> None:
        if not any(isinstance(one, (EWCAdamW, EWC)) for one in layers(strategy.optimizer)):
            raise ValueError(
                "EWCPlugin needs a strategy whose optimizer has the penalty in its step, not "
                f"{type(strategy.optimizer).__name__}: give it cl_optim.EWCAdamW("
                "model.named_parameters(), …, strength=0.1), or cl_optim.EWC(optimizer, …) around "
                "the one that it has."
            )
        if isinstance(strategy.experience, OnlineCLExperience):
            raise ValueError(
                "an experience of an online stream is a part of a task, and EWCPlugin would "
                "consolidate after each: train on the stream that it was split from, or call "
                "optimizer.consolidate() yourself where a task ends."
            )
        is_cross_entropy = strategy._criterion is nn.functional.cross_entropy or isinstance(
            strategy._criterion, nn.CrossEntropyLoss
        )
        if not is_cross_entropy and "per_sample_loss" not in self.options:
            raise ValueError(
                f"EWCPlugin takes the Fisher information of a softmax, and the strategy's loss is "
                f"{_name(strategy._criterion)}: use nn.CrossEntropyLoss, or give "
                "EWCPlugin(labels='empirical', per_sample_loss=…)."
            )

    def _refuse_lost(self, strategy: Any) -> None:
        """Raise ValueError where what was protected is not."""
        here = _protected(strategy)
        named = dict(strategy.model.named_parameters())
        lost = [name for name in self._protected if name not in here]
        if not lost:
            return
        grown = [
            name for name in lost if name in named and named[name].shape != self._protected[name]
        ]
        if grown:
            name, new = grown[0], tuple(named[grown[0]].shape)
            raise ValueError(
                f"parameter {name!r} was protected with the shape {self._protected[name]} and has "
                f"been exchanged for one of the shape {new}, as IncrementalClassifier does for new "
                "classes, and its importance is lost: give the head all its outputs from the start "
                "(IncrementalClassifier(initial_out_features=…)), or each task one of its own "
                "(MultiHeadClassifier)."
            )
        if not here:
            raise ValueError(
                f"the strategy's optimizer protects nothing any more, and {len(lost)} parameters "
                "were protected: it is another optimizer, or reset_optimizer_state=True has reset "
                "it. Load the old one's state_dict() into it, leave reset_optimizer_state out (to "
                "reset moments alone there is EWCPlugin(reset_state=True)), or begin anew with a "
                "new EWCPlugin."
            )
        raise ValueError(
            f"parameter {listed(lost)} was protected and has been exchanged for another one, or "
            "left the model, and its importance is lost: let the model keep its modules, write "
            "into its parameters in place (load_state_dict()), or begin anew with a new EWCPlugin."
        )


class GEMPlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is not there for mypy
    """Keeps samples of each training experience, for the :class:`cl_optim.GEM` of the strategy.

    At the end of each experience it draws ``patterns_per_experience`` samples, as Avalanche's
    plugin does, and gives the optimizer a memory of them, ``"experience 0"`` and on; the loss on
    them is the strategy's, with task labels for a model that takes them. All else is the
    optimizer's: ``memory_strength``, ``average=True`` (A-GEM), conflicts. Rows follow a model that
    grows. An experience that is trained again has another memory.

    A checkpoint of Avalanche (``save_checkpoint``) holds samples and rows; of what was loaded by
    hand, or where the optimizer is a new one, the plugin gives it the memories that it has.

    Args:
        patterns_per_experience: How many samples are kept of each; all, where there are fewer.
        refresh_every: Steps after which a row is computed anew; 1 is Avalanche's GEM. 2 kept as
            much in 0.7 to 0.9 of the time of Avalanche's, 10, in 0.5 to 0.7, perhaps less.

    Attributes:
        memory_x: Inputs by number of the memory, [patterns, ...], where the data set had them.
        memory_y: Their targets, [patterns].
        memory_tid: Their task labels, [patterns]; absent where experiences have none.

    Raises:
        ValueError: An argument is no whole number of at least 1. While a strategy trains: its
            optimizer is no GEM.

    References:
        Lopez-Paz & Ranzato 2017, arXiv:1706.08840.

    Example:
        .. code-block:: python

            optimizer = cl_optim.GEM(torch.optim.SGD(model.parameters(), lr=0.1))
            strategy = Naive(
                model=model, optimizer=optimizer, train_mb_size=4,
                plugins=[GEMPlugin(patterns_per_experience=128, refresh_every=2)], evaluator=None
            )
            strategy.train(benchmark.train_stream)
    """

    def __init__(self, patterns_per_experience: int, refresh_every: int = 1) -> None:
        super().__init__()
        check_whole("patterns_per_experience", patterns_per_experience)
        check_whole("refresh_every", refresh_every)
        self.patterns_per_experience = patterns_per_experience
        self.refresh_every = refresh_every
        self.memory_x: dict[int, Tensor] = {}
        self.memory_y: dict[int, Tensor] = {}
        self.memory_tid: dict[int, Tensor] = {}

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Keep Avalanche from resetting what the optimizer knows already."""
        _gem(strategy)
        _keep_state(strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Give the optimizer the memories that it has no samples of."""
        _name_parameters(strategy)
        gem = _gem(strategy)
        for number in self.memory_x:
            if _memory(number) not in gem.closures:
                self._remember(strategy, number)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Draw samples of the experience, and remember it."""
        taken = _gem(strategy).memories
        number = next(
            number
            for number in count(strategy.clock.train_exp_counter)
            if number not in self.memory_x and _memory(number) not in taken
        )
        x, y, labels = _drawn(strategy, self.patterns_per_experience)
        self.memory_x[number], self.memory_y[number] = x, y
        if labels is not None:
            self.memory_tid[number] = labels
        self._remember(strategy, number)

    def _remember(self, strategy: Any, number: int) -> None:
        closure = _loss_of(
            strategy, self.memory_x[number], self.memory_y[number], self.memory_tid.get(number)
        )
        _gem(strategy).remember(_memory(number), closure, self.refresh_every)


# --- GEM ------------------------------------------------------------------------------------------


def _gem(strategy: Any) -> GEM:
    """Return the strategy's GEM.

    Raises:
        ValueError: It has none.
    """
    for one in layers(strategy.optimizer):
        if isinstance(one, GEM):
            return one
    raise ValueError(
        "GEMPlugin keeps samples for an optimizer that projects gradients, which "
        f"{type(strategy.optimizer).__name__} does not: give the strategy "
        "cl_optim.GEM(optimizer) around the one that it has."
    )


def _memory(number: int) -> str:
    return f"experience {number}"


def _drawn(strategy: Any, patterns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return samples of the experience, drawn as Avalanche's plugin draws them."""
    dataset = strategy.experience.dataset
    loader = DataLoader(
        dataset,
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
        shuffle=True,
    )
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    missing = patterns
    for batch in loader:
        parts.append((batch[0][:missing], batch[1][:missing], batch[-1][:missing]))
        missing -= len(batch[1])
        if missing <= 0:
            break
    x, y, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, y, labels if _has_task_labels(strategy) else None


def _loss_of(strategy: Any, x: Tensor, y: Tensor, labels: Tensor | None) -> Callable[[], None]:
    """Return what runs ``backward()`` on samples, on the model that the strategy has then."""

    def closure() -> None:
        inputs, device = x.to(strategy.device), strategy.device
        if labels is not None and is_multi_task_module(strategy.model):
            output = strategy.model(inputs, labels.to(device))
        else:
            output = strategy.model(inputs)
        strategy._criterion(output, y.to(device)).backward()

    return closure


# --- the data of an experience --------------------------------------------------------------------


class _Batches:
    """Batches of an experience, of samples drawn once: each iteration has the same ones.

    Data sets are often sorted by class, and the first samples would be of one class alone. Each
    batch is of one task: a model with heads would scatter others over several calls of them.
    """

    def __init__(
        self, strategy: Any, batch_size: int, max_samples: int | None, num_workers: int
    ) -> None:
        dataset = strategy.experience.dataset
        drawn = torch.randperm(len(dataset))[:max_samples].tolist()
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset, drawn),
            batch_size=batch_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            num_workers=num_workers,
        )
        self._names: list[str] = []
        if _has_task_labels(strategy) and is_multi_task_module(strategy.model):
            self._names = _argument_names(strategy.model)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            x, y, labels = batch[0], batch[1], batch[-1]
            if not self._names:
                yield x, y
                continue
            for label in labels.unique():
                rows = labels == label
                yield dict(zip(self._names, (x[rows], labels[rows]), strict=True)), y[rows]


def _argument_names(model: nn.Module) -> list[str]:
    """Return under which names a model takes inputs and task labels, which Avalanche gives first.

    Raises:
        ValueError: They have none.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())[:2]
    if len(parameters) < 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise ValueError(
            f"EWCPlugin gives {type(model).__name__} its inputs and task labels by their names, "
            "which its forward does not say: declare it as forward(self, x, task_labels)."
        )
    return [parameter.name for parameter in parameters]


def _has_task_labels(strategy: Any) -> bool:
    return hasattr(strategy.experience, "task_labels")


# --- the optimizer --------------------------------------------------------------------------------


def _keep_state(strategy: Any) -> None:
    """Say that the optimizer's parameters are known, where it has a state already.

    The first time that a strategy trains, Avalanche resets the optimizer to learn which parameters
    it has, and importance, anchors and moments would be gone.
    """
    if strategy.optimizer.state and getattr(strategy, "optimized_param_id", ...) is None:
        strategy.optimized_param_id = dict(strategy.model.named_parameters())


def _name_parameters(strategy: Any) -> None:
    """Let names follow parameters that Avalanche has added to groups, or exchanged in them."""
    names = {param: name for name, param in strategy.model.named_parameters()}
    for group in strategy.optimizer.param_groups:
        if "param_names" in group and all(param in names for param in group["params"]):
            group["param_names"] = [names[param] for param in group["params"]]


def _protected(strategy: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each protected parameter, by its name in the model."""
    protected = {one.param for one in _own(strategy).protected()}
    return {
        name: tuple(param.shape)
        for name, param in strategy.model.named_parameters()
        if param in protected
    }


def _own(strategy: Any) -> EWCAdamW | EWC:
    return next(one for one in layers(strategy.optimizer) if isinstance(one, (EWCAdamW, EWC)))


def _name(criterion: object) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)
