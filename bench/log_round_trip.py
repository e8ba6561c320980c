"""The importance log on a model of 124 M parameters: size, error, and time against the disk's.

    python bench/log_round_trip.py FOLDER [--json FILE]

The importance has the shapes of GPT-2 small and made-up values: log-normal, times a log-normal
scale for each row and column. Writing is ``log.record`` (statistics, encoding,
checksums, fsync), reading is every tensor of ``log.load``, verified and decoded. Both are compared,
in turns, with ``dd conv=fsync`` into the same folder: of as many bytes as were written, and of as
many as the importance has in float32. What is read is in the page cache, as it has just been
written.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cost_figures
import records
import torch
from torch import Tensor

from cl_optim import ImportanceLog
from cl_optim.importance import codecs

WIDTH, LAYERS, VOCABULARY, POSITIONS = 768, 12, 50257, 1024


def gpt2() -> dict[str, tuple[int, ...]]:
    """The shapes of GPT-2 small's 148 parameters: 124 439 808 weights."""
    w = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (VOCABULARY, w),
        "wpe.weight": (POSITIONS, w),
    }
    for layer in range(LAYERS):
        block = {
            "ln_1.weight": (w,), "ln_1.bias": (w,),
            "attn.c_attn.weight": (w, 3 * w), "attn.c_attn.bias": (3 * w,),
            "attn.c_proj.weight": (w, w), "attn.c_proj.bias": (w,),
            "ln_2.weight": (w,), "ln_2.bias": (w,),
            "mlp.c_fc.weight": (w, 4 * w), "mlp.c_fc.bias": (4 * w,),
            "mlp.c_proj.weight": (4 * w, w), "mlp.c_proj.bias": (w,),
        }  # fmt: skip
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f.weight": (w,), "ln_f.bias": (w,)}


def fisher(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator).mul_(1.5)
    for axis in range(len(shape)):
        along = [1] * len(shape)
        along[axis] = shape[axis]
        values += torch.randn(along, generator=generator)
    return values.exp_().mul_(1e-7)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Turn(NamedTuple):
    """Seconds of one record written and read; of dd for as many bytes, and for those of float32."""

    nbytes: int
    write: float
    read: float
    dd: float
    dd_float32: float


def turn(folder: Path, importance: dict[str, Tensor], codec: str) -> Turn:
    path = folder / "log"
    log = ImportanceLog(path)
    write = seconds(lambda: log.record("task", importance, codec=codec))
    nbytes = log["task"].nbytes
    read = seconds(lambda: list(log.load("task").sums.values()))
    shutil.rmtree(path)
    whole = sum(value.nbytes for value in importance.values())
    return Turn(nbytes, write, read, dd(folder, nbytes), dd(folder, whole))


def dd(folder: Path, nbytes: int) -> float:
    path = folder / "dd"
    command = ["dd", "if=/dev/zero", f"of={path}", f"count={nbytes}", "iflag=count_bytes"]
    command += ["bs=8M", "conv=fsync", "status=none"]
    time = seconds(lambda: subprocess.run(command, check=True))
    path.unlink()
    return time


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("folder", type=Path, help="an empty or new folder on the disk to measure")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    importance = {name: fisher(shape, generator) for name, shape in gpt2().items()}
    weights = sum(value.numel() for value in importance.values())

    made = {}
    for name in codecs.NAMES:
        error = codecs.measure(codecs.codec(name), importance)
        turns = [turn(arguments.folder, importance, name) for _ in range(arguments.repeat)]
        made[name] = {"error": error._asdict(), "turns": [one._asdict() for one in turns]}
    figures = {"weights": weights, "tensors": len(importance), "codecs": made}
    cost_figures.show([cost_figures.LOG_HEAD, *cost_figures.log_codecs(figures)])
    records.write(arguments.json, figures)


if __name__ == "__main__":
    main()
