"""What the evaluations say along the way from the old weights to the new."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from cl_optim.retention.guard.evaluation import Measured
from cl_optim.retention.tables import as_lines, as_rich

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Point:
    """One set of weights on the way.

    Attributes:
        alpha: How far from the old weights, 0, to the new ones, 1.
        measured: One entry for each evaluation; the baseline is what was given for it, or else
            that of the old weights.
        loss: The largest part of its baseline that an old task has lost; ∞ where a number is not
            finite.
    """

    alpha: float
    measured: tuple[Measured, ...]

    @property
    def loss(self) -> float:
        """The largest relative loss of an old task; ∞ where any number is not finite."""
        if not all(math.isfinite(one.value) for one in self.measured):
            return math.inf
        return max(one.loss for one in self.measured if one.evaluation.role == "old")


@dataclass(frozen=True)
class Curve:
    """All that was measured on the way, and which weights were chosen.

    Attributes:
        points: Ascending in alpha.
        alpha: Of the model's weights now: 1 where they are the new ones.
        budget: The part of an old task that may be lost; None where nothing was to be chosen.
    """

    points: tuple[Point, ...]
    alpha: float
    budget: float | None = None

    @property
    def chosen(self) -> Point | None:
        """The point of the model's weights; None where it was not measured."""
        return next((point for point in self.points if point.alpha == self.alpha), None)

    @property
    def monotone(self) -> bool:
        """Whether more is lost the farther the weights are from the old ones."""
        losses = [point.loss for point in self.points]
        return all(a <= b for a, b in pairwise(losses))

    @property
    def sentence(self) -> str:
        """What was chosen, and why."""
        if self.budget is None:
            return f"The model's weights are those of α = {self.alpha:g}."
        chosen = self.chosen
        if chosen is not None and chosen.loss > self.budget:
            return (
                f"Nothing that was tried fits a budget of {self.budget:.1%}, nor do the old "
                f"weights: least is lost at α = {chosen.alpha:.3g}, {chosen.loss:.1%}."
            )
        lost = "" if chosen is None else f", which loses {chosen.loss:.1%}"
        text = f"Of a budget of {self.budget:.1%} the most that fits is α = {self.alpha:.3g}{lost}."
        if not self.monotone:
            text += (
                " Losses do not rise all the way: a larger α that was not tried may fit, too; "
                "interpolation_curve() shows more of it."
            )
        return text

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the names of columns, and a row for each α."""
        names = [one.evaluation.name for one in self.points[0].measured] if self.points else []
        rows = [
            [
                f"{point.alpha:.3g}{' *' if point.alpha == self.alpha else ''}",
                *(f"{one.value:.4g}" for one in point.measured),
                f"{point.loss:+.1%}",
            ]
            for point in self.points
        ]
        return ["α", *names, "lost, at most"], rows

    def __str__(self) -> str:
        """Return the table as text; rich prints a nicer one."""
        return "\n".join([*as_lines(*self._rows()), self.sentence])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        return Group(as_rich(*self._rows()), Text(self.sentence))

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of it, as PNG, PDF or SVG by the path's suffix.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: Nothing was measured.
        """
        if not self.points:
            raise ValueError("nothing was measured: there is nothing to draw.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        alphas = [point.alpha for point in self.points]
        for index, first in enumerate(self.points[0].measured):
            losses = [100 * point.measured[index].loss for point in self.points]
            style = "o-" if first.evaluation.role == "old" else "o--"
            axes.plot(alphas, losses, style, label=first.evaluation.name, markersize=3)
        if self.budget is not None:
            axes.axhline(100 * self.budget, color="#777777", linewidth=0.8)
        axes.axvline(self.alpha, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_xlabel("α: from the old weights to the new")
        axes.set_ylabel("lost against the old weights, %")
        axes.legend(frameon=False)
        figure.savefig(path)


def ascending(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return points in the order of alpha."""
    return tuple(sorted(points, key=lambda point: point.alpha))
