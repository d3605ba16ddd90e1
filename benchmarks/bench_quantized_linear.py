"""quantized_linear beside F.linear with the dequantised weight in the dtype of x, which is made
outside the timing, and beside torch's own int4 kernel for CPUs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import aigc_fast
from aigc_fast import ops
from aigc_fast._timing import interleaved
from benchmarks.machine import DEVICE
from tests.op_samples import OPS

OP = OPS["quantized_linear"]


def torch_int4(x, codes, scales, minimums):
    """torch's x @ W.T for 4-bit codes and groups of 32, its weight packed outside the timing."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    # There a weight is (code - 8) * scale + zero.
    pairs = torch.stack([scales, minimums + 8 * scales], -1).transpose(0, 1)
    pairs = pairs.to(x.dtype).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, pairs)


def unpacked(weight, out_features):
    """Codes, scales and minimums of a weight of 4 bits, groups of 32 and minimums."""
    tiles, groups, _ = weight.shape
    halves = weight[..., 256:].contiguous().view(torch.float16).float()
    halves = halves.view(tiles, groups, 2, 16).permute(2, 0, 3, 1).reshape(2, -1, groups)
    scales, minimums = halves[:, :out_features]
    dense = ops.dequantize_weight(weight, 4, 32, out_features, groups * 32)
    steps = (dense.unflatten(1, (-1, 32)) - minimums.unsqueeze(-1)) / scales.unsqueeze(-1)
    return steps.flatten(1).round(), scales, minimums


@pytest.mark.parametrize("quantize_activations", [True, False], ids=["int8", "as_they_are"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sample", OP.large(), ids=lambda s: s.name)
def bench_quantized_linear(measure, sample, dtype, quantize_activations) -> None:
    kwargs = sample.kwargs | {"quantize_activations": quantize_activations}
    sample = dataclasses.replace(sample, kwargs=kwargs)
    x, weight, _ = sample.args
    bits, group_size, out_features = (kwargs[k] for k in ("bits", "group_size", "out_features"))
    dense = ops.dequantize_weight(weight, bits, group_size, out_features, x.shape[-1])
    dense = dense.to(DEVICE, dtype)

    def eager(x, weight, bias, **kwargs):
        if x.dtype == torch.float64:  # not timed: the result that both are checked against
            with aigc_fast.backend("reference"):
                return ops.quantized_linear(x, weight, bias, **kwargs)
        return F.linear(x, dense, bias)

    size = torch.finfo(dtype).bits // 8
    moved = weight.nbytes + size * (x.numel() + x.numel() // x.shape[-1] * out_features)
    measure(OP, sample, dtype, eager=eager, limit="read", bytes_moved=moved)

    if DEVICE == "cpu" and bits == 4:
        x = x.to(dtype)
        peer = torch_int4(x, *unpacked(weight, out_features))
        ours = lambda: ops.quantized_linear(x, weight, **kwargs)  # noqa: E731
        assert (peer().float() - ours().float()).norm() <= 0.02 * ours().float().norm()
        with torch.no_grad():
            times = interleaved({"torch_int4": peer, "ours": ours}, seconds=0.5)
        measure.benchmark.extra_info["torch_int4_over_ours"] = times["torch_int4"] / times["ours"]
