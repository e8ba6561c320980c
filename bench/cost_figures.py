"""What RESULTS.md says of costs that are not asked for in the suite: rows of their figures.

The scripts that measure them print the same rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from places import Hardware, Sentence, Table, in_rows, load, three

PAGE = "bench/RESULTS.md"
Figures = Mapping[str, Any]  # of one file, or of what will be in it


def beside(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratios of turns."""
    return [one / other for one, other in zip(times, base, strict=True)]


def with_quartiles(values: Sequence[float]) -> str:
    """Return the median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def with_range(values: Sequence[float]) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def show(*tables: Sequence[str]) -> None:
    """Print rows."""
    print("\n\n".join("\n".join(table) for table in tables))


def formats(weights: str, *told: Figures) -> list[str]:
    """Return the rows of compact formats, for one dtype of the weights; a column for each file.

    Raises:
        KeyError: A row is in one file, and not in another.
    """
    from compact_formats import ROWS

    base, contenders = ROWS[weights]
    return in_rows(
        [
            label,
            f"{count / base:.2f}",
            *(with_quartiles(one["ratios"][f"{weights}: {label}"]) for one in told),
        ]
        for label, (_, count) in contenders.items()
        if any(f"{weights}: {label}" in one["ratios"] for one in told)
    )


def shards(told: Figures) -> list[str]:
    """Return the rows of a step of DTensors."""
    made = []
    for name, contenders in told["seconds"].items():
        base = contenders["AdamW(fused), DTensors"]
        for i, (label, times) in enumerate(contenders.items()):
            each = "" if times is base else with_quartiles(beside(times, base))
            made.append(["" if i else name, label, three(1e3 * statistics.median(times)), each])
    return in_rows(made)


def looked_through(told: Figures) -> dict[str, str]:
    """Return what it takes to look through 1 000 DTensors, ours and torch's, in ms."""
    times = {
        label: 1e3 * statistics.median(of_label)
        for label, of_label in told["seconds"]["1 000 tensors of 64"].items()
    }
    ours, theirs = (times[f"{one}, DTensors"] - times[one] for one in ("EWCAdamW", "AdamW(fused)"))
    return {"ours": f"{ours:.1f}", "theirs": f"{theirs:.0f}"}


def training_step(told: Figures) -> list[str]:
    """Return the rows of a whole training step."""
    turns = told["ms"]
    base = turns["AdamW fused"]
    return in_rows(
        [
            label,
            f"{statistics.median(times):.0f}",
            f"{min(times):.0f}",
            "" if times is base else with_quartiles(beside(times, base)),
        ]
        for label, times in turns.items()
    )


def whole_step(told: Figures) -> dict[str, str]:
    """Return how many times as long a whole training step takes with protection."""
    turns = told["ms"]
    each = beside(turns["EWCAdamW"], turns["AdamW fused"])
    return {"whole": f"{statistics.median(each):.2f}"}


def kronecker(told: Figures) -> list[str]:
    """Return the rows of what Kronecker importance costs."""
    adamw, between, pull = told["seconds"].values()
    whole = [
        (one + settled / told["every"]) / plain
        for plain, one, settled in zip(adamw, between, pull, strict=True)
    ]
    passes, state = told["passes"], told["bytes_per_weight"]
    demo = beside(*reversed(told["demo"].values()))
    kinds = ", ".join(f"{key} {value:.2f}" for key, value in state.items() if value >= 0.005)
    return in_rows(
        [
            ["a training step with `torch.optim.AdamW(fused=True)`, s", with_range(adamw)],
            ["with Kronecker importance, between two pulls, s", with_range(between)],
            ["a pull of all matrices, s", with_range(pull)],
            [f"whole step at `every={told['every']}` ÷ AdamW's", with_range(whole)],
            [
                f"the Fisher's pass over {told['arguments']['samples']} samples ÷ the diagonal's",
                f"{min(passes['kronecker']) / min(passes['diagonal']):.2f}",
            ],
            ["eigendecompositions beside it, once a task, s", f"{told['decompositions']:.1f}"],
            ["bytes of state per weight beside AdamW's 8", f"{sum(state.values()):.2f}: {kinds}"],
            ["a step of the demo's network ÷ with the diagonal", with_quartiles(demo)],
        ]
    )


def any_optimizer(told: Figures) -> list[str]:
    """Return the rows of EWC around another optimizer."""
    found = told["seconds"].values()
    first = next(iter(found))
    return in_rows(
        [
            label,
            *(with_quartiles(beside(times[label], times["AdamW(fused)"])) for times in found),
        ]
        for label in first
        if label != "AdamW(fused)"
    )


def pull_numbers(told: Figures) -> dict[str, str]:
    """Return what the pull alone takes of a tensor, in µs."""
    times = told["seconds"]["1 000 tensors of 64"]["the pull alone"]
    return {"pull": f"{1e6 * statistics.median(times) / 1000:.2f}"}


def backward_memory(told: Figures) -> list[str]:
    """Return the rows of a step in the backward pass."""
    return in_rows(
        [kind, f"{plain:.0f}", f"{within:.0f}", f"{(plain - within) / told['gradients']:.2f}"]
        for kind, (plain, within) in told["peaks"].items()
    )


def distillation(told: Figures) -> list[str]:
    """Return the rows of distillation on stored outputs."""
    base, memory = told["seconds"]["plain"], told["megabytes"]
    return in_rows(
        [
            label,
            f"{statistics.median(times):.2f}",
            "" if times is base else with_range(beside(times, base)),
            f"{memory[label]:.0f}",
            "" if times is base else f"{memory[label] / memory['plain']:.2f}",
        ]
        for label, times in told["seconds"].items()
    )


def log_codecs(told: Figures) -> list[str]:
    """Return the rows of the importance log, by codec; a ratio above 1 is faster than dd."""
    made = []
    for name, of_codec in told["codecs"].items():
        error, turns = of_codec["error"], of_codec["turns"]
        write, read, dd, dd_float32 = (
            [turn[key] for turn in turns] for key in ("write", "read", "dd", "dd_float32")
        )
        largest = error["largest"]
        made.append(
            [
                name,
                f"{error['bytes_per_weight']:.3f}",
                f"{100 * error['relative']:.2f} %",
                f"{100 * largest:.2f} %" if largest < 10 else f"×{largest:.0e}",
                f"{100 * error['top_overlap']:.2f} %",
                f"{turns[0]['nbytes'] / 1e6:.0f}",
                f"{statistics.median(dd):.3f}",
                f"{statistics.median(write):.3f}",
                with_range(beside(dd, write)),
                f"{statistics.median(read):.3f}",
                with_range(beside(dd, read)),
                with_range(beside(dd_float32, write)),
                with_range(beside(dd_float32, read)),
            ]
        )
    return in_rows(made)


def log_memory(told: Figures) -> list[str]:
    """Return the rows of the log's memory."""
    kinds = {"writing": "writing", "reading": "reading", "mapped": "of it the mapped files"}
    return in_rows(
        [label, *(f"{of_codec[kind]:.0f}" for of_codec in told["megabytes"].values())]
        for kind, label in kinds.items()
    )


def diagnose_numbers(told: Figures) -> dict[str, str]:
    """Return what diagnose took."""
    before, most = told["peaks"]
    return {
        "size": str(told["megabytes"]),
        "seconds": f"{told['seconds']:.0f}",
        "rate": f"{2 * told['megabytes'] / told['seconds']:.1f}",
        "most": f"{most:.0f}",
        "before": f"{before:.0f}",
        "uncounted": f"{told['uncounted'] / 1e6:.1f}",
    }


def guard_numbers(told: Figures) -> dict[str, str]:
    """Return what the guard took."""
    numbers = {
        "step": f"{1e6 * told['step']:.2f}",
        "weights": f"{told['weights'] / 1e6:.0f}",
        "size": f"{told['bytes'] / 1e6:.0f}",
    }
    for kind in ("check", "dd"):
        times = [turn[kind] for turn in told["turns"]]
        numbers |= {
            kind: f"{statistics.median(times):.2f}",
            f"{kind}_least": f"{min(times):.2f}",
            f"{kind}_most": f"{max(times):.2f}",
        }
    return numbers


def _formats(weights: str) -> Callable[[], list[str]]:
    """Return what makes the rows of compact formats."""
    return lambda: formats(weights, *map(load, FORMATS))


def _of(name: str, make: Callable[[Figures], Any]) -> Callable[[], Any]:
    """Return what makes something of a file's figures."""
    return lambda: make(load(name))


TRAINING, KRONECKER, AROUND = "training-step.json", "kronecker-cost.json", "any-optimizer.json"
DISTILLATION, LOG, GUARD = "distillation-cost.json", "log-round-trip.json", "guard.json"
DIAGNOSE, SHARDS = "diagnose.json", "shards.json"
# Of an EPYC as others see it and as it is, and of a Xeon.
FORMATS = tuple(f"compact-formats-{one}.json" for one in ("avx2", "avx512", "xeon"))
LOG_HEAD = (
    "| codec | bytes per weight | ‖error‖/‖F‖ | largest error | top 5 % kept | MB | dd, s "
    "| write, s | dd / write | read, s | dd / read | float32's dd / write | / read |"
)


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


PLACES: list[Table | Sentence | Hardware] = [
    Hardware(PAGE, FORMATS[-1], "## Compact formats, CPU"),
    *(
        Table(PAGE, f"| {weights} weights | bytes | EPYC, AVX2 | EPYC | Xeon |", _formats(weights))
        for weights in ("float32", "bfloat16")
    ),
    Hardware(PAGE, TRAINING, "## A whole training step, CPU"),
    Table(
        PAGE, "| | median ms | fastest ms | ÷ AdamW fused, quartiles |",
        _of(TRAINING, training_step),
    ),
    Sentence(
        "README.md", "on a CPU: {whole} times a whole training step of GPT-2.",
        _of(TRAINING, whole_step),
    ),
    Hardware(PAGE, KRONECKER, "## Kronecker importance, CPU"),
    Table(PAGE, "| Kronecker importance | |", _of(KRONECKER, kronecker)),
    Hardware(PAGE, AROUND, "## EWC around another optimizer, CPU"),
    Table(
        PAGE, "| ÷ AdamW(fused) | 85 M in 144 tensors | 1 000 tensors of 64 |",
        _of(AROUND, any_optimizer),
    ),
    Sentence(PAGE, "the pull of a small tensor takes {pull} µs", _of(AROUND, pull_numbers)),
    Table(
        PAGE, "| | plain | in the backward pass | saved ÷ gradients |",
        _of(AROUND, backward_memory),
    ),
    Hardware(PAGE, "scaling.json", "## How times grow"),
    Table(PAGE, "| | of | ours | | beside | | ÷ at the largest |", growth),
    Hardware(PAGE, SHARDS, "## A step of DTensors, CPU"),
    Table(PAGE, "| | | ms a step | ÷ AdamW(fused), DTensors |", _of(SHARDS, shards)),
    Sentence(
        PAGE, "takes {ours} ms; torch's own dispatch takes {theirs}.",
        _of(SHARDS, looked_through),
    ),
    Hardware(PAGE, DISTILLATION, "## Distillation on stored outputs, CPU"),
    Table(PAGE, "| | s a step | ÷ plain | MB | ÷ plain |", _of(DISTILLATION, distillation)),
    Hardware(PAGE, LOG, "## The importance log"),
    Table(PAGE, LOG_HEAD, _of(LOG, log_codecs)),
    Table(
        PAGE, "| MB | float32 | bfloat16 | log8 | topk | rank1 |",
        _of("log-memory.json", log_memory),
    ),
    Hardware(PAGE, DIAGNOSE, "## `diagnose` on two large files"),
    Sentence(
        PAGE,
        "{seconds} s for two files of {size} MB ({rate} MB/s), peak resident memory {most} MB, of "
        "which {before} MB were there before it began",
        _of(DIAGNOSE, diagnose_numbers),
    ),
    Sentence(PAGE, "was full ({uncounted} million", _of(DIAGNOSE, diagnose_numbers)),
    Hardware(PAGE, GUARD, "## The guard"),
    Sentence(PAGE, "between two evaluations takes {step} µs", _of(GUARD, guard_numbers)),
    Sentence(
        PAGE,
        "of {weights} million protected float32 weights, {size} MB with moments, importance and "
        "anchors, it took {check} s ({check_least} to {check_most}), and `dd conv=fsync` of as "
        "many bytes {dd} s ({dd_least} to {dd_most})",
        _of(GUARD, guard_numbers),
    ),
]  # fmt: skip
