"""What the table of samples does not say of the diffusion loss."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast import ops
from aigc_fast.ops.diffusion_loss import PREDICTION_TYPES
from tests.op_samples import rand


def _inputs(dtype=torch.float64):
    """model_output, sample, noise, alpha, sigma, weights"""
    tensors = [rand(3, 2, 5, seed=i) for i in range(3)] + [rand(3, seed=i).abs() for i in range(3)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def _plain(output, sample, noise, alpha, sigma, weights, kind):
    a, s = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": sample,
        "v_prediction": a * noise - s * sample,
        "flow_prediction": noise - sample,
    }[kind]
    error = F.mse_loss(output, target, reduction="none").mean((1, 2))
    return (weights * error).mean()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_tensor_has_a_gradient(kind):
    inputs = _inputs()
    ours, plain = ops.diffusion_loss(*inputs, prediction_type=kind), _plain(*inputs, kind)
    torch.testing.assert_close(ours, plain)
    grads = [torch.autograd.grad(x, inputs, allow_unused=True) for x in (ours, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_output_alone_may_be_narrow(narrow):
    output, *rest = (t.detach() for t in _inputs(torch.float32))
    output = output.to(narrow).requires_grad_()
    ours = ops.diffusion_loss(output, *rest, prediction_type="v_prediction")
    plain = _plain(output.float(), *rest, "v_prediction")
    torch.testing.assert_close(ours, plain)
    (got,), (want,) = (torch.autograd.grad(x, output) for x in (ours, plain))
    torch.testing.assert_close(got, want)
    assert got.dtype == narrow


@pytest.mark.parametrize("name", ["v", "flow"])
def test_short_names(name) -> None:
    args = [torch.randn(2, 3) for _ in range(3)] + [torch.rand(2)] * 2
    short = ops.diffusion_loss(*args, prediction_type=name)
    assert short.equal(ops.diffusion_loss(*args, prediction_type=f"{name}_prediction"))


@pytest.mark.parametrize("place", range(6))
def test_the_tensor_on_another_device_is_named(place) -> None:
    args = [t.detach() for t in _inputs()]
    args[place] = args[place].to("meta")
    # Where model_output itself is elsewhere, the first of the others is.
    name = ("noise", "sample", "noise", "alpha", "sigma", "weights")[place]
    with pytest.raises(ValueError, match=f"^{name} must be on the device of model_output"):
        ops.diffusion_loss(*args, prediction_type="v")
