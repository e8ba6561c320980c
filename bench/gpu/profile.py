"""Three kernels at the sizes of the goals, a few calls each, for ncu to look at."""

from __future__ import annotations

import torch
from contenders import PROTECTED, Problem, ewc, gpt2_shapes

from cl_optim import functional as F
from gpu import device as devices
from gpu.gram import TINY, Rows

CALLS = 2


def main() -> None:
    device = devices.find()
    shapes = device.pick(gpt2_shapes(embeddings=True), TINY)
    step = ewc(**PROTECTED["EWCAdamW gradient"])(Problem(shapes, device.name))
    rows = Rows(shapes, 10, torch.float32, device.name)
    samples, tokens, in_features, out_features = device.pick((16, 512, 2048, 8192), (2, 3, 6, 7))
    half = torch.bfloat16
    a = torch.randn(samples, tokens, in_features, device=device.name, dtype=half)
    b = torch.randn(samples, tokens, out_features, device=device.name, dtype=half)
    out = torch.zeros(out_features, in_features, device=device.name)
    weight_grad = torch.zeros_like(out)
    for _ in range(CALLS):
        step()
        F.gram(rows.memory, rows.grads)
        F.squared_grad_sum_(out, a, b, weight_grad)
    device.synchronize()
    print("Three kernels were called.")


if __name__ == "__main__":
    main()
