"""The kernels as functions, for research and for optimizers of your own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cl_optim.ops import ewc_adamw
from cl_optim.ops import ewc_adamw_arguments as arguments
from cl_optim.ops import gram as gram_ops
from cl_optim.ops.nnqp import Solution, nnqp, sum_error
from cl_optim.ops.squared_grad import squared_grad_sum_

__all__ = ["ewc_adamw_", "gem_project", "gram", "nnqp", "squared_grad_sum_"]


@torch.no_grad()
def ewc_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    importances: Sequence[Tensor],
    anchors: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    ewc_lambda: float = 1.0,
    penalty: arguments.Penalty = "gradient",
    max_exp_avg_sqs: Sequence[Tensor] = (),
    maximize: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> None:
    """Take an EWC-AdamW step, in place, on lists of tensors of one device.

    The penalty is ``λ Σ F (θ − θ*)²`` of Kirkpatrick et al. 2017 (arXiv:1612.00796) without their
    ½; :class:`cl_optim.EWCAdamW` describes its three forms.

    Args:
        params: θ: float32, float64, bfloat16 or float16 tensors of any shapes and strides; updated.
        grads: The loss's gradients, of the parameters' dtypes and shapes.
        exp_avgs: First moments, float32 (float64 for float64 parameters), bfloat16 or codes
            (:mod:`cl_optim.ops.formats`); updated.
        exp_avg_sqs: Second moments, likewise; updated.
        importances: F ≥ 0, likewise; a sign bit, or the code of frozen ones, marks a weight that
            keeps its bits. An empty list for plain AdamW.
        anchors: θ*, float32 (float64), bfloat16 or of the parameter's dtype; an empty list for
            plain AdamW.
        steps: Steps taken so far, one float32 number per parameter, on its device; advanced by one.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, times lr.
        ewc_lambda: λ.
        penalty: ``"gradient"``, ``"decoupled"`` or ``"proximal"``.
        max_exp_avg_sqs: The running maxima of the second moments for AMSGrad, which is on where
            they are given; updated.
        maximize: Ascend the loss. The penalty is descended all the same.
        foreach: ``True`` takes the reference, written with ``torch._foreach_*``.
        fused: ``True`` insists on the compiled kernel. ``None`` takes it if it is there.

    Raises:
        ValueError: A hyperparameter is out of range, or lengths, shapes, dtypes or devices do not
            fit, or what is updated is lazily negated. Nothing has been written then.
        RuntimeError: ``fused=True`` is not possible.

    Example:
        >>> import torch
        >>> from cl_optim import functional as F
        >>> w, grad = torch.ones(3), torch.zeros(3)
        >>> m, v, step = torch.zeros(3), torch.zeros(3), torch.tensor(0.0)
        >>> fisher, anchor = torch.tensor([0.0, 1.0, 1e12]), torch.zeros(3)
        >>> F.ewc_adamw_([w], [grad], [m], [v], [fisher], [anchor], [step], lr=0.5,
        ...              weight_decay=0.0, penalty="proximal")
        >>> w
        tensor([1.0000e+00, 5.0000e-01, 1.0000e-12])
    """
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, not {len(betas)}.")
    hyper = arguments.Hyperparameters(
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        ewc_lambda=ewc_lambda,
        penalty=penalty,
        amsgrad=bool(max_exp_avg_sqs),
        maximize=maximize,
    )
    state = arguments.State(exp_avgs, exp_avg_sqs, max_exp_avg_sqs, importances, anchors, (), steps)
    arguments.check(params, grads, state, hyper.amsgrad)
    if not params:
        return
    _, step = ewc_adamw.choose(params[0].device.type, use_foreach=foreach, use_fused=fused)
    step(params, grads, state, hyper)


def gram(
    memory: Sequence[Tensor] | Tensor, grad: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply memory rows with each other and with a gradient, in one pass over the data.

    They are the matrix and the vector of the quadratic program of GEM (Lopez-Paz & Ranzato 2017,
    arXiv:1706.08840, eq. 11), whose rows are the gradients of t old tasks. A model's parameters
    are given as a list; they are neither flattened nor concatenated.

    Products are exact and summed in float64, each entry in the same order: equal rows give equal
    entries and g = −G_k gives c = −Q_k, bit for bit. On a CPU the result does not depend on the
    number of threads.

    Args:
        memory: G: [t, ...], or a list of n such tensors, one per parameter; t ≤ 1024. float32,
            float64, bfloat16 or float16, of any strides; dense rows are read as they lie.
        grad: g: [...], or a list of n such tensors, on the device of ``memory``; their dtypes may
            differ from the rows'.

    Returns:
        Q = GGᵀ, [t, t] float64, and c = Gg, [t] float64, on the device of ``grad``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from cl_optim import functional as F
        >>> old_tasks = [torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0])]
        >>> grad = [torch.tensor([-1.0, 0.0]), torch.tensor(-1.0)]
        >>> Q, c = F.gram(old_tasks, grad)
        >>> Q
        tensor([[5., 1.],
                [1., 2.]], dtype=torch.float64)
        >>> c
        tensor([-3., -1.], dtype=torch.float64)
    """
    return gram_ops.gram(memory, grad)


@torch.no_grad()
def gem_project(
    grad: Tensor, memory: Tensor, memory_strength: float = 0.0
) -> tuple[Tensor, Solution]:
    """Project gradients as GEM does: no product with a memory row is negative afterwards.

    The result is g̃ = g + Gᵀv, v the minimiser of ½ vᵀGGᵀv + (Gg)ᵀv with v ≥ ``memory_strength``
    (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, eq. 11). With ``memory_strength=0`` it is the
    vector nearest to g that satisfies G g̃ ≥ 0. A gradient that violates nothing is returned bit
    for bit, whatever the strength, as in the authors' code; so is one whose problem has no
    solution: its status is negative then.

    Args:
        grad: g [B, P], or [P] for a single problem; float32, float64, bfloat16 or float16.
        memory: G [B, t, P] or [t, P] on the same device; its dtype may differ.
        memory_strength: γ ≥ 0.

    Returns:
        g̃, a new tensor like ``grad``, and its certificate (``v`` [B, t] float64, ``status`` [B]
        int8, ``gap`` [B] float64, all without B for a single problem); the class
        :class:`cl_optim.ops.nnqp.Solution` says what they prove.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``memory_strength`` is out of range.

    Example:
        >>> import torch
        >>> from cl_optim import functional as F
        >>> projected, certificate = F.gem_project(torch.tensor([-1.0, 1.0]), torch.eye(2))
        >>> projected, certificate.v
        (tensor([0., 1.]), tensor([1., 0.], dtype=torch.float64))
    """
    if grad.dim() not in (1, 2):
        raise ValueError(f"grad must be [P] or [B, P], not {list(grad.shape)}.")
    wanted = (*grad.shape[:-1], memory.shape[-2] if memory.dim() > 1 else 1, grad.shape[-1])
    if memory.shape != wanted:
        raise ValueError(
            f"memory must be {'[B, t, P]' if grad.dim() == 2 else '[t, P]'} for a grad of shape "
            f"{list(grad.shape)}, not {list(memory.shape)}."
        )
    for name, tensor in (("grad", grad), ("memory", memory)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a real floating-point dtype, not {tensor.dtype}.")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, not {tensor.layout}.")
    if grad.device != memory.device:
        raise ValueError(f"memory is on {memory.device}, but grad is on {grad.device}.")
    if not 0.0 <= memory_strength < math.inf:
        raise ValueError(f"memory_strength must be finite and at least 0, not {memory_strength}.")
    if grad.dim() == 1:
        projected, certificate = gem_project(grad[None], memory[None], memory_strength)
        return projected[0], Solution(*(part[0] for part in certificate))

    problems, size, length = memory.shape
    if memory.numel() == 0:
        products = grad.new_zeros(problems, size + 1, size + 1, dtype=torch.float64)
    else:
        products = gram_ops.gram_per_tensor(memory.unbind(), grad.unbind())
    certificate = nnqp(
        products[:, :size, :size],
        products[:, :size, size],
        memory_strength,
        gram_error=sum_error(length),
        only_violated=True,
    )
    v = torch.where(certificate.status[:, None] < 0, 0.0, certificate.v)
    projected = grad.clone()
    gram_ops.combine_(projected.unbind(), memory.unbind(), v, range(problems))
    return projected, certificate
