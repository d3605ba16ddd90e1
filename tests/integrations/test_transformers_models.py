"""aigc_fast.patch on the models of transformers that have no rows of their own, beside the same
models unpatched: text encoders, encoders and decoders, and copies of what is known."""

import copy
import inspect
import pickle
import types

import pytest
import torch
from torch import nn

import aigc_fast
from aigc_fast.integrations._patching import Replacement
from aigc_fast.integrations._same_code import code_of
from aigc_fast.ops.linear import mkl_lags
from tests.integrations.coming_back import everything_comes_back, snapshot
from tests.integrations.test_diffusers_models import assert_error_ratio
from tests.models.checkpoints import Exact
from tests.ops.test_every_op import recorded

pytest.importorskip("transformers")

from tests.integrations.transformers_zoo import CASES, inputs_of, make

EVERY_MODEL = pytest.mark.parametrize("name", CASES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DECODERS = [name for name, case in CASES.items() if case.decodes is not None]


def gradients(model, inputs):
    """The first output and the gradients of it, for an upstream gradient of random numbers that
    every dtype holds."""
    out = model(**inputs)[0]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(
        out, parameters, upstream.bfloat16().to(out.dtype), allow_unused=True
    )
    return [
        out.detach(),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)),
    ]


def exact(run, model, inputs):
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    with Exact():
        return run(copy.deepcopy(model).double(), wide)


@torch.no_grad()
def greedy(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )


@EVERY_DTYPE
@EVERY_MODEL
def test_outputs_and_gradients_are_as_good_as_stock(name, dtype) -> None:
    model, inputs = make(name, dtype), inputs_of(name, dtype)
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model)
    with recorded() as calls:
        ours = gradients(model, inputs)
    assert_error_ratio(ours, stock, want, dtype)
    names = {op.name.removesuffix("_full").removesuffix("_") for op, _ in calls}
    names = {n for n in names if "backward" not in n}
    assert names - {"dense_attention", "linear_product"} == CASES[name].operators


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_same_greedy_tokens(name, cache) -> None:
    model, inputs = make(name), inputs_of(name)
    want = greedy(model, inputs, cache_implementation=cache)
    aigc_fast.patch(model)
    with recorded() as calls:
        got = greedy(model, inputs, cache_implementation=cache)
    assert torch.equal(got, want)
    # Eight steps follow the prompt, in two layers.
    names = [op.name.removesuffix("_full") for op, _ in calls]
    assert names.count("decode_attention") == 8 * 2 * CASES[name].decodes


@EVERY_MODEL
def test_everything_comes_back(name) -> None:
    with everything_comes_back(make(name)) as report:
        linear = "FalconLinear" if name == "falcon" else "Linear"
        assert (linear in report.replaced) == mkl_lags() != (linear in report.kept)
        found = [text for cls, (_, text) in report.replaced.items() if cls.endswith("Attention")]
        assert bool(found) == (name not in ("falcon", "bloom"))
        assert all("decode_attention" in text for text in found)


@EVERY_MODEL
def test_copies_are_patched_and_can_be_unpatched(name) -> None:
    model, inputs = make(name), inputs_of(name)
    with torch.no_grad():
        stock = model(**inputs)[0]
        aigc_fast.patch(model)
        want = model(**inputs)[0]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(twin(**inputs)[0], want)
            aigc_fast.unpatch(twin)
            assert torch.equal(twin(**inputs)[0], stock)


@pytest.mark.parametrize(
    "name", ["t5 encoder", "clip text", "gpt-neox", "cohere", "ministral", "falcon", "bart"]
)
def test_no_new_graph_breaks(name) -> None:
    model, inputs = make(name), inputs_of(name)

    def breaks():
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch._dynamo.explain(lambda: model(**inputs)[0])()
        return found.graph_break_count, found.graph_count

    before = breaks()
    aigc_fast.patch(model)
    assert breaks() == before
    torch._dynamo.reset()


def test_t5_keeps_its_last_product_in_float32() -> None:
    """As from_pretrained does where the model is to be float16."""
    model, inputs = make("t5 encoder", torch.bfloat16), inputs_of("t5 encoder")
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    want, stock = exact(gradients, model, inputs), gradients(model, inputs)
    aigc_fast.patch(model)
    assert_error_ratio(gradients(model, inputs), stock, want, torch.bfloat16)


@pytest.mark.parametrize("name", ["t5 encoder", "clip text", "gpt-neox", "cohere", "bart"])
def test_autocast(name) -> None:
    model, inputs = make(name), inputs_of(name)
    want = exact(gradients, model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = gradients(model, inputs)
        aigc_fast.patch(model)
        ours = gradients(model, inputs)
    assert_error_ratio(ours, stock, want, torch.bfloat16)


@pytest.mark.parametrize("name", ["t5 encoder", "clip text", "phi", "bart"])
def test_hooks_run(name) -> None:
    model, inputs, seen = make(name), inputs_of(name), []
    for module in model.modules():
        if isinstance(module, nn.Linear) or "MLP" in type(module).__name__:
            module.register_forward_hook(lambda module, args, out: seen.append(module))

    def run():
        seen.clear()
        with torch.no_grad():
            return model(**inputs)[0], list(seen)

    want, stock = run()
    aigc_fast.patch(model)
    got, ours = run()
    assert ours == stock and len(seen) > 10
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["query_key_value", "dense_h_to_4h"]])
@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_adapters(targets, first) -> None:
    """Of PEFT, on GPT-2's Conv1D and on linear layers; merged and taken apart again too."""
    from tests.models.checkpoints import hf_config, hf_model

    peft = pytest.importorskip("peft")
    gpt2 = "c_fc" in targets
    model = hf_model(hf_config("gpt2", attn_implementation="sdpa")) if gpt2 else make("gpt-neox")
    inputs = inputs_of("gpt-neox")
    if first == "patch":
        aigc_fast.patch(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=gpt2
    )
    adapted = peft.get_peft_model(model, config)
    if first == "adapter":
        aigc_fast.patch(adapted)

    def merged(model, inputs):
        model.merge_adapter()
        with torch.no_grad():
            found = [model(**inputs)[0]]
        model.unmerge_adapter()
        return found

    ours = [gradients(adapted, inputs), merged(adapted, inputs)]
    aigc_fast.unpatch(adapted)
    assert not any(isinstance(module, Replacement) for module in adapted.modules())
    for mine, run in zip(ours, (gradients, merged), strict=True):
        want, stock = exact(run, adapted, inputs), run(adapted, inputs)
        assert_error_ratio(mine, stock, want, torch.float32)


def test_the_cache_of_any_attention_grows_in_place() -> None:
    model, inputs = make("gpt-neox"), inputs_of("gpt-neox")
    aigc_fast.patch(model)
    model(**inputs)  # with a gradient nothing is kept
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        step = lambda: model(inputs["input_ids"][:, -1:], past_key_values=cache)  # noqa: E731
        step()
        before = cache.layers[1].keys
        step()
    assert cache.layers[1].keys.data_ptr() == before.data_ptr()
    assert cache.layers[1].keys.shape[2] == before.shape[2] + 1


def test_of_two_caches_the_one_that_grows_does_so_in_place() -> None:
    """A decoder's own, not that of the encoder's states, nor one of a layer that is not there."""
    from transformers import DynamicCache

    from aigc_fast.integrations.transformers_cache import GrowingLayer, grow_in_place

    model, inputs = make("bart"), inputs_of("bart")
    aigc_fast.patch(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    assert all(type(layer) is GrowingLayer for layer in cache.self_attention_cache.layers)
    assert not any(type(layer) is GrowingLayer for layer in cache.cross_attention_cache.layers)
    grow_in_place(empty := DynamicCache(), 3)
    assert empty.layers == []


def test_one_query_for_several_sequences() -> None:
    """As torch's attention does it, which repeats the query."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from aigc_fast.integrations.transformers_attention import attention

    module, query, key = nn.Module(), torch.randn(1, 2, 1, 8), torch.randn(3, 2, 5, 8)
    got, _ = attention(module, query, key, key + 1, None)
    want, _ = sdpa_attention_forward(module, query, key, key + 1, None)
    assert got.shape == (3, 1, 2, 8)
    torch.testing.assert_close(got, want)


def test_another_attention_chosen_later() -> None:
    model, inputs = make("opt"), inputs_of("opt")
    want = greedy(model, inputs)
    aigc_fast.patch(model)
    model.set_attn_implementation("eager")
    with recorded() as calls:
        assert torch.equal(greedy(model, inputs), want)
    assert not any(op.name.startswith("decode_attention") for op, _ in calls)
    aigc_fast.unpatch(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["starcoder2", "phi", "gemma", "olmo3", "glm4"])
def test_a_fused_loss(name) -> None:
    """Of language models whose forward is the same code as Llama's."""
    model, ids = make(name, torch.float64), inputs_of(name)["input_ids"]

    def run():
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        out = model(ids, labels=ids, use_cache=False)
        return out.logits, [out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))]

    with Exact():
        _, want = run()
        report = aigc_fast.patch(model, fuse_loss=True)
        logits, got = run()
    assert "linear_cross_entropy" in str(report) and logits is None
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_a_pipeline_with_its_text_encoder() -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.integrations.diffusers_zoo import make as make_part

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, text_encoder, unet) -> None:
            super().__init__()
            self.register_modules(text_encoder=text_encoder, unet=unet)

        def __call__(self, inputs):
            hidden = self.text_encoder(**inputs).last_hidden_state
            return self.unet(torch.ones(3, 4, 8, 8), 3, encoder_hidden_states=hidden).sample

    encoder = make("clip text", hidden_size=12, projection_dim=12)
    pipe = Pipeline(encoder, make_part("unet with text"))
    before = snapshot(pipe.text_encoder), snapshot(pipe.unet)
    with torch.no_grad():
        want = pipe(inputs_of("clip text"))
        report = aigc_fast.patch(pipe)
        assert report.replaced["CLIPAttention"][0] == 2 and "ResnetBlock2D" in report.replaced
        assert isinstance(pipe.text_encoder, type(encoder))
        torch.testing.assert_close(pipe(inputs_of("clip text")), want, atol=1e-4, rtol=1e-4)
    aigc_fast.unpatch(pipe)
    assert (snapshot(pipe.text_encoder), snapshot(pipe.unet)) == before


# ---- what is the same code, and what is not ------------------------------------------------------


def _scale(x):
    return x * 2


def _scale_elsewhere(x: torch.Tensor) -> torch.Tensor:
    """The same."""
    return x * 2


class Known(nn.Module):
    factor = 3

    def _norm(self, x):
        return x.square()

    @property
    def twice(self):
        return 2 * self.factor

    def forward(self, x, y=None):
        """Has a docstring."""
        total = [self._norm(x) * i for i in (1, 2)]
        return _scale(total[0]) + self.twice if y is None else y.float()


def rewritten(**changes):
    """Known's code as another class has it, but for the functions given."""
    members = {k: v for k, v in vars(Known).items() if not k.startswith("__")}
    module = types.ModuleType("elsewhere")
    vars(module).update(_scale=changes.pop("_scale", _scale))

    def moved(value):
        if isinstance(value, property):
            return property(moved(value.fget))
        if not isinstance(value, types.FunctionType):
            return value
        copied = types.FunctionType(value.__code__, vars(module), value.__name__)
        copied.__defaults__ = value.__defaults__
        return copied

    return type("Other", (nn.Module,), {k: moved(v) for k, v in (members | changes).items()})


def test_a_copy_is_the_same_code() -> None:
    from transformers.models.cohere import modeling_cohere as cohere
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.starcoder2 import modeling_starcoder2 as starcoder2

    assert code_of(rewritten()) == code_of(Known)
    assert code_of(rewritten(_scale=_scale_elsewhere)) == code_of(Known)
    assert code_of(cohere.CohereMLP) == code_of(llama.LlamaMLP)
    assert code_of(starcoder2.Starcoder2ForCausalLM) == code_of(llama.LlamaForCausalLM)
    assert code_of(llama.LlamaMLP) != code_of(llama.LlamaRMSNorm)


def _scale_to_floats(x):
    return x * 2.0


def _other_constant(self, x, y=None):
    total = [self._norm(x) * i for i in (1, True)]
    return _scale(total[0]) + self.twice if y is None else y.float()


def _other_method(self, x, y=None):
    total = [self._norm(x) * i for i in (1, 2)]
    return _scale(total[0]) + self.twice if y is None else y.double()


def _other_default(self, x, y=0):
    total = [self._norm(x) * i for i in (1, 2)]
    return _scale(total[0]) + self.twice if y is None else y.float()


@pytest.mark.parametrize(
    "changes",
    [
        dict(forward=_other_constant),
        dict(forward=_other_method),
        dict(forward=_other_default),
        dict(_norm=lambda self, x: x.abs()),
        dict(twice=property(lambda self: 3 * self.factor)),
        dict(factor=4.0),
        dict(_scale=_scale_to_floats),
        dict(_scale=torch.neg),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_differs_is_not_the_same_code(changes) -> None:
    # A constant of the class is read by the property, whose code names it.
    assert code_of(rewritten(**changes)) != code_of(Known)


def test_decorators_and_super_are_part_of_the_code() -> None:
    def plus(n):
        def decorate(forward):
            return lambda self, x: forward(self, x) + n

        return decorate

    def decorated(n, forward):
        return type("Decorated", (nn.Module,), {"forward": plus(n)(forward)})

    one, two = (lambda self, x: x.sin()), (lambda self, x: x.cos())
    assert code_of(decorated(1, one)) == code_of(decorated(1, one))
    assert code_of(decorated(1, one)) != code_of(decorated(1.0, one))
    assert code_of(decorated(1, one)) != code_of(decorated(1, two))

    class First(Known):
        def forward(self, x):
            return super().forward(x)

    class Second(First):
        pass

    class Third(nn.Identity):
        def forward(self, x):
            return super().forward(x)

    assert code_of(First) != code_of(Third)


def test_what_does_not_fit_is_kept_and_reported() -> None:
    model = make("cohere", use_qk_norm=True)
    report = aigc_fast.patch(model)
    assert report.kept["CohereLayerNorm"] == (4, "its weight is of more than one dimension")
    assert report.replaced["CohereLayerNorm"] == (3, "layer_norm")
    model = make("clip text", hidden_act="gelu")
    model.config._attn_implementation = "eager"
    report = aigc_fast.patch(model)
    assert report.kept["CLIPAttention"] == (2, "its attention is eager")
    model = make("t5 encoder", dense_act_fn="relu", feed_forward_proj="gated-relu")
    assert aigc_fast.patch(model).kept["T5DenseGatedActDense"] == (2, "its activation is ReLU")


def test_without_a_file_attention_is_kept(monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    from aigc_fast.integrations.transformers_attention import asks_the_interface

    assert asks_the_interface(LlamaAttention)

    def no_source(module):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    assert not asks_the_interface(LlamaAttention)


def test_a_file_that_asks_for_torchs_attention_by_name_keeps_it() -> None:
    from transformers.models.falcon import modeling_falcon as falcon
    from transformers.models.gemma4 import modeling_gemma4 as gemma4
    from transformers.models.opt import modeling_opt as opt

    from aigc_fast.integrations.transformers_attention import asks_the_interface

    assert asks_the_interface(opt.OPTAttention)
    for cls in (gemma4.Gemma4TextAttention, falcon.FalconAttention, opt.OPTDecoderLayer):
        assert not asks_the_interface(cls)
