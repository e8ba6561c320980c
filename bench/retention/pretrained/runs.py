"""What happens before the new domain is learned, and one run: how it is learned, and measured."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bench.retention.drift import Drift
from bench.retention.pretrained import base
from bench.retention.pretrained.methods import Method, Setting
from bench.retention.pretrained.probes import ask
from bench.retention.pretrained.texts import Domain, Part, code, german, prose, sayings
from bench.retention.saved_runs import write
from bench.retention.training import part_of, rate_factor
from cl_optim import EWCAdamW, Importance, KroneckerImportance, estimate_fisher
from cl_optim.demo.machine import versions
from cl_optim.demo.methods import WEIGHT_DECAY, Structure
from cl_optim.demo.scenarios import generator
from cl_optim.optim.settling import settle
from cl_optim.retention import (
    Evaluation,
    ReplayBuffer,
    TopK,
    distillation_loss,
    interpolation_curve,
    self_written,
    top_k,
)
from cl_optim.retention.adapters import LoRAPenalty
from cl_optim.retention.guard.evaluation import Role

_WARM_UP = 10  # steps
_CLIP = 1.0
_RANK = 16
_AT_ONCE = 4  # windows of which the Fisher information is computed
# What is measured, beside each domain's nats per token.
PROBES, PROBE_NATS = "probes", "probe nats"


@dataclass(frozen=True)
class Domains:
    """Texts by what they are for.

    Attributes:
        new: Is learned.
        old: What the model knows, and replay has some of.
        unseen: What the model knows, and nothing that protects it ever sees.
    """

    new: Domain
    old: tuple[Domain, ...]
    unseen: Domain

    @property
    def all(self) -> tuple[Domain, ...]:
        """Return the new one, the old ones and the unseen one."""
        return (self.new, *self.old, self.unseen)


@dataclass(frozen=True)
class Place:
    """Where a benchmark's files are.

    Attributes:
        folder: Of everything that it writes.
        texts: Where Debian's packages of texts are unpacked.
    """

    folder: Path
    texts: Path

    @property
    def base(self) -> Path:
        """Return the folder of the base model."""
        return self.folder / "prepared" / "base"

    def own(self, seed: int) -> Path:
        """Return the folder of what the base model wrote."""
        return self.folder / "prepared" / f"own-{seed}"

    def importance(self, structure: Structure, seed: int) -> Path:
        """Return the file of its Fisher information on that."""
        return self.folder / "prepared" / f"{structure}-{seed}.safetensors"

    def before(self, seed: int) -> Path:
        """Return the file of its measures; it is the last that is written."""
        return self.folder / f"before-{seed}.json"

    def run(self, method: Method, seed: int) -> Path:
        """Return the file of a run."""
        return self.folder / f"run-{seed}-{method.slug}.json"

    def choice(self, method: Method, rate: float) -> Path:
        """Return the file of what the choice of a learning rate measured."""
        return self.folder / f"rate-{method.kind}-{rate:g}.json"


@cache
def domains(texts: Path) -> Domains:
    """Read all texts."""
    return Domains(german(texts), (prose(texts), code()), sayings(texts))


def tokens_of(place: Place, setting: Setting) -> base.Tokens:
    """Return how a base model reads texts."""
    return base.byte_tokens() if setting.base == "toy" else base.smollm2_tokens(place.base)


class Reader:
    """Windows of texts, as a base model reads them."""

    def __init__(self, place: Place, setting: Setting) -> None:
        self.tokens, self._length = tokens_of(place, setting), setting.length + 1

    def __call__(
        self, domain: Domain, part: Part, count: int, draw: torch.Generator | None = None
    ) -> Tensor:
        """Return windows [count, length + 1]."""
        tokens = self.tokens
        return domain.windows(part, count, self._length, tokens.of, tokens.start, draw)


def prepare(place: Place, setting: Setting, seed: int) -> None:
    """Write the base model, what it writes itself, its Fisher information there, its measures."""
    texts = domains(place.texts)
    place.base.parent.mkdir(parents=True, exist_ok=True)
    if not place.base.exists():
        beside = place.base.with_name("base.partial")
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was cut short
        if setting.base == "toy":
            base.toy(beside, (*texts.old, texts.unseen), setting.length)
        else:
            base.smollm2(beside)
        tokens = base.byte_tokens() if setting.base == "toy" else base.smollm2_tokens(beside)
        base.heal(beside, texts.old, tokens, setting.length, setting.batch, setting.healing)
        beside.rename(place.base)
    model, read = base.load(place.base), Reader(place, setting)
    own = place.own(seed)
    shutil.rmtree(own, ignore_errors=True)  # of a run that was cut short
    with self_written(
        model, setting.own, setting.length, start=read.tokens.start, top=64, seed=seed, path=own,
        progress=False,
    ) as written:  # fmt: skip
        some = written.sample(setting.fisher)["input_ids"]
    for structure in get_args(Structure):
        importance = estimate_fisher(
            model, torch.split(some, _AT_ONCE), labels="sample", structure=structure,
            generator=generator(seed, "labels"), progress=False,
        )  # fmt: skip
        importance.save(place.importance(structure, seed))
    measured = {one.name: one.measure(model) for one in evaluations(place, setting)}
    write(place.before(seed), {"setting": setting.record(), "measured": measured})


def evaluations(place: Place, setting: Setting) -> list[Evaluation]:
    """Return what is measured of a model: all domains' test parts, and the probes."""
    texts, read = domains(place.texts), Reader(place, setting)

    def evaluation(domain: Domain) -> Evaluation:
        windows = read(domain, "test", setting.held_out)
        role: Role = "new" if domain is texts.new else "old"
        return Evaluation(
            domain.name, lambda model: base.nats(model, windows), role, higher_is_better=False
        )

    # Both numbers of the probes, of one pass over them.
    answers: dict[str, float] = {}

    def accuracy(model: nn.Module) -> float:
        found = ask(lambda t: base.logits_of(model, t), read.tokens.of, read.tokens.start)
        answers[PROBE_NATS] = found.nats
        return found.accuracy

    def probe_nats(model: nn.Module) -> float:
        return answers[PROBE_NATS]

    return [
        *map(evaluation, texts.all),
        Evaluation(PROBES, accuracy),
        Evaluation(PROBE_NATS, probe_nats, higher_is_better=False),
    ]


def choose(method: Method, rate: float, place: Place, setting: Setting) -> None:
    """Measure a learning rate on the new domain's validation part."""
    model, _, _ = learn(method, rate, place, setting, seed=0)
    windows = Reader(place, setting)(domains(place.texts).new, "validation", setting.held_out)
    record = {"setting": setting.record(), "rate": rate, "nats": base.nats(model, windows)}
    write(place.choice(method, rate), record)


def rate_of(method: Method, place: Place, setting: Setting) -> float:
    """Return a method's learning rate: its multiple of the one with the least validation loss."""
    rates = setting.rates if method.kind == "full" else setting.lora_rates
    found = {rate: json.loads(place.choice(method, rate).read_text())["nats"] for rate in rates}
    return method.rate * min(found, key=found.__getitem__)


def run(method: Method, place: Place, setting: Setting, seed: int) -> None:
    """Learn the new domain, measure on the way back to the old weights, and write all of it."""
    rate = rate_of(method, place, setting)
    model, seconds, memory = learn(method, rate, place, setting, seed)
    curve = interpolation_curve(model, place.base, evaluations(place, setting), setting.alphas)
    points = [
        {"alpha": point.alpha, **{one.evaluation.name: one.value for one in point.measured}}
        for point in curve.points
    ]
    record = {
        "method": asdict(method),
        "seed": seed,
        "setting": setting.record(),
        "rate": rate,
        "points": points,
        "drift": asdict(_drift(model, place, setting, seed)),
        "seconds": seconds,
        "gib": memory,
        "device": base.DEVICE.type,
        "versions": versions(),
    }
    write(place.run(method, seed), record)


def learn(
    method: Method, rate: float, place: Place, setting: Setting, seed: int
) -> tuple[Any, float, float]:
    """Learn the new domain.

    Returns:
        The model, in eval mode, adapters merged; the median of a step's seconds; the most memory
        in GiB that the process has had, or on a GPU its tensors.
    """
    model = base.load(place.base)
    lora = _add_lora(model, seed) if method.kind == "lora" else None
    trained = model if lora is None else lora
    optimizer = EWCAdamW(
        [(name, param) for name, param in trained.named_parameters() if param.requires_grad],
        lr=rate, weight_decay=WEIGHT_DECAY, penalty="proximal", strength=method.strength,
    )  # fmt: skip
    penalty: LoRAPenalty | None = None
    if method.strength is not None and lora is not None:
        penalty = _penalty(method.strength, model, lora, place, seed)
    elif method.strength is not None:
        optimizer.consolidate(_importance(method, place, seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, rate_factor(setting.steps, _WARM_UP, decay=method.decay)
    )
    objective = _Objective(method, place, setting, seed)
    seconds = []
    for windows in objective.batches(setting.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(objective(trained, windows))
        if penalty is not None:
            penalty.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
        if base.DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    settle(optimizer)
    memory = _most_memory()
    merged = model if lora is None else lora.merge_and_unload()
    return merged.eval().requires_grad_(True), statistics.median(seconds), memory


def _importance(method: Method, place: Place, seed: int) -> Importance | None:
    if method.structure is None:
        return None
    kind = KroneckerImportance if method.structure == "kronecker" else Importance
    return kind.load(place.importance(method.structure, seed), base.DEVICE)


def _add_lora(model: nn.Module, seed: int) -> Any:
    import peft

    config = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def _penalty(strength: float, model: Any, lora: Any, place: Place, seed: int) -> LoRAPenalty:
    """Return EWC in the space of the full weights, with λ of a strength as EWCAdamW makes it."""
    importance = Importance.load(place.importance("diagonal", seed), base.DEVICE)
    adapted = [
        (importance[f"{name}.weight"], module.base_layer.weight.detach())
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    ]
    count = sum(fisher.numel() for fisher, _ in adapted)
    fisher_mean = sum(float(fisher.sum()) for fisher, _ in adapted) / count
    square_mean = sum(float(weight.square().sum()) for _, weight in adapted) / count
    return LoRAPenalty(lora, importance, strength / (fisher_mean * square_mean))


class _Objective:
    """The loss of a batch of which a part may be old text, or written by the old model."""

    def __init__(self, method: Method, place: Place, setting: Setting, seed: int) -> None:
        self._method, self._setting, self._seed = method, setting, seed
        self._read, self._texts = Reader(place, setting), domains(place.texts)
        self._rounding = generator(seed, "windows that are replaced")
        self._was = base.load(place.base) if method.lwf or method.stored else None
        self._old = self._own = None
        if method.needs_old_data:
            self._old = self._kept(seed)
        if method.own:
            self._own = ReplayBuffer(setting.own, seed=seed)
            with ReplayBuffer(setting.own, path=place.own(seed), read_only=True) as written:
                self._own.add(written.samples())

    def _kept(self, seed: int) -> ReplayBuffer:
        """Keep old text that is still there, with the old outputs where a method needs them."""
        each = self._setting.kept // len(self._texts.old)
        kept = ReplayBuffer(self._setting.kept, seed=seed)
        for domain in self._texts.old:
            windows = self._read(domain, "train", each, generator(seed, domain.name))
            for part in torch.split(windows, _AT_ONCE):
                kept.add(self._sample(part))
        return kept

    def _sample(self, windows: Tensor) -> Any:
        if not self._method.stored:
            return {"windows": windows}
        inputs = windows[:, :-1]
        with torch.no_grad():
            return {"input_ids": inputs, "old": top_k(base.logits_of(self._was, inputs))}

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield windows of the new domain: the same ones for all methods of a seed."""
        draw = generator(self._seed, "new windows")
        for _ in range(steps):
            yield self._read(self._texts.new, "train", self._setting.batch, draw)

    def __call__(self, model: nn.Module, windows: Tensor) -> Tensor:
        """Return the mean over all positions of cross-entropy, or of KL to the old outputs."""
        method, batch = self._method, len(windows)
        replayed, stored, own = (
            self._number(part) for part in (method.replay, method.stored, method.own)
        )
        inputs: list[Tensor] = []
        targets: list[Tensor | TopK] = []
        fresh = windows[replayed + stored + own :]
        for found in (fresh, self._draw(self._old, replayed, "windows")):
            if found is not None and len(found):
                inputs.append(found[:, :-1])
                targets.append(found[:, 1:])
        for buffer, count in ((self._old, stored), (self._own, own)):
            if buffer is not None and count:
                sample = buffer.sample(count)
                inputs.append(sample["input_ids"])
                targets.append(TopK(*(part.to(base.DEVICE) for part in sample["old"])))
        logits = torch.split(
            base.logits_of(model, torch.cat(inputs), autocast=True), [len(one) for one in inputs]
        )
        terms = [
            len(target if isinstance(target, Tensor) else target.log_probs) / batch
            * _term(one, target)
            for one, target in zip(logits, targets, strict=True)
        ]  # fmt: skip
        total = torch.stack(terms).sum()
        if method.lwf:
            with torch.no_grad():
                old = base.logits_of(self._was, inputs[0], autocast=True)
            total = total + method.lwf * distillation_loss(logits[0], old)
        return total

    def _number(self, part: float) -> int:
        """Return how many windows of a batch a part is."""
        return part_of(self._setting.batch, part, self._rounding)

    @staticmethod
    def _draw(buffer: ReplayBuffer | None, count: int, key: str) -> Tensor | None:
        if buffer is None or not count:
            return None
        found: Tensor = buffer.sample(count)[key]
        return found


def _term(logits: Tensor, target: Tensor | TopK) -> Tensor:
    if isinstance(target, Tensor):
        return base.cross_entropy(logits, target)
    return distillation_loss(logits, target)


def _drift(model: nn.Module, place: Place, setting: Setting, seed: int) -> Drift:
    new = Reader(place, setting)(domains(place.texts).new, "validation", setting.held_out)[:, :-1]
    with ReplayBuffer(setting.own, seed=seed, path=place.own(seed), read_only=True) as written:
        own = written.sample(setting.held_out)["input_ids"]
    fisher = Importance.load(place.importance("diagonal", seed), base.DEVICE)
    inputs = (torch.split(part.to(base.DEVICE), _AT_ONCE) for part in (new, own))
    return Drift.of(model, base.weights(place.base), fisher, *inputs)


def _most_memory() -> float:
    if base.DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
