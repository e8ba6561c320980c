"""Figures in Markdown, made of the files in bench/results.

    python bench/figures.py [--check]

Tables are made anew and numbers in sentences filled in; --check only compares, and fails where a
page says something else than the files. What is measured anew then stands wherever it is told.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from typing import Any

import cost_figures
import summary
from places import RESULTS, ROOT, Hardware, Sentence, Table, in_rows, load, three

sys.path.insert(0, str(ROOT))


# --- the suite ------------------------------------------------------------------------------------

SUITE = "suite.json"
ADAMW, OURS, FLOOR = "AdamW fused", "EWCAdamW gradient", "36 B per parameter in place"
MLP, GPT2, SMALL = "MLP 64-256-256-10", "GPT-2 144 tensors 85 M", "1000 tensors of 64"
COLD = "1000 tensors of 64, not in the cache"


def suite_tables() -> list[Table]:
    """Return a table of RESULTS.md for each problem."""
    made = []
    for name, group in load(SUITE)["groups"].items():
        head = "| " + " | ".join(summary.HEAD).format(base=group["base"]) + " |"

        def rows(group: dict[str, Any] = group) -> list[str]:
            return in_rows(summary.rows(group))

        made.append(Table("bench/RESULTS.md", head.replace("|  |", "| |"), rows, f"### {name}"))
    return made


def ratio(name: str, contender: str, base: str) -> float:
    """Return how many times as long as a base a contender takes, on a problem."""
    group = load(SUITE)["groups"][name]
    return summary.ratio(summary.turns(group, contender), summary.turns(group, base))[0]


def step_numbers() -> dict[str, str]:
    """Return what is said of the step."""
    adamw, ours, floor = ADAMW, OURS, FLOOR
    foreach, autograd = "AdamW fused + foreach penalty", "AdamW fused + autograd penalty"
    sets = {"mlp": MLP, "gpt2": GPT2, "small": SMALL, "cold": COLD}
    numbers = {key: f"{ratio(name, ours, adamw):.2f}" for key, name in sets.items()}
    of_foreach = [ratio(name, foreach, ours) for name in sets.values()]
    of_autograd = [ratio(name, autograd, ours) for name in sets.values()]
    numbers |= {
        "foreach": f"{min(of_foreach):.2g}",
        "foreach_most": f"{max(of_foreach):.2g}",
        "autograd": f"{min(of_autograd):.2g}",
        "autograd_most": f"{max(of_autograd):.2g}",
        "floor": f"{100 / ratio(GPT2, ours, floor):.0f}",
        "copy": f"{ratio(GPT2, '36 B per parameter copied', ours):.1f}",
        "log8": f"{ratio(GPT2, 'EWCAdamW log8, bf16 anchors', adamw):.2f}",
    }
    return numbers


def peer_numbers() -> dict[str, str]:
    """Return how many times as long as the best peer ours takes."""
    groups = load(SUITE)["groups"]

    def against_best(name: str) -> float:
        group = groups[name]
        ours, peer = summary.best(group, "ours"), summary.best(group, "peer")
        assert ours is not None
        assert peer is not None
        return ratio(name, ours, peer)

    numbers = {
        "projection": against_best("GEM projection, 10 rows of 124 M"),
        "programs": against_best("4096 quadratic programs of 16 rows"),
        "log": against_best("124 M weights of importance written"),
        "log_read": against_best("124 M weights of importance read"),
    }
    for key, first in (("fisher", "Fisher: "), ("factors", "Factors: ")):
        found = [against_best(name) for name in groups if name.startswith(first)]
        numbers |= {key: min(found), f"{key}_most": max(found)}
    return {key: f"{number:.2g}" for key, number in numbers.items()}


def step_times() -> list[str]:
    """Return the rows of docs/results.md: milliseconds of a step."""
    labels = {
        "`torch.optim.AdamW(fused=True)`, no protection": ADAMW,
        "**`EWCAdamW`**": OURS,
        "`EWCAdamW`, `log8` importance, bfloat16 anchors": "EWCAdamW log8, bf16 anchors",
        "fused AdamW + `_foreach` penalty": "AdamW fused + foreach penalty",
        "fused AdamW + autograd penalty": "AdamW fused + autograd penalty",
    }
    groups = load(SUITE)["groups"]
    made = []
    for label, contender in labels.items():
        times = [
            f"{three(1e3 * statistics.median(groups[name]['contenders'][contender]['seconds']))} ms"
            for name in (MLP, GPT2, SMALL)
        ]
        bold = label.startswith("**")
        made.append([label, *(f"**{time}**" if bold else time for time in times)])
    return in_rows(made)


# --- what is kept ---------------------------------------------------------------------------------


def table_of(name: str, first: str) -> list[str]:
    """Return the lines of a result's table whose first column has that head."""
    lines = (RESULTS / name).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin:]))


def markdown_table(name: str, first: str) -> list[dict[str, str]]:
    """Return its rows, by column."""
    split = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table_of(name, first)
    ]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]


def short(number: str) -> str:
    """Return a learning rate as 3.2e-4."""
    mantissa, exponent = f"{float(number):.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


DIGITS = "permuted-digits.md"
# The demo's methods, as README names them: {lr} and {lambda} are filled in.
NAMES = {
    "AdamW": "AdamW ({lr})",
    "AdamW, small lr": "AdamW, a smaller rate ({lr})",
    "L2-SP": "L2-SP: all weights are equal ({lr}, {strength})",
    "EWC, gradient": "EWC, diagonal ({lr}, {strength})",
    "EWC, Kronecker": "**EWC, Kronecker** ({lr}, {strength})",
    "Input projection": "Input projection ({lr}, {strength})",
    "GEM every 10": "GEM, 128 kept samples a task ({lr})",
    "Joint training": "All tasks at once ({lr})",
}


def digits_of_readme() -> list[str]:
    """Return the rows of README's table."""
    made = []
    rows = {row["Method"]: row for row in markdown_table(DIGITS, "Method")}
    for method, label in NAMES.items():
        row = rows[method]
        named = label.format(lr=short(row["lr"]), strength=row["λ"].removeprefix("strength "))
        made.append([named, row["ACC"], row["Learning acc."], row["Step, µs"]])
    return in_rows(made)


def digits_whole() -> list[str]:
    """Return the rows of the demo's table as they stand there."""
    return table_of(DIGITS, "Method")[2:]


def digits_numbers() -> dict[str, str]:
    """Return what is said of the demo."""
    rows = {row["Method"]: row for row in markdown_table(DIGITS, "Method")}
    said = re.search(
        r"ACC\(EWC, Kronecker\) − ACC\(AdamW\) = \+(\S+) points \(95 % interval "
        r"\[\+(\S+), \+(\S+)\], paired over (\d+) seeds\), at \+(\S+) points",
        (RESULTS / DIGITS).read_text(),
    )
    assert said is not None
    gain, low, high, seeds, learning = said.groups()
    accs = {key: rows[name]["ACC"].split()[0] for key, name in
            (("adamw", "AdamW"), ("kronecker", "EWC, Kronecker"))}  # fmt: skip
    return {
        "gain": gain, "low": low, "high": high, "seeds": seeds, "learning": learning,
        **{key: f"{float(acc):.0f}" for key, acc in accs.items()},
    }  # fmt: skip


def strengths() -> list[str]:
    """Return the rows of one strength on many networks."""
    from cl_optim.demo.metrics import Interval
    from cl_optim.demo.report import in_percent

    cells = load("strength.json")["cells"]
    labels = {
        "Permuted, 100 units": "Permuted-Digits, 100 units",
        "Permuted, 300 units": "300 units",
        "Permuted, 1000 units": "1000 units",
        "Permuted, 100 units, 10 tasks": "100 units, 10 tasks",
        "Split, 32 units": "Split-Digits, 32 units",
    }
    made = []
    for network, label in labels.items():
        row = [label]
        for method in ("ewc-proximal", "ewc-kronecker", "input-projection"):
            some = [c for c in cells if (c["network"], c["method"]) == (network, method)]
            some.sort(key=lambda cell: cell["strength"])
            middle = some[len(some) // 2]["acc"]
            best = max(statistics.fmean(cell["acc"]) for cell in some)
            more = 100 * (best - statistics.fmean(middle))
            row.append(f"{in_percent(Interval.of(middle))} (+{abs(more):.1f})")
        made.append(row)
    return in_rows(made)


def pretrained() -> list[str]:
    """Return the rows of the pretrained language model."""
    from bench.retention.pretrained.results import Results

    results = Results.from_record(load("pretrained.json"))

    def shown(value: float, digits: int = 0) -> str:
        return "–" if value != value else f"{100 * value:.{digits}f}"

    made = []
    for method in results.methods:
        of = results.of(method)
        made.append(
            [
                method.label,
                shown(results.cost(method).mean, 2),
                *(f"{results.lost(method, one).mean:.3f}" for one in results.known),
                shown(results.kept(method).mean),
                shown(results.kept_at(method, 0.01).mean),
                shown(results.kept_at(method, 0.02).mean),
                f"{statistics.median(run.seconds for run in of):.2f}",
                f"{max(run.gib for run in of):.1f}",
            ]
        )
    return in_rows(made)


def growth() -> list[str]:
    """Return the rows of how times grow."""
    from scaling import exponent, medians

    made = []
    for curve in load("scaling.json")["curves"]:
        (ours, mine), (other, theirs) = curve["seconds"].items()
        points = [medians(of_sizes) for of_sizes in (mine, theirs)]
        largest = str(max(points[0]))
        each = [a / b for a, b in zip(mine[largest], theirs[largest], strict=True)]
        both = [f"n^{exponent(one):.2f}" for one in points]
        of = f"{int(largest):,}".replace(",", " ") + f" {curve['axis']}"
        ratio_ = f"{statistics.median(each):.2f}"
        made.append([curve["name"], of, ours, both[0], other, both[1], ratio_])
    return in_rows(made)


# Columns of the tables beside Avalanche: scenario and optimizer.
BESIDE = [(name, inner) for name in ("permuted", "split") for inner in ("AdamW", "SGD")]


def avalanche_runs() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Return the runs of each scenario, optimizer and method."""
    rows = load("avalanche.json")["rows"]
    return {(row["scenario"], row["optimizer"], row["method"]): row["runs"] for row in rows}


def avalanche() -> list[str]:
    """Return the rows of what Avalanche's methods and ours end at, in its own loop."""
    from bench.retention.avalanche import METHODS
    from cl_optim.demo.metrics import Interval
    from cl_optim.demo.report import in_percent

    runs = avalanche_runs()
    made = []
    for method in METHODS:
        shown = runs["permuted", "AdamW", method.key]
        accs = [Interval.of([run["acc"] for run in runs[(*one, method.key)]]) for one in BESIDE]
        made.append(
            [
                method.label.removeprefix("cl_optim: "),
                *map(in_percent, accs),
                f"{statistics.fmean(run['cpu_seconds'] for run in shown):.2f}",
                f"{shown[0]['state_bytes'] / 1e6:.1f}",
            ]
        )
    return in_rows(made)


def avalanche_pairs() -> list[str]:
    """Return the rows of ours beside Avalanche's: ACC, and the time."""
    from bench.retention.avalanche import PAIRS
    from cl_optim.demo.metrics import Interval
    from cl_optim.demo.report import in_percent

    made = []
    for ours, theirs in PAIRS:
        row = [ours.label.removeprefix("cl_optim: ")]
        for one in BESIDE:
            more = Interval.of(
                [a["acc"] - b["acc"] for a, b in avalanche_paired(one, ours, theirs)]
            )
            said = in_percent(more, signed=True).replace("-", "\N{MINUS SIGN}")
            row.append(f"{said}; {avalanche_time(one, ours, theirs):.2f}")
        made.append(row)
    return in_rows(made)


def avalanche_paired(one: tuple[str, str], ours: Any, theirs: Any) -> list[tuple[Any, Any]]:
    """Return the runs of two methods with the same seed."""
    runs = avalanche_runs()
    return list(zip(runs[(*one, ours.key)], runs[(*one, theirs.key)], strict=True))


def avalanche_time(one: tuple[str, str], ours: Any, theirs: Any) -> float:
    """Return how many times as long ours takes."""
    pairs = avalanche_paired(one, ours, theirs)
    return statistics.fmean(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs)


def avalanche_added() -> dict[str, str]:
    """Return what part of what Avalanche's EWC adds to the time of a plain training ours adds."""
    from bench.retention.avalanche import NAIVE, OUR_DIAGONAL, THEIR_EWC

    runs = avalanche_runs()
    added = []
    for one in BESIDE:
        plain, ours, theirs = (
            statistics.fmean(run["cpu_seconds"] for run in runs[(*one, method.key)])
            for method in (NAIVE, OUR_DIAGONAL, THEIR_EWC)
        )
        added.append((ours - plain) / (theirs - plain))
    return {"added": f"{min(added):.2f}", "added_most": f"{max(added):.2f}"}


def avalanche_numbers() -> dict[str, str]:
    """Return what is said of GEM's time beside Avalanche's."""
    from bench.retention.avalanche import OUR_GEM, OUR_GEM_LESS_OFTEN, THEIR_GEM

    numbers = {}
    for ours in (OUR_GEM, *OUR_GEM_LESS_OFTEN):
        key = ours.key.replace("-", "")
        times = [avalanche_time(one, ours, THEIR_GEM) for one in BESIDE]
        numbers |= {key: f"{min(times):.2f}", f"{key}_most": f"{max(times):.2f}"}
    return numbers


def van_de_ven() -> list[str]:
    """Return the rows of three types of incremental learning: what each method ends at."""
    from bench.retention.van_de_ven import methods, scenarios
    from bench.retention.van_de_ven.runs import from_record
    from cl_optim.demo import metrics
    from cl_optim.demo.report import in_percent

    results = from_record(load("van-de-ven.json"))
    made = []
    for method in methods.METHODS:
        runs = results.runs["class", method.key]
        made.append(
            [
                method.label,
                *(
                    in_percent(results.interval(name, method, metrics.acc))
                    for name in scenarios.SPLITS
                ),
                f"{statistics.fmean(run.cpu_seconds for run in runs):.1f}",
                f"{runs[0].state_bytes / 1e6:.1f}",
            ]
        )
    return in_rows(made)


def van_de_ven_pairs() -> list[str]:
    """Return the rows of what ours and what is simpler keep beside van de Ven's EWC."""
    from bench.retention.van_de_ven import methods, scenarios
    from bench.retention.van_de_ven.runs import from_record
    from cl_optim.demo import metrics
    from cl_optim.demo.report import in_percent

    results = from_record(load("van-de-ven.json"))
    made = []
    for method in (*methods.OURS, methods.SMALL_RATE, methods.INTERPOLATION):
        row = [method.label]
        for name in scenarios.SPLITS:
            acc = results.paired(name, method, methods.THEIRS, metrics.acc)
            both = (results.runs[name, one.key] for one in (method, methods.THEIRS))
            ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(*both, strict=True)]
            said = in_percent(acc, signed=True).replace("-", "−")
            row.append(f"{said}; {statistics.fmean(ratios):.2f}")
        made.append(row)
    return in_rows(made)


def van_de_ven_permuted() -> list[str]:
    """Return the rows of permuted images: what each method ends at, and beside van de Ven's EWC."""
    from bench.retention.van_de_ven import methods
    from bench.retention.van_de_ven.runs import from_record
    from cl_optim.demo import metrics
    from cl_optim.demo.report import in_percent

    results = from_record(load("van-de-ven-permuted.json"))
    plain = results.runs["permuted", methods.NONE.key]
    made = []
    for method in methods.METHODS:
        runs = results.runs["permuted", method.key]
        more = results.paired("permuted", method, methods.THEIRS, metrics.acc)
        each = [a.cpu_seconds / b.cpu_seconds for a, b in zip(runs, plain, strict=True)]
        shown = in_percent(more, signed=True).replace("-", "−")
        made.append(
            [
                method.label,
                in_percent(results.interval("permuted", method, metrics.acc)),
                in_percent(results.interval("permuted", method, metrics.forgetting)).replace(
                    "-", "−"
                ),
                "" if method is methods.THEIRS else shown,
                f"{statistics.fmean(each):.2f}",
                f"{runs[0].state_bytes / 1e6:.1f}",
            ]
        )
    return in_rows(made)


def class_incremental() -> dict[str, str]:
    """Return what Kronecker importance, fine-tuning and joint training end at, in per cent."""
    from bench.retention.van_de_ven.methods import JOINT, KRONECKER, NONE
    from bench.retention.van_de_ven.runs import from_record
    from cl_optim.demo import metrics

    results = from_record(load("van-de-ven.json"))
    told = {"kronecker": KRONECKER, "none": NONE, "joint": JOINT}
    return {
        key: f"{100 * results.interval('class', method, metrics.acc).mean:.0f}"
        for key, method in told.items()
    }


def van_de_ven_numbers() -> dict[str, str]:
    """Return how much of the way from fine-tuning to joint training EWC goes, in per cent.

    And, in the class-incremental scenario, how many times as long as fine-tuning it takes.
    """
    from bench.retention.van_de_ven import methods, scenarios
    from bench.retention.van_de_ven.report import part_of_gap
    from bench.retention.van_de_ven.runs import from_record
    from cl_optim.demo import metrics

    results = from_record(load("van-de-ven.json"))
    told = {"their": methods.THEIRS, "diagonal": methods.DIAGONAL}
    told["kronecker"] = methods.KRONECKER
    plain = results.runs["class", methods.NONE.key]
    numbers = {}
    for name in ("domain", "class"):
        gain = results.paired(name, methods.KRONECKER, methods.THEIRS, metrics.acc)
        numbers[f"more_{name}"] = f"{100 * gain.mean:.0f}"
    for key, method in told.items():
        pairs = zip(results.runs["class", method.key], plain, strict=True)
        each = statistics.fmean(run.cpu_seconds / other.cpu_seconds for run, other in pairs)
        numbers[f"{key}_time"] = f"{each:.2g}"
        for name in scenarios.SPLITS:
            numbers[f"{key}_{name}"] = str(round(100 * part_of_gap(results, name, method)))
    return numbers


# --- where they stand -----------------------------------------------------------------------------

PLACES = [
    *suite_tables(),
    *cost_figures.PLACES,
    Hardware("bench/RESULTS.md", SUITE, "## The suite, CPU"),
    Sentence(
        "bench/RESULTS.md",
        "On 85 M parameters protection costs {gpt2} AdamW steps, where the bytes ask for 36/28 = "
        "1.29: {floor} % of the floor, and {copy} times as fast as a copy of the same bytes. With "
        "`log8` importance and bfloat16 anchors, 31 bytes, it costs {log8}. On small tensors it "
        "costs less than nothing: 1 000 of them take {small} of the time of torch's fused AdamW, "
        "and {cold} where they come from memory. The penalty by autograd, as the libraries do it, "
        "takes {autograd} to {autograd_most} times as long as the whole protected step, and a "
        "hand-written `_foreach` penalty {foreach} to {foreach_most} times.",
        step_numbers,
    ),
    Table(
        "bench/RESULTS.md",
        "| | of | ours | | beside | | ÷ at the largest |",
        growth,
    ),
    Sentence(
        "README.md",
        "takes {mlp} (an MLP), {gpt2} (85 M parameters) and {small} (1 000 tensors of 64) times",
        step_numbers,
    ),
    Sentence(
        "README.md",
        "takes {foreach} to {foreach_most} times as long as `EWCAdamW`, with one by autograd "
        "{autograd} to {autograd_most} times",
        step_numbers,
    ),
    Sentence(
        "README.md",
        "importance it ended at {kronecker} %, fine-tuning at {none} and training on all classes "
        "at once at {joint}",
        class_incremental,
    ),
    Sentence(
        "README.md",
        "a GEM projection of 124 M weights takes {projection} of the time and a batch of quadratic "
        "programs {programs}",
        peer_numbers,
    ),
    Sentence(
        "README.md",
        "of its own takes {fisher} to {fisher_most} times as long as the fastest of them",
        peer_numbers,
    ),
    Sentence("README.md", "{factors} to {factors_most} times, writing", peer_numbers),
    Sentence("README.md", "in float32 {log} and {log_read} times.", peer_numbers),
    Table(
        "docs/results.md",
        "| time of one step | MLP, 85 k | GPT-2's 144 tensors, 85 M | 1 000 tensors of 64 |",
        step_times,
    ),
    Sentence(
        "docs/results.md",
        "`EWCAdamW` takes {mlp}, {gpt2} and {small} times as long as AdamW",
        step_numbers,
    ),
    Sentence("docs/results.md", "against AdamW's 28, at {floor} % of the floor", step_numbers),
    Table(
        "README.md",
        "| Method, its learning rate and λ or strength by validation | accuracy over all tasks, at "
        "the end | of each task, just learned | training step, µs |",
        digits_of_readme,
    ),
    Sentence(
        "README.md",
        "ends **{gain} points above AdamW (95 % interval {low} to {high}, paired over {seeds} "
        "seeds)**",
        digits_numbers,
    ),
    Sentence(
        "README.md",
        "AdamW ends at {adamw} % over all, EWC with Kronecker importance at {kronecker} %",
        digits_numbers,
    ),
    Sentence(
        "docs/results.md",
        "**+{gain} points of ACC (95 % interval +{low} to +{high}, paired over {seeds} seeds), "
        "while it learns each new task better** (+{learning} points)",
        digits_numbers,
    ),
    Table("docs/results.md", "| Method           |      lr |            λ |        ACC |"
          "         BWT | Forgetting | Learning acc. |   Step, µs | Optimizer, µs | Task end, ms |",
          digits_whole),
    Table(
        "docs/results.md", "| | EWC, diagonal | EWC, Kronecker | input projection |", strengths
    ),
    Table(
        "docs/results.md",
        "| | cost on German, % | lost: prose | Python | sayings | kept, % | on the way back, at "
        "1 % | at 2 % | s a step | GiB |",
        pretrained,
    ),
    Table(
        "docs/results.md",
        "| ACC | task-incremental | domain-incremental | class-incremental | s, class-incremental "
        "| MB |",
        van_de_ven,
    ),
    Table(
        "docs/results.md",
        "| − van de Ven's EWC, paired by seed: ACC; time ÷ its | task-incremental "
        "| domain-incremental | class-incremental |",
        van_de_ven_pairs,
    ),
    Table(
        "docs/results.md",
        "| permuted images | ACC | forgetting | − van de Ven's EWC | time ÷ fine-tuning | MB |",
        van_de_ven_permuted,
    ),
    Sentence(
        "docs/results.md",
        "in these three, van de Ven's EWC goes {their_task}, {their_domain} and {their_class} % of "
        "it, our diagonal {diagonal_task}, {diagonal_domain} and {diagonal_class} %, Kronecker "
        "importance {kronecker_task}, {kronecker_domain} and {kronecker_class} %",
        van_de_ven_numbers,
    ),
    Sentence(
        "docs/results.md",
        "{more_domain} points more where it is not, {more_class} where all classes must be told.",
        van_de_ven_numbers,
    ),
    Sentence(
        "docs/results.md",
        "A run takes {their_time} times as long as fine-tuning with van de Ven's EWC, "
        "{diagonal_time} with our diagonal and {kronecker_time} with Kronecker importance**",
        van_de_ven_numbers,
    ),
    Hardware("docs/results.md", "avalanche.json", "## Beside Avalanche"),
    Table(
        "docs/results.md",
        "| ACC | permuted, AdamW | permuted, SGD | split, AdamW | split, SGD | s, permuted, AdamW "
        "| MB |",
        avalanche,
    ),
    Table(
        "docs/results.md",
        "| ours − Avalanche's, paired by seed: ACC; time ÷ theirs | permuted, AdamW | permuted, "
        "SGD | split, AdamW | split, SGD |",
        avalanche_pairs,
    ),
    Sentence(
        "docs/results.md",
        "what it adds to a plain training is {added} to {added_most} of what Avalanche's adds",
        avalanche_added,
    ),
    Sentence(
        "docs/results.md",
        "GEM with rows of every second step takes {gem2} to {gem2_most} of its time",
        avalanche_numbers,
    ),
    Sentence(
        "docs/results.md",
        "With the same rows it takes {gem} to {gem_most}: faster in three of the four. With rows "
        "of every fifth step it takes {gem5} to {gem5_most}, of every tenth {gem10} to "
        "{gem10_most}.",
        avalanche_numbers,
    ),
]  # fmt: skip


def filled() -> dict[str, tuple[str, str]]:
    """Return each page as it is, and as the files have it."""
    pages: dict[str, tuple[str, str]] = {}
    for place in PLACES:
        before = (ROOT / place.page).read_text() if place.page not in pages else ""
        was, now = pages.get(place.page, (before, before))
        pages[place.page] = was, place.fill(now)
    return pages


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where one differs"
    )
    check = parser.parse_args().check
    stale = []
    for page, (was, now) in filled().items():
        if was == now:
            continue
        stale.append(page)
        if not check:
            (ROOT / page).write_text(now)
    if check and stale:
        raise SystemExit(f"{', '.join(stale)}: figures are not those of bench/results.")
    print(f"{'differ' if check else 'written'}: {', '.join(stale) or 'none'}")


if __name__ == "__main__":
    main()
