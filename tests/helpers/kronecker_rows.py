"""What Kronecker factors are compared with: sums over rows, by hooks on modules, in float64.

One sample at a time, without padding, by plain autograd: no code is shared with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_optim.importance.kronecker.factors import Factors
from cl_optim.importance.kronecker.importance import KroneckerImportance

# Of one forward pass: losses, each with a weight.
Losses = Callable[[nn.Module, int], list[tuple[float, Tensor]]]


@dataclass
class Sums:
    """Of one module, and of one of its groups: Σ ããᵀ, Σ bbᵀ, rows; an embedding's ã is one-hot."""

    looked_up: bool
    group: int
    groups: int
    a: Tensor | float = 0.0
    g: Tensor | float = 0.0
    rows: int = 0


@dataclass
class Met:
    module: nn.Module
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def is_map(module: nn.Module) -> bool:
    maps = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    return isinstance(module, maps) or type(module).__name__ == "Conv1D"


def rows_of_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """[groups, rows, in], with a 1 where there is a bias."""
    if isinstance(module, nn.Embedding):
        x = x[x != module.padding_idx] if module.padding_idx is not None else x
        return F.one_hot(x.flatten(), module.num_embeddings).double().unsqueeze(0)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        flat = isinstance(module, nn.Conv1d)
        x = x.unsqueeze(-1) if flat else x
        settings = [module.kernel_size, module.dilation, module.padding, module.stride]
        if flat:
            fill = (1, 1, 0, 1)
            settings = [(*one, more) for one, more in zip(settings, fill, strict=True)]
        columns = F.unfold(x, *settings).view(len(x), module.groups, -1, _positions(x, settings))
        rows = columns.permute(1, 0, 3, 2).flatten(1, 2)
    else:
        rows = x.flatten(0, -2).unsqueeze(0)
    if module.bias is not None:
        rows = F.pad(rows, (0, 1), value=1.0)
    return rows


def _positions(x: Tensor, settings) -> int:
    (kernel, dilation, padding, stride), total = settings, 1
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        total *= (x.shape[2 + i] + 2 * padding[i] - reach) // stride[i] + 1
    return total


def rows_of_gradients(module: nn.Module, b: Tensor) -> Tensor:
    """[groups, rows, out]."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        b = b.flatten(2).view(len(b), module.groups, -1, b[0, 0].numel())
        return b.permute(1, 0, 3, 2).flatten(1, 2)
    return b.flatten(0, -2).unsqueeze(0)


def sums_of(model: nn.Module, losses: Losses, samples: int) -> dict[str, list[Sums]]:
    """The sums of each weight, in each module that has it, in each of its groups."""
    model = copy.deepcopy(model).double()
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[Sums]] = {}
    met = [Met(module) for module in model.modules() if is_map(module)]
    hooks = []
    for one in met:

        def hear(module, args, output, one=one):
            one.inputs.append(args[0].detach())
            one.outputs.append(output)

        hooks.append(one.module.register_forward_hook(hear))
        groups = getattr(one.module, "groups", 1)
        if one.module.weight.requires_grad:
            looked_up = isinstance(one.module, nn.Embedding)
            sums = [Sums(looked_up, group, groups) for group in range(groups)]
            one.sums = sums
            found.setdefault(names[id(one.module.weight)], []).extend(sums)
    for n in range(samples):
        for one in met:
            one.inputs, one.outputs = [], []
        weighted = losses(model, n)
        trained = [one for one in met if one.module.weight.requires_grad]
        outputs = [output for one in trained for output in one.outputs]
        for one in trained:
            for x in one.inputs:
                for sums, rows in zip(one.sums, rows_of_inputs(one.module, x), strict=True):
                    sums.a = sums.a + rows.mT @ rows
                    sums.rows += len(rows)
        for weight, loss in weighted:
            grads = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
            each = iter(grads)
            for one in trained:
                for output in one.outputs:
                    b = next(each)
                    b = torch.zeros_like(output) if b is None else b
                    for sums, rows in zip(one.sums, rows_of_gradients(one.module, b), strict=True):
                        sums.g = sums.g + weight * rows.mT @ rows
    for hook in hooks:
        hook.remove()
    return found


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    assert error <= tolerance, (what, error)


def assert_factors(
    importance: KroneckerImportance,
    expected: dict[str, list[Sums]],
    samples: float,
    tolerance: float = 1e-5,
) -> None:
    """Both factors of each matrix, and S as the product says."""
    assert set(importance.factors) == set(expected)
    for name, terms in expected.items():
        factors = importance.factors[name]
        maps = [term for term in terms if not term.looked_up] or terms
        rows = sum(term.rows for term in maps)
        a = sum(term.a for term in maps) / rows
        g = sum(of_all_groups(term) for term in maps) / rows
        close(of_side(factors.input), a if factors.input.basis is not None else a.diag(),
              tolerance, f"inputs of {name}")  # fmt: skip
        close(of_side(factors.output), g if factors.output.basis is not None else g.diag(),
              tolerance, f"gradients of {name}")  # fmt: skip
        scale = torch.zeros_like(factors.scale, dtype=torch.float64)
        for term in maps:
            left = along(of_all_groups(term), factors.output)
            scale += torch.outer(left, along(term.a, factors.input)) / (term.rows * samples)
        for term in [term for term in terms if term not in maps]:
            right = F.pad(term.g, (0, factors.layout.inputs - len(term.g)) * 2)
            scale += torch.outer(along(term.a, factors.output), along(right, factors.input)) / (
                term.rows * samples
            )
        close(factors.scale, scale, tolerance, f"S of {name}")


def of_all_groups(term: Sums) -> Tensor:
    """Σ bbᵀ with zeros for the outputs of other groups."""
    assert isinstance(term.g, Tensor)
    parts = [torch.zeros_like(term.g)] * term.groups
    parts[term.group] = term.g
    return torch.block_diag(*parts)


def of_side(side) -> Tensor:
    return side.matrix() if side.basis is None else side.matrix()[0]


def along(matrix: Tensor, side) -> Tensor:
    """What each direction holds of a matrix, and in the end each direction of the tail."""
    if side.basis is None:
        return F.pad(matrix.diag(), (0, 1))
    basis = side.basis[0].double()
    each = (basis * (matrix @ basis)).sum(0)
    rest = (matrix.trace() - each.sum()) / side.rest if side.rest else each.new_zeros(())
    return torch.cat([each, rest[None]])


def exact_scales(
    model: nn.Module, losses: Losses, samples: int, factors: dict[str, Factors]
) -> dict[str, Tensor]:
    """S by its definition: the mean over samples of (U_Gᵀ g̃ U_A)², one sample at a time.

    Of the directions that are kept.
    """
    model = copy.deepcopy(model).double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {
        name: torch.zeros_like(one.scale[:-1, :-1], dtype=torch.float64)
        for name, one in factors.items()
    }
    for n in range(samples):
        for weight, loss in losses(model, n):
            grads = torch.autograd.grad(
                loss, list(named.values()), retain_graph=True, allow_unused=True
            )
            each = dict(zip(named, grads, strict=True))
            for name, one in factors.items():
                bias = one.layout.bias
                grad = each[name] if each[name] is not None else torch.zeros_like(named[name])
                matrix = one.layout.matrix(grad, None if bias is None else each[bias])
                found[name] += weight * whole(one.output, matrix, one.input).square() / samples
    return found


def whole(output, matrix: Tensor, input) -> Tensor:
    """UᵀW̃A with full matrices."""
    return dense(output).mT @ matrix @ dense(input)


def dense(side) -> Tensor:
    """The directions of a side as the columns of one matrix, float64."""
    if side.basis is None:
        return torch.eye(side.size, dtype=torch.float64)
    return torch.block_diag(*side.basis.double())[: side.size]


def data_losses(loss: Callable[[nn.Module, int], Tensor]) -> Losses:
    return lambda model, n: [(1.0, loss(model, n))]


def class_losses(x: Tensor) -> Losses:
    """The expectation over the model's own labels."""

    def losses(model: nn.Module, n: int) -> list[tuple[float, Tensor]]:
        log_p = model(x[n : n + 1].double())[0].log_softmax(-1)
        return [(float(p), -one) for p, one in zip(log_p.detach().exp(), log_p, strict=True)]

    return losses


def assert_alike(
    found: KroneckerImportance, expected: KroneckerImportance, tolerance: float = 1e-5
) -> None:
    """Two importances are of the same factors, however their directions are turned."""
    assert set(found.factors) == set(expected.factors)
    for name, one in expected.factors.items():
        other = found.factors[name]
        assert other.layout == one.layout
        close(other.input.matrix(), one.input.matrix(), tolerance, f"inputs of {name}")
        close(other.output.matrix(), one.output.matrix(), tolerance, f"gradients of {name}")
    assert set(found) == set(expected)
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).norm()) / max(float(value.norm()), 1e-6 * largest)
        assert error <= tolerance, (name, error)
