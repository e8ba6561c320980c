"""Kronecker factors of random rows, dense Fisher matrices, an importance of both kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_optim.importance.kronecker.factors import Factors, Layout, Term, from_sums
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.importance.kronecker.side import Side, partition


def by_block(sums: Tensor, block: int) -> Tensor:
    """The blocks on the diagonal of [n, n], with zeros beyond it."""
    blocks, width = partition(len(sums), block)
    whole = sums.new_zeros(blocks * width, blocks * width)
    whole[: len(sums), : len(sums)] = sums
    return torch.stack(
        [whole[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(blocks)]
    )


def gram(rows: int, size: int, seed: int, rank: int | None = None) -> Tensor:
    """Σ xxᵀ of random rows whose directions differ in size, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank or size, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank or size, size, generator=generator, dtype=torch.float64)
    x = x @ (mix * torch.logspace(0, -2, rank or size, dtype=torch.float64)[:, None])
    return x.mT @ x


def factors_of(
    layout: Layout,
    seed: int = 0,
    block: int = 2048,
    energy: float = 1.0,
    rows: int = 40,
    samples: float = 10,
    **of_term: Any,
) -> Factors:
    inputs, outputs = gram(rows, layout.inputs, seed), gram(rows, layout.outputs, seed + 1000)
    term = Term(by_block(inputs, block), by_block(outputs, block), rows, **of_term)
    return from_sums(layout, [term], samples, block, energy, "w")


def directions(side: Side) -> Tensor:
    """U, [n, rank], float64."""
    return side.vectors(torch.eye(side.rank)).double().mT


def projections(side: Side) -> Tensor:
    """Each uuᵀ, and I − UUᵀ, [rank + 1, n, n], float64."""
    u = directions(side)
    tail = torch.eye(side.size, dtype=torch.float64) - u @ u.mT
    return torch.cat([torch.einsum("nr,mr->rnm", u, u), tail[None]])


def dense(factors: Factors) -> Tensor:
    """The whole Fisher information, [out·in, out·in], float64."""
    p, q = projections(factors.output), projections(factors.input)
    whole = torch.einsum("jk,jab,kcd->acbd", factors.scale.double(), p, q)
    return whole.reshape(2 * [p.shape[1] * q.shape[1]])


def means(whole: Tensor, output: Side, input: Side) -> Tensor:
    """The mean of a Fisher information over each pair of projections: S by its definition."""
    p, q = projections(output), projections(input)
    whole = whole.view(2 * [output.size, input.size])
    sums = torch.einsum("acbd,jab,kcd->jk", whole, p, q)
    counts = torch.outer(*(one.diagonal(dim1=1, dim2=2).sum(1) for one in (p, q)))
    return torch.where(counts > 0.5, sums / counts, 0.0)


def importance_of(seed: int = 0, prefix: str = "", block: int = 2048) -> KroneckerImportance:
    """Of a linear map with a bias, a transposed one, a convolution, a table and a norm."""
    layouts = {
        "fc.weight": Layout((5, 7), bias=f"{prefix}fc.bias"),
        "mlp.weight": Layout((6, 4), transposed=True),
        "conv.weight": Layout((3, 2, 2, 2), bias=f"{prefix}conv.bias"),
    }
    factors = {
        prefix + name: factors_of(layout, 10 * seed + at, block, samples=4)
        for at, (name, layout) in enumerate(layouts.items())
    }
    generator = torch.Generator().manual_seed(seed)
    factors[f"{prefix}table.weight"] = from_sums(
        Layout((9, 3)),
        [Term(gram(20, 3, seed)[None], torch.rand(9, generator=generator).double() * 5, 20)],
        4,
        block,
        1.0,
        "table.weight",
    )
    sums = {f"{prefix}norm.weight": torch.rand(6, generator=generator) * 4}
    return KroneckerImportance(factors, sums, 4, 32, {"labels": "sample"})
