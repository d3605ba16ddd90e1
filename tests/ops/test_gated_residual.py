"""What the table of samples does not say of the adaLN operators."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples import rand


def _inputs(modulation: tuple[int, ...]) -> list[torch.Tensor]:
    """residual, x, gate, scale, shift, weight, bias"""
    shapes = [(2, 6, 33)] * 2 + [modulation] * 3 + [(33,)] * 2
    return [rand(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def _over_tokens(p: torch.Tensor) -> torch.Tensor:
    return p.reshape(2, -1, 33).repeat_interleave(6 // p.reshape(2, -1, 33).shape[1], 1)


def _plain(residual, x, gate, scale, shift, weight, bias, *, rms=False):
    h = residual + _over_tokens(gate) * x
    if rms:
        y = F.rms_norm(h, (33,), weight, 1e-6)
    else:
        y = F.layer_norm(h, (33,), weight, bias, 1e-6)
    return y * (1 + _over_tokens(scale)) + _over_tokens(shift), h


@pytest.mark.parametrize("modulation", [(2, 33), (2, 3, 33), (2, 6, 33)], ids=str)
@pytest.mark.parametrize("used", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rms", [False, True])
def test_is_the_chain_of_operations(modulation, used, rms) -> None:
    inputs = _inputs(modulation)
    norm = {"norm": "rms"} if rms else {}
    args = [*inputs[:6], None] if rms else inputs
    ours = ops.gated_residual_norm(*args, **norm)
    theirs = _plain(*inputs, rms=rms)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (
        torch.autograd.grad(
            sum(y.pow(3).sum() for y, u in zip(out, used, strict=True) if u),
            inputs,
            allow_unused=True,
            materialize_grads=True,
        )
        for out in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs)


def test_frozen_inputs() -> None:
    inputs = _inputs((2, 33))
    both = ops.gated_residual_norm(*inputs)
    expected = torch.autograd.grad(sum(y.square().sum() for y in both), inputs)
    for i, t in enumerate(inputs):
        alone = [t if i == j else s.detach() for j, s in enumerate(inputs)]
        out = sum(y.square().sum() for y in ops.gated_residual_norm(*alone))
        assert torch.equal(torch.autograd.grad(out, t)[0], expected[i])


def test_packed_projection_is_read_in_place() -> None:
    x = rand(2, 6, 33).bfloat16()
    packed = rand(2, 3, 6 * 33).bfloat16()
    scale, shift = packed.chunk(6, -1)[2:4]
    expected = ops.modulated_layer_norm(x, scale.contiguous(), shift.contiguous())
    assert torch.equal(ops.modulated_layer_norm(x, scale, shift), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_have_the_bits_of_small_ones(dtype) -> None:
    """Those of 4 MB and more are written past the caches."""
    residual, x, gate, scale, shift = (
        rand(*shape, seed=i).to(dtype).requires_grad_()
        for i, shape in enumerate([(4, 530, 1024)] * 2 + [(4, 1024)] * 3)
    )

    def gradients(samples: slice) -> tuple[torch.Tensor, ...]:
        args = [t[samples] for t in (residual, x, gate, scale, shift)]
        both = ops.gated_residual_norm(*args)
        return torch.autograd.grad(both, args[:2], [t.detach() for t in both])

    parts = [gradients(slice(i, i + 1)) for i in range(4)]
    for whole, *small in zip(gradients(slice(None)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(small))


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("modulation", [(2, 131), (2, 3, 131), (2, 6, 131)], ids=str)
def test_modulation_in_float32_beside_16_bits(modulation, dtype, implementation) -> None:
    """The results of float32, rounded once; the gradients of the modulation are not rounded."""
    if implementation == "triton":
        pytest.importorskip("triton")
    residual, x = (rand(2, 6, 131, seed=i).to(dtype).requires_grad_() for i in range(2))
    gate, scale, shift = (rand(*modulation, seed=i).float().requires_grad_() for i in range(2, 5))
    weight, bias = (rand(131, seed=i).to(dtype).requires_grad_() for i in range(5, 7))
    inputs = residual, x, gate, scale, shift, weight, bias

    with aigc_fast.backend(implementation):
        alone = ops.gated_residual(residual, x, gate)
        both = ops.gated_residual_norm(*inputs)
        norms = [
            ops.modulated_layer_norm(x, scale, shift, weight, bias),
            ops.modulated_rms_norm(x, scale, shift, weight),
        ]
        grads = torch.autograd.grad(both, inputs, [t.detach() for t in both])
        grads += torch.autograd.grad(alone, [x, gate], alone.detach())

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.detach().float().clone().requires_grad_()

    wide_inputs = [wide(t) for t in inputs]
    r, x, gate, scale, shift, weight, bias = wide_inputs
    total = ops.gated_residual(r, x, gate)
    rounded = total + (both[1] - total).detach()
    y = ops.modulated_layer_norm(rounded, scale, shift, weight, bias)
    expected_norms = [
        ops.modulated_layer_norm(x, scale, shift, weight, bias),
        ops.modulated_rms_norm(x, scale, shift, weight),
    ]
    expected = torch.autograd.grad((y, total), wide_inputs, [wide(t) for t in both])
    expected += torch.autograd.grad(ops.gated_residual(r, x, gate), [x, gate], wide(alone))

    last = torch.finfo(dtype).eps
    results = alone, *both, *norms
    for got, want in zip(results, (total, y, total, *expected_norms), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=last, atol=last)
    for got, want, p in zip(grads, expected, [*inputs, *inputs[1:3]], strict=True):
        assert got.dtype == p.dtype
        near = 1e-5 if p.dtype == torch.float32 else last
        torch.testing.assert_close(got.float(), want, rtol=near, atol=near * want.abs().max())


def test_float64_modulation_is_refused() -> None:
    x, scale = rand(2, 6, 33).bfloat16(), rand(2, 33).double()
    with pytest.raises(TypeError, match="gate must be bfloat16, float32, got float64"):
        ops.gated_residual(x, x, scale)
    with pytest.raises(TypeError, match="shift must have the dtype of scale"):
        ops.modulated_layer_norm(x, scale.float(), scale.bfloat16())
    with pytest.raises(TypeError, match="scale must have the dtype of x"):
        ops.modulated_layer_norm(x.double(), scale.float(), scale.float())
