"""The text encoder of VITS: a transformer whose attention knows how far apart two phonemes are."""

from math import sqrt

import torch
from torch import Tensor, nn

from aigc_fast.nn._conv1d import convolve

from .layers import ChannelNorm, masked, same_conv


class RelativeAttention(nn.Module):
    """Self-attention with learned keys and values of distances up to `window`.

    score(i, j) = q_i (k_j + r_{j-i}) / sqrt(d), and the result is sum_j p_ij (v_j + s_{j-i}), where
    r and s are 0 beyond the window.

    Source: Shaw et al. 2018, arXiv:1803.02155.
    """

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        size = channels // num_heads
        self.conv_q, self.conv_k, self.conv_v, self.conv_o = (
            nn.Conv1d(channels, channels, 1) for _ in range(4)
        )
        self.emb_rel_k = nn.Parameter(torch.randn(1, 2 * window + 1, size) * size**-0.5)
        self.emb_rel_v = nn.Parameter(torch.randn(1, 2 * window + 1, size) * size**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (batch, channels, time); mask as of `layers.length_mask`, of keys."""
        q, k, v = (
            convolve(x, conv).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
            for conv in (self.conv_q, self.conv_k, self.conv_v)
        )  # (batch, heads, time, size)
        q = q * q.shape[-1] ** -0.5
        distance, neighbours, inside = self._places(q.shape[2], q.device)
        heads = q.shape[:2]
        by_distance = torch.nn.functional.pad(q @ self.emb_rel_k.transpose(1, 2), (1, 1))
        scores = q @ k.transpose(2, 3) + by_distance.gather(3, distance.expand(*heads, -1, -1))
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        weights = scores.softmax(3)
        near = weights.gather(3, neighbours.expand(*heads, -1, -1)) * inside
        y = weights @ v + near @ self.emb_rel_v
        return convolve(y.transpose(2, 3).flatten(1, 2), self.conv_o)

    def _places(self, time: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where each (i, j) finds its distance, 0 and the last being those beyond the window; the
        j of each (i, distance), and whether there is one."""
        at = torch.arange(time, device=device)
        w = self.window
        distance = (at - at[:, None]).clamp(-w - 1, w + 1) + w + 1
        neighbours = at[:, None] + torch.arange(-w, w + 1, device=device)
        inside = (neighbours >= 0) & (neighbours < time)
        return distance, neighbours.clamp(0, time - 1), inside


class FeedForward(nn.Module):
    """conv(relu(conv(x)))."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv_1 = same_conv(channels, kernel_size, outputs=filter_channels)
        self.conv_2 = same_conv(filter_channels, kernel_size, outputs=channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = convolve(masked(x, mask), self.conv_1)
        return masked(convolve(masked(y, mask), self.conv_2, slope=0.0), mask)


class Encoder(nn.Module):
    """Layers of attention and feed-forward, each followed by a norm of the sum."""

    def __init__(
        self,
        channels: int,
        filter_channels: int,
        num_heads: int,
        num_layers: int,
        kernel_size: int,
        window: int,
    ) -> None:
        super().__init__()
        layers = range(num_layers)
        self.attn_layers = nn.ModuleList(
            RelativeAttention(channels, num_heads, window) for _ in layers
        )
        self.norm_layers_1 = nn.ModuleList(ChannelNorm(channels) for _ in layers)
        self.ffn_layers = nn.ModuleList(
            FeedForward(channels, filter_channels, kernel_size) for _ in layers
        )
        self.norm_layers_2 = nn.ModuleList(ChannelNorm(channels) for _ in layers)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = masked(x, mask)
        parts = (self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2)
        for attention, norm_1, feed_forward, norm_2 in zip(*parts, strict=True):
            x = norm_1(x + attention(x, mask))
            x = norm_2(x + feed_forward(x, mask))
        return masked(x, mask)


class TextEncoder(nn.Module):
    """Phonemes to their states, and to the mean and log deviation of the prior of their frames."""

    def __init__(self, vocab_size: int, latent_channels: int, channels: int, *encoder: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, channels)
        self.encoder = Encoder(channels, *encoder)
        self.proj = nn.Conv1d(channels, 2 * latent_channels, 1)

    def forward(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """ids (batch, n) to states (batch, channels, n), mean and log deviation (batch,
        latent_channels, n)."""
        x = self.emb(ids) * sqrt(self.emb.embedding_dim)
        x = self.encoder(x.transpose(1, 2), mask)
        mean, log_deviation = masked(convolve(x, self.proj), mask).chunk(2, dim=1)
        return x, mean, log_deviation
