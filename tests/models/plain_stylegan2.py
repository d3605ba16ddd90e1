"""StyleGAN2 in plain PyTorch, straight from the paper: functions of a state dict.

Each sample is convolved with weights of its own, in one grouped convolution; noise, bias, leaky
ReLU and resampling are torch's operations one after the other. Nothing of aigc_fast is in it.
"""

import math

import torch
import torch.nn.functional as F

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
TAPS = torch.outer(TAPS, TAPS) / TAPS.sum() ** 2


def fir(x, factor_up, factor_down, left, right):
    """Zeros between pixels, padding, FIR filter times factor_up^2, every factor_down-th pixel."""
    n, c, h, w = x.shape
    wide = x.new_zeros(n, c, h, factor_up, w, factor_up)
    wide[:, :, :, 0, :, 0] = x
    wide = F.pad(wide.reshape(n, c, h * factor_up, w * factor_up), [left, right, left, right])
    taps = (TAPS.to(x) * factor_up**2).expand(c, 1, 4, 4)  # symmetric
    return F.conv2d(wide, taps, groups=c)[:, :, ::factor_down, ::factor_down]


def linear(weights, name, x, lr_mul=1.0):
    w = weights[f"{name}.weight"]
    return x @ (w * lr_mul / math.sqrt(w.shape[1])).t() + weights[f"{name}.bias"] * lr_mul


def leaky(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def normalized(x):
    return x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-8)


def modulated_conv(weights, name, x, style, demodulate=True, up=False):
    n, c, h, w = x.shape
    weight = weights[f"{name}.weight"].unsqueeze(0)
    _, o, i, k, _ = weight.shape
    style = linear(weights, f"{name}.modulation", style).view(n, 1, i, 1, 1)
    own = weight * style / math.sqrt(i * k * k)
    if demodulate:
        own = own / torch.sqrt(own.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, n * c, h, w)
    if up:
        own = own.transpose(1, 2).reshape(n * i, o, k, k)
        y = F.conv_transpose2d(x, own, stride=2, groups=n)
        return fir(y.view(n, o, *y.shape[2:]), 1, 1, 1, 1) * 4
    y = F.conv2d(x, own.reshape(n * o, i, k, k), padding=k // 2, groups=n)
    return y.view(n, o, h, w)


def styled(weights, name, x, style, noise, up=False):
    x = modulated_conv(weights, f"{name}.conv", x, style, up=up)
    if noise is not None:
        x = x + weights[f"{name}.noise.weight"] * noise
    return leaky(x + weights[f"{name}.activate.bias"].view(1, -1, 1, 1))


def mapping(weights, z):
    x, i = normalized(z), 1
    while f"style.{i}.weight" in weights:
        x, i = leaky(linear(weights, f"style.{i}", x, 0.01)), i + 1
    return x


def generate(weights, styles, noises):
    """styles (batch, layers + 1, style_dim), noises one for each layer"""

    def to_rgb(name, x, style):
        y = modulated_conv(weights, f"{name}.conv", x, style, demodulate=False)
        return y + weights[f"{name}.bias"]

    x = weights["input.input"].repeat(len(styles), 1, 1, 1)
    x = styled(weights, "conv1", x, styles[:, 0], noises[0])
    image, i = to_rgb("to_rgb1", x, styles[:, 1]), 0
    while f"to_rgbs.{i}.bias" in weights:
        a, b = 2 * i, 2 * i + 1
        x = styled(weights, f"convs.{a}", x, styles[:, a + 1], noises[a + 1], up=True)
        x = styled(weights, f"convs.{b}", x, styles[:, b + 1], noises[b + 1])
        image = fir(image, 2, 1, 2, 1) + to_rgb(f"to_rgbs.{i}", x, styles[:, b + 2])
        i += 1
    return image


def discriminate(weights, x):
    def conv(name, x, padding=0, stride=1):
        w = weights[f"{name}.weight"]
        w = w / math.sqrt(w[0].numel())
        return F.conv2d(x, w, padding=padding, stride=stride)

    def activated(name, x):
        return leaky(x + weights[f"{name}.bias"].view(1, -1, 1, 1))

    x, i = activated("convs.0.1", conv("convs.0.0", x)), 1
    while f"convs.{i}.conv1.0.weight" in weights:
        block = f"convs.{i}"
        y = activated(f"{block}.conv1.1", conv(f"{block}.conv1.0", x, padding=1))
        y = activated(f"{block}.conv2.2", conv(f"{block}.conv2.1", fir(y, 1, 1, 2, 2), stride=2))
        x = (y + conv(f"{block}.skip.1", fir(x, 1, 1, 1, 1), stride=2)) / math.sqrt(2)
        i += 1
    n, c, h, w = x.shape
    size = min(n, 4)
    group = x.view(size, n // size, c, h, w)
    deviation = torch.sqrt((group - group.mean(0)).pow(2).mean(0) + 1e-8).mean((1, 2, 3))
    x = torch.cat([x, deviation.repeat(size).view(n, 1, 1, 1).expand(n, 1, h, w)], 1)
    x = activated("final_conv.1", conv("final_conv.0", x, padding=1)).reshape(n, -1)
    x = leaky(linear(weights, "final_linear.0", x))
    return linear(weights, "final_linear.1", x)
