import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand


def weight(out: int, channels: int) -> torch.Tensor:
    return rand(out, channels, 3, 3, seed=1, scale=(9 * channels) ** -0.5)


def _samples() -> list[Sample]:
    special = rand(1, 2, 4, 5)
    special[0, 0, 1, 1], special[0, 1, 3, 4], special[0, 0, 3, 0] = torch.inf, torch.nan, -torch.inf
    several = [channels_last(rand(1, 8, 3, 5)), rand(1, 3, 3, 5), rand(1, 1, 3, 5)]
    return [
        Sample("all", (rand(2, 3, 4, 5), weight(4, 3), rand(4), rand(4), rand(2, 4, 4, 5), 0.2)),
        Sample("several", (several, weight(3, 12), rand(3), rand(3))),
        Sample("plain", (rand(1, 2, 3, 4), weight(2, 2))),
        Sample("channels_last", (channels_last(rand(1, 5, 3, 4)), weight(6, 5), rand(6), rand(6))),
        Sample("one", (rand(1, 1, 1, 1), weight(1, 1), None, None, rand(1, 1, 1, 1))),
        Sample("empty", (rand(0, 2, 3, 4), weight(2, 2), rand(2))),
        Sample("tiles", (rand(1, 64, 5, 50), weight(64, 64), rand(64), rand(64))),
        Sample("part_tiles", (rand(1, 33, 3, 17), weight(17, 33), rand(17)), {"gain": -1.5}),
        Sample("pair_and_one", (rand(2, 32, 2, 16), weight(48, 32), None, rand(48))),
        Sample("deep", (rand(1, 192, 2, 9), weight(32, 192), rand(32), rand(32))),
        Sample("winograd", (rand(2, 20, 5, 9), weight(33, 20), rand(33), rand(33))),
        Sample(
            "winograd_residual",
            ([rand(1, 24, 7, 6), channels_last(rand(1, 9, 7, 6))], channels_last(weight(70, 33))),
            {"residual": rand(1, 70, 7, 6), "gain": 0.2},
        ),
        Sample("many_tiles", (rand(1, 16, 40, 101), weight(12, 16), rand(12))),
        Sample("special", (special, weight(2, 2), None, rand(2))),
    ]


def _refusals() -> list[Refusal]:
    x, w = rand(1, 2, 4, 4), weight(3, 2)
    return [
        Refusal("none", ([], w), ValueError, "x must be at least one tensor"),
        Refusal("shape", (x[0], w), ValueError, "x must have 4 dimensions"),
        Refusal("kernel", (x, w[..., :1]), ValueError, r"weight must have shape \(3, 2, 3, 3\)"),
        Refusal("channels", ([x, x], w), ValueError, r"weight must have shape \(3, 4, 3, 3\)"),
        Refusal("sizes", ([x, x[:, :, 1:]], w), ValueError, "x must be tensors of one batch"),
        Refusal("flat", (x[:, :, :0], w), ValueError, "x must have channels, height and width"),
        Refusal("dtype", (x.float(), w), TypeError, "x must have the dtype of weight"),
        Refusal("int", (x.int(), w.int()), TypeError, "weight must be float64"),
        Refusal("bias", (x, w, rand(2)), ValueError, r"bias must have shape \(3,\)"),
        Refusal("slope", (x, w, None, rand(3).float()), TypeError, "slope must have the dtype"),
        Refusal("residual", (x, w, None, None, x), ValueError, r"residual must have shape \(1, 3,"),
    ]


OPS = {
    "conv3x3": OpSamples(
        ops.conv3x3,
        _samples,
        _refusals,
        derivatives=0,
        large=lambda: [
            Sample(
                "64x256x256",
                (channels_last(rand(1, 64, 256, 256)), weight(64, 64), rand(64), rand(64)),
            )
        ],
    ),
}
