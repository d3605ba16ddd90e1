"""aigc_fast.patch on diffusers' models, beside the same models unpatched."""

import copy
import pickle

import pytest
import torch
from torch import nn

import aigc_fast
from aigc_fast.integrations._patching import Replacement
from aigc_fast.ops._winograd import CONV3X3, _most_pixels
from aigc_fast.ops.linear import mkl_lags
from tests.ops.test_every_op import assert_as_good_as_torch, recorded

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
)

from tests.integrations.coming_back import everything_comes_back, snapshot
from tests.integrations.diffusers_zoo import CASES, exact, gradients, inputs_of, make, outputs

EVERY_MODEL = pytest.mark.parametrize("name", CASES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def assert_error_ratio(ours, stock, want, dtype) -> None:
    """The rule of this library for the output, and for the gradient as the one vector that it is:
    at most twice as wrong as stock. Each parameter's part is in units of its largest value, or of a
    thousandth of the largest of all where it ought to be zero (biases of keys). Not parameter by
    parameter: of a hundred small tensors some are lucky on either side."""
    assert_as_good_as_torch(ours[:1], stock[:1], want[:1], dtype)
    if len(want) > 1:
        largest = torch.stack([g.abs().max() for g in want[1:]])
        units = largest.clamp(min=1e-3 * largest.max())

        def error(gradients):
            parts = zip(gradients[1:], want[1:], units, strict=True)
            return sum(((g.double() - e) / unit).square().sum() for g, e, unit in parts).sqrt()

        assert all(o.dtype == s.dtype for o, s in zip(ours, stock, strict=True))
        assert error(ours) <= 2 * error(stock)


OTHER_BLOCKS = ["qwen-image", "flux2"]
CONVOLUTIONAL = ["unet", "unet, modulated", "unet with text", "autoencoder"]


@EVERY_DTYPE
@EVERY_MODEL
def test_outputs_and_gradients_are_as_good_as_stock(name, dtype) -> None:
    model, inputs = make(name, dtype), inputs_of(name, dtype)
    want = exact(gradients, model, inputs)
    stock = gradients(model, inputs)
    aigc_fast.patch(model)
    with recorded() as calls:
        ours = gradients(model, inputs)
    assert_error_ratio(ours, stock, want, dtype)
    names = {op.name.removesuffix("_full").removesuffix("_") for op, _ in calls}
    names = {n for n in names if "backward" not in n}
    by_machine = {"conv3x3", "to_planes", "dense_attention", "linear_product"}
    assert names - by_machine == CASES[name].operators
    assert ("conv3x3" in names) == (name in CONVOLUTIONAL and _most_pixels(CONV3X3, dtype) > 0)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_last(name) -> None:
    model, inputs = make(name).to(memory_format=torch.channels_last), inputs_of(name)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model)
    ours = gradients(model, inputs)
    assert_error_ratio(ours, stock, want, torch.float32)
    assert ours[0].stride() == stock[0].stride()


def test_a_seed_drops_the_same() -> None:
    """Dropout draws in memory order, which stays that of the stock model."""
    model, inputs = make("unet").train(), inputs_of("unet")
    inputs["sample"] = torch.randn(2, 3, 64, 64)  # enough pixels for our convolutions
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3

    def seeded(model, inputs):
        torch.manual_seed(1)
        return outputs(model, inputs)

    want, stock = exact(seeded, model, inputs), seeded(model, inputs)
    aigc_fast.patch(model)
    assert_as_good_as_torch(seeded(model, inputs), stock, want, torch.float32)


@EVERY_MODEL
def test_everything_comes_back(name) -> None:
    model = make(name)
    has_linear = nn.Linear in map(type, model.modules())
    with everything_comes_back(model) as report:
        assert report.model == CASES[name].cls
        if has_linear:
            assert ("Linear" in report.replaced) == mkl_lags() != ("Linear" in report.kept)


@EVERY_MODEL
def test_copies_are_patched_and_can_be_unpatched(name) -> None:
    model, inputs = make(name), inputs_of(name)
    stock = outputs(model, inputs)
    aigc_fast.patch(model)
    want = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, inputs)[0], want[0])
        aigc_fast.unpatch(twin)
        assert torch.equal(outputs(twin, inputs)[0], stock[0])
    assert torch.equal(outputs(model, inputs)[0], want[0])


@pytest.mark.parametrize("name", ["unet", "dit", "sd3", "flux", "wan"])
def test_no_new_graph_breaks(name) -> None:
    model, inputs = make(name), inputs_of(name)

    def breaks():
        torch._dynamo.reset()
        found = torch._dynamo.explain(lambda: outputs(model, inputs)[0])()
        return found.graph_break_count, found.graph_count

    before = breaks()
    aigc_fast.patch(model)
    assert breaks() == before
    torch._dynamo.reset()


class LoRALinear(nn.Linear):
    """A subclass put in the place of a Linear, as adapters of some libraries are."""

    def __init__(self, base) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapters", "patch"])
@pytest.mark.parametrize("name", ["unet with text", "sd3", "flux", "wan", *OTHER_BLOCKS])
def test_adapters(name, first) -> None:
    model, inputs = make(name), inputs_of(name)
    if first == "patch":
        aigc_fast.patch(model)
    for module in list(model.modules()):
        if hasattr(module, "to_q"):
            module.to_q = LoRALinear(module.to_q)
    if first == "adapters":
        aigc_fast.patch(model)
    ours = gradients(model, inputs)
    aigc_fast.unpatch(model)
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    assert_error_ratio(ours, stock, want, torch.float32)


@EVERY_MODEL
def test_autocast(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want = exact(outputs, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs(model, inputs)
        aigc_fast.patch(model)
        ours = outputs(model, inputs)
    assert_error_ratio(ours, stock, want, torch.bfloat16)


def test_gradient_checkpointing_and_hooks() -> None:
    model, inputs = make("unet"), inputs_of("unet")
    seen = []
    model.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *a: seen.append(a[0]))
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model)
    model.enable_gradient_checkpointing()
    model.train()
    seen.clear()
    assert_error_ratio(gradients(model, inputs), stock, want, torch.float32)
    assert len(seen) == 2  # forward, and again for backward


def test_the_convolution_of_an_upsampling_keeps_its_hooks() -> None:
    model, inputs = make("unet"), inputs_of("unet")
    upsampler = model.up_blocks[0].upsamplers[0]
    assert aigc_fast.patch(model).replaced["Upsample2D"] == (1, "upsample_conv2d")
    assert isinstance(upsampler, Replacement)
    want, seen = outputs(model, inputs), []
    upsampler.conv.register_forward_hook(lambda *a: seen.append(a[0]))
    torch.testing.assert_close(outputs(model, inputs), want)
    assert seen == [upsampler.conv]


def test_a_hook_sees_the_product_before_gelu() -> None:
    model, inputs = make("dit"), inputs_of("dit")
    seen = []
    proj = model.transformer_blocks[0].ff.net[0].proj
    hook = proj.register_forward_hook(lambda *a: seen.append(a[2]))
    want = outputs(model, inputs)
    aigc_fast.patch(model)
    with recorded() as calls:
        torch.testing.assert_close(outputs(model, inputs), want)
    assert {"gelu_tanh", "gelu_tanh_"} <= {op.name for op, _ in calls}
    torch.testing.assert_close(seen[1], seen[0])
    hook.remove()
    with recorded() as calls:
        outputs(model, inputs)
    assert "gelu_tanh" not in {op.name for op, _ in calls}


def test_a_module_keeps_the_work_of_one_with_hooks() -> None:
    model, inputs = make("unet"), inputs_of("unet")
    block, seen = model.down_blocks[0].resnets[0], []
    for part in (block.norm1, model.conv_norm_out):
        part.register_forward_hook(lambda module, args, out: seen.append(out))
    outputs(model, inputs)
    stock, seen[:] = list(seen), []
    report = aigc_fast.patch(model)
    assert report.kept["ResnetBlock2D"] == (1, "its norm1 has hooks or a forward of its own")
    assert report.kept["UNet2DModel"] == (1, "its conv_norm_out has hooks or a forward of its own")
    outputs(model, inputs)
    assert len(seen) == 2
    torch.testing.assert_close(seen, stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_weights_that_accelerate_brings_when_they_are_needed(name) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make(name), inputs_of(name)
    want = outputs(model, inputs)
    accelerate.cpu_offload(model, torch.device("cpu"))
    aigc_fast.patch(model)
    torch.testing.assert_close(outputs(model, inputs), want, rtol=1e-3, atol=1e-4)


def test_a_pipeline() -> None:
    from diffusers import DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline(make("unet"), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def sample():
        generator = torch.Generator().manual_seed(0)
        return pipe(1, generator, num_inference_steps=3, output_type="np").images

    before, stock = snapshot(pipe.unet), sample()
    report = aigc_fast.patch(pipe)
    assert report.model == "DDPMPipeline" and report.replaced["ResnetBlock2D"][0] == 8
    torch.testing.assert_close(torch.tensor(sample()), torch.tensor(stock), atol=1e-4, rtol=0)
    assert aigc_fast.patch(pipe.unet).replaced == report.replaced
    aigc_fast.unpatch(pipe)
    assert snapshot(pipe.unet) == before


def test_what_does_not_fit_is_kept_and_reported() -> None:
    model = make("unet with text")
    resnet = model.down_blocks[0].resnets[0]
    resnet.nonlinearity = nn.Mish()
    model.mid_block.resnets[0].norm1 = nn.Identity()
    model.conv_act.forward = lambda x: x
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.set_processor(AttnProcessor())
    report = aigc_fast.patch(model)
    kept = {(name, why) for name, (_, why) in report.kept.items()}
    assert ("UNet2DConditionModel", "its conv_act has hooks or a forward of its own") in kept
    assert ("BasicTransformerBlock", "its norm_type is layer_norm") in kept
    reason = "its processor is AttnProcessor" if mkl_lags() else "torch's own attention is as fast"
    assert any(n == "Attention" and why.startswith(reason) for n, why in kept)
    assert report.kept["ResnetBlock2D"][1] == "its activation is Mish; its norm is Identity"
    assert not isinstance(model.conv_norm_out, Replacement)
    aigc_fast.unpatch(model)
    assert not any(isinstance(m, Replacement) for m in model.modules())


@pytest.mark.skipif(not mkl_lags(), reason="torch's own attention is as fast")
@pytest.mark.parametrize(
    "name", ["unet", "unet with text", "autoencoder", "dit", "sd3", "flux", "wan", *OTHER_BLOCKS]
)
def test_attention_without_gradients_is_ours(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want, stock = exact(outputs, model, inputs), outputs(model, inputs)
    aigc_fast.patch(model)

    def runs_ours() -> bool:
        with recorded() as calls:
            assert_as_good_as_torch(outputs(model, inputs), stock, want, torch.float32)
        return "dense_attention" in {op.name for op, _ in calls}

    assert runs_ours()
    if name in ("flux", "wan", *OTHER_BLOCKS):
        with attention_backend("_native_math"):
            assert not runs_ours()
        return
    for module in model.modules():
        if hasattr(module, "processor"):  # another one, chosen later
            module.set_processor(JointAttnProcessor() if name == "sd3" else AttnProcessor())
    assert runs_ours() == (name == "sd3")


class JointAttnProcessor(JointAttnProcessor2_0):
    """One of somebody's own."""


def test_attention_by_other_processors() -> None:
    """Those that call torch's attention go on, and it is ours."""
    model = make("unet with text")
    attention = [m for m in model.modules() if isinstance(m, Attention)]
    for module in attention:
        module.set_processor(FusedAttnProcessor2_0())
        module.fuse_projections()
    attention[0].set_processor(AttnProcessor())
    report = aigc_fast.patch(model)
    count = len(attention) - 1
    if mkl_lags():
        assert report.replaced["Attention"] == (count, "scaled_dot_product_attention")
        assert report.kept["Attention"] == (1, "its processor is AttnProcessor")
    else:
        why = "torch's own attention is as fast on this machine"
        assert report.kept["Attention"] == (count + 1, why)


@pytest.mark.skipif(not mkl_lags(), reason="torch's own attention is as fast")
def test_attention_of_another_backend_is_kept() -> None:
    model = make("qwen-image")
    attention = [m for m in model.modules() if isinstance(m, Attention)]
    for module in attention:  # the model's method would set that of all models besides
        module.processor._attention_backend = "flex"
    why = "its attention is that of flex"
    assert aigc_fast.patch(model).kept["Attention"] == (len(attention), why)


def test_a_decoder_that_draws_noise_draws_the_same() -> None:
    torch.manual_seed(0)
    halves = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    model = diffusers.ConsistencyDecoderVAE(
        encoder_down_block_types=["DownEncoderBlock2D"] * 2,
        decoder_down_block_types=["ResnetDownsampleBlock2D"] * 2,
        decoder_up_block_types=["ResnetUpsampleBlock2D"] * 2,
        **{
            f"{half}_{key}": value
            for half in ("encoder", "decoder")
            for key, value in halves.items()
        },
    ).eval()
    latents = torch.randn(1, 4, 4, 4)

    def decoded(seed: int) -> torch.Tensor:
        return model.decode(latents, torch.Generator().manual_seed(seed)).sample

    with torch.no_grad():
        stock = decoded(1)
        aigc_fast.patch(model)
        torch.testing.assert_close(decoded(1), stock)
        assert not torch.allclose(decoded(2), stock, atol=0.1)


def test_another_processor_chosen_later() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Mine(FluxAttnProcessor):
        calls = 0

        def __call__(self, *args, **kwargs):
            Mine.calls += 1
            return super().__call__(*args, **kwargs)

    model, inputs = make("flux"), inputs_of("flux")
    aigc_fast.patch(model)
    want = outputs(model, inputs)
    model.set_attn_processor(Mine())
    torch.testing.assert_close(outputs(model, inputs), want)
    assert Mine.calls == 2


def test_a_cache_of_blocks_knows_those_of_a_patched_model() -> None:
    """diffusers finds what a block returns by its class."""
    config = diffusers.FirstBlockCacheConfig(threshold=1e3)
    results = []
    for patched in (False, True):
        model, inputs = make("flux"), inputs_of("flux")
        if patched:
            assert "FluxTransformerBlock" in aigc_fast.patch(model).replaced
        model.enable_cache(config)
        with torch.no_grad(), model.cache_context("test"):
            results.append([model(**inputs).sample for _ in range(2)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_what_is_replaced_does_not_depend_on_the_dtype() -> None:
    """A model may be moved to another one later."""
    assert aigc_fast.patch(make("unet")) == aigc_fast.patch(make("unet").half())
