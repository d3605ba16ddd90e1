"""The bits of torch's operators, whatever the dtypes."""

import itertools

import pytest
import torch

import aigc_fast
from aigc_fast import ops
from tests.op_samples import OPS
from tests.op_samples.pointwise_program import DDIM, EVERY
from tests.ops.test_every_op import cast, strided

LOW = (torch.bfloat16, torch.float16)
#: values of both dtypes meet, on either side
MIXED = (
    "to v0 float32; mul v1 s0; sub v2 v3; div v4 s1; add v1 v5; mul v5 v6; to v7 {low}; "
    "clamp v8 s2 s3; div v9 v2; sub v8 v10; return v6 v8 v11",
    [0.3, 0.7, -0.6, 1.1],
)


def assert_same_bits(inputs, program, scalars=()) -> None:
    with aigc_fast.backend("reference"):
        want = ops.pointwise_program(inputs, program, scalars)
    with aigc_fast.backend("cpu"):
        got = ops.pointwise_program(inputs, program, scalars)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("sample", OPS["pointwise_program"].samples(), ids=lambda s: s.name)
def test_same_bits_in_one_dtype(sample, dtype) -> None:
    assert_same_bits(*cast(sample.args, dtype))


@pytest.mark.parametrize("size", [1, 4, 63, 65, 513, 9001])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_same_bits_in_two_dtypes(low, size) -> None:
    program = MIXED[0].format(low=str(low).removeprefix("torch."))
    for dtypes in itertools.product((torch.float32, low), repeat=2):
        inputs = [torch.randn(size).to(dtype) for dtype in dtypes]
        assert_same_bits(inputs, program, MIXED[1])
        assert_same_bits([strided(x) for x in inputs], program, MIXED[1])
        assert_same_bits(inputs, *EVERY)


@pytest.mark.parametrize("low", LOW, ids=str)
def test_every_number_of_sixteen_bits(low) -> None:
    x = torch.arange(-(2**15), 2**15).short().view(low)
    y = x[torch.randperm(len(x))]
    for name in ("add", "sub", "mul", "div"):
        assert_same_bits([x, y], f"{name} v0 v1; {name} v0 s0; return v2 v3", [0.1])
    assert_same_bits([x], "clamp v0 s0 s1; to v0 float32; return v1 v2", [-0.1, 2.7])
    assert_same_bits([x], "clamp v0 s0 s1; return v1", [1.0, -1.0])


def test_subnormal_numbers_stay() -> None:
    x = torch.randn(100) * 1e-38
    assert_same_bits([x, x.flip(0)], "mul v0 s0; sub v2 v1; to v2 bfloat16; return v3 v4", [0.1])


def test_gradient_is_torchs() -> None:
    x, m = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(ops.pointwise_program([x, m], *DDIM)[0].sum(), [x, m])
    x0 = ((x - 0.8 * m) / 0.6).clamp(-1.25, 1.25)
    want = torch.autograd.grad((x0 * 0.7 + m * 0.3).sum(), [x, m])
    assert all(map(torch.equal, got, want))
