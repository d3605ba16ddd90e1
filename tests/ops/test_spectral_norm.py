"""What the table of samples does not say of spectral_norm."""

import torch
import torch.nn.functional as F

from aigc_fast import backend, ops
from tests.op_samples import rand
from tests.ops.test_every_op import assert_as_good_as_torch


def test_matrix_that_all_threads_share() -> None:
    """More elements than a thread takes at a time, between small ones; so large in all that the
    results of whole lines, the last matrix's, are written past the caches."""
    weights = [rand(3, 4), rand(1030, 1033), rand(40, 48)]
    u = [F.normalize(rand(len(w), seed=1), dim=0) for w in weights]
    v = [F.normalize(rand(w.shape[1], seed=2), dim=0) for w in weights]

    def run(dtype, name):
        leaves = [w.to(dtype).requires_grad_() for w in weights]
        with backend(name):
            normal, sigma, *rest = ops.spectral_norm(
                leaves, *([t.to(dtype) for t in each] for each in (u, v))
            )
            loss = sum((n * n).sum() for n in normal) + sigma.sum()
            return [*normal, sigma, *rest[0], *rest[1], *torch.autograd.grad(loss, leaves)]

    exact = run(torch.float64, "reference")
    plain = run(torch.float32, "reference")
    assert_as_good_as_torch(run(torch.float32, "cpu"), plain, exact, torch.float32)


def test_sigma_has_a_gradient() -> None:
    w = rand(3, 5).requires_grad_()
    left, values, right = torch.linalg.svd(w.detach())
    _, sigma, _, _ = ops.spectral_norm([w], [left[:, 0]], [right[0]], 0)
    torch.testing.assert_close(sigma[0], values[0])
    (grad,) = torch.autograd.grad(sigma.sum(), w)
    torch.testing.assert_close(grad, torch.outer(left[:, 0], right[0]))


def test_estimates_are_not_written_to() -> None:
    w, u, v = rand(3, 5), F.normalize(rand(3), dim=0), F.normalize(rand(5), dim=0)
    before = u.clone(), v.clone()
    for iterations in (0, 2):
        _, _, new_u, new_v = ops.spectral_norm([w], [u], [v], iterations)
        assert torch.equal(u, before[0]) and torch.equal(v, before[1])
        assert new_u[0].data_ptr() != u.data_ptr() and new_v[0].data_ptr() != v.data_ptr()
