from math import inf, nan

import torch

from aigc_fast import ops
from tests.op_samples.sample import OpSamples, Refusal, Sample, channels_last, rand

#: x0 of DDIM, clipped, and the sample at the next timestep
DDIM = (
    "mul v1 s0; sub v0 v2; div v3 s1; clamp v4 s2 s3; "
    "mul v5 s4; mul v1 s5; add v6 v7; return v8 v5",
    [0.8, 0.6, -1.25, 1.25, 0.7, 0.3],
)
#: every instruction, every kind of second operand, values that are read late or never
EVERY = (
    "add v0 s0; sub v1 s1; mul v2 v3; div v4 s2; sub v5 v0; mul v6 s3; div v0 s4; add v7 v8; "
    "mul v9 v0; clamp v10 s5 s6; div v11 v3; add v9 v9; add v12 v4; return v14 v12 v9",
    [0.3, -9.7, 3.7, 0.123, -0.9, 0.5, 2.5],
)


def _call(name: str, *shape: int, of: tuple = DDIM, inputs: int = 2, **options) -> Sample:
    x = [rand(*shape, seed=i) for i in range(inputs)]
    return Sample(name, (x, *of), **{"differentiable": x[0].numel() < 500, **options})


def _samples() -> list[Sample]:
    nhwc = [channels_last(rand(2, 4, 5, 3, seed=i)) for i in range(2)]
    special = torch.tensor([[0.0, -0.0, 1e-30, 1e4, inf, -inf, nan]]).double()
    long = "; ".join(f"add v{i} v{i // 2}" for i in range(40))
    return [
        _call("ddim", 2, 3, 4, 5),
        _call("every", 2, 3, 4, 5, of=EVERY),
        _call("one_input", 3, 5, of=("mul v0 v0; return v1",), inputs=1),
        _call("many_inputs", 3, 5, of=("mul v11 v3; sub v12 v7; return v13",), inputs=12),
        _call("many_values", 3, 5, of=(f"{long}; return v40",), inputs=1, differentiable=False),
        Sample("channels_last", (nhwc, *EVERY)),
        Sample("mixed_orders", ([nhwc[0], rand(2, 4, 5, 3)], *EVERY)),
        Sample("packed", ([rand(3, 2, 5), rand(3, 4, 5)[:, :2]], *DDIM)),
        Sample("special", ([special, special.flip(1)], *DDIM), differentiable=False),
        Sample("special_every", ([special, special.flip(1)], *EVERY), differentiable=False),
        _call("number"),
        _call("one", 1),
        _call("empty", 0, 3),
        _call("511", 511, of=EVERY),
        _call("513", 513, of=EVERY),
        _call("4099", 4099),
        _call("long", 2, 9001, of=EVERY),
    ]


def _refusals() -> list[Refusal]:
    x = rand(2, 3)

    def refusal(name, error, match, inputs, program, scalars=(0.5, nan)) -> Refusal:
        return Refusal(name, (inputs, program, list(scalars)), error, match)

    good = "mul v0 s0; return v1"
    return [
        refusal("none", ValueError, "inputs must not be empty", [], good),
        refusal("dtype", TypeError, r"inputs\[0\] must be float64", [x.int()], good),
        refusal("shape", ValueError, r"inputs\[1\] must have shape", [x, rand(3)], good),
        refusal("instruction", ValueError, "no instruction 'pow v0 s0'", [x],
                "pow v0 s0; return v1"),
        refusal("no_instruction", ValueError, "no instruction ''", [x], "; return v1"),
        refusal("operands", ValueError, "no instruction 'mul v0'", [x], "mul v0; return v1"),
        refusal("value", ValueError, "names v1, which is not there", [x], "mul v0 v1; return v1"),
        refusal("scalar", ValueError, "names s2, which is not there", [x],
                "mul v0 s2; return v1"),
        refusal("scalar_first", ValueError, "program has 's0' in place of v0", [x],
                "mul s0 v0; return v1"),
        refusal("clamp", ValueError, "program has 'v0' in place of s0", [x],
                "clamp v0 v0 s0; return v1"),
        refusal("nan", ValueError, "scalars of clamp must not be NaN", [x],
                "clamp v0 s0 s1; return v1"),
        refusal("to", ValueError, "no dtype 'int8'", [x], "to v0 int8; return v1"),
        refusal("no_end", ValueError, "must end with what it returns", [x], "mul v0 s0"),
        refusal("no_results", ValueError, "must end with what it returns", [x],
                "mul v0 s0; return"),
        refusal("input", ValueError, "must return results of instructions", [x],
                "mul v0 s0; return v0"),
        refusal("twice", ValueError, "must return results of instructions, each once", [x],
                "mul v0 s0; return v1 v1"),
        refusal("doubles", TypeError, "must compute in float64, or in float32", [x],
                "to v0 float32; return v1"),
        refusal("halves", TypeError, "got bfloat16, float16", [x.bfloat16(), x.half()],
                "mul v0 s0; return v2"),
    ]  # fmt: skip


OPS = {
    "pointwise_program": OpSamples(
        ops.pointwise_program,
        _samples,
        _refusals,
        large=lambda: [_call("ddim", 2, 16, 128, 128)],
    ),
}
