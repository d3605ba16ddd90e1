"""What the functions of aigc_fast.ops have in common where users call them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from aigc_fast.ops import _registry
from aigc_fast.ops._arguments import check_types

TORCH = "torch"
#: What a function consists of, where that is not the operator of its name: operators, and what
#: torch itself computes.
_MADE_OF: dict[str, tuple[str, ...]] = {
    "adaptive_instance_norm": ("norm_act",),
    "batch_norm_act": ("norm_act",),
    "causal_conv3d": ("conv3x3", "conv4x4", "conv3x3_backward_input", TORCH),
    "conv2d": ("conv3x3", "conv4x4", "linear_product", TORCH),
    "conv_transpose2d": ("conv_transpose4x4", "conv3x3_backward_input", TORCH),
    "conv2d_resample": ("upfirdn2d", "conv3x3", TORCH),
    "dequantize_weight": (TORCH,),
    "discriminator_loss": ("gan_loss",),
    "gelu": ("gelu_tanh", TORCH),
    "generator_loss": ("gan_loss",),
    "grouped_linear": ("grouped_linear", TORCH),
    "instance_norm_act": ("norm_act",),
    "layer_norm": ("modulated_norm",),
    "linear": ("linear_product", TORCH),
    "linear_cross_entropy": ("cross_entropy", TORCH),
    "merge_attention": (TORCH,),
    "modulated_conv2d": ("scale_bias_act", "bias_act", "upfirdn2d", "conv3x3", TORCH),
    "modulated_layer_norm": ("modulated_norm",),
    "modulated_rms_norm": ("modulated_norm",),
    "pack_weight": (TORCH,),
    "pixel_norm_act": ("norm_act",),
    "pointwise_program": ("pointwise_program", TORCH),
    "quantize_weight": (TORCH,),
    "scale_bias_act": ("scale_bias_act", "bias_act"),
    "scaled_dot_product_attention": ("dense_attention", TORCH),
    "upsample_conv2d": (TORCH,),
}
#: what `publish` has made, by name
PUBLIC: dict[str, Callable[..., Any]] = {}

# A function that hands its arguments on by name costs 30 ns; one of *args and **kwargs 250.
_TEMPLATE = """\
def {name}({parameters}):
    try:{forced}
        return _function({arguments})
    except Exception:
        _check_types(_function, dict({named}))
        raise
"""
_FORCED = """
        if _registry._intercept is not None:
            _registry.check_torch("{name}", ({values},))"""


def made_of(name: str) -> tuple[str, ...]:
    """The operators that a public function runs, and "torch" where torch computes too."""
    return _MADE_OF.get(name, (name,))


def publish(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as users call it: where it fails, arguments of a wrong type are named; what
    torch computes obeys `backend`."""
    name, signature = function.__name__, inspect.signature(function).parameters
    parameters, arguments = [], []
    for key, parameter in signature.items():
        only = parameter.kind is parameter.KEYWORD_ONLY
        if only and "*" not in parameters:
            parameters.append("*")
        parameters.append(key if parameter.default is parameter.empty else f"{key}=None")
        arguments.append(f"{key}={key}" if only else key)
    forced = _FORCED.format(name=name, values=", ".join(signature))
    source = _TEMPLATE.format(
        name=name,
        parameters=", ".join(parameters),
        arguments=", ".join(arguments),
        forced=forced if TORCH in made_of(name) else "",
        named=", ".join(f"{key}={key}" for key in signature),
    )
    scope: dict[str, Any] = {
        "_function": function, "_check_types": check_types, "_registry": _registry
    }  # fmt: skip
    exec(compile(source, f"<aigc_fast.ops.{name}>", "exec"), scope)
    public: Any = functools.wraps(function)(scope[name])
    public.__defaults__, public.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    public.__module__ = "aigc_fast.ops"  # where it is found, by pickle too
    PUBLIC[name] = public
    return public
