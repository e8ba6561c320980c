"""What tracked steps sum of the penalty."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

_Key: TypeAlias = tuple[int, torch.device]


class Sums:
    """λ Σ F (θ − θ*)² and Σ (θ − θ*)² of each group on each device, float64 [2], from a step."""

    def __init__(self) -> None:
        self._sums: dict[_Key, Tensor] = {}

    @staticmethod
    def key(group: Mapping[str, Any], device: torch.device) -> _Key:
        """Return under what a group's sums on a device are kept."""
        return id(group), device

    def __contains__(self, key: _Key) -> bool:
        return key in self._sums

    def __getitem__(self, key: _Key) -> Tensor:
        """Return where a step writes the sums; they begin with 0."""
        if key not in self._sums:
            self._sums[key] = torch.zeros(2, dtype=torch.float64, device=key[1])
        return self._sums[key]

    def clear(self, kept: Collection[_Key] = ()) -> None:
        """Set all but some to 0, in place: a captured step writes there."""
        for key, sums in self._sums.items():
            if key not in kept:
                sums.zero_()

    def by_group(self, groups: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """Add up what the devices have of each group: [groups, 2]."""
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        rows = [
            [sums.to(device) for (group_id, _), sums in self._sums.items() if group_id == id(group)]
            for group in groups
        ]
        return torch.stack([sum(of_group, start=nothing) for of_group in rows])
