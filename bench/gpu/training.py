"""Is a whole training step of GPT-2 small as fast with protection as without?"""

from __future__ import annotations

import copy
import statistics

import torch
from training_step import OPTIMIZERS, backward, protect, training_step
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW
from gpu import device as devices
from gpu import errors, report
from gpu.report import Check
from gpu.step import ALLOWED

TURNS, ROUNDS = 7, 10
PLAIN = "AdamW fused"


def check(config: GPT2Config, tokens: torch.Tensor) -> Check:
    """Of two protected steps on the model's own gradients, against the foreach reference."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(tokens.device)
    start = [param.detach().clone() for param in model.parameters()]
    backward(model, tokens)
    moves = []
    for fused in (True, False):
        twin = copy.deepcopy(model)
        for param, ours in zip(twin.parameters(), model.parameters(), strict=True):
            param.grad = ours.grad
        torch.manual_seed(1)
        optimizer = protect(
            EWCAdamW(twin.named_parameters(), lr=1e-5, fused=fused, foreach=not fused)
        )
        optimizer.step()
        optimizer.step()
        moves.append([p.detach() - s for p, s in zip(twin.parameters(), start, strict=True)])
    # A step of 1e-5 of weights of 0.02 is near the last bits of a float32 number.
    return Check(errors.relative(*moves), 100 * ALLOWED[torch.float32])


def main() -> None:
    device = devices.find()
    tiny = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=101, n_positions=64)
    config = device.pick(GPT2Config(), tiny)
    shape = device.pick((8, 512), (2, 16))
    tokens = torch.randint(config.vocab_size, shape, device=device.name)
    right = check(config, tokens)
    device.forget()
    steps = {name: training_step(make, config, tokens) for name, make in OPTIMIZERS.items()}
    turns = devices.take_turns(device, steps, TURNS, ROUNDS)
    for name, times in turns.items():
        middle = statistics.median(times)
        verdict = None if name == PLAIN else right
        idle = devices.idle_milliseconds(device, steps[name], ROUNDS)
        report.figure(
            f"training step, 8 x 512: {name}",
            middle,
            "ms",
            check=verdict,
            turns=times,
            idle_ms=idle,
        )
    ratio = devices.ratio(turns, "EWCAdamW", PLAIN)
    report.figure("protected training step / unprotected, 8 x 512", ratio, "x", check=right)


if __name__ == "__main__":
    main()
