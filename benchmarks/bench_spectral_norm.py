"""Spectral normalisation of the 20 layers of a discriminator, beside what torch's parametrisation
does for one layer after another."""

import pytest
import torch
import torch.nn.functional as F

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
