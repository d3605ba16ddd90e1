"""One token for every sequence through all layers of a decoder with quantised weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aigc_fast.ops._decoder_step import check, reference
from aigc_fast.ops._registry import define


def decoder_step(
    hidden: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    lengths: Tensor,
    cos: Tensor | Sequence[Tensor],
    sin: Tensor | Sequence[Tensor],
    *,
    eps: float,
    scale: float | None = None,
    quantize_activations: bool = False,
    block_table: Tensor | None = None,
    cache_scales: Tensor | None = None,
    qkv_biases: Sequence[Tensor] | None = None,
    query_key_norms: Sequence[Tensor] | None = None,
    post_norms: Sequence[Tensor] | None = None,
    rotations: Sequence[int] = (),
    windows: Sequence[int] = (),
    softcap: float | None = None,
    residual_scale: float = 1.0,
    activation: str = "swiglu",
    routers: Sequence[Tensor] | None = None,
    experts_per_token: int = 0,
    normalize_experts: bool = True,
) -> Tensor:
    """The normalised states after the last layer of a decoder, for one new token each.

    For each layer x += output(attention(norm(x))), x += down(silu(gate(norm(x))) * up(norm(x))),
    the norms RMS norms, query and key rotated by halves; then the last norm. So Llama's; what
    others have beside it are the arguments from `qkv_biases` on: the bias of Qwen2, the norms of
    query and key of Qwen3, the windows of Mistral, the norms behind attention and MLP of Gemma, the
    experts of Mixtral.

    hidden:  (batch, hidden_size), the embedded tokens, float32, bfloat16 or float16 (float64 in
             the reference alone).
    weights: six tensors a layer, then the weight of the last norm (hidden_size,). Of a layer: the
             weight of the norm before attention, the packed weights of query, key and value (rows
             one after another) and of the output projection, the weight of the norm before the
             MLP, the packed weights of gate and up (one after the other) and of down. Norms have
             the dtype of hidden, packed weights come from `pack_weight` with groups of 32 columns
             and 4 or 8 bits. Without the norms it is four tensors a layer.
    caches:  keys and values of each layer in turn, (batch, capacity, num_kv_heads, head_dim), all
             float32, bfloat16, float16, int8, float8_e4m3fn or float8_e5m2, of one layout; the new
             token's are written in place. With a block_table:
             (num_pages, page_size, num_kv_heads, head_dim).
    lengths: int32 (batch,), the entries there are, so the position of the new token; not changed.
    cos, sin: float32 (positions, r / 2), of every position below capacity at least; r <= head_dim
             features of a head rotate. Or several such tables, all of one r, for `rotations`.
    eps:     added to the mean square in every norm.
    scale:   factor on the attention scores; None is 1 / sqrt(head_dim).
    quantize_activations: as for `quantized_linear`, in every product.
    block_table: int32 (batch, pages), as for `decode_attention`; capacity is pages * page_size.
             Sequences may share pages, but no two new tokens a slot. All are written before any
             is attended to: so the next tokens of one sequence, as guessed, can be rows of one
             call, with the same pages and lengths that go on.
    cache_scales: float32 (2 * layers, num_kv_heads), what the numbers of each head of each of the
             caches are to be multiplied by, as for `decode_attention`; None is 1.
    qkv_biases: of each layer one, ((num_heads + 2 * num_kv_heads) * head_dim,), in the dtype of
             hidden, as are those of the next two.
    query_key_norms: of each layer two weights of RMS norms before the rotation, over each head of
             query and of key, (head_dim,); or over all heads together, (num_heads * head_dim,) and
             (num_kv_heads * head_dim,), in all layers.
    post_norms: of each layer two weights (hidden_size,) of RMS norms, of what attention and what
             the MLP gives before it is added to x.
    rotations: of each layer the number of the table that it rotates by, -1 where it does not; () is
             the first table everywhere.
    windows: of each layer how many of the newest tokens it sees, the new one included, 0 for all;
             () is all everywhere.
    softcap: attention scores become softcap * tanh(score / softcap).
    residual_scale: factor on what is added to x.
    activation: "swiglu", or "geglu_tanh": gelu in its tanh form in place of silu.
    routers: of each layer one, (num_experts, hidden_size), in the dtype of hidden: the MLP is the
             sum over the experts_per_token experts with the largest softmax(router @ norm(x)), ties
             by the lower number, of that factor times their MLP. The weights of gate and up are
             then those of one expert after those of another, and so are those of down; each has
             multiples of 16 rows.
    experts_per_token: those that a token is sent to; 0 without routers.
    normalize_experts: their factors are made to add up to one.

    Returns (batch, hidden_size) in the dtype of hidden. Computes in fp32 throughout; key and value,
    divided by their scales, are rounded to the dtype of the caches, as are query and what attention
    gives where it has 16 bits. Bytes that must move: the
    weights once, the valid entries of the caches that are in a window.

    On a CPU it is one parallel region for all layers. Elsewhere it is the layers' operators. The
    bits of a sequence depend neither on the batch it is in nor on pages.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and on the CPU for a length
    outside [0, capacity) or a page outside [0, num_pages), before anything is written; RuntimeError
    if a gradient is asked for.
    """
    groups = qkv_biases, query_key_norms, post_norms, routers
    small = [t for some in groups for t in some or ()]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *weights, *small)):
        raise RuntimeError("decoder_step has no derivative: call it under torch.no_grad()")
    gelu = _GELU.get(activation)
    if gelu is None:
        raise ValueError(f"activation must be one of {', '.join(_GELU)}, got {activation!r}")
    if scale is None:
        scale = caches[0].shape[3] ** -0.5
    cos = [cos] if isinstance(cos, Tensor) else cos
    sin = [sin] if isinstance(sin, Tensor) else sin
    return _decoder_step(
        hidden, weights, caches, lengths, cos, sin, eps, scale, quantize_activations, block_table,
        cache_scales, qkv_biases, query_key_norms, post_norms, rotations, windows, softcap,
        residual_scale, gelu, routers, experts_per_token, normalize_experts,
    )  # fmt: skip


_GELU = {"swiglu": False, "geglu_tanh": True}

_decoder_step = define(
    "decoder_step(Tensor hidden, Tensor[] weights, Tensor(a!)[] caches, Tensor lengths,"
    " Tensor[] cos, Tensor[] sin, float eps, float scale, bool quantize_activations,"
    " Tensor? block_table=None, Tensor? cache_scales=None, Tensor[]? qkv_biases=None,"
    " Tensor[]? query_key_norms=None, Tensor[]? post_norms=None, int[] rotations=[],"
    " int[] windows=[], float? softcap=None, float residual_scale=1.0, bool gelu=False,"
    " Tensor[]? routers=None, int experts_per_token=0, bool normalize_experts=True) -> Tensor",
    reference,
    check,
    stem=None,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
