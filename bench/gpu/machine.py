"""What the figures depend on: packages and hardware.

`python -m gpu.machine` says what is missing of the packages, before anything needs it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

# What the package needs, what the stages need, and what takes part if it is there.
NEEDED = ("torch", "numpy", "safetensors", "xxhash")
FOR_STAGES = ("triton", "transformers", "pytest", "pytest-xdist", "hypothesis")
OPTIONAL = ("peft", "expecttest", "torchjd")


def versions() -> dict[str, str | None]:
    """Of the packages; None where one is missing."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in (*NEEDED, *FOR_STAGES, *OPTIONAL)}


def header(device: str) -> dict[str, object]:
    """Hardware and versions, for ``"cuda"`` or a rehearsal."""
    import torch

    from cl_optim.ops import library

    hardware: object = "a rehearsal on a CPU: no figure means anything"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        hardware = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "bytes of second-level cache": properties.L2_cache_size,
        }
    return {
        "device": hardware,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": versions(),
        "backends": {name: backend.info for name, backend in library.backends().items()},
        "sources": os.environ.get("SOURCES"),
    }


def main() -> None:
    found = versions()
    print(*(f"{name} {version}" for name, version in found.items() if version), sep=", ")
    missing = [name for name, version in found.items() if version is None]
    print("missing:", ", ".join(missing) or "nothing")
    needed = [name for name in missing if name not in OPTIONAL]
    if needed:
        sys.exit(f"Stages will fail that need {', '.join(needed)}.")


if __name__ == "__main__":
    main()
