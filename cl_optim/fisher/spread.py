"""Models whose parameters are spread over processes by ``fully_shard``, FSDP2.

In a module's forward pass its parameters are whole: other tensors, which are met there. Sums of
squares are whole only until they have been added up over the processes, each of which keeps its
part: when the parameter's gradient has been, in training.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.distributed import ALONE, Together, is_dtensor, mesh_of, place, reshard
from cl_optim.fisher.checks import Number
from cl_optim.fisher.model import trained


class Spread:
    """What is known of a model that is spread; of any other model nothing, at no cost.

    Args:
        model: The model.

    Attributes:
        names: The parameters that are spread.
        together: The processes that they are spread over.

    Raises:
        NotImplementedError: They are spread in another way.
    """

    def __init__(self, model: nn.Module) -> None:
        reshard(model)  # parameters that an evaluation has left whole are others
        parameters = trained(model)
        self._parts = {name: p for name, p in parameters.items() if is_dtensor(p)}
        self.names = list(self._parts)
        self.together = ALONE
        self._watches: list[Watch] = []
        _refuse_flat(model)
        if not self.names:
            return
        from torch.distributed.fsdp import FSDPModule

        modules = [
            (name, module)
            for name, module in model.named_modules()
            if issubclass(type(module), FSDPModule)
        ]
        managed = {id(p) for _, module in modules for p in module.parameters()}
        if other := [name for name in self.names if id(parameters[name]) not in managed]:
            raise _not_whole(other[0])
        self.together = Together(mesh=mesh_of(parameters.values()))
        self._hang_hooks(modules)

    def __bool__(self) -> bool:
        return bool(self.names)

    def ranks(self, together: Together) -> Together:
        """Return the processes whose samples count: where the model is spread, those.

        Raises:
            ValueError: Others were asked for.
        """
        if not self or together.size == self.together.size:
            return together
        if together.size > 1 or together.is_own:
            raise ValueError(
                f"ranks must be 'sum', or be left out, where the model is spread over "
                f"{self.together.size} processes: squares are added up over them as they come."
            )
        others = place()
        if others is not None and others[1] > self.together.size:
            raise ValueError(
                f"the model is spread over {self.together.size} of {others[1]} processes: give "
                "ranks= the process group of those, where the others train another part of the "
                "model; replicas of it are a dimension of its mesh (HSDP)."
            )
        return self.together

    def watch(
        self,
        meet: Callable[[str, Tensor], None],
        reduce: Callable[[str], None] | None = None,
    ) -> Watch:
        """Tell of parameters, by name, until :meth:`Watch.remove`.

        Args:
            meet: Is told of those that are whole in a module's forward pass, which they are.
            reduce: Is told of those whose gradients have been added up over the processes.
        """
        watch = Watch(self._watches, meet, reduce)
        if self.names:
            self._watches.append(watch)
        return watch

    def _hang_hooks(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Hang hooks that last as long as this: one that is hung in a forward pass is too late."""
        parts, watches = self._parts, self._watches

        def meet(prefix: str, module: nn.Module, args: Any) -> None:
            if not watches:
                return
            for name, parameter in module.named_parameters(prefix):
                if name in parts and parameter is not parts[name]:
                    if is_dtensor(parameter):
                        raise _not_whole(name)
                    for watch in watches:
                        watch.meet(name, parameter)

        def reduce(name: str, parameter: Tensor) -> None:
            for watch in watches:
                if watch.reduce is not None:
                    watch.reduce(name)

        handles = [m.register_forward_pre_hook(partial(meet, prefix)) for prefix, m in modules]
        for name, parameter in parts.items():
            hook = partial(reduce, name)
            handles.append(
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            )
        for handle in handles:
            weakref.finalize(self, handle.remove).atexit = False


class Watch:
    """What is told of a model's parameters, for a while."""

    def __init__(
        self,
        watches: list[Watch],
        meet: Callable[[str, Tensor], None],
        reduce: Callable[[str], None] | None,
    ) -> None:
        self._watches = watches
        self.meet, self.reduce = meet, reduce

    def remove(self) -> None:
        """End it."""
        if self in self._watches:
            self._watches.remove(self)


def parts_of(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the part that is here of the sum of a whole tensor over the parameter's processes."""
    from torch.distributed.tensor import DTensor, Partial

    there: Any = parameter
    everywhere = [Partial()] * there.device_mesh.ndim
    summed = DTensor.from_local(value, there.device_mesh, everywhere, run_check=False)
    now: list[Any] = list(everywhere)
    for dim, placement in enumerate(there.placements):
        if not placement.is_replicate():  # before replicas are added up, which then are smaller
            now[dim] = placement
            summed = summed.redistribute(placements=now)
    return summed.redistribute(placements=there.placements).to_local()


class Open(Mapping[str, Tensor]):
    """Where squares are added: of what is spread, whole tensors, until they are taken.

    Args:
        sums: Those of each parameter, or of the part of it that is here.
        parameters: The parameters.

    Attributes:
        whole: What has not been taken.
    """

    def __init__(self, sums: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        self._sums, self._parameters = sums, parameters
        self.whole: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if not is_dtensor(parameter):
            return self._sums[name]
        if name not in self.whole:
            like = self._sums[name]
            self.whole[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
        return self.whole[name]

    def is_spread(self, name: str) -> bool:
        """Tell whether each process has a part of a parameter's sums."""
        return is_dtensor(self._parameters[name])

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Follow parameters to the devices that they were moved to."""
        self._parameters = parameters
        for name, value in self.whole.items():
            self.whole[name] = value.to(parameters[name].device)

    def take(self, name: str, factor: Number) -> Tensor:
        """Return the part that is here of the sum over all processes, times each one's factor."""
        value = self[name].mul_(factor)  # zeros, where this process has used it in no sample
        del self.whole[name]
        return parts_of(value, self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def _refuse_flat(model: nn.Module) -> None:
    """Refuse FullyShardedDataParallel, whose parameters are parts of one flat tensor."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()
    ):
        raise NotImplementedError(
            "the parameters of FullyShardedDataParallel are parts of flat tensors, in which no "
            "sample's gradient can be told: shard the model by torch.distributed.fsdp.fully_shard."
        )


def _not_whole(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"parameter {name!r} is a DTensor in the forward pass, too, as under tensor parallelism, "
        "where a process sees a part of each sample's gradient: estimate the Fisher information "
        "of the model on one device, or sharded by fully_shard alone, and consolidate() that."
    )
