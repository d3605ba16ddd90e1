"""Snake's modules against BigVGAN's definition of them, written out in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.nn import AliasFreeSnake, Snake, SnakeBeta
from aigc_fast.ops.alias_free_snake import default_filters


def plain_snake(x, alpha, beta):
    alpha, beta = alpha[None, :, None], beta[None, :, None]
    return x + (1.0 / (beta + 1e-9)) * torch.sin(x * alpha) ** 2


def plain_activation(x, alpha, beta):
    """Activation1d: up by 2 and down by 2 with a filter of 12 taps around snake."""
    c = x.shape[1]
    taps = default_filters(x.device)[0].expand(c, 1, -1)
    x = F.pad(x, (5, 5), mode="replicate")
    x = 2 * F.conv_transpose1d(x, taps, stride=2, groups=c)[..., 15:-15]
    x = F.pad(plain_snake(x, alpha, beta), (5, 6), mode="replicate")
    return F.conv1d(x, taps, stride=2, groups=c)


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(
    ("module", "options", "plain", "names"),
    [
        (Snake, {}, plain_snake, ["alpha"]),
        (SnakeBeta, {}, plain_snake, ["alpha", "beta"]),
        (AliasFreeSnake, {}, plain_activation, ["alpha", "beta"]),
        (AliasFreeSnake, {"tied": True}, plain_activation, ["alpha"]),
    ],
)
def test_modules(module, options, plain, names, log_scale) -> None:
    ours = module(5, alpha_logscale=log_scale, dtype=torch.float64, **options)
    assert list(ours.state_dict()) == names
    for parameter in ours.parameters():
        torch.nn.init.uniform_(parameter, 0.3, 1.5)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    alpha = ours.alpha.exp() if log_scale else ours.alpha
    beta = getattr(ours, names[-1])
    want = plain(x, alpha, beta.exp() if log_scale else beta)
    torch.testing.assert_close(ours(x), want)
    assert "5" in repr(ours)


def test_starts_at_one_and_can_be_frozen() -> None:
    assert Snake(3).alpha.tolist() == [1, 1, 1]
    frozen = SnakeBeta(3, 0.5, alpha_trainable=False)
    assert frozen.beta.tolist() == [0.5] * 3 and not frozen.beta.requires_grad
    assert AliasFreeSnake(3, alpha_logscale=True).alpha.tolist() == [0, 0, 0]


def test_filter_is_bigvgans() -> None:
    """Taps of kaiser_sinc_filter1d(0.25, 0.3, 12), as its checkpoints hold them."""
    taps = default_filters(torch.device("cpu"))[0]
    torch.testing.assert_close(taps, taps.flip(0))
    torch.testing.assert_close(taps.sum().item(), 1.0)
    window = torch.kaiser_window(12, periodic=False, beta=4.663800127934911, dtype=torch.float64)
    want = 0.5 * window * torch.sinc(0.5 * (torch.arange(-6, 6) + 0.5).double())
    torch.testing.assert_close(taps, want / want.sum())
