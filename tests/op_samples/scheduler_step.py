from math import inf

import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

#: (A, B, r, P, Q, R, N, H_1, ...)
ROW = (1.3, -0.8, 0.9, 0.6, 0.3, -0.2, 0.5, -0.7, 0.25, -0.125, 0.0625, -0.5)
FREE = (1.3, -0.8, inf, 0.6, 0.3, -0.2, 0.5, -0.7, 0.25, -0.125, 0.0625, -0.5)
#: (p, q, r, n, h_1, ...)
SECOND = (-0.4, 0.7, 0.1, -0.3, 0.6, -0.8, 0.2, 0.9, -0.35)


def _call(
    name, *shape, row=ROW, noise=False, history=0, guided=False, second=False, **kwargs
) -> Sample:
    x, m, z, u, *h = (rand(*shape, seed=i) for i in range(4 + history))
    if noise:
        kwargs["noise"] = z
    if guided:
        kwargs["uncond_output"] = u
    behind = SECOND[: 4 + history] if second else ()
    if isinstance(row[0], float):
        row = (*row[: 7 + history], *behind)
    else:
        row = tuple((*r[: 7 + history], *behind) for r in row)
    differentiable = x.numel() < 500 and "guidance_rescale" not in kwargs
    return Sample(name, (x, m, row), {**kwargs, "history": h}, differentiable)


def _samples() -> list[Sample]:
    shape = (2, 3, 4, 5)
    everything = {"noise": True, "guided": True, "guidance_scale": 2.5, "return_x0": True}
    rescaled = {**everything, "guidance_rescale": 0.7}
    nhwc = [channels_last(rand(*shape, seed=i)) for i in range(4)]
    special = torch.tensor([[0.0, -0.0, 1e-30, 1e4, inf, -inf, torch.nan]]).double()
    return [
        _call("everything", *shape, history=5, second=True, **everything),
        _call("history", *shape, history=4, **everything),
        _call("second", *shape, second=True),
        _call("second_history", *shape, row=FREE, history=3, second=True, return_x0=True),
        _call("second_noise", *shape, noise=True, history=1, second=True),
        _call("second_for_each", *shape, row=(ROW, FREE), history=2, second=True, **everything),
        _call("second_long", 2, 9001, history=2, second=True, return_x0=True),
        _call("plain", *shape),
        _call("x0", *shape, return_x0=True),
        _call("noise", *shape, noise=True),
        _call("no_clip", *shape, row=FREE, history=1, return_x0=True),
        _call("guided", *shape, guided=True, guidance_scale=3.0, history=2),
        _call("rescaled", *shape, row=FREE, history=1, **rescaled),
        _call("rescaled_long", 3, 5000, row=FREE, **rescaled),
        _call("row_for_each", *shape, row=(ROW, FREE), history=3, **everything),
        _call("row_for_each_long", 2, 4099, row=(ROW, FREE), history=1, **rescaled),
        Sample("channels_last", (*nhwc[:2], ROW[:8]), {"noise": nhwc[2], "history": nhwc[3:]}),
        Sample("mixed_orders", (nhwc[0], rand(*shape), (ROW[:7], FREE[:7])), {"noise": nhwc[1]}),
        Sample("packed", (rand(3, 2, 5), rand(3, 4, 5)[:, :2], ROW[:7])),
        Sample("special", (special, special.flip(1), FREE[:7]), {"noise": special}, False),
        Sample("special_clip", (special, special.flip(1), ROW[:7]), {"return_x0": True}, False),
        _call("number", history=1, noise=True),
        _call("one", 1, **everything),
        _call("empty", 0, 3, history=1, **everything),
        _call("empty_rows", 2, 0, row=(ROW, FREE), **everything),
        _call("odd", 127, 3, row=FREE, history=1, **everything),
        _call("1025", 1025, history=1),
        _call("long", 2, 9001, history=1, **everything),
    ]


def _refusals() -> list[Refusal]:
    x, row = rand(2, 3), ROW[:7]
    table = torch.tensor(row)

    def refusal(name, error, match, *args, **kwargs) -> Refusal:
        return Refusal(name, args, error, match, kwargs)

    return [
        refusal("dtype", TypeError, "sample must be float64", x.int(), x.int(), table),
        refusal("output_dtype", TypeError, "model_output must have the dtype", x, x.float(), row),
        refusal("output_shape", ValueError, "model_output must have shape", x, rand(2, 4), row),
        refusal("noise", ValueError, "noise must have shape", x, x, row, noise=rand(3)),
        refusal("uncond", ValueError, "uncond_output must have shape", x, x, row,
                uncond_output=rand(3)),
        refusal("history", ValueError, r"history\[1\] must have shape", x, x, ROW[:9],
                history=[x, rand(3)]),
        refusal("history_length", ValueError, "history must hold at most 5", x, x, (0.0,) * 13,
                history=[x] * 6),
        refusal("columns", ValueError, r"coefficients must have shape \(7,\)", x, x, ROW[:8]),
        refusal("columns_history", ValueError, r"coefficients must have shape \(8,\)", x, x, row,
                history=[x]),
        refusal("rows", ValueError, "coefficients must have shape", x, x, (row, row, row)),
        refusal("number_rows", ValueError, "coefficients must have shape", rand(), rand(), (row,)),
        refusal("coefficients_dtype", TypeError, "coefficients must be float32", x, x,
                table.bfloat16()),
        refusal("scale", ValueError, "uncond_output must be given", x, x, row, guidance_scale=2.0),
        refusal("rescale", ValueError, "uncond_output must be given", x, x, row,
                guidance_rescale=0.5),
        refusal("rescale_shape", ValueError, "sample must have more than a batch dimension",
                rand(3), rand(3), row, uncond_output=rand(3), guidance_rescale=0.5),
    ]  # fmt: skip


OPS = {
    "scheduler_step": OpSamples(
        ops.scheduler_step,
        _samples,
        _refusals,
        large=lambda: [
            _call("ddim", 2, 16, 128, 128),
            _call("dpm++_2m", 2, 16, 128, 128, row=FREE, history=1, return_x0=True),
            _call("unipc", 2, 16, 128, 128, row=FREE, history=2, second=True, return_x0=True),
            _call("guided", 2, 16, 128, 128, guided=True, guidance_scale=7.5),
            _call(
                "rescaled", 2, 16, 128, 128, guided=True, guidance_scale=7.5, guidance_rescale=0.7
            ),
        ],
    ),
}
