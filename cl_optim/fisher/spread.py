"""Models that are spread over processes: by ``fully_shard``, tensor parallelism, or both.

In a forward pass of a module of ``fully_shard`` its parameters are whole: other tensors, which are
met there. Sums of squares are whole only until they have been added up over the processes, each of
which keeps its part: when the parameter's gradient has been, in training. Under tensor parallelism
parameters are parts in the forward pass, too, and the processes have the same samples: nothing is
added up, and what is whole until then, beside ``fully_shard``, is a part of that kind.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_optim.distributed import ALONE, Together, is_dtensor, mesh_of, place, reshard
from cl_optim.fisher import nested
from cl_optim.fisher.checks import Number
from cl_optim.fisher.model import trained

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class Layout(NamedTuple):
    """How ``fully_shard`` has spread a parameter.

    Attributes:
        mesh: Of the processes whose samples differ: the first dimensions of the parameter's mesh.
        placements: Over them.
        shape: Of what they have spread: of the parameter, or of its part in tensor parallelism.
        parallel: The names of the mesh's other dimensions, those of tensor parallelism.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    parallel: tuple[str, ...]


class Spread:
    """What is known of a model that is spread; of any other model nothing, at no cost.

    Args:
        model: The model.
        reduce_dtype: In which sums are sent, if that is less than their own.

    Attributes:
        reduce_dtype: As given.
        layouts: How ``fully_shard`` has spread parameters, by name: their sums are added up.
        parts: Those that are DTensors, by name.
        together: The processes that the model is spread over: each forward pass is one of all.
        parallel: Those of tensor parallelism, whose samples are the same.
    """

    def __init__(self, model: nn.Module, reduce_dtype: torch.dtype = torch.float32) -> None:
        self.reduce_dtype = reduce_dtype
        reshard(model)  # parameters that an evaluation has left whole are others
        parameters = trained(model)
        self.parts = {name: p for name, p in parameters.items() if is_dtensor(p)}
        self.together = self.parallel = ALONE
        self.layouts: dict[str, Layout] = {}
        self._mesh: DeviceMesh | None = None
        self._watches: list[Watch] = []
        _refuse_flat(model)
        if not self.parts:
            return
        from torch.distributed.fsdp import FSDPModule

        modules = [
            (name, module)
            for name, module in model.named_modules()
            if issubclass(type(module), FSDPModule)
        ]
        managed = {id(p) for _, module in modules for p in module.parameters()}
        self.layouts = {name: _layout(p) for name, p in self.parts.items() if id(p) in managed}
        self._mesh = mesh_of(parameters.values())
        self.together = Together(mesh=self._mesh)
        if self.is_parallel:
            self.parallel = Together(mesh=self._parallel_mesh())
        if len(self.layouts) not in (0, len(self.parts)):
            other = next(name for name in self.parts if name not in self.layouts)
            raise NotImplementedError(
                f"parameter {other!r} is spread by tensor parallelism alone, and others by "
                "fully_shard besides: call fully_shard for the whole model."
            )
        self._hang_hooks(modules)

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def is_parallel(self) -> bool:
        """Whether there is tensor parallelism."""
        return len(self.layouts) < len(self.parts) or any(
            layout.parallel for layout in self.layouts.values()
        )

    def _parallel_mesh(self) -> DeviceMesh | None:
        for name, layout in self.layouts.items():
            if layout.parallel:
                mesh: DeviceMesh = cast(Any, self.parts[name]).device_mesh[layout.parallel]
                return mesh
        return self._mesh

    def ranks(self, together: Together) -> Together:
        """Return the processes whose samples count: where the model is spread, those.

        Raises:
            ValueError: Others were asked for.
        """
        if not self:
            return together
        others = place()
        count = 1 if others is None else others[1]
        if not self.layouts:
            return self._ranks_of_parts(together, count)
        layout = next(iter(self.layouts.values()))
        mesh, own = cast("DeviceMesh", self._mesh), Together(mesh=layout.mesh)
        if together.size > 1:
            asked = set(together.gather(dist.get_rank()))
            ours = (mesh, layout.mesh)
            if any(asked == set(one.mesh.flatten().tolist()) for one in ours):
                return own
        elif not together.is_own and count == mesh.size():
            return own
        if together.size > 1 or together.is_own:
            raise ValueError(
                f"ranks must be 'sum', or be left out, where the model is spread over "
                f"{self.together.size} processes: squares are added up over them as they come."
            )
        raise ValueError(
            f"the model is spread over {self.together.size} of {count} processes: give "
            "ranks= the process group of those, where the others train another part of the "
            "model; replicas of it are a dimension of its mesh (HSDP)."
        )

    def _ranks_of_parts(self, together: Together, count: int) -> Together:
        """Do the same where tensor parallelism alone has spread it."""
        if together.is_own:
            return together
        if count == self.together.size:
            return Together("own")  # whether left out or "sum": there are no other samples
        asked = set(together.gather(dist.get_rank()))
        if len(asked) == 1:
            return together  # which marks what is found as this process's
        parallel = set(cast("DeviceMesh", self._mesh).mesh.flatten().tolist())
        if len(asked & parallel) > 1:
            raise ValueError(
                f"ranks must not be of processes that have the same samples, {sorted(parallel)}, "
                "as tensor parallelism has: give the process group of those that have the same "
                'parts of the model, mesh["dp"].get_group() or the like.'
            )
        return together

    def require_same_inputs(self, inputs: Any) -> None:
        """Raise ValueError where tensor parallelism's processes are not given the same."""
        if not self.is_parallel:
            return
        prints = []
        for tensor in nested.tensors(inputs):
            if not is_dtensor(tensor):
                values = tensor.detach().flatten().double()
                places = torch.arange(1, len(values) + 1, device=values.device)
                prints.append((tuple(tensor.shape), float(values @ places.double())))
        self.parallel.require_same(
            prints,
            "the processes of tensor parallelism were given other inputs: give them the same "
            "batches, by a sampler over the data-parallel dimension of the mesh alone "
            "(verify=False turns the check off).",
        )

    def require_alike(self, sums: Mapping[str, Tensor], samples: float) -> None:
        """Raise ValueError where tensor parallelism's processes have not had the same samples.

        Seen in the sums of parameters that each has all of.
        """
        if not self.is_parallel:
            return
        message = (
            "the processes of tensor parallelism have seen other samples, or parts of a sequence "
            "at a parameter that is no DTensor: give them the same batches, and name such layers "
            "in the plan (SequenceParallel())."
        )
        self.parallel.require_same(samples, message)
        copies = [
            float(total.sum(dtype=torch.float64))
            for name, total in sums.items()
            if name not in self.parts or (name in self.layouts and not self.layouts[name].parallel)
        ]
        found = torch.tensor(self.parallel.gather(copies), dtype=torch.float64)
        if not copies:
            return
        sizes = found.abs().amax(0)  # what is rounding alone may differ altogether
        if ((found - found[0]).abs() > 1e-3 * sizes + 1e-9 * sizes.max()).any():
            raise ValueError(message)

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
        if self.parts:
            self._watches.append(watch)
        return watch

    def _hang_hooks(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Hang hooks that last as long as this: one that is hung in a forward pass is too late."""
        parts, watches, layouts = self.parts, self._watches, self.layouts

        def meet(prefix: str, module: nn.Module, args: Any) -> None:
            if not watches:
                return
            for name, parameter in module.named_parameters(prefix):
                if name in layouts and parameter is not parts[name]:
                    _check_met(name, parameter, layouts[name])
                    for watch in watches:
                        watch.meet(name, parameter)

        def reduce(name: str, parameter: Tensor) -> None:
            for watch in watches:
                if watch.reduce is not None:
                    watch.reduce(name)

        handles = [m.register_forward_pre_hook(partial(meet, prefix)) for prefix, m in modules]
        for name in layouts:
            hook = partial(reduce, name)
            handles.append(
                parts[name].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
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


class Open(Mapping[str, Tensor]):
    """Where squares are added: of what is spread, whole tensors, until they are taken.

    Args:
        sums: Those of each parameter, or of the part of it that is here.
        parameters: The parameters.
        spread: What is known of those that are spread.

    Attributes:
        whole: What has not been taken.
    """

    def __init__(
        self, sums: Mapping[str, Tensor], parameters: Mapping[str, Tensor], spread: Spread
    ) -> None:
        self._sums, self._parameters, self._spread = sums, parameters, spread
        self.whole: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if not self.is_spread(name):
            return self._sums[name]
        if name not in self.whole:
            like = self._sums[name]
            shape = self._spread.layouts[name].shape
            self.whole[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.whole[name]

    def is_spread(self, name: str) -> bool:
        """Tell whether a parameter's sums are added up over processes, each of which has a part."""
        return name in self._spread.layouts

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Follow parameters to the devices that they were moved to."""
        self._parameters = parameters
        for name, value in self.whole.items():
            self.whole[name] = value.to(parameters[name].device)

    def take(self, name: str, factor: Number) -> Tensor:
        """Return the part that is here of the sum over all processes, times each one's factor."""
        value = self[name].mul_(factor)  # zeros, where this process has used it in no sample
        del self.whole[name]
        if self._spread.reduce_dtype == torch.bfloat16:
            return _part_of(value.bfloat16(), self._spread.layouts[name]).to(value.dtype)
        return _part_of(value, self._spread.layouts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def _layout(parameter: Tensor) -> Layout:
    """Return how ``fully_shard`` has spread a parameter."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    there: Any = parameter
    mesh, placements = there.device_mesh, there.placements
    # Replicas (HSDP) and the shards of fully_shard come first, tensor parallelism after them.
    dims = next((i for i, one in enumerate(placements) if not one.is_replicate()), len(placements))
    dims = min(dims + 1, mesh.ndim)
    names, shape, parallel = mesh.mesh_dim_names, tuple(there.shape), ()
    if dims < mesh.ndim:
        parallel = names[dims:]
        shape, _ = compute_local_shape_and_global_offset(
            there.shape, mesh[parallel], placements[dims:]
        )
        mesh = mesh[names[:dims]]
    own = [Replicate() if one.is_replicate() else Shard(one.dim) for one in placements[:dims]]
    return Layout(mesh, tuple(own), tuple(shape), parallel)


def _check_met(name: str, parameter: Tensor, layout: Layout) -> None:
    """Raise NotImplementedError where a forward pass meets something else than was understood."""
    met: tuple[str, ...] = ()
    part = parameter
    if is_dtensor(parameter):
        met = cast(Any, parameter).device_mesh.mesh_dim_names
        part = cast(Any, parameter).to_local()  # no function that this parameter is a use of
    if met != layout.parallel or tuple(part.shape) != layout.shape:
        raise NotImplementedError(
            f"parameter {name!r} is spread in a way that is not supported: over {met} in the "
            f"forward pass, and {layout.mesh.mesh_dim_names} of fully_shard; shard the model by "
            "fully_shard, HSDP, tensor parallelism, or these together."
        )


def _part_of(value: Tensor, layout: Layout) -> Tensor:
    """Return the part that is here of the sum of a whole tensor over the parameter's processes."""
    from torch.distributed.tensor import DTensor, Partial

    now: list[Any] = [Partial()] * layout.mesh.ndim
    summed = DTensor.from_local(value, layout.mesh, now, run_check=False)
    for dim, placement in enumerate(layout.placements):
        if not placement.is_replicate():  # before replicas are added up, which then are smaller
            now[dim] = placement
            summed = summed.redistribute(placements=now)
    return summed.redistribute(placements=layout.placements).to_local()


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
