"""How the new domain is learned, and the settings that all methods share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cl_optim.demo.methods import Structure

Kind = Literal["full", "lora"]


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        base: The model.
        length: Tokens of a window.
        batch: Windows in a step.
        steps: Of learning the new domain.
        healing: Steps on old text before everything: 4-bit weights that were made for chat get
            better at any plain text at first, which would look as if nothing were forgotten.
        own: Windows that the old model writes.
        kept: Windows of old text that replay may keep, of two domains.
        fisher: Windows of those it wrote that the Fisher information is of.
        held_out: Windows of each domain that are measured on.
        rates: Learning rates, of which one is chosen on the new domain's validation part.
        lora_rates: The same for adapters.
        alphas: On the way from the end back to the old weights.
    """

    base: Literal["SmolLM2-135M", "toy"] = "SmolLM2-135M"
    length: int = 128
    batch: int = 4
    steps: int = 100
    healing: int = 200
    own: int = 256
    kept: int = 256
    fisher: int = 64
    held_out: int = 16
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    lora_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    alphas: tuple[float, ...] = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35)

    def record(self) -> dict[str, Any]:
        """Return what files say of it: all but the learning rates, of which one was chosen."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in fields.items() if not key.endswith("rates")}


QUICK = Setting(
    base="toy", length=48, steps=12, healing=3, own=24, kept=24, fisher=8, held_out=6,
    rates=(1e-3, 3e-3), lora_rates=(1e-2,), alphas=(1.0, 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How the new domain is learned.

    Attributes:
        label: In tables and, in small letters, in the name of a run's file.
        kind: All weights, or adapters of rank 16 on all linear layers.
        rate: The learning rate, as a multiple of the one that was chosen.
        decay: The learning rate falls to 0, linearly, after the first fifth of the steps.
        strength: Of EWC, without a unit; None: none.
        structure: Of EWC's importance; None: all weights count alike, L2-SP.
        replay: The part of each batch that is old text, in [0, 1).
        stored: The part that is old text where the loss is KL to the old outputs.
        own: The part that the old model wrote itself, where the loss is that KL.
        lwf: The weight of KL to the old model's outputs on the new text; 0: none.
    """

    label: str
    kind: Kind = "full"
    rate: float = 1.0
    decay: bool = True
    strength: float | None = None
    structure: Structure | None = None
    replay: float = 0.0
    stored: float = 0.0
    own: float = 0.0
    lwf: float = 0.0

    @property
    def slug(self) -> str:
        """Return what stands for it in the names of files."""
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.label).split())

    @property
    def needs_old_data(self) -> bool:
        """Say whether it needs text that the old model has learned."""
        return self.replay > 0.0 or self.stored > 0.0


def _ewc(strength: float, structure: Structure | None, name: str) -> Method:
    return Method(f"{name}, {strength:g}", strength=strength, structure=structure)


ADAMW = Method("AdamW")
OWN = Method("self-written 25%, KL", own=0.25)
LORA = Method("LoRA", kind="lora")
METHODS = (
    replace(ADAMW, label="AdamW, constant rate", decay=False),
    ADAMW,
    replace(ADAMW, label="AdamW, a third of the rate", rate=1 / 3),
    replace(ADAMW, label="AdamW, a tenth of the rate", rate=0.1),
    *(_ewc(strength, None, "L2-SP") for strength in (0.3, 3.0)),
    *(_ewc(strength, "diagonal", "EWC") for strength in (1.0, 10.0)),
    *(_ewc(strength, "kronecker", "EWC, Kronecker") for strength in (1.0, 10.0)),
    LORA,
    *(replace(_ewc(strength, "diagonal", "LoRA + EWC"), kind="lora") for strength in (1.0, 10.0)),
    replace(OWN, label="LoRA + self-written 25%, KL", kind="lora"),
    *(Method(f"LwF, {weight:g}", lwf=weight) for weight in (0.3, 1.0)),
    *(replace(OWN, label=f"self-written {f:.0%}, KL", own=f) for f in (0.1, 0.25)),
    *(Method(f"replay {f:.0%}", replay=f) for f in (0.01, 0.05, 0.1)),
    Method("replay 10%, stored outputs", stored=0.1),
    replace(
        OWN, label="EWC, Kronecker, 10 + self-written 25%", strength=10.0, structure="kronecker"
    ),
    replace(OWN, label="self-written 10% + replay 5%", own=0.1, replay=0.05),
)
