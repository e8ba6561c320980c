"""The operators' schemas, the compiled kernels, and the one answer to who computes what where."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from cl_optim.ops.warn import warn

INSTALL_HINT = {
    "cpu": "reinstall with a C++17 compiler, and CL_OPTIM_REQUIRE=cpu to see what stops the build",
    "cuda": "reinstall with a CUDA toolkit and CL_OPTIM_CUDA=1, which says what stops the build",
}
_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}

_F = TypeVar("_F", bound=Callable[..., Any])


# --- operators ------------------------------------------------------------------------------------


_LIBRARY = torch.library.Library("cl_optim", "DEF")  # type: ignore[no-untyped-call]
# Of each operator: who computes it, by device type, and the first compute capability for Triton's.
OPERATORS: dict[str, dict[str, str]] = {}
_CAPABILITY: dict[str, int] = {}


def define(schema: str, *, cpu: str = "", cuda: str = "", capability: int = 0) -> None:
    """Define an operator of ``torch.ops.cl_optim``.

    An operator that returns nothing only writes into its arguments: there is nothing to infer for
    torch.compile or export, and its fake is made here. Another needs a `fake`.

    Args:
        schema: In torch's notation.
        cpu: ``"compiled"`` where ``csrc`` has a kernel for the CPU; else nothing.
        cuda: ``"compiled"``, or ``"triton"`` where an `implementation` launches one; or nothing.
        capability: The first compute capability that the Triton kernel runs on, without what
            follows the point; 0 for any GPU.
    """
    operator = schema.partition("(")[0]
    OPERATORS[operator] = {"cpu": cpu, "cuda": cuda}
    _CAPABILITY[operator] = capability
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    if schema.endswith("-> ()"):
        fake(operator)(lambda *args, **kwargs: None)


def fake(operator: str) -> Callable[[_F], _F]:
    """Decorate a function that makes an operator's results, without their values."""
    return torch.library.register_fake(f"cl_optim::{operator}", lib=_LIBRARY)  # type: ignore[no-any-return]


def implementation(operator: str, *device_types: str) -> Callable[[_F], _F]:
    """Decorate a function that computes an operator on some types of devices."""

    def register(function: _F) -> _F:
        for device_type in device_types:
            _LIBRARY.impl(operator, function, device_type.upper())  # type: ignore[no-untyped-call]
        return function

    return register


# --- who computes them ----------------------------------------------------------------------------


def choose(operator: str, device: torch.device | str, warning: str = "") -> str:
    """Return who computes an operator on a device.

    Args:
        operator: Its name.
        device: A device, or the type of one.
        warning: What to warn of, once, where it is the reference; ``{}`` stands for the reason.

    Returns:
        ``"cpu"`` or ``"cuda"`` for compiled kernels, ``"triton"``, or ``"reference"``.
    """
    device_type = device if isinstance(device, str) else device.type
    kind = OPERATORS[operator].get(device_type, "")
    if kind == "compiled" and available(device_type):
        return device_type
    reason = why_not(operator, device)
    if not reason:
        return kind
    if warning:
        warn_once(warning.format(reason))
    return "reference"


def why_not(operator: str, device: torch.device | str) -> str:
    """Return why no kernel computes an operator on a device, in a sentence; nothing if one does."""
    device_type = device if isinstance(device, str) else device.type
    kind = OPERATORS[operator].get(device_type)
    if kind == "triton":
        return why_not_triton(device, _CAPABILITY[operator])
    if kind == "compiled" and available(device_type):
        return ""
    return explain(device_type) or f"{operator} has no kernel for {device_type} tensors."


@functools.cache
def why_not_triton(device: torch.device | str, capability: int) -> str:
    """Return why a Triton kernel cannot run on a GPU, in a sentence; nothing if it can."""
    if capability and torch.version.cuda is None:
        return f"The Triton kernel is for CUDA, and torch {torch.__version__} is built without."
    if capability:
        major, minor = torch.cuda.get_device_capability(device)
        if major < capability:
            return (
                f"The Triton kernel needs compute capability {capability}.0, and {device} has "
                f"{major}.{minor}."
            )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton."
    return ""


@functools.cache
def warn_once(sentence: str) -> None:
    """Say a thing once: that something runs on its slower reference, and why."""
    warn(sentence)


# --- the compiled kernels -------------------------------------------------------------------------


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
    cpu = _load("cpu")
    return {"cpu": cpu, "cuda": _load_cuda(cpu)}


def available(device_type: str) -> bool:
    """Return whether compiled kernels for a ``torch.device.type`` are loaded."""
    backend = backends().get(device_type)
    return backend is not None and backend.available


def extension(device_type: str) -> Any:
    """Return the module of compiled kernels for a ``torch.device.type`` that has them."""
    return importlib.import_module(f"cl_optim.{_MODULES[device_type]}")


def explain(device_type: str) -> str:
    """Say in one sentence why there are no compiled kernels for a ``torch.device.type``."""
    backend = backends().get(device_type)
    if backend is None:
        return f"cl_optim has no compiled kernels for {device_type} tensors."
    return backend.reason


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
