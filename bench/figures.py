"""Figures in Markdown, made of the files in bench/results.

    python bench/figures.py [--check]

Tables are made anew and numbers in sentences filled in; --check only compares, and fails where a
page says something else than the files. What is measured anew then stands wherever it is told.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import cost_figures
import kept_figures
import language_figures
import summary
from places import ROOT, Hardware, Sentence, Table, in_rows, load, three

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


PLACES = [
    *suite_tables(),
    *cost_figures.PLACES,
    *kept_figures.PLACES,
    *language_figures.PLACES,
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
