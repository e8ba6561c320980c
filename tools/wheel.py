"""Builds dist/*.whl, and lets auditwheel and abi3audit see what they need of a machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DIST = Path("dist")
# Libraries of torch, which the user's torch has loaded by then.
TORCHS = ("libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libtorch.so")
MACHINE = platform.machine()


def run(*command: str | Path, **environment: str) -> None:
    """Run a command of this Python's environment; its failure is this one's."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path, **environment})


def build(number: str, tag: str, **environment: str) -> Path:
    """Build a wheel, and give it the tag of the oldest machine that it runs on."""
    with tempfile.TemporaryDirectory() as folder:
        made, repaired = Path(folder, "made"), Path(folder, "repaired")
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
        shutil.rmtree("build", ignore_errors=True)  # an object of another kind would be taken over
        run(*pip, "--wheel-dir", made, ".", **environment)
        (wheel,) = made.glob("*.whl")
        excluded = [f"--exclude={library}" for library in TORCHS]
        run("auditwheel", "repair", f"--plat={tag}", *excluded, "-w", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
        if number:
            run("wheel", "tags", "--remove", f"--build={number}", wheel)
            (wheel,) = repaired.glob("*.whl")
        run("abi3audit", "--strict", wheel)
        DIST.mkdir(exist_ok=True)
        return Path(shutil.move(wheel, DIST / wheel.name))


def main() -> None:
    """Build what this machine can."""
    shutil.rmtree(DIST, ignore_errors=True)
    plain = {"CL_OPTIM_CUDA": "0", "CL_OPTIM_MANYLINUX": "1", "CL_OPTIM_REQUIRE": "cpu"}
    print(build("", f"manylinux_2_28_{MACHINE}", **plain))
    if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists():
        kernels = {"CL_OPTIM_CUDA": "1", "CL_OPTIM_REQUIRE": "cpu,cuda"}
        print(build("1cuda", "auto", **kernels))


if __name__ == "__main__":
    main()
