"""Time and memory of the exact per-sample Fisher on a GPU, by CUDA events; prints JSON and ratios.

Needs nothing but torch, triton and cl_optim: `python bench/gpu_fisher.py --json fisher-gpu.json`.
`--device cpu` runs a tiny model, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fisher_contenders import Problem, Transformer
from gpu_timing import milliseconds

from cl_optim import FisherEstimator, estimate_fisher

TURNS, BATCHES = 5, 8


@dataclass(frozen=True)
class Setting:
    """A model's shape, and a batch's."""

    layers: int
    width: int
    heads: int
    samples: int
    length: int
    vocabulary: int = 50304


SETTINGS = {
    "163 M, 8 x 512": Setting(12, 768, 12, 8, 512),
    "163 M, 16 x 512": Setting(12, 768, 12, 16, 512),
    "809 M, 4 x 2048": Setting(23, 1536, 16, 4, 2048),
    "809 M, 16 x 512": Setting(23, 1536, 16, 16, 512),
}
TINY = {"tiny": Setting(2, 32, 2, 3, 8, 101)}


def problem(setting: Setting, device: str) -> Problem:
    torch.manual_seed(0)
    s = setting
    model = Transformer(s.layers, s.width, s.heads, s.vocabulary, s.length).to(device)
    tokens = torch.randint(0, s.vocabulary, (s.samples, s.length + 1), device=device)
    return Problem(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def loss(task: Problem, device: str) -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
        return task.losses(task.model).mean()


def plain(task: Problem, device: str) -> Callable[[], object]:
    """Forward and backward alone."""

    def run() -> None:
        for _ in range(BATCHES):
            task.model.zero_grad()
            loss(task, device).backward()

    return run


def own_pass(task: Problem, device: str) -> Callable[[], object]:
    """estimate_fisher over several batches, its self-check left out, its other checks not."""
    batches = [(task.inputs, task.targets)] * BATCHES

    def run() -> object:
        with torch.autocast(device, torch.bfloat16):
            return estimate_fisher(
                task.model, batches, "empirical", None, verify=False, progress=False
            )

    return run


def training(task: Problem, device: str) -> Callable[[], object]:
    """observe() around each step: gradients and Fisher."""
    fisher = FisherEstimator(task.model, verify=False)

    def run() -> None:
        for _ in range(BATCHES):
            task.model.zero_grad()
            with fisher.observe(len(task.inputs)):
                loss(task, device).backward()

    return run


CONTENDERS = {
    "forward + backward": plain,
    "Fisher in a pass of its own": own_pass,
    "Fisher during training": training,
}


def batch_time(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one batch."""
    if device == "cpu":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3 / BATCHES
    return milliseconds(run, 1) / BATCHES


def errors(task: Problem, device: str) -> dict[str, float]:
    """Largest relative error of a tensor against batches of one in the same precision.

    Of the Fisher during training, and of the gradients made on the way against autograd's.
    """
    named = dict(task.model.named_parameters())
    task.model.zero_grad()
    loss(task, device).backward()
    grads = {name: p.grad for name, p in named.items()}
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for n in range(len(task.inputs)):
        task.model.zero_grad()
        one = Problem(task.model, task.inputs[n : n + 1], task.targets[n : n + 1])
        loss(one, device).backward()
        for name, p in named.items():
            expected[name].addcmul_(p.grad, p.grad)
    task.model.zero_grad()
    fisher = FisherEstimator(task.model, verify=False)
    synchronises = torch.cuda.get_sync_debug_mode() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    with fisher.observe(len(task.inputs)):
        loss(task, device).backward()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(synchronises)
    sums = fisher.finalize().sums

    def largest(found: dict[str, torch.Tensor], correct: dict[str, torch.Tensor]) -> float:
        floor = 1e-6 * max(float(value.norm()) for value in correct.values())
        return max(
            float((found[name] - value).norm()) / max(float(value.norm()), floor)
            for name, value in correct.items()
        )

    return {
        "Fisher": largest(dict(sums), expected),
        "gradient": largest({name: p.grad for name, p in named.items()}, grads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the samples go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device: str = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --device cpu runs a tiny model.")
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "unit": "ms per batch, one figure per turn; bytes at the peak",
    }
    for name, setting in (SETTINGS if device == "cuda" else TINY).items():
        task = problem(setting, device)
        parameters = sum(p.numel() for p in task.model.parameters())
        accuracy = errors(task, device)
        turns: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        peaks: dict[str, int] = {}
        for contender, make in CONTENDERS.items():  # memory, one at a time; it warms up, too
            task.model.zero_grad()
            run = make(task, device)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            run()
            if device == "cuda":
                peaks[contender] = torch.cuda.max_memory_allocated()
            del run
        runs = {contender: make(task, device) for contender, make in CONTENDERS.items()}
        for _ in range(TURNS):
            for contender, run in runs.items():
                turns[contender].append(batch_time(run, device))
        report[name] = {"parameters": parameters, "errors": accuracy, "peaks": peaks, **turns}
        print(f"{name} ({parameters / 1e6:.0f} M parameters); errors {accuracy}")
        for contender, times in turns.items():
            ratios = [a / b for a, b in zip(times, turns["forward + backward"], strict=True)]
            peak = f"{peaks[contender] / 2**30:7.2f} GiB" if peaks else ""
            print(
                f"  {contender:30}{statistics.median(times):9.2f} ms "
                f"{statistics.median(ratios):6.3f} x{peak}"
            )
        del task, runs, run
        if device == "cuda":
            torch.cuda.empty_cache()
    arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
