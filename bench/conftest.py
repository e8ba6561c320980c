from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What the figures depend on, and no host name."""
    from cl_optim.ops import library

    machine_info.clear()
    machine_info.update(
        processor=_processor(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        backends={name: backend.info for name, backend in library.backends().items()},
    )
