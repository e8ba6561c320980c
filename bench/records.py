"""Files of results: what was measured, on what machine, and by a script of which arguments."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cl_optim.ops import library


def parser(doc: str) -> argparse.ArgumentParser:
    """Return what parses a script's arguments, with the file of its figures among them.

    Raises:
        SystemExit: The compiled kernels are not here, whose costs are to be measured.
    """
    if not library.available("cpu"):
        raise SystemExit(library.explain("cpu"))
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="where the figures go")
    return made


def machine() -> dict[str, Any]:
    """Return what figures depend on, and no host name."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
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
    return (
        f"On a machine with {threads} thread{'s' * (threads != 1)}: {told['processor']}, {simd}; "
        f"Python {told['python']}, torch {told['torch']}{compiler}; "
        f"commit {told['commit']}, {told['date']}."
    )


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, with the machine that they are of, if a file was named."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


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


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
