"""aigc_fast.patch on transformers' models, beside the same models unpatched."""

import collections
import copy
import pickle
import re

import pytest
import torch
from torch import nn

import aigc_fast
from aigc_fast.integrations import _patching
from aigc_fast.integrations._patching import Replacement
from aigc_fast.ops.linear import mkl_lags
from tests.integrations.coming_back import everything_comes_back, snapshot
from tests.models.checkpoints import (
    GEMMA3,
    GRANITE,
    MIXTRAL,
    PHI3,
    QWEN3_MOE,
    VOCAB,
    Exact,
    assert_error_ratio,
    exact_logits,
    exact_model,
    hf_config,
    hf_logits,
    hf_model,
)
from tests.ops.test_every_op import assert_as_good_as_torch, recorded
from tests.test_mechanism import run_python

pytest.importorskip("transformers")

STEP = {"rms_norm", "apply_rotary", "decode_attention", "swiglu"}
#: model_type: what its config has beside the sizes, and the operators of a decoding step
MODELS = {
    "llama": (dict(attention_bias=True), STEP),
    "mistral": (dict(sliding_window=7), STEP),
    "qwen2": (
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
        STEP,
    ),
    "mixtral": (dict(MIXTRAL, sliding_window=7), STEP),
    "qwen3": ({}, STEP),
    "qwen3_moe": (QWEN3_MOE, STEP),
    "olmoe": (dict(head_dim=None, num_experts=6, num_experts_per_tok=3), STEP),
    "phi3": (dict(PHI3, sliding_window=7), STEP),
    "granite": (GRANITE | dict(logits_scaling=4.0), STEP),  # those released have 8 and 16
    "olmo2": ({}, STEP),
    "smollm3": (dict(no_rope_layers=[1, 0, 1]), STEP),
    "gemma2": (dict(sliding_window=6, query_pre_attn_scalar=20), STEP - {"swiglu"} | {"geglu"}),
    "gemma3_text": (
        # transformers makes no use of the softcap, nor may we
        dict(GEMMA3, num_hidden_layers=3, sliding_window_pattern=2, attn_logit_softcapping=1.0),
        STEP - {"swiglu"} | {"geglu"},
    ),
    "gpt2": ({}, {"decode_attention", "gelu_tanh"}),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=torch.float32, **changes):
    attention = "eager" if name == "gemma2" else "sdpa"  # what from_pretrained takes by default
    options = {"attn_implementation": attention} | MODELS[name][0] | changes
    return hf_model(hf_config(name, **options), dtype)


def prompts(padded=False, batch=3, length=11, seed=1):
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
        mask[2, :1] = 0
    return ids, mask


def greedy(model, ids, mask, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )


def layer(model):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[0]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
@EVERY_MODEL
def test_the_same_greedy_tokens(name, padded, cache) -> None:
    model, (ids, mask) = make(name), prompts(padded)
    want = greedy(model, ids, mask, cache_implementation=cache)
    aigc_fast.patch(model)
    with recorded() as calls:
        got = greedy(model, ids, mask, cache_implementation=cache)
    assert torch.equal(got, want)
    names = [op.name.removesuffix("_full") for op, _ in calls]
    assert set(names) - {"dense_attention", "grouped_linear"} == MODELS[name][1]
    if not padded and name in ("llama", "qwen3", "gpt2"):  # no mask of the prompt in any layer
        assert names.count("dense_attention") == (3 if mkl_lags() else 0)
    # Eleven steps follow the prompt, in three layers: all of them decoded.
    assert names.count("decode_attention") == 33


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_MODEL
def test_logits_are_as_good_as_stock(name, dtype) -> None:
    model, (ids, _) = make(name, dtype), prompts()
    exact = exact_logits(model, ids)
    chunks = (7, 1, 1, 2)
    stock = hf_logits(model, ids), hf_logits(model, ids, *chunks)
    aigc_fast.patch(model)
    ours = hf_logits(model, ids), hf_logits(model, ids, *chunks)
    # Rounding sends a token to another expert here and there, ours and theirs.
    share = 0.75 if dtype == torch.bfloat16 and hasattr(model.config, "num_experts_per_tok") else 1
    for mine, theirs in zip(ours, stock, strict=True):
        assert_error_ratio(mine, theirs, exact, share)


def gradients(model, *several):
    """Logits and gradients of prompts, those of a parameter's name over all layers as one: of the
    few numbers of one bias and one prompt the worst is luck on either side."""
    found = collections.defaultdict(list)
    for ids in several:
        out = model(ids, labels=ids, use_cache=False)
        found["logits"].append(out.logits.detach().flatten())
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, grad in zip(names, torch.autograd.grad(out.loss, parameters), strict=True):
            found[re.sub(r"\d+", "", name)].append(grad.flatten())
    return [torch.cat(parts) for parts in found.values()]


@EVERY_MODEL
def test_a_training_step(name) -> None:
    model, several = make(name), [prompts(seed=seed)[0] for seed in (1, 2, 3)]
    with Exact():
        exact = gradients(exact_model(model), *several)
    stock = gradients(model, *several)
    aigc_fast.patch(model)
    assert_as_good_as_torch(gradients(model, *several), stock, exact, torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_as_good_as_torch(gradients(model, *several), stock, exact, torch.float32)


@EVERY_MODEL
def test_no_new_graph_breaks(name) -> None:
    model, (ids, _) = make(name, num_hidden_layers=1), prompts(batch=1)

    def breaks():
        torch._dynamo.reset()
        found = torch._dynamo.explain(lambda: model(ids, use_cache=False).logits)()
        return found.graph_break_count, found.graph_count

    before = breaks()
    aigc_fast.patch(model)
    assert breaks() == before
    torch._dynamo.reset()


@EVERY_MODEL
def test_everything_comes_back(name) -> None:
    with everything_comes_back(make(name)) as report:
        assert sum(n for n, _ in report.replaced.values()) >= 6
        assert "kept" in str(report) and "decode_attention" in str(report)
        assert ("Linear" in report.replaced) == mkl_lags() != ("Linear" in report.kept)


@EVERY_MODEL
def test_copies_are_patched_and_can_be_unpatched(name) -> None:
    model, (ids, _) = make(name), prompts()
    stock = model(ids).logits
    aigc_fast.patch(model)
    want = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(ids).logits, want)
        aigc_fast.unpatch(twin)
        assert torch.equal(twin(ids).logits, stock)
    assert torch.equal(model(ids).logits, want)


# ---- beside what users and other libraries do to a model -----------------------------------------


class Adapter(nn.Module):
    """As LoRA does it."""

    def __init__(self, base) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapters", "patch"])
def test_adapters(first) -> None:
    model, (ids, _) = make("llama"), prompts()
    if first == "patch":
        aigc_fast.patch(model)
    for parent, child in ((layer(model).mlp, "gate_proj"), (layer(model).self_attn, "q_proj")):
        setattr(parent, child, Adapter(getattr(parent, child)))
    ours = [*gradients(wrapped(model), ids)] if first == "patch" else None
    aigc_fast.unpatch(model)
    with Exact():
        exact = gradients(copy.deepcopy(model).double(), ids)
    stock = gradients(model, ids)
    if ours is None:
        aigc_fast.patch(model)
        ours = gradients(model, ids)
    assert_as_good_as_torch(ours, stock, exact, torch.float32)


def wrapped(model):
    """The model inside another, as in PEFT or an accelerator."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    return Outer()


def test_a_model_inside_another() -> None:
    model = make("llama")
    before = snapshot(model)
    aigc_fast.patch(model.model)
    outer = wrapped(model)
    assert aigc_fast.patch(outer).replaced["LlamaRMSNorm"] == (7, "rms_norm")
    aigc_fast.unpatch(outer)
    assert snapshot(model) == before


def test_hooks_run_and_outputs_are_recorded() -> None:
    model, (ids, _) = make("llama", attn_implementation="eager"), prompts()
    seen = []
    for part in (layer(model).mlp, layer(model).self_attn, layer(model).input_layernorm):
        part.register_forward_hook(lambda module, args, out: seen.append(module))

    def run(model):
        out = model(ids, output_attentions=True, output_hidden_states=True)
        return [*out.attentions, *out.hidden_states]

    with Exact():
        exact = run(exact_model(model))
    stock = run(model)
    aigc_fast.patch(model)
    assert_as_good_as_torch(run(model), stock, exact, torch.float32)
    assert len(seen) == 6 and set(seen[:3]) == set(seen[3:])


@EVERY_MODEL
def test_attention_weights_of_eager_models(name) -> None:
    model, (ids, mask) = make(name, attn_implementation="eager"), prompts(padded=True)

    def weights():
        return model(ids, attention_mask=mask, output_attentions=True).attentions

    stock = weights()
    aigc_fast.patch(model)
    ours = weights()
    assert len(ours) == len(stock) == model.config.num_hidden_layers
    seen = mask.bool()[:, None, :, None]  # rows of padding attend to nothing
    for got, want in zip(ours, stock, strict=True):
        torch.testing.assert_close(got * seen, want * seen)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_hook_on_an_activation_runs(name) -> None:
    model, (ids, _), seen = make(name), prompts(), []
    mlp = next(m for m in model.modules() if type(m).__name__.endswith("MLP"))
    act = next(m for n, m in mlp.named_children() if n.startswith("act"))
    act.register_forward_hook(lambda module, args, out: seen.append(module))
    report = aigc_fast.patch(model)
    count, reason = report.kept[type(mlp).__name__]
    assert count == 1 and reason.endswith("has hooks or a forward of its own")
    model(ids)
    assert seen == [act]


@pytest.mark.parametrize("kind", ["bool", "float", "bool, one query", "packed"])
def test_masks_of_the_caller(kind) -> None:
    model, (ids, _) = make("llama"), prompts()
    queries = 1 if "one" in kind else ids.shape[1]
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(len(ids), 1, queries, ids.shape[1], generator=generator) < 0.5
    allowed[..., -queries:] |= torch.eye(queries, dtype=torch.bool)
    mask = allowed if "bool" in kind else torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    options = dict(attention_mask=mask)
    if kind == "packed":
        options = dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]))

    def run():
        if queries > 1:
            return model(ids, **options, use_cache=False).logits
        past = model(ids[:, :-1]).past_key_values
        return model(ids[:, -1:], past_key_values=past, **options).logits

    with torch.no_grad():
        want = run()
        aigc_fast.patch(model)
        torch.testing.assert_close(run(), want)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_autocast(name) -> None:
    model, (ids, _) = make(name), prompts()
    exact = exact_logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        stock = hf_logits(model, ids, 9, 1, 1)
        aigc_fast.patch(model)
        assert_error_ratio(hf_logits(model, ids, 9, 1, 1), stock, exact)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inference_mode_and_beams(name) -> None:
    model, (ids, mask) = make(name), prompts(padded=True)
    with torch.inference_mode():
        want = greedy(model, ids, mask, num_beams=3)
        aigc_fast.patch(model)
        assert torch.equal(greedy(model, ids, mask, num_beams=3), want)


def test_decoding_with_a_gradient() -> None:
    """One query of which a gradient is asked must not reach decode_attention, which has none."""
    model, (ids, _) = make("llama"), prompts(length=1)
    stock = gradients(model, ids.expand(3, 2))
    aigc_fast.patch(model)
    for mine, theirs in zip(gradients(model, ids.expand(3, 2)), stock, strict=True):
        torch.testing.assert_close(mine, theirs)
    model(ids).logits.sum().backward()


def test_another_attention_chosen_later() -> None:
    model, (ids, mask) = make("llama"), prompts(padded=True)
    want = greedy(model, ids, mask)
    aigc_fast.patch(model)
    model.set_attn_implementation("eager")
    with recorded() as calls:
        assert torch.equal(greedy(model, ids, mask), want)
    assert {op.name for op, _ in calls} == {"rms_norm", "swiglu"}
    aigc_fast.unpatch(model)
    assert model.config._attn_implementation == "eager"


# ---- the cache -----------------------------------------------------------------------------------


def steps(model, ids, cache, count):
    with torch.no_grad():
        for _ in range(count):
            ids = model(ids[:, -1:], past_key_values=cache).logits[:, -1:].argmax(-1)
    return ids


def test_the_cache_grows_in_place() -> None:
    from transformers import DynamicCache

    model, (ids, _) = make("llama"), prompts()
    aigc_fast.patch(model)
    cache = DynamicCache(config=model.config)
    steps(model, ids, cache, 3)
    keys = cache.layers[0].keys
    steps(model, ids, cache, 2)
    assert cache.layers[0].keys.data_ptr() == keys.data_ptr()
    assert cache.layers[0].keys.shape[2] == keys.shape[2] + 2


@pytest.mark.parametrize(
    "change", ["crop", "reorder", "repeat", "copy", "deepcopy", "reset", "inference"]
)
def test_what_is_done_to_a_cache_between_steps(change) -> None:
    """The same as transformers' own cache, and what was once handed out stays as it was."""
    from transformers.cache_utils import DynamicLayer

    from aigc_fast.integrations.transformers_cache import GrowingLayer

    generator = torch.Generator().manual_seed(3)
    new = lambda batch, n: torch.randn(batch, 2, n, 4, generator=generator)  # noqa: E731
    ours, theirs, handed_out = GrowingLayer(), DynamicLayer(), []

    def update(n):
        key, value = new(4 if change == "repeat" and handed_out else 2, n), None
        value = key + 1
        mode = torch.inference_mode if change == "inference" and n == 1 else torch.no_grad
        with mode():
            got, want = ours.update(key, value), theirs.update(key, value)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
        return got[0], want[0].clone()

    first = [update(n) for n in (5, 1, 1, 2)]
    handed_out += first
    for cache in (ours, theirs):
        if change == "crop":
            cache.crop(-2)
        elif change == "reorder":
            cache.reorder_cache(torch.tensor([1, 1]))
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "reset":
            cache.reset()
    if change in ("copy", "deepcopy"):
        branch = getattr(copy, change)(ours)
        with torch.no_grad():
            keys, _ = branch.update(new(2, 1), new(2, 1))
        handed_out.append((keys, keys.clone()))
    handed_out += [update(n) for n in (1, 3, *[1] * 60)]
    assert all(torch.equal(got, want) for got, want in handed_out)
    assert vars(ours).keys() == vars(theirs).keys()  # exporters look for tensors among them


# ---- what is left alone --------------------------------------------------------------------------


def test_an_unknown_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    report = aigc_fast.patch(model)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    assert report.replaced == {}
    assert report.kept["LayerNorm"] == (1, "no replacement is known")
    assert str(report).startswith("Sequential: 0 modules replaced")


def test_what_does_not_fit_is_kept_and_reported() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Mine(LlamaRMSNorm):
        pass

    model = make("llama", hidden_act="relu", attn_implementation="flex_attention")
    model.model.norm = Mine(72)
    overridden = layer(model).input_layernorm
    overridden.forward = lambda x: x
    report = aigc_fast.patch(model)
    assert report.kept["LlamaMLP"] == (3, "its activation is ReLU")
    assert report.kept["LlamaAttention"] == (3, "its attention is flex_attention")
    assert report.kept["LlamaRMSNorm"] == (1, "its forward was replaced on the object")
    assert report.kept["Mine"] == (1, "no replacement is known")
    assert report.replaced["LlamaRMSNorm"] == (5, "rms_norm")
    assert set(report.replaced) <= {"LlamaRMSNorm", "Linear"}
    assert not isinstance(overridden, Replacement)
    aigc_fast.unpatch(model)
    assert not any(isinstance(m, Replacement) for m in model.modules())


@pytest.mark.parametrize("lags", [True, False])
def test_products_of_known_models_where_torchs_lag(monkeypatch, lags) -> None:
    monkeypatch.setattr(_patching, "lags", lambda dtype: lags)
    model, (ids, _) = make("llama"), prompts()
    want = model(ids).logits
    report = aigc_fast.patch(model)
    assert ("Linear" in report.replaced) == lags != ("Linear" in report.kept)
    torch.testing.assert_close(model(ids).logits, want)
    unknown = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert not aigc_fast.patch(unknown).replaced and type(unknown[0]) is nn.Linear


def test_refuses_what_is_no_module() -> None:
    for function in (aigc_fast.patch, aigc_fast.unpatch):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module or a pipeline .*got str"):
            function("gpt2")


def test_imports_nothing_heavy() -> None:
    code = """
        import sys, torch, aigc_fast
        assert "aigc_fast.integrations" not in sys.modules
        aigc_fast.patch(torch.nn.Linear(2, 2))
        print("transformers" in sys.modules)
    """
    assert "False" in run_python(code)


# ---- patch(fuse_loss=True) ------------------------------------------------------------------


def labelled(seed):
    ids, mask = prompts(padded=True, seed=seed)
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


@torch.no_grad()
def losses(model):
    """Of several prompts: of one the error is luck on either side."""
    return torch.stack([model(**labelled(seed), use_cache=False).loss for seed in range(12)])


def loss_and_gradients(model, ids, **options):
    """In training, without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = model(ids, use_cache=False, **options)
    return out, [out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_MODEL
def test_a_fused_loss(name, dtype) -> None:
    if dtype == torch.bfloat16 and "experts" in str(MODELS[name][0]):
        pytest.skip("rounding sends a token to another expert, in theirs as in ours")
    model, options = make(name, dtype), labelled(seed=1)
    ids = options.pop("input_ids")
    with Exact():
        _, exact = loss_and_gradients(twin := exact_model(model), ids, **options)
        exact[0] = losses(twin)
    _, stock = loss_and_gradients(model, ids, **options)
    stock[0] = losses(model)
    aigc_fast.patch(model, fuse_loss=True)
    with recorded() as calls:
        out, ours = loss_and_gradients(model, ids, **options)
    ours[0] = losses(model)
    assert out.logits is None and "cross_entropy" in {op.name for op, _ in calls}
    assert ours[0].dtype == torch.float32
    for found, plain, truth in zip(ours, stock, exact, strict=True):
        scale = truth.norm()  # of one parameter the worst number is luck on either side
        error, theirs = ((g.double() - truth).norm() / scale for g in (found, plain))
        assert error <= 2 * theirs + torch.finfo(found.dtype).eps


@EVERY_MODEL
def test_a_fused_loss_takes_the_trainers_arguments(name) -> None:
    model, (ids, _) = make(name, torch.float64), prompts()
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    for options in (
        dict(labels=ids, num_items_in_batch=17),
        dict(labels=ids, num_items_in_batch=torch.tensor(17)),
        dict(labels=ids, shift_labels=shifted),
        dict(labels=ids, ignore_index=int(ids[0, 3])),
    ):
        with Exact():
            stock, want = loss_and_gradients(model, ids, **options)
            aigc_fast.patch(model, fuse_loss=True)
            out, got = loss_and_gradients(model, ids, **options)
        aigc_fast.unpatch(model)
        assert out.logits is None and type(out) is type(stock)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(labels=True, eval=True),
        dict(labels=True, logits_to_keep=4),
        dict(labels=True, return_dict=False),
        dict(labels=True, output_router_logits=True),
    ],
    ids=str,
)
def test_where_a_loss_is_not_fused_nothing_changes(options) -> None:
    name = "mixtral" if "output_router_logits" in options else "llama"
    model, (ids, _) = make(name), prompts()
    options = dict(options)
    model.train(not options.pop("eval", False))
    if options.pop("labels", False):
        options["labels"] = ids[:, -4:] if "logits_to_keep" in options else ids
    aigc_fast.patch(model)
    want = model(ids, **options)
    report = aigc_fast.patch(model, fuse_loss=True)
    assert "linear_cross_entropy" in str(report)
    got = model(ids, **options)
    assert type(got) is type(want)
    for mine, theirs in zip(tuple(got)[:2], tuple(want)[:2], strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs)


def test_a_loss_is_fused_on_request() -> None:
    model, (ids, _) = make("llama"), prompts()
    before = snapshot(model)
    report = aigc_fast.patch(model)
    assert "fuse_loss=True" in str(report)
    out, _ = loss_and_gradients(model, ids, labels=ids)
    assert out.logits is not None
    aigc_fast.unpatch(model)
    model.train(False)
    assert snapshot(model) == before
    aigc_fast.patch(model, fuse_loss=True)
    for hook in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
        handle = getattr(model.lm_head, f"register_{hook}")(lambda *_: None)
        out, _ = loss_and_gradients(model, ids, labels=ids)
        assert out.logits is not None
        handle.remove()
    out, _ = loss_and_gradients(model, ids, labels=ids)
    assert out.logits is None
