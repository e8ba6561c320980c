"""Compares gradients put together from what was captured with those that autograd computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The least dtype on the way decides how far rounding alone may take the two apart. What goes wrong
# (a use that was missed or counted twice, a wrong sample axis) changes a gradient by its own size.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE = 0.1
# A gradient that is zero but for rounding, as of a bias that softmax does not see, is compared with
# the model's largest: tolerance times floor is well above the dtype's epsilon.
_FLOOR = {torch.float64: 1e-5, torch.float32: 1e-5}
_COARSE_FLOOR = 1e-2
# Of float32 where a GPU may multiply it as TF32, with a rounding of 5e-4.
_TF32_TOLERANCE, _TF32_FLOOR = 5e-3, 0.1
# Length of what is kept of a gradient.
_WIDTH = 4096


def tolerance(dtype: torch.dtype) -> float:
    """Return how far rounding alone may take two computations in that dtype apart, relatively.

    Integers are not rounded.
    """
    return _TOLERANCE.get(dtype, _COARSE) if dtype.is_floating_point else 0.0


def may_be_tf32(tensor: Tensor) -> bool:
    """Return whether products of such a tensor may be TF32's; convolutions' are by default."""
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return any(setting.fp32_precision == "tf32" for setting in settings)


class SelfCheck:
    """The self-check of one batch: Σ_n w_n g_n as captured must be the gradient of Σ_n w_n ℓ_n.

    Of each gradient it keeps a sketch: the sum of its rows of 4096 elements, each with a random
    sign. The sketch of a difference has on average the difference's norm, and needs no memory.
    """

    def __init__(self) -> None:
        self._captured: dict[str, Tensor] = {}
        self._received: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._tf32: set[str] = set()
        self._least = torch.float64

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Take note of the dtypes that are computed in: a float64 model may have float32 parts."""
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.requires_grad:
                self._least = max(self._least, tensor.dtype, key=_epsilon)

    def capture(self, name: str, grad: Tensor, size: Tensor) -> None:
        """Take note of what was captured, and of √Σ_n ‖g_n‖²; several parts add.

        The size is what differences are compared with: the sum itself may nearly cancel.
        """
        _add(self._captured, name, _sketch(grad))
        _add(self._sizes, name, size)

    def receive(self, name: str, grad: Tensor) -> None:
        """Take note of what autograd computed; several parts add."""
        _add(self._received, name, _sketch(grad))

    def lower(self, name: str, tensor: Tensor) -> None:
        """Take note of the precision in which the parameter's gradient was computed of a tensor."""
        dtype = tensor.dtype
        self._dtypes[name] = max(self._dtypes.get(name, dtype), dtype, key=_epsilon)
        if may_be_tf32(tensor):
            self._tf32.add(name)

    def finish(self) -> dict[str, float]:
        """Return the parameters whose gradients differ, and by how much of their size.

        Waits for the device.
        """
        norms: dict[str, tuple[float, float]] = {}
        for name in {**self._received, **self._captured}:
            received, captured = self._received.get(name), self._captured.get(name)
            known = [sketch for sketch in (received, captured) if sketch is not None]
            difference = known[0] if len(known) == 1 else known[0] - known[1].to(known[0].device)
            size = max(float(sketch.norm()) for sketch in known)
            if name in self._sizes:
                size = max(size, float(self._sizes[name]))
            norms[name] = (float(difference.norm()), size)
        largest = max((size for _, size in norms.values()), default=0.0)
        wrong = {}
        for name, (difference_norm, size) in norms.items():
            dtype = self._dtypes.get(name, torch.float32)
            if dtype == torch.float64:
                dtype = self._least
            limit, floor = tolerance(dtype), _FLOOR.get(dtype, _COARSE_FLOOR)
            if name in self._tf32 and limit < _TF32_TOLERANCE:
                limit, floor = _TF32_TOLERANCE, _TF32_FLOOR
            error = difference_norm / max(size, floor * largest) if difference_norm else 0.0
            # A NaN is for others to complain about.
            if error > limit:
                wrong[name] = error
        return wrong


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = sums[name] + term if name in sums else term


def _sketch(grad: Tensor) -> Tensor:
    """Return the rows of the flattened gradient added up with random signs, in float64."""
    flat = grad.detach().reshape(-1)
    rows, rest = divmod(len(flat), _WIDTH)
    drawn = torch.randint(
        0, 2, (rows + 1,), generator=torch.Generator().manual_seed(rows), device="cpu"
    )
    signs = (2 * drawn - 1).to(flat)
    sketch = torch.zeros(_WIDTH, dtype=torch.float64, device=flat.device)
    sketch[:rest] = flat[rows * _WIDTH :]
    if rows:
        sketch += signs[:rows] @ flat[: rows * _WIDTH].view(rows, _WIDTH)
    return sketch
