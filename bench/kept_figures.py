"""Figures of what is kept: tables and numbers of README and docs/results.md, of their files."""

from __future__ import annotations

import itertools
import re
import statistics
from typing import Any

from places import RESULTS, Hardware, Sentence, Table, in_rows, load, with_minus


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


def pairs_of_classes() -> list[str]:
    """Return the rows of pairs of classes and of larger images: what EWC adds."""
    made = []
    for name in ("Split-Digits", "Split-Fashion-MNIST", "Permuted-Fashion-MNIST"):
        page = f"{name.lower()}.md"
        rows = {row["Method"]: row for row in markdown_table(page, "Method")}
        gains = {row["Paired difference"]: row["ACC − AdamW"]
                 for row in markdown_table(page, "Paired difference")}  # fmt: skip
        seeds = re.search(r"(\d+) seeds", (RESULTS / page).read_text())
        assert seeds is not None
        row = [f"[{name}](../bench/results/{page}), {seeds[1]} seeds", _mean(rows["AdamW"]["ACC"])]
        for method in ("EWC, gradient", "EWC, exact anchors"):
            row += [_mean(rows[method]["ACC"]), with_minus(gains[method])]
        steps = (rows[method]["Step, µs"] for method in ("AdamW", "EWC, gradient"))
        made.append([*row, *(in_ms(step) for step in steps)])
    return in_rows(made)


def _mean(shown: str) -> str:
    return shown.split()[0]


def in_ms(microseconds: str) -> str:
    """Return milliseconds with two digits of a mean and its interval in microseconds."""
    return f"{float(_mean(microseconds)) / 1e3:#.2g} ms"


def format_numbers() -> dict[str, str]:
    """Return what EWC gains over AdamW with each format, in points of ACC."""
    rows = markdown_table("formats-permuted-digits.md", "Paired difference")
    gains = {row["Paired difference"]: row["ACC − AdamW"] for row in rows}
    names = {
        "float32": "EWC, gradient", "log8": "EWC, log8", "anchors": "… bf16 anchors",
        "bits": "… 8-bit moments", "moments": "… bf16 moments",
    }  # fmt: skip
    numbers = {}
    for key, name in names.items():
        numbers[key], _, numbers[f"{key}_half"] = gains[name].lstrip("+").split()
    return numbers


def gem() -> list[str]:
    """Return the rows of GEM: what it keeps, how often tasks disagree, and a step's time."""
    labels = {
        "AdamW": "AdamW",
        "GEM every 10": "**AdamW, GEM, rows refreshed every 10 steps**",
        "GEM each step": "AdamW, GEM, refreshed in each step",
        "A-GEM every 10": "AdamW, A-GEM, refreshed every 10 steps",
        "GEM once": "AdamW, GEM, rows stored once",
        "SGD": "SGD",
        "SGD, GEM every 10": "SGD, GEM, refreshed every 10 steps",
    }
    page = "gem-permuted-digits.md"
    rows = {row["Method"]: row for row in markdown_table(page, "Method")}
    conflicts = {row["Steps in conflict, %"]: f"{float(_mean(row['with any'])):.0f} %"
                 for row in markdown_table(page, "Steps in conflict, %")}  # fmt: skip
    made = []
    for method, label in labels.items():
        row = rows[method]
        made.append(
            [
                label, row["lr"], row["ACC"], row["Learning acc."], conflicts.get(method, ""),
                in_ms(row["Step, µs"]),
            ]
        )  # fmt: skip
    return in_rows(made)


def around_others() -> list[str]:
    """Return the rows of EWC around other optimizers."""
    from cl_optim.demo.metrics import Interval
    from cl_optim.demo.report import in_percent

    record = load("optimizers.json")
    rows = {(row["label"], row["structure"]): row for row in record["rows"]}
    best = rows["EWCAdamW", "kronecker"]["acc"]
    made = []
    for label in ("EWCAdamW", "EWC(AdamW)", "EWC(SGD)", "EWC(Adafactor)", "EWC(Muon)"):
        diagonal, kronecker = (rows[label, of] for of in ("diagonal", "kronecker"))
        alone = rows.get((label.removeprefix("EWC(").rstrip(")"), None))
        of = kronecker["strength"]
        more = [a - b for a, b in zip(kronecker["acc"], best, strict=True)]
        said = with_minus(in_percent(Interval.of(more), signed=True))
        shown = ("" if row is None else in_percent(Interval.of(row["acc"]))
                 for row in (alone, diagonal, kronecker))  # fmt: skip
        made.append(
            [
                label if of == record["strength"] else f"{label}, strength {of:g}", *shown,
                "" if label == "EWCAdamW" else said,
            ]
        )  # fmt: skip
    return in_rows(made)


def budgets() -> list[str]:
    """Return the rows of a budget of 5 %: the mean of what is learned of the new task."""
    runs = load("budget.json")["runs"]
    made = []
    for name in dict.fromkeys(run["pair"] for run in runs):
        free, steered, back = (
            statistics.fmean(
                run["gain"] for run in runs
                if (run["pair"], run["budget"], run["protected"]) == (name, *of)
            )
            for of in ((None, False), (0.05, True), (0.05, False))
        )  # fmt: skip
        is_text = "English" in name
        shown = [f"{one:.3f}" for one in (free, steered, back)]
        if shown[1] != shown[2]:
            better = 1 if (steered < back) == is_text else 2
            shown[better] = f"**{shown[better]}**"
        made.append([f"{name}: {'bits per byte' if is_text else 'accuracy'}", *shown])
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
            said = with_minus(in_percent(more, signed=True))
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
            said = with_minus(in_percent(acc, signed=True))
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
        shown = with_minus(in_percent(more, signed=True))
        made.append(
            [
                method.label,
                in_percent(results.interval("permuted", method, metrics.acc)),
                with_minus(in_percent(results.interval("permuted", method, metrics.forgetting))),
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
        numbers[f"{key}_time"] = f"{each:#.2g}"
        for name in scenarios.SPLITS:
            numbers[f"{key}_{name}"] = str(round(100 * part_of_gap(results, name, method)))
    return numbers


PLACES: list[Table | Sentence | Hardware] = [
    Hardware("README.md", "permuted-digits.md", "## What it keeps"),
    *(
        Hardware("docs/results.md", name, after)
        for name, after in (
            ("permuted-digits.md", "## Five permutations of digits"),
            ("split-digits.md", "## Pairs of classes, one head each, and larger images"),
            ("strength.json", "## One strength on many networks"),
            ("optimizers.json", "## Around other optimizers"),
            ("gem-permuted-digits.md", "## GEM"),
            ("van-de-ven.json", "## Three types of incremental learning"),
            ("van-de-ven-permuted.json", "### Permuted images"),
            ("budget.json", "## A budget in place of λ"),
        )
    ),
    Sentence(
        "README.md",
        "importance it ended at {kronecker} %, fine-tuning at {none} and training on all classes "
        "at once at {joint}",
        class_incremental,
    ),
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
        "| | AdamW | EWC | gain | EWC, exact anchors | gain | step, AdamW | step, EWC |",
        pairs_of_classes,
    ),
    Sentence(
        "docs/ewc-adamw.md",
        "EWC gains {float32} ± {float32_half} points of ACC over AdamW with float32, {log8} ± "
        "{log8_half} with `log8`, {anchors} ± {anchors_half} with bfloat16 anchors, {bits} ± "
        "{bits_half} with 8-bit moments, {moments} ± {moments_half} with bfloat16 moments",
        format_numbers,
    ),
    Table(
        "docs/results.md",
        "| | learning rate | ACC | learning acc. | steps in conflict with an old task | step |",
        gem,
    ),
    Table(
        "docs/results.md", "| | alone | diagonal | Kronecker | Kronecker − EWCAdamW |",
        around_others,
    ),
    Table(
        "docs/results.md",
        "| | AdamW, no budget | λ steered, then back | AdamW, then back |",
        budgets,
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
