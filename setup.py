"""Builds cl_optim._C. Everything declarative is in pyproject.toml.

Environment: CL_OPTIM_REQUIRE=cpu turns a failed extension build into a failed installation.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup

# The oldest torch that the extension runs with; see "LibTorch stable ABI" in torch's docs.
ABI_TARGET = "2.10"
TORCH = Path(torch.__file__).parent
REQUIRED = set(filter(None, os.environ.get("CL_OPTIM_REQUIRE", "").split(",")))


def compiler_version() -> str:
    compiler = os.environ.get("CXX", "c++").split()
    try:
        shown = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return shown.stdout.splitlines()[0]


def hexadecimal(version: str) -> str:
    major, minor = (int(part) for part in version.split("."))
    return f"0x{major:02x}{minor:02x}000000000000"


def cpu_extension() -> Extension:
    definitions = {
        "TORCH_TARGET_VERSION": hexadecimal(ABI_TARGET),
        "CL_OPTIM_ABI_TARGET": f'"{ABI_TARGET}"',
        "CL_OPTIM_TORCH_VERSION": f'"{torch.__version__}"',
        "CL_OPTIM_COMPILER": f'"{compiler_version()}"',
    }
    return Extension(
        "cl_optim._C",
        sources=["csrc/ewc_adamw_cpu.cpp", "csrc/library.cpp", "csrc/module.cpp"],
        depends=[str(header) for header in Path("csrc").glob("*.h")],
        # pybind11's own headers come before the copy in torch's include folder.
        include_dirs=[pybind11.get_include(), str(TORCH / "include")],
        define_macros=list(definitions.items()),
        # Importing torch loads libtorch_cpu; the link only records that it is needed.
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu"],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
        ],
        language="c++",
        optional="cpu" not in REQUIRED,
    )


unknown = REQUIRED - {"cpu"}
if unknown:
    sys.exit(f"CL_OPTIM_REQUIRE may name cpu, not {', '.join(sorted(unknown))}.")
setup(ext_modules=[cpu_extension()])
