"""Training a part of a model: its last layers, or LoRA adapters under EWC in the full space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.importance.importance import check_reduced
from cl_optim.importance.names import match_names, named_like
from cl_optim.ops.checks import check_fraction, check_whole

_KEEP_WEIGHTS = ("gaussian", "eva", "orthogonal", "mica")  # names in peft of ways to begin at W


def train_last_layers(
    model: nn.Module, n: int, layers: str | None = None, also: Sequence[str] = ()
) -> list[str]:
    """Let only the last ``n`` layers of a stack learn; everything else is frozen.

    Give the optimizer the parameters that are returned, or that require gradients:
    ``EWCAdamW((name, p) for name, p in model.named_parameters() if p.requires_grad)``.

    Args:
        model: Its parameters' ``requires_grad`` is set.
        n: At least 1, at most as many as there are.
        layers: Name of the stack, an ``nn.ModuleList`` or ``nn.Sequential`` (``"transformer.h"``).
            None: the longest one that is not inside another.
        also: Names of further modules that learn, such as the head.

    Returns:
        The names of the parameters that learn. A weight that is tied to one of them learns, too.

    Raises:
        ValueError: ``n`` is out of range, or a name is unknown. Nothing has been changed then.
    """
    modules = dict(model.named_modules())
    stack = _stack(model, modules, layers)
    check_whole("n", n, 1, len(stack), ", the number of layers")
    for name in also:
        if name not in modules:
            raise ValueError(f"also names {name!r}, which is no module of the model.")
    chosen = [*list(stack)[-n:], *(modules[name] for name in also)]
    learning = {id(param) for module in chosen for param in module.parameters()}
    for param in model.parameters():
        param.requires_grad_(id(param) in learning)
    return [name for name, param in model.named_parameters() if param.requires_grad]


def _stack(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: str | None
) -> nn.ModuleList | nn.Sequential:
    stacks = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    }
    if layers is not None:
        if layers not in stacks:
            raise ValueError(
                f"layers must name an nn.ModuleList or nn.Sequential of the model, one of "
                f"{sorted(stacks)}, not {layers!r}."
            )
        return stacks[layers]
    outer = [
        module
        for name, module in stacks.items()
        if not any(_is_inside(name, other) for other in stacks)
    ]
    if not outer:
        raise ValueError(
            f"layers cannot be found: {type(model).__name__} has no nn.ModuleList or nn.Sequential."
        )
    return max(outer, key=len)


def _is_inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


class LoRAPenalty:
    r"""EWC for LoRA in the space of the full weights: λ Σ F (ΔW − ΔW*)² with ΔW = s·BA.

    The importance is that of the frozen weights W, estimated before the adapters were added. A
    penalty on A and B themselves, each with its own Fisher information, is another one: it depends
    on how ΔW happens to be factored, and at first, where B = 0, A has no Fisher information at all.
    That one needs nothing from here: give EWCAdamW the adapters' parameters, and ``consolidate``
    with the Fisher of the adapted model.

    It is a loss term: add it to the loss, or call :meth:`backward` beside the loss's. One ΔW at a
    time is in memory, beside the importance.

    Args:
        model: A model of peft with LoRA adapters that are not merged.
        importance: F ≥ 0 by name of the base model's weights, each of its weight's shape; further
            names are ignored.
        ewc_lambda: λ ≥ 0, for Σ F ΔW² without ½.

    Raises:
        ValueError: The model has no LoRA layers, a layer is merged or a DoRA, the adapters were
            initialised in a way that changes W (PiSSA, OLoRA), or the importance lacks a weight or
            has a wrong shape or value.

    Example:
        .. code-block:: python

            importance = cl_optim.estimate_fisher(model, old_batches, labels="sample")
            model = peft.get_peft_model(model, peft.LoraConfig())
            penalty = LoRAPenalty(model, importance, ewc_lambda=100.0)
            loss(model, batch).backward()
            penalty.backward()

    References:
        EWC-LoRA, arXiv:2602.17559; Hu et al. 2021, arXiv:2106.09685 (LoRA).
    """

    def __init__(
        self, model: nn.Module, importance: Mapping[str, Tensor], ewc_lambda: float = 1.0
    ) -> None:
        if not 0.0 <= ewc_lambda < float("inf"):
            raise ValueError(f"ewc_lambda must be finite and at least 0, not {ewc_lambda}.")
        self.ewc_lambda = ewc_lambda
        self._layers = _lora_layers(model)
        self._importance = self._match(importance)
        self._anchors: dict[str, Tensor] = {}

    def __call__(self) -> Tensor:
        """Return the penalty, 0-dim and differentiable."""
        terms = [self._term(name) for name in self._layers]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def backward(self, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Add the penalty's gradient to the adapters' ``grad``, layer by layer; returns its value.

        Under gradient accumulation call it once per optimizer step.

        Args:
            scaler: The one that scales the loss, if one does: what it unscales is both gradients.
        """
        values = []
        for name in self._layers:
            term = self._term(name)
            torch.autograd.backward(term if scaler is None else scaler.scale(term))
            values.append(term.detach())
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    @torch.no_grad()
    def consolidate(self, importance: Mapping[str, Tensor], *, decay: float = 1.0) -> None:
        """Protect a further task: F ← decay·F + importance, ΔW* ← ΔW.

        Args:
            importance: Of the base model's weights with the adapters in effect.
            decay: What remains of the earlier importance, in [0, 1].

        Raises:
            ValueError: As in the class, or ``decay`` is out of range. Nothing has been changed.
        """
        check_fraction("decay", decay)
        new = self._match(importance)
        for name, layer in self._layers.items():
            total = decay * self._importance[name] + new[name]
            self._importance[name] = total.clamp_(max=torch.finfo(total.dtype).max)
            self._anchors[name] = _delta(layer)

    def state_dict(self) -> dict[str, Any]:
        """Return λ, importance and anchors."""
        return {
            "ewc_lambda": self.ewc_lambda,
            "importance": dict(self._importance),
            "anchors": dict(self._anchors),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for a model with the same adapters.

        Raises:
            ValueError: It belongs to another model. Nothing has been changed then.
        """
        loaded = self._match(state_dict["importance"])
        anchors = named_like(state_dict["anchors"], loaded)
        for name, value in anchors.items():
            if name not in loaded or value.shape != loaded[name].shape:
                raise ValueError(
                    f"the state's anchor of {name!r}, of shape {tuple(value.shape)}, is of no "
                    "adapted weight: load it for the model that it was saved of."
                )
        self.ewc_lambda = state_dict["ewc_lambda"]
        self._importance = loaded
        self._anchors = {name: value.to(loaded[name].device) for name, value in anchors.items()}

    def _term(self, name: str) -> Tensor:
        difference = _delta(self._layers[name])
        if name in self._anchors:
            difference = difference - self._anchors[name]
        return self.ewc_lambda * (self._importance[name] * difference.square()).sum()

    def _match(self, importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_reduced(importance)
        meanings = match_names(importance, self._layers)
        names = {meaning: name for name, meaning in meanings.items()}
        matched = {}
        for weight, layer in self._layers.items():
            if weight not in names:
                raise ValueError(f"importance has nothing for weight {weight!r}.")
            value = importance[names[weight]]
            base = layer.get_base_layer().weight
            if value.shape != base.shape:
                raise ValueError(
                    f"the importance of {weight!r} must have the weight's shape "
                    f"{tuple(base.shape)}, not {tuple(value.shape)}."
                )
            value = value.detach().to(base.device, torch.float32, copy=True)
            if not bool(((value >= 0) & value.isfinite()).all()):
                raise ValueError(
                    f"the importance of {weight!r} must be finite and at least 0 in float32; "
                    "Importance.normalize() scales one that is too large."
                )
            matched[weight] = value
        return matched


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers by the name of their frozen weight."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        # Where the adapters are injected into a model, their options are there.
        for adapter, config in (getattr(module, "peft_config", None) or {}).items():
            initial = getattr(config, "init_lora_weights", True)
            if isinstance(initial, str) and initial.lower() not in _KEEP_WEIGHTS:
                raise ValueError(
                    f"adapter {adapter!r} has init_lora_weights={initial!r}, which takes a part of "
                    f"W into BA, so that ΔW = BA is not what changed; use one of True, False, "
                    f"{', '.join(map(repr, _KEEP_WEIGHTS))}."
                )
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.merged:
            raise ValueError(f"the LoRA adapter of {name!r} must not be merged.")
        if any(getattr(module, "use_dora", {}).values()):
            raise ValueError(f"the adapter of {name!r} is a DoRA: its update is not BA alone.")
        layers[f"{name}.base_layer.weight"] = module
    if not layers:
        raise ValueError(f"model must have LoRA layers of peft; {type(model).__name__} has none.")
    return layers


def _delta(layer: Any) -> Tensor:
    """Return ΔW of the active adapters, of the weight's shape, in float32."""
    deltas = [layer.get_delta_weight(name).float() for name in layer.active_adapters]
    return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]
