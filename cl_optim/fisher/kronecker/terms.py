"""From sums to Kronecker factors: which way round a matrix is, and whether a bias is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cl_optim.fisher.kronecker.sums import FactorSums, Sums
from cl_optim.fisher.per_sample.rows import Way
from cl_optim.importance.kronecker.factors import Factors, Layout, Term, from_sums
from cl_optim.importance.kronecker.side import partition


class Units(NamedTuple):
    """What sums are to be multiplied by: of gradients, and of inputs and rows."""

    gradients: float
    counts: float


def factors(
    sums: FactorSums, units: Units, samples: float, skipped: Mapping[str, object]
) -> dict[str, Factors]:
    """Make the Kronecker factors of each matrix that has sums, with S by the product.

    Args:
        sums: Of all matrices.
        units: Theirs.
        samples: Number of samples in them.
        skipped: Parameters that are left out.
    """
    structure, made = sums.structure, {}
    for name in structure.shapes:
        if (ways := sums.ways.get(name)) is not None and name not in skipped:
            layout = _layout(sums, name, skipped)
            terms = _alike(list(_terms(layout, ways, units, structure.block)))
            made[name] = from_sums(
                layout, terms, samples, structure.block, structure.energy, name, structure.max_rank
            )
    return made


def _layout(sums: FactorSums, name: str, skipped: Mapping[str, object]) -> Layout:
    """Say how a weight lies in its matrix, by the ways that it is used as one.

    Where both ways round occur, rows of the weight are outputs: so it is with a table that is a
    head as well.
    """
    structure, ways = sums.structure, sums.ways[name]
    shape = structure.shapes[name]
    transposed = not any(way.forward for way, _ in ways)
    biases = {
        one.bias
        for (way, _), one in ways.items()
        if way.forward != transposed and not way.looked_up
    }
    layout = Layout(shape, transposed)
    bias = biases.pop() if len(biases) == 1 else None
    turned = {one.bias for (way, _), one in ways.items() if way.forward == transposed}
    inside = (
        bool(bias)
        and bias not in turned
        and structure.owners.get(bias or "") == name
        and structure.shapes[bias or ""] == (layout.outputs,)
        and bias not in skipped
    )
    return layout._replace(bias=bias) if inside else layout


def _terms(
    layout: Layout, ways: Mapping[tuple[Way, bool], Sums], units: Units, block: int
) -> Iterator[Term]:
    # A table that is multiplied by, too, has its directions from that: lookups have no rotation.
    multiplied = any(way.forward != layout.transposed and not way.looked_up for way, _ in ways)
    for (way, ones), sums in ways.items():
        same = way.forward != layout.transposed  # its inputs are the matrix's
        inputs, gradients = _mirrored(sums.inputs), _mirrored(sums.gradients)
        if ones and (layout.bias is None or not same):
            inputs = _without_last(inputs, inputs_of(layout, way), block)
        inputs, gradients = inputs * units.counts, gradients * units.gradients
        rows = float(sums.rows) * units.counts
        is_map = same and not (multiplied and way.looked_up)
        for group in range(way.groups):
            a, b = inputs[group], gradients[group]
            start = way.start + group * way.size if way.forward else 0
            if not same and layout.bias is not None:
                b = _with_last(b, layout.inputs, block)  # a lookup has no bias
            yield Term(a, b, rows, start, is_map) if same else Term(b, a, rows, 0, is_map)


def _alike(terms: list[Term]) -> list[Term]:
    """Take the diagonals of all outputs, where that of some is all that is known."""
    if all(term.outputs.dim() == terms[0].outputs.dim() for term in terms if term.is_map):
        return terms
    return [
        term
        if term.outputs.dim() == 1 or not term.is_map
        else term._replace(outputs=torch.block_diag(*term.outputs).diagonal())  # type: ignore[no-untyped-call]
        for term in terms
    ]


def inputs_of(layout: Layout, way: Way) -> int:
    """Return how many inputs a way of using a weight has, a bias's not included."""
    weight = layout._replace(bias=None)
    return weight.inputs if way.forward != layout.transposed else weight.outputs


def _mirrored(sums: Tensor) -> Tensor:
    """Make symmetric matrices of their upper triangles."""
    if sums.dim() == 2:
        return sums
    upper = sums.triu()
    return upper + upper.triu(1).mT


def _without_last(sums: Tensor, size: int, block: int) -> Tensor:
    """Take the last coordinate off: [groups, k, m, m] or [groups, size + 1]."""
    if sums.dim() == 2:
        return sums[:, :size]
    each = []
    for blocks in sums:
        whole = torch.block_diag(*blocks)[:size, :size]  # type: ignore[no-untyped-call]
        each.append(_cut(whole, *partition(size, block)))
    return torch.stack(each)


def _with_last(sums: Tensor, size: int, block: int) -> Tensor:
    """Add a last coordinate of zeros, to [k, m, m] or [size − 1]."""
    if sums.dim() == 1:
        return torch.nn.functional.pad(sums, (0, 1))
    whole = torch.block_diag(*sums)[: size - 1, : size - 1]  # type: ignore[no-untyped-call]
    return _cut(whole, *partition(size, block))


def _cut(matrix: Tensor, blocks: int, width: int) -> Tensor:
    """Return the blocks on the diagonal of [n, n], with zeros beyond it: [k, m, m]."""
    around = blocks * width - len(matrix)
    whole = torch.nn.functional.pad(matrix, (0, around, 0, around))
    places = [slice(start, start + width) for start in range(0, blocks * width, width)]
    return torch.stack([whole[place, place] for place in places])
