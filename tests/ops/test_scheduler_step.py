"""What the table of samples cannot say of scheduler_step."""

import pytest
import torch

from aigc_fast import ops
from tests.op_samples.sample import rand
from tests.op_samples.scheduler_step import FREE, ROW


def test_rows_may_be_numbers_or_tensors_of_two_dtypes() -> None:
    x, m = rand(2, 3).float(), rand(2, 3, seed=1).float()
    want = ops.scheduler_step(x, m, ROW[:7])
    for dtype in (torch.float32, torch.float64):
        row = torch.tensor(ROW[:7], dtype=dtype)
        assert torch.equal(ops.scheduler_step(x, m, row), want)
        assert torch.equal(ops.scheduler_step(x, m, row.expand(2, 7)), want)


def test_low_precision_rounds_once() -> None:
    x, m = rand(3, 50).bfloat16(), rand(3, 50, seed=1).bfloat16()
    exact = ops.scheduler_step(x.double(), m.double(), FREE[:7])
    exact_of_row = ops.scheduler_step(x.float(), m.float(), FREE[:7])
    got = ops.scheduler_step(x, m, FREE[:7])
    assert torch.equal(got, exact_of_row.bfloat16())
    assert (got.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescale_of_outputs_far_from_zero(dtype) -> None:
    """Deviations are taken from the mean: a sum of squares would cancel here."""
    cond, uncond = (1000 + 8 * rand(2, 9000, seed=s) for s in (0, 1))
    cond, uncond = cond.to(dtype), uncond.to(dtype)
    sample = torch.zeros_like(cond)
    identity = (0.0, 1.0, torch.inf, 1.0, 0.0, 0.0, 0.0)

    def step(*tensors):
        x, c, u = tensors
        return ops.scheduler_step(
            x, c, identity, uncond_output=u, guidance_scale=7.5, guidance_rescale=1.0
        )

    got, exact = step(sample, cond, uncond), step(*(t.double() for t in (sample, cond, uncond)))
    c, g = cond.double(), uncond.double() + 7.5 * (cond.double() - uncond.double())
    torch.testing.assert_close(exact, g * (c.std(1, keepdim=True) / g.std(1, keepdim=True)))
    relative = ((got.double() - exact) / exact).abs().max()
    assert relative < 8 * torch.finfo(dtype).eps


def test_refuses_derivatives_that_it_does_not_have() -> None:
    x, row = rand(2, 3).requires_grad_(), torch.tensor(ROW[:7])
    with pytest.raises(RuntimeError, match="no derivative: guidance_rescale must be 0"):
        ops.scheduler_step(x, x, row, uncond_output=x, guidance_rescale=0.5)
    with torch.no_grad():
        ops.scheduler_step(x, x, row, uncond_output=x, guidance_rescale=0.5)
    with pytest.raises(RuntimeError, match="no derivative with respect to coefficients"):
        ops.scheduler_step(x.detach(), x.detach(), row.requires_grad_())


def test_gradient_of_one_result_alone() -> None:
    x, m = rand(2, 3).requires_grad_(), rand(2, 3, seed=1).requires_grad_()
    a, b, _r, p, q, c, *_ = FREE
    prev, x0 = ops.scheduler_step(x, m, FREE[:7], return_x0=True)
    ones = torch.ones_like(x)
    got = torch.autograd.grad(x0.sum(), (x, m), retain_graph=True)
    torch.testing.assert_close(got, (a * ones, b * ones))
    got = torch.autograd.grad(prev.sum(), (x, m))
    torch.testing.assert_close(got, ((p * a + q) * ones, (p * b + c) * ones))


def test_clamped_elements_pass_no_gradient_through_x0() -> None:
    x = torch.tensor([[0.5, 1.0, 2.0, -3.0]]).double().requires_grad_()
    m = torch.zeros_like(x)
    row = (1.0, 0.0, 1.0, 1.0, 0.25, 0.0, 0.0)
    (grad,) = torch.autograd.grad(ops.scheduler_step(x, m, row).sum(), x)
    assert grad.tolist() == [[1.25, 1.25, 0.25, 0.25]]  # at the limit: as inside


def test_another_row_is_not_another_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda x, row: ops.scheduler_step(x, x, row), fullgraph=True, backend=count
    )
    x = rand(2, 3).float()
    for i in range(4):
        row = torch.tensor(ROW[:7]) * i
        torch.testing.assert_close(step(x, row), ops.scheduler_step(x, x, row))
    assert len(graphs) == 1
