"""Every public operator on a small input against its reference, on whatever runs it here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

import aigc_fast
from aigc_fast import ops

Result: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass
class Inputs:
    """Makes the inputs of a call: the same values each time, as float32 holds them."""

    dtype: torch.dtype
    device: torch.device
    #: what has been made with a gradient wanted
    leaves: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal, differentiable."""
        self.leaves.append(self.constant(*shape).requires_grad_())
        return self.leaves[-1]

    def constant(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.random).to(self.device, self.dtype)

    def int32(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _adam_step(x: Inputs) -> Result:
    params, moments, averages = ([x.constant(7, 9), x.constant(33)] for _ in range(3))
    squares = [m.square() for m in moments]
    steps = [torch.ones((), device=x.device) for _ in params]
    grads = [p.sin() for p in params]
    ops.adam_step(params, grads, moments, squares, steps, averages, weight_decay=0.1, ema_decay=0.9)
    return *params, *moments, *squares, *averages


def _append_kv(x: Inputs) -> Result:
    caches = x.constant(2, 33, 3, 40), x.constant(2, 33, 3, 40)
    ops.append_kv(x.constant(2, 5, 3, 40), x.constant(2, 5, 3, 40), *caches, x.int32(0, 28))
    return caches


def _apply_rotary(x: Inputs) -> Result:
    angles = x.constant(7, 20)
    return ops.apply_rotary(x(2, 7, 3, 40), angles.cos(), angles.sin())


def _qk_norm_rotary(x: Inputs) -> Result:
    angles = x.constant(7, 20)
    return ops.qk_norm_rotary(x(2, 7, 3, 40), x(40), x(40), angles.cos(), angles.sin(), 2)


def _decode_attention(x: Inputs) -> Result:
    cache = (3, 65, 2, 40)
    lengths = x.int32(65, 0, 17)
    return ops.decode_attention(
        x.constant(3, 2, 6, 40), x.constant(*cache), x.constant(*cache), lengths
    )


def _decoder_step(x: Inputs) -> Result:
    def packed(rows: int, columns: int) -> Tensor:
        return ops.quantize_weight(x.constant(rows, columns) / columns**0.5, 4, 32)

    weights = [
        x.constant(64) + 2, packed(128, 64), packed(64, 64), x.constant(64) + 2, packed(192, 64),
        packed(64, 96), x.constant(64) + 2,
    ]  # fmt: skip
    caches = [x.constant(2, 9, 1, 32) for _ in range(2)]
    angles = x.constant(9, 16).float()
    return ops.decoder_step(
        x.constant(2, 64), weights, caches, x.int32(8, 3), angles.cos(), angles.sin(), eps=1e-6
    )


def _quantized_linear(x: Inputs) -> Result:
    weight = ops.quantize_weight(x.constant(33, 96), 4, 32, symmetric=False)
    return ops.quantized_linear(x.constant(5, 96), weight, bits=4, group_size=32, out_features=33)


def _scheduler_step(x: Inputs) -> Result:
    row = torch.tensor([1.5, -0.5, 1.0, 0.8, 0.1, 0.6, 0.2, -0.3]).to(x.device, x.dtype)
    shape = (3, 4, 7, 5)
    return ops.scheduler_step(
        x(*shape), x(*shape), row, noise=x(*shape), history=[x(*shape)], uncond_output=x(*shape),
        guidance_scale=3.0,
    )  # fmt: skip


def _spectral_norm(x: Inputs) -> Result:
    weights = [x(5, 3, 3), x(4, 2)]
    matrices = [weight.detach().flatten(1) for weight in weights]
    v = [F.normalize(matrix.sum(0), dim=0) for matrix in matrices]
    u = [F.normalize(matrix @ b, dim=0) for matrix, b in zip(matrices, v, strict=True)]
    return tuple(ops.spectral_norm(weights, u, v, iterations=0)[0])


#: What aigc_fast.ops has without a kernel of its own.
PLAIN = {
    "conv2d_resample", "dequantize_weight", "merge_attention", "modulated_conv2d", "pack_weight",
    "causal_conv3d", "conv2d", "conv_transpose2d", "quantize_weight", "upsample_conv2d",
    "scaled_dot_product_attention",
}  # fmt: skip
#: A call of each public operator of aigc_fast.ops.
CALLS: dict[str, Callable[[Inputs], Result]] = {
    "adam_step": _adam_step,
    "adaptive_instance_norm": lambda x: ops.adaptive_instance_norm(
        x(2, 6, 5, 7), x(2, 6), x(2, 6), act="lrelu"
    ),
    "add_noise": lambda x: ops.add_noise(x(3, 4, 7, 5), x(3, 4, 7, 5), x(3), x(3)),
    "add_rms_norm": lambda x: ops.add_rms_norm(x(5, 127), x(5, 127), x(127), 1e-6),
    "alias_free_snake": lambda x: ops.alias_free_snake(x(2, 3, 37), x(3) + 3, x(3) + 3),
    "append_kv": _append_kv,
    "apply_rotary": _apply_rotary,
    "batch_norm_act": lambda x: ops.batch_norm_act(
        x(5, 7, 9), weight=x(7), bias=x(7), training=True, act="lrelu"
    ),
    "bias_act": lambda x: ops.bias_act(x(3, 17, 31), x(17), 1, "lrelu", clamp=1.0),
    "channel_moments": lambda x: ops.channel_moments(x(2, 6, 5, 7)),
    "codebook_moments": lambda x: ops.codebook_moments(
        x.constant(6, 33), x.int32(3, 0, 1, 3, 3, 1).long(), 5
    )[1],
    "conv1d": lambda x: ops.conv1d(
        x.constant(2, 35, 61),
        x.constant(24, 35, 5),
        x.constant(24),
        padding=4,
        dilation=2,
        slope=0.1,
    ),
    "conv_transpose1d": lambda x: ops.conv_transpose1d(
        x.constant(2, 35, 21), x.constant(35, 24, 8), x.constant(24), stride=4, padding=2, slope=0.1
    ),
    "conv3x3": lambda x: ops.conv3x3(
        x.constant(2, 35, 5, 19), x.constant(24, 35, 3, 3), x.constant(24), x.constant(24)
    ),
    "cross_entropy": lambda x: ops.cross_entropy(
        x(5, 127), x.int32(3, 0, 126, -100, 50).long(), label_smoothing=0.1
    ),
    "decode_attention": _decode_attention,
    "decoder_step": _decoder_step,
    "filtered_lrelu": lambda x: ops.filtered_lrelu(
        x(2, 3, 7, 9), x.constant(6), x.constant(6), x(3), 2, 2, 5, clamp=1.0
    ),
    "diffusion_loss": lambda x: ops.diffusion_loss(
        x(3, 4, 7, 5),
        *(x.constant(3, 4, 7, 5) for _ in range(2)),
        *(x.constant(3) for _ in range(2)),
        prediction_type="v_prediction",
    ),
    "discriminator_loss": lambda x: ops.discriminator_loss(x(5, 7), x(5, 7), "relativistic"),
    "gated_residual": lambda x: ops.gated_residual(x(2, 5, 127), x(2, 5, 127), x(2, 127)),
    "gated_residual_norm": lambda x: ops.gated_residual_norm(
        x(2, 5, 127), x(2, 5, 127), x(2, 127), x(2, 127), x(2, 127)
    ),
    "geglu": lambda x: ops.geglu(x(5, 127), x(5, 127)),
    "gelu": lambda x: ops.gelu(x(5, 127), "tanh"),
    "generator_loss": lambda x: ops.generator_loss(x(5, 7)),
    "gradient_norm": lambda x: ops.gradient_norm([x.constant(5, 127), x.constant(3)]),
    "group_norm_act": lambda x: ops.group_norm_act(x(2, 6, 5, 7), 3, x(6), x(6), act="silu"),
    "grouped_linear": lambda x: ops.grouped_linear(x(9, 40), x(3, 33, 40), x.int32(2, 2, 9)),
    "instance_norm_act": lambda x: ops.instance_norm_act(x(2, 6, 5, 7), x(6), x(6), act="lrelu"),
    "layer_norm": lambda x: ops.layer_norm(x(5, 127), x(127), x(127)),
    "linear": lambda x: ops.linear(x(64, 160), x(161, 160), x(161)),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x(3, 17), x(31, 17), x.int32(3, 0, 30).long()
    ),
    "modulated_layer_norm": lambda x: ops.modulated_layer_norm(x(2, 5, 127), x(2, 127), x(2, 127)),
    "modulated_rms_norm": lambda x: ops.modulated_rms_norm(x(2, 5, 127), x(2, 127), x(2, 127)),
    "pixel_norm_act": lambda x: ops.pixel_norm_act(x(2, 6, 5, 7), act="lrelu"),
    "pointwise_program": lambda x: ops.pointwise_program(
        [x.constant(5, 127), x.constant(5, 127)],
        "mul v1 s0; sub v0 v2; clamp v3 s1 s2; return v4",
        [0.8, -1.0, 1.0],
    )[0],
    "qk_norm_rotary": _qk_norm_rotary,
    "quantized_linear": _quantized_linear,
    "reconstruction_loss": lambda x: ops.reconstruction_loss(
        x(5, 3, 7, 9), x.constant(5, 3, 7, 9).sigmoid()
    ),
    "rms_norm": lambda x: ops.rms_norm(x(5, 127), x(127), 1e-6),
    "sample_gaussian": lambda x: ops.sample_gaussian(x(3, 8, 7, 5), x(3, 4, 7, 5)),
    "sample_tokens": lambda x: ops.sample_tokens(
        x.constant(5, 127), top_k=50, top_p=0.9, temperature=0.8, seeds=1
    ),
    "scale_bias_act": lambda x: ops.scale_bias_act(
        x(2, 3, 7, 9), x(2, 3), x.constant(2, 1, 7, 9), x(1), x(3), "lrelu", clamp=1.0
    ),
    "scheduler_step": _scheduler_step,
    "snake": lambda x: ops.snake(x(2, 6, 17), x(6) + 3, x(6) + 3),
    "spectral_norm": _spectral_norm,
    "swiglu": lambda x: ops.swiglu(x(5, 127), x(5, 127)),
    "timestep_embedding": lambda x: ops.timestep_embedding(x(5), 31, max_period=100.0),
    "upfirdn2d": lambda x: ops.upfirdn2d(x(2, 3, 7, 9), x.constant(4, 4), up=2, padding=2),
    "vector_quantize": lambda x: ops.vector_quantize(x(3, 17, 5), x(9, 17), dim=1)[2],
}


@dataclass
class Check:
    """error: largest difference from the reference in float64; allowed: see `check`."""

    op: str
    device: str
    implementation: str
    error: float
    allowed: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        # Written so that a NaN fails.
        return not self.problem and self.error <= self.allowed


def check_all() -> Iterator[Check]:
    """Checks every public operator, on the CPU and on the GPU if there is one."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for name in sorted(set(ops.__all__) - PLAIN):
        for device in devices:
            yield check(name, torch.device(device))


def check(name: str, device: torch.device) -> Check:
    """Results and gradients in float32. The rule: against the reference in float64 the chosen
    implementation is at most twice as wrong as the reference in float32, plus one unit in the
    last place of the largest value."""
    if name not in CALLS:
        return Check(name, device.type, "", 0, 0, "self_check.py has no call of it")
    call = CALLS[name]
    chosen = ""
    try:
        chosen = aigc_fast.explain(call, Inputs(torch.float32, device)).implementation
        ours = _results(call, torch.float32, device)
        with aigc_fast.backend("reference"):
            plain = _results(call, torch.float32, device)
            exact = _results(call, torch.float64, device)
    except Exception as error:  # a doctor reports what others die of
        return Check(name, device.type, chosen, 0, 0, f"{type(error).__name__}: {error}")
    # The one closest to its limit.
    return max(
        (
            Check(name, device.type, chosen, _worst(o, e), 2 * _worst(p, e) + _ulp(e))
            for o, p, e in zip(ours, plain, exact, strict=True)
        ),
        key=lambda found: found.error / found.allowed,
    )


def _results(
    call: Callable[[Inputs], Result], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Outputs and, where there is a derivative, the gradients of a random sum of them."""
    inputs = Inputs(dtype, device)
    found = call(inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if not inputs.leaves:
        return outputs
    upstream = [inputs.constant(*output.shape) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs.leaves, upstream)
    return [*(output.detach() for output in outputs), *gradients]


def _worst(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def _ulp(exact: Tensor) -> float:
    largest = exact.abs().max()
    return (torch.finfo(torch.float32).eps * 2.0 ** largest.log2().floor()).item()
