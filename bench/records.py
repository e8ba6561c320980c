"""Files of results: what was measured, on what machine, and by a script of which arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_optim.demo.machine import machine
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


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, with the machine that they are of, if a file was named."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
