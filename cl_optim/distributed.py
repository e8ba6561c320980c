"""The processes that train one model: which of them this is, and what they do together."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# What an importance is of: of all samples of all processes, or of a group's; or of this one's,
# which are all there are. None: of this one's, and marked so where there are others.
Ranks: TypeAlias = "Literal['sum', 'own'] | dist.ProcessGroup | None"
# The same, where what each process has found is one of several numbers for one thing.
MeanRanks: TypeAlias = "Literal['mean', 'own'] | dist.ProcessGroup | None"

_T = TypeVar("_T")


def place() -> tuple[int, int] | None:
    """Return this process's rank and how many there are; None where it is the only one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.get_rank(), dist.get_world_size()


def check_ranks(ranks: object, everyone: str = "sum") -> None:
    """Raise ValueError where an argument ``ranks`` is none of what it may be.

    Args:
        ranks: The argument.
        everyone: What says that the processes' numbers are taken together.
    """
    if ranks is None or (isinstance(ranks, str) and ranks in (everyone, "own")):
        return
    if not (dist.is_available() and isinstance(ranks, dist.ProcessGroup)):
        raise ValueError(
            f"ranks must be {everyone!r}, 'own', a process group of torch.distributed or None, not "
            f"{ranks!r}."
        )


class Together:
    """What the processes of a group do, each at the same time; alone where there is no other.

    Args:
        ranks: Whose processes; those of ``'own'`` and ``None`` are this one.
        mesh: Those of a mesh, instead.

    Attributes:
        is_own: Whether this process is said to be all there is.
    """

    def __init__(self, ranks: Ranks | MeanRanks = None, mesh: DeviceMesh | None = None) -> None:
        self.is_own = isinstance(ranks, str) and ranks == "own"
        self._groups: list[dist.ProcessGroup | None] = []  # None: of all processes
        if mesh is not None:
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        elif isinstance(ranks, str):
            self._groups = [] if self.is_own or place() is None else [None]
        elif ranks is not None:
            self._groups = [ranks]

    @property
    def metadata(self) -> dict[str, Any]:
        """What an importance says of this: ``"ranks"`` it is the sum of, or whose it is alone."""
        if self._groups:
            return {"ranks": self.size}
        if self.is_own or (here := place()) is None:
            return {}
        return {"rank": {"rank": here[0], "of": here[1]}}

    @property
    def size(self) -> int:
        """How many processes there are."""
        return math.prod(dist.get_world_size(group) for group in self._groups)

    @property
    def rank(self) -> int:
        """This process's place among them, as :meth:`gather` has it."""
        rank = 0
        for group in self._groups:
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        return rank

    def is_first(self) -> bool:
        """Tell whether this is the process of the lowest rank."""
        return all(dist.get_rank(group) == 0 for group in self._groups)

    def gather(self, value: _T) -> list[_T]:
        """Return what each process has given, by rank; anything that can be pickled."""
        found = [value]
        for group in reversed(self._groups):  # of a mesh the last dimension comes first
            lists: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(lists, found, group=group)
            found = [one for of_process in cast(list[list[_T]], lists) for one in of_process]
        return found

    def agreeing(self) -> AbstractContextManager[None]:
        """Raise in all processes what one of them has raised within, that of the lowest rank.

        The others would wait for it for ever.
        """
        return self._agreeing() if self._groups else nullcontext()

    @contextmanager
    def _agreeing(self) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # is raised below, in all of them
            error = raised
        first = next((one for one in self.gather(_sendable_error(error)) if one is not None), None)
        if first is not None:
            raise error or first

    def require_same(self, what: object, message: str) -> None:
        """Raise ValueError in all processes where one has given something else."""
        if any(one != what for one in self.gather(what)):
            raise ValueError(message)

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the means of numbers over all processes, which are the same bits in each.

        Raises:
            ValueError: They do not all have the same ones.
        """
        found = self.gather(dict(numbers))
        if any(one.keys() != numbers.keys() for one in found):
            raise ValueError("the processes must give numbers for the same names.")
        return {name: sum(one[name] for one in found) / len(found) for name in numbers}

    def require_alike(self, numbers: Tensor, message: str) -> bool:
        """Raise ValueError in all processes where one has a vector that is 0.1 % off another's.

        Returns:
            Whether all are the same, which is said in all processes alike.
        """
        found = torch.tensor(self.gather(numbers.double().tolist()), dtype=torch.float64)
        if ((found - found[0]).norm(dim=1) > 1e-3 * found[0].norm()).any():
            raise ValueError(message)
        return bool((found == found[0]).all())

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, which are the same bits in each."""
        if not self._groups:
            return
        for tensor in tensors:
            there = self._sendable(tensor)
            for group in self._groups:
                dist.all_reduce(there, group=group)
            if there is not tensor:
                tensor.copy_(there)

    def added(self, *tensors: Tensor) -> list[Tensor]:
        """Return the sums of small tensors of one dtype over all processes, sent together.

        They are added up in one order in each process: a reduction has another one for each
        element.
        """
        if not self._groups:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        for group in reversed(self._groups):
            there = self._sendable(flat)
            parts = [torch.empty_like(there) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, there, group=group)
            flat = sum(parts[1:], start=parts[0]).to(flat.device)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.view(of.shape) for piece, of in zip(pieces, tensors, strict=True)]

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the groups' backend can send it from."""
        if "gloo" in dist.get_backend(self._groups[0]) or not tensor.is_cpu:
            return tensor.contiguous()
        if not torch.accelerator.is_available():
            return tensor.contiguous()
        return tensor.to(torch.accelerator.current_accelerator() or "cpu")


ALONE = Together()


def _sendable_error(error: Exception | None) -> Exception | None:
    """Return an error that arrives in other processes: itself, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of the error's own making, whatever it is
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# --- parts of tensors -----------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether it is a DTensor, without importing what that takes a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Tensor, param: Tensor | None = None) -> Tensor:
    """Return the part of a tensor that is in this process: all of it but of a DTensor.

    Args:
        tensor: A DTensor, or a tensor that is the same in all processes.
        param: Whose part: the tensor, of its shape, is brought to where it is. Of a tensor that is
            the same in all processes that takes no communication.
    """
    if param is None or not is_dtensor(param):
        if not is_dtensor(tensor):
            return tensor
        return cast(Any, tensor.detach()).to_local() if param is None else whole(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    there = cast(DTensor, param)
    if not is_dtensor(tensor):
        everywhere = [Replicate()] * there.device_mesh.ndim
        tensor = DTensor.from_local(tensor.detach(), there.device_mesh, everywhere, run_check=False)
    given = cast(DTensor, tensor.detach())
    return given.redistribute(there.device_mesh, there.placements).to_local()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, of a DTensor by a collective operation of its processes."""
    return cast(Any, tensor.detach()).full_tensor() if is_dtensor(tensor) else tensor


def refuse_parts(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError where a tensor is spread over processes, for what needs all of it."""
    if any(map(is_dtensor, tensors)):
        raise ValueError(
            "the importance is spread over processes (of DTensors), and this needs all of it: call "
            "Importance.whole() in all processes, and go on in one."
        )


def is_spread(model: torch.nn.Module) -> bool:
    """Tell whether a model has DTensors, in whatever state a forward pass has left it."""
    reshard(model)
    return any(map(is_dtensor, model.parameters()))


def refuse_own(model: torch.nn.Module, ranks: MeanRanks) -> None:
    """Raise ValueError where each process is to decide for itself on a model that all have."""
    if isinstance(ranks, str) and ranks == "own" and is_spread(model):
        raise ValueError(
            "ranks must be 'mean', not 'own', where the model is spread over processes (of "
            "DTensors), whose forward passes are of all: leave it out."
        )


def like(param: Tensor, part: Tensor) -> Tensor:
    """Return a tensor that is where a parameter is, of whose shape this is the part here.

    The memory is the part's.
    """
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor

    there = cast(DTensor, param)
    return DTensor.from_local(
        part, there.device_mesh, there.placements,
        run_check=False, shape=there.shape, stride=there.stride(),
    )  # fmt: skip


def reshard(model: torch.nn.Module) -> None:
    """Let go of weights that ``fully_shard`` has gathered for a forward pass, and keeps after it.

    Without a backward pass the outermost module keeps them; what is written into the parts of its
    parameters would then not be seen by the next forward pass.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def rows_like(param: Tensor, parts: Tensor) -> Tensor:
    """Return what `like` does, of [t, ...]: several parts of one parameter's shape."""
    if not is_dtensor(param):
        return parts
    from torch.distributed.tensor import DTensor

    if not len(parts):
        return torch.empty(0, *param.shape, dtype=parts.dtype, device=parts.device)
    one = cast(DTensor, like(param, parts[0]))
    # A dimension in front moves those that are spread.
    return cast(DTensor, torch.stack([like(one, part) for part in parts]))


def rows_here(rows: Tensor, param: Tensor) -> Tensor:
    """Return what `here` does, of [t, ...]: several tensors of one parameter's shape."""
    if not is_dtensor(param) or not len(rows):
        return whole(rows)
    return torch.stack([here(row, param) for row in rows])


def offset_of(param: Tensor) -> tuple[int, ...]:
    """Return where in a parameter its part of this process begins."""
    if not is_dtensor(param):
        return (0,) * param.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    there = cast(Any, param)
    _, offset = compute_local_shape_and_global_offset(
        there.shape, there.device_mesh, there.placements
    )
    return tuple(offset)


def mesh_of(params: Iterable[Tensor]) -> DeviceMesh | None:
    """Return the mesh that all parameters are spread over; None where none is a DTensor.

    Raises:
        ValueError: There are several, and none has the processes of all.
    """
    meshes: list[DeviceMesh] = []
    for param in params:
        if is_dtensor(param) and cast(Any, param).device_mesh not in meshes:
            meshes.append(cast(Any, param).device_mesh)
    if not meshes:
        return None
    largest = max(meshes, key=lambda mesh: (mesh.size(), mesh.ndim))
    ranks = set(largest.mesh.flatten().tolist())
    if any(not ranks.issuperset(mesh.mesh.flatten().tolist()) for mesh in meshes):
        raise ValueError(
            "the parameters are spread over several meshes, none of which has the processes of "
            "all: make an optimizer for each."
        )
    return largest


def is_counted(param: Tensor, mesh: DeviceMesh | None) -> bool:
    """Tell whether this process is the one whose part a sum over the mesh takes, of replicas."""
    if mesh is None:
        return True
    first = int(mesh.mesh.flatten()[0])
    if not is_dtensor(param):
        return dist.get_rank() == first
    of_param: DeviceMesh = cast(Any, param).device_mesh
    place_here = of_param.get_coordinate()
    if place_here is None or first not in of_param.mesh.flatten().tolist():
        return False
    pairs = zip(place_here, cast(Any, param).placements, strict=True)
    return all(index == 0 for index, placement in pairs if placement.is_replicate())
