"""The decoder that torch.compile makes fastest on a CPU: transformers' model in bfloat16, its
linear layers 4-bit weights through torch's own packed product, a static cache, a compiled step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP_SIZE = 32


class Int4Linear(nn.Module):
    """nn.Linear without bias, weights in 16 levels between the extremes of each group."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        groups = linear.weight.detach().float().view(rows, columns // GROUP_SIZE, GROUP_SIZE)
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8)
        codes = ((groups - low) / scale).round().clamp(0, 15).int().view(rows, columns)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # What code 8 stands for is the zero of that product.
        both = torch.cat([scale, low + 8 * scale], 2).bfloat16()
        self.scales_and_zeros = both.transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.flatten(0, -2), self.packed, GROUP_SIZE, self.scales_and_zeros
        )
        return y.view(*x.shape[:-1], y.shape[-1])


def with_int4_weights(model: nn.Module) -> nn.Module:
    """The model in bfloat16, every linear layer replaced."""
    model = model.bfloat16()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int4Linear(child))
    return model


def greedy_decoder(model: nn.Module, length: int) -> Callable[[list[int], int], list[int]]:
    """decode(prompt, count) -> the likeliest next tokens, by a compiled step of one token."""
    from transformers import StaticCache

    def step(token: Tensor, position: Tensor, cache: StaticCache) -> Tensor:
        out = model(token, position_ids=position[None], past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(step, dynamic=False)

    @torch.inference_mode()
    def decode(prompt: list[int], count: int) -> list[int]:
        cache = StaticCache(config=model.config, max_cache_len=length)
        token = step(torch.tensor([prompt]), torch.arange(len(prompt)), cache)
        tokens = [token]
        for position in range(len(prompt), len(prompt) + count - 1):
            token = compiled(token, torch.tensor([position]), cache)
            tokens.append(token)
        return torch.cat(tokens, 1)[0].tolist()

    return decode
