"""Kronecker importances of random inputs, and a projection by its definition, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl_optim.importance.kronecker.factors import Factors, Layout, Term, from_sums
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.importance.kronecker.side import ENERGY, partition


def factors(layout: Layout, inputs: Tensor, block: int = 2048, energy: float = 1.0) -> Factors:
    """Of a matrix that met these rows, [rows, in] with the bias's ones; diagonal if block = 0."""
    inputs = inputs.double()
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(len(inputs), layout.outputs, dtype=torch.float64, generator=generator)
    if block:
        sums = cut(inputs.T @ inputs, *partition(layout.inputs, block))
    else:
        sums = inputs.square().sum(0)
    outputs = cut(grads.T @ grads, *partition(layout.outputs, 2048))
    term = Term(sums, outputs, rows=len(inputs))
    return from_sums(layout, [term], len(inputs), block or 2048, energy, "a matrix")


def cut(matrix: Tensor, blocks: int, width: int) -> Tensor:
    """The blocks on the diagonal, [k, m, m], with zeros beyond the last one's coordinates."""
    found = matrix.new_zeros(blocks, width, width)
    for number, place in enumerate(range(0, len(matrix), width)):
        part = matrix[place : place + width, place : place + width]
        found[number, : len(part), : len(part)] = part
    return found


def rows(size: int, count: int, rank: int, seed: int, bias: bool = True) -> Tensor:
    """Random inputs from a subspace, float64; with the bias's ones as the last column."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, size, dtype=torch.float64, generator=generator)
    found = torch.randn(count, rank, dtype=torch.float64, generator=generator) @ basis
    return torch.cat([found, torch.ones(count, 1, dtype=torch.float64)], 1) if bias else found


def importance(
    model: nn.Module, inputs: Mapping[str, Tensor], block: int = 2048
) -> KroneckerImportance:
    """Of the weights that are named, with the biases that the inputs have a column for."""
    params = dict(model.named_parameters())
    found = {}
    for name, x in inputs.items():
        weight, bias = params[name], name.removesuffix("weight") + "bias"
        has_bias = x.shape[1] == weight[0].numel() + 1
        found[name] = factors(
            Layout(tuple(weight.shape), False, bias if has_bias else None), x, block
        )
    covered = {*found} | {one.layout.bias for one in found.values()}
    sums = {n: torch.ones(p.shape) for n, p in params.items() if n not in covered}
    return KroneckerImportance(found, sums, samples=10)


def second_moment(inputs: Tensor) -> Tensor:
    """A = E[ããᵀ], float64."""
    inputs = inputs.double()
    return inputs.T @ inputs / len(inputs)


def low_rank(a: Tensor, energy: float = ENERGY) -> Tensor:
    """What an importance keeps of A: leading directions, and of the others the mean eigenvalue."""
    u, values, _ = torch.linalg.svd(a)
    rank = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    values = values.clone()
    values[rank:] = values[rank:].mean() if rank < len(a) else 0.0
    return (u * values) @ u.T


def soft(a: Tensor, strength: float) -> Tensor:
    """(I + κΣA)⁻¹, κ = strength / mean eigenvalue, by a matrix inverse."""
    kappa = strength * len(a) / a.trace()
    return torch.linalg.inv(torch.eye(len(a), dtype=torch.float64) + kappa * a)


def hard(a: Tensor, energy: float) -> Tensor:
    """The projector on what is orthogonal to the directions of the largest singular values."""
    u, values, _ = torch.linalg.svd(a)
    rank = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    return torch.eye(len(a), dtype=torch.float64) - u[:, :rank] @ u[:, :rank].T


def stacked(layer: nn.Module) -> Tensor:
    """The matrix W̃ of a layer, float64: a copy."""
    weight = layer.weight.detach().double().flatten(1)
    if layer.bias is None:
        return weight.clone()
    return torch.cat([weight, layer.bias.detach().double().unsqueeze(1)], 1)
