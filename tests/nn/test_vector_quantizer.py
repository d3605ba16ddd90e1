"""VectorQuantizer against VQ-VAE in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from aigc_fast.nn import VectorQuantizer


def make(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    module = VectorQuantizer(7, 5, **options).double()
    torch.nn.init.normal_(module.embedding.weight)
    if options.get("decay") is not None:
        module.ema_sum.copy_(module.embedding.weight)
    return module


def image() -> torch.Tensor:
    return torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)


def test_a_learned_codebook() -> None:
    module, x = make(beta=0.3), image()
    quantized, indices, loss = module(x)
    e = F.embedding(indices, module.embedding.weight).movedim(-1, 1)
    want = F.mse_loss(e, x.detach()) + 0.3 * F.mse_loss(x, e.detach())
    torch.testing.assert_close(1.3 * loss, want)  # the value is the first term's
    assert torch.equal(quantized, e) and torch.equal(module.lookup(indices), e)
    inputs = x, module.embedding.weight
    for found, exact in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(found, exact)


def test_moving_averages() -> None:
    module, x = make(decay=0.9), image()
    before = module.embedding.weight.clone()
    _, indices, loss = module(x)
    one_hot = F.one_hot(indices.flatten(), 7).double()
    count = 0.9 + 0.1 * one_hot.sum(0)
    total = 0.9 * before + 0.1 * one_hot.T @ x.detach().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(module.ema_count, count)
    torch.testing.assert_close(module.embedding.weight.data, total / count[:, None])
    # The gradient is that of the codebook before it moved.
    e = F.embedding(indices, before).movedim(-1, 1)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, 0.25 * 2 * (x.detach() - e) / x.numel())


def test_evaluation_changes_nothing() -> None:
    module = make(decay=0.9).eval()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    module(image())
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    module.train()(image()[:0])
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_dead_codes_restart_where_vectors_are() -> None:
    module, x = make(decay=0.5, restart_below=0.6), image()
    module.embedding.weight[3:] += 100  # nobody chooses these
    module(x)
    vectors = x.detach().movedim(1, -1).flatten(0, 2)
    for code in module.embedding.weight[3:]:
        assert (vectors == code).all(1).any()
    assert torch.equal(module.ema_count[3:], torch.ones(4).double())
    assert torch.equal(module.ema_sum[3:], module.embedding.weight[3:])


def test_a_code_that_nobody_chooses_stays() -> None:
    module, x = make(decay=0.0), image()
    module.embedding.weight[6] += 100
    before = module.embedding.weight[6].clone()
    module(x)
    assert module.ema_count[6] == 0 and torch.equal(module.embedding.weight[6], before)


def test_low_precision_vectors_of_a_wide_codebook() -> None:
    module = make(decay=0.9).float()
    quantized, _, loss = module(image().bfloat16())
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_refuses() -> None:
    with pytest.raises(ValueError, match="decay must be from 0 to 1, 1 excluded, got 1"):
        make(decay=1.0)
    with pytest.raises(ValueError, match="restart_below must be 0 without a decay"):
        make(restart_below=1.0)
