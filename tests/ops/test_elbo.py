"""What the table of samples does not say of a VAE's two terms."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops.elbo import LIKELIHOODS
from tests.op_samples import rand
from tests.ops.test_every_op import IMPLEMENTATIONS

PARAMETERS, NOISE = rand(3, 6, 5), rand(3, 3, 5)


def test_sample_and_divergence_are_those_of_torch():
    mean, log_variance = PARAMETERS.chunk(2, 1)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    sample, kl = ops.sample_gaussian(PARAMETERS, NOISE)
    torch.testing.assert_close(sample, posterior.mean + posterior.stddev * NOISE)
    standard = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 2)
    torch.testing.assert_close(kl, kl_divergence(Independent(posterior, 2), standard))


@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("of", ["sample", "kl"])
def test_one_of_the_outputs_may_be_unused(of, implementation, device):
    def gradients(parameters, noise):
        outputs = dict(zip(("sample", "kl"), ops.sample_gaussian(parameters, noise), strict=True))
        return torch.autograd.grad(
            outputs[of].sin().sum(), (parameters, noise), allow_unused=True, materialize_grads=True
        )

    inputs = [t.float().to(device).requires_grad_() for t in (PARAMETERS, NOISE)]
    with aigc_fast.backend("reference"):
        want = gradients(*inputs)
    with aigc_fast.backend(implementation):
        torch.testing.assert_close(gradients(*inputs), want)


@pytest.mark.parametrize(("implementation", "device"), [("reference", "cpu"), *IMPLEMENTATIONS[:2]])
def test_gradients_at_the_bounds_are_those_of_clamp(implementation, device):
    log_variance = torch.tensor(
        [[-30.0, 20.0, -30.001, 20.001, -torch.inf, torch.inf]], device=device
    )
    mean = torch.ones_like(log_variance)
    x = log_variance.clone().requires_grad_()
    clamped = x.clamp(-30, 20)
    kl = 0.5 * (mean.square() + clamped.exp() - 1 - clamped).sum(1)
    (want,) = torch.autograd.grad((kl + (0.5 * clamped).exp().sum(1)).sum(), x)
    parameters = torch.cat([mean, log_variance], 1).requires_grad_()
    with aigc_fast.backend(implementation):
        sample, kl = ops.sample_gaussian(parameters, mean)
        (got,) = torch.autograd.grad(sample.sum() + kl.sum(), parameters)
    torch.testing.assert_close(got[:, 6:], want)
    assert (got[:, 8:] == 0).all()


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_likelihoods_are_those_of_torch(kind):
    output, target = rand(3, 4, 5, scale=3.0), rand(3, 4, 5, seed=1).sigmoid()
    each = {
        "bernoulli": F.binary_cross_entropy_with_logits(output, target, reduction="none"),
        "gaussian": F.mse_loss(output, target, reduction="none") / 2,
        "laplace": F.l1_loss(output, target, reduction="none"),
    }[kind]
    got = ops.reconstruction_loss(output, target, kind)
    torch.testing.assert_close(got, each.sum((1, 2)))


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_target_has_a_gradient(kind):
    output, target = (rand(3, 5, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(
        lambda x, t: ops.reconstruction_loss(x, t, kind), (output, target)
    )


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_output_alone_may_be_narrow(narrow):
    target = rand(3, 5).sigmoid().float()
    output = rand(3, 5, seed=1).to(narrow).requires_grad_()
    losses = [ops.reconstruction_loss(x, target) for x in (output, output.float())]
    torch.testing.assert_close(*losses)
    got, want = (torch.autograd.grad(loss.sum(), output)[0] for loss in losses)
    torch.testing.assert_close(got, want)
