"""What can the machine do at most: copy, read, bfloat16 products?"""

from __future__ import annotations

import statistics
import subprocess

import torch

from gpu import device as devices
from gpu import report
from gpu.device import Device


def show_gpu(device: Device) -> None:
    """By nvidia-smi."""
    command = ["nvidia-smi"]
    if device.name == "cuda":
        subprocess.run(command, check=False)
    else:
        print("Not here:", *command)


def measure(device: Device) -> None:
    """The three ceilings."""
    numel = device.pick(1_000_000_000, 1000)
    source, target = (torch.randn(numel, device=device.name) for _ in range(2))
    size = device.pick(8192, 16)
    a, b = (torch.randn(size, size, device=device.name, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)

    def milliseconds(call: devices.Call) -> float:
        return statistics.median(device.milliseconds(call, 10))

    copied = milliseconds(lambda: target.copy_(source))
    same = report.Check(float(not torch.equal(source, target)), 0.0)
    report.figure("copy", 2 * source.nbytes / copied / 1e6, "GB/s", check=same)
    report.figure("read (sum)", source.nbytes / milliseconds(source.sum) / 1e6, "GB/s")
    multiplied = milliseconds(lambda: torch.mm(a, b, out=product))
    report.figure("bfloat16 product", 2 * size**3 / multiplied / 1e9, "TFLOP/s")


def main() -> None:
    device = devices.find()
    show_gpu(device)
    measure(device)


if __name__ == "__main__":
    main()
