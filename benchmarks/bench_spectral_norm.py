"""Spectral normalisation of the 20 layers of a discriminator, beside what torch's parametrisation
does for one layer after another: its arithmetic alone, and the two on modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.nn.utils import parametrizations

from aigc_fast._timing import interleaved
from aigc_fast.nn import spectral_norm
from benchmarks.machine import DEVICE
from tests.op_samples import OPS

OP = OPS["spectral_norm"]


def eager(weights, u, v):
    normal, sigmas, new_u, new_v = [], [], [], []
    for w, a, b in zip(weights, u, v, strict=True):
        matrix = w.flatten(1)
        with torch.no_grad():
            b = F.normalize(torch.mv(matrix.t(), a), dim=0, eps=1e-12)
            a = F.normalize(torch.mv(matrix, b), dim=0, eps=1e-12)
        a, b = a.clone(), b.clone()
        sigma = torch.dot(a, torch.mv(matrix, b))
        normal.append(w / sigma)
        sigmas.append(sigma)
        new_u.append(a)
        new_v.append(b)
    return normal, torch.stack(sigmas), new_u, new_v


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_spectral_norm(measure, sample, direction) -> None:
    measure(OP, sample, torch.float32, eager=eager, backward=direction != "forward")


class Layers(nn.ModuleList):
    """Layers whose normalised weights are asked for, and nothing else."""

    def forward(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self]


class Upstream(Function):
    """A scalar whose gradient with respect to the weights is given, as the layers would give it."""

    @staticmethod
    def forward(ctx, grads, *weights):
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.grads


def layers_of(weights: list[torch.Tensor]) -> Layers:
    made = [
        nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=False)
        if w.dim() == 4
        else nn.Linear(w.shape[1], w.shape[0], bias=False)
        for w in weights
    ]
    return Layers(made).to(DEVICE)


@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_spectral_norm_module(benchmark, quick, sample) -> None:
    """Forward and backward of all weights in training: torch's parametrisation of every layer, and
    aigc_fast.nn.spectral_norm of the model."""
    ours = layers_of(sample.args[0])
    stock = copy.deepcopy(ours)
    for layer in stock:
        parametrizations.spectral_norm(layer)
    spectral_norm(ours)
    grads = [torch.randn(w.shape, device=DEVICE) for w in sample.args[0]]

    def call(model: Layers) -> None:
        model.zero_grad()
        Upstream.apply(grads, *model()).backward()

    calls = {"eager": lambda: call(stock), "ours": lambda: call(ours)}
    times = interleaved(calls, seconds=0.3 if quick else 3.0)
    benchmark.extra_info.update(
        dtype="float32",
        threads=torch.get_num_threads(),
        seconds=times,
        eager_over_ours=times["eager"] / times["ours"],
    )
    benchmark.pedantic(calls["ours"], rounds=3, warmup_rounds=1)
