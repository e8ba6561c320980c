"""Old weights, wherever they are, under the names of a model."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cl_optim.distributed import here, is_dtensor, whole
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.names import Lazy, match_names
from cl_optim.ops.checks import listed
from cl_optim.optim.protecting import anchors
from cl_optim.retention import sealed_torch

# What holds the weights: a state dict, a model, an optimizer with anchors, or where a file is.
Old = Mapping[str, Tensor] | nn.Module | torch.optim.Optimizer | str | os.PathLike[str]

_FILES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_INDEX = "model.safetensors.index.json"
_INSIDE = ("model", "state_dict", "model_state_dict")  # where trainers put it in a checkpoint


def old_weights(old: Old, model: nn.Module) -> Mapping[str, Tensor]:
    """Return old weights by their own names, each read when it is asked for.

    Args:
        old: A state dict; a model; an optimizer with anchors (or what is around one), whose model
            is ``model``; a ``.safetensors`` file or one of ``torch.save``, a guard's checkpoint, or
            a folder of transformers' or peft's.
        model: Whose parameters an optimizer's are.

    Raises:
        TypeError: It is none of these.
        ValueError: An optimizer has no anchors, or a file has no weights.
        OSError: A file cannot be read.
    """
    if isinstance(old, nn.Module):
        return old.state_dict(keep_vars=True)
    if isinstance(old, torch.optim.Optimizer) or hasattr(old, "param_groups"):
        return anchors_of(old, model)
    if isinstance(old, Mapping):
        return old
    if isinstance(old, (str, os.PathLike)):
        return _from_path(Path(old))
    raise TypeError(
        "old must be a state dict, a module, an optimizer with anchors or a path, not "
        f"{type(old).__name__}."
    )


def anchors_of(optimizer: Any, model: nn.Module) -> Mapping[str, Tensor]:
    """Return an optimizer's anchors, or those of one that it is around, by the model's names.

    Raises:
        ValueError: It has none, or none of this model.
    """
    of_params = anchors(optimizer)
    if not of_params:
        raise ValueError(
            f"old is {type(optimizer).__name__}, which has no anchors: consolidate() it before "
            "the new task, or give the old weights as a state dict or a file."
        )
    found = {
        name: of_params[param] for name, param in model.named_parameters() if param in of_params
    }
    if not found:
        raise ValueError(
            "old is an optimizer of another model: none of its anchors is of this one."
        )
    return found


def running_statistics(model: nn.Module) -> list[str]:
    """Return the names of the running means and variances of a model's norms.

    Training changes them, and an optimizer's anchors do not have them.
    """
    return [
        f"{name}.{kind}" if name else kind
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for kind in ("running_mean", "running_var")
        if getattr(module, kind) is not None
    ]


# --- files ----------------------------------------------------------------------------------------


def _from_path(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        if (path / _INDEX).is_file():
            return _sharded(path)
        inside = [path / name for name in _FILES if (path / name).is_file()]
        if not inside:
            raise ValueError(f"old: {str(path)!r} holds none of {', '.join((_INDEX, *_FILES))}.")
        path = inside[0]
    if not path.exists():
        raise FileNotFoundError(f"old: there is no file {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        sealed_torch.verify_sealed(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, DamagedError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"old: {str(path)!r} cannot be read ({type(error).__name__}): give a whole file of "
            "safetensors or torch.save."
        ) from error
    while isinstance(content, Mapping) and not _is_state_dict(content):
        if isinstance(content.get("parts"), Mapping):  # a guard's
            content = content["parts"]
        keys = [key for key in _INSIDE if isinstance(content.get(key), Mapping)]
        if not keys:
            break
        content = content[keys[0]]
    if not _is_state_dict(content):
        raise ValueError(f"old: {str(path)!r} holds no state dict of a model.")
    return dict(content)


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _safetensors(path: Path) -> Mapping[str, Tensor]:
    file: Any = safe_open(path, framework="pt")
    return Lazy(set(file.keys()), file.get_tensor)


def _sharded(folder: Path) -> Mapping[str, Tensor]:
    places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {name: _safetensors(folder / name) for name in set(places.values())}
    return Lazy(places, lambda name: files[places[name]][name])


# --- names ----------------------------------------------------------------------------------------


def matched(
    old: Mapping[str, Tensor], model: nn.Module, *, strict: bool
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Find the old value of each tensor of a model.

    Args:
        old: By name, as wrappers may have changed it.
        model: The model.
        strict: Refuse names that one of the two lacks.

    Returns:
        What reads the old value, by the first name of each parameter and floating-point buffer; and
        the names of trained parameters that there is nothing old of.

    Raises:
        ValueError: Shapes differ, one of two names of a tied weight has another value, or with
            ``strict`` a name of ``old`` is not the model's.
    """
    aliases: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if tensor.is_floating_point():
                aliases.setdefault(id(tensor), []).append(name)
                tensors[name] = tensor
    known = model.state_dict(keep_vars=True)
    meanings = match_names(old, {**known, **tensors})
    unknown = [name for name in old if name not in meanings]
    if strict and unknown:
        raise ValueError(
            f"old has names that the model lacks: {listed(unknown)}; strict=False leaves out what "
            "only one of the two has."
        )
    names = {meaning: name for name, meaning in meanings.items()}
    found: dict[str, Callable[[], Tensor]] = {}
    missing = []
    for first, *others in aliases.values():
        given = [names[name] for name in (first, *others) if name in names]
        if not given:
            if isinstance(tensors[first], nn.Parameter) and tensors[first].requires_grad:
                missing.append(first)
            continue
        value = old[given[0]]
        if value.shape != tensors[first].shape:
            raise ValueError(
                f"{first!r} has shape {tuple(tensors[first].shape)} and the old one "
                f"{tuple(value.shape)}: weights of two shapes have nothing between them; cut the "
                "larger one to what both have."
            )
        _check_apart(first, tensors[first], value)
        for other in given[1:]:
            if not torch.equal(whole(old[other]), whole(value)):
                raise ValueError(
                    f"{first!r} is tied to {', '.join(map(repr, others))}, and old has two values "
                    "for it: tie the old ones, too, or untie the model's."
                )
        found[first] = partial(_read, old, given[0], tensors[first])
    return found, missing


def _read(old: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """Return the old value, or of a DTensor's the part that is in this process."""
    return here(old[name], tensor)


def _check_apart(name: str, tensor: Tensor, old: Tensor) -> None:
    """Refuse what is the model's own memory, as a state dict is that was not copied."""
    trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
    if is_dtensor(tensor) != is_dtensor(old):
        return
    tensor, old = here(tensor), here(old)
    if trained and tensor.numel() and old.data_ptr() == tensor.data_ptr():
        raise ValueError(
            f"old is the model's own memory ({name!r}): training has changed it, too. Copy the "
            "weights before it: {name: value.clone() for name, value in "
            "model.state_dict().items()}."
        )


def check_local(tensors: Mapping[str, Tensor], parts: bool = False) -> None:
    """Refuse weights that others cannot take the place of.

    Args:
        tensors: By name.
        parts: Whether DTensors will do, whose parts are in this process.

    Raises:
        ValueError: They are distributed over devices, or not there.
    """
    for name, tensor in tensors.items():
        if (is_dtensor(tensor) and not parts) or "_flat_param" in name:
            raise ValueError(
                f"{name!r} is distributed over devices: gather the weights into one model "
                "(get_model_state_dict with full_state_dict=True) and take that."
            )
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device: load the model's weights first.")
