"""How far training went, by several measures, and which of them says how much is forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from torch import Tensor, nn

from cl_optim.demo.picture import STYLE
from cl_optim.retention import divergence


@dataclass(frozen=True)
class Drift:
    """How far a model is from the old one.

    Attributes:
        new_kl: KL(old ‖ new) on the new task's inputs, nats per position.
        own_kl: On text that the old model wrote.
        distance: ‖θ − θ*‖₂.
        absolute: Σ|θ − θ*|.
        penalty: Σ F (θ − θ*)², of the old task's diagonal Fisher information.
    """

    new_kl: float
    own_kl: float
    distance: float
    absolute: float
    penalty: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        old: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        new_inputs: Iterable[Tensor],
        own_inputs: Iterable[Tensor],
    ) -> Drift:
        """Measure it: ``old`` are the old weights, ``fisher`` of them, by parameter name."""
        squared, absolute, penalty = 0.0, 0.0, 0.0
        for name, param in model.named_parameters():
            delta = param.detach() - old[name]
            squared += float(delta.square().sum())
            absolute += float(delta.abs().sum())
            penalty += float((fisher[name] * delta.square()).sum())
        return cls(
            divergence(model, old, new_inputs),
            divergence(model, old, own_inputs),
            squared**0.5,
            absolute,
            penalty,
        )


NAMES = {
    "new_kl": "KL on the new task's inputs",
    "own_kl": "KL on self-written text",
    "distance": "‖Δ‖₂",
    "absolute": "Σ∣Δ∣",
    "penalty": "EWC's penalty, Σ FΔ²",
}


@dataclass(frozen=True)
class Prediction:
    """How well one measure says what is forgotten.

    Attributes:
        measure: A name of :class:`Drift`'s.
        r_squared: The part of the variance of what is forgotten that a straight line explains.
        rank: Spearman's rank correlation.
    """

    measure: str
    r_squared: float
    rank: float


def predictions(drifts: Sequence[Drift], forgotten: Sequence[float]) -> list[Prediction]:
    """Return how well each measure predicts what runs forget; NaN where it does not vary."""
    from scipy.stats import pearsonr, spearmanr

    found = []
    for measure in NAMES:
        values = [getattr(drift, measure) for drift in drifts]
        if len(set(values)) < 2 or len(set(forgotten)) < 2:
            found.append(Prediction(measure, float("nan"), float("nan")))
            continue
        r = float(pearsonr(values, forgotten).statistic)
        found.append(Prediction(measure, r**2, float(spearmanr(values, forgotten).statistic)))
    return found


def best_first(drifts: Sequence[Drift], forgotten: Sequence[float]) -> list[Prediction]:
    """Return these, beginning with what predicts best."""
    return sorted(predictions(drifts, forgotten), key=lambda one: -one.r_squared)


def table(drifts: Sequence[Drift], forgotten: Sequence[float], table_box: box.Box) -> Table:
    """Return the measures, the best first."""
    shown = Table(box=table_box)
    shown.add_column("Measure")
    for name in ("R² of a line", "rank correlation"):
        shown.add_column(name, justify="right")
    for one in best_first(drifts, forgotten):
        shown.add_row(NAMES[one.measure], f"{one.r_squared:.2f}", f"{one.rank:.2f}")
    return shown


def draw(
    drifts: Sequence[Drift],
    forgotten: Sequence[float],
    colours: Sequence[str],
    unit: str,
    path: Path,
) -> None:
    """Draw what each run forgets against each measure.

    Args:
        drifts: Of runs.
        forgotten: How much each forgets.
        colours: Of the runs' methods.
        unit: Of what is forgotten.
        path: Of a PNG.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3 * len(NAMES), 3.2), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        all_axes: Any = figure.subplots(1, len(NAMES), sharey=True)
        for axes, one in zip(all_axes, predictions(drifts, forgotten), strict=True):
            x = np.array([getattr(drift, one.measure) for drift in drifts])
            axes.scatter(x, forgotten, c=list(colours), s=12)
            axes.set_title(f"R² = {one.r_squared:.2f}", loc="left", fontweight="bold")
            axes.set_xlabel(NAMES[one.measure])
            axes.grid(color="#d9d9d9", linewidth=0.6)
            axes.set_axisbelow(True)
        all_axes[0].set_ylabel(f"forgotten, {unit}")
        figure.savefig(path)
