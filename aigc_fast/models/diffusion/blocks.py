"""The parts of U-Nets and autoencoders; modules are named as diffusers names them."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aigc_fast import ops
from aigc_fast.nn import Conv2d, GroupNormAct, Linear, ModulatedGroupNormAct


class TimestepMLP(nn.Module):
    """linear, SiLU, linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, out_features)
        self.linear_2 = Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """(skip(x) + h) / output_scale, h = conv(silu(norm(conv(silu(norm(x)))))).

    The embedding is added before the second norm or, if `modulated`, gives its scale and shift.
    An `embedding_dim` of None makes a block without one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int | None,
        groups: int,
        eps: float,
        modulated: bool = False,
        dropout: float = 0.0,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.modulated, self.output_scale = modulated, output_scale
        norm = ModulatedGroupNormAct if modulated else GroupNormAct
        self.norm1 = GroupNormAct(groups, in_channels, eps, act="silu")
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if embedding_dim is not None:
            self.time_emb_proj = Linear(embedding_dim, (1 + modulated) * out_channels)
        self.norm2 = norm(groups, out_channels, eps, act="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """embedding: (batch, embedding_dim), its activation taken."""
        h = self.conv1(self.norm1(x))
        if embedding is None:
            h = self.norm2(h)
        elif self.modulated:
            h = self.norm2(h, *self.time_emb_proj(embedding).chunk(2, dim=1))
        else:
            h = self.norm2(h + self.time_emb_proj(embedding)[:, :, None, None])
        h = self.conv2(self.dropout(h))
        out = (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h
        return out if self.output_scale == 1 else out / self.output_scale


class Downsample(nn.Module):
    """To half the size; without padding, rows and columns are missing on one side alone."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """To twice the size, or to that of a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return ops.upsample_conv2d(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, size=size))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by its attention, if there is any."""

    def __init__(self, resnets: Iterable[ResnetBlock], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if found := list(attentions):
            self.attentions = nn.ModuleList(found)

    def step(self, i: int, x: Tensor, embedding: Tensor | None, context: Tensor | None) -> Tensor:
        x = self.resnets[i](x, embedding)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class DownLevel(Level):
    def extend(self, downsample: Downsample) -> None:
        self.downsamplers = nn.ModuleList([downsample])

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        context: Tensor | None = None,
        skips: list[Tensor] | None = None,
    ) -> Tensor:
        """Appends what the way up will read to `skips`; None where there are no skips."""
        for i in range(len(self.resnets)):
            x = self.step(i, x, embedding, context)
            if skips is not None:
                skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            if skips is not None:
                skips.append(x)
        return x


class UpLevel(Level):
    def extend(self, upsample: Upsample) -> None:
        self.upsamplers = nn.ModuleList([upsample])

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        context: Tensor | None = None,
        skips: list[Tensor] | None = None,
    ) -> Tensor:
        """Takes what the way down left from the end of `skips`; None where there are no skips."""
        for i in range(len(self.resnets)):
            if skips is not None:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self.step(i, x, embedding, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, None if skips is None else skips[-1].shape[2:])
        return x


class MiddleLevel(Level):
    """Between two residual blocks there is attention, if there is any."""

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        x = self.resnets[0](x, embedding)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x, context)
        return self.resnets[1](x, embedding)
