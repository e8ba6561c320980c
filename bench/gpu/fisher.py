"""Does the exact per-sample Fisher cost no more than a forward and backward pass? Is it right?

`python -m gpu.fisher`; `python -m gpu.fisher all` adds more samples and longer ones.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import torch
from fisher_contenders import Problem, Transformer
from torch import Tensor

from cl_optim import FisherEstimator, estimate_fisher
from gpu import device as devices
from gpu import errors, report
from gpu.device import Device
from gpu.report import Check

TURNS, BATCHES = 3, 4
PLAIN, PASS, TRAINING = "forward + backward", "Fisher pass", "training with the Fisher"
# Against batches of one in the same precision, bfloat16 autocast, whose products are summed in
# another order.
ALLOWED = 2e-2


@dataclass(frozen=True)
class Setting:
    """A model's shape, and a batch's."""

    name: str
    layers: int
    width: int
    heads: int
    samples: int
    length: int
    vocabulary: int = 50304


SETTINGS = (
    Setting("163 M, 8 x 512", 12, 768, 12, 8, 512),
    Setting("814 M, 16 x 512", 23, 1536, 16, 16, 512),
)
MORE = (
    Setting("163 M, 16 x 512", 12, 768, 12, 16, 512),
    Setting("814 M, 4 x 2048", 23, 1536, 16, 4, 2048),
)


def problem(setting: Setting, device: Device) -> Problem:
    """The model and a batch; in the rehearsal a tiny one."""
    torch.manual_seed(0)
    s = device.pick(setting, Setting(setting.name, 2, 32, 2, 3, 8, 101))
    model = Transformer(s.layers, s.width, s.heads, s.vocabulary, s.length).to(device.name)
    tokens = torch.randint(0, s.vocabulary, (s.samples, s.length + 1), device=device.name)
    return Problem(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def loss(task: Problem, device: Device) -> Tensor:
    """The mean over the samples, under bfloat16 autocast."""
    with torch.autocast(device.name, torch.bfloat16):
        return task.losses(task.model).mean()


def backward(task: Problem, device: Device) -> None:
    """Forward and backward alone."""
    task.model.zero_grad()
    torch.autograd.backward(loss(task, device))


def gradients_of(task: Problem) -> dict[str, Tensor]:
    """By parameter."""
    named = task.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def contenders(task: Problem, device: Device) -> dict[str, devices.Call]:
    """Each goes through a few batches."""
    batches = [(task.inputs, task.targets)] * BATCHES
    fisher = FisherEstimator(task.model, verify=False)

    def plain() -> None:
        for _ in range(BATCHES):
            backward(task, device)

    def own_pass() -> None:
        """Its self-check left out, its other checks not."""
        with torch.autocast(device.name, torch.bfloat16):
            estimate_fisher(task.model, batches, "empirical", None, verify=False, progress=False)

    def training() -> None:
        for _ in range(BATCHES):
            with fisher.observe(len(task.inputs)):
                backward(task, device)

    return {PLAIN: plain, PASS: own_pass, TRAINING: training}


def check(task: Problem, device: Device) -> tuple[Check, Check]:
    """Of the Fisher during training against batches of one; of its gradients against autograd's."""
    fisher = FisherEstimator(task.model, verify=False)
    with fisher.observe(len(task.inputs)):
        backward(task, device)
    found = dict(fisher.finalize().sums)
    gradients = gradients_of(task)
    backward(task, device)
    plain = gradients_of(task)
    wrong_gradient = Check(errors.largest(gradients, plain), ALLOWED)
    del gradients, plain
    expected = {name: torch.zeros_like(p) for name, p in task.model.named_parameters()}
    for n in range(len(task.inputs)):
        one = Problem(task.model, task.inputs[n : n + 1], task.targets[n : n + 1])
        backward(one, device)
        for name, grad in gradients_of(task).items():
            expected[name].addcmul_(grad, grad)
    return Check(errors.largest(found, expected), ALLOWED), wrong_gradient


def measure(setting: Setting, device: Device) -> None:
    """Figures of a model: the error first, then times by turns, memory beside them."""
    task = problem(setting, device)
    weights = sum(p.numel() for p in task.model.parameters())
    right, right_gradient = check(task, device)
    calls = contenders(task, device)
    peaks = {}
    for name, call in calls.items():  # one at a time; it warms up, too
        task.model.zero_grad()
        device.forget()
        peaks[name] = device.peak(call)
    turns = devices.take_turns(device, calls, TURNS, 1)
    for name, times in turns.items():
        report.figure(
            f"{setting.name}: {name}",
            statistics.median(times) / BATCHES,
            "ms",
            check=None if name == PLAIN else right,
            turns=times,
            weights=weights,
            peak_gib=peaks[name] / 2**30,
        )
    error = right_gradient.error
    report.figure(f"{setting.name}: error of the gradients", error, check=right_gradient)
    for name in (PASS, TRAINING):
        ratio = devices.ratio(turns, name, PLAIN)
        report.figure(f"{name} / {PLAIN}, {setting.name}", ratio, "x", check=right)


def syncs(device: Device) -> None:
    """Whether the Fisher of a training step waits for the GPU."""
    task = problem(Setting("", 2, 64, 2, 4, 16, 101), device)
    fisher = FisherEstimator(task.model, verify=False)

    def step() -> None:
        with fisher.observe(len(task.inputs)):
            backward(task, device)

    found, why = devices.count_syncs(device, step)
    report.figure("host syncs of a Fisher pass", found, why=why)


def main() -> None:
    device = devices.find()
    for setting in SETTINGS + (MORE if sys.argv[1:] == ["all"] else ()):
        measure(setting, device)
        device.forget()
    syncs(device)


if __name__ == "__main__":
    main()
