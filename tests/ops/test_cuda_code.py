"""The machine code of the CUDA kernels, without a GPU: vector accesses, registers and spills."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import CSRC

from cl_optim.ops import library

ARCHITECTURES = (80, 90, 100)
REGISTERS = 65536  # of a multiprocessor
PROXIMAL = 3  # of the enumeration of penalties
THREADS = 256  # of a block of the fused step
STACK = 128  # bytes per thread, for what is spilled


def tool(name: str) -> str | None:
    """A program of the toolkit; Triton brings some along, too."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    folders = [None, "/usr/local/cuda/bin", *([str(bundled)] if bundled else [])]
    found = [shutil.which(name, path=folder) for folder in folders]
    return next(filter(None, found), None)


@dataclass(frozen=True)
class Kernel:
    """A kernel's instructions, with how often each is there, and what a thread takes."""

    instructions: Counter[str]
    registers: int
    stack: int


@dataclass(frozen=True)
class Instance:
    """Which of the fused step's kernels it is, by the numbers of its enumerations."""

    arithmetic: str
    float32_storage: bool
    penalty: int
    projected: bool
    pull_only: bool = False


Kernels = dict[str, Kernel]


def compiled(folder: Path) -> list[Path]:
    """What holds the kernels for all architectures: the installed extension, or what nvcc makes."""
    backend = library.backends()["cuda"]
    if backend.info and set(map(str, ARCHITECTURES)) <= set(
        backend.info["architectures"].split(",")
    ):
        file = importlib.import_module("cl_optim._C_cuda").__file__
        assert file is not None
        return [Path(file)]
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("needs the CUDA kernels for all architectures, or nvcc to compile them")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    objects = []
    for source in CSRC.glob("*.cu"):
        objects.append(folder / f"{source.name}.o")
        command = [nvcc, "-std=c++17", "-O3", "--threads=2", "-c", str(source)]
        subprocess.run([*command, *codes, "-o", str(objects[-1])], check=True)
    return objects


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Kernels]:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, which Triton and the CUDA toolkit bring along")
    files = compiled(tmp_path_factory.mktemp("cubins"))

    def shown(file: Path, what: str, architecture: int) -> str:
        command = [cuobjdump, what, f"-arch=sm_{architecture}", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    result: dict[int, Kernels] = {}
    for architecture in ARCHITECTURES:
        kernels = result[architecture] = {}
        for file in files:
            usage = shown(file, "-res-usage", architecture)
            for part in shown(file, "-sass", architecture).split("Function : ")[1:]:
                name = part.split(maxsplit=1)[0]
                numbers = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
                assert numbers is not None
                # "/*0010*/  @!P0 LDG.E.128 R4, ..."
                found = re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part)
                kernels[name] = Kernel(Counter(found), int(numbers[1]), int(numbers[2]))
    return result


def instances(kernels: Kernels) -> dict[Instance, Kernel]:
    """The kernels of the fused step."""
    found = {}
    for name, kernel in kernels.items():
        key = re.search(
            r"ewc_adamwI([fd])LNS\d*_7StorageE(\d)ELNS_7PenaltyE(\d)ELb(\d)ELb(\d)", name
        )
        if key is not None:
            arithmetic = {"f": "float", "d": "double"}[key[1]]
            flags = key[2] == "1", int(key[3]), key[4] == "1", key[5] == "1"
            found[Instance(arithmetic, *flags)] = kernel
    # (2 storages of float, 1 of double) x 4 penalties x 2, and 3 forms of the pull alone.
    assert len(found) == 24 + 9
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_units_move_16_bytes_at_once(code, architecture):
    """A lane's 8 elements of an array: 2 vectors of float, 4 of double, 2 half as wide of bf16."""
    for instance, kernel in instances(code[architecture]).items():
        count = kernel.instructions
        read = 6 if instance.penalty else 4  # weights, gradients, moments; importance, anchors
        written = 3
        if instance.pull_only:  # what is beside the target, but where the penalty is proximal
            read, written = (3 if instance.penalty == PROXIMAL else 4), 1
        elif not instance.float32_storage:  # the largest second moments
            read, written = read + 1, written + 1
        vectors = 4 if instance.arithmetic == "double" else 2
        rows = 0
        if instance.projected:  # two at once, for double of either type
            rows = 4 + 8 * (instance.arithmetic == "double")
        assert count["LDG.E.128"] == vectors * read + rows, instance
        assert count["STG.E.EF.128"] == vectors * written, instance
        general = instance.arithmetic == "float" and not instance.float32_storage
        if general and not instance.pull_only:
            # Of 2 bytes may be all of these, and what a weight of bfloat16 lacks.
            assert count["STG.E.EF.64"] == 2 * (written + 2), instance
            assert count["LDG.E.64"] >= 2 * (read + 1), instance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(code, architecture):
    for name, kernel in code[architecture].items():
        assert kernel.stack <= STACK, (name, kernel.stack)
    for instance, kernel in instances(code[architecture]).items():
        two = instance.arithmetic == "float" and (
            instance.float32_storage or not instance.projected
        )
        assert kernel.registers <= REGISTERS // (THREADS * (2 if two else 1)), instance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_alone_has_no_formats_left_in_it(code, architecture):
    found = instances(code[architecture])
    for penalty in range(4):
        simple, general = (found[Instance("float", s, penalty, False)] for s in (True, False))
        assert simple.registers <= 112 < general.registers
        # Half of them for whole units, half for the end of a tensor.
        assert simple.instructions.total() <= 1600
        assert 2 * simple.instructions.total() < general.instructions.total() <= 6500
        assert simple.instructions["STG.E.U16"] == 0
