"""Diffusion transformer with adaLN-Zero, for images and, with patches in time, for video."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Linear

from ..inputs import check_input, timesteps_of
from .attention import GELU, Attention, FeedForward
from .blocks import TimestepMLP
from .load import DiffusersModel, resolve

_OPTIONS = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=None,
    num_layers=28,
    attention_bias=True,
    sample_size=32,
    patch_size=2,
    num_embeds_ada_norm=1000,
    norm_eps=1e-5,
    dropout=0.0,  # these three have no effect on what is computed
    norm_num_groups=32,
    upcast_attention=False,
)
_FIXED = dict(
    activation_fn="gelu-approximate", norm_type="ada_norm_zero", norm_elementwise_affine=False
)
_TIME_FEATURES = 256


class Condition(nn.Module):
    """Timesteps and classes to one vector for each sample; the last class stands for "any"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(_TIME_FEATURES, width)
        table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(table.weight, std=0.02)
        self.class_embedder = nn.ModuleDict({"embedding_table": table})

    def forward(self, time: Tensor, labels: Tensor) -> Tensor:
        return self.timestep_embedder(time) + self.class_embedder["embedding_table"](labels)


class AdaLN(nn.Module):
    """What a condition makes of a block: shift, scale and gate of its attention and of its
    feed-forward."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.emb = Condition(num_classes, width)
        self.linear = _zero_linear(width, 6 * width)  # every block starts as the identity

    def forward(self, time: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(self.emb(time, labels))).chunk(6, dim=1)


class Block(nn.Module):
    """Attention and feed-forward, each residual added in the pass of the norm after it: what goes
    in is normed already, and what comes out is normed for the next block."""

    def __init__(self, num_classes: int, width: int, heads: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm1 = AdaLN(num_classes, width)
        self.attn1 = Attention(width, heads, bias=bias).apply(_xavier)
        self.ff = FeedForward(width, GELU).apply(_xavier)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        modulation: tuple[Tensor, ...],
        next_modulation: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """(x, normed) of the next block. Modulations: what `norm1` gave, of this block and the
        next."""
        gate, shift, scale, gate_mlp = modulation[2:]
        next_shift, next_scale = next_modulation[:2]
        normed, x = ops.gated_residual_norm(x, self.attn1(normed), gate, scale, shift, eps=self.eps)
        normed, x = ops.gated_residual_norm(
            x, self.ff(normed), gate_mlp, next_scale, next_shift, eps=1e-6
        )
        return x, normed


def _xavier(module: nn.Module) -> None:
    """The paper's start of attention, feed-forward and patches; PyTorch's own is 0.6 times as wide
    where a layer is square."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _zero_linear(in_features: int, out_features: int) -> Linear:
    linear = Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class DiT(DiffusersModel):
    """Predicts from noisy latents, timesteps and classes.

    config: what config.json of diffusers' DiTTransformer2DModel says; what is left out is its
            default, and names of parameters are its own. Besides, `patch_size` may be three
            numbers (frames, rows, columns): the model is then one of video, every token sees all
            frames, and the position in time is added to that in space.

    A new model starts as in the paper: each block is the identity, and the prediction is zero.
    ValueError names an option that is not supported or known.

    Source: Peebles and Xie 2022, arXiv:2212.09748.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        name = config.get("_class_name", "DiTTransformer2DModel")
        if name != "DiTTransformer2DModel":
            raise ValueError(f"_class_name must be 'DiTTransformer2DModel', got {name!r}")
        self.config = o = resolve(config, _OPTIONS, _FIXED)
        width = o.num_attention_heads * o.attention_head_dim
        patch = o.patch_size if isinstance(o.patch_size, tuple) else (o.patch_size,) * 2
        if len(patch) not in (2, 3):
            raise ValueError(f"patch_size must be 1, 2 or 3 numbers, got {o.patch_size!r}")
        if width % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {width}: no multiple of 4"
            )
        self.patch, self.out_channels = patch, o.out_channels or o.in_channels
        convolution = nn.Conv2d if len(patch) == 2 else nn.Conv3d
        proj = convolution(o.in_channels, width, patch, stride=patch)
        self.pos_embed = nn.ModuleDict({"proj": proj.apply(_xavier)})
        self.transformer_blocks = nn.ModuleList(
            Block(o.num_embeds_ada_norm, width, o.num_attention_heads, o.attention_bias, o.norm_eps)
            for _ in range(o.num_layers)
        )
        self.proj_out_1 = _zero_linear(width, 2 * width)
        self.proj_out_2 = _zero_linear(width, math.prod(patch) * self.out_channels)

    def forward(
        self, sample: Tensor, timesteps: Tensor | float, labels: Tensor | None = None
    ) -> Tensor:
        """sample (batch, in_channels, [frames,] height, width), each a multiple of its patch, and
        timesteps (batch,) or a number for all of them, to the same shape with out_channels.

        labels: int64 (batch,), num_embeds_ada_norm standing for "any", as None does throughout.
        """
        sizes = ("frames", "height", "width")[-len(self.patch) :]
        check_input("sample", sample, self.config.in_channels, *sizes)
        timesteps = timesteps_of(timesteps, sample)
        grid = tuple(n // p for n, p in zip(sample.shape[2:], self.patch, strict=True))
        if tuple(n * p for n, p in zip(grid, self.patch, strict=True)) != sample.shape[2:]:
            raise ValueError(
                f"sample must have sizes that {self.patch} divides, got {tuple(sample.shape)}"
            )
        if labels is None:
            labels = timesteps.new_full(
                timesteps.shape, self.config.num_embeds_ada_norm, dtype=torch.int64
            )
        time = ops.timestep_embedding(timesteps, _TIME_FEATURES, flip_sin_to_cos=True)
        time = time.to(sample.dtype)
        blocks: list[Any] = list(self.transformer_blocks)
        modulations = [block.norm1(time, labels) for block in blocks]
        # The condition of the first block is the output's too.
        last = self.proj_out_1(F.silu(blocks[0].norm1.emb(time, labels))).chunk(2, dim=1)
        modulations.append(last)

        x = self.pos_embed["proj"](sample).flatten(2).transpose(1, 2)
        x = x + self._positions(grid, x.device).to(x.dtype)
        shift, scale = modulations[0][:2]
        normed = ops.modulated_layer_norm(x, scale, shift, eps=1e-6)
        for block, modulation, following in zip(blocks, modulations, modulations[1:], strict=False):
            x, normed = block(x, normed, modulation, following)
        return self._image(self.proj_out_2(normed), grid)

    def _image(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(batch, tokens, patch * channels), channels innermost, as (batch, channels, ...)."""
        rank = len(grid)
        x = tokens.unflatten(2, (*self.patch, self.out_channels)).unflatten(1, grid)
        order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
        x = x.permute(0, 1 + 2 * rank, *order)
        return x.reshape(*x.shape[:2], *(n * p for n, p in zip(grid, self.patch, strict=True)))

    def _positions(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        base = self.config.sample_size // self.patch[-1]
        return _positions(grid, base, self.proj_out_1.in_features, device)


def _positions(grid: tuple[int, ...], base: int, width: int, device: torch.device) -> Tensor:
    """(tokens, width): half for the column, half for the row, as if there were `base` of each; and
    over all, that of the frame."""
    *frames, height, columns = grid

    def sines(count: int, dim: int, scale: float = 1.0) -> Tensor:
        steps = torch.arange(count, dtype=torch.float64, device=device) * scale
        return ops.timestep_embedding(steps, dim, downscale_freq_shift=0.0).float()

    across = sines(columns, width // 2, base / columns).expand(height, -1, -1)
    down = sines(height, width // 2, base / height)[:, None].expand(-1, columns, -1)
    plane = torch.cat([across, down], dim=-1).flatten(0, 1)
    return (plane + sines(frames[0], width)[:, None]).flatten(0, 1) if frames else plane
