"""vector_quantize: the straight-through gradient, beta, and how near the chosen code is."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples.sample import channels_last, rand
from tests.ops.test_every_op import IMPLEMENTATIONS, assert_as_good_as_torch

EVERY_IMPLEMENTATION = pytest.mark.parametrize(
    ("implementation", "device"), [("reference", "cpu"), *IMPLEMENTATIONS[:2]]
)


def plain(x, codebook, beta):
    """VQ-VAE as its paper has it, in plain PyTorch: quantized and the loss of each vector."""
    indices = torch.cdist(x.double(), codebook.double()).argmin(-1)
    e = codebook[indices]
    loss = (x.detach() - e).square().sum(-1) + beta * (x - e.detach()).square().sum(-1)
    return x + (e - x).detach(), loss


def gradients(quantized, loss, x, codebook):
    upstream = rand(*quantized.shape, seed=7).bfloat16().to(quantized)
    weights = rand(*loss.shape, seed=8).bfloat16().to(loss)
    total = (quantized * upstream).sum() + (loss * weights).sum()
    return torch.autograd.grad(total, (x, codebook))


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_vq_vae(implementation, device, dtype) -> None:
    def leaves(dtype):
        x, codebook = rand(20, 12).to(dtype), rand(9, 12, seed=1).to(dtype)
        return x.to(device).requires_grad_(), codebook.to(device).requires_grad_()

    low = leaves(dtype)
    wide = [t.detach().double().requires_grad_() for t in low]
    exact = gradients(*plain(*wide, 0.25), *wide)
    theirs = gradients(*plain(*low, 0.25), *low)
    with aigc_fast.backend(implementation):
        quantized, _, distances = ops.vector_quantize(*low, beta=0.25)
        ours = gradients(quantized, distances, *low)
    assert_as_good_as_torch(ours, theirs, [e.cpu() for e in exact], dtype)


def test_quantized_alone_passes_its_gradient_through() -> None:
    x, codebook = rand(2, 6, 3, 4).requires_grad_(), rand(5, 6, seed=1).requires_grad_()
    quantized, indices, _ = ops.vector_quantize(x, codebook, dim=1)
    assert torch.equal(quantized, F.embedding(indices, codebook).movedim(-1, 1))
    upstream = rand(2, 6, 3, 4, seed=3)
    dx, dcodebook = torch.autograd.grad(quantized, (x, codebook), upstream, allow_unused=True)
    assert torch.equal(dx, upstream) and dcodebook is None


def test_second_derivatives_of_both_outputs() -> None:
    x, codebook = rand(5, 4).requires_grad_(), rand(3, 4, seed=1).requires_grad_()
    quantized, _, distances = ops.vector_quantize(x, codebook)
    total = quantized.square().sum() / 2 + distances.square().sum() / 2
    (dx,) = torch.autograd.grad(total, x, create_graph=True)
    off = (x - quantized).detach()
    torch.testing.assert_close(dx, quantized + 2 * distances[:, None] * off)
    # quantized moves with x, straight through; off does too, for distances are x's own.
    (second,) = torch.autograd.grad(dx.sum(), x)
    want = 1 + 2 * distances[:, None] + 4 * off * off.sum(-1, keepdim=True)
    torch.testing.assert_close(second, want)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chosen_code_is_nearest_to_rounding(implementation, device, dtype) -> None:
    """Codes in clusters, so close that scores in fp32 cannot always tell them apart."""
    dim, centre = 24, rand(8, 24, seed=1, scale=4.0)
    codebook = (centre[:, None] + rand(8, 12, 24, scale=1e-4)).flatten(0, 1).to(dtype).to(device)
    x = (centre.repeat(20, 1) + rand(160, 24, seed=2, scale=1e-2)).to(dtype).to(device)
    with aigc_fast.backend(implementation):
        _, indices, _ = ops.vector_quantize(x, codebook)
    exact = (x.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = exact.gather(1, indices[:, None])[:, 0]
    # A chain of dim multiply-adds that starts at |e|^2 / 2, itself one; scores are half distances.
    size = codebook.double().norm(dim=-1).max()
    terms = size * (size + x.double().norm(dim=-1))
    assert (chosen - exact.amin(1) <= 4 * dim * 2.0**-24 * terms).all()


@EVERY_IMPLEMENTATION
def test_the_first_of_equal_codes(implementation, device) -> None:
    codebook = rand(4, 6).float().repeat(20, 1).to(device)
    with aigc_fast.backend(implementation):
        _, indices, distances = ops.vector_quantize(codebook, codebook)
    assert indices.tolist() == list(range(4)) * 20 and not distances.any()


def test_layouts() -> None:
    image, codebook = rand(2, 6, 3, 4).float(), rand(9, 6, seed=1).float()
    quantized, indices, distances = ops.vector_quantize(image.movedim(1, -1).contiguous(), codebook)
    for x in (image, channels_last(image)):
        found = ops.vector_quantize(x, codebook, dim=1)
        assert found[0].stride() == x.stride()
        assert torch.equal(found[0], quantized.movedim(-1, 1))
        assert torch.equal(found[1], indices) and torch.equal(found[2], distances)


def test_refuses_indices_out_of_range() -> None:
    from aigc_fast.ops.vector_quantize import _backward

    x, codebook = rand(1, 4, 1), rand(3, 4)
    with pytest.raises(ValueError, match="indices must be from 0 to 2, got 3"):
        _backward(rand(1, 1), None, x, codebook, torch.tensor([[3]]), 1.0, True)
    with pytest.raises(ValueError, match="indices must be from 0 to 2, got -1"):
        ops.codebook_moments(x[:, :, 0], torch.tensor([-1]), 3)
