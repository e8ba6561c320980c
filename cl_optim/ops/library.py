"""Which compiled kernels there are, and why one is not: the only place that loads them."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_optim.ops.warn import warn

INSTALL_HINT = {
    "cpu": "reinstall with a C++17 compiler, and CL_OPTIM_REQUIRE=cpu to see what stops the build",
    "cuda": "reinstall with a CUDA toolkit and CL_OPTIM_CUDA=1, which says what stops the build",
}
_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}


@dataclass(frozen=True)
class Backend:
    """One set of compiled kernels.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``, the device that the kernels run on.
        available: Whether the kernels are loaded.
        reason: Why they are not, as one sentence; empty where they are.
        info: What built them: compiler, torch version, vector instructions.
    """

    name: str
    available: bool
    reason: str = ""
    info: dict[str, str] = field(default_factory=dict)


@functools.cache
def backends() -> dict[str, Backend]:
    """Load the compiled kernels and say what became of each; the result is cached.

    Returns:
        ``{"cpu": Backend, "cuda": Backend}``.
    """
    cpu = _load_cpu()
    return {"cpu": cpu, "cuda": _load_cuda(cpu)}


def available(device_type: str) -> bool:
    """Whether compiled kernels for a ``torch.device.type`` are loaded."""
    backend = backends().get(device_type)
    return backend is not None and backend.available


def extension(device_type: str) -> Any:
    """The module of compiled kernels for a ``torch.device.type`` that has them."""
    return importlib.import_module(f"cl_optim.{_MODULES[device_type]}")


def explain(device_type: str) -> str:
    """One sentence on why there are no compiled kernels for a ``torch.device.type``."""
    backend = backends().get(device_type)
    if backend is None:
        return f"cl_optim has no compiled kernels for {device_type} tensors."
    return backend.reason


@functools.cache
def warn_once(sentence: str) -> None:
    """Say a thing once: that something runs on its slower reference, and why."""
    warn(sentence)


def _load_cpu() -> Backend:
    backend = _load("cpu")
    if backend.available:
        _register_fakes()
    return backend


def _load_cuda(cpu: Backend) -> Backend:
    if torch.version.cuda is None:
        return Backend("cuda", False, f"torch {torch.__version__} is a build without CUDA.")
    if not cpu.available:
        return Backend("cuda", False, "The CUDA kernels need the extension cl_optim._C as well.")
    return _load("cuda")


def _load(name: str) -> Backend:
    module = _MODULES[name]
    try:
        extension = importlib.import_module(f"cl_optim.{module}")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        what = "was not built" if missing else f"could not be loaded ({error})"
        hint = INSTALL_HINT[name]
        return Backend(name, False, f"The extension cl_optim.{module} {what}: {hint}.")
    return Backend(name, True, info=extension.build_info())


def _register_fakes() -> None:
    # Some operators only write into their arguments: nothing to infer for torch.compile or export.
    def in_place(*args: object, **kwargs: object) -> None:
        return None

    def gram_per_tensor(memory: list[Tensor], grads: list[Tensor]) -> Tensor:
        size = len(memory[0]) + 1
        return memory[0].new_empty(len(memory), size, size, dtype=torch.float64)

    def gram_dots_per_tensor(memory: list[Tensor], grads: list[Tensor]) -> Tensor:
        return memory[0].new_empty(len(memory), len(memory[0]) + 1, dtype=torch.float64)

    def nnqp(
        gram: Tensor, linear: Tensor, state: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = torch.empty_like(linear)
        return v, v.new_empty(len(v), dtype=torch.int8), v.new_empty(len(v))

    torch.library.register_fake("cl_optim::ewc_adamw_", in_place)
    torch.library.register_fake("cl_optim::log8_encode_", in_place)
    torch.library.register_fake("cl_optim::log8_decode_", in_place)
    torch.library.register_fake("cl_optim::importance_histogram_", in_place)
    torch.library.register_fake("cl_optim::gram_per_tensor", gram_per_tensor)
    torch.library.register_fake("cl_optim::gram_dots_per_tensor", gram_dots_per_tensor)
    torch.library.register_fake("cl_optim::gram_combine_", in_place)
    torch.library.register_fake("cl_optim::nnqp", nnqp)
