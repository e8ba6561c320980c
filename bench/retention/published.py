"""Published figures beside measured ones: ``python -m bench.retention published``.

None of the published settings is the demo's, so that the figures are no test of each other: what is
to be compared is which methods keep what was learned, and how much. Each row says what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from cl_optim.demo import metrics
from cl_optim.demo.experiments import A_GEM_10, ADAMW, EWC_GRADIENT, GEM_10
from cl_optim.demo.report import Results


@dataclass(frozen=True)
class Published:
    """A figure from the literature.

    Attributes:
        scenario: Of the demo: what it is set beside.
        method: Key of the demo's method.
        acc: Mean accuracy over all tasks at the end, in per cent, as printed.
        source: Paper, or repository at a commit.
        place: Where the figure stands in it: file and row.
        setting: Data, network and training.
    """

    scenario: str
    method: str
    acc: str
    source: str
    place: str
    setting: str


_SPLIT = "Split MNIST 5×2, one head each; MLP 2×400, Adam 1e-3, 2000 steps of 128; 30 seeds"
_AVALANCHE = "ContinualAI/continual-learning-baselines@4900462"
_VAN_DE_VEN = "van de Ven 2025, arXiv:2502.11756v1"
_TARGETS = "tests/target_results.csv"
_GEM = "MLP 2×100, SGD 0.1, batches of 10; margin 0.5, 1000 samples kept per task"

PUBLISHED = (
    Published("split", ADAMW.key, "85.41 ± .88", _VAN_DE_VEN, "results, Split MNIST", _SPLIT),
    Published(
        "split", EWC_GRADIENT.key, "99.12 ± .16", _VAN_DE_VEN,
        "results, Split MNIST", f"{_SPLIT}; online EWC",
    ),
    Published(
        "permuted", EWC_GRADIENT.key, "83", _AVALANCHE, f"{_TARGETS}, row ewc,pmnist",
        "Permuted MNIST, 10 tasks; MLP 1×512, SGD 1e-3, 10 epochs of 256; λ = 1",
    ),
    Published(
        "permuted", GEM_10.key, "80", _AVALANCHE, "README.md, row Permuted MNIST, GEM",
        f"Permuted MNIST, 17 tasks; {_GEM}",
    ),
    Published(
        "permuted", GEM_10.key, "93", _AVALANCHE,
        f"{_TARGETS}, row gem,pmnist (tests/gem/experiment.py: 5 tasks)",
        f"Permuted MNIST, 5 tasks; {_GEM}",
    ),
    Published(
        "permuted", A_GEM_10.key, "81", _AVALANCHE, f"{_TARGETS}, row agem,pmnist",
        "Permuted MNIST, 17 tasks; MLP 2×256, SGD 0.1; 250 samples kept per task",
    ),
)  # fmt: skip


def table(results: list[Results], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Return a row for each published figure whose method was run."""
    shown = Table(box=style, show_lines=style is not box.MARKDOWN)
    for header in ("Method", "measured", "published", "measured on", "published for", "source"):
        shown.add_column(header, no_wrap=header in ("Method", "measured", "published"))
    for result in results:
        config = result.experiment.config
        setting = (
            f"{result.experiment.name}, {config.tasks} tasks; MLP 1×{config.hidden}, AdamW, "
            f"{config.epochs} epochs of {config.batch_size}; {len(result.seeds)} seeds"
        )
        methods = {method.key: method for method in result.methods}
        for figure in PUBLISHED:
            method = methods.get(figure.method)
            if method is None or figure.scenario != result.experiment.scenario:
                continue
            acc = result.interval(method, metrics.acc)
            measured = f"{100 * acc.mean:.2f} ± {100 * acc.half_width:.2f}"
            source = f"{figure.source}, {figure.place}"
            row = (method.label, measured, figure.acc, setting, figure.setting, source)
            shown.add_row(*row)
    return shown
