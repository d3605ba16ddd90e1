"""Adam for all tensors of a model in one call, with clipping, averaged weights and a guard."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aigc_fast.ops._checks import check_device, check_tensor
from aigc_fast.ops._layout import wide_dtype
from aigc_fast.ops._registry import define


def gradient_norm(grads: Sequence[Tensor], loss: Tensor | None = None) -> Tensor:
    """The Euclidean norm of all gradients together, a scalar in float32 (float64 for float64).

    grads: tensors of any shapes and strides, of one floating dtype and device.
    loss:  a scalar whose NaN or infinity makes the norm NaN, so that `adam_step` skips the step.

    Not finite if a gradient is not. On a GPU squares are added in float32: a gradient above 1e19
    gives infinity. Bytes that must move: the gradients once.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and for parameters in place
    of their gradients; RuntimeError if a gradient of it is asked for.
    """
    grads = list(grads)
    if any(isinstance(g, nn.Parameter) for g in grads):
        raise TypeError("grads must be gradients, [p.grad for p in parameters], got parameters")
    if torch.is_grad_enabled() and any(g.requires_grad for g in grads):
        raise RuntimeError("gradient_norm has no derivative: call it under torch.no_grad()")
    if not grads:
        raise ValueError("grads must hold at least one tensor")
    return _gradient_norm(grads, loss)


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    ema_decay: float = 0.0,
    norm: Tensor | None = None,
    max_norm: float | None = None,
    skipped: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """One step of Adam or AdamW on every tensor, in place; the numbers are those of torch.optim.

        step += 1
        g = grad * min(1, max_norm / (norm + 1e-6))      only with norm and max_norm
        g += weight_decay param                          unless decoupled
        exp_avg += (1 - beta1) (g - exp_avg)
        exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
        param = (1 - lr weight_decay) param              only if decoupled
        param -= lr / (1 - beta1^step) exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
        average += (1 - ema_decay) (param - average)

    params:   tensors of one floating dtype and device, any shapes and strides.
    grads, exp_avgs, exp_avg_sqs: for each param a tensor of its shape, dtype and device.
    steps:    for each param a floating scalar tensor, the steps taken; float32 in torch.optim.
    averages: for each param its averaged weights, of its shape and dtype; or () for none.
    lr, betas, eps, weight_decay: as in torch.optim.Adam.
    decoupled: True for the weight decay of AdamW, False for that of Adam.
    ema_decay: the share of the old average that stays.
    norm:     what `gradient_norm` returned, or None. Where it is not finite nothing is written, but
              `skipped` grows by one. None of this waits for the device.
    max_norm: the norm that gradients are scaled down to; needs norm. None for no clipping.
    skipped:  floating scalar tensor that counts the skipped steps, or None.
    rates:    floating tensor (2,) on the device, read in place of lr and ema_decay: a CUDA graph
              keeps plain numbers as they were when it was recorded. In float64 the results are
              those of plain numbers.

    Computes in fp32 (fp64 for fp64) and rounds once. Bytes that must move: 7 times the parameters,
    9 with averages.

    Raises TypeError or ValueError for a wrong dtype, shape, device or number of tensors;
    RuntimeError if a gradient is asked for.

    Sources: Kingma & Ba 2014 (arXiv:1412.6980), Loshchilov & Hutter 2017 (arXiv:1711.05101).
    """
    params = list(params)
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        raise RuntimeError("adam_step has no derivative: call it under torch.no_grad()")
    if params:
        _adam_step(
            params, list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(averages),
            norm, skipped, lr, *betas, eps, weight_decay, decoupled, ema_decay, max_norm, rates,
        )  # fmt: skip


def _reference_norm(grads: list[Tensor], loss: Tensor | None = None) -> Tensor:
    dtype = wide_dtype(grads[0].dtype)
    norms = [torch.linalg.vector_norm(g, dtype=dtype) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm if loss is None else torch.where(loss.isfinite(), norm, torch.nan)


def _reference(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], averages: list[Tensor], norm: Tensor | None, skipped: Tensor | None,
    lr: float | Tensor, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, ema_decay: float | Tensor, max_norm: float | None, rates: Tensor | None = None,
) -> None:  # fmt: skip
    if rates is not None:
        lr, ema_decay = rates.double().unbind()
    taken = None if norm is None else norm.isfinite()
    if taken is not None and skipped is not None:
        skipped.add_(~taken)
    dtype = wide_dtype(params[0].dtype)
    for i, param in enumerate(params):
        p, g, m, v = (t[i].to(dtype) for t in (params, grads, exp_avgs, exp_avg_sqs))
        if norm is not None and max_norm is not None:
            g = g * (max_norm / (norm + 1e-6)).clamp(max=1)
        if weight_decay and not decoupled:
            g = g + weight_decay * p
        step = steps[i].double() + 1
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g.square()
        if weight_decay and decoupled:
            p = p * (1 - lr * weight_decay)
        size = (lr / (1 - beta1**step)).to(dtype)
        correction = (1 - beta2**step).sqrt().to(dtype)
        p = p - size * m / (v.sqrt() / correction + eps)
        new = [(steps[i], step), (exp_avgs[i], m), (exp_avg_sqs[i], v), (param, p)]
        if averages:
            average = averages[i].to(dtype)
            new.append((averages[i], average + (1 - ema_decay) * (p - average)))
        for tensor, value in new:
            tensor.copy_(value if taken is None else torch.where(taken, value, tensor))


def _check_norm(grads: list[Tensor], loss: Tensor | None = None) -> None:
    for i, g in enumerate(grads):
        check_tensor(f"grads[{i}]", g, like=("grads[0]", grads[0]) if i else None)
    if loss is not None:
        check_tensor("loss", loss, shape=())


def _check(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], averages: list[Tensor], norm: Tensor | None, skipped: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    ema_decay: float, max_norm: float | None, rates: Tensor | None = None,
) -> None:  # fmt: skip
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    if averages:
        named["averages"] = averages
    for name, tensors in named.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must be {len(params)} as params, got {len(tensors)}")
    for i, p in enumerate(params):
        check_tensor(f"params[{i}]", p, like=("params[0]", params[0]) if i else None)
        for name, tensors in named.items():
            if name == "steps":
                check_tensor(f"steps[{i}]", steps[i], shape=())
                continue
            check_tensor(f"{name}[{i}]", tensors[i], like=(f"params[{i}]", p), shape=p.shape)
    if norm is not None:
        check_tensor("norm", norm, shape=())
    if skipped is not None:
        check_tensor("skipped", skipped, shape=())
    if rates is not None:
        check_tensor("rates", rates, shape=(2,))
        check_device("rates", rates, ("params", params[0]))


_gradient_norm = define(
    "gradient_norm(Tensor[] grads, Tensor? loss=None) -> Tensor",
    _reference_norm,
    _check_norm,
    stem="optim",
)
_adam_step = define(
    "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] averages, Tensor? norm,"
    " Tensor(f!)? skipped, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled, float ema_decay, float? max_norm, Tensor? rates=None) -> ()",
    _reference,
    _check,
    stem="optim",
)
