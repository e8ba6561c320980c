"""Progressive networks: a new column for each task, which sees what the frozen ones learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_FIRST_SCALE = 0.1  # of what an old column contributes


class Growth(NamedTuple):
    """What a column added.

    Attributes:
        column: Its number.
        weights: Parameters of the column itself.
        lateral: Parameters of its adapters.
        total: Parameters of the network with it.
    """

    column: int
    weights: int
    lateral: int
    total: int


class LateralAdapter(nn.Module):
    """What the older columns add to a layer's output: U·ReLU(V·[α₁h₁, …]).

    V is linear, or a 1×1 convolution, to the layer's own input width; U is shaped like the layer,
    without bias; h are the inputs of the same layer in the older columns.

    Args:
        layer: The layer; an ``nn.Linear`` or convolution.
        columns: How many older columns there are.
    """

    def __init__(self, layer: nn.Module, columns: int) -> None:
        super().__init__()
        # Beside the layer, and of its precision.
        weight = next(layer.parameters())
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if isinstance(layer, nn.Linear):
            width, self.dim = layer.in_features, -1
            self.project: nn.Module = nn.Linear(columns * width, width, **place)
            self.up: nn.Module = nn.Linear(width, layer.out_features, bias=False, **place)
        elif isinstance(layer, _CONVOLUTIONS):
            width, self.dim = layer.in_channels, 1
            kind: Any = type(layer)
            self.project = kind(columns * width, width, 1, **place)
            self.up = kind(
                width,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=False,
                padding_mode=layer.padding_mode,
                **place,
            )
        self.scales = nn.Parameter(torch.full((columns,), _FIRST_SCALE, **place))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return what is added to the layer's output, from its inputs in the older columns."""
        scaled = [scale * value for scale, value in zip(self.scales, inputs, strict=True)]
        added: Tensor = self.up(F.relu(self.project(torch.cat(scaled, dim=self.dim))))
        return added


class ProgressiveNetwork(nn.Module):
    """A column for each task; the old ones are frozen and cannot forget.

    The newest column trains, and sees at the named layers what its predecessors compute there. The
    older ones stay bit for bit as they are, buffers included: they are always in eval mode and run
    without gradients, whatever mode the network is in. State dicts know the number of columns:
    loading one adds those that are missing.

    Args:
        factory: Makes a column, always of the same architecture. It is called once now.
        lateral: Names of a column's layers (``nn.Linear`` or convolutions, each used once in a
            forward pass) at which adapters are put; () for columns that do not see each other.

    Raises:
        ValueError: A column has no such layer, or it is of another kind.

    Example:
        >>> net = ProgressiveNetwork(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(),
        ...                                                nn.Linear(8, 2)), lateral=["2"])
        >>> net.add_column()  # after training the first task
        1
        >>> opt = cl_optim.EWCAdamW(net.new_parameters())
        >>> old = net(x, task=0)

    References:
        Rusu et al. 2016, arXiv:1606.04671, eq. 2 (with ReLU, and α from 0.1).
    """

    def __init__(self, factory: Callable[[], nn.Module], lateral: Sequence[str]) -> None:
        super().__init__()
        self._factory = factory
        self._lateral = tuple(lateral)
        self.columns = nn.ModuleList()
        self.adapters = nn.ModuleList()  # of each column, in the order of `lateral`
        self.add_column()

    def __len__(self) -> int:
        return len(self.columns)

    def add_column(self) -> int:
        """Freeze all columns and add one, with its adapters; returns its number.

        It gets the devices and dtypes of the column before it. An optimizer for it is made anew, of
        :meth:`new_parameters`.
        """
        column = self._factory()
        layers = [self._layer(column, name) for name in self._lateral]
        if len(self):
            _move_like(column, self.columns[-1])
        older = len(self)
        adapters = nn.ModuleList(LateralAdapter(layer, older) for layer in layers if older)
        for param in self.parameters():
            param.requires_grad_(False)
            param.grad = None
        self.columns.append(column)
        self.adapters.append(adapters)
        self.train(self.training)
        return older

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return names and parameters of the newest column and its adapters, for an optimizer."""
        return ((name, param) for name, param in self.named_parameters() if param.requires_grad)

    def growth(self) -> list[Growth]:
        """Count the parameters that each column added."""
        rows: list[Growth] = []
        total = 0
        for number, parts in enumerate(zip(self.columns, self.adapters, strict=True)):
            weights, lateral = (sum(p.numel() for p in part.parameters()) for part in parts)
            total += weights + lateral
            rows.append(Growth(number, weights, lateral, total))
        return rows

    def train(self, mode: bool = True) -> ProgressiveNetwork:
        """Set the mode of the newest column; the others are always in eval mode."""
        super().train(mode)
        for parts in (self.columns, self.adapters):
            for old in list(parts)[:-1]:
                old.eval()
        return self

    def forward(self, *args: Any, task: int | None = None, **kwargs: Any) -> Any:
        """Run a task's column on what the columns before it compute.

        Args:
            args: Of a column's forward.
            task: The column's number; None: the newest.
            kwargs: Of a column's forward.

        Returns:
            What the column returns.

        Raises:
            ValueError: There is no such column.
            RuntimeError: A layer with adapters was not used exactly once, or a column changed its
                input in place.
        """
        newest = len(self) - 1
        task = newest if task is None else task
        if not 0 <= task <= newest:
            raise ValueError(f"task must be a column from 0 to {newest}, not {task}.")
        seen: dict[str, list[Tensor]] = {name: [] for name in self._lateral}
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        versions = [x._version for x in inputs if not x.is_inference()]
        for number in range(task + 1):
            with torch.set_grad_enabled(number == newest and torch.is_grad_enabled()):
                output = self._run(number, seen, args, kwargs)
            if number < task and versions != [x._version for x in inputs if not x.is_inference()]:
                raise RuntimeError(
                    f"column {number} must not change its input in place: the other columns get "
                    "the same tensors."
                )
        return output

    def _run(
        self, number: int, seen: dict[str, list[Tensor]], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Run one column, and keep the inputs of its layers with adapters."""
        column, adapters = self.columns[number], list(self.adapters[number].children())
        handles = []
        for index, name in enumerate(self._lateral):

            def hook(
                layer: nn.Module,
                args: Any,
                kwargs: Any,
                output: Tensor,
                index: int = index,
                name: str = name,
            ) -> Tensor:
                inputs = seen[name]
                added = adapters[index](inputs[:number]) if number else None
                inputs.append(args[0] if args else kwargs["input"])
                return output if added is None else output + added

            layer = self._layer(column, name)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        try:
            output = column(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for name, inputs in seen.items():
            if len(inputs) != number + 1:
                uses = len(inputs) - number
                raise RuntimeError(
                    f"lateral layer {name!r} must be used once in a forward pass, not {uses} times."
                )
        return output

    def _layer(self, column: nn.Module, name: str) -> nn.Module:
        layers = dict(column.named_modules())
        layer = layers.get(name)
        if not isinstance(layer, _LAYERS):
            known = [n for n, each in layers.items() if isinstance(each, _LAYERS)]
            found = "is not in it" if layer is None else f"is a {type(layer).__name__}"
            raise ValueError(
                f"lateral must name linear layers or convolutions of a column, {known}, but "
                f"{name!r} {found}."
            )
        return layer

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Called before the children are loaded, so that they can still be added.
        head = f"{prefix}columns."
        numbers = {int(k[len(head) :].partition(".")[0]) for k in state_dict if k.startswith(head)}
        while len(self) <= max(numbers, default=0):
            self.add_column()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _move_like(column: nn.Module, other: nn.Module) -> None:
    """Give a column the devices and dtypes of another of the same architecture."""
    with torch.no_grad():
        for tensors in (nn.Module.parameters, nn.Module.buffers):
            for own, like in zip(tensors(column), tensors(other), strict=False):
                own.data = own.to(like)
