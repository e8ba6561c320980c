"""One use of a parameter, with what is beside it: the rows, a bias, which of the rows count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cl_optim.fisher.kronecker.padding import Kept
from cl_optim.fisher.per_sample.base import PerSample
from cl_optim.fisher.per_sample.rows import Rows, bias_range, output_range, rows_of


@dataclass(frozen=True)
class Used:
    """One use of a parameter.

    Attributes:
        grads: Its gradients of single samples.
        rows: The rows that make them; or why there are none.
        kept: Which rows are no padding, [rows]; ``None``: all.
        partner: Of a matrix, the bias that is added to just its outputs; of a bias, the matrix.
        bias: That bias's gradients.
    """

    grads: PerSample
    rows: Rows | str = ""
    kept: Tensor | None = None
    partner: str | None = None
    bias: PerSample | None = None


def used(
    pulled: Sequence[Mapping[str, PerSample]], kept: Kept, gathered: bool
) -> list[dict[str, Used]]:
    """Say how the parameters of one call are used.

    Args:
        pulled: For each of the tensors that were used, the gradients of its parameters, by name.
        kept: Which rows are no padding.
        gathered: Whether the rows are those of several samples in any order.
    """
    uses: list[dict[str, Used]] = []
    for each in pulled:
        uses.append({})
        for name, grads in each.items():
            rows = _GATHERED if gathered else rows_of(grads)
            mask = None if isinstance(rows, str) else kept.get(rows.leading)
            uses[-1][name] = Used(grads, rows, mask)
    _link(uses)
    return uses


_GATHERED = "its rows are gathered from several samples"


def _link(uses: Sequence[dict[str, Used]]) -> None:
    """Tell a matrix and the bias of the same outputs of each other."""
    alone = [(each, *next(iter(each.items()))) for each in uses if len(each) == 1]
    for matrices, weight, use in alone:
        if isinstance(use.rows, str) or use.rows.way.looked_up:
            continue
        outputs = output_range(use.rows, use.grads)
        for biases, bias, beside in alone:
            if bias_range(beside.grads) == outputs:
                matrices[weight] = replace(use, partner=bias, bias=beside.grads)
                biases[bias] = replace(beside, partner=weight)
