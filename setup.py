"""Builds cl_optim._C and cl_optim._C_cuda. Everything declarative is in pyproject.toml.

Environment:
    CL_OPTIM_CUDA: 0 leaves the CUDA kernels out, 1 builds them for all GPUs ("80,90,100"). By
        default they are built for the GPUs that are there, if torch is a CUDA build and a toolkit
        is found.
    CL_OPTIM_CUDA_ARCHS: Compute capabilities to build them for instead, like "80,90"; the last one
        also as PTX, which later GPUs compile for themselves.
    CL_OPTIM_REQUIRE: Backends (cpu, cuda) that must build: without them the installation fails.
        cuda means CL_OPTIM_CUDA=1, too.
    CL_OPTIM_MANYLINUX: 1 makes the extension load with glibc 2.28 and GCC 8's libstdc++, too: for
        a wheel; see csrc/manylinux.cpp.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# The oldest torch that the extension runs with; see "LibTorch stable ABI" in torch's docs.
ABI_TARGET = "2.10"
# The oldest Python; one binary serves those after it (PEP 384).
PYTHON_ABI, PYTHON_TAG = "0x030A0000", "cp310"
TORCH = Path(torch.__file__).parent
HEADERS = [str(header) for header in Path("csrc").glob("*.h")]
ALL_ARCHS = ["80", "90", "100"]
REQUIRED = set(filter(None, os.environ.get("CL_OPTIM_REQUIRE", "").split(",")))
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]


def first_line(*command: str) -> str:
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return shown.stdout.splitlines()[0]


def hexadecimal(version: str) -> str:
    major, minor = (int(part) for part in version.split("."))
    return f"0x{major:02x}{minor:02x}000000000000"


def cuda_home() -> Path | None:
    """The toolkit: where CUDA_HOME says, else the usual place, else where nvcc says it lives."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # nvcc on the PATH may be a script elsewhere; a dry run names the toolkit it starts.
        shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-"], capture_output=True, text=True)
        tops = [line for line in shown.stderr.splitlines() if line.startswith("#$ TOP=")]
        candidates += [line.partition("=")[2] for line in tops]
    for candidate in filter(None, candidates):
        home = Path(candidate).resolve()
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def architectures(home: Path, everywhere: bool) -> list[str]:
    """What to compile for: what was asked for, else all, or the GPUs that are there."""
    asked = os.environ.get("CL_OPTIM_CUDA_ARCHS", "")
    if asked:
        return asked.split(",")
    if everywhere:
        return ALL_ARCHS
    command = [str(home / "bin" / "nvcc"), "--list-gpu-arch"]
    shown = subprocess.run(command, capture_output=True, text=True)
    known = [int(line.partition("_")[2]) for line in shown.stdout.split()]
    found = set()
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        # A GPU newer than the toolkit compiles the newest PTX for itself; none is for older ones.
        found.update(sorted(k for k in known if k <= 10 * major + minor)[-1:])
    return [str(a) for a in sorted(found)]


def extension(
    name: str,
    sources: list[str],
    macros: dict[str, str],
    library_dirs: tuple[str, ...] = (),
    **options: Any,
) -> Extension:
    macros = {
        "TORCH_TARGET_VERSION": hexadecimal(ABI_TARGET),
        "Py_LIMITED_API": PYTHON_ABI,
        "CL_OPTIM_ABI_TARGET": f'"{ABI_TARGET}"',
        "CL_OPTIM_TORCH_VERSION": f'"{torch.__version__}"',
        **macros,
    }
    return Extension(
        f"cl_optim.{name}",
        sources=[f"csrc/{source}" for source in sources],
        depends=HEADERS,
        include_dirs=[str(TORCH / "include")],
        define_macros=list(macros.items()),
        library_dirs=[str(TORCH / "lib"), *library_dirs],
        extra_compile_args=[*CXX_FLAGS, "-fvisibility=hidden"],
        language="c++",
        py_limited_api=True,
        **options,
    )


def cpu_extension() -> Extension:
    compiler = first_line(*os.environ.get("CXX", "c++").split(), "--version")
    sources: list[str] = []
    link_args: list[str] = []
    manylinux = os.environ.get("CL_OPTIM_MANYLINUX", "")
    if manylinux not in ("", "0", "1"):
        sys.exit(f"CL_OPTIM_MANYLINUX must be 0 or 1, not {manylinux!r}.")
    if manylinux == "1":
        sources = ["manylinux.cpp"]
        link_args = [
            *(f"-Wl,--wrap={name}" for name in ("pow", "dlsym")),
            "-Wl,--no-as-needed,-ldl",
        ]
    return extension(
        "_C",
        [
            *sources,
            "ewc_adamw_cpu.cpp",
            "gram_cpu.cpp",
            "importance_codec_cpu.cpp",
            "importance_histogram_cpu.cpp",
            "kronecker_shrink_cpu.cpp",
            "module.cpp",
            "nnqp_cpu.cpp",
        ],
        {"CL_OPTIM_COMPILER": f'"{compiler}"'},
        # Importing torch loads libtorch_cpu; the link only records that it is needed.
        libraries=["torch_cpu"],
        extra_link_args=link_args,
        optional="cpu" not in REQUIRED,
    )


def cuda_extension(home: Path, archs: list[str], optional: bool) -> Extension:
    built = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    return extension(
        "_C_cuda",
        ["ewc_adamw_cuda.cu", "library_cuda.cpp", "module_cuda.cpp", "nnqp_cuda.cu"],
        {
            "USE_CUDA": "1",
            "CL_OPTIM_NVCC": f'"nvcc {built.stdout.splitlines()[-1]}"',
            "CL_OPTIM_CUDA_ARCHS": f'"{",".join(archs)}"',
        },
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        library_dirs=(str(home / "lib64"),),
        optional=optional,
    )


class BuildExt(build_ext):  # type: ignore[misc]
    """setuptools' build_ext, with nvcc for .cu files."""

    def run(self) -> None:
        # Python would load these, of an earlier version, before the object that serves every one.
        for stale in Path("cl_optim").glob("_C*.cpython-*.so"):
            stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        ext.sources = [source for source in ext.sources if source not in kernels]
        macros = dict(ext.define_macros)
        archs = macros.get("CL_OPTIM_CUDA_ARCHS", "").strip('"').split(",")
        ext.extra_objects += [self.compile_cuda(source, archs) for source in kernels]
        super().build_extension(ext)

    def compile_cuda(self, source: str, archs: list[str]) -> str:
        home = cuda_home()
        assert home is not None
        target = Path(self.build_temp) / (source + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        command = [str(home / "bin" / "nvcc"), "-c", source, "-o", str(target), *codes]
        command += ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"nvcc could not compile {source}")
        return str(target)


def extensions() -> list[Extension]:
    unknown = REQUIRED - {"cpu", "cuda"}
    if unknown:
        sys.exit(f"CL_OPTIM_REQUIRE may name cpu and cuda, not {', '.join(sorted(unknown))}.")
    choice = os.environ.get("CL_OPTIM_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"CL_OPTIM_CUDA must be 0 or 1, not {choice!r}.")
    home = cuda_home()
    lacking = []
    if torch.version.cuda is None:
        lacking.append(f"torch {torch.__version__} is a build without CUDA")
    if home is None:
        lacking.append("no CUDA toolkit was found (set CUDA_HOME)")
    everywhere = choice == "1" or "cuda" in REQUIRED
    asked_for = everywhere or bool(os.environ.get("CL_OPTIM_CUDA_ARCHS"))
    if choice == "0" and asked_for:
        sys.exit(
            "CL_OPTIM_CUDA=0 leaves out the CUDA kernels that CL_OPTIM_CUDA_ARCHS or "
            "CL_OPTIM_REQUIRE asks for: unset one of them."
        )
    if lacking and asked_for:
        sys.exit(f"The CUDA kernels cannot be built: {' and '.join(lacking)}.")
    if choice == "0" or lacking or home is None:
        return [cpu_extension()]
    archs = architectures(home, everywhere)
    if not archs:
        return [cpu_extension()]
    return [cpu_extension(), cuda_extension(home, archs, optional=not asked_for)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
)
