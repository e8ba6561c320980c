"""Tables of what each method keeps, and what they say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention import tables
from bench.retention.published import PUBLISHED
from bench.retention.van_de_ven.methods import JOINT, NONE, OURS, THEIRS, Method
from bench.retention.van_de_ven.runs import Results, Run
from bench.retention.van_de_ven.scenarios import Name, Setting, setting_of
from cl_optim.demo import metrics
from cl_optim.demo.experiments import ADAMW, EWC_GRADIENT
from cl_optim.demo.metrics import Interval
from cl_optim.demo.report import in_percent, number_table, with_interval

_FINDINGS = "Paired with fine-tuning"


def render(results: Results, table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return the tables of each scenario, with what they say."""
    seeds = len(next(iter(results.runs.values())))
    parts: list[RenderableType] = [
        Text(
            f"{results.data}, the protocol of van de Ven et al. 2022: an MLP with two hidden "
            "layers of ReLU, learned by Adam; one thread, denormal numbers as 0. Mean over seeds 0 "
            f"to {seeds - 1} on the test split, ± half of the 95 % t-interval; λ, strengths, rates "
            f"and parts by validation ACC with {results.sweep_seeds} other seed"
            f"{'s' * (results.sweep_seeds > 1)}, of as many candidates each. van de Ven's EWC: "
            "½ λ Σ F (θ − θ*)² of every context in the loss, F by its formula, one sample and one "
            "class at a time; cl_optim: EWCAdamW, F of the same samples, 128 at a time. "
            "Joint training: all contexts at once, in as many iterations. ACC: over all contexts "
            "at the end. Forgetting: best earlier minus final accuracy. Learning acc.: right after "
            "a context. Seconds: training with the ends of contexts, by the clock; s of CPU: of "
            "the process; s at ends: of these for the Fisher information. MB: what is kept beside "
            "weights and Adam's moments."
        )
    ]
    for name in results.names:
        setting = results.settings[name]
        parts += [
            Text(),
            Text(
                f"{_title(name)}: {setting.contexts} contexts, {setting.iterations} iterations "
                f"each{_shortened(name, setting)} of batches of {setting.batch}; hidden layers of "
                f"{setting.hidden}; learning rate {setting.lr:g}; F of at most "
                f"{setting.fisher_samples} samples of each context but the last (published: "
                f"{1000 if name == 'permuted' else 'all'})."
            ),
            Text(),
            _methods_table(results, name, table_box),
        ]
        if all((name, one.key) in results.runs for one in (NONE, THEIRS, JOINT)):
            parts += [_findings_table(results, name, table_box), Text(_finding(results, name))]
    parts += [Text(), Text(_published())]
    return Group(*parts)


def _title(name: Name) -> str:
    return "Permuted" if name == "permuted" else f"{name.capitalize()}-incremental"


def _shortened(name: Name, setting: Setting) -> str:
    whole = setting_of(name).iterations
    return "" if setting.iterations == whole else f" (published: {whole})"


def _methods_table(results: Results, name: Name, table_box: box.Box) -> Table:
    table = number_table(
        table_box, "Method", "chosen", "ACC", "Forgetting", "Learning\nacc.", "Seconds",
        "s of CPU", "s at\nends", "MB",
    )  # fmt: skip
    for method in results.methods(name):
        runs = results.runs[name, method.key]
        several = (metrics.forgetting, metrics.learning_accuracy)
        table.add_row(
            method.label,
            f"{method.chosen} {results.chosen[name, method.key]:g}" if method.chosen else "",
            in_percent(results.interval(name, method, metrics.acc)),
            *(
                "" if method.joint else in_percent(results.interval(name, method, metric))
                for metric in several
            ),
            with_interval(Interval.of([run.seconds for run in runs]), ".1f"),
            with_interval(Interval.of([run.cpu_seconds for run in runs]), ".1f"),
            f"{np.mean([run.end_cpu_seconds for run in runs]):.1f}",
            f"{runs[0].state_bytes / 1e6:.1f}",
        )  # fmt: skip
    return table


def _findings_table(results: Results, name: Name, table_box: box.Box) -> Table:
    """Return what each method gains on fine-tuning, and ours on van de Ven's."""
    table = number_table(
        table_box, _FINDINGS, "ACC", "of the way\nto joint, %", "ACC −\nvan de Ven's EWC",
        "Forgetting −\nvan de Ven's EWC", "s of CPU ÷\nvan de Ven's EWC",
    )  # fmt: skip
    theirs = results.runs[name, THEIRS.key]
    for method in results.methods(name):
        if method in (NONE, JOINT):
            continue
        beside = ["", "", ""]
        if method != THEIRS:
            runs = results.runs[name, method.key]
            ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(runs, theirs, strict=True)]
            beside = [
                in_percent(results.paired(name, method, THEIRS, metrics.acc), signed=True),
                in_percent(results.paired(name, method, THEIRS, metrics.forgetting), signed=True),
                with_interval(Interval.of(ratios), ".2f"),
            ]
        gain = results.paired(name, method, NONE, metrics.acc)
        part = round(100 * part_of_gap(results, name, method))
        table.add_row(method.label, in_percent(gain, signed=True), f"{part}", *beside)
    return table


def part_of_gap(results: Results, name: Name, method: Method) -> float:
    """Return how much of the way from fine-tuning's ACC to joint training's a method goes."""
    gain = results.paired(name, method, NONE, metrics.acc).mean
    return gain / results.paired(name, JOINT, NONE, metrics.acc).mean


def verdict(results: Results, name: Name, method: Method) -> str:
    """Say in a word whether a method helps, and how much of the way to joint training."""
    gain = results.paired(name, method, NONE, metrics.acc)
    if not gain.mean - gain.half_width > 0:
        return "shows no certain gain"
    part = part_of_gap(results, name, method)
    return "helps" if part >= 0.5 else "helps in part" if part >= 0.1 else "hardly helps"


def _finding(results: Results, name: Name) -> str:
    told = [
        f"{method.label} {verdict(results, name, method)} "
        f"({round(100 * part_of_gap(results, name, method))} %)"
        for method in (THEIRS, *OURS)
        if (name, method.key) in results.runs
    ]
    return (
        f"{_title(name)}, of the way from fine-tuning to joint training: {'; '.join(told)}. "
        "It helps: from half of it on; in part: from a tenth on; no certain gain: zero is in the "
        "interval."
    )


def _published() -> str:
    """Return published figures of this protocol with another data set."""
    labels = {ADAMW.key: "fine-tuning", EWC_GRADIENT.key: "online EWC"}
    figures = [one for one in PUBLISHED if one.scenario == "split"]
    told = ", ".join(f"{labels[one.method]} {one.acc}" for one in figures)
    return f"Published for MNIST ({figures[0].source}; {figures[0].setting}): ACC of {told}."


def write(results: Results, directory: Path) -> list[Path]:
    """Write ``van-de-ven.json`` and ``van-de-ven.md`` into an existing directory."""
    record = {
        "data": results.data,
        "sweep_seeds": results.sweep_seeds,
        "settings": {name: asdict(setting) for name, setting in results.settings.items()},
        "rows": [
            {
                "scenario": name, "method": method.key,
                "chosen": results.chosen[name, method.key],
                "validation_acc": {
                    f"{value:g}": acc for value, acc in results.scores[name, method.key].items()
                },
                "runs": [
                    {**asdict(run), **_metrics(run)} for run in results.runs[name, method.key]
                ],
            }
            for name in results.names
            for method in results.methods(name)
        ],
    }  # fmt: skip
    return tables.write(directory, "van-de-ven", record, render(results, box.MARKDOWN))


def _metrics(run: Run) -> dict[str, float]:
    of_contexts = (metrics.acc, metrics.forgetting, metrics.learning_accuracy)
    shown = of_contexts if len(run.matrix) > 1 else of_contexts[:1]
    return {metric.__name__: metric(run.r) for metric in shown}
