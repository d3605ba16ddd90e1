"""Arguments of a type that an operator does not take."""

import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aigc_fast import ops
from tests.op_samples import OPS


def _packed() -> dict[str, Any]:
    weight = ops.quantize_weight(torch.randn(16, 32), 4, 32)
    return {"bits": 4, "group_size": 32, "out_features": 16, "packed": weight}


def _own_calls() -> dict[str, dict[str, Any]]:
    """Of functions that are not in the table, or have no sample there that reads every tensor."""
    image, kernel = torch.randn(1, 3, 4, 4), torch.randn(3, 3, 3, 3)
    norm, qkv, output, gate_up = (
        torch.ones(32),
        *(ops.quantize_weight(torch.randn(rows, 32), 4, 32) for rows in (48, 32, 64)),
    )
    x, one = torch.ones(2, 3), torch.ones(())
    return {
        "adam_step": {
            "params": [x.clone()],
            "grads": [x],
            "exp_avgs": [x.clone()],
            "exp_avg_sqs": [x.clone()],
            "steps": [one.clone()],
            "averages": [x.clone()],
            "norm": one,
            "skipped": one.clone(),
            "rates": torch.ones(2),
        },
        "causal_conv3d": {
            "x": image[:, :, None],
            "weight": kernel[:, :, None],
            "bias": torch.ones(3),
            "history": image[:, :, None],
        },
        "conv2d": {"x": image, "weight": kernel, "bias": torch.ones(3)},
        "conv_transpose2d": {"x": image, "weight": kernel, "bias": torch.ones(3)},
        "conv2d_resample": {"x": image, "weight": kernel, "filter": torch.ones(4), "up": 2},
        "decoder_step": {
            "hidden": torch.randn(1, 32),
            "weights": [norm, qkv, output, norm, gate_up, output, norm],
            "caches": [torch.zeros(1, 4, 1, 8)] * 2,
            "lengths": torch.zeros(1, dtype=torch.int32),
            "cos": torch.ones(4, 4),
            "sin": torch.ones(4, 4),
            "eps": 1e-6,
            "block_table": torch.zeros(1, 1, dtype=torch.int32),
            "cache_scales": torch.ones(2, 1),
            "qkv_biases": [torch.ones(48)],
            "query_key_norms": [torch.ones(8)] * 2,
            "post_norms": [norm] * 2,
            "routers": [torch.ones(1, 32)],
            "experts_per_token": 1,
        },
        "dequantize_weight": {**_packed(), "in_features": 32},
        "diffusion_loss": {
            "model_output": x,
            "sample": x,
            "noise": x,
            "alpha": torch.ones(2),
            "sigma": torch.ones(2),
            "weights": torch.ones(2),
            "prediction_type": "v_prediction",
        },
        "gelu": {"x": x},
        "grouped_linear": {
            "x": torch.ones(5, 4),
            "weight": torch.ones(2, 3, 4),
            "ends": torch.tensor([2, 5], dtype=torch.int32),
        },
        "linear": {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)},
        "merge_attention": {
            "outs": [torch.ones(1, 1, 2, 4)] * 2,
            "lses": [torch.ones(1, 1, 2)] * 2,
        },
        "modulated_conv2d": {
            "x": image,
            "weight": kernel,
            "style": torch.ones(1, 3),
            "noise": torch.ones(1, 1, 8, 8),
            "strength": torch.ones(()),
            "bias": torch.ones(3),
            "filter": torch.ones(4),
            "up": 2,
        },
        "pack_weight": {
            "codes": torch.zeros(16, 8, dtype=torch.uint8),
            "scales": torch.ones(16, 1),
            "minimums": torch.zeros(16, 1),
            "bits": 4,
        },
        "quantize_weight": {"weight": torch.randn(16, 32), "bits": 4},
        "scaled_dot_product_attention": {
            "query": image,
            "key": image,
            "value": image,
            "attn_mask": torch.ones(image.shape[2], image.shape[2]),
        },
        "scheduler_step": {"sample": x, "model_output": x, "coefficients": torch.ones(7)},
        "upsample_conv2d": {"x": image, "weight": kernel, "bias": torch.ones(3)},
        "vector_quantize": {"x": torch.randn(3, 2), "codebook": torch.randn(4, 2)},
    }


def _calls() -> dict[tuple[str, str], dict[str, Any]]:
    """(function, one of its tensors): the arguments of a call that has it."""
    calls: dict[tuple[str, str], dict[str, Any]] = {}
    sampled = {
        op.function.__name__: op for op in OPS.values() if hasattr(ops, op.function.__name__)
    }
    given = [
        (name, inspect.signature(op.function).bind(*sample.args, **sample.kwargs).arguments)
        for name, op in sampled.items()
        for sample in op.samples()
    ]
    for name, arguments in [*_own_calls().items(), *given]:
        for key, value in arguments.items():
            if _tensors(value):
                calls.setdefault((name, key), arguments)
    return calls


def _tensors(value: Any) -> bool:
    """Whether it is a tensor or some."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(isinstance(member, Tensor) for member in value)
    return isinstance(value, Tensor)


CALLS = _calls()


def test_no_tensor_of_any_function_is_left_out() -> None:
    declared = {
        (name, parameter.name)
        for name in ops.__all__
        for parameter in inspect.signature(getattr(ops, name)).parameters.values()
        if "Tensor" in str(parameter.annotation)
    }
    assert declared == set(CALLS)


@pytest.mark.parametrize("name", sorted({name for name, _ in CALLS}))
def test_the_calls_are_right_otherwise(name) -> None:
    for arguments in [arguments for (other, _), arguments in CALLS.items() if other == name]:
        with torch.no_grad():
            getattr(ops, name)(**arguments)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("name", "argument"), CALLS)
def test_what_is_no_tensor_is_named(name, argument, grad) -> None:
    function, call = getattr(ops, name), CALLS[name, argument]
    annotation = inspect.signature(function).parameters[argument].annotation
    wrong: list[Any] = [object()]
    if annotation in (Tensor, Tensor | None):
        wrong += [[1.0, 2.0], np.ones(2), 0.5, "x"] + [None] * (annotation is Tensor)
    elif isinstance(call[argument], list | tuple):
        wrong += [0.5, [[1.0], *call[argument][1:]], [*call[argument][:-1], 0.5]]
    for value in wrong:
        named = pytest.raises(TypeError, match=rf"^{argument}(\[\d+\])? must be .*, got \w+$")
        with named, torch.set_grad_enabled(grad):
            function(**call | {argument: value})


def test_words() -> None:
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"^query must be a torch\.Tensor, got list$"):
        ops.decode_attention([1.0], x, x, x)
    with pytest.raises(TypeError, match=r"^bias must be a torch\.Tensor or None, got float$"):
        ops.bias_act(x, 0.5)
    with pytest.raises(TypeError, match=r"^up must be an int or a sequence of int, got float$"):
        ops.upfirdn2d(x, torch.ones(2), up=2.0)
    with pytest.raises(TypeError, match=r"^up\[1\] must be an int, got float$"):
        ops.upfirdn2d(x, torch.ones(2), up=(2, 2.0))
    with pytest.raises(TypeError, match=r"^stride must have 2 members, got 3$"):
        ops.conv2d(x, x, stride=(1, 2, 3))
    for grad in (True, False):  # under no_grad it was the norm of the weights
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(TypeError, match=r"^grads must be gradients, \[p\.grad for p in"),
        ):
            ops.gradient_norm(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match=r"^num_groups must be an int, got str$"):
        ops.group_norm_act(x, "2")
    with pytest.raises(
        TypeError, match=r"^temperature must be a float or a torch.Tensor, got str$"
    ):
        ops.sample_tokens(x[0, 0], temperature="hot")


@pytest.mark.parametrize(
    ("known", "synonym"), [("linear", "none"), ("lrelu", "leaky_relu"), ("swish", "silu")]
)
def test_synonyms_of_activations(known, synonym) -> None:
    x, style, options = torch.randn(2, 3, 4, 4), torch.randn(2, 3), {}
    if known == "lrelu":
        options = {"alpha": 0.3}
    calls = [
        lambda act: ops.bias_act(x, None, 1, act, **options),
        lambda act: ops.scale_bias_act(x, style, act=act, **options),
        lambda act: ops.upfirdn2d(x, torch.ones(2), act=act, **options),
        lambda act: ops.modulated_conv2d(x, x[:, :, :3, :3], style, act=act, **options),
        lambda act: ops.batch_norm_act(x, training=True, act=act, **options),
        lambda act: ops.instance_norm_act(x, act=act, **options),
        lambda act: ops.adaptive_instance_norm(x, style, style, act=act, **options),
        lambda act: ops.pixel_norm_act(x, act=act, **options),
    ]
    for call in calls:
        assert call(synonym).equal(call(known))
    if known != "lrelu":
        group_norms = [ops.group_norm_act(x, 3, act=name) for name in (known, synonym)]
        assert group_norms[0].equal(group_norms[1])


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("adam_step", "betas", (0.9,)),
        ("add_noise", "rates", [torch.ones(3)]),
        ("dequantize_weight", "dtype", torch.int8),
        ("filtered_lrelu", "up", [2]),
        ("quantize_weight", "group_size", 0),
        ("quantize_weight", "group_size", -1),
        ("sample_tokens", "seeds", 2.5),
        ("sample_tokens", "steps", None),
        ("sample_tokens", "steps", 2.5),
        ("sample_tokens", "top_k", 2.5),
        ("timestep_embedding", "max_period", 0.0),
        ("timestep_embedding", "max_period", float("nan")),
        ("upfirdn2d", "down", (1, 1, 1)),
    ],
)
def test_refuses_the_value(name, argument, value) -> None:
    call = next(arguments for (other, _), arguments in CALLS.items() if other == name)
    if name == "add_noise":
        call = call | {"return_velocity": True}
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must "):
        getattr(ops, name)(**call | {argument: value})


@pytest.mark.parametrize(
    "name", ["bias_act", "filtered_lrelu", "modulated_conv2d", "scale_bias_act", "upfirdn2d"]
)
def test_a_clamp_is_a_limit(name) -> None:
    call, function = CALLS[name, "bias"], getattr(ops, name)
    for clamp in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"^clamp must be at least 0 or None, got {clamp}$"):
            function(**call | {"clamp": clamp})
    assert not function(**call | {"clamp": 0}).any()


def test_the_style_of_an_adaptive_norm_is_named() -> None:
    x, style = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"^scale must have shape \(2, 3\)"):
        ops.adaptive_instance_norm(x, style[:1], style)
    with pytest.raises(TypeError, match=r"^shift must be float64"):
        ops.adaptive_instance_norm(x, style, style.int())


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'weight'"):
        ops.rms_norm(torch.ones(2, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(3), epsilon=1e-5)


@pytest.mark.parametrize("name", ops.__all__)
def test_functions_are_what_they_seem(name) -> None:
    function = getattr(ops, name)
    assert function.__doc__ and function.__name__ == name
    assert pickle.loads(pickle.dumps(function)) is function
    assert function.__defaults__ is function.__wrapped__.__defaults__
