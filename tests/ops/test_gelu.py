"""ops.gelu: torch's own, its tanh form on CPUs by a kernel of ours."""

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from tests.op_samples.sample import rand
from tests.ops.test_every_op import assert_as_good_as_torch, recorded

FLOATS = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
SHAPES = [(), (0, 3), (1,), (17,), (3, 127), (2, 5, 1025), (8193,), (70000,)]


def of(shape, dtype, scale=3.0):
    return (rand(*shape) * scale).to(dtype)


@FLOATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tanh_form_and_its_gradient(shape, dtype) -> None:
    x, dy = of(shape, dtype).requires_grad_(), of(shape, dtype, 1.0)

    def run(function, x, dy):
        y = function(x, approximate="tanh")
        return [y, *torch.autograd.grad(y, x, dy)]

    with recorded() as calls:
        ours = run(ops.gelu, x, dy)
    assert [op.name for op, _ in calls] == ["gelu_tanh", "gelu_tanh_backward"]
    exact = run(F.gelu, x.detach().double().requires_grad_(), dy.double())
    if dtype == torch.float64:  # of which torch's is no more exact than ours
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
    else:
        assert_as_good_as_torch(ours, run(F.gelu, x, dy), exact, dtype)


@FLOATS
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_in_place(approximate, dtype) -> None:
    for shape in SHAPES:
        x = of(shape, dtype)
        want, pointer = ops.gelu(x, approximate), x.data_ptr()
        y = ops.gelu(x, approximate, inplace=True)
        assert y is x and y.data_ptr() == pointer
        torch.testing.assert_close(y, want, rtol=0, atol=0)
    part = of((6, 8), dtype)
    whole, want = part.clone(), F.gelu(part[:, 2:5], approximate=approximate)
    ops.gelu(part[:, 2:5], approximate, inplace=True)
    torch.testing.assert_close(part[:, 2:5], want)
    part[:, 2:5] = whole[:, 2:5]
    assert torch.equal(part, whole)  # nothing beside it was written
    x = of((3,), dtype).requires_grad_()
    with pytest.raises(RuntimeError, match="x wants a gradient"):
        ops.gelu(x, approximate, inplace=True)
    with torch.no_grad():
        assert ops.gelu(x, approximate, inplace=True) is x


@FLOATS
def test_extremes(dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-7, -80.0, 80.0, largest, -largest, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(20)
    theirs = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(ops.gelu(x, "tanh"), theirs, equal_nan=True)


def test_derivatives_of_any_order() -> None:
    x = of((7, 5), torch.float64).requires_grad_()
    function = lambda x: ops.gelu(x, "tanh")  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    dy = of((5, 7), torch.float64).t()  # a gradient in another order
    ours, theirs = (
        torch.autograd.grad(f(x, approximate="tanh"), x, dy) for f in (ops.gelu, F.gelu)
    )
    torch.testing.assert_close(ours, theirs)
    expanded = torch.ones((), dtype=torch.float64).expand(7, 5)
    ours, theirs = (
        torch.autograd.grad(f(x, approximate="tanh"), x, expanded) for f in (ops.gelu, F.gelu)
    )
    torch.testing.assert_close(ours, theirs)


def test_one_thread_and_two_give_the_same_bits() -> None:
    x, threads = of((100001,), torch.float32), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            found.append(ops.gelu(x, "tanh"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_elsewhere_it_is_torchs_own() -> None:
    x = of((6, 8), torch.float32)
    compiled = torch.compile(lambda x: ops.gelu(x, "tanh"), fullgraph=True)
    with recorded() as calls:
        assert torch.equal(ops.gelu(x), F.gelu(x))
        assert ops.gelu(x.t(), "tanh").stride() == F.gelu(x.t()).stride()
        torch.testing.assert_close(compiled(x), F.gelu(x, approximate="tanh"))
        slope = torch.func.grad(lambda x: ops.gelu(x, "tanh").sum())(x)
    assert not calls
    torch.testing.assert_close(
        slope, torch.func.grad(lambda x: F.gelu(x, approximate="tanh").sum())(x)
    )
    for wrong in ((x, "erf"), (x.int(), "none"), (x.int(), "tanh")):
        with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
            F.gelu(wrong[0], approximate=wrong[1])
        with pytest.raises(theirs.type):
            ops.gelu(*wrong)
    with aigc_fast.backend("reference"):
        torch.testing.assert_close(ops.gelu(x, "tanh"), F.gelu(x, approximate="tanh"))
