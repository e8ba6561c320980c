"""What the demo prints and writes: tables, sentences, JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cl_optim.demo import metrics
from cl_optim.demo.experiments import ADAMW, ADAMW_SLOW, Experiment
from cl_optim.demo.machine import machine, sentence
from cl_optim.demo.methods import Method, Protected, Remembering
from cl_optim.demo.metrics import Interval, Matrix
from cl_optim.demo.train import Run
from cl_optim.ops import library

WIDTH = 160  # where the output is no terminal

_METRICS: tuple[tuple[str, Callable[[Matrix], float]], ...] = (
    ("ACC", metrics.acc),
    ("BWT", metrics.bwt),
    ("Forgetting", metrics.forgetting),
    ("Learning\nacc.", metrics.learning_accuracy),
)
_DEFINITIONS = (
    "ACC: mean accuracy over all tasks at the end; BWT: final minus just-learned accuracy (both "
    "Lopez-Paz & Ranzato 2017, eq. 2–3, BWT averaged over the T−1 earlier tasks); forgetting: best "
    "earlier minus final accuracy (Chaudhry et al. 2018); learning accuracy: on each task right "
    "after learning it. Joint training sees all tasks at once: the ceiling. Every lr and λ is the "
    "best for validation ACC among those that learn (learning accuracy at most {:.0f} points below "
    "AdamW's best)."
)
_GEM = (
    " GEM keeps {} samples of each task and computes their gradients anew in each "
    "step, in every 10th, or once, when the task ends; A-GEM has one row, their mean."
)
_CONFLICTS = (
    "Conflicts: the share of steps whose gradient, before its projection, had a negative product "
    "with a memory row (GEM.conflicts()): with any of them, and with each task's, over the tasks "
    "learned after it. Rows that were stored once are as old as their task."
)
_SLOW = " The small lr is the best for AdamW without that condition."


@dataclass(frozen=True)
class Results:
    """All runs of a demo.

    Attributes:
        experiment: What was run, with its length as it was.
        runs: In any order; every method has the same seeds.
    """

    experiment: Experiment
    runs: tuple[Run, ...]

    @property
    def methods(self) -> list[Method]:
        """Return them in the order of their first runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Return them in ascending order."""
        return sorted({run.seed for run in self.runs})

    def of(self, method: Method) -> list[Run]:
        """Return a method's runs, by seed."""
        return sorted((r for r in self.runs if r.method == method), key=lambda run: run.seed)

    def interval(self, method: Method, metric: Callable[[Matrix], float]) -> Interval:
        """Return a metric's mean over seeds."""
        return Interval.of([metric(run.matrix) for run in self.of(method)])

    def paired(
        self, method: Method, baseline: Method, metric: Callable[[Matrix], float]
    ) -> Interval:
        """Return the mean over seeds of the difference of two methods with the same seed."""
        pairs = zip(self.of(method), self.of(baseline), strict=True)
        return Interval.of([metric(a.matrix) - metric(b.matrix) for a, b in pairs])


def main_table(results: Results, table_box: box.Box) -> Table:
    """Return a row for each method: its settings, metrics and times."""
    names = [name for name, _ in _METRICS]
    table = number_table(
        table_box, "Method", "lr", "λ", *names, "Step,\nµs", "Optimizer,\nµs", "Task end,\nms"
    )
    for method in results.methods:
        runs = results.of(method)
        table.add_row(
            *settings_of(method),
            *(
                ""
                if method.joint and metric is not metrics.acc
                else in_percent(results.interval(method, metric), signed=metric is metrics.bwt)
                for _, metric in _METRICS
            ),
            with_interval(Interval.of([1e6 * run.step_seconds for run in runs]), ".0f"),
            with_interval(Interval.of([1e6 * run.optimizer_seconds for run in runs]), ".0f"),
            with_interval(Interval.of([1e3 * run.end_task_seconds for run in runs]), ".0f"),
        )
    return table


def render(
    results: Results,
    table_box: box.Box,
    main: Callable[[Results, box.Box], Table] = main_table,
    more: str = "",
) -> RenderableType:
    """Return the tables and sentences of a demo.

    Args:
        results: Of all its runs.
        table_box: How tables look; ``box.MARKDOWN`` for a file.
        main: Makes the table of all methods.
        more: Sentences that follow the definitions of what is in it.
    """
    config = results.experiment.config
    seeds = len(results.seeds)
    definitions = _DEFINITIONS.format(100 * results.experiment.learning_loss)
    if any(method.key == ADAMW_SLOW.key for method in results.methods):
        definitions += _SLOW
    samples = [m.samples for m in results.methods if isinstance(m, Remembering)]
    if samples:
        definitions += _GEM.format(max(samples))
    interval = " ± 95 % t-interval" if seeds > 1 else ""
    setting = (
        f"{results.experiment.name}: {config.tasks} tasks, {seeds} seed{'s' * (seeds > 1)}; MLP "
        f"with {config.hidden} hidden units, batches of {config.batch_size}, {config.epochs} epoch"
        f"{'s' * (config.epochs > 1)} per task. Accuracies in per cent: mean{interval}."
    )
    parts: list[RenderableType] = [setting, "", main(results, table_box), definitions + more, ""]
    parts += [_backend(results), ""]
    parts += [_paired_table(results, table_box), *_headlines(results)]
    if any(run.conflicts.size for run in results.runs):
        parts += ["", _conflicts_table(results, table_box), _CONFLICTS]
    parts += ["", sentence(machine())]
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _paired_table(results: Results, table_box: box.Box) -> Table:
    baselines = [m for m in results.methods if not (m.protects or m.joint)]
    compared = (("ACC", metrics.acc), ("learning acc.", metrics.learning_accuracy))
    headers = [f"{name} −\n{baseline.label}" for baseline in baselines for name, _ in compared]
    table = number_table(table_box, "Paired difference", *headers)
    for method in results.methods:
        if method.protects:
            differences = [
                results.paired(method, baseline, metric)
                for baseline in baselines
                for _, metric in compared
            ]
            table.add_row(method.label, *(in_percent(d, signed=True) for d in differences))
    return table


def _conflicts_table(results: Results, table_box: box.Box) -> Table:
    """Show how often a new task's gradient would have raised an old task's loss, and whose."""
    tasks = results.experiment.config.tasks
    headers = [f"with\ntask {number}" for number in range(1, tasks)]
    table = number_table(table_box, "Steps in conflict, %", "with\nany", *headers)
    for method in results.methods:
        conflicts = [run.conflicts for run in results.of(method)]
        if not conflicts[0].size:
            continue
        shares = [
            Interval.of([float(c[max(1, number) :, number].mean()) for c in conflicts])
            for number in range(tasks)
            if not math.isnan(conflicts[0][-1, number])
        ]
        table.add_row(method.label, *(in_percent(share) for share in shares))
    return table


def number_table(table_box: box.Box, first: str, *others: str) -> Table:
    """Begin a table of numbers after a column of words; in Markdown, headers have one line."""
    markdown = table_box is box.MARKDOWN
    table = Table(box=table_box, collapse_padding=not markdown, pad_edge=markdown)
    table.add_column(first, no_wrap=True)
    for header in others:
        name = header.replace("\n", " ") if markdown else header
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _headlines(results: Results) -> list[str]:
    adamw = next(method for method in results.methods if method.key == ADAMW.key)
    protected = [m for m in results.methods if m.key in results.experiment.headline]
    return [_headline(results, method, adamw) for method in protected]


def _headline(results: Results, method: Method, adamw: Method) -> str:
    acc = results.paired(method, adamw, metrics.acc)
    learning = results.paired(method, adamw, metrics.learning_accuracy)
    seeds = len(results.seeds)
    if seeds == 1:
        certainty = "one seed"
    else:
        low, high = 100 * (acc.mean - acc.half_width), 100 * (acc.mean + acc.half_width)
        certainty = f"95 % interval [{low:+.1f}, {high:+.1f}], paired over {seeds} seeds"
    return (
        f"ACC({method.label}) − ACC(AdamW) = {100 * acc.mean:+.1f} points ({certainty}), at "
        f"{100 * learning.mean:+.1f} points of learning accuracy."
    )


def _backend(results: Results) -> str:
    """Say which implementation took the steps of EWCAdamW."""
    backends = sorted({run.backend for run in results.runs if isinstance(run.method, Protected)})
    if backends == ["cpu"]:
        simd = library.backends()["cpu"].info["simd"]
        ours = f"the compiled extension cl_optim._C ({simd})"
    else:
        ours = f"{', '.join(backends)}: {library.explain('cpu')}"
    return (
        f"Steps of EWCAdamW (L2-SP, EWC) ran on {ours}; steps of AdamW on "
        "torch.optim.AdamW(fused=True), of SGD likewise. One thread. A step is forward, backward "
        "and optimizer, the median over tens of steps of their mean; the end of a task is the "
        "Fisher and consolidate(), or remember()."
    )


def in_percent(interval: Interval, *, signed: bool = False) -> str:
    """Return a fraction and its interval in per cent."""
    scaled = Interval(100 * interval.mean, 100 * interval.half_width)
    return with_interval(scaled, "+.1f" if signed else ".1f")


def with_interval(interval: Interval, form: str) -> str:
    """Return a mean and its interval, of which one seed has none."""
    mean = format(interval.mean, form)
    if math.isnan(interval.half_width):
        return mean
    return f"{mean} ± {format(interval.half_width, form.lstrip('+'))}"


def settings_of(method: Method) -> tuple[str, str, str]:
    """Return a method's label, learning rate and λ or strength, as a table has them."""
    return method.label, f"{method.lr:g}", setting_of(method).removeprefix("λ = ")


def setting_of(method: Method) -> str:
    """Return what a method has besides its learning rate: λ or a strength; or nothing."""
    strength = getattr(method, "strength", None)
    if strength is not None:
        return f"strength {strength:g}"
    return f"λ = {method.ewc_lambda:g}" if isinstance(method, Protected) else ""


def to_json(results: Results) -> dict[str, Any]:
    """Return every run, and the machine that it ran on, as JSON knows it."""
    return {
        "experiment": results.experiment.name,
        "config": asdict(results.experiment.config),
        "machine": machine(),
        "runs": [
            {
                **asdict(run),
                "metrics": {
                    metric.__name__: metric(run.matrix)
                    for _, metric in _METRICS
                    if metric is metrics.acc or not run.method.joint
                },
                "matrix": run.matrix.tolist(),
                "initial": run.initial.tolist(),
                "conflicts": [[finite(c) for c in task] for task in run.conflicts.tolist()],
                "curve_steps": run.curve_steps.tolist(),
                "curves": [[finite(a) for a in point] for point in run.curves.round(4).tolist()],
            }
            for run in results.runs
        ],
    }


def write_markdown(content: RenderableType, path: Path, width: int = 200) -> None:
    """Write rendered tables and sentences as text; tables as Markdown if they have its box."""
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(content)
    lines = [line.rstrip() for line in capture.get().splitlines()]  # rich pads them
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def finite(value: float) -> float | None:
    """Return None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value
