"""Is a forgetting budget kept, untuned? ``python -m bench.retention budget``.

Five pairs of an old and a new task, each with several budgets: the guard steers λ while the new
task is learned, and interpolation settles the rest; beside it interpolation alone, after AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

from bench.retention import tables
from bench.retention.text import runs as text
from bench.retention.text.corpora import Corpus, english, python_code
from bench.retention.text.model import ByteTransformer, Sizes, bits_per_byte, loss
from bench.retention.training import rate_factor, take_step
from cl_optim import EWCAdamW, estimate_fisher
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import in_percent, number_table
from cl_optim.demo.scenarios import Scenario, Split, Task, digits, generator, permuted, split
from cl_optim.demo.train import Network, network
from cl_optim.retention import Evaluation, RetentionGuard
from cl_optim.retention.guard.evaluation import Role

BUDGETS = (0.02, 0.05, 0.10)
STRENGTH = 0.1  # the one to begin with; nothing is chosen
CHECKS = 20  # in a run
_HIDDEN, _RATE, _BATCH, _EPOCHS = 300, 3.2e-3, 32, 5


@dataclass(frozen=True)
class Pair:
    """A model that knows an old task, and a new one to be learned.

    Attributes:
        model: Makes it, as it is before.
        fisher: What protects the old task, by parameter name.
        losses: Yields the functions of a model that are minimised, step by step.
        steps: How many.
        rate: The learning rate.
        validation: Evaluations that a guard may see.
        test: The same of what it never sees.
    """

    model: Callable[[], nn.Module]
    fisher: Any
    losses: Callable[[], Iterator[Callable[[nn.Module], Tensor]]]
    steps: int
    rate: float
    validation: tuple[Evaluation, ...]
    test: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Run:
    """What one budget did.

    Attributes:
        pair: Key of `PAIRS`.
        seed: Of everything.
        budget: The part of the old task that may be lost; None: plain AdamW, no guard.
        protected: EWCAdamW, whose λ the guard steers; else AdamW, and interpolation is all.
        lost: What is lost of the old task by the guard's evaluation.
        lost_on_test: By one that it never sees.
        lost_before: At the end of training, before interpolation.
        gain: The new task's loss, or accuracy, at the end.
        alpha: How far from the old weights.
    """

    pair: str
    seed: int
    budget: float | None
    protected: bool
    lost: float
    lost_on_test: float
    lost_before: float
    gain: float
    alpha: float

    @property
    def used(self) -> float:
        """Return the part of the budget that is used."""
        assert self.budget is not None
        return self.lost / self.budget


def _permuted(seed: int) -> Pair:
    return _of_digits(permuted(digits(), 2, seed), seed)


def _split(seed: int) -> Pair:
    return _of_digits(split(digits(), 2, seed), seed)


def _inverted(seed: int) -> Pair:
    task = digits()

    def invert(part: Split) -> Split:
        return Split(1.0 - part.x, part.y)

    inverted = Task(invert(task.train), invert(task.validation), invert(task.test))
    return _of_digits(Scenario((task, inverted), task.train.x.shape[1], 10), seed)


def _python(seed: int, sizes: Sizes | None = None) -> Pair:
    return _of_texts(english(), python_code(), seed, sizes or Sizes())


def _english(seed: int, sizes: Sizes | None = None) -> Pair:
    return _of_texts(python_code(), english(), seed, sizes or Sizes())


PAIRS: dict[str, Callable[[int], Pair]] = {
    "digits, then permuted ones": _permuted,
    "five digits, then five others": _split,
    "digits, then inverted ones": _inverted,
    "English, then Python": _python,
    "Python, then English": _english,
}


def _of_digits(scenario: Scenario, seed: int) -> Pair:
    learned = network(scenario, _HIDDEN, seed)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=_RATE)
    for value in _digit_losses(scenario, 0, seed):
        take_step(optimizer, value(learned))
    learned.task = 0
    old = scenario.tasks[0].train
    fisher = estimate_fisher(learned, [old], labels="exact", max_samples=None, progress=False)
    weights = learned.state_dict()

    def model() -> nn.Module:
        made = network(scenario, _HIDDEN, seed)
        made.load_state_dict(weights)
        return made

    def evaluations(which: str) -> tuple[Evaluation, ...]:
        roles: tuple[Role, ...] = ("old", "new")
        return tuple(
            Evaluation(role, _accuracy(getattr(scenario.tasks[number], which), number), role)
            for number, role in enumerate(roles)
        )

    steps = _EPOCHS * -(-len(scenario.tasks[1].train.x) // _BATCH)
    return Pair(
        model, fisher, lambda: _digit_losses(scenario, 1, seed), steps, _RATE,
        evaluations("validation"), evaluations("test"),
    )  # fmt: skip


def _digit_losses(
    scenario: Scenario, number: int, seed: int
) -> Iterator[Callable[[nn.Module], Tensor]]:
    x, y = scenario.tasks[number].train
    draw = generator(seed, f"order of task {number}")
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(x), generator=draw), _BATCH):
            yield partial(_digits_loss, Split(x[rows], y[rows]), number)


def _digits_loss(batch: Split, number: int, model: nn.Module) -> Tensor:
    assert isinstance(model, Network)
    model.task = number
    return F.cross_entropy(model(batch.x), batch.y)


def _accuracy(part: Split, number: int) -> Callable[[nn.Module], float]:
    def measure(model: nn.Module) -> float:
        assert isinstance(model, Network)
        model.task = number
        with torch.no_grad():
            return float((model(part.x).argmax(1) == part.y).float().mean())

    return measure


def _of_texts(old: Corpus, new: Corpus, seed: int, sizes: Sizes) -> Pair:
    learned = text.learn_old(old, new, sizes, seed)

    def model() -> nn.Module:
        made = ByteTransformer(sizes)
        made.load_state_dict(learned.weights)
        return made

    def losses() -> Iterator[Callable[[nn.Module], Tensor]]:
        draw = generator(seed, "new windows")
        for _ in range(sizes.new_steps):
            windows = new.windows(sizes.batch, sizes.context + 1, draw)
            yield partial(_bytes_loss, windows)

    def evaluations(part: int) -> tuple[Evaluation, ...]:
        roles: tuple[tuple[Corpus, Role], ...] = ((old, "old"), (new, "new"))
        return tuple(_bits(corpus, role, part, sizes) for corpus, role in roles)

    return Pair(
        model, learned.importance["diagonal"], losses, sizes.new_steps, text.NEW_LR,
        evaluations(0), evaluations(1),
    )  # fmt: skip


def _bytes_loss(windows: Tensor, model: nn.Module) -> Tensor:
    return loss(model, windows)


def _bits(corpus: Corpus, role: Role, part: int, sizes: Sizes) -> Evaluation:
    """Measure on every other held-out window, so that there are two disjoint parts."""
    windows = corpus.held_out_windows(2 * sizes.held_out, sizes.context + 1)[part::2]
    return Evaluation(
        role, lambda model: bits_per_byte(model, windows), role, higher_is_better=False
    )


def unguarded(name: str, pair: Pair, seed: int) -> Run:
    """Learn the new task with plain AdamW, the learning rate decaying likewise."""
    model = pair.model()
    before = [one.measure(model) for one in (pair.validation[0], pair.test[0])]
    _learn(pair, model, torch.optim.AdamW(model.parameters(), lr=pair.rate))
    lost, on_test = (
        one.relative_loss(one.measure(model), value)
        for one, value in zip((pair.validation[0], pair.test[0]), before, strict=True)
    )
    return Run(name, seed, None, False, lost, on_test, lost, pair.test[1].measure(model), 1.0)


def guarded(name: str, pair: Pair, seed: int, budget: float, *, protected: bool = True) -> Run:
    """Learn the new task within a budget."""
    model = pair.model()
    optimizer: torch.optim.Optimizer
    if protected:
        optimizer = EWCAdamW(
            model.named_parameters(), lr=pair.rate, penalty="proximal", strength=STRENGTH
        )
        optimizer.consolidate(pair.fisher)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=pair.rate)
    every = max(1, pair.steps // CHECKS)
    guard = RetentionGuard(model, optimizer, pair.validation, budget=budget, every=every)
    on_test = pair.test[0].measure(model)
    guard.start()
    _learn(pair, model, optimizer, guard)
    lost_before = pair.validation[0].relative_loss(
        pair.validation[0].measure(model), guard.baselines["old"]
    )
    curve = guard.finish()
    assert curve is not None
    (lost,) = (one.loss for one in guard.history[-1].measured if one.evaluation.role == "old")
    unseen = pair.test[0].relative_loss(pair.test[0].measure(model), on_test)
    return Run(
        name, seed, budget, protected, lost, unseen, lost_before,
        pair.test[1].measure(model), curve.alpha,
    )  # fmt: skip


def _learn(
    pair: Pair, model: nn.Module, optimizer: torch.optim.Optimizer,
    guard: RetentionGuard | None = None,
) -> None:  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(pair.steps))
    for value in pair.losses():
        take_step(optimizer, value(model))
        schedule.step()
        if guard is not None and guard.step():
            break


def measure(seeds: int, on_run: Callable[[], object] = lambda: None) -> list[Run]:
    """Run each pair with each seed: unguarded, and with each budget.

    Args:
        seeds: How many, from 0.
        on_run: Called after each run.
    """
    found = []
    for name, make in PAIRS.items():
        for seed in range(seeds):
            pair = make(seed)
            found.append(unguarded(name, pair, seed))
            on_run()
            for budget in BUDGETS:
                for protected in (True, False):
                    found.append(guarded(name, pair, seed, budget, protected=protected))
                    on_run()
    return found


def sentences(runs: Sequence[Run]) -> list[str]:
    """Say how often budgets were kept and used."""
    free = {(run.pair, run.seed): run.lost for run in runs if run.budget is None}
    said = []
    for protected, how in ((True, "λ and interpolation"), (False, "interpolation alone")):
        kept = [run for run in runs if run.budget is not None and run.protected == protected]
        inside = sum(run.used <= 1.0 for run in kept)
        asked = [run for run in kept if free[run.pair, run.seed] >= 0.5 * (run.budget or 0.0)]
        half = sum(run.used >= 0.5 for run in asked)
        back = [run for run in kept if run.alpha < 1.0]
        worse = sum(run.lost > run.lost_before for run in back)
        said.append(
            f"By {how}: within the budget at the end {inside} of {len(kept)} runs; at least half "
            f"of it used in {half} of the {len(asked)} in which AdamW loses so much; {len(back)} "
            f"went back towards the old weights, {worse} of them to weights that lose more."
        )
    return said


def render(runs: Sequence[Run], table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return a table, a row for each pair and budget, and the sentences."""
    seeds = 1 + max(run.seed for run in runs)
    table = number_table(
        table_box, "Old task, then new one", "budget", "lost, %", "of the budget, %",
        "lost on unseen data, %", "before α, %", "α", "the new task", "AdamW, α alone",
    )  # fmt: skip
    for name in dict.fromkeys(run.pair for run in runs):
        for budget in (None, *BUDGETS):
            of_budget = [run for run in runs if run.pair == name and run.budget == budget]
            row = [run for run in of_budget if run.protected == (budget is not None)]
            alone = [run for run in of_budget if not run.protected]
            table.add_row(
                name if budget is None else "",
                "none: AdamW" if budget is None else f"{budget:.0%}",
                _percent([run.lost for run in row]),
                "–" if budget is None else _percent([run.used for run in row], 0),
                _percent([run.lost_on_test for run in row]),
                _percent([run.lost_before for run in row]),
                f"{Interval.of([run.alpha for run in row]).mean:.2f}",
                f"{Interval.of([run.gain for run in row]).mean:.3f}",
                "" if budget is None else f"{Interval.of([run.gain for run in alone]).mean:.3f}",
            )
    setting = (
        f"EWCAdamW, proximal, diagonal, strength {STRENGTH:g}, with RetentionGuard(budget=…) and "
        f"{CHECKS} checks a run; nothing is chosen. Mean ± half of the 95 % interval over seeds 0 "
        f"to {seeds - 1}. Lost: the part of the old task's accuracy, or more of its bits per byte; "
        "before α: at the end of training, before interpolation; the new task: accuracy (more is "
        "better) or bits per byte (fewer are) on unseen data; the last column: the same within the "
        "same budget without λ, AdamW and the way back. The learning rate decays to 0 over the "
        "last four fifths."
    )
    said = [part for one in sentences(runs) for part in (Text(), Text(one))]
    return Group(Text(setting), Text(), table, *said)


def write(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write ``budget.json`` and ``budget.md`` into an existing directory."""
    record = {"runs": [asdict(run) for run in runs]}
    return tables.write(directory, "budget", record, render(runs, box.MARKDOWN))


def _percent(values: Sequence[float], digits: int = 1) -> str:
    interval = Interval.of(values)
    if digits:
        return in_percent(interval)
    return f"{100 * interval.mean:.0f}"
