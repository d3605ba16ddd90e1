"""What the table of samples does not say of swiglu."""

import torch
import torch.nn.functional as F

from aigc_fast import ops
from tests.op_samples import rand


def test_is_silu_times_up_and_so_are_its_gradients() -> None:
    packed = rand(3, 5, 34).requires_grad_()
    gate, up = packed.chunk(2, -1)
    ours, theirs = ops.swiglu(gate, up), F.silu(gate) * up
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), packed),
        torch.autograd.grad(theirs.square().sum(), packed),
    )


def test_halves_of_a_packed_tensor_are_read_in_place() -> None:
    gate, up = torch.randn(64, 2048).chunk(2, -1)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.swiglu(gate, up)
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages())
    assert y.nbytes <= allocated < 2 * y.nbytes
