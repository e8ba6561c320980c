"""What the pretrained benchmark prints and writes: a table, sentences, JSON, pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.retention import drift, tables
from bench.retention.pretrained.methods import ADAMW, Method
from bench.retention.pretrained.probes import probes
from bench.retention.pretrained.results import COSTS, Results
from bench.retention.pretrained.runs import PROBES
from cl_optim.demo.metrics import Interval
from cl_optim.demo.picture import STYLE
from cl_optim.demo.report import with_interval


def render(results: Results, table_box: box.Box = box.SIMPLE_HEAD) -> RenderableType:
    """Return the table and sentences."""
    setting, seeds = results.setting, len(results.before)
    table = Table(box=table_box)
    table.add_column("Method")
    for name in (
        "rate", f"{results.new}: cost, %",
        *(f"{name}: lost" for name in results.known),
        "kept, %", *(f"α: kept at {cost:.0%}" for cost in COSTS),
        "probes, %", "s a step", "GiB",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for method in results.methods:
        table.add_row(method.label, *_row(results, method))
    before = "; ".join(
        f"{name} {_mean([one[name] for one in results.before.values()]):.3f}"
        for name in (results.new, *results.known)
    )
    ends = [run.end[results.new] for run in results.of(ADAMW)]
    answered = 100 * _mean([one[PROBES] for one in results.before.values()])
    known = (
        f"Before, nats per token: {before}; AdamW's end on {results.new}: {_mean(ends):.3f}. "
        f"Of {len(probes())} probes {answered:.0f} % were answered."
    )
    what = (
        f"{setting.base} learns {results.new} pages in {setting.steps} steps of {setting.batch} "
        f"windows of {setting.length} tokens, in bfloat16 autocast, on {results.device}; {seeds} "
        f"seed{'s' * (seeds > 1)}. The learning rate is the best of "
        f"{', '.join(f'{rate:g}' for rate in setting.rates)} (adapters: "
        f"{', '.join(f'{rate:g}' for rate in setting.lora_rates)}) on validation pages, and decays "
        f"linearly to 0 over the last four fifths. Before everything the model has learned "
        f"{' and '.join(results.old)} for {setting.healing} steps: 4-bit weights made for chat get "
        "better at any plain text at first."
    )
    definitions = (
        "Cost: nats on held-out pages, against AdamW's. Lost: nats per token more than before; "
        f"{results.unseen} is what neither replay nor Fisher information ever sees. Kept: the part "
        "of what AdamW loses that is not lost, of the sum over the three; α: the most on the way "
        "from the end back to the old weights, at no more than that cost. Replay draws on "
        f"{setting.kept} windows of {' and '.join(results.old)}; self-written and Fisher on "
        f"{setting.own} and {setting.fisher} windows that the model wrote itself. EWC's numbers "
        "are strengths, of the proximal form. A step's seconds and the most memory of a process "
        "are medians and maxima of a machine on which runs go side by side."
    )
    predicts = (
        f"What says how much is forgotten: measures of the ends of all {len(results.runs)} runs, "
        "against the nats per token lost."
    )
    lost = results.nats_lost
    parts: list[str | RenderableType] = [what, known, "", table, definitions, ""]
    parts += [*results.sentences, "", predicts, ""]
    parts.append(drift.table([run.drift for run in results.runs], lost, table_box))
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def write(results: Results, directory: Path) -> list[Path]:
    """Write JSON, Markdown and two PNGs into an existing directory."""
    table = render(results, box.MARKDOWN)
    paths = tables.write(directory, "pretrained", results.record(), table)
    paths += [directory / "pretrained.png", directory / "pretrained-drift.png"]
    draw(results, paths[2])
    colours = [colour(run.method) for run in results.runs]
    drifts = [run.drift for run in results.runs]
    drift.draw(drifts, results.nats_lost, colours, "nats per token", paths[3])
    return paths


def colour(method: Method) -> str:
    """Return a colour for each kind of protection."""
    if method.needs_old_data:
        return "#cc79a7" if method.own else "#777777"
    if method.own:
        return "#7570b3" if method.structure else "#000000"
    if method.lwf:
        return "#a6761d"
    if method.kind == "lora":
        return "#009e73"
    if method.strength is None:
        return "#d55e00"
    return {None: "#e69f00", "diagonal": "#56b4e9", "kronecker": "#0072b2"}[method.structure]


def draw(results: Results, path: Path) -> None:
    """Draw the ways back to the old weights: what is lost of each domain against the cost."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 5.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(1, len(results.known), sharex=True)
        for axes, domain in zip(all_axes, results.known, strict=True):
            for method in results.methods:
                costs, lost = _ways(results, method, domain)
                axes.plot(
                    costs, lost, "o-", color=colour(method), linewidth=1.0, markersize=2.5,
                    alpha=0.8,
                )  # fmt: skip
                axes.annotate(
                    method.label, (costs[0], lost[0]), xytext=(3, 2),
                    textcoords="offset points", fontsize=5,
                )  # fmt: skip
            axes.axhline(0.0, color="#999999", linewidth=0.8)
            seen = domain == results.unseen
            axes.set_title(f"{domain}{', never seen' * seen}", loc="left", fontweight="bold")
            axes.set_xlabel(f"more nats on {results.new} than AdamW, %")
            axes.grid(color="#d9d9d9", linewidth=0.6)
            axes.set_axisbelow(True)
        ends = [100 * results.cost(method).mean for method in results.methods]
        all_axes[0].set_xlim(min(ends) - 1.0, 8.0)
        all_axes[0].set_ylabel("lost, nats per token")
        figure.savefig(path)


def _ways(results: Results, method: Method, domain: str) -> tuple[list[float], list[float]]:
    """Return a method's costs in % and what is lost of a domain, the end first, over seeds."""
    costs, lost = [], []
    for run, adamw in zip(results.of(method), results.of(ADAMW), strict=True):
        points = sorted(run.points, key=lambda point: -point["alpha"])
        end = adamw.end[results.new]
        costs.append([100 * (point[results.new] / end - 1.0) for point in points])
        lost.append([point[domain] - results.before[run.seed][domain] for point in points])
    return np.mean(costs, 0).tolist(), np.mean(lost, 0).tolist()


def _row(results: Results, method: Method) -> list[str]:
    runs = results.of(method)
    return [
        f"{runs[0].rate:.1e}",
        _show(results.cost(method), 100, 2),
        *(_show(results.lost(method, name), 1, 3) for name in results.known),
        _show(results.kept(method), 100, 0),
        *(_show(results.kept_at(method, cost), 100, 0) for cost in COSTS),
        _show(results.probes(method), 100, 0),
        f"{_mean([run.seconds for run in runs]):.2f}",
        f"{max(run.gib for run in runs):.1f}",
    ]


def _show(interval: Interval, scale: float, digits: int) -> str:
    if math.isnan(interval.mean):
        return "–"
    scaled = Interval(scale * interval.mean, scale * interval.half_width)
    return with_interval(scaled, f".{digits}f")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
