"""Files of results: what was measured, and on what."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from cl_optim.ops import library


def machine() -> dict[str, Any]:
    """Return what figures depend on, and no host name."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "backends": {name: backend.info for name, backend in library.backends().items()},
    }


def write(path: Path, **figures: Any) -> None:
    """Write figures as JSON, with the machine that they are of."""
    path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].replace("(R)", "").strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
