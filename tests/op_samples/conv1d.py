import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, rand


def weight(first: int, second: int, taps: int) -> torch.Tensor:
    return rand(first, second, taps, seed=1, scale=(second * taps) ** -0.5)


def innermost(x: torch.Tensor) -> torch.Tensor:
    """The same values with channels innermost in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _special() -> torch.Tensor:
    x = rand(1, 2, 12)
    x[0, 0, 1], x[0, 1, 5], x[0, 0, 9] = torch.inf, torch.nan, -torch.inf
    return x


def _conv1d() -> list[Sample]:
    y = rand(2, 4, 17, seed=2)
    three = [y, innermost(rand(2, 4, 17, seed=3)), rand(2, 17, 4, seed=4).transpose(1, 2)]
    last = {"padding": 1, "slope": 0.1, "gain": 1 / 3}
    long, wide = innermost(rand(1, 32, 900)), innermost(rand(1, 128, 70))
    # whose numeric derivatives would take too long: tests/ops/test_conv1d.py has others
    once = {"differentiable": False}
    return [
        Sample("all", (rand(2, 3, 17), weight(4, 3, 3), rand(4), three), last),
        Sample("plain", (rand(1, 2, 9), weight(3, 2, 2))),
        Sample("one", (rand(1, 1, 1), weight(1, 1, 1), None, [rand(1, 1, 1)])),
        Sample("empty", (rand(0, 2, 5), weight(2, 2, 3), rand(2))),
        Sample("far_apart", (rand(1, 3, 8), weight(12, 3, 5)), {"padding": 40, "dilation": 17}),
        Sample(
            "tiles",
            (long, weight(32, 32, 7), rand(32), [long]),
            {"padding": 3, "slope": 0.1},
            **once,
        ),
        Sample(
            "dilated",
            (long, weight(32, 32, 5)),
            {"padding": 24, "dilation": 12, "slope": 0.2},
            **once,
        ),
        Sample("deep", (wide, weight(70, 128, 3), rand(70)), {"padding": 1, "slope": 0.0}, **once),
        Sample(
            "few_outputs", (long, weight(1, 32, 7), rand(1)), {"padding": 3, "slope": 0.01}, **once
        ),
        Sample("odd", (rand(2, 33, 50), weight(17, 33, 4), rand(17)), {"padding": 2, "gain": -1.5}),
        Sample("blocks", (rand(1, 40, 7), weight(36, 40, 2), rand(36)), {"slope": 0.3}),
        Sample("permuted_weight", (wide, innermost(weight(48, 128, 5)).permute(0, 1, 2)), **once),
        Sample("special", (_special(), weight(9, 2, 3)), {"padding": 1, "slope": 0.5}, **once),
        Sample("stride", (rand(2, 5, 31), weight(9, 5, 4), rand(9), [rand(2, 9, 15)], 2, 1)),
        Sample("codec", (long, weight(64, 32, 16), rand(64)), {"stride": 8, "padding": 4}, **once),
        Sample("strided_dot", (long, weight(3, 32, 5)), {"stride": 3, "dilation": 2}, **once),
        Sample("beyond", (rand(1, 3, 5), weight(12, 3, 2)), {"stride": 9, "padding": 2}),
    ]


def _conv_transpose1d() -> list[Sample]:
    long = innermost(rand(1, 64, 150))
    return [
        Sample("all", (rand(2, 3, 9), weight(3, 4, 4), rand(4), 2, 1, 0.1)),
        Sample("plain", (rand(1, 2, 5), weight(2, 3, 2))),
        Sample("one", (rand(1, 1, 1), weight(1, 1, 1))),
        Sample("empty", (rand(0, 2, 5), weight(2, 2, 4), rand(2), 2, 1)),
        Sample("gaps", (rand(1, 3, 6), weight(3, 5, 2), rand(5)), {"stride": 5}),
        Sample("wide_gaps", (rand(2, 3, 40), weight(3, 12, 2), rand(12)), {"stride": 5}),
        Sample("part_of_a_stride", (rand(1, 3, 7), weight(3, 12, 7), rand(12), 3, 4)),
        Sample("short", (rand(1, 3, 1), weight(3, 12, 3), rand(12), 5)),
        Sample("vocoder", (long, weight(64, 32, 8), rand(32), 4, 2, 0.1), differentiable=False),
        Sample("one_output", (rand(2, 16, 40), weight(16, 1, 16), rand(1), 8, 4, 0.1)),
        Sample("apart", (rand(2, 3, 9), weight(3, 10, 4), rand(10), 2, 3, 0.1, 1, 3)),
        Sample("common_factor", (rand(1, 3, 7), weight(3, 12, 5), None, 6, 5, 1.0, 2, 4)),
        Sample("stretched", (rand(1, 4, 11), weight(4, 9, 3), rand(9)), {"dilation": 5}),
        Sample("special", (_special(), weight(2, 10, 4)), {"stride": 2, "slope": 0.5}, False),
    ]


def _refusals() -> list[Refusal]:
    x, w = rand(1, 2, 8), weight(2, 2, 3)
    other = rand(1, 3, 8)
    return [
        Refusal("shape", (x[0], w), ValueError, "x must have 3 dimensions"),
        Refusal("weight", (x, w[0]), ValueError, "weight must have 3 dimensions"),
        Refusal(
            "no_taps", (x, w[..., :0]), ValueError, "weight must have outputs, inputs and taps"
        ),
        Refusal("channels", (other, w), ValueError, "weight must have shape"),
        Refusal("dtype", (x.float(), w), TypeError, "x must have the dtype of weight"),
        Refusal("int", (x.int(), w.int()), TypeError, "weight must be float64"),
        Refusal("bias", (x, w, rand(3)), ValueError, r"bias must have shape \(2,\)"),
        Refusal("stride", (x, w), ValueError, "stride must be at least 1", {"stride": 0}),
        Refusal("padding", (x, w), ValueError, "padding must be at least 0", {"padding": -1}),
        *(
            Refusal(
                f"{name}_{value}", (x, w), ValueError, f"{name} must be less than", {name: value}
            )
            for name, end in (("stride", 2**20), ("padding", 2**30), ("dilation", 2**30 // 3))
            for value in (end, 2**62, 2**64)
        ),
    ]


def _conv1d_refusals() -> list[Refusal]:
    x, w = rand(1, 2, 8), weight(2, 2, 3)
    return [
        *_refusals(),
        Refusal("dilation", (x, w), ValueError, "dilation must be at least 1", {"dilation": 0}),
        Refusal("length", (x[..., :2], w), ValueError, "x must be as long as the filter"),
        Refusal(
            "residual", (x, w, None, [x]), ValueError, r"residuals must have shape \(1, 2, 6\)"
        ),
        Refusal("many", (x, w, None, [x] * 4, 1, 1), ValueError, "residuals must be at most 3"),
    ]


def _transpose_refusals() -> list[Refusal]:
    x, w = rand(1, 2, 8), weight(2, 2, 3)
    longer = "x must be longer than the padding"
    return [
        *_refusals(),
        Refusal("length", (x, w), ValueError, longer, {"padding": 5}),
        Refusal("none", (x[..., :0], w), ValueError, longer, {"stride": 4}),
        Refusal(
            "more", (x, w), ValueError, "output_padding must be at least 0", {"output_padding": 1}
        ),
    ]


def _large() -> list[Sample]:
    def sample(name: str, x: torch.Tensor, dilation: int) -> Sample:
        channels = x.shape[1]
        near = {"padding": 3 * dilation, "dilation": dilation, "slope": 0.1}
        return Sample(name, (x, weight(channels, channels, 7), rand(channels), [x]), near)

    return [
        sample("32x102400_k7_d3", innermost(rand(1, 32, 102400)), 3),
        sample("32x102400_k7_d3_contiguous", rand(1, 32, 102400), 3),
        sample("128x3200_k7", innermost(rand(1, 128, 3200)), 1),
    ]


def _large_transpose() -> list[Sample]:
    x = innermost(rand(1, 256, 400))
    return [Sample("256x400_k16_s8", (x, weight(256, 128, 16), rand(128), 8, 4, 0.1))]


OPS = {
    "conv1d": OpSamples(ops.conv1d, _conv1d, _conv1d_refusals, large=_large),
    "conv_transpose1d": OpSamples(
        ops.conv_transpose1d,
        _conv_transpose1d,
        _transpose_refusals,
        large=_large_transpose,
    ),
}
