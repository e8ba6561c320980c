"""The device that is measured, and how time is taken on it.

`DEVICE=cpu` rehearses: the same code with tiny sizes, a wall clock, and plain calls in place of
CUDA graphs, so that no minute on a GPU is lost to a typo. What it measures means nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import torch

from gpu import machine, report

Call = Callable[[], object]
T = TypeVar("T")

_CYCLES_PER_MS = 2e6  # of `torch.cuda._sleep`, at 2 GHz
_LONGEST_SLEEP_MS = 200.0


class Device(Protocol):
    """Where contenders run."""

    name: str

    def pick(self, real: T, tiny: T) -> T:
        """A size on a GPU, and in the rehearsal."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def milliseconds(self, call: Call, rounds: int) -> list[float]:
        """Time that the device takes for a call, for each of several."""

    def graph(self, call: Call) -> Call:
        """The call as a CUDA graph's replay; the first calls compile and warm up."""

    def compiled(self, call: Call) -> Call:
        """The call by `torch.compile`."""

    def no_syncs(self) -> contextlib.AbstractContextManager[None]:
        """Inside, waiting for the device raises a RuntimeError."""

    def forget(self) -> None:
        """Give back cached memory."""

    def peak(self, call: Call) -> int:
        """The most bytes that were allocated at once during a call; unknown in the rehearsal: 0."""


class Cuda:
    """The current GPU."""

    name = "cuda"

    def pick(self, real: T, tiny: T) -> T:
        return real

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, call: Call, rounds: int) -> list[float]:
        """By CUDA events, with the queue kept full: while the GPU sleeps, the host gets ahead."""
        ahead = 1.0 + 1.5 * rounds * host_milliseconds(self, call, 1)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        torch.cuda._sleep(int(min(ahead, _LONGEST_SLEEP_MS) * _CYCLES_PER_MS))
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def graph(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            call()
        return graph.replay

    def compiled(self, call: Call) -> Call:
        result: Call = torch.compile(call)
        return result

    @contextlib.contextmanager
    def no_syncs(self) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def forget(self) -> None:
        torch.cuda.empty_cache()

    def peak(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class Rehearsal:
    """A CPU in a GPU's place."""

    name = "cpu"

    def pick(self, real: T, tiny: T) -> T:
        return tiny

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Call, rounds: int) -> list[float]:
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]

    def graph(self, call: Call) -> Call:
        for _ in range(2):
            call()
        return call

    def compiled(self, call: Call) -> Call:
        return call

    def no_syncs(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forget(self) -> None:
        pass

    def peak(self, call: Call) -> int:
        call()
        return 0


def find() -> Device:
    """The device that the environment variable DEVICE names: cuda, or cpu for a rehearsal.

    The first to find one writes what it is above the figures.
    """
    name = os.environ.get("DEVICE", "cuda")
    if name not in ("cuda", "cpu"):
        raise SystemExit(f"DEVICE must be cuda or cpu, not {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; DEVICE=cpu rehearses.")
    if not any("header" in line for line in report.read([report.path()])):
        report.append({"header": machine.header(name)})
    return Cuda() if name == "cuda" else Rehearsal()


def host_milliseconds(device: Device, call: Call, rounds: int) -> float:
    """Median time until a call returns, the device having nothing else to do."""
    return _from_idle(device, call, rounds, wait=False)


def idle_milliseconds(device: Device, call: Call, rounds: int) -> float:
    """Median time from an idle device until the call's work is done."""
    return _from_idle(device, call, rounds, wait=True)


def _from_idle(device: Device, call: Call, rounds: int, *, wait: bool) -> float:
    times = []
    for _ in range(device.pick(rounds, 1)):
        device.synchronize()
        start = time.perf_counter()
        call()
        if wait:
            device.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    device.synchronize()
    return statistics.median(times)


Turns = dict[str, list[float]]


def take_turns(device: Device, calls: Mapping[str, Call], turns: int, rounds: int) -> Turns:
    """Milliseconds of each contender, the median of each turn; a first turn warms up."""
    times: Turns = {name: [] for name in calls}
    for turn in range(device.pick(turns, 1) + 1):
        for name, call in calls.items():
            taken = statistics.median(device.milliseconds(call, rounds))
            if turn > 0:
                times[name].append(taken)
    return times


def ratio(turns: Turns, contender: str, base: str) -> float:
    """The median of a contender's time over another's in the same turn."""
    pairs = zip(turns[contender], turns[base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def count_syncs(device: Device, call: Call) -> tuple[int, str]:
    """Whether a call waits for the device, 0 or 1, and what torch says of it."""
    call()  # what is begun once may wait
    try:
        with device.no_syncs():
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return 1, str(error)
    return 0, ""
