"""What every operator of the table must do, whatever it computes."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast._graphs import Replay
from aigc_fast.ops import _registry
from tests.op_samples import OPS, OpSamples, Sample
from tests.tape import tapes

CUDA = torch.cuda.is_available()
#: where Triton's kernels run: without a GPU, in its interpreter
DEVICE = "cuda" if CUDA else "cpu"
#: (implementation, device); without a GPU, Triton runs in its interpreter on CPU tensors
IMPLEMENTATIONS = (
    [("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")]
    if CUDA
    else [("cpu", "cpu"), ("triton", "cpu")]
)
LOW = (torch.float32, torch.bfloat16, torch.float16)
#: The interpreter takes about 1 ms for each program of a grid.
INTERPRETER_ELEMENTS = 20_000

CALLS = [
    pytest.param(op, sample, id=f"{name}-{sample.name}")
    for name, op in OPS.items()
    for sample in op.samples()
]
SECOND = [c for c in CALLS if c.values[0].derivatives > 1 and c.values[1].differentiable]
DIFFERENTIABLE = [c for c in CALLS if c.values[0].derivatives and c.values[1].differentiable]
FIRST = [
    pytest.param(op, op.samples()[0], id=name) for name, op in OPS.items()
]  # one call of each operator


def map_tensors(value: Any, f: Any) -> Any:
    """f applied to every tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, f) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    return value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def cast(value: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A copy with every floating tensor in `dtype`, but for those of one byte; strides stay."""

    def one(t: Tensor) -> Tensor:
        casts = t.is_floating_point() and t.element_size() > 1
        return t.detach().clone().to(device, dtype if casts else t.dtype)

    return map_tensors(value, one)


def call(op: OpSamples, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that the call returns or writes to."""
    out = op.function(*args, **kwargs)
    return [*tensors(out), *tensors([args[i] for i in op.mutates])]


def worst(got: Tensor, exact: Tensor) -> float:
    """Largest error where the exact result is finite; elsewhere both must be the same."""
    got, exact = got.detach().cpu().double(), exact.double()
    finite = exact.isfinite()
    if not finite.all():
        torch.testing.assert_close(got[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    return _largest(got - exact, finite)


def _largest(x: Tensor, where: Tensor) -> float:
    """Of the magnitudes, or 0. Picking them out of x would take ten times as long."""
    return torch.where(where, x.abs(), 0.0).max().item() if x.numel() else 0.0


def ulp(exact: Tensor, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at the largest finite value of `exact`."""
    info = torch.finfo(dtype)
    largest = min(_largest(exact, exact.isfinite()), info.max)
    return max(info.eps * 2.0 ** torch.tensor(largest).log2().floor().item(), info.smallest_normal)


def assert_as_good_as_torch(ours: list, plain: list, exact: list, dtype: torch.dtype) -> None:
    """The rule of this library: at most twice as wrong as plain PyTorch in the same dtype, plus
    one unit in the last place of the largest value, measured against float64. Outputs of one byte
    have a last place of their own."""
    assert len(ours) == len(plain) == len(exact)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.shape == p.shape and o.dtype == p.dtype, f"output {i}"
        if e.dtype == torch.int8:
            assert ((o.cpu().int() - e.int()).abs() <= 1).all(), f"output {i}"
            continue
        if not e.is_floating_point():
            assert torch.equal(o.cpu(), e), f"output {i}"
            continue
        # A value beyond the dtype's range is what plain PyTorch rounds it to: inf, or the largest.
        # oneDNN's gelu of inf is NaN on CPUs with AVX-512 FP16: then it is inf, and no limit.
        e, p = e.double().cpu(), p.detach().double().cpu()
        overflow = e.abs() > torch.finfo(dtype).max
        e = torch.where(overflow, torch.where(p.isnan(), e * torch.inf, p), e)
        # Float64 has no better oracle than float64: both sides carry rounding errors then.
        units = 16 if dtype == torch.float64 else 1
        # Never less than the output itself can tell apart: float32 goes on where float16 ends.
        place = ulp(e, o.dtype)
        if o.element_size() > 1:
            place = max(place, ulp(e, dtype))
        known = p.isfinite() & e.isfinite()
        error, limit = worst(o, e), 2 * _largest(p - e, known) + units * place
        assert error <= limit, f"output {i}: error {error:.3g}, allowed {limit:.3g}"


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[_registry.Op, tuple]]]:
    """The operator calls made inside the block, with their arguments."""
    calls: list[tuple[_registry.Op, tuple]] = []

    def take(op: _registry.Op, args: tuple) -> Any:
        calls.append((op, args))
        return op.overload(*args)

    with _registry._intercepting(take):
        yield calls


def supported(op: OpSamples, sample: Sample, implementation: str, device: str) -> None:
    """Skips a call that this implementation does not have or that would take minutes."""
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32, device)
    name = aigc_fast.explain(lambda: op.function(*args, **kwargs)).op  # the operator's
    if not _registry.OPS[name].has(implementation):
        pytest.skip(f"{name} has no {implementation} implementation")
    if (
        implementation == "cuda"
        and aigc_fast.explain(op.function, *args, **kwargs).implementation != "cuda"
    ):
        pytest.skip("the CUDA C++ kernel does not support this call")
    size = sum(t.numel() for t in tensors((args, kwargs)))
    if implementation == "triton" and device == "cpu" and size > INTERPRETER_ELEMENTS:
        pytest.skip("too large for Triton's interpreter")


def plain_and_exact(op: OpSamples, inputs: tuple, dtype: torch.dtype) -> tuple[list, list]:
    """The reference of a call's (args, kwargs) in `dtype` and in float64. For float64 both would be
    one call: float32's errors, scaled, stand for what the first rounds. They count one and a half
    times, since twice that is compared with a result that is off by as much itself."""
    with aigc_fast.backend("reference"):
        exact = call(op, *cast(inputs, torch.float64))
        if dtype != torch.float64:
            return call(op, *cast(inputs, dtype)), exact
    scale = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    pairs = zip(*plain_and_exact(op, inputs, torch.float32), exact, strict=True)
    return [e + (p - x) * scale if e.dtype == dtype else e for p, x, e in pairs], exact


# The GPU kernels take no float64. Of the 16-bit dtypes Triton, whose interpreter is slow, takes one
# a call in turn.
@pytest.mark.parametrize(
    ("op", "sample", "implementation", "device", "dtype"),
    [
        pytest.param(*c.values, implementation, device, dtype, id=f"{c.id}-{implementation}-{kind}")
        for i, c in enumerate(CALLS)
        for implementation, device in IMPLEMENTATIONS
        for k, dtype in enumerate((*LOW, torch.float64))
        for kind in [str(dtype).removeprefix("torch.")]
        if implementation == "cpu" or (k < 3 and (CUDA or k in (0, 1 + i % 2)))
    ],
)
def test_matches_reference(op, sample, implementation, device, dtype) -> None:
    supported(op, sample, implementation, device)
    # Of 24 bits in float64 too: products are exact then, and the oracle's long sums nearly so.
    inputs = cast((sample.args, sample.kwargs), min(dtype, torch.float32, key=lambda d: d.itemsize))
    plain, exact = plain_and_exact(op, inputs, dtype)
    with aigc_fast.backend(implementation):
        ours = call(op, *cast(inputs, dtype, device))
    assert_as_good_as_torch(ours, plain, exact, dtype)


def strided(t: Tensor) -> Tensor:
    """Same values, every other element of its memory."""
    wide = t.new_full((*t.shape, 2), 77)
    wide[..., 0] = t
    return wide[..., 0]


def offset(t: Tensor) -> Tensor:
    """Same values, one element past an aligned address."""
    flat = t.new_full((t.numel() + 1,), 77)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def permuted(t: Tensor) -> Tensor:
    """Same values, dimensions in reversed memory order."""
    backwards = tuple(range(t.dim() - 1, -1, -1))
    return t.permute(backwards).contiguous().permute(backwards)


LAYOUTS = (strided, offset, permuted)


# All of them for C++; Triton, whose interpreter is slow, takes one a call in turn.
@pytest.mark.parametrize(
    ("op", "sample", "implementation", "device", "layout"),
    [
        pytest.param(
            *c.values, implementation, device, layout, id=f"{c.id}-{implementation}-{kind}"
        )
        for i, c in enumerate(CALLS)
        for implementation, device in IMPLEMENTATIONS
        for k, layout in enumerate(LAYOUTS)
        for kind in [layout.__name__]
        if implementation != "triton" or CUDA or k == i % len(LAYOUTS)
    ],
)
def test_any_strides(op, sample, implementation, device, layout) -> None:
    supported(op, sample, implementation, device)
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32)
    with aigc_fast.backend("reference"):
        exact = call(op, *cast((args, kwargs), torch.float64))
        plain = call(op, *cast((args, kwargs), torch.float32))
    laid_out = map_tensors(cast((args, kwargs), torch.float32, device), layout)
    with aigc_fast.backend(implementation):
        ours = call(op, *laid_out)
    assert_as_good_as_torch(ours, plain, exact, torch.float32)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_is_made_of_what_list_ops_says(op) -> None:
    made_of = {row["op"]: row["made_of"] for row in aigc_fast.list_ops()}
    listed = made_of.get(op.function.__name__)
    if listed is None:
        pytest.skip("the table calls it through a function of its own")
    run = set()
    for sample in op.samples():
        with recorded() as calls, torch.no_grad():
            op.function(*cast(sample.args, torch.float32), **cast(sample.kwargs, torch.float32))
        run |= {inner.name for inner, _ in calls}
    assert all(any(name.startswith(part) for part in listed) for name in run)
    assert {part for part in listed if part != "torch"} <= run


REFUSALS = pytest.mark.parametrize(
    ("op", "refusal"),
    [
        pytest.param(op, refusal, id=f"{name}-{refusal.name}")
        for name, op in OPS.items()
        for refusal in op.refusals()
    ],
)


@pytest.mark.parametrize(("implementation", "device"), [("reference", "cpu"), *IMPLEMENTATIONS])
@REFUSALS
def test_refuses(op, refusal, implementation, device) -> None:
    args, kwargs = map_tensors((refusal.args, refusal.kwargs), lambda t: t.to(device))
    with pytest.raises(refusal.error, match=refusal.match), aigc_fast.backend(implementation):
        op.function(*args, **kwargs)
    with pytest.raises(refusal.error, match=refusal.match):
        op.function(*args, **kwargs)


@REFUSALS
def test_a_gpu_refuses_before_it_chooses_a_kernel(op, refusal) -> None:
    """What stands under CUDA's dispatch key, called with tensors of no GPU."""
    on_cuda = _registry._intercepting(lambda inner, args: inner._on_cuda(*args))
    with pytest.raises(refusal.error, match=refusal.match), on_cuda:
        op.function(*refusal.args, **refusal.kwargs)


# ---- derivatives ----------------------------------------------------------------------------


def variables(op, args, kwargs) -> list[Tensor]:
    """The tensors of a call that take gradients."""
    args = [a for i, a in enumerate(args) if i not in op.constants]
    return [t for t in tensors((args, kwargs)) if t.is_floating_point()]


def gradients(op, args, kwargs, upstream) -> list[Tensor]:
    """Outputs' gradients with respect to every floating input, for upstream(output, index)."""
    inputs = variables(op, args, kwargs)
    for t in inputs:
        t.requires_grad_()
    outputs = [t for t in call(op, args, kwargs) if t.requires_grad]
    grads = [upstream(t, i) for i, t in enumerate(outputs)]
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]


def contiguous_grad(t: Tensor, i: int) -> Tensor:
    g = torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + i))
    return g.to(torch.bfloat16).to(t.device, t.dtype)  # the same values in every dtype


def expanded_grad(t: Tensor, i: int) -> Tensor:
    return torch.ones((), dtype=t.dtype, device=t.device).expand(t.shape)


def permuted_grad(t: Tensor, i: int) -> Tensor:
    return permuted(contiguous_grad(t, i))


# Triton, whose interpreter is slow, takes in turn one layout of the gradient and one 16-bit dtype.
@pytest.mark.parametrize(
    ("op", "sample", "implementation", "device", "dtype", "upstream"),
    [
        pytest.param(*c.values, implementation, device, dtype, upstream, id=f"{c.id}-{name}")
        for i, c in enumerate(DIFFERENTIABLE)
        for implementation, device in IMPLEMENTATIONS
        for k, (dtype, upstream) in enumerate(
            [(torch.float32, expanded_grad), (torch.float32, permuted_grad)]
            + [(dtype, contiguous_grad) for dtype in LOW]
        )
        for name in [f"{implementation}-{str(dtype).removeprefix('torch.')}-{upstream.__name__}"]
        if implementation != "triton" or CUDA or k in (i % 3, 3 + i // 3 % 2)
    ],
)
def test_gradients_match_reference(op, sample, implementation, device, dtype, upstream) -> None:
    supported(op, sample, implementation, device)
    rounded = cast((sample.args, sample.kwargs), dtype)
    with aigc_fast.backend("reference"):
        exact = gradients(op, *cast(rounded, torch.float64), upstream)
        plain = gradients(op, *cast(rounded, dtype), upstream)
    with aigc_fast.backend(implementation):
        ours = gradients(op, *cast(rounded, dtype, device), upstream)
    assert_as_good_as_torch(ours, plain, exact, dtype)


def as_function(op: OpSamples, sample: Sample) -> tuple[Any, list[Tensor]]:
    """(f, inputs) with f a function of the floating tensors of the call alone."""
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64)
    inputs = [t.requires_grad_() for t in variables(op, args, kwargs)]

    def f(*values: Tensor) -> Any:
        replace = dict(zip(map(id, inputs), values, strict=True))
        a, k = map_tensors((args, kwargs), lambda t: replace.get(id(t), t))
        return tuple(tensors(op.function(*a, **k)))

    return f, inputs


@pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE)
def test_gradcheck(op, sample) -> None:
    f, inputs = as_function(op, sample)
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize(("op", "sample"), SECOND)
def test_gradgradcheck(op, sample) -> None:
    f, inputs = as_function(op, sample)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(("op", "sample"), [c for c in CALLS if not c.values[0].derivatives])
def test_refuses_gradients(op, sample) -> None:
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32)
    for t in tensors((args, kwargs)):
        if t.is_floating_point():
            t.requires_grad_()
    with pytest.raises(RuntimeError, match="has no derivative"):
        op.function(*args, **kwargs)
    with torch.no_grad():
        op.function(*args, **kwargs)


# ---- torch's own machinery --------------------------------------------------------------------


# opcheck compares NaN with NaN and finds them different. It takes a second a call and looks at the
# registration, not at values: some calls of each operator will do.
@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{name}-{sample.name}")
        for name, op in OPS.items()
        for sample in [s for s in op.samples() if "special" not in s.name][:2]
    ],
)
def test_opcheck(op, sample) -> None:
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32)
    if any(t.is_floating_point() and t.element_size() == 1 for t in tensors((args, kwargs))):
        pytest.skip("torch cannot compare fp8 tensors")
    with recorded() as calls:
        if op.derivatives and sample.differentiable:
            gradients(op, args, kwargs, contiguous_grad)
        else:
            op.function(*args, **kwargs)
    for inner, inner_args in calls:
        torch.library.opcheck(inner.overload, cast(inner_args, torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_compiles_without_graph_break(op, sample, dynamic) -> None:
    torch._dynamo.reset()
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32)
    eager = call(op, *cast((args, kwargs), torch.float32))
    compiled = torch.compile(
        lambda *a, **k: op.function(*a, **k), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    out = compiled(*args, **kwargs)
    got = [*tensors(out), *tensors([args[i] for i in op.mutates])]
    torch.testing.assert_close(got, eager, rtol=0, atol=0)
    if op.derivatives:
        args, kwargs = cast((sample.args, sample.kwargs), torch.float32)
        f = dataclasses.replace(op, function=compiled)
        got = gradients(f, args, kwargs, contiguous_grad)
        want = gradients(op, *cast((args, kwargs), torch.float32), contiguous_grad)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_exports(op, sample) -> None:
    args, kwargs = cast((sample.args, sample.kwargs), torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors_in: Tensor) -> Any:
            values = iter(tensors_in)
            a, k = map_tensors((args, kwargs), lambda _: next(values))
            return op.function(*a, **k)

    inputs = tuple(tensors(cast((args, kwargs), torch.float32)))
    with torch.no_grad():
        program = torch.export.export(Module(), inputs)
        eager = call(op, *cast((args, kwargs), torch.float32))
        moved = cast(inputs, torch.float32)
        out = program.module()(*moved)
    if not op.mutates:
        torch.testing.assert_close(tensors(out), eager, rtol=0, atol=0)
    assert any("aigc_fast" in str(node.target) for node in program.graph.nodes)


# `linear_cross_entropy` is a product, which autocast is for.
@pytest.mark.parametrize(("op", "sample"), [c for c in FIRST if c.id != "linear_cross_entropy"])
def test_autocast_leaves_dtypes_alone(op, sample) -> None:
    plain = call(op, *cast((sample.args, sample.kwargs), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        under = call(op, *cast((sample.args, sample.kwargs), torch.float32))
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("op", "sample"), CALLS)
def test_same_bits_for_any_number_of_threads(op, sample, dtype) -> None:
    def run() -> list[Tensor]:
        args, kwargs = cast((sample.args, sample.kwargs), dtype)
        if op.derivatives and sample.differentiable:
            return gradients(op, args, kwargs, contiguous_grad)
        return call(op, args, kwargs)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two, again = run(), run()
    finally:
        torch.set_num_threads(before)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for a, b, c in zip(one, two, again, strict=True):
        kind = bits[a.element_size()]
        assert torch.equal(a.view(kind), b.view(kind)) and torch.equal(b.view(kind), c.view(kind))


def check_captured(op: OpSamples, sample: Sample, device: str) -> None:
    """A recorded call gives what the plain one does, its tensors staying where they are."""
    args, kwargs = cast((sample.args, sample.kwargs), torch.float16, device)
    before, moved = cast((args, kwargs), torch.float16, device), tensors((args, kwargs))
    eager = call(op, *cast(before, torch.float16, device))
    if op is OPS["scheduler_step"]:  # numbers would come from the host: a loop has a tensor of them
        args = tuple(torch.tensor(a, device=device) if isinstance(a, tuple) else a for a in args)
    replay = Replay(lambda: tuple(call(op, args, kwargs)), torch.device(device))
    replay()
    for t, old in zip(moved, tensors(before), strict=True):
        t.copy_(old)
    torch.testing.assert_close(list(replay()), eager, rtol=0, atol=0)
    assert replay._recorded


@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_nothing_waits_or_comes_from_the_host(op, sample, monkeypatch) -> None:
    """What no CUDA graph can hold, looked for in Triton's launchers on the CPU."""
    if CUDA:
        pytest.skip("Triton's interpreter is for machines without a GPU")
    supported(op, sample, "triton", "cpu")
    for name, module in list(sys.modules.items()):
        if name.startswith("aigc_fast.ops.") and hasattr(module, "can_look"):
            monkeypatch.setattr(module, "can_look", lambda _: False)  # a GPU's values are not
    with tapes(), aigc_fast.backend("triton"):
        check_captured(op, sample, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize(("op", "sample"), FIRST)
def test_captured_in_a_cuda_graph(op, sample) -> None:
    supported(op, sample, "triton", "cuda")
    check_captured(op, sample, "cuda")
