"""What figures depend on beside the code: processor, versions, commit and date."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import cl_optim
from cl_optim.ops import library


def machine() -> dict[str, Any]:
    """Return what figures depend on, and no host name."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        **versions(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "backends": {name: backend.info for name, backend in library.backends().items()},
    }


def sentence(told: Mapping[str, Any]) -> str:
    """Say on what machine figures were measured, which `machine` has told."""
    cpu, threads = told["backends"]["cpu"], told["threads"]
    simd, compiler = ("no kernels built", "")
    if cpu:
        simd, compiler = cpu["simd"], f", GCC {cpu['compiler'].split()[-1]}"
    code = f"commit {told['commit']}" if told["commit"] else f"cl_optim {told['cl_optim']}"
    return (
        f"On a machine with {threads} thread{'s' * (threads != 1)}: {told['processor']}, {simd}; "
        f"Python {told['python']}, torch {told['torch']}{compiler}; {code}, {told['date']}."
    )


def versions() -> dict[str, str]:
    """Return those of everything that makes the numbers."""
    return {
        "cl_optim": cl_optim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].replace("(R)", "").strip()
    return platform.processor()


def _commit() -> str | None:
    """Return that of the checkout which the package stands in, if it does."""
    checkout = Path(cl_optim.__file__).parents[1]
    if not (checkout / ".git").exists():  # installed, perhaps somewhere in another's checkout
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
