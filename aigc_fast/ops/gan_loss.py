"""The losses of adversarial training: every logit of a step in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aigc_fast.ops._autograd import OpFunction
from aigc_fast.ops._checks import check_choice, check_tensor
from aigc_fast.ops._layout import wide
from aigc_fast.ops._registry import define

#: The numbers are part of the operator's schema: csrc/cpu/gan_loss.cpp holds the same list.
LOSSES = ("non_saturating", "least_squares", "hinge", "wasserstein", "relativistic")


def discriminator_loss(real: Tensor, fake: Tensor, loss: str = "non_saturating") -> Tensor:
    """What the discriminator minimises, a scalar in float32 (float64 for float64).

    real, fake: logits of real and of generated samples, any shapes (one shape for relativistic),
                float64/32/16 or bfloat16.

    =============== =============================================== ============================
    loss            of the discriminator                            of the generator
    =============== =============================================== ============================
    non_saturating  mean softplus(-real) + mean softplus(fake)      mean softplus(-fake)
    least_squares   mean (real - 1)^2 / 2 + mean fake^2 / 2         mean (fake - 1)^2 / 2
    hinge           mean max(0, 1 - real) + mean max(0, 1 + fake)   -mean fake
    wasserstein     mean fake - mean real                           -mean fake
    relativistic    mean softplus(fake - real)                      mean softplus(real - fake)
    =============== =============================================== ============================

    softplus(-x) is the cross-entropy of a logit with the label one. Differentiable as often as one
    likes. Bytes that must move: the logits once, in backward the logits and their gradients.

    Raises TypeError or ValueError for a wrong dtype, shape, device or loss, and for no logits.

    Sources: Goodfellow et al. 2014 (arXiv:1406.2661), Mao et al. 2016 (arXiv:1611.04076),
    Lim & Ye 2017 (arXiv:1705.02894), Arjovsky et al. 2017 (arXiv:1701.07875), and for relativistic
    Jolicoeur-Martineau 2018 (arXiv:1807.00734), each logit against the one it is paired with.
    """
    if real is None:  # for the operator there is none in the generator's
        raise TypeError("real must be a torch.Tensor, got None")
    return _loss(real, fake, _number(loss), False)


def generator_loss(
    fake: Tensor, real: Tensor | None = None, loss: str = "non_saturating"
) -> Tensor:
    """What the generator minimises: the third column of the table in `discriminator_loss`.

    fake: logits of generated samples.
    real: logits of real samples, for the relativistic loss alone; of the shape of fake.

    Dtypes, result, derivatives, bytes and errors are those of `discriminator_loss`.
    """
    if (real is None) == (loss == "relativistic"):
        raise ValueError("real must be given for the relativistic loss, and for no other")
    return _loss(real, fake, _number(loss), True)


def _number(loss: str) -> int:
    check_choice("loss", loss, LOSSES)
    return LOSSES.index(loss)


def _loss(real: Tensor | None, fake: Tensor, loss: int, generator: bool) -> Tensor:
    if torch.is_grad_enabled() and (
        fake.requires_grad or (real is not None and real.requires_grad)
    ):
        return _GANLoss.call(real, fake, loss, generator)
    return _gan_loss(real, fake, loss, generator)


def _reference(real: Tensor | None, fake: Tensor, loss: int, generator: bool) -> Tensor:
    name, fake = LOSSES[loss], wide(fake)
    real = fake.new_zeros(()) if real is None else wide(real)
    if name == "relativistic":
        return _softplus(real - fake if generator else fake - real).mean()
    if name == "non_saturating":
        return _softplus(-fake).mean() if generator else _mean_of(_softplus, -real, fake)
    if name == "least_squares":
        return (
            _half_square(fake - 1).mean() if generator else _mean_of(_half_square, real - 1, fake)
        )
    if generator:
        return -fake.mean()
    if name == "hinge":
        return _mean_of(F.relu, 1 - real, 1 + fake)
    return fake.mean() - real.mean()


def _mean_of(f: Any, real: Tensor, fake: Tensor) -> Tensor:
    return f(real).mean() + f(fake).mean()


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus drops what is below 2e-9 beside x


def _half_square(x: Tensor) -> Tensor:
    return x.square() / 2


def _reference_backward(
    grad: Tensor, real: Tensor | None, fake: Tensor, loss: int, generator: bool
) -> tuple[Tensor, Tensor]:
    name, scale = LOSSES[loss], grad / fake.numel()
    r = None if real is None else wide(real)
    f = wide(fake)
    if name == "relativistic":
        assert r is not None
        d = torch.sigmoid(r - f) if generator else -torch.sigmoid(f - r)
        grad_real, grad_fake = d * scale, -d * scale
    else:
        if name == "non_saturating":
            grad_fake = -torch.sigmoid(-f) if generator else torch.sigmoid(f)
        elif name == "least_squares":
            grad_fake = f - 1 if generator else f
        elif generator:
            grad_fake = -torch.ones_like(f)
        else:
            grad_fake = (f > -1).to(f.dtype) if name == "hinge" else torch.ones_like(f)
        grad_fake = grad_fake * scale
        grad_real = f.new_empty(0)
        if r is not None:
            if name == "non_saturating":
                grad_real = -torch.sigmoid(-r)
            elif name == "least_squares":
                grad_real = r - 1
            else:
                grad_real = -(r < 1).to(r.dtype) if name == "hinge" else -torch.ones_like(r)
            grad_real = grad_real * (grad / r.numel())
    return grad_real.to(fake.dtype), grad_fake.to(fake.dtype)


def _check(real: Tensor | None, fake: Tensor, loss: int, generator: bool) -> None:
    check_tensor("fake", fake)
    if real is not None:
        paired = LOSSES[loss] == "relativistic"
        check_tensor("real", real, like=("fake", fake), shape=fake.shape if paired else None)
    for name, logits in (("fake", fake), ("real", real)):
        if logits is not None and logits.numel() == 0:
            raise ValueError(f"{name} must hold at least one logit, got {tuple(logits.shape)}")


def _check_backward(grad: Tensor, *args: Any) -> None:
    _check(*args)
    if grad.numel() != 1:
        raise ValueError(f"grad_output must be a scalar, got shape {tuple(grad.shape)}")


_gan_loss = define(
    "gan_loss(Tensor? real, Tensor fake, int loss, bool generator) -> Tensor",
    _reference,
    _check,
    stem="gan_loss",
)
_backward = define(
    "gan_loss_backward(Tensor grad_output, Tensor? real, Tensor fake, int loss, bool generator)"
    " -> (Tensor, Tensor)",
    _reference_backward,
    _check_backward,
    stem="gan_loss",
)


class _GANLoss(OpFunction):
    @staticmethod
    def forward(ctx: Any, real: Tensor | None, fake: Tensor, loss: int, generator: bool) -> Tensor:
        ctx.options = loss, generator
        ctx.save_for_backward(real, fake)
        return _gan_loss(real, fake, loss, generator)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        real, fake = ctx.saved_tensors
        # A gradient of this gradient is torch's own, through the reference.
        run = _reference_backward if torch.is_grad_enabled() else _backward
        grad_real, grad_fake = run(grad, real, fake, *ctx.options)
        return None if real is None else grad_real, grad_fake, None, None
