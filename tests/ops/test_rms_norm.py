"""What the table of samples does not say of rms_norm and add_rms_norm."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand
from tests.ops.test_every_op import DEVICE


def variables(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [rand(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def test_is_torch_rms_norm() -> None:
    x, weight = variables((3, 5, 33), (33,))
    ours, theirs = ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), (x, weight)),
        torch.autograd.grad(theirs.square().sum(), (x, weight)),
    )


@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)])
def test_add_rms_norm_is_two_operations(used) -> None:
    inputs = variables((4, 33), (4, 33), (33,))
    x, residual, weight = inputs
    ours = ops.add_rms_norm(*inputs)
    theirs = (F.rms_norm(x + residual, (33,), weight, 1e-6), x + residual)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (
        torch.autograd.grad(
            sum(y.pow(3).sum() for y, u in zip(out, used, strict=True) if u),
            inputs,
            allow_unused=True,
        )
        for out in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_as_llama_does(dtype) -> None:
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling_llama.LlamaRMSNorm(64, eps=1e-5).to(dtype)
    x, norm.weight.data = rand(7, 64).to(dtype), rand(64).to(dtype)
    with aigc_fast.backend("reference"), torch.no_grad():
        assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_frozen_weight_and_frozen_input() -> None:
    x, weight = variables((4, 33), (33,))
    both = torch.autograd.grad(ops.rms_norm(x, weight).sum(), (x, weight))
    (dx,) = torch.autograd.grad(ops.rms_norm(x, weight.detach()).sum(), x)
    (dweight,) = torch.autograd.grad(ops.rms_norm(x.detach(), weight).sum(), weight)
    assert torch.equal(dx, both[0]) and torch.equal(dweight, both[1])


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True])
def test_triton_rows_wider_than_a_block(monkeypatch, residual) -> None:
    from aigc_fast.kernels import rms_norm as kernels

    monkeypatch.setattr(kernels, "_BLOCK", 64)
    monkeypatch.setattr(kernels, "_NARROW_TILE", 64)
    monkeypatch.setattr(kernels, "_PARTS", 3)
    inputs = [t.detach().float().to(DEVICE) for t in variables((7, 200), (7, 200), (200,))]
    if not residual:
        del inputs[1]
    results = []
    for backend in ("triton", "reference"):
        for t in inputs:
            t.requires_grad_()
        with aigc_fast.backend(backend):
            out = (ops.add_rms_norm if residual else ops.rms_norm)(*inputs)
            out = out if residual else (out,)
            results.append((out, torch.autograd.grad(sum(y.square().sum() for y in out), inputs)))
    torch.testing.assert_close(*results)


def test_a_weight_gradient_over_many_rows_is_as_exact_as_torchs() -> None:
    x, weight, upstream = (t.detach() for t in variables((4096, 256), (256,), (4096, 256)))

    def gradient(function, dtype: torch.dtype) -> torch.Tensor:
        w = weight.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(function(x.to(dtype), w), w, upstream.to(dtype))
        return found.double()

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (256,), weight, 1e-6)

    def error(function) -> float:
        return (gradient(function, torch.float32) - exact).square().mean().sqrt().item()

    exact = gradient(theirs, torch.float64)
    # Partial sums added in float32 made it 1.4 to 1.6 times.
    with aigc_fast.backend("cpu"):
        ours = error(lambda x, w: ops.rms_norm(x, w, 1e-6))
    assert ours <= 1.3 * error(theirs)
