"""A batch norm of two processes, which must be that of one process with both their batches."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import aigc_fast
from aigc_fast import ops
from aigc_fast.nn import BatchNormAct2d, SyncBatchNormAct, fuse
from tests.op_samples import channels_last, rand
from tests.ops.test_every_op import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

#: x, the samples of the first process, activation
CASES = {
    "images": (lambda: rand(5, 4, 6, 6), 2, "lrelu"),
    "smooth": (lambda: channels_last(rand(4, 6, 5, 3)), 1, "swish"),
    "one_process_has_none": (lambda: rand(8, 3), 0, "swish"),
    "large_mean": (lambda: rand(4, 3, 16, 16) + 300, 2, "lrelu"),
}
CALLS = [(name, dtype) for name in CASES for dtype in (torch.float64, torch.float32)]
CALLS.append(("images", torch.bfloat16))
#: float64 is no oracle of its own where x - mean leaves three digits fewer
CALLS.remove(("large_mean", torch.float64))


def inputs(name, dtype):
    """x, weight, bias, the running statistics, a gradient of y, one of the gradient of x."""
    x = CASES[name][0]()
    c = x.shape[1]
    tensors = (x, 1 + 0.3 * rand(c), rand(c, seed=1), rand(c, seed=2), rand(c, seed=3).square(),
               rand(*x.shape, seed=4), rand(*x.shape, seed=5))  # fmt: skip
    return [t.to(dtype) for t in tensors]


def derivatives(x, weight, bias, mean, var, dy, ddx, act, group=None):
    """y and two derivatives of it: of its parameters each process has a part of the sum."""
    mean, var = mean.clone(), var.clone()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, dy)]
    x, weight, bias, dy = leaves
    y = ops.batch_norm_act(x, mean, var, weight, bias, True, 0.3, 1e-5, act, process_group=group)
    first = torch.autograd.grad(y, leaves[:3], dy, create_graph=True)
    second = torch.autograd.grad(first[0], leaves, ddx, allow_unused=True)
    dbias = torch.zeros_like(bias) if second[2] is None else second[2]
    of_batch = [y, first[0], second[0], second[3]]
    return [t.detach() for t in of_batch], [*first[1:], second[1], dbias], [mean, var]


def share_of(rank, name, dtype):
    x, weight, bias, mean, var, dy, ddx = inputs(name, dtype)
    cut = CASES[name][1]
    x, dy, ddx = (t[:cut] if rank == 0 else t[cut:] for t in (x, dy, ddx))
    return x, weight, bias, mean, var, dy, ddx


def modules():
    """A layer and what `fuse` makes of torch's own, with one state."""
    torch.manual_seed(0)
    ours = SyncBatchNormAct(4, act="lrelu", alpha=0.1)
    plain = torch.nn.Sequential(torch.nn.SyncBatchNorm(4), torch.nn.LeakyReLU(0.1))
    fuse(plain)
    return ours, plain


def process(rank, folder):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                            world_size=2, timeout=datetime.timedelta(seconds=120))  # fmt: skip
    found = {}
    for name, dtype in CALLS:
        args = share_of(rank, name, dtype)
        found[name, dtype] = derivatives(*args, CASES[name][2], dist.group.WORLD)
    x = share_of(rank, "images", torch.float32)[0]
    found["modules"] = [[m(x).detach(), m.eval()(x).detach()] for m in modules()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("name", "dtype"), CALLS, ids=str)
def test_is_the_norm_of_the_joined_batch(found, name, dtype):
    act = CASES[name][2]
    (batches, parts, running), (others, other_parts, other_running) = (
        f[name, dtype] for f in found
    )
    joined = [torch.cat(pair) for pair in zip(batches, others, strict=True)]
    sums = [(a.double() + b).to(dtype) for a, b in zip(parts, other_parts, strict=True)]
    torch.testing.assert_close(running, other_running, rtol=0, atol=0)
    with aigc_fast.backend("reference"):
        plain, exact = (
            [t for group in derivatives(*(t.to(kind) for t in inputs(name, dtype)), act)
             for t in group]
            for kind in (dtype, torch.float64)
        )  # fmt: skip
    assert_as_good_as_torch([*joined, *sums, *running], plain, exact, dtype)


def test_modules_and_fuse(found):
    x = inputs("images", torch.float32)[0]
    one = BatchNormAct2d(4, act="lrelu", alpha=0.1)
    training, evaluated = one(x), one.eval()(x)
    for ours, fused in zip(*(f["modules"] for f in found), strict=True):
        torch.testing.assert_close(torch.cat([ours[0], fused[0]]), training)
        torch.testing.assert_close(torch.cat([ours[1], fused[1]]), evaluated)


def test_is_a_batch_norm_without_other_processes():
    x = rand(3, 4, 5, 5).float()
    for module in modules():
        torch.testing.assert_close(module(x), BatchNormAct2d(4, act="lrelu", alpha=0.1)(x))


def test_converts_with_activations():
    model = torch.nn.Sequential(BatchNormAct2d(4, act="relu"), torch.nn.BatchNorm2d(4))
    before = model.state_dict()
    converted = SyncBatchNormAct.convert_sync_batchnorm(model, "group")
    assert converted is model and [type(m) for m in model] == [SyncBatchNormAct] * 2
    assert [m.act for m in model] == ["relu", "linear"] and model[1].process_group == "group"
    torch.testing.assert_close(model.state_dict(), before)


def test_refuses_before_it_waits_for_others():
    x = rand(4, 3)
    for wrong, words in (
        ({"weight": rand(4)}, r"weight must have shape \(3,\)"),
        ({"running_mean": rand(2)}, r"running_mean must have shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.batch_norm_act(x, **wrong, training=True, process_group="never asked")
