"""A whole decoding step against the operators it is made of."""

from typing import Any

import pytest
import torch
from torch import Tensor

import aigc_fast
from aigc_fast import ops
from aigc_fast.ops._pages import NARROW
from aigc_fast.ops._registry import OPS
from aigc_fast.ops.kv_cache import _nearest
from tests.op_samples.decode_attention import paged
from tests.op_samples.sample import rand
from tests.ops.test_every_op import map_tensors

STEP = OPS["decoder_step"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(rows: int, columns: int, bits: int, symmetric: bool, seed: int) -> Tensor:
    weight = rand(rows, columns, seed=seed, scale=columns**-0.5)
    return ops.quantize_weight(weight, bits, 32, symmetric=symmetric)


def example(
    lengths: list[int], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 32,
    hidden: int = 64, inner: int = 96, layers: int = 2, capacity: int = 40,
    bits: int = 4, symmetric: bool = False, draw: int = 0,
) -> tuple:  # fmt: skip
    """Arguments of the operator's schema, in float64, up to `scale`."""
    batch, width = len(lengths), heads * head_dim
    weights = []
    for layer in range(layers):
        seed = 10 * layer + 1000 * draw
        weights += [
            rand(hidden, seed=seed) + 2,
            packed(width + 2 * kv_heads * head_dim, hidden, bits, symmetric, seed + 1),
            packed(hidden, width, bits, symmetric, seed + 2),
            rand(hidden, seed=seed + 3) + 2,
            packed(2 * inner, hidden, bits, symmetric, seed + 4),
            packed(hidden, inner, 8, symmetric, seed + 5),
        ]
    weights.append(rand(hidden, seed=99 + 1000 * draw) + 2)
    caches = [
        rand(batch, capacity, kv_heads, head_dim, seed=i + 1000 * draw) for i in range(2 * layers)
    ]
    angles = rand(capacity, head_dim // 2, seed=7 + draw)
    positions = torch.tensor(lengths, dtype=torch.int32)
    hidden_states = rand(batch, hidden, seed=5 + draw)
    cos, sin = ([table.float()] for table in (angles.cos(), angles.sin()))
    return hidden_states, weights, caches, positions, cos, sin, 1e-5, head_dim**-0.5


#: what layers may have beside Llama's; functions of the arguments of `example`
def _query_key_norms(args: tuple, joint: bool) -> list[Tensor]:
    caches, qkv = args[2], args[1][2]
    kv_heads, head_dim = caches[0].shape[2:]
    widths = (qkv.shape[1] * 32, kv_heads * head_dim) if joint else (head_dim, head_dim)
    return [rand(widths[i % 2], seed=200 + i) + 2 for i in range(len(caches))]


def _of_hidden(args: tuple) -> list[Tensor]:
    return [rand(args[0].shape[1], seed=300 + i) + 2 for i in range(len(args[2]))]


def _biases(args: tuple) -> list[Tensor]:
    kv_heads, head_dim = args[2][0].shape[2:]
    width = args[1][2].shape[1] * 32 + 2 * kv_heads * head_dim
    return [rand(width, seed=400 + i) for i in range(len(args[2]) // 2)]


def _with_experts(args: tuple, count: int, draw: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights with those of `count` experts in place of one MLP, and the routers."""
    hidden, weights = args[0].shape[1], list(args[1])
    inner, layers = weights[5].shape[1] * 32, len(args[2]) // 2
    for layer in range(layers):
        seed = 500 + 10 * layer + 1000 * draw
        weights[6 * layer + 4] = packed(count * 2 * inner, hidden, 4, False, seed)
        weights[6 * layer + 5] = packed(count * hidden, inner, 8, False, seed + 1)
    scale = 2 * hidden**-0.5
    return weights, [rand(count, hidden, seed=600 + i, scale=scale) for i in range(layers)]


#: how many experts there are, how many a token is sent to, whether their factors are normalised
EXPERTS = {"experts": (5, 2, True), "all_experts": (3, 3, False)}
OPTIONS = {
    "bias": lambda args: {"qkv_biases": _biases(args)},
    "norms_of_heads": lambda args: {"query_key_norms": _query_key_norms(args, False)},
    "norms_of_all_heads": lambda args: {"query_key_norms": _query_key_norms(args, True)},
    "norms_behind": lambda args: {"post_norms": _of_hidden(args)},
    "windows": lambda args: {"windows": [7, 100]},
    "a_window": lambda args: {"windows": [0, 1]},
    "rotation_of_some": lambda args: {"rotations": [-1, 0]},
    "softcap": lambda args: {"softcap": 0.7},
    "residual_scale": lambda args: {"residual_scale": 0.22},
    "gelu": lambda args: {"gelu": True},
}


def with_options(names: str, case: str, draw: int = 0) -> tuple[tuple, dict]:
    """Arguments in float64, up to `scale`, and options: those of `OPTIONS`, or
    two_rotations: another table in the first layer;
    partial_rotation: of some leading features;
    no_norms_before: four tensors a layer;
    experts: two of five; all_experts: three of three, their factors as they are."""
    args = example(**CASES[case], draw=draw)
    hidden, weights, caches, lengths, [cos], [sin], *rest = args
    options: dict = {}
    tables = [cos], [sin]
    for name in names.split():
        if name == "two_rotations":
            tables = [[t, t.flip(0)] for t in (cos, sin)]
            options["rotations"] = [1, 0]
        elif name == "partial_rotation":
            tables = [[t[:, :5] for t in table] for table in tables]
        elif name == "no_norms_before":
            weights = [w for i, w in enumerate(weights[:-1]) if i % 3] + weights[-1:]
        elif name in EXPERTS:
            count, *how = EXPERTS[name]
            weights, routers = _with_experts(args, count, draw)
            names = ("routers", "experts_per_token", "normalize_experts")
            options |= dict(zip(names, (routers, *how), strict=True))
        else:
            options |= OPTIONS[name](args)
    return (hidden, weights, caches, lengths, *tables, *rest), options


QWEN2, QWEN3 = "bias", "bias norms_of_heads"
GEMMA2 = "norms_behind windows softcap gelu"
GEMMA3 = "norms_of_heads norms_behind windows two_rotations gelu"
EXPERTS_BETWEEN_NORMS = "all_experts norms_behind gelu residual_scale"
OLMO2 = "norms_of_all_heads norms_behind no_norms_before"
KINDS = [
    "", *OPTIONS, *EXPERTS, "two_rotations", "partial_rotation", QWEN3, GEMMA2, GEMMA3, OLMO2,
    "norms_of_heads partial_rotation rotation_of_some residual_scale", EXPERTS_BETWEEN_NORMS,
]  # fmt: skip
TOGETHER = ["", "experts", GEMMA2, GEMMA3, f"{OLMO2} {QWEN2} partial_rotation residual_scale"]


def take_step(
    implementation: str, args: tuple, quantize: bool, options: dict, **more: Any
) -> Tensor:
    """STEP.call with options by their names."""
    given = {**options, **more}
    order = ("block_table", "cache_scales", "qkv_biases", "query_key_norms", "post_norms",
             "rotations", "windows", "softcap", "residual_scale", "gelu", "routers",
             "experts_per_token", "normalize_experts")  # fmt: skip
    defaults = {"rotations": [], "windows": [], "residual_scale": 1.0, "gelu": False,
                "experts_per_token": 0, "normalize_experts": True}  # fmt: skip
    values = [given.pop(name, defaults.get(name)) for name in order]
    assert not given
    return STEP.call(implementation, *args, quantize, *values)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A copy."""
    return map_tensors(value, lambda t: t.clone().to(dtype if t.is_floating_point() else t))


def cast(args: tuple, dtype: torch.dtype) -> tuple:
    """A copy with all but the angles in `dtype`."""
    return (*in_dtype(args[:3], dtype), *args[3:])


CASES = {
    "one": dict(lengths=[5]),
    "empty_cache": dict(lengths=[0]),
    "full_cache": dict(lengths=[39]),
    "batch": dict(lengths=[0, 17, 39]),
    "several_splits": dict(lengths=[700, 3], capacity=701),
    "multi_head": dict(lengths=[5], kv_heads=4),
    "groups_of_3": dict(lengths=[9, 2], heads=6),
    "multi_query": dict(lengths=[9], heads=5, kv_heads=1, head_dim=64),
    "symmetric": dict(lengths=[5], symmetric=True),
    "int8": dict(lengths=[5], bits=8),
    "odd_tiles": dict(lengths=[5], heads=2, kv_heads=1, head_dim=48, hidden=96, inner=32),
    "batch_9": dict(lengths=list(range(9))),
}


@pytest.mark.parametrize("quantize", [False, True], ids=["exact", "int8_activations"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_layers(name, dtype, quantize) -> None:
    results: dict[str, list] = {"ours": [], "plain": [], "exact": []}
    for draw in range(5):
        args = cast(example(**CASES[name], draw=draw), dtype)
        exact, plain = cast(args, torch.float64), cast(args, dtype)
        results["exact"].append([STEP.reference(*exact, quantize), *exact[2]])
        results["plain"].append([STEP.reference(*plain, quantize), *plain[2]])
        results["ours"].append([STEP.call("cpu", *args, quantize), *args[2]])
    # Layers blow up a single rounding now and then, in plain PyTorch as in ours, so that the worst
    # of a few outputs says little: the error is the mean square's root over all of them.
    pooled = {k: [torch.stack(t) for t in zip(*v, strict=True)] for k, v in results.items()}
    for ours, plain, exact in zip(*pooled.values(), strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        error, limit = ((t - exact).square().mean().sqrt().item() for t in (ours, plain))
        assert error <= 2 * limit


# In float32 a code of int8 falls otherwise once in thousands, for the rounding before it, in plain
# PyTorch as in ours: an error that a few draws do not average. In 16 bits it does all the time.
ROUNDING = [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(("dtype", "quantize"), ROUNDING)
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS[1:] for case in ("batch", "odd_tiles")]
    + [(kind, "several_splits") for kind in ("a_window", GEMMA2, GEMMA3, OLMO2)],
)
def test_other_layers_match_the_layers(kind, case, dtype, quantize) -> None:
    if kind == "experts" and (dtype, quantize) != (torch.float32, False):
        pytest.skip("rounding sends a token to another expert, in plain PyTorch as in ours")
    results: dict[str, list] = {"ours": [], "plain": [], "exact": []}
    for draw in range(5):
        args, options = with_options(kind, case, draw)
        for name in results:
            wide = torch.float64 if name == "exact" else dtype
            given, small = cast(args, wide), in_dtype(options, wide)
            out = take_step("cpu" if name == "ours" else "reference", given, quantize, small)
            results[name].append([out, *given[2]])
    pooled = {k: [torch.stack(t) for t in zip(*v, strict=True)] for k, v in results.items()}
    for ours, plain, exact in zip(*pooled.values(), strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        error, limit = ((t - exact).square().mean().sqrt().item() for t in (ours, plain))
        assert error <= 2 * limit


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_caches_may_have_a_dtype_of_their_own(cache_dtype, hidden_dtype) -> None:
    """As good as the layers with the same caches, against float64 with them."""
    errors = {"ours": 0.0, "plain": 0.0}
    for draw in range(8):
        case = example(**CASES["batch"], draw=draw)
        caches = [c.to(cache_dtype) for c in case[2]]
        exact = cast((*case[:2], caches, *case[3:]), torch.float64)
        true = STEP.reference(*exact, False)
        for name in errors:
            args = cast(case, hidden_dtype)
            args = (*args[:2], [c.clone() for c in caches], *args[3:])
            out = STEP.call({"plain": "reference", "ours": "cpu"}[name], *args, False)
            assert out.dtype == hidden_dtype and all(c.dtype == cache_dtype for c in args[2])
            errors[name] += (out - true).square().mean().item()
    assert errors["ours"] <= 2**2 * errors["plain"]


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache_dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    ("kind", "name"), [("", "one"), ("", "batch"), ("", "multi_query"), (GEMMA3, "batch")]
)
def test_caches_of_one_byte(kind, name, cache_dtype, hidden_dtype) -> None:
    """As good as the layers: the states against float64 with the same numbers in the caches, the
    new keys and values against float64 without rounding."""
    errors = {run: torch.zeros(2, dtype=torch.float64) for run in ("ours", "plain")}
    for draw in range(8):
        case, options = with_options(kind, name, draw)
        kv_heads = case[2][0].shape[2]
        # Small enough for the largest numbers not to fit.
        scales = rand(len(case[2]), kv_heads, seed=draw).abs().add(1).div(80).float()
        if cache_dtype != torch.int8:
            scales = scales * 20
        caches = [
            _nearest(c / scale[:, None], cache_dtype)
            for c, scale in zip(case[2], scales, strict=True)
        ]

        def step(implementation, dtype, caches, case=case, scales=scales, options=options):
            """The states, and what the first layer's caches then say."""
            args = cast(case, dtype)
            args = (*args[:2], [c.clone() for c in caches], *args[3:])
            small = in_dtype(options, dtype)
            out = take_step(implementation, args, False, small, cache_scales=scales)
            assert out.dtype == dtype and all(c.dtype == caches[0].dtype for c in args[2])
            first = [c.double() * s[:, None] for c, s in zip(args[2], scales, strict=True)][:2]
            return out, torch.stack(first)

        states, _ = step("reference", torch.float64, caches)
        _, wide = step("reference", torch.float64, [c.double() for c in caches])
        for run, implementation in (("ours", "cpu"), ("plain", "reference")):
            out, stored = step(implementation, hidden_dtype, caches)
            differences = (out - states, stored - wide)
            errors[run] += torch.stack([d.square().mean() for d in differences])
    assert (errors["ours"] <= 2**2 * errors["plain"]).all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", TOGETHER)
def test_the_bits_do_not_depend_on_the_threads(kind, quantize) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            args, options = in_dtype(with_options(kind, "several_splits"), torch.float32)
            results.append([take_step("cpu", args, quantize, options), *args[2]])
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_sequence_does_not_depend_on_its_batch(kind) -> None:
    args, options = in_dtype(with_options(kind, "batch"), torch.float32)
    together = take_step("cpu", cast(args, torch.float32), True, options)
    for b in range(3):
        hidden, weights, caches, lengths, *rest = cast(args, torch.float32)
        one = slice(b, b + 1)
        alone = (hidden[one], weights, [c[one].clone() for c in caches], lengths[one], *rest)
        assert torch.equal(take_step("cpu", alone, True, options)[0], together[b])


def test_caches_of_any_layout() -> None:
    args = cast(example(**CASES["batch"]), torch.float32)
    by_head = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in args[2]]
    other = (*args[:2], by_head, *args[3:])
    assert torch.equal(STEP.call("cpu", *other, True),
                       STEP.call("cpu", *args, True))  # fmt: skip
    assert all(map(torch.equal, by_head, args[2]))


def in_pages(caches: list[Tensor], lengths: Tensor, page_size: int) -> tuple[list[Tensor], Tensor]:
    """(caches in pages, block_table); garbage wherever a step must not look."""
    *found, _ = zip(*(paged(c, c, (lengths + 1).tolist(), page_size) for c in caches), strict=True)
    *_, table = paged(caches[0], caches[0], (lengths + 1).tolist(), page_size)
    return list(found[0]), table


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 40])
@pytest.mark.parametrize("name", ["batch", "empty_cache", "several_splits", "groups_of_3"])
@pytest.mark.parametrize("kind", ["", GEMMA3])
def test_pages_give_the_same_bits(kind, name, page_size, implementation) -> None:
    args, options = in_dtype(with_options(kind, name), torch.float32)
    hidden, weights, caches, lengths, *rest, eps, scale = args
    capacity = caches[0].shape[1]
    # Entries behind the length are not a number, in the contiguous caches too.
    beyond = (torch.arange(capacity) >= lengths[:, None])[..., None, None]
    caches = [c.masked_fill(beyond, torch.nan) for c in caches]
    pages, table = in_pages(caches, lengths, page_size)
    more = -(-capacity // page_size) * page_size - capacity  # rows of cos and sin
    wide = map_tensors(rest, lambda t: torch.cat([t, t.new_zeros(more, t.shape[1])]))
    contiguous = take_step(
        implementation, (hidden, weights, caches, lengths, *wide, eps, scale), True, options
    )
    args = (hidden, weights, pages, lengths, *wide, eps, scale)
    out = take_step(implementation, args, True, options, block_table=table)
    close = 0 if implementation == "cpu" else 1e-5  # the reference's sums run over the capacity
    torch.testing.assert_close(out, contiguous, rtol=close, atol=close)
    assert not out.isnan().any()
    for b, length in enumerate(lengths.tolist()):
        for cache, stored in zip(caches, pages, strict=True):
            used = stored[table[b, : length // page_size + 1].long()].flatten(0, 1)
            torch.testing.assert_close(
                used[: length + 1], cache[b, : length + 1], rtol=close, atol=close
            )


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1])
def test_refuses_pages_that_are_not_there(page, implementation) -> None:
    hidden, weights, caches, lengths, *rest = cast(example([0, 17, 39]), torch.float32)
    pages, table = in_pages(caches, lengths, 20)
    before = [c.clone() for c in pages]
    table[2, 1] = page
    with pytest.raises(
        ValueError, match=rf"block_table must be in \[0, 6\) .*, got {page} for page"
    ):
        STEP.call(implementation, hidden, weights, pages, lengths, *rest, False, table)
    assert all(
        torch.equal(a[~a.isnan()], b[~b.isnan()]) for a, b in zip(before, pages, strict=True)
    )
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 20\)|positions must lie"):
        STEP.call(implementation, hidden, weights, pages, lengths, *rest, False, table[:, :1])
    with pytest.raises(ValueError, match="caches.* must have the batch of hidden"):
        STEP.call(implementation, hidden, weights, pages, lengths, *rest, False)


def refusals() -> dict:
    hidden, weights, caches, lengths, cos, sin, *_ = cast(example(**CASES["batch"]), torch.float32)
    good = dict(hidden=hidden, weights=weights, caches=caches, lengths=lengths, cos=cos, sin=sin)

    def swapped(values: list, index: int, value: Tensor) -> list:
        return [*values[:index], value, *values[index + 1 :]]

    changes = {
        "float64": (TypeError, r"weights\[0\] must have the dtype", dict(hidden=hidden.double())),
        "hidden_dim": (ValueError, "hidden must have 2 dimensions", dict(hidden=hidden[0])),
        "few_weights": (ValueError, "weights must be 6 or 4 tensors", dict(weights=weights[:-1])),
        "norm": (ValueError, r"weights\[3\] must have shape",
                 dict(weights=swapped(weights, 3, weights[3][:-1]))),
        "packed": (ValueError, r"weights\[1\] must have one of",
                   dict(weights=swapped(weights, 1, weights[1][..., 1:]))),
        "down": (ValueError, r"weights\[5\]|weights\[4\]",
                 dict(weights=swapped(weights, 5, weights[4]))),
        "caches": (ValueError, "caches must hold 2 tensors a layer", dict(caches=caches[:3])),
        "few_caches": (ValueError, "for each of 1 layers", dict(caches=caches[:2])),
        "cache_shape": (ValueError, r"caches\[3\] must have shape",
                        dict(caches=swapped(caches, 3, caches[3][:, 1:]))),
        "cache_dtype": (TypeError, r"caches\[1\] must have the dtype",
                        dict(caches=swapped(caches, 1, caches[1].half()))),
        "lengths": (TypeError, "lengths must be int32", dict(lengths=lengths.long())),
        "full": (ValueError, r"lengths must be in \[0, 40\)", dict(lengths=lengths + 1)),
        "negative": (ValueError, r"lengths must be in \[0, 40\)", dict(lengths=lengths - 1)),
        "table": (TypeError, "block_table must be int32",
                  dict(block_table=lengths.long()[:, None])),
        "table_batch": (ValueError, "block_table must have the batch of hidden",
                        dict(block_table=lengths[:2, None])),
        "cos": (ValueError, "cos must have shape", dict(cos=cos[0][1:])),
        "sin": (ValueError, "sin must have shape", dict(sin=sin[0][:, 1:])),
        "angles": (ValueError, "cos and sin must be as many", dict(cos=cos * 2)),
        "wide_angles": (ValueError, r"cos must have shape \(40 or more, 16 or fewer\)",
                        {name: torch.ones(40, 17) for name in ("cos", "sin")}),
        "scales": (ValueError, r"cache_scales must have shape \(4, 2\)",
                   dict(cache_scales=torch.ones(2, 2))),
        "scales_dtype": (TypeError, "cache_scales must be float32",
                         dict(cache_scales=torch.ones(4, 2, dtype=torch.float64))),
        "few_biases": (ValueError, "qkv_biases must hold 2, got 1",
                       dict(qkv_biases=[torch.ones(256)])),
        "bias": (ValueError, r"qkv_biases\[1\] must have shape \(256,\)",
                 dict(qkv_biases=[torch.ones(256), torch.ones(255)])),
        "bias_dtype": (TypeError, r"qkv_biases\[0\] must have the dtype of hidden",
                       dict(qkv_biases=[torch.ones(256).half()] * 2)),
        "norms_of_heads": (ValueError, r"query_key_norms\[1\] must have shape \(32,\)",
                           dict(query_key_norms=[torch.ones(32), torch.ones(64)] * 2)),
        "norms_of_all_heads": (ValueError, r"query_key_norms\[1\] must have shape \(64,\)",
                               dict(query_key_norms=[torch.ones(128), torch.ones(32)] * 2)),
        "post_norms": (ValueError, "post_norms must hold 4, got 2",
                       dict(post_norms=[torch.ones(64)] * 2)),
        "rotations": (ValueError, r"rotations must be in \[-1, 1\), got 1", dict(rotations=[0, 1])),
        "few_windows": (ValueError, "windows must hold 2, got 1", dict(windows=[1])),
        "windows": (ValueError, r"windows must be in \[0, .*\), got -1", dict(windows=[-1, 0])),
        "softcap": (ValueError, "softcap must be positive", dict(softcap=-1.0)),
        "activation": (ValueError, "activation must be", dict(activation="gelu")),
        "few_routers": (ValueError, "routers must hold 2, got 1",
                        dict(routers=[torch.ones(3, 64)], experts_per_token=1)),
        "router": (ValueError, r"routers\[1\] must have shape \(3, 64\)",
                   dict(routers=[torch.ones(3, 64), torch.ones(4, 64)], experts_per_token=1)),
        "per_token": (ValueError, r"experts_per_token must be in \[1, 1\], got 2",
                      dict(routers=[torch.ones(1, 64)] * 2, experts_per_token=2)),
        "no_routers": (ValueError, "experts_per_token must be 0 without routers, got 2",
                       dict(experts_per_token=2)),
        "experts": (ValueError, r"weights\[4\] \(gate_up\) must be \(384, 64\)",
                    dict(routers=[torch.ones(2, 64)] * 2, experts_per_token=2)),
    }  # fmt: skip
    return {name: (error, match, {**good, **change})
            for name, (error, match, change) in changes.items()}  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_refuses_and_writes_nothing(name) -> None:
    error, match, arguments = refusals()[name]
    before = [c.clone() for c in arguments["caches"]]
    with pytest.raises(error, match=match):
        ops.decoder_step(**arguments, eps=1e-5)
    assert all(map(torch.equal, before, arguments["caches"]))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_guessed_tokens_are_rows_of_one_call(implementation) -> None:
    """The same bits, in states and caches, as one call after another."""
    hidden, weights, caches, _, cos, sin, eps, scale = cast(
        example(**CASES["batch"]), torch.float32
    )
    batch, capacity = len(hidden), caches[0].shape[1]
    pages = [cache.flatten(0, 1).unflatten(0, (-1, capacity // 8)) for cache in caches]
    table = torch.arange(8, dtype=torch.int32).flip(0)[None]
    fixed = dict(cos=cos, sin=sin, eps=eps, scale=scale)
    results = []
    with aigc_fast.backend(implementation):
        for rows in (range(batch), *([row] for row in range(batch))):
            if len(rows) != 1 or rows[0] == 0:
                caches = [page.clone() for page in pages]
                outs = []
            at = torch.tensor(list(rows))
            outs.append(
                ops.decoder_step(
                    hidden[at],
                    weights,
                    caches,
                    (at + 2).int(),
                    block_table=table.expand(len(rows), -1),
                    **fixed,
                )
            )
            results.append((torch.cat(outs), caches))
    (together, written), (alone, expected) = results[0], results[-1]
    if implementation == "cpu":
        assert torch.equal(together, alone) and all(map(torch.equal, written, expected))
    else:  # the library's products may differ by rounding
        torch.testing.assert_close(together, alone)


def test_has_no_derivative() -> None:
    hidden, weights, caches, lengths, cos, sin, *_ = cast(example(**CASES["one"]), torch.float32)
    with pytest.raises(RuntimeError, match="decoder_step has no derivative"):
        ops.decoder_step(hidden.requires_grad_(), weights, caches, lengths, cos, sin, eps=1e-5)


def test_without_a_compiled_kernel_it_is_the_layers() -> None:
    args = cast(example(**CASES["one"]), torch.float32)
    with aigc_fast.backend("reference"):
        hidden, weights, caches, lengths, cos, sin, eps, scale = args
        out = ops.decoder_step(hidden, weights, caches, lengths, cos, sin, eps=eps, scale=scale)
    assert torch.equal(out, STEP.reference(*cast(example(**CASES["one"]), torch.float32), False))
