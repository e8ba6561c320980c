"""Figures of what language models keep: tables and numbers of docs/results.md, of their files."""

from __future__ import annotations

import math
import statistics
from typing import Any

from places import Hardware, Sentence, Table, in_rows, load, with_minus

# Rows of the tables of two texts, and which methods they tell of.
BESIDE_REPLAY = {
    "AdamW": ["AdamW"],
    "EWC, diagonal, λ = 1, 10": ["EWC, λ = 1", "EWC, λ = 10"],
    "EWC, Kronecker, λ = 1, 3": ["EWC, Kronecker, λ = 1", "EWC, Kronecker, λ = 3"],
    "input projection, 1": ["input projection, 1"],
    "GEM": ["GEM"],
    "replay, a tenth, a quarter of each batch": ["replay 10%", "replay 25%"],
}
WITHOUT_OLD_TEXT = {
    "self-written text, a tenth of each batch": "self-written 10%, KL",
    "self-written text, a quarter": "self-written 25%, KL",
    "LwF, weight 0.3": "LwF, 0.3",
    "LwF, weight 1": "LwF, 1",
    "EWC, Kronecker, with self-written text, a quarter": "EWC, Kronecker + self-written 25%",
}
MEASURES = {
    "own_kl": "KL(old ‖ new) on text that the old model wrote",
    "new_kl": "KL(old ‖ new) on the new task's inputs",
    "absolute": "Σ∣Δ∣ of the weights",
    "distance": "‖Δ‖₂ of the weights",
    "penalty": "EWC's penalty, Σ FΔ²",
}


def text() -> Any:
    """Return all runs on two texts."""
    from bench.retention.text.results import Results

    return Results.from_record(load("text-demo.json"))


def constant_and_decayed(label: str) -> tuple[Any, Any]:
    """Return the method of a label with a constant learning rate, and with one that decays."""
    from bench.retention.text.runs import METHODS

    constant, decayed = (method for method in METHODS if method.label == label)
    return constant, decayed


def kept_at_cost(results: Any, method: Any) -> str:
    """Return what is kept at the end, and what that costs."""
    kept, cost = results.kept(method).mean, results.cost(method).mean
    return f"{in_points(kept)} at {in_points(cost)} %"


def in_points(fraction: float) -> str:
    """Return a part in per cent; a cost that rounds to nothing has no sign."""
    shown = f"{100 * fraction:.1f}"
    return "0.0" if shown == "-0.0" else with_minus(shown)


def on_the_way(results: Any, decayed: Any, cost: float) -> str:
    """Return what is kept on the way back to the old weights; a dash: some seed costs more."""
    from cl_optim.demo.report import in_percent

    kept = results.kept_at(decayed, cost)
    return "–" if math.isnan(kept.mean) else with_minus(in_percent(kept))


def beside_replay() -> list[str]:
    """Return the rows of what each method keeps of English."""
    results, made = text(), []
    for shown, labels in BESIDE_REPLAY.items():
        pairs = [constant_and_decayed(label) for label in labels]
        made.append(
            [
                shown,
                ", ".join(kept_at_cost(results, constant) for constant, _ in pairs),
                ", ".join(on_the_way(results, decayed, 0.02) for _, decayed in pairs),
            ]
        )
    return in_rows(made)


def without_old_text() -> list[str]:
    """Return the rows of what needs no old text."""
    results, made = text(), []
    for shown, label in WITHOUT_OLD_TEXT.items():
        constant, decayed = constant_and_decayed(label)
        ways = [on_the_way(results, decayed, cost) for cost in (0.01, 0.02)]
        ends = [kept_at_cost(results, method) for method in (constant, decayed)]
        measured = ways if ways[1] != "–" else ["–"]  # what costs too much at 2 % does at 1 %
        made.append([shown, *ends, ", ".join(measured)])
    return in_rows(made)


def text_numbers() -> dict[str, str]:
    """Return what is said of the two texts, at a cost of 2 %."""
    results = text()

    def decayed(label: str) -> Any:
        return constant_and_decayed(label)[1]

    numbers = {"runs": str(len(results.runs))}
    for key, label in (
        ("adamw", "AdamW"), ("replay10", "replay 10%"), ("replay25", "replay 25%"),
    ):  # fmt: skip
        kept = results.kept_at(decayed(label), 0.02)
        numbers[key] = in_points(kept.mean)
        numbers[f"{key}_half"] = in_points(kept.half_width)
    for key, label in (
        ("diagonal", "EWC, λ = 1"), ("kronecker", "EWC, Kronecker, λ = 1"),
        ("own", "self-written 25%, KL"),
    ):  # fmt: skip
        more = results.more_kept(decayed(label), decayed("AdamW"), 0.02)
        numbers[key] = in_points(more.mean)
        numbers[f"{key}_half"] = in_points(more.half_width)
    return numbers


def measures() -> list[str]:
    """Return the rows of what tells how much is forgotten."""
    from bench.retention.drift import best_first

    results = text()
    found = best_first([run.drift for run in results.runs], results.bits_lost)
    made = []
    for one in found:
        r_squared = f"{one.r_squared:.2f}"
        shown = f"**{r_squared}**" if one is found[0] else r_squared
        made.append([MEASURES[one.measure], shown, f"{one.rank:.2f}"])
    return in_rows(made)


def smollm() -> Any:
    """Return all runs of the pretrained model."""
    from bench.retention.pretrained.results import Results

    return Results.from_record(load("pretrained.json"))


def pretrained() -> list[str]:
    """Return the rows of the pretrained language model."""
    results = smollm()

    def shown(value: float, digits: int = 0) -> str:
        return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"

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


def pretrained_numbers() -> dict[str, str]:
    """Return how well each measure tells what the pretrained model forgets."""
    from bench.retention.drift import predictions

    results = smollm()
    numbers = {}
    for one in predictions([run.drift for run in results.runs], results.nats_lost):
        numbers[one.measure] = f"{one.r_squared:.2f}"
        numbers[f"{one.measure}_rank"] = f"{one.rank:.2f}"
    return numbers


PLACES: list[Table | Sentence | Hardware] = [
    Hardware("docs/results.md", "text-demo.json", "## A language model"),
    Table(
        "docs/results.md",
        "| | constant: kept, at its cost on Python | decay and interpolation: kept at a cost of "
        "2 % |",
        beside_replay,
    ),
    Sentence(
        "docs/results.md",
        "give plain AdamW {adamw}, and there the diagonal adds nothing ({diagonal} ± "
        "{diagonal_half}) and Kronecker importance {kronecker} ± {kronecker_half} points",
        text_numbers,
    ),
    Table(
        "docs/results.md",
        "| | constant: kept, at its cost on Python | decay | decay and interpolation, at a cost of "
        "1 %, 2 % |",
        without_old_text,
    ),
    Sentence(
        "docs/results.md",
        "a quarter of self-written text keeps {own} ± {own_half} points more than AdamW with the "
        "same decay and interpolation, and as much as a tenth of replayed old text ({replay10} ± "
        "{replay10_half}). A quarter of replayed text keeps more ({replay25})",
        text_numbers,
    ),
    Sentence("docs/results.md", "Over the {runs} runs of all methods", text_numbers),
    Table("docs/results.md", "| | R² of a line | rank correlation |", measures),
    Table(
        "docs/results.md",
        "| | cost on German, % | lost: prose | Python | sayings | kept, % | on the way back, at "
        "1 % | at 2 % | s a step | GiB |",
        pretrained,
    ),
    Sentence(
        "docs/results.md",
        "(R² {own_kl} over the runs, rank correlation {own_kl_rank}); ‖Δ‖ and KL on the new text "
        "do not ({distance}, {new_kl}), EWC's penalty in part ({penalty})",
        pretrained_numbers,
    ),
]
