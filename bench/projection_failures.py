"""Where GEM's projection goes wrong: ours beside the published one and TorchJD's DualProj.

Prints, for each case, the most negative cosine between the projected gradient and a memory row: it
should be 0, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import published, torchjd
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cl_optim import functional as F

ROWS, DIMENSIONS = 8, 1000


def ours(grad: Tensor, memory: Tensor) -> Tensor:
    return F.gem_project(grad, memory)[0]


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    memory = torch.randn(ROWS, DIMENSIONS)
    grad = torch.randn(DIMENSIONS) - memory.mean(0) * 2
    scaled = memory * 10 ** torch.linspace(-8, 8, ROWS)[:, None]
    one_large = memory.clone()
    one_large[0] *= 100
    repeated = torch.cat([memory, memory[:3]])
    result = {"regular": (grad, memory)}
    for scale in (0.1, 0.03, 0.01, 1e-4):
        result[f"all gradients × {scale:g}"] = (grad * scale, memory * scale)
    result["one row × 100"] = (grad, one_large)
    result["rows × 1e-8 to 1e8"] = (grad, scaled)
    result["three rows twice"] = (grad, repeated)
    result["a row of zeros"] = (grad, torch.cat([memory, torch.zeros(1, DIMENSIONS)]))
    return result


def least_cosine(project: Callable[[Tensor, Tensor], Tensor], grad: Tensor, memory: Tensor) -> str:
    try:
        projected = project(grad, memory).double()
    except ValueError as error:
        return f"raises: {error}"
    rows = memory.double()
    norms = rows.norm(dim=1)
    cosines = (rows @ projected)[norms > 0] / norms[norms > 0] / projected.norm()
    return f"{min(cosines.min().item(), 0.0):.1e}"


def main() -> None:
    table = Table(box=box.MARKDOWN)
    contenders = {
        "cl_optim": ours,
        "published, ε = 1e-3": published.project,
        "published, ε = 0": lambda grad, memory: published.project(grad, memory, epsilon=0.0),
        "TorchJD DualProj": torchjd.project,
    }
    for column in ("", *contenders):
        table.add_column(column, justify="right" if column else "left")
    for name, (grad, memory) in cases().items():
        table.add_row(name, *(least_cosine(p, grad, memory) for p in contenders.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
